"""Sharding as data: one table from regular expressions over paths of the state to mesh axes.

Paths are written "params/encoder/optical/blocks/mlp/kernel". The optimizer's moments end in the path of their
parameter ("optimizer/0/mu/encoder/..."), so the same rule places a parameter, its teacher and its moments.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from skyjax.errors import UserError

ROWS = ("data", "fsdp")  # what a batch's first axis is split over

Rule = tuple[str, tuple[str | None, ...]]

# Regular expression over the whole path -> mesh axes of the array's *last* axes; the axes before them (stacked blocks,
# windows of a convolution) are not split. The first match counts.
#
# `tensor` splits widths inside a block alone: the columns of what widens, then the rows of what leads back, so that
# what lies between blocks is whole and a block costs one sum. Columns after columns would be wrong besides: jaxlib
# 0.10.2 then loses the order of the samples in the gradient where `data`, `fsdp` and `tensor` are all in use.
RULES: tuple[Rule, ...] = (
    (r"step|counters/.*|optimizer/(.*/)?count", ()),
    (r".*/(bias|scale|temperature|logit_scale|positions|dates|extra_token|class_token)", ()),
    (r"prototypes", ("fsdp", None, None)),  # (regions, k, d): a lookup moves the banks of a batch, never the table
    (r".*/lora_[ab]", ()),  # (in, r), (r, out): thin
    (r".*/classes", ("fsdp", None)),  # (k, d): a head's classes
    (r".*/table", (None, "fsdp")),  # (ids, width): a vocabulary has whatever size it has
    (r".*/(query|key|value|up|hidden)/kernel", ("fsdp", "tensor")),  # (in, out)
    (r".*/(out|down|bottleneck)/kernel", ("tensor", "fsdp")),
    (r".*/(bias_up|bias_down)/kernel", ()),  # Swin-V2's position bias: 2 offsets in, one number a head out
    (r".*/(patch_embed|patches)/kernel", ("fsdp",)),  # (rows, columns, bands, out): bands are as many as they are
    (r".*/cells/kernel", ("fsdp", None, None, None)),  # (in, rows, columns, out): an up-head
    (r".*/kernel", ("fsdp", None)),
)

# Splitting an array smaller than this costs more in messages than it saves in memory (big_vision's limit).
SMALL = 4 * 2**20


def path_name(path: Sequence[Any]) -> str:
    """A key path of `jax.tree_util` written with slashes: "encoder/optical/kernel"."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def partition_spec(
    path: str, shape: tuple[int, ...], itemsize: int, mesh: Mesh, rules: Sequence[Rule] = RULES, small: int = SMALL
) -> PartitionSpec:
    """Where one array lives.

    Args:
      path: its path in the state.
      shape: its shape.
      itemsize: bytes of one element.
      mesh: axis names and sizes.
      rules: see RULES.
      small: arrays of fewer bytes are replicated.

    Raises:
      UserError: no rule matches, or a mesh axis does not divide the array's axis.
    """
    axes = next((axes for pattern, axes in rules if re.fullmatch(pattern, path)), None)
    if axes is None:
        raise UserError(f'sharding: no rule matches "{path}" of shape {shape}; add one to skyjax/parallel/sharding.py')
    if not axes or math.prod(shape) * itemsize < small:
        return PartitionSpec()
    spec = (None,) * (len(shape) - len(axes)) + axes[max(0, len(axes) - len(shape)) :]
    for size, axis in zip(shape, spec, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise UserError(
                f'sharding: "{path}" of shape {shape} is split as {spec}, but mesh axis {axis}={mesh.shape[axis]}'
                f" does not divide {size}; choose a mesh size that does"
            )
    return PartitionSpec(*spec)


def state_shardings(state: Any, mesh: Mesh, rules: Sequence[Rule] = RULES, small: int = SMALL) -> Any:
    """The sharding of every leaf of a (possibly abstract) state. Errors as in `partition_spec`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(
            mesh, partition_spec(path_name(path), leaf.shape, leaf.dtype.itemsize, mesh, rules, small)
        ),
        state,
    )


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """The abstract tree with its target shardings, as a restore or an ahead-of-time compile wants it."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
    )


def place_rows(x: jax.Array) -> jax.Array:
    """Says inside a jitted function that the first axis lies over data and fsdp; nothing where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    # Other axes stay open: the width of what lies between two projections is spread over `tensor`.
    open_axes = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(ROWS, *open_axes))


def row_shards() -> int:
    """Parts that rows are split into inside a jitted function; 1 where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in ROWS)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """A batch's first axis over data and fsdp, its other axes whole."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(batch_size: int, micro_batches: int, mesh: Mesh) -> None:
    """Raises UserError unless every device gets the same number of samples in every micro-batch."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if micro_batches < 1 or batch_size < 1 or batch_size % (micro_batches * shards):
        raise UserError(
            f"config: batch_size={batch_size} is not a multiple of micro_batches={micro_batches} times"
            f" data x fsdp = {shards} devices; the nearest that is: "
            f"{max(1, round(batch_size / (max(micro_batches, 1) * shards))) * max(micro_batches, 1) * shards}"
        )
