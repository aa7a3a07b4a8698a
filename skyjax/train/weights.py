"""The weights folder: an encoder in two files that anything can read, without Orbax, without the run that it came from.

    FOLDER/model.safetensors    float32, every layer by itself under its listed name (models/listed.py); where the model
                                has geo-prototypes, their table too, as "prototypes.table"
    FOLDER/skyjax.json          {"format": 1, "skyjax": version, "config": ..., "statistics": ..., "step": int,
                                "source": what a released file had besides or null, "data": ..., "licence": ...,
                                "words": SHA-256 of the tokenizer where there is a text side (words_file.py), or null}
    FOLDER/source.safetensors   only after an import: the released file's tensors that the model does not use

`skyjax import` and `skyjax export --format=safetensors` write it, `skyjax.load` reads it.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections
import ml_dtypes
import numpy as np
import safetensors

from skyjax import __version__
from skyjax.errors import UserError
from skyjax.models import skysense
from skyjax.models.listed import to_listed

WEIGHTS, NOTES, EXTRAS = "model.safetensors", "skyjax.json", "source.safetensors"
FORMAT = 1
TABLE = "prototypes.table"
LISTED_IN_ERRORS = 20

# Of safetensors -> numpy's.
TYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    "BOOL": np.dtype(bool),
}


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a folder holds.

    Attributes:
      listed: listed name -> float32 array; without the table.
      config: of the experiment; `model` at least.
      statistics: modality -> "sensors", "bands", "mean", "std".
      step: steps that it was trained for; 0 where nobody knows.
      prototypes: the table of geo-prototypes (regions, count, width), or None.
      source: what a released file was like (convert/released.py), its unused tensors under "tensors"; or None.
      data: what it was trained on, in words or as the config's list; None where unknown.
      licence: of the weights, in words.
      words: digest of the tokenizer where a text side lies beside (train/words_file.py); None where there is none.
    """

    listed: Mapping[str, np.ndarray]
    config: ml_collections.ConfigDict
    statistics: Mapping[str, Mapping[str, Any]]
    step: int = 0
    prototypes: np.ndarray | None = None
    source: Mapping[str, Any] | None = None
    data: Any = None
    licence: str | None = None
    words: str | None = None


def is_folder(path: pathlib.Path) -> bool:
    """Whether this is a weights folder, or was meant to be one."""
    return (path / NOTES).is_file()


