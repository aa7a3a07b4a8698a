"""Stacked parameters <-> listed ones: a flat dict in which every layer stands by itself, under a dotted name.

The model keeps equal layers stacked along a leading axis, because it scans over them; files and other frameworks want
them one by one. Both directions move bits and change none:

    multispectral/layers/norm1/scale (24, d)              multispectral.layers.0.norm1.scale ... .layers.23.norm1.scale
    optical/stage2/pairs/unshifted/norm1/scale (9, d)     optical.stage2.blocks.0.norm1.scale, .blocks.2. ...
    optical/stage2/pairs/shifted/norm1/scale (9, d)       optical.stage2.blocks.1.norm1.scale, .blocks.3. ...
    optical/stage2/extra_norms/scale (3, d)               optical.stage2.extra_norms.0.scale ...

A block's attention/projections/query/kernel is listed as attention.query.kernel, as a plain layer's is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

STACKS = ("layers", "extra_norms")
PAIRS, BLOCKS = "pairs", "blocks"
KINDS = ("unshifted", "shifted")
PROJECTIONS = "projections"

Array = Any  # numpy's or jax's
Listed = dict[str, Array]


def to_listed(params: Mapping[str, Any], prefix: str = "") -> Listed:
    """Dotted name -> array of a tree of parameters, or of a part of it; layers in order."""
    listed: Listed = {}
    for name, value in params.items():
        path = prefix + name
        if name in STACKS:
            for i, layer in enumerate(_unstack(value)):
                listed |= to_listed(layer, f"{path}.{i}.")
        elif name == PAIRS:
            # A stage of one block has no shifted one.
            kinds = [_unstack(value[kind]) if kind in value else [] for kind in KINDS]
            for i in range(sum(map(len, kinds))):
                listed |= to_listed(kinds[i % 2][i // 2], f"{prefix}{BLOCKS}.{i}.")
        elif name == PROJECTIONS:
            listed |= to_listed(value, prefix)
        elif isinstance(value, Mapping):
            listed |= to_listed(value, f"{path}.")
        else:
            listed[path] = value
    return listed


def from_listed(listed: Mapping[str, Array]) -> dict[str, Any]:
    """The tree whose listing this is.

    Raises:
      ValueError: a layer is missing, or layers that should be equal have other names or shapes; the name is in it.
    """
    return _stacked(_nested(listed), "")


def _nested(listed: Mapping[str, Array]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in listed.items():
        *parents, last = name.split(".")
        node = tree
        for i, parent in enumerate(parents):
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f'"{name}" stands below "{".".join(parents[: i + 1])}", which is an array')
        if last in node:
            raise ValueError(f'"{name}" is an array and a group')
        node[last] = value
    return tree


def _stacked(tree: dict[str, Any], path: str) -> dict[str, Any]:
    stacked: dict[str, Any] = {}
    for name, value in tree.items():
        here = f"{path}{name}"
        if not isinstance(value, dict):
            stacked[name] = value
        elif name in STACKS:
            stacked[name] = _stack([_stacked(layer, f"{here}.") for layer in _in_order(value, here)], here)
        elif name == BLOCKS:
            blocks = [_stacked(block, f"{here}.") for block in _in_order(value, here)]
            for block in blocks:
                block["attention"] = _with_projections(block.get("attention", {}))
            stacked[PAIRS] = {kind: _stack(blocks[i::2], here) for i, kind in enumerate(KINDS) if blocks[i:]}
        else:
            stacked[name] = _stacked(value, f"{here}.")
    return stacked


def _in_order(numbered: dict[str, Any], path: str) -> list[dict[str, Any]]:
    for i in range(len(numbered)):
        if not isinstance(numbered.get(str(i)), dict):
            raise ValueError(f'"{path}.{i}" is missing among {", ".join(sorted(numbered)[:8])}')
    return [numbered[str(i)] for i in range(len(numbered))]


def _with_projections(attention: dict[str, Any]) -> dict[str, Any]:
    own = ("query", "key", "value", "out")
    rest = {name: value for name, value in attention.items() if name not in own}
    return {PROJECTIONS: {name: attention[name] for name in own if name in attention}, **rest}


def _unstack(layers: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [_take(layers, i) for i in range(_length(layers))]


def _length(layers: Any) -> int:
    while isinstance(layers, Mapping):
        layers = next(iter(layers.values()))
    return layers.shape[0]


def _take(layers: Any, i: int) -> Any:
    return {name: _take(value, i) for name, value in layers.items()} if isinstance(layers, Mapping) else layers[i]


def _stack(trees: Sequence[Any], path: str) -> Any:
    if isinstance(trees[0], dict):
        for tree in trees:
            if not isinstance(tree, dict) or tree.keys() != trees[0].keys():
                raise ValueError(f'"{path}": its layers hold different parameters')
        return {name: _stack([tree[name] for tree in trees], f"{path}.{name}") for name in trees[0]}
    if len({tuple(tree.shape) for tree in trees if not isinstance(tree, dict)}) != 1:
        raise ValueError(f'"{path}": its layers have different shapes')
    return (np if all(isinstance(tree, np.ndarray) for tree in trees) else jnp).stack(trees)
