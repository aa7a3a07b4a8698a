"""Low-rank adapters (LoRA, Hu et al. 2022): a trained layer moves by a product of two thin matrices.

They live in the tree of parameters, beside the kernel that they move, and go into it before a model is called:

    query/kernel (l, in, out)  ->  query/kernel, query/lora_a (l, in, r), query/lora_b (l, r, out)

    params = lora.add(params, r"encoder/optical/.*/(query|value)/kernel", rank=8, key=key)
    features = skysense.apply(config, lora.merge(params, scale=2.0)["encoder"], images)

So models know nothing of them, `merge` is also what an export calls, and what trains is said where it always is, in
optimizer.learning_rate_multipliers: (".*/lora_[ab]", 1.0) beside 0.0 for the rest.
"""

import math
import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from skyjax.errors import UserError, nearest
from skyjax.models.parameters import leaves

Params = dict[str, Any]

KERNEL, DOWN, UP = "kernel", "lora_a", "lora_b"


def add(params: Mapping[str, Any], targets: str, *, rank: int, key: jax.Array) -> Params:
    """The tree with adapters, which change nothing yet: lora_b is zero.

    Args:
      params: nested dict of arrays, or of what `jax.eval_shape` gives where this is traced.
      targets: regular expression over the whole path of a linear layer's kernel, "encoder/sar/layers/.../kernel".
        Layers of a stack share their path, and each gets its own adapter.
      rank: columns of lora_a.
      key: of the draw; an adapter's depends on it and on the path alone.

    Raises:
      UserError: nothing matches, what matches is no linear layer's kernel, or the rank is below 1.
    """
    if rank < 1:
        raise UserError(f"lora: rank is {rank}; set it to 1 or more")
    paths = dict(leaves(params))
    chosen = [path for path in paths if re.fullmatch(targets, path)]
    if not chosen:
        kernels = [path for path in paths if path.endswith(f"/{KERNEL}")]
        raise UserError(f'lora: no parameter is called "{targets}"{nearest(targets, kernels)}')
    for path in chosen:
        if path.rpartition("/")[2] != KERNEL or _axes(path, paths[path]) is None:
            shape = tuple(paths[path].shape)
            raise UserError(f'lora: "{path}" {shape} is no kernel of a linear layer; name others by a narrower pattern')

    def grow(node: Any, path: str) -> Any:
        if not isinstance(node, Mapping):
            return node
        grown = {name: grow(value, f"{path}{name}/") for name, value in node.items()}
        if f"{path}{KERNEL}" in chosen:
            kernel = node[KERNEL]
            stack, inputs, outputs = _axes(path + KERNEL, kernel) or ((), 0, ())
            own = jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF)
            grown[DOWN] = jax.random.normal(own, (*stack, inputs, rank), kernel.dtype) / math.sqrt(inputs)
            grown[UP] = jnp.zeros((*stack, rank, *outputs), kernel.dtype)
        return grown

    return grow(params, "")


def merge(params: Mapping[str, Any], scale: float) -> Params:
    """The tree without adapters: each kernel with `scale` times lora_a lora_b added. What has none stays as it is."""
    merged: Params = {
        name: merge(value, scale) if isinstance(value, Mapping) else value for name, value in params.items()
    }
    if DOWN in merged:
        down, up, kernel = merged.pop(DOWN), merged.pop(UP), merged[KERNEL]
        flat = up.reshape(*down.shape[:-2], down.shape[-1], -1)
        product = jnp.einsum("...ir,...ro->...io", down, flat, precision="highest")
        merged[KERNEL] = kernel + (scale * product).reshape(kernel.shape).astype(kernel.dtype)
    return merged


def _axes(path: str, kernel: Any) -> tuple[tuple[int, ...], int, tuple[int, ...]] | None:
    """Axes of a linear layer's kernel: of the stack, in, out; None of a convolution's."""
    shape = tuple(kernel.shape)
    if path.endswith(f"cells/{KERNEL}"):  # an up-head, whose outputs are several axes
        return (), shape[0], shape[1:]
    return (shape[:-2], shape[-2], shape[-1:]) if len(shape) in (2, 3) else None
