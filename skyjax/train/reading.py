"""What the models make of a batch's captions, for the objective: the text tower reads, the decoder writes.

batch["text"] = {"tokens": (b, k, l), "valid": (b, k, l), "words": (b, k),
                 "written": {"tokens": (b, n), "valid": (b, n), "counted": (b, n)}}    "written" with a decoder only
"""

import functools
from typing import Any

import jax
import ml_collections
from jaxtyping import Array, Key

from skyjax.models import decoder, text
from skyjax.objectives.image_text import Read, Written
from skyjax.parallel.sharding import place_rows
from skyjax.sample import Batch

Params = dict[str, Any]


def init_params(model: ml_collections.ConfigDict, key: Key[Array, ""]) -> Params:
    """Fresh parameters of the towers that the config has: "text", "decoder"."""
    towers = {"text": text.init, "decoder": decoder.init}
    return {
        name: init(model, jax.random.fold_in(key, number))
        for number, (name, init) in enumerate(towers.items())
        if model.get(name)
    }


def read(
    model: ml_collections.ConfigDict,
    params: Params,
    batch: Batch,
    images: Any,
    key: Key[Array, ""] | None,
) -> Read | None:
    """None where the model has no text tower.

    Args:
      model: the config's `model`.
      params: with "text", and "decoder" where the model has one.
      batch: with "text".
      images: the encoder's output on the global views; the decoder sees the first of a sample.
      key: of the drop path; None turns it off.
    """
    if not model.get("text"):
        return None
    words = batch["text"]
    keys = (None, None) if key is None else jax.random.split(key)
    b, k, n = words["tokens"].shape
    tower = text.apply(
        model,
        params["text"],
        words["tokens"].reshape(b * k, n),
        words["valid"].reshape(b * k, n),
        key=keys[0],
        place=place_rows,
    )
    return Read(
        tower["embedding"].reshape(b, k, -1),
        tower["tokens"].reshape(b, k, n, -1),
        words["valid"],
        words["words"],
        _write(model, params["decoder"], words["written"], images, keys[1]) if model.get("decoder") else None,
    )


def _write(
    model: ml_collections.ConfigDict, params: Params, texts: Batch, images: Any, key: Key[Array, ""] | None
) -> Written:
    b, _, *_, width = images["fused"].shape
    hidden = decoder.features(
        model,
        params,
        texts["tokens"][:, :-1],
        texts["valid"][:, :-1],
        images["fused"][:, 0].reshape(b, -1, width),
        images["fused_valid"][:, 0].reshape(b, -1),
        key=key,
        place=place_rows,
    )
    scores = functools.partial(decoder.logits, model, params)
    return Written(hidden, texts["tokens"][:, 1:], texts["counted"][:, 1:], scores)
