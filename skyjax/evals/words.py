"""What the probes with words need of a model, and features of images in the space of words.

The text side of a trained model (train/words.py) gives unit vectors of texts and of images, comparable by their
products. A model without a text tower has none, and these probes refuse it.
"""

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Float, Int

from skyjax.errors import UserError, nearest
from skyjax.evals.features import FUSED, Encoder, Readable, encoder_features, extract_all
from skyjax.train.words import Words


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
    return f"mean of the {stream} encoder behind its up-head over valid places and dates, projected to words"


def image_vectors(
    model: Worded, words: Words, images: Readable, which: Int[np.ndarray, "n"], stream: str
) -> tuple[Float[np.ndarray, "n e"], float]:
    """Unit vectors of images, and the seconds that they took."""
    found, seconds = extract_all(images, which, {stream: encoder_features(model, kind=stream, level="spatial")})
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
