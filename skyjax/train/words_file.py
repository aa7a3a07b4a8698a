"""The text side in a weights folder: files of its own, so that who wants the encoder alone need not know of them.

FOLDER/words.safetensors    float32, under listed names (models/listed.py): "text." is the tower, "decoder." the
                            decoder, "heads.image_text." what brings images and words together
FOLDER/tokenizer.model      the SentencePiece model that they were trained with
"""

import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np

from skyjax.errors import UserError
from skyjax.input.tokenizer import FILE as TOKENIZER
from skyjax.input.tokenizer import Tokenizer
from skyjax.models.listed import from_listed, to_listed
from skyjax.objectives import image_text
from skyjax.objectives.heads import widths_of
from skyjax.train import reading, weights
from skyjax.train.words import Words

WORDS = "words.safetensors"


def save(folder: pathlib.Path, words: Words) -> None:
    """Writes both files into a folder that is there."""
    weights.write_safetensors(folder / WORDS, listed(words))
    words.tokenizer.save(folder / TOKENIZER)


def load(folder: pathlib.Path, config: ml_collections.ConfigDict, digest: str) -> Words:
    """What `save` wrote, every array checked against the config.

    Args:
      folder: of the files.
      config: of the experiment.
      digest: of the tokenizer, as the folder's notes have it.

    Raises:
      UserError: a file is missing, damaged, or holds other parameters than the config asks for.
    """
    tokenizer = Tokenizer(folder / TOKENIZER)
    if tokenizer.digest != digest:
        raise UserError(f'"{folder / TOKENIZER}" is not the tokenizer that was written with the weights; copy it anew')
    found = weights.read_safetensors(folder / WORDS)
    wanted = weights.listed_zeros(lambda key: _fresh(config, key))
    weights.hold(found, {name: (value.shape, value.dtype.name) for name, value in wanted.items()}, folder / WORDS)
    tree = jax.device_put(from_listed(found), jax.local_devices()[0])
    return Words(config, tree, tree.pop("heads", {}).get("image_text", {}), tokenizer)


def listed(words: Words) -> dict[str, np.ndarray]:
    """Listed name -> parameter."""
    tree = {**words.params, "heads": {"image_text": words.head}}
    return to_listed(jax.tree.map(np.asarray, tree))


def _fresh(config: ml_collections.ConfigDict, key: jax.Array) -> dict[str, Any]:
    head = image_text.init_head(config.objective, widths_of(config.model), config.model.text, key)
    return {**reading.init_params(config.model, key), "heads": {"image_text": head}}
