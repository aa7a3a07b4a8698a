"""Geo-prototypes: a bank of centres for each region of the Earth, which places of that region look at.

The table of all banks is state, not a parameter: no gradient reaches it. It moves towards what the teacher sees in a
region, once a step (`centres`, then `update`). What follows the paper: docs/fidelity.md, "Geo-prototypes".
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from skyjax.models.assignment import sinkhorn
from skyjax.models.layers import Linear

EPSILON = 1e-5
LEAST_SHARE = 1e-6  # places; a prototype that fewer take has no mean worth the name


class Prototypes(nnx.Module):
    """The learned projections: features to queries, and features with what the queries found to context."""

    def __init__(self, *, fused_width: int, width: int, dtype: Any, rngs: nnx.Rngs):
        self.query = Linear(fused_width, width, dtype, rngs)
        self.out = Linear(fused_width + width, fused_width, dtype, rngs)

    def __call__(
        self, fused: Float[Array, "b h w d"], banks: Float[Array, "b k p"], known: Bool[Array, "b"]
    ) -> Float[Array, "b h w d"]:
        """Features with geo-context.

        Args:
          fused: features of `b` sites.
          banks: the prototypes of each site's region; no gradient reaches them.
          known: whether the position of a site is known; where it is not, its features stand alone.
        """
        banks = jax.lax.stop_gradient(banks)
        query = self.queries(fused)
        scores = jnp.einsum("bhwp,bkp->bhwk", query, banks) * query.shape[-1] ** -0.5
        found = jnp.einsum("bhwk,bkp->bhwp", jax.nn.softmax(scores, axis=-1), banks)
        found = jnp.where(known[:, None, None, None], found, 0).astype(fused.dtype)
        return self.out(jnp.concatenate([fused, found], axis=-1))

    def queries(self, fused: Float[Array, "*b d"]) -> Float[Array, "*b p"]:
        """float32 with mean 0 and variance 1 a row, so that neither a bank nor bfloat16 meets what has run away."""
        query = self.query(fused).astype(jnp.float32)
        query -= query.mean(axis=-1, keepdims=True)
        return query * jax.lax.rsqrt(jnp.square(query).mean(axis=-1, keepdims=True) + EPSILON)


def region_of(lonlat: Float[Array, "b 2"], regions: int) -> Int32[Array, "b"]:
    """The number of each position's region: cells of equal area, `regions` of longitude x `regions` of sin(latitude).

    Args:
      lonlat: degrees. Longitudes go around the Earth as often as they like; 180 is -180. The poles belong to the last
        rows.
      regions: cells an axis.

    Returns:
      row x regions + column, rows from the south pole, columns from 180 degrees west; -1 where the position is unknown:
      NaN, infinite, or a latitude beyond 90 degrees.
    """
    longitude, latitude = lonlat[:, 0], lonlat[:, 1]
    known = jnp.isfinite(longitude) & (jnp.abs(latitude) <= 90)  # false for NaN
    column = jnp.floor((longitude + 180) % 360 / 360 * regions)
    row = jnp.floor((jnp.sin(jnp.deg2rad(latitude)) + 1) / 2 * regions)
    # Rounding takes a hair west of -180 degrees, like the north pole, to one cell too many.
    column, row = (jnp.clip(jnp.where(known, x, 0), 0, regions - 1).astype(jnp.int32) for x in (column, row))
    return jnp.where(known, row * regions + column, -1)


def lookup(table: Float[Array, "r k p"], regions: Int32[Array, "b"]) -> Float[Array, "b k p"]:
    """The bank of each region; some bank where the region is -1."""
    return jnp.take(table, jnp.maximum(regions, 0), axis=0, mode="clip")


def centres(
    queries: Float[Array, "b n p"],
    valid: Bool[Array, "b n"],
    banks: Float[Array, "b k p"],
    *,
    epsilon: float,
    iterations: int,
) -> Float[Array, "b k p"]:
    """Where the places of each sample would put the prototypes of its region.

    Args:
      queries: of all places of a sample, as `Prototypes.queries` gives them.
      valid: the places that count.
      banks: the prototypes of each sample's region.
      epsilon, iterations: of the balanced assignment by cosine (models/assignment.py).

    Returns:
      float32: for each prototype the mean of the queries, weighted by their assignment to it; the prototype itself
      where it has no share of any place.
    """
    cosines = jnp.einsum("bnp,bkp->bnk", _unit(queries), _unit(banks), precision="highest")
    assigned = jax.vmap(lambda scores, there: sinkhorn(scores, there, epsilon=epsilon, iterations=iterations))(
        cosines, valid
    )
    share = assigned.sum(axis=1)[..., None]
    sums = jnp.einsum("bnk,bnp->bkp", assigned, jnp.where(valid[..., None], queries, 0), precision="highest")
    return jnp.where(share > LEAST_SHARE, sums / jnp.maximum(share, LEAST_SHARE), banks)


def update(
    table: Float[Array, "r k p"], centres: Float[Array, "b k p"], regions: Int32[Array, "b"], momentum: float
) -> Float[Array, "r k p"]:
    """The table after one step: momentum x old + (1 - momentum) x the mean of the centres of a region's samples.

    Args:
      table: all banks.
      centres: of the samples of the global batch, in any order.
      regions: of the samples; -1: the sample does not count.
      momentum: share of the old prototypes. Regions without a sample stay as they are.
    """
    # The first sample of a region stands for all: sums have a row a sample, not one a region, so that what crosses
    # chips is as large as the batch and never as the table.
    first = jnp.argmax(regions[:, None] == regions[None], axis=1)
    stands = (first == jnp.arange(len(regions))) & (regions >= 0)
    totals = jax.ops.segment_sum(centres, first, num_segments=len(regions))
    counts = jax.ops.segment_sum(jnp.ones(len(regions)), first, num_segments=len(regions))
    means = totals / jnp.maximum(counts, 1)[:, None, None]
    moved = momentum * lookup(table, regions) + (1 - momentum) * means
    return table.at[jnp.where(stands, regions, len(table))].set(moved, mode="drop")


def _unit(vectors: Float[Array, "*n p"]) -> Float[Array, "*n p"]:
    return vectors * jax.lax.rsqrt(jnp.sum(jnp.square(vectors), axis=-1, keepdims=True) + 1e-12)
