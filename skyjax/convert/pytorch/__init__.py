"""An encoder as a folder for PyTorch users, who need neither skyjax nor JAX.

The folder holds skyjax_encoder.py (the module, copied from here), model.safetensors (its state dict), config.json (the
model, its statistics, and what transformers wants to know) and modeling_skyjax.py (for `AutoModel.from_pretrained`).
Of a model that was trained with texts it also holds words.safetensors, which is the text tower and the projections to
words, and tokenizer.model. The decoder and the local projections (where words look) stay in skyjax.
"""

import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

import skyjax
from skyjax.config import run_file
from skyjax.convert import trial
from skyjax.errors import UserError
from skyjax.input.tokenizer import FILE as TOKENIZER
from skyjax.models.listed import to_listed
from skyjax.objectives.heads import widths_of
from skyjax.sample import Images
from skyjax.train.pretrained import Pretrained
from skyjax.train.weights import write_safetensors
from skyjax.train.words import Words
from skyjax.train.words_file import WORDS

HERE = pathlib.Path(__file__).parent
MODULE, WRAPPER = "skyjax_encoder.py", "modeling_skyjax.py"
TORCH = "torch==2.13.0"


def write(pretrained: Pretrained, folder: str | os.PathLike[str]) -> None:
    """Writes the export; works without PyTorch.

    Args:
      pretrained: what is exported.
      folder: made where it does not exist.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (MODULE, WRAPPER):
        shutil.copyfile(HERE / name, folder / name)
    (folder / "config.json").write_text(json.dumps(_config(pretrained), indent=1, sort_keys=True) + "\n")
    write_safetensors(folder / "model.safetensors", state_dict(pretrained), metadata={"format": "pt"})
    if pretrained.words is not None:
        write_safetensors(folder / WORDS, words_state_dict(pretrained.words), metadata={"format": "pt"})
        pretrained.words.tokenizer.save(folder / TOKENIZER)


def check(pretrained: Pretrained, folder: str | os.PathLike[str]) -> float:
    """Loads the written files with PyTorch and compares them with skyjax on random images, in float32.

    Dates, bands, pixels and modalities are missing here and there, and the images are no whole number of patches. Words
    are compared by the vectors of a few texts and of the images.

    Returns:
      The largest max |difference| / max |skyjax's| of any output; infinite where masks differ.

    Raises:
      UserError: PyTorch is not installed.
    """
    try:
        import torch
    except ImportError as missing:
        raise UserError(f'the check of a PyTorch export needs PyTorch: "pip install {TORCH}"') from missing
    module = run_file(pathlib.Path(folder) / MODULE, "export")
    model, encode = module.SkyjaxEncoder.from_folder(folder), trial.encoder(pretrained)
    words = None if pretrained.words is None else module.SkyjaxWords.from_folder(folder)

    def error(images: Mapping[str, Images]) -> float:
        want = encode(images)
        with torch.inference_mode():
            got = model(images, trial.LONLAT)
            found = trial.largest_error(want, got)
            if pretrained.words is None or words is None:
                return found
            streams = [stream for stream in pretrained.words.streams if stream in ("fused", *images)]
            vectors = {"text": words.encode(trial.TEXTS), **{stream: words.images(got, stream) for stream in streams}}
        return max(found, trial.largest_error(trial.vectors(pretrained.words, want, streams), vectors))

    return max(error(images) for images in trial.cases(pretrained))


def state_dict(pretrained: Pretrained) -> dict[str, np.ndarray]:
    """The parameters and the table of prototypes by the names and in the layouts of the PyTorch module."""
    listed = pretrained.listed()
    if _has_prototypes(pretrained):
        listed["prototypes.table"] = np.asarray(pretrained.prototypes)
    else:
        listed = {name: x for name, x in listed.items() if not name.startswith("prototypes.")}
    return dict(_torch_parameter(name, x) for name, x in listed.items())


def words_state_dict(words: Words) -> dict[str, np.ndarray]:
    """Text tower and projections by the names and in the layouts of the PyTorch module."""
    tree = jax.tree.map(np.asarray, {"text": words.params["text"], "streams": words.head.get("streams", {})})
    found = dict(_torch_parameter(name, x) for name, x in to_listed(tree).items())
    return {name.replace("tokens.table", "tokens.weight"): x for name, x in found.items()}


def _has_prototypes(pretrained: Pretrained) -> bool:
    return pretrained.config.model.get("prototypes") is not None and pretrained.prototypes is not None


def _torch_parameter(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    parent, _, leaf = name.rpartition(".")
    if parent.endswith(".cells"):  # of an up-head: (d, factor, factor, s)
        array = array.reshape(len(array), -1) if leaf == "kernel" else array.ravel()
    if leaf == "kernel":
        array = array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)
    name = f"{parent}.weight" if leaf in ("kernel", "scale") else name
    return name, array


def _config(pretrained: Pretrained) -> dict[str, Any]:
    model = pretrained.config.model.to_dict()
    if not _has_prototypes(pretrained):
        model["prototypes"] = None  # without the table there is no context, in skyjax too
    return {
        "architectures": ["SkyjaxModel"],
        "auto_map": {"AutoConfig": "modeling_skyjax.SkyjaxConfig", "AutoModel": "modeling_skyjax.SkyjaxModel"},
        "model_type": "skyjax",
        "model": model,
        "statistics": {m: dict(table) for m, table in pretrained.statistics.items()},
        "words": None if pretrained.words is None else _words_config(pretrained.words),
        "skyjax_version": skyjax.__version__,
        "step": int(pretrained.step),
    }


def _words_config(words: Words) -> dict[str, Any]:
    widths, head = widths_of(words.config.model), bool(words.streams)
    return {
        "text": words.config.model.text.to_dict(),
        "streams": {stream: widths[stream] for stream in words.streams},
        "kind": words.kind,
        "temperature": words.temperature if head else 1.0,
        "bias": words.bias,
        "length": words.config.data.text.length,
        "tokenizer": words.tokenizer.rules,
    }
