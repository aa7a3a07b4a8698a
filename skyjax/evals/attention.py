"""Where words look: the attention of single words of a caption over its image, by the local term of training.

In: a model that was trained with `objective.weights.words`, samples and a text each. Out: pictures, bright where a word
looks.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from skyjax.errors import UserError
from skyjax.evals import pictures
from skyjax.evals.words import Worded
from skyjax.sample import Sample
from skyjax.train.words import Words

WORDS = 4  # of a text, those that look most narrowly
CELLS = 8  # a side of the grid that they look at, or as many as the features have
_SHORTEST = 3  # letters of a word that is worth a picture
_DARKEST = 0.2


def look(model: Worded, text: Words, samples: Sequence[Sample], texts: Sequence[str], modality: str) -> list[Any]:
    """A text's words over its image, one dict a text: "text", and "words", pairs of a word and a picture's address.

    Args:
      model: encodes the samples.
      text: its text side.
      samples: of one size, modality by modality.
      texts: one a sample.
      modality: of the picture, where the sample has it.

    Returns:
      Nothing where the model never learned where words are.
    """
    if not samples:
        return []
    output = model.encode(list(samples))
    cells = min(CELLS, *output["fused"].shape[1:3])
    try:
        seen = text.look(output["fused"], output["fused_valid"], texts, cells)
    except UserError:
        return []
    found = []
    for sample, told, (said, shares) in zip(samples, texts, seen, strict=True):
        image = pictures.portrait(sample, modality)
        plain = [word.strip(".,;:!?") for word in said]
        words = {word: share for word, share in zip(plain, shares, strict=True) if len(word) >= _SHORTEST}
        narrow = sorted(words, key=lambda word: -float(words[word].max()))[:WORDS]
        shown = [[word, pictures.data_uri(lit(image, share))] for word, share in words.items() if word in narrow]
        found.append({"text": told, "words": [["", pictures.data_uri(image)], *shown]})
    return found


def lit(image: pictures.Image, share: Float[np.ndarray, "g g"]) -> pictures.Image:
    """An image as bright as the attention on each of its cells, the strongest fully."""
    rows, columns = (np.arange(side) * len(share) // side for side in image.shape[:2])
    light = _DARKEST + (1 - _DARKEST) * share / max(float(share.max()), 1e-12)
    return np.rint(image * light[rows[:, None], columns][..., None]).astype(np.uint8)
