"""A released file's tensors -> our listed parameters and a record of the rest; and back, every bit the same.

The record travels in the weights folder as "source" (train/weights.py):

    {"file": name, "keys": every name in the file's order, "prefixes": {part: prefix}, "rows": of the table of dates,
     "types": {name: type} where it is not float32, "adapted": modalities whose bands were changed,
     "beside": what else a .pth file held beside its tensors, "tensors": {name: array} what the model does not use}

Buffers that we would build ourselves to the bit are not kept.
"""

import re
from collections.abc import Mapping
from typing import Any

import ml_collections
import ml_dtypes
import numpy as np

from skyjax.convert import skysense
from skyjax.convert.released import BUFFERS, DATES, FUSION, NAMES_SHOWN, UP_HEADS, Released, constants
from skyjax.convert.skysense import Rule
from skyjax.errors import UserError
from skyjax.models.fusion import DAYS_A_YEAR
from skyjax.sample import MODALITIES
from skyjax.train import weights
from skyjax.train.weights import enumerate_names

TYPES = ("float32", "float16", "bfloat16")

Listed = dict[str, np.ndarray]


def from_released(released: Released, model: ml_collections.ConfigDict) -> tuple[Listed, dict[str, Any]]:
    """Our parameters in float32, and the record of what the file was like.

    Args:
      released: the file.
      model: the config of what it holds (`released.model_config`).

    Raises:
      UserError: a tensor has another shape than its part's sizes ask for, or a type that is not read; it lists them.
    """
    prefixes = {part.ours: part.prefix for part in released.parts if part.kind != "dates"}
    rows = skysense.DAYS_RELEASED
    if released.find("fusion", "dates"):
        prefixes["dates"] = ""
        rows = _rows(released)
    parts = part_rules(model, prefixes, rows)
    _check_tensors(released, parts, model)
    listed: Listed = {}
    for ours, theirs, rules in parts:
        for name, value in skysense.read(rules, released.tensors, theirs).items():
            listed[ours + name] = np.asarray(value, np.float32)
    if model.fusion is not None and "dates" not in prefixes:
        listed["fusion.dates"] = np.zeros((DAYS_A_YEAR, model.spatial_width), np.float32)
    parameters = {theirs + rule.released for _, theirs, rules in parts for rule in rules}
    types = {name: value.dtype.name for name, value in released.tensors.items() if name in parameters}
    source = {
        "file": released.path.name,
        "keys": list(released.tensors),
        "prefixes": prefixes,
        "rows": rows,
        "types": {name: kind for name, kind in types.items() if kind != "float32"},
        "adapted": [],
        "tensors": {name: released.tensors[name] for name in released.extras if not _rebuilt(released, model, name)},
    }
    return listed, source


def to_released(
    listed: Mapping[str, np.ndarray], model: ml_collections.ConfigDict, source: Mapping[str, Any] | None
) -> dict[str, np.ndarray]:
    """The tensors of a released file, in its order.

    Args:
      listed: parameters.
      model: `config.model`.
      source: the record of the file that they were imported from; None: the layout of a released checkpoint.

    Raises:
      UserError: a released file has no place for a part of this model.
    """
    if source is None:
        check_layout(model)
        prefixes, rows = _default_prefixes(model), skysense.DAYS_RELEASED
    else:
        prefixes, rows = source["prefixes"], source["rows"]
    found: dict[str, np.ndarray] = {}
    for ours, theirs, rules in part_rules(model, prefixes, rows):
        own = {name.removeprefix(ours): value for name, value in listed.items() if name.startswith(ours)}
        found |= skysense.write(rules, own, theirs)
    if source is None:
        return found | _buffers(found, model)
    if "dates" not in prefixes and np.any(listed.get("fusion.dates", 0)):
        found |= skysense.write(skysense.dates(), {"dates": listed["fusion.dates"]})
    found = {name: value.astype(source["types"].get(name, "float32"), copy=False) for name, value in found.items()}
    found |= source["tensors"]
    for name in source["keys"]:
        if name not in found:
            found[name] = skysense.buffer(name, model.modalities.optical.window)
    order = [*source["keys"], *(found.keys() - set(source["keys"]))]
    return {name: found[name] for name in order}


