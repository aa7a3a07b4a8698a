"""The up-head: from a coarse token to a block of cells of the common width."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from skyjax.models.layers import Linear


class UpHead(nnx.Module):
    """A projection to `factor` x `factor` cells, laid out on the grid: a 1 x 1 convolution and a pixel shuffle."""

    def __init__(self, width: int, spatial_width: int, factor: int, dtype: Any, rngs: nnx.Rngs):
        self.cells = Linear(width, (factor, factor, spatial_width), dtype, rngs)

    def __call__(self, x: Float[Array, "*b h w d"]) -> Float[Array, "*b i j s"]:
        """The cells of all tokens, as one map."""
        cells = self.cells(x)
        *batch, h, w, factor, _, width = cells.shape
        return cells.swapaxes(-4, -3).reshape(*batch, h * factor, w * factor, width)
