"""An encoder as a folder for PyTorch users, who need neither skyjax nor JAX.

The folder holds skyjax_encoder.py (the module, copied from here), model.safetensors (its state dict), config.json (the
model, its statistics, and what transformers wants to know) and modeling_skyjax.py (for `AutoModel.from_pretrained`).
"""

import functools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from safetensors.numpy import save_file

import skyjax
from skyjax.config import run_file
from skyjax.errors import UserError
from skyjax.input.device import normalize
from skyjax.models import skysense
from skyjax.models.listed import to_listed
from skyjax.sample import Images
from skyjax.train.pretrained import Pretrained

HERE = pathlib.Path(__file__).parent
MODULE, WRAPPER = "skyjax_encoder.py", "modeling_skyjax.py"
TORCH = "torch==2.13.0"
SITES, DATES = 2, 3
LEAP_DAY = 18_627  # 31 December 2020
LONLAT = np.array([[11.5, -48.1], [np.nan, 20.0]], np.float32)


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
    save_file(state_dict(pretrained), folder / "model.safetensors", metadata={"format": "pt"})


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
    except ImportError as error:
        raise UserError(f'the check of a PyTorch export needs PyTorch: "pip install {TORCH}"') from error
    model = run_file(pathlib.Path(folder) / MODULE, "export").SkyjaxEncoder.from_folder(folder)
    encode = _encoder(pretrained)
    errors = []
    for images in _cases(pretrained):
        with torch.inference_mode():
            got = model(images, LONLAT)
        errors.append(largest_error(jax.tree.map(np.asarray, encode(images)), jax.tree.map(np.asarray, got)))
    return max(errors)


def state_dict(pretrained: Pretrained) -> dict[str, np.ndarray]:
    """The parameters and the table of prototypes by the names and in the layouts of the PyTorch module."""
    listed = to_listed({name: part for name, part in pretrained.params.items() if name != "prototypes"})
    if _has_prototypes(pretrained):
        listed |= to_listed({"prototypes": pretrained.params["prototypes"]})
        listed["prototypes.table"] = pretrained.prototypes
    return dict(_torch_parameter(name, np.asarray(x)) for name, x in listed.items())


def _has_prototypes(pretrained: Pretrained) -> bool:
    return pretrained.config.model.get("prototypes") is not None and pretrained.prototypes is not None


def _torch_parameter(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    parent, _, leaf = name.rpartition(".")
    if parent.endswith(".cells"):  # of an up-head: (d, factor, factor, s)
        array = array.reshape(len(array), -1) if leaf == "kernel" else array.ravel()
    if leaf == "kernel":
        array = array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)
    name = f"{parent}.weight" if leaf in ("kernel", "scale") else name
    return name, np.ascontiguousarray(array)


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


def _encoder(pretrained: Pretrained) -> Callable[[Mapping[str, Images]], Any]:
    config = ml_collections.ConfigDict(pretrained.config.model.to_dict())
    config.dtype = "float32"
    tables = {
        m: {name: jnp.array(table[name], jnp.float32) for name in ("mean", "std")}
        for m, table in pretrained.statistics.items()
    }
    lonlat = jnp.asarray(LONLAT)

    @jax.jit
    def encode(params: Any, prototypes: Any, images: Mapping[str, Images]) -> Any:
        normalized = {m: {**x, "values": normalize(x, **tables[m])} for m, x in images.items()}
        return skysense.apply(config, params, normalized, lonlat=lonlat, prototypes=prototypes)

    return functools.partial(encode, pretrained.params, pretrained.prototypes)


def _cases(pretrained: Pretrained) -> Iterator[dict[str, Images]]:
    """All modalities, of which each site lacks some; then without the first."""
    rng = np.random.default_rng(0)
    images = {m: _random_images(rng, part, pretrained.statistics[m]) for m, part in _parts(pretrained).items()}
    last = list(images)[-1]
    if len(images) > 1:
        images[last]["valid"][0] = False
    yield images
    if len(images) > 1:
        yield {m: images[m] for m in list(images)[1:]}


def _parts(pretrained: Pretrained) -> dict[str, ml_collections.ConfigDict]:
    return dict(pretrained.config.model.modalities.items())


def _random_images(rng: np.random.Generator, part: ml_collections.ConfigDict, statistics: Mapping[str, Any]) -> Images:
    """Images of one modality, in stored units, about three tokens high and wide."""
    size = part.patch_size * 2 ** (len(part.depths) - 1) if part.kind == "swin_v2" else part.patch_size
    h, w, c = 2 * size + 1, 3 * size - 1, len(part.bands)
    mean, std = (np.array(statistics[name], np.float32) for name in ("mean", "std"))
    sensor = rng.integers(0, len(mean), SITES).astype(np.int32)
    shape = (SITES, DATES, h, w, c)
    spread = (slice(None), None, None, None)
    values = (mean[sensor][spread] + std[sensor][spread] * rng.normal(size=shape)).astype(np.float32)
    values[rng.random(shape) < 0.01] = np.nan
    days = np.sort(rng.integers(LEAP_DAY - 1500, LEAP_DAY, (SITES, DATES)), axis=1).astype(np.int32)
    days[0, -1] = LEAP_DAY
    valid = np.ones((SITES, DATES), bool)
    valid[1, 1:] = False
    clear = rng.random((SITES, DATES, h, w)) < 0.9
    clear[0, 0, : h // 2] = False
    bands = np.ones((SITES, c), bool)
    bands[1, 1:] = rng.random(c - 1) < 0.5
    return {"values": values, "days": days, "valid": valid, "clear": clear, "sensor": sensor, "bands": bands}


def largest_error(want: Any, got: Any) -> float:
    """The largest max |difference| / max |wanted| of two trees of arrays; infinite where masks or shapes differ."""
    errors = [0.0]
    for wanted, given in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        if wanted.shape != given.shape:
            errors.append(float("inf"))
        elif wanted.dtype.kind == "f":
            difference = float(np.abs(wanted - given).max(initial=0))
            errors.append(difference / max(float(np.abs(wanted).max(initial=0)), 1e-30) if difference else 0.0)
        elif not np.array_equal(wanted, given):
            errors.append(float("inf"))
    return max(errors)
