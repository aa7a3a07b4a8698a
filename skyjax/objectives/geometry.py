"""Which token of one view lies where in another, and which date is which.

Places are (row, column) in the sample's unit square, row 0 at the top; a view's affine map `to_view` (input/views.py)
takes them to the view's own unit square, flips and quarter turns included. A map of (h, w) tokens covers its view's
unit square, token (i, j) with its centre at ((i + 1/2) / h, (j + 1/2) / w).

Axes beside those of the house: `p` pairs of views (student's, teacher's), `l` tokens of one or many maps in a row.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def token_centres(grid: tuple[int, int]) -> Float[Array, "n 2"]:
    """Centres of a map's tokens in the unit square of its view, row by row."""
    rows, columns = ((jnp.arange(size) + 0.5) / size for size in grid)
    return jnp.stack(jnp.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)


def to_ground(to_view: Float[Array, "*b 2 3"], points: Float[Array, "n 2"]) -> Float[Array, "*b n 2"]:
    """Points of a view's unit square in the sample's, by the inverse of the view's map."""
    (a, b), (c, d) = (
        (to_view[..., 0, 0], to_view[..., 0, 1]),
        (to_view[..., 1, 0], to_view[..., 1, 1]),
    )
    inverse = jnp.stack([jnp.stack([d, -b], -1), jnp.stack([-c, a], -1)], -2) / (a * d - b * c)[..., None, None]
    return jnp.einsum("...ij,...nj->...ni", inverse, points - to_view[..., None, :, 2])


def to_local(to_view: Float[Array, "*b 2 3"], ground: Float[Array, "*b n 2"]) -> Float[Array, "*b n 2"]:
    """Points of the sample's unit square in the view's."""
    return jnp.einsum("...ij,...nj->...ni", to_view[..., :2], ground) + to_view[..., None, :, 2]


def carry(
    points: Float[Array, "n 2"], source: Float[Array, "*b 2 3"], target: Float[Array, "*b 2 3"]
) -> tuple[Float[Array, "*b n 2"], Bool[Array, "*b n"]]:
    """Points of the source view's unit square in the target view's, and whether they lie inside it."""
    local = to_local(target, to_ground(source, points))
    # The two maps cancel up to rounding, and a token that touches the border from inside must not fall out by it.
    inside = jnp.all((local >= -1e-5) & (local <= 1 + 1e-5), axis=-1)
    return local, inside


def neighbours(points: Float[Array, "*b 2"], grid: tuple[int, int]) -> tuple[Int[Array, "*b 4"], Float[Array, "*b 4"]]:
    """The four tokens around each point of a view's unit square and their bilinear weights, which sum to one.

    Within half a token of the border the nearest tokens stand for what would lie beyond it. Index: row by row.
    """
    size = jnp.asarray(grid)
    position = jnp.clip(points * size - 0.5, 0, size - 1)
    low = jnp.floor(position)
    share = position - low
    low = low.astype(jnp.int32)
    high = jnp.minimum(low + 1, size - 1)
    rows = jnp.stack([low[..., 0], low[..., 0], high[..., 0], high[..., 0]], -1)
    columns = jnp.stack([low[..., 1], high[..., 1], low[..., 1], high[..., 1]], -1)
    down, right = share[..., :1], share[..., 1:]
    weight = jnp.concatenate([(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right], -1)
    return rows * grid[1] + columns, weight


def take(tokens: Array, index: Int[Array, "b *n"]) -> Array:
    """Rows of each sample's tokens: (b, l, ...) and (b, *n) to (b, *n, ...)."""
    return jax.vmap(lambda rows, i: rows[i])(tokens, index)


def measured_share(
    valid: Bool[Array, "b l"], index: Int[Array, "b *n 4"], weight: Float[Array, "b *n 4"]
) -> Float[Array, "b *n"]:
    """The part of each point's bilinear weight that lies on valid tokens."""
    return jnp.sum(weight * take(valid, index), axis=-1)


def interpolate(
    tokens: Float[Array, "b l d"],
    valid: Bool[Array, "b l"],
    index: Int[Array, "b *n 4"],
    weight: Float[Array, "b *n 4"],
) -> Float[Array, "b *n d"]:
    """Bilinear samples over the valid tokens only: what stands at a masked token never shows. Zero where none is valid.

    Args:
      tokens: the tokens of one or many maps of a sample, one after the other.
      valid: which of them were measured.
      index: the four tokens of each point (`neighbours`, moved to its map).
      weight: their bilinear weights.
    """
    weight = weight * take(valid, index)
    weight = weight / jnp.maximum(weight.sum(-1, keepdims=True), 1e-6)
    corners = jnp.where(weight[..., None] > 0, take(tokens, index), 0)
    return jnp.einsum("b...k,b...kd->b...d", weight.astype(tokens.dtype), corners)


def match_days(
    days: Int[Array, "*b s"],
    valid: Bool[Array, "*b s"],
    other_days: Int[Array, "*b t"],
    other_valid: Bool[Array, "*b t"],
) -> tuple[Int[Array, "*b s"], Bool[Array, "*b s"]]:
    """The other view's slot that holds the same day, and whether there is one.

    Slots mean nothing, days do. Where a day stands more than once among the valid dates (two passes, two tiles), the
    first of one view goes with the first of the other, the second with the second.
    """
    same = (days[..., :, None] == other_days[..., None, :]) & valid[..., :, None] & other_valid[..., None, :]
    same &= _occurrence(days, valid)[..., :, None] == _occurrence(other_days, other_valid)[..., None, :]
    return jnp.argmax(same, axis=-1), jnp.any(same, axis=-1)


def _occurrence(days: Int[Array, "*b t"], valid: Bool[Array, "*b t"]) -> Int[Array, "*b t"]:
    """How many earlier slots hold the same valid day."""
    same = (days[..., :, None] == days[..., None, :]) & valid[..., None, :]
    return jnp.sum(jnp.tril(same, k=-1), axis=-1)
