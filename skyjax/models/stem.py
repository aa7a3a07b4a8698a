"""A convolutional stem in the place of the patch embedding, for small models and little data.

A strided projection is linear and sees no further than its patch; small convolutions bring what natural images have in
common (Xiao et al., 2021). Our own choice: the published encoders have the plain patch embedding. There are no norms:
batch norm would make a sample's features depend on its neighbours, and layer norm takes off brightness and contrast.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from skyjax.models.layers import PatchEmbed, gelu

LARGEST_FIRST = 4  # pixels a side of the first step's patches: the cheapest way off the full resolution


def make_stem(kind: str, patch_size: int, channels: int, width: int, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
    """Images -> one token a patch: "patch" is the published patch embedding, "conv" a `ConvStem`."""
    stems = {"patch": PatchEmbed, "conv": ConvStem}
    if kind not in stems:
        raise ValueError(f'stem "{kind}" is not known; it is one of {", ".join(stems)}')
    return stems[kind](patch_size, channels, width, dtype, rngs)


def first_patch(patch_size: int) -> int:
    """Pixels a side of the patches that a convolutional stem starts from."""
    return min(LARGEST_FIRST, patch_size // 2)


class ConvStem(nnx.Module):
    """Patches of 4 x 4 pixels or fewer, then residual stages, each of half the rows and columns and twice the width."""

    def __init__(self, patch_size: int, channels: int, width: int, dtype: Any, rngs: nnx.Rngs):
        if patch_size < 2 or patch_size & (patch_size - 1):
            raise ValueError(f"patch_size {patch_size}: a convolutional stem takes a power of two, 2 or more")
        self.stages = (patch_size // first_patch(patch_size)).bit_length() - 1
        if width % 2**self.stages:
            raise ValueError(
                f"width {width}: a convolutional stem of patch_size {patch_size} halves it {self.stages} times"
            )
        narrow = width >> self.stages
        self.patches = PatchEmbed(first_patch(patch_size), channels, narrow, dtype, rngs)
        for i in range(self.stages):
            setattr(self, f"stage{i}", ResidualStage(narrow << i, narrow << (i + 1), dtype, rngs))
        self.patch_size, self.dtype = patch_size, dtype

    def __call__(self, x: Float[Array, "n h w c"], bands: Bool[Array, "n c"] | None = None) -> Float[Array, "n i j d"]:
        """As `PatchEmbed`: padded at the bottom and right to whole patches; missing bands add nothing."""
        patch = self.patch_size
        x = jnp.pad(x.astype(self.dtype), ((0, 0), (0, -x.shape[1] % patch), (0, -x.shape[2] % patch), (0, 0)))
        x = gelu(self.patches(x, bands))
        for i in range(self.stages):
            x = getattr(self, f"stage{i}")(x)
        return x


class ResidualStage(nnx.Module):
    """GELU of the sum of two branches: 3 x 3 of stride 2, GELU, 3 x 3; and a projection of each 2 x 2 block."""

    def __init__(self, inputs: int, outputs: int, dtype: Any, rngs: nnx.Rngs):
        # Without norms a full second branch would make the variance grow from stage to stage.
        self.convolution0 = Convolution(inputs, outputs, 2, 2.0, dtype, rngs)
        self.convolution1 = Convolution(outputs, outputs, 1, 0.5, dtype, rngs)
        self.shortcut = PatchEmbed(2, inputs, outputs, dtype, rngs)

    def __call__(self, x: Float[Array, "n h w d"]) -> Float[Array, "n i j e"]:
        """Half the rows and columns, which are even."""
        branch = self.convolution1(gelu(self.convolution0(x)))
        return gelu(self.shortcut(x) + branch)


class Convolution(nnx.Module):
    """A 3 x 3 convolution, zero outside the image; its kernel starts with the variance `gain` / inputs / 9."""

    def __init__(self, inputs: int, outputs: int, stride: int, gain: float, dtype: Any, rngs: nnx.Rngs):
        init = nnx.initializers.variance_scaling(gain, "fan_in", "normal")
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs))
        self.stride, self.dtype = stride, dtype

    def __call__(self, x: Float[Array, "n h w d"]) -> Float[Array, "n i j e"]:
        """One feature a place, or every second place of every second row at stride 2."""
        kernel = self.kernel[...].astype(self.dtype)
        y = jax.lax.conv_general_dilated(
            x, kernel, (self.stride,) * 2, [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y + self.bias[...].astype(self.dtype)
