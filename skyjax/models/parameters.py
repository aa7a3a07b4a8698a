"""The table of parameters that `--dry-run` prints: each array, then the parts that the paper counts too."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from skyjax.sample import MODALITIES

FUSION, PROTOTYPES, HEADS, TOTAL = "fusion with up-heads and dates", "geo-prototypes", "heads", "total"
# SkySense, table J12; its fusion holds the up-heads and the date table, its "others" are not named.
PAPER = {
    "optical": "654 M",
    "multispectral": "302 M",
    "sar": "302 M",
    FUSION: "398 M",
    PROTOTYPES: "215 M",
    HEADS: "189 M, others",
    TOTAL: "2.06 B",
}


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


def leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every array of a nested dict by its path with slashes, in the order of the dict."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{path}{name}/")
        else:
            yield path + name, value


@dataclasses.dataclass(frozen=True)
class Part:
    """A line of the table of parts.

    Attributes:
      name: a part of the model, or what some parts make together.
      count: numbers that it holds.
      members: names of the lines above that this one sums; empty for a part.
    """

    name: str
    count: int
    members: tuple[str, ...] = ()


def parts(encoder: Any, heads: Any, prototypes: Any = None) -> list[Part]:
    """What a model is made of, in the order of the data, with the sums that the paper gives.

    Args:
      encoder: parameters, or what `jax.eval_shape` gives for them; so are the others.
      heads: of the objective.
      prototypes: the table of geo-prototypes, which is state and no parameter; None where there is none.
    """
    spatial = [Part(m, table(encoder[m]).total) for m in MODALITIES if m in encoder]
    fusion = [Part(f"up_heads/{m}", count) for m, count in table(encoder.get("up_heads", {})).parts.items()]
    if "fusion" in encoder:
        of_fusion = table(encoder["fusion"])
        dates = of_fusion.parts["dates"]
        fusion += [Part("fusion", of_fusion.total - dates), Part("fusion/dates", dates)]
    banks = [Part("prototypes", table(encoder["prototypes"]).total)] if "prototypes" in encoder else []
    if prototypes is not None:
        banks.append(Part("prototypes/table (state)", table(prototypes).total))
    of_heads = [Part(f"heads/{stream}", count) for stream, count in table(heads).parts.items()]

    whole = "encoder with prototypes" if banks else "encoder"
    lines = [*spatial, *_with_sum(fusion, FUSION), *_with_sum(banks, PROTOTYPES)]
    lines.append(_sum([*spatial, *fusion, *banks], whole))
    lines += _with_sum(of_heads, HEADS)
    return [*lines, _sum([*spatial, *fusion, *banks, *of_heads], TOTAL)]


def _with_sum(lines: list[Part], name: str) -> list[Part]:
    return [*lines, _sum(lines, name)] if lines else []


def _sum(lines: Sequence[Part], name: str) -> Part:
    return Part(name, sum(line.count for line in lines), tuple(line.name for line in lines))


def show(lines: Sequence[Part], columns: Mapping[str, Mapping[str, int]]) -> str:
    """The table of parts as text: parameters, further columns, and what the paper says.

    Args:
      lines: as `parts` gives them.
      columns: heading -> name of a part -> number, shown by the thousand million and summed like the parameters.
    """
    rows = [["part", "parameters", *columns, "SkySense's paper"]]
    for line in lines:
        values = [sum(column.get(name, 0) for name in line.members or (line.name,)) for column in columns.values()]
        cells = [f"{value / 1e9:,.1f}" if value else "" for value in values]
        rows.append([("= " if line.members else "  ") + line.name, f"{line.count:,}", *cells, PAPER.get(line.name, "")])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    )
