"""A convolutional stem in the place of the patch embedding, for small models and little data.

A strided projection sees no further than its patch and is linear; a few small convolutions bring what natural images
have in common (Xiao et al., 2021). Our own choice: the published encoders have the plain patch embedding.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from skyjax.models.layers import Linear, scale_up_missing, unit_bias


class ConvStem(nnx.Module):
    """Convolutions of 3 x 3 and stride 2 with GELU after each, then a projection: one token a patch."""

    def __init__(self, patch_size: int, channels: int, width: int, dtype: Any, rngs: nnx.Rngs):
        steps = patch_size.bit_length() - 1
        if patch_size != 2**steps or not steps:
            raise ValueError(f"patch_size {patch_size}: a convolutional stem takes a power of two, 2 or more")
        widths = [channels, *(max(width // 2 ** (steps - 1 - i), 1) for i in range(steps))]
        for i in range(steps):
            setattr(self, f"convolution{i}", Convolution(widths[i], widths[i + 1], dtype, rngs))
        self.projection = Linear(width, width, dtype, rngs)
        self.steps, self.patch_size, self.dtype = steps, patch_size, dtype

    def __call__(self, x: Float[Array, "n h w c"], bands: Bool[Array, "n c"] | None = None) -> Float[Array, "n i j d"]:
        """As `PatchEmbed`: padded at the bottom and right to whole patches; missing bands add nothing."""
        patch = self.patch_size
        x = jnp.pad(x.astype(self.dtype), ((0, 0), (0, -x.shape[1] % patch), (0, -x.shape[2] % patch), (0, 0)))
        for i in range(self.steps):
            x = jax.nn.gelu(getattr(self, f"convolution{i}")(x, bands if i == 0 else None), approximate=False)
        return self.projection(x)


class Convolution(nnx.Module):
    """A 3 x 3 convolution of stride 2, zero outside the image."""

    def __init__(self, inputs: int, outputs: int, dtype: Any, rngs: nnx.Rngs):
        init = nnx.initializers.he_normal()
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, inputs, outputs), jnp.float32))
        self.bias = unit_bias(outputs, rngs)
        self.dtype = dtype

    def __call__(self, x: Float[Array, "n h w c"], bands: Bool[Array, "n c"] | None = None) -> Float[Array, "n i j d"]:
        """Half the rows and columns."""
        y = jax.lax.conv_general_dilated(
            x, self.kernel[...].astype(self.dtype), (2, 2), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        if bands is not None:
            y = scale_up_missing(y, bands)
        return y + self.bias[...].astype(self.dtype)
