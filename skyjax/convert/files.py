"""Tensor files of PyTorch users, read and written: .pth and .safetensors <-> a dict of numpy arrays.

A .pth file is a pickle, and a pickle can hold any program. It is read by PyTorch's own unpickler that knows tensors
and containers alone (`weights_only=True`), and what it claims is held against the size of the file. A .safetensors file
needs no PyTorch. bfloat16 arrives as the type of that name of ml_dtypes, which comes with jax.
"""

import contextlib
import importlib
import os
import pathlib
import pickle
import re
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from skyjax.errors import UserError
from skyjax.train.weights import read_safetensors, write_safetensors

TORCH = "torch==2.13.0"
CONTAINERS = ("model", "state_dict")
PYTORCH = (".pth", ".pt", ".bin", ".ckpt")
SAFETENSORS = ".safetensors"

Tensors = dict[str, np.ndarray]


def read(path: pathlib.Path) -> tuple[Tensors, list[str]]:
    """The tensors of a file in their order, and the names of what else a .pth file holds beside them.

    Raises:
      UserError: the file is missing, damaged, of another kind or holds more than tensors; or PyTorch is missing.
    """
    if path.is_dir():
        known = (
            " (a weights folder of skyjax: skyjax.load reads it as it is)" if (path / "skyjax.json").is_file() else ""
        )
        raise UserError(f'"{path}" is a folder{known}; give a .pth or .safetensors file')
    if not path.is_file():
        raise UserError(f'there is no file "{path}"; give a .pth or .safetensors file')
    if path.suffix == SAFETENSORS:
        return read_safetensors(path), []
    if path.suffix in PYTORCH:
        return _read_pytorch(path)
    raise UserError(f'"{path}" ends in "{path.suffix}"; give a file that ends in .safetensors or .pth')


def write(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes {'model': tensors} as .pth, or the tensors as .safetensors, by the end of `path`.

    Raises:
      UserError: another end, or PyTorch is needed and missing.
    """
    check_name(path)
    if path.suffix == SAFETENSORS:
        write_safetensors(path, tensors, metadata={"format": "pt"})  # PyTorch's tools ask for this line
        return
    torch = _torch(path)
    torch.save({"model": {name: _to_torch(torch, value) for name, value in tensors.items()}}, path)


def check_name(path: pathlib.Path) -> None:
    """Raises UserError where `write` does not know the end of a path."""
    if path.suffix not in (SAFETENSORS, *PYTORCH):
        raise UserError(f'--out={path}: the file must end in .pth or .safetensors, not "{path.suffix}"')
    if path.suffix != SAFETENSORS:
        _torch(path)


@contextlib.contextmanager
def beside(out: pathlib.Path, marker: str | None = None) -> Iterator[pathlib.Path]:
    """A path next to `out`, put in its place when the block ends well; otherwise `out` stays as it was.

    Args:
      out: a file, or with `marker` a folder.
      marker: the file by which a folder is known to be one of ours; only such a folder, or an empty one, is replaced.

    Raises:
      UserError: `out` is something else, or cannot be written.
    """
    out = out.absolute()
    if marker is None and out.is_dir():
        raise UserError(f"--out={out}: that is a folder; name a file")
    if marker is not None and out.exists() and not out.is_dir():
        raise UserError(f"--out={out}: that is a file; name a folder")
    if marker is not None and out.is_dir() and any(out.iterdir()) and not (out / marker).is_file():
        raise UserError(f"--out={out}: the folder holds something else; name another or empty it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        room = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror}; name a place that you may write") from error
    new, old = room / out.name, room / "old"
    try:
        if marker is not None:
            new.mkdir()
        yield new
        if marker is not None and out.is_dir():
            out.rename(old)
        os.replace(new, out)
    except OSError as error:
        raise UserError(f"--out={out} could not be written: {error.strerror or error}; is the disk full?") from error
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(room, ignore_errors=True)


def _read_pytorch(path: pathlib.Path) -> tuple[Tensors, list[str]]:
    torch = _torch(path)
    zipped = zipfile.is_zipfile(path)
    if zipped:
        _check_zip(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickles that are refused in a sentence
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)
    except pickle.UnpicklingError as error:
        # PyTorch's own text recommends to switch the protection off.
        named = re.search(r"GLOBAL ([\w.]+)|Unsupported (?:operand|class) ?([\w.]*)", str(error))
        what = f" ({named[1] or named[2]})" if named else ""
        raise UserError(
            f'"{path}" holds more than tensors{what}, and a pickle is not run here, because it can be any program;'
            ' where you trust it, save its tensors alone: torch.save({"model": module.state_dict()}, "tensors.pth")'
        ) from error
    except Exception as error:  # the unpickler raises what it likes on damaged files
        raise UserError(f'"{path}" cannot be read: {(str(error).splitlines() or [repr(error)])[0]}') from error
    tensors, rest = _choose(path, content, torch)
    _check_claims(path, tensors)
    return {name: _to_numpy(path, torch, name, value) for name, value in tensors.items()}, rest


def _choose(path: pathlib.Path, content: Any, torch: Any) -> tuple[dict[str, Any], list[str]]:
    """The state dict of a file: under 'model' or 'state_dict', or the whole."""
    rest: list[str] = []
    if isinstance(content, Mapping):
        for name in CONTAINERS:
            if isinstance(content.get(name), Mapping):
                rest = [str(key) for key in content if key != name]
                content = content[name]
                break
    if not isinstance(content, Mapping) or not content:
        raise UserError(f'"{path}" holds no tensors by name; save a state dict: {{"model": module.state_dict()}}')
    strange = [str(key) for key, value in content.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise UserError(
            f'"{path}" holds more than tensors: {", ".join(strange[:8])}; save the module\'s state dict alone, or under'
            ' "model"'
        )
    return {str(key): value for key, value in content.items()}, rest


def _check_zip(path: pathlib.Path) -> None:
    """PyTorch never compresses: what would unfold to more than the file is no checkpoint."""
    with zipfile.ZipFile(path) as file:
        if sum(entry.file_size for entry in file.infolist()) > path.stat().st_size:
            raise UserError(f'"{path}" would unfold to more than its own size; it is not a checkpoint of PyTorch')


def _check_claims(path: pathlib.Path, tensors: Mapping[str, Any]) -> None:
    storages = {}
    for name, value in tensors.items():
        if value.is_sparse or value.layout != _torch(path).strided or value.is_quantized:
            raise UserError(f'"{path}": "{name}" is not a plain tensor (sparse or quantized); save it dense')
        storage = value.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        if value.numel() * value.element_size() > storage.nbytes():
            raise UserError(f'"{path}": "{name}" claims to be larger than what the file holds of it')
    if sum(storages.values()) > path.stat().st_size:
        raise UserError(f'"{path}": its tensors claim more bytes than the file has')


def _to_numpy(path: pathlib.Path, torch: Any, name: str, value: Any) -> np.ndarray:
    value = value.detach().contiguous()
    if value.dtype == torch.bfloat16:
        return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    try:
        return value.resolve_conj().resolve_neg().numpy()
    except TypeError as error:
        raise UserError(f'"{path}": "{name}" is {value.dtype}, which is not read here') from error


def _to_torch(torch: Any, value: np.ndarray) -> Any:
    value = np.array(value, order="C")  # a copy of its own: PyTorch wants to be able to write
    if value.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(value)


def _torch(path: pathlib.Path) -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise UserError(
            f'"{path}" is a PyTorch file, and torch is not installed: pip install {TORCH}; .safetensors needs none'
        ) from error