def save(folder: pathlib.Path, weights: Weights) -> None:
    """Writes the files into a folder that is there."""
    table = {} if weights.prototypes is None else {TABLE: weights.prototypes}
    write_safetensors(folder / WEIGHTS, {**weights.listed, **table})
    source = None if weights.source is None else {k: v for k, v in weights.source.items() if k != "tensors"}
    if weights.source is not None and weights.source["tensors"]:
        write_safetensors(folder / EXTRAS, weights.source["tensors"])
    notes = {
        "format": FORMAT,
        "skyjax": __version__,
        "config": weights.config.to_dict(),
        "statistics": weights.statistics,
        "step": weights.step,
        "source": source,
        "data": weights.data,
        "licence": weights.licence,
        "words": weights.words,
    }
    (folder / NOTES).write_text(json.dumps(notes, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load(folder: pathlib.Path) -> Weights:
    """What `save` wrote, every array checked against the config.

    Raises:
      UserError: a file is missing, damaged, of a newer format, or holds other parameters than the config asks for.
    """
    notes = _read_notes(folder / NOTES)
    try:
        config = ml_collections.ConfigDict(notes["config"]).lock()
        statistics = check_statistics(notes["statistics"])
        if not isinstance(config.model, ml_collections.ConfigDict):
            raise ValueError("its model is no group of values")
        kinds = (("step", 0, int), ("source", None, dict | None), ("words", None, str | None))
        if not all(isinstance(notes.get(name, usual), kind) for name, usual, kind in kinds):
            raise ValueError("step, source or words is of another kind")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f'"{folder / NOTES}" is not what was written: {error}; copy it anew') from error
    tensors = read_safetensors(folder / WEIGHTS)
    table = tensors.pop(TABLE, None)
    check(tensors, table, config.model, folder / WEIGHTS)
    source = notes.get("source")
    if source is not None:
        extras = folder / EXTRAS
        source = {**source, "tensors": read_safetensors(extras) if extras.is_file() else {}}
    return Weights(
        tensors,
        config,
        statistics,
        notes.get("step", 0),
        table,
        source,
        notes.get("data"),
        notes.get("licence"),
        notes.get("words"),
    )


def check_statistics(told: Any) -> dict[str, dict[str, Any]]:
    """The statistics of notes, held to their form: they may be a stranger's.

    Raises:
      ValueError, TypeError, KeyError, AttributeError: they have another.
    """
    for modality, table in told.items():
        names = [*table["sensors"], *table["bands"]]
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"{modality}: a sensor or a band has no name")
        shape = len(table["sensors"]), len(table["bands"])
        if any(np.array(table[name], np.float64).shape != shape for name in ("mean", "std")):
            raise ValueError(f"{modality}: the statistics are not {shape[0]} x {shape[1]} numbers")
    return dict(told)


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Every tensor of a file by its name, in the order of the file.

    The arrays are the file itself, mapped into memory: read-only, and loaded where and when they are looked at, because
    an encoder at full size is 6.6 GB and whoever converts it needs it more than once.

    Raises:
      UserError: there is no such file, it is damaged, or it holds a type that numpy has not.
    """
    try:
        with safetensors.safe_open(path, "numpy"):
            pass  # it holds what the header claims against the size of the file
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        strange = {entry["dtype"] for entry in entries.values()} - TYPES.keys()
        if strange:
            raise UserError(f'"{path}" holds a type that is not read here: {", ".join(sorted(strange))}')
        if not any(stop > start for start, stop in (entry["data_offsets"] for entry in entries.values())):
            return {name: np.zeros(entry["shape"], TYPES[entry["dtype"]]) for name, entry in entries.items()}
        data = np.asarray(np.memmap(path, np.uint8, "r", offset=8 + length))
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f'"{path}" cannot be read: {error}; copy it anew') from error
    return {
        name: data[slice(*entry["data_offsets"])].view(TYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
    }


def write_safetensors(
    path: pathlib.Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors of numpy or jax one after the other, so that never more than one of them is copied.

    They stand in the order given, but larger types before smaller ones, so that each is aligned.

    Raises:
      UserError: a tensor has a type that the format has not.
    """
    names = {dtype: name for name, dtype in TYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    start = 0
    for name in order:
        value = tensors[name]
        if np.dtype(value.dtype) not in names:
            raise UserError(f'"{name}" is of the type {value.dtype}, for which safetensors has no name')
        stop = start + value.size * value.dtype.itemsize
        header[name] = {
            "dtype": names[np.dtype(value.dtype)],
            "shape": list(value.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.unlink(missing_ok=True)  # what is mapped from an earlier file stays whole
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)


def check(
    listed: Mapping[str, np.ndarray], table: np.ndarray | None, model: ml_collections.ConfigDict, path: pathlib.Path
) -> None:
    """Holds arrays to what a model's config asks for.

    Raises:
      UserError: the config contradicts itself; or arrays are missing, left over, or of another shape or type.
    """
    wanted = shapes(model)
    prototypes = model.get("prototypes")
    if prototypes is not None:
        wanted[TABLE] = ((prototypes.regions**2, prototypes.count, prototypes.width), "float32")
    hold(listed if table is None else {**listed, TABLE: table}, wanted, path)


def hold(
    arrays: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[tuple[int, ...], str]], path: pathlib.Path
) -> None:
    """Holds a file's arrays to the shapes and types that are wanted.

    Raises:
      UserError: arrays are missing, left over, or of another shape or type; it lists them.
    """
    found = {name: (value.shape, value.dtype.name) for name, value in arrays.items()}
    problems = {
        "missing": sorted(wanted.keys() - found.keys()),
        "left over": sorted(found.keys() - wanted.keys()),
        "of another shape": [name for name in wanted if name in found and found[name] != wanted[name]],
    }
    told = "; ".join(f"{what}: {enumerate_names(names)}" for what, names in problems.items() if names)
    if told:
        raise UserError(f'"{path}" does not fit its config; {told}')


def shapes(model: ml_collections.ConfigDict) -> dict[str, tuple[tuple[int, ...], str]]:
    """Listed name -> shape and type of every parameter of a model; nothing is allocated.

    Raises:
      UserError: values of the config contradict each other.
    """
    return {name: (value.shape, value.dtype.name) for name, value in zeros(model).items()}


def zeros(model: ml_collections.ConfigDict) -> dict[str, np.ndarray]:
    """Listed name -> zeros of its shape; they all share one number.

    Raises:
      UserError: values of the config contradict each other.
    """
    return dict(_zeros(json.dumps(model.to_dict(), sort_keys=True)))


@functools.lru_cache(maxsize=8)  # tracing a model takes a second, and a file is checked more than once
def _zeros(model: str) -> dict[str, np.ndarray]:
    config = ml_collections.ConfigDict(json.loads(model))
    return listed_zeros(lambda key: skysense.init(config, key))


def listed_zeros(init: Callable[[jax.Array], Any]) -> dict[str, np.ndarray]:
    """Listed name -> zeros of the shape that `init` would give a parameter; nothing is allocated.

    Raises:
      UserError: values of its config contradict each other.
    """
    try:
        abstract = jax.eval_shape(init, jax.random.key(0))
        return to_listed(jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), abstract))
    except Exception as error:  # models know nothing of configs, and raise what they like
        raise UserError(f"config: {str(error) or type(error).__name__}") from error


def enumerate_names(names: list[str], most: int = LISTED_IN_ERRORS) -> str:
    """Some names in a row, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _read_notes(path: pathlib.Path) -> dict[str, Any]:
    try:
        notes = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f'"{path}" cannot be read: {error}; copy it anew') from error
    if not isinstance(notes, dict) or not {"format", "config", "statistics"} <= notes.keys():
        raise UserError(f'"{path}" is not the description of a weights folder: it lacks format, config or statistics')
    if not isinstance(notes["config"], dict) or "model" not in notes["config"]:
        raise UserError(f'"{path}": config has no "model"; copy the file anew')
    if notes["format"] != FORMAT:
        raise UserError(f'"{path}" has format {notes["format"]} and this skyjax reads {FORMAT}; install a newer skyjax')
    return notes
