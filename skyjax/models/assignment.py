"""Balanced soft assignment by Sinkhorn-Knopp, for prototypes and for the teacher's classes.

The balanced matrix is softmax(scores / epsilon + offsets) along each row: one number a column holds all that balancing
needs, so that no balanced copy has to be kept, and over many chips only vectors of that length are summed.
"""

from collections.abc import Callable

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
      iterations: rounds of balancing columns, then rows; with 0 each row is its own softmax.

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
      iterations: rounds of balancing columns, then rows.
    """

    def logits_of(block: Float[Array, "*n d"]) -> Float[Array, "*n k"]:
        # In logarithms: at a temperature of 0.05 the exponential of an ordinary score leaves float32's range.
        return score(block).astype(jnp.float32) / epsilon

    columns = jax.eval_shape(logits_of, blocks[0]).shape[-1]
    kept = logits_of(blocks[0]) if len(blocks) == 1 else None
    count = jnp.sum(valid)

    def balance(i: Array, offsets: Float[Array, "k"]) -> Float[Array, "k"]:
        def column_sums(logits: Float[Array, "*n k"], there: Bool[Array, "*n"]) -> Float[Array, "k"]:
            # Columns come first, so the first round sees the rows as they are.
            row = jnp.where(i > 0, jax.nn.logsumexp(logits + offsets, axis=-1, keepdims=True), 0)
            masked = jnp.where(there[..., None], logits - row, -jnp.inf)
            return jax.nn.logsumexp(masked.reshape(-1, columns), axis=0)

        def add(sums: Float[Array, "k"], block: tuple[Array, Array]) -> tuple[Float[Array, "k"], None]:
            return jnp.logaddexp(sums, column_sums(logits_of(block[0]), block[1])), None

        if kept is not None:
            sums = column_sums(kept, valid[0])
        else:
            sums, _ = jax.lax.scan(add, jnp.full(columns, -jnp.inf), (blocks, valid))
        return jnp.where(count > 0, jnp.log(jnp.maximum(count, 1) / columns) - sums, 0)

    return jax.lax.fori_loop(0, iterations, balance, jnp.zeros(columns))
