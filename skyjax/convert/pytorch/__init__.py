"""An encoder as a folder for PyTorch users, who need neither skyjax nor JAX.

The folder holds skyjax_encoder.py (the module, copied from here), model.safetensors (its state dict), config.json (the
model, its statistics, and what transformers wants to know) and modeling_skyjax.py (for `AutoModel.from_pretrained`).
"""

import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np

import skyjax
from skyjax.config import run_file
from skyjax.convert import trial
from skyjax.errors import UserError
from skyjax.sample import Images
from skyjax.train.pretrained import Pretrained
from skyjax.train.weights import write_safetensors

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


def check(pretrained: Pretrained, folder: str | os.PathLike[str]) -> float:
    """Loads the written files with PyTorch and compares them with skyjax on random images, in float32.

    Dates, bands, pixels and modalities are missing here and there, and the images are no whole number of patches.

    Returns:
      The largest max |difference| / max |skyjax's| of any output; infinite where masks differ.

    Raises:
      UserError: PyTorch is not installed.
    """
    try:
        import torch
    except ImportError as missing:
        raise UserError(f'the check of a PyTorch export needs PyTorch: "pip install {TORCH}"') from missing
    model = run_file(pathlib.Path(folder) / MODULE, "export").SkyjaxEncoder.from_folder(folder)
    encode = trial.encoder(pretrained)

    def error(images: Mapping[str, Images]) -> float:
        with torch.inference_mode():
            got = model(images, trial.LONLAT)
        return trial.largest_error(encode(images), got)

    return max(error(images) for images in trial.cases(pretrained))


def state_dict(pretrained: Pretrained) -> dict[str, np.ndarray]:
    """The parameters and the table of prototypes by the names and in the layouts of the PyTorch module."""
    listed = pretrained.listed()
    if _has_prototypes(pretrained):
        listed["prototypes.table"] = np.asarray(pretrained.prototypes)
    else:
        listed = {name: x for name, x in listed.items() if not name.startswith("prototypes.")}
    return dict(_torch_parameter(name, x) for name, x in listed.items())


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
        "skyjax_version": skyjax.__version__,
        "step": int(pretrained.step),
    }
