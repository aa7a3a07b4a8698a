"""Balanced soft assignment by Sinkhorn-Knopp, for prototypes and for the teacher's classes.

The balanced matrix is softmax(scores / epsilon + offsets) along each row: one number a column holds all that balancing
needs, so that no balanced copy has to be kept, and over many chips only vectors of that length are summed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def sinkhorn(
    scores: Float[Array, "n k"], valid: Bool[Array, "n"], *, epsilon: Float[Array, ""] | float, iterations: int
) -> Float[Array, "n k"]:
    """Assigns rows to columns so that all columns get the same share of the rows.

    Args:
      scores: similarity of each row to each column, in any float type.
      valid: the rows that count; the others neither give nor take.
      epsilon: temperature; small is hard.
      iterations: rounds of balancing rows, then columns; the rows come last again. With 0 each row is its own softmax.

    Returns:
      float32; valid rows sum to 1, the others are 0. After the last round columns are balanced as far as the rounds go.
    """
    offsets = column_offsets(scores[None], valid[None], lambda rows: rows, epsilon=epsilon, iterations=iterations)
    return jnp.where(valid[:, None], assign(scores, offsets, epsilon=epsilon), 0)


def assign(
    scores: Float[Array, "*n k"], offsets: Float[Array, "k"], *, epsilon: Float[Array, ""] | float
) -> Float[Array, "*n k"]:
    """The balanced assignment of some rows, from the offsets of all columns."""
    return jax.nn.softmax(scores.astype(jnp.float32) / epsilon + offsets, axis=-1)


def column_offsets(
    blocks: Float[Array, "c *n d"],
    valid: Bool[Array, "c *n"],
    score: Callable[[Array], Array],
    *,
    epsilon: Float[Array, ""] | float,
    iterations: int,
) -> Float[Array, "k"]:
    """What balancing adds to each column of scores / epsilon.

    Args:
      blocks: the rows, cut into blocks. One block's scores are computed once and kept; those of several are computed
        anew in each round, a block at a time, so that they never stand in memory together.
      valid: the rows that count.
      score: a block to its scores (*n, k).
      epsilon: temperature.
      iterations: rounds of balancing rows, then columns.
    """

    def weights_of(block: Float[Array, "*n d"], there: Bool[Array, "*n"]) -> Float[Array, "*n k"]:
        logits = score(block).astype(jnp.float32) / epsilon
        # A row's scale is free, so its best column has weight 1. Weights that float32 can't tell from nothing are kept
        # at e^-60: a column that is far from every row can still be filled.
        weights = jnp.exp(jnp.maximum(logits - logits.max(-1, keepdims=True), -60))
        return jnp.where(there[..., None], weights, 0)

    columns = jax.eval_shape(score, blocks[0]).shape[-1]
    kept = weights_of(blocks[0], valid[0]) if len(blocks) == 1 else None
    count = jnp.sum(valid)

    def column_sums(scale: Float[Array, "k"], weights: Float[Array, "*n k"], there: Bool[Array, "*n"]) -> Array:
        rows = jnp.where(there, 1 / jnp.einsum("...k,k->...", weights, scale, precision="highest"), 0)
        return jnp.einsum("nk,n->k", weights.reshape(-1, columns), rows.reshape(-1), precision="highest")

    def balance(_: int, scale: Float[Array, "k"]) -> Float[Array, "k"]:
        def add(sums: Float[Array, "k"], block: tuple[Array, Array]) -> tuple[Float[Array, "k"], Any]:
            return sums + column_sums(scale, weights_of(*block), block[1]), None

        if kept is not None:
            sums = column_sums(scale, kept, valid[0])
        else:
            sums, _ = jax.lax.scan(add, jnp.zeros(columns), (blocks, valid))
        return jnp.where(count > 0, count / columns / jnp.where(count > 0, sums, 1), 1)

    return jnp.log(jax.lax.fori_loop(0, iterations, balance, jnp.ones(columns)))
