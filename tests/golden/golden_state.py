"""Where every array of the training state lives and what it takes, as text: one table for each config that is shipped.

Nothing is compiled and no TPU is needed: rules see paths, shapes and the sizes of a mesh. What splits an array does
not depend on the topology, only the sizes do; so a table has one line an array, and a column for each way to split.
"""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, PartitionSpec

from skyjax.parallel.sharding import RULES, Rule, path_name, state_shardings

MIB = 2**20
# Path of a copy of the parameters in the state -> its letter in the table.
COPIES = {"params": "s", "teacher": "t", r"optimizer/\d+/mu": "m", r"optimizer/\d+/nu": "v"}
LARGEST_REPLICATED = 64 * MIB  # a chip, of one array


class Place(NamedTuple):
    """The mesh that a config has on a topology, and what to say of it; without a mesh, why there is none."""

    mesh: AbstractMesh | None
    told: str


class Leaf(NamedTuple):
    """One array of the state: its letter and its path without what the letter stands for."""

    copy: str
    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: PartitionSpec
    itemsize: int

    def bytes_on(self, sizes: Mapping[str, int]) -> int:
        """What a device holds of it on a mesh of these sizes."""
        split = math.prod(sizes[axis] for axis in jax.tree.leaves(tuple(self.spec)))
        return math.prod(self.shape) * self.itemsize // split


def leaves(state: Any, mesh: AbstractMesh, rules: Sequence[Rule] = RULES) -> list[Leaf]:
    """Every array of an abstract state."""
    shardings = jax.tree.leaves(state_shardings(state, mesh, rules))
    found = []
    for (key_path, array), sharding in zip(jax.tree_util.tree_leaves_with_path(state), shardings, strict=True):
        copy, path = _split_copy(path_name(key_path))
        found.append(Leaf(copy, path, array.shape, str(array.dtype), sharding.spec, array.dtype.itemsize))
    return found


def replicated_and_large(state: Any, mesh: AbstractMesh, rules: Sequence[Rule] = RULES) -> list[str]:
    """Arrays that every chip of `fsdp` holds whole and that are larger than they may be."""
    sizes = dict(mesh.shape)
    return [
        f"{leaf.copy} {leaf.path} {leaf.shape}: {leaf.bytes_on(sizes) / MIB:,.0f} MiB on every chip"
        for leaf in leaves(state, mesh, rules)
        if sizes["fsdp"] > 1 and "fsdp" not in jax.tree.leaves(tuple(leaf.spec))
        if leaf.bytes_on(sizes) > LARGEST_REPLICATED
    ]


def write(title: str, state: Any, places: Mapping[str, Place], rules: Sequence[Rule] = RULES) -> str:
    """The table.

    Args:
      title: of the config.
      state: abstract.
      places: name of a topology -> the mesh that the config has there, or why it has none.
      rules: of skyjax/parallel/sharding.py.
    """
    meshes = {name: place.mesh for name, place in places.items() if place.mesh is not None}
    ways: dict[tuple[int, int], list[str]] = {}  # (fsdp, tensor) -> topologies; `data` splits nothing of the state
    for name, mesh in meshes.items():
        ways.setdefault((mesh.shape["fsdp"], mesh.shape["tensor"]), []).append(name)
    columns = {way: {"data": 1, "fsdp": way[0], "tensor": way[1]} for way in sorted(ways)}
    found = leaves(state, next(iter(meshes.values())), rules)
    for mesh in meshes.values():
        leaves(state, mesh, rules)  # a size that does not divide an array is an error

    rows = [("array", "shape", "type", "held", "split", *(f"{fsdp} x {tensor}" for fsdp, tensor in columns))]
    for paths, held, leaf in _grouped(found):
        spec = ", ".join("-" if axis is None else str(axis) for axis in leaf.spec)
        shape = " x ".join(map(str, leaf.shape))
        each = (f"{leaf.bytes_on(sizes):,}" for sizes in columns.values())
        rows.append((paths, shape, leaf.dtype, held, spec, *each))
    sums = (
        ("whole state", lambda leaf: True),
        ("of it on every chip alike", lambda leaf: not jax.tree.leaves(tuple(leaf.spec))),
    )
    for name, counts in sums:
        each = (f"{sum(leaf.bytes_on(sizes) for leaf in found if counts(leaf)):,}" for sizes in columns.values())
        rows.append((name, "", "", "", "", *each))
    lines = [
        f"{title}: where the training state lives. Written by `make goldens`.",
        "",
        "topology: data x fsdp x tensor, samples of a step, bytes of them a chip",
        *(f"  {name}: {place.told}" for name, place in places.items()),
        "",
        "held: s student, t teacher, m and v the moments of AdamW. split: the mesh axis that splits each axis.",
        "Last columns: bytes a chip of one array of one copy, where fsdp x tensor chips share the state.",
        "",
        *_align(rows),
    ]
    return "\n".join(lines) + "\n"


def _split_copy(path: str) -> tuple[str, str]:
    for pattern, letter in COPIES.items():
        found = re.match(rf"{pattern}/", path)
        if found:
            return letter, path[found.end() :]
    return "-", path


def _grouped(found: Iterable[Leaf]) -> Iterator[tuple[str, str, Leaf]]:
    """Arrays that differ in nothing but their path, together: (their paths, letters of the copies, one of them)."""
    held: dict[tuple[Any, ...], list[Leaf]] = {}
    for leaf in found:
        held.setdefault((leaf.path, leaf.shape, leaf.dtype, leaf.spec), []).append(leaf)
    alike: dict[tuple[Any, ...], list[Leaf]] = {}
    for same in held.values():
        letters = "".join(letter for letter in "stmv-" if letter in {leaf.copy for leaf in same})
        alike.setdefault((letters, *same[0][2:]), []).append(same[0])
    lines = [
        (path, letters, group[0])
        for (letters, *_), group in alike.items()
        for path in fold([leaf.path for leaf in group])
    ]
    yield from sorted(lines, key=lambda line: line[0].replace("{", ""))


def fold(paths: Sequence[str]) -> list[str]:
    """Paths that differ in one place as one, "a/{b,c}/d", over and over; nothing is lost and nothing added."""
    split: set[tuple[tuple[str, ...], ...]] = {tuple((part,) for part in path.split("/")) for path in paths}
    for place in itertools.count():
        if place >= max(map(len, split)):
            break
        merged: dict[Any, list[tuple[str, ...]]] = {}
        for path in split:
            if place < len(path):
                merged.setdefault((path[:place], path[place + 1 :]), []).append(path[place])
            else:
                merged.setdefault((path, None), [])
        split = set()
        for (before, after), parts in merged.items():
            split.add(before if after is None else (*before, tuple(sorted(itertools.chain(*parts))), *after))
    return ["/".join(part[0] if len(part) == 1 else "{" + ",".join(part) + "}" for part in path) for path in split]


def _align(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = 5  # columns to the left; numbers to the right
    return [
        "  ".join(
            cell.ljust(width) if i < text else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