def check_layout(model: ml_collections.ConfigDict) -> None:
    """Raises UserError where a model has a part that the released layout has no names for, or lacks one."""
    for modality, part in model.modalities.items():
        kind = "swin_v2" if modality == "optical" else "vit"
        if part.kind != kind:
            raise UserError(f"--format=skysense: {modality} is a {part.kind}, and released files have a {kind} there")
        if part.get("stem", "patch") != "patch":
            raise UserError(
                f"--format=skysense: {modality} begins with a convolutional stem (stem={part.stem}), for which released"
                " files have no names; take --format=safetensors or pytorch"
            )
        if model.fusion is not None and kind == "vit" and part.up_factor is None:
            raise UserError(
                f"--format=skysense: {modality} has no up-head (up_factor None), and released files with a fusion have"
                " one; take --format=safetensors or pytorch"
            )


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are the same in shape, type and every bit."""
    return a.shape == b.shape and a.dtype == b.dtype and np.ascontiguousarray(a).tobytes() == b.tobytes()


def part_rules(
    model: ml_collections.ConfigDict, prefixes: Mapping[str, str], rows: int
) -> list[tuple[str, str, list[Rule]]]:
    """(prefix of ours, prefix of theirs, rules) of each part of a model, in the order of a released checkpoint.

    Args:
      model: `config.model`.
      prefixes: part ("optical", "up_heads.sar", "fusion", "dates") -> its prefix in the file.
      rows: of the released table of dates.
    """
    found: list[tuple[str, str, list[Rule]]] = []
    for modality in (m for m in MODALITIES if m in model.modalities):
        part = model.modalities[modality]
        swin = part.kind == "swin_v2"
        rules = skysense.swin_v2(part.depths, part.extra_norm_every) if swin else skysense.vit(part.depth)
        found.append((f"{modality}.", prefixes[modality], rules))
    for name in (f"up_heads.{m}" for m in MODALITIES if f"up_heads.{m}" in prefixes):
        factor = model.modalities[name.split(".")[1]].up_factor
        found.append((f"{name}.", prefixes[name], skysense.up_head(factor)))
    if model.fusion is not None:
        found.append(("fusion.", prefixes["fusion"], skysense.fusion(model.fusion.depth)))
    if "dates" in prefixes:
        found.append(("fusion.", prefixes["dates"], skysense.dates(rows)))
    return found


def _rows(released: Released) -> int:
    shape = released.tensors[DATES].shape
    if len(shape) != 3 or shape[1] not in (skysense.DAYS_RELEASED, DAYS_A_YEAR):
        raise UserError(
            f'"{released.path}": "{DATES}" has the shape {shape}; it must be (1, {skysense.DAYS_RELEASED}, width)'
        )
    return shape[1]


def _check_tensors(
    released: Released, parts: list[tuple[str, str, list[Rule]]], model: ml_collections.ConfigDict
) -> None:
    zeros = weights.zeros(model)
    wrong, strange = [], []
    for ours, theirs, rules in parts:
        for rule in rules:
            name = theirs + rule.released
            found = released.tensors[name]
            # Zeros of our shapes, written as released, have the shape that the file must have.
            wanted = rule.layout.write(*(zeros[ours + part] for part in rule.ours)).shape
            if found.shape != wanted:
                wrong.append(f"{name} {found.shape} instead of {wanted}")
            if found.dtype.name not in TYPES:
                strange.append(f"{name} {found.dtype.name}")
    for what, names in (
        ("shapes that do not fit the others", wrong),
        (f"types other than {', '.join(TYPES)}", strange),
    ):
        if names:
            raise UserError(f'"{released.path}" has {what}: {enumerate_names(names, NAMES_SHOWN)}')


def _rebuilt(released: Released, model: ml_collections.ConfigDict, name: str) -> bool:
    """Whether we would build this tensor, a buffer, to the bit."""
    if not re.search(f"{BUFFERS}$", name):
        return False
    return same(skysense.buffer(name, model.modalities.optical.window), released.tensors[name])


def _default_prefixes(model: ml_collections.ConfigDict) -> dict[str, str]:
    """As in a released checkpoint; none where there is a single part, as in released files of one encoder."""
    modalities = [m for m in MODALITIES if m in model.modalities]
    prefixes = {m: constants()[m]["prefixes"][0] for m in modalities}
    heads = {m: prefix for prefix, m in UP_HEADS.items()}
    prefixes |= {f"up_heads.{m}": heads[m] for m in modalities if model.modalities[m].get("up_factor") is not None}
    if model.fusion is not None:
        prefixes |= {"fusion": FUSION, "dates": ""}
    return dict.fromkeys(prefixes, "") if len(prefixes) == 1 else prefixes


def _buffers(found: Mapping[str, np.ndarray], model: ml_collections.ConfigDict) -> dict[str, np.ndarray]:
    """What tells the window, beside the weights of each block of a Swin."""
    blocks = [name.removesuffix("logit_scale") for name in found if name.endswith(".w_msa.logit_scale")]
    kinds = ("relative_coords_table", "relative_position_index")
    return {
        f"{block}{kind}": skysense.buffer(kind, model.modalities.optical.window) for block in blocks for kind in kinds
    }


assert np.dtype("bfloat16") == ml_dtypes.bfloat16  # numpy knows the name once ml_dtypes is imported
