"""From one grid to another: features to the common grid, position embeddings to another image, pixel masks to cells."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

# Half, less the rounding of interpolation weights, so that a cell which is exactly half covered counts.
HALF = 0.5 - 1e-4


def to_grid(
    features: Float[Array, "*b h w d"], extent: tuple[float, float], grid: tuple[int, int]
) -> Float[Array, "*b i j d"]:
    """Features on another grid of the same ground: bilinear, widened to an antialiased triangle where it shrinks.

    Args:
      features: a map of cells.
      extent: how many rows and columns of cells the ground covers; less than (h, w) where the last are padding.
      grid: rows and columns wanted. Where they equal (h, w), `features` are returned as they are.
    """
    if features.shape[-3:-1] == grid:
        return features
    axes = (features.ndim - 3, features.ndim - 2)
    shape = (*features.shape[:-3], *grid, features.shape[-1])
    scale = jnp.array([grid[0] / extent[0], grid[1] / extent[1]], jnp.float32)
    return jax.image.scale_and_translate(features, shape, axes, scale, jnp.zeros(2), "linear")


def mask_to_grid(
    mask: Bool[Array, "*b h w"], extent: tuple[float, float], grid: tuple[int, int]
) -> Bool[Array, "*b i j"]:
    """A mask on another grid, by the rule of `to_grid`; a cell is valid from half its weight on."""
    if mask.shape[-2:] == grid:
        return mask
    return to_grid(mask[..., None].astype(jnp.float32), extent, grid)[..., 0] >= HALF


def valid_cells(clear: Bool[Array, "*b h w"], cell: int) -> Bool[Array, "*b i j"]:
    """Whether at least half the pixels of each cell of `cell` x `cell` pixels are clear.

    Cells that reach over the bottom or right edge count the pixels that lie inside.
    """
    h, w = clear.shape[-2:]
    pad = [(0, 0)] * (clear.ndim - 2) + [(0, -h % cell), (0, -w % cell)]
    rows, columns = -(-h // cell), -(-w // cell)
    blocks = jnp.pad(clear, pad).reshape(*clear.shape[:-2], rows, cell, columns, cell)
    inside = np.pad(np.ones((h, w), bool), pad[-2:]).reshape(rows, cell, columns, cell)
    return 2 * blocks.sum((-3, -1)) >= inside.sum((-3, -1))


def resize_positions(positions: Float[Array, "n d"], grid: tuple[int, int]) -> Float[Array, "i j d"]:
    """A square grid of learned positions for another grid, bicubic; the same grid is returned as it is."""
    side = math.isqrt(positions.shape[0])
    table = positions.reshape(side, side, -1)
    if grid == (side, side):
        return table
    rows, columns = bicubic_matrix(side, grid[0]), bicubic_matrix(side, grid[1])
    return jnp.einsum("ih,jw,hwd->ijd", rows, columns, table, precision="highest")


@functools.lru_cache
def bicubic_matrix(source: int, target: int) -> np.ndarray:
    """(target, source) float32 weights of PyTorch's bicubic interpolation.

    `align_corners=False`, a = -0.75, no antialias, edges repeated: released position embeddings are resized so.
    """
    centre = (np.arange(target) + 0.5) * source / target - 0.5
    first = np.floor(centre).astype(int) - 1
    matrix = np.zeros((target, source))
    for tap in range(4):
        index = first + tap
        np.add.at(matrix, (np.arange(target), np.clip(index, 0, source - 1)), _cubic(np.abs(centre - index)))
    return matrix.astype(np.float32)


def _cubic(distance: np.ndarray) -> np.ndarray:
    a = -0.75
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0))
