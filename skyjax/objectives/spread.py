"""Spread: a regulariser that keeps features apart, and the two numbers that show a collapse.

In: one feature a sample and view. Out: a sum and a count; metrics.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from skyjax.objectives.heads import unit

FLOOR = 1e-2  # the default of `objective.spread.floor`
# Unit vectors within a thousandth of one another are one point; the shape of their rounding says nothing.
_LEAST_VARIANCE = 1e-6


def koleo(
    features: Float[Array, "b d"], valid: Bool[Array, "b"], floor: float = FLOOR
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of -log of each unit vector's distance to its nearest neighbour, and the count of rows that have one.

    Kozachenko-Leonenko estimate of the (negative) entropy, as DINOv2 uses it (Oquab et al. 2023, section 4;
    Sablayrolles et al. 2019). Masked rows are neither anchors nor neighbours; duplicates are finite.

    Args:
      features: one a sample; normalised here.
      valid: rows that count.
      floor: distances below it pull no harder: the gradient of a near duplicate stays within 1 / (2 x floor).
    """
    points = unit(jnp.where(valid[:, None], features.astype(jnp.float32), 0))
    cosine = jax.lax.stop_gradient(points @ points.T)
    other = valid[None] & ~jnp.eye(len(valid), dtype=bool)
    nearest = points[jnp.argmax(jnp.where(other, cosine, -jnp.inf), axis=1)]
    counted = valid & other.any(1)
    squared = jnp.sum(jnp.square(points - nearest), axis=-1)
    loss = -0.5 * jnp.log(squared + floor**2)
    return jnp.sum(jnp.where(counted, loss, 0)), counted.sum().astype(jnp.float32)


def effective_rank(features: Float[Array, "n d"], valid: Bool[Array, "n"]) -> Float[Array, ""]:
    """(sum of e)^2 / sum of e^2 over the eigenvalues e of the unit vectors' covariance, from 1 to min(n - 1, d).

    The participation ratio, exp of the spectrum's Renyi entropy of order 2: k where k eigenvalues are equal and the
    others 0. Both sums are read off a matrix without its eigenvalues, which a TPU would take a long program to find.
    Points that are one point have rank 1.
    """
    centred = _centred(features, valid)
    # The two products share their eigenvalues; the smaller one is cheaper.
    n, d = centred.shape
    left, right = (centred, centred.T) if n <= d else (centred.T, centred)
    product = jnp.matmul(left, right, precision="highest")
    total = jnp.trace(product)
    rank = jnp.square(total) / jnp.maximum(jnp.sum(jnp.square(product)), 1e-30)
    return jnp.where(total > _LEAST_VARIANCE * jnp.maximum(valid.sum(), 1), rank, 1.0)


def spread(features: Float[Array, "n d"], valid: Bool[Array, "n"]) -> Float[Array, ""]:
    """Mean over the dimensions of the unit vectors' standard deviation; at most 1 / sqrt(d), 0 in a collapse."""
    variance = jnp.sum(jnp.square(_centred(features, valid)), axis=0) / jnp.maximum(valid.sum(), 1)
    return jnp.mean(jnp.sqrt(variance))


def _centred(features: Float[Array, "n d"], valid: Bool[Array, "n"]) -> Float[Array, "n d"]:
    points = unit(jnp.where(valid[:, None], features.astype(jnp.float32), 0))
    mean = points.sum(0) / jnp.maximum(valid.sum(), 1)
    return jnp.where(valid[:, None], points - mean, 0)
