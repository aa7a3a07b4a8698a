"""The table of parameters that `--dry-run` prints."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter: its path with slashes, its shape and how many numbers it holds."""

    path: str
    shape: tuple[int, ...]
    count: int


@dataclasses.dataclass(frozen=True)
class Table:
    """All parameters in the order of their paths.

    Attributes:
      rows: one a parameter.
      parts: part -> count; a part is the start of the path.
      total: count of all.
    """

    rows: tuple[Row, ...]
    parts: Mapping[str, int]
    total: int


def table(params: Any, *, levels: int = 1) -> Table:
    """Counts parameters.

    Args:
      params: nested dict of arrays or of what `jax.eval_shape` gives.
      levels: how many names of the path make a part.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    rows = tuple(
        Row(jax.tree_util.keystr(path, simple=True, separator="/"), tuple(leaf.shape), math.prod(leaf.shape))
        for path, leaf in leaves
    )
    parts: dict[str, int] = {}
    for row in rows:
        part = "/".join(row.path.split("/")[:levels])
        parts[part] = parts.get(part, 0) + row.count
    return Table(rows, parts, sum(row.count for row in rows))
