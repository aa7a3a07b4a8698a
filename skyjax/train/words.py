"""The text side of a trained model, for use: `skyjax.load(path).words`.

Unit vectors of texts and of images that can be compared by their products, texts written of images, and answers.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Bool, Float

from skyjax.errors import UserError
from skyjax.input.tokenizer import Tokenizer
from skyjax.models import generate, text
from skyjax.objectives.heads import unit
from skyjax.objectives.image_text import attend, grids

BATCH_SIZE = 64
ROOM = 8  # tokens that too long a question leaves to its answer


@dataclasses.dataclass(frozen=True)
class Words:
    """Text tower, projections of images, and the decoder where there is one; all the teacher's.

    Attributes:
      config: of the experiment.
      params: {"text", "decoder"} as the model has them.
      head: objectives/image_text.py, `init_head`.
      tokenizer: that it was trained with.
    """

    config: ml_collections.ConfigDict
    params: Mapping[str, Any]
    head: Mapping[str, Any]
    tokenizer: Tokenizer

    @property
    def streams(self) -> tuple[str, ...]:
        """Image sides that met words: "fused", or modalities."""
        return tuple(self.head.get("streams", {}))

    @property
    def kind(self) -> str:
        """Of the contrastive loss: "sigmoid" or "softmax"."""
        return str(self.config.objective.text.kind)

    @property
    def temperature(self) -> float:
        """What products are divided by in the loss."""
        low, high = self.config.objective.text.bounds
        return min(max(math.exp(float(self.head["temperature"])), low), high)

    @property
    def bias(self) -> float:
        """What is added to them then; 0 for "softmax"."""
        return float(self.head.get("bias", 0.0))

    @property
    def can_caption(self) -> bool:
        """Whether there is a decoder."""
        return "decoder" in self.params

    def encode(self, texts: Sequence[str], batch_size: int = BATCH_SIZE) -> Float[np.ndarray, "n e"]:
        """Unit vectors of texts; a blank text has zeros."""
        read = _reader(_key(self.config.model))
        rows = [np.zeros((0, self.config.model.text.embed_dim), np.float32)]
        for start in range(0, len(texts), batch_size):
            batch = list(texts[start : start + batch_size])
            filled = batch + [""] * (batch_size - len(batch))
            tokens, valid = self.tokenizer.encode(filled, self.config.data.text.length)
            rows.append(np.asarray(read(self.params["text"], tokens, valid))[: len(batch)])
        return np.concatenate(rows)

    def project(self, stream: str, features: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "n e"]:
        """Unit vectors of images.

        Args:
          stream: one of `streams`.
          features: means over valid places: of the output's "fused", or over dates too of its "spatial" of a modality.

        Raises:
          UserError: this side never met words.
        """
        if stream not in self.streams:
            raise UserError(f'"{stream}" never met words in this checkpoint; it aligned {", ".join(self.streams)}')
        kernel = self.head["streams"][stream]["kernel"]
        return np.asarray(unit(jnp.einsum("nc,ce->ne", jnp.float32(features), kernel, precision="highest")))

    def caption(
        self,
        fused: Float[np.ndarray, "b h w d"],
        valid: Bool[np.ndarray, "b h w"],
        method: str = "greedy",
        *,
        questions: Sequence[str] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> list[str]:
        """A text an image.

        Args:
          fused: the output's.
          valid: its "fused_valid".
          method: "greedy", "beam" or "nucleus".
          questions: one an image, to be answered; None: tell of the image.
          seed: of the draws of "nucleus".
          options: of `models.generate.Decoding`: beams, length_penalty, p, temperature, length.

        Raises:
          UserError: there is no decoder, or an option makes no sense.
        """
        if not self.can_caption:
            raise UserError("this checkpoint has no decoder; train one with model.decoder")
        tokenizer, length = self.tokenizer, self.config.data.text.length
        prompt: dict[str, Any] = {}
        if questions is not None:
            asked = tokenizer.encode_pairs(questions, [None] * len(questions), max(length - ROOM, length // 2, 3))
            prompt = {"prompt": asked[0], "prompt_valid": asked[1]}
        try:
            decoding = generate.Decoding(
                tokenizer.bos,
                tokenizer.eos,
                tokenizer.pad,
                tokenizer.size,
                **({"length": length, "method": method} | options),
            )
            b, width = len(fused), fused.shape[-1]
            found = generate.generate(
                self.config.model,
                self.params["decoder"],
                jnp.asarray(fused).reshape(b, -1, width),
                jnp.asarray(valid).reshape(b, -1),
                decoding,
                key=jax.random.key(seed),
                **prompt,
            )
        except (ValueError, TypeError) as error:
            raise UserError(f"captions: {error}") from error
        return tokenizer.decode(np.asarray(found.tokens), np.asarray(found.written))

    def look(
        self, fused: Float[np.ndarray, "b h w d"], valid: Bool[np.ndarray, "b h w"], texts: Sequence[str], cells: int
    ) -> list[tuple[list[str], Float[np.ndarray, "l g g"]]]:
        """Where each word of a text looks: the words, and their attention over a grid of `cells` a side of its image.

        That of a word is the mean of its pieces'.

        Raises:
          UserError: the model was trained without `objective.weights.words`.
        """
        if "local" not in self.head:
            raise UserError("this checkpoint never looked for words in places; train with objective.weights.words")
        local, found = self.head["local"], []
        regions, there = grids(jnp.asarray(fused), jnp.asarray(valid), (cells,))
        regions = unit(jnp.einsum("bnc,ce->bne", regions, local["places"]["kernel"]))
        tokens, present = self.tokenizer.encode(list(texts), self.config.data.text.length)
        read = text.apply(self.config.model, self.params["text"], jnp.asarray(tokens), jnp.asarray(present))["tokens"]
        vectors = unit(jnp.einsum("bld,de->ble", read.astype(jnp.float32), local["words"]["kernel"]))
        for i in range(len(texts)):
            one = slice(i, i + 1)
            sharpness = self.config.objective.text.words.sharpness
            attention, _ = attend(regions[one], there[one], vectors[one], sharpness)
            shares = np.asarray(attention[0, 0]).reshape(-1, cells, cells)
            said = self.tokenizer.split(tokens[i][present[i]])
            found.append(([word for word, _ in said], np.array([shares[own].mean(0) for _, own in said])))
        return found


def _key(model: ml_collections.ConfigDict) -> str:
    return json.dumps(model.to_dict(), sort_keys=True)


@functools.lru_cache(maxsize=4)
def _reader(model: str) -> Any:
    """The jitted text tower of a model's config, to unit vectors."""
    config = ml_collections.ConfigDict(json.loads(model))

    @jax.jit
    def read(params: Any, tokens: Any, valid: Any) -> Any:
        embedding = text.apply(config, params, tokens, valid)["embedding"]
        return unit(jnp.where(valid.any(1, keepdims=True), embedding, 0))

    return read
