"""What the probes with words need of a model, and features of images in the space of words.

`Words` is the text side of a trained model (train/words.py): unit vectors of texts and of images, comparable by their
products. A model without a text tower has none, and these probes refuse it.
"""

import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Float, Int

from skyjax.errors import UserError, nearest
from skyjax.evals.features import FUSED, Encoder, Readable, encoder_features, extract_all


class Words(Protocol):
    """The text side of a model; `skyjax.load(...).words` is one.

    Attributes:
      streams: image sides that meet words: "fused", or modalities.
      can_caption: whether there is a decoder.
    """

    @property
    def streams(self) -> Sequence[str]:
        """As above."""

    @property
    def can_caption(self) -> bool:
        """As above."""

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "n e"]:
        """Unit vectors of texts."""

    def project(self, stream: str, features: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "n e"]:
        """Unit vectors of images from their features (evals/features.py)."""

    def caption(
        self, fused: Float[np.ndarray, "b h w d"], valid: Bool[np.ndarray, "b h w"], method: str, **options: Any
    ) -> list[str]:
        """A text an image, by "greedy", "beam" or "nucleus"."""


class Worded(Encoder, Protocol):
    """A model with words, or without."""

    @property
    def words(self) -> Words | None:
        """The text side."""


def words_of(model: Worded, task: str) -> Words:
    """The model's text side.

    Raises:
      UserError: it has none.
    """
    if model.words is None:
        raise UserError(
            f"--task={task} needs a checkpoint that was trained with texts, and this one has no text tower; train one"
            " by a config with model.text (configs/image_text.py)"
        )
    return model.words


def check_stream(words: Words, stream: str) -> None:
    """Refuses an image side that was not trained to meet words.

    Raises:
      UserError: with those that were.
    """
    if stream not in words.streams:
        raise UserError(
            f"--modality={stream} never met words in this checkpoint{nearest(stream, words.streams)}; it aligned"
            f" {', '.join(words.streams)}"
        )


def pooling(stream: str) -> str:
    """What an image's vector is made of, in words."""
    if stream == FUSED:
        return "mean of the fused features over valid places, projected to words"
    return f"mean of the {stream} encoder over valid places and dates, projected to words"


def image_vectors(
    model: Worded, words: Words, images: Readable, which: Int[np.ndarray, "n"], stream: str
) -> tuple[Float[np.ndarray, "n e"], float]:
    """Unit vectors of images, and the seconds that they took."""
    found, seconds = extract_all(images, which, {stream: encoder_features(model, kind=stream)})
    return _checked(words.project(stream, found[stream])), seconds[stream]


def text_vectors(words: Words, texts: Sequence[str]) -> tuple[Float[np.ndarray, "n e"], float]:
    """Unit vectors of texts, equal texts encoded once so that they are equal to the bit; and the seconds."""
    start = time.perf_counter()
    unique = list(dict.fromkeys(texts))
    vectors = _checked(words.encode(unique))
    number = {text: i for i, text in enumerate(unique)}
    return vectors[[number[text] for text in texts]], time.perf_counter() - start


def _checked(vectors: np.ndarray) -> Float[np.ndarray, "n e"]:
    bad = int((~np.isfinite(vectors)).any(1).sum())
    if bad:
        raise UserError(f"{bad:,} of {len(vectors):,} vectors of this checkpoint are not finite; take an earlier one")
    return np.asarray(vectors, np.float32)
