"""Balanced soft assignment by Sinkhorn-Knopp, for prototypes and for the teacher's classes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def sinkhorn(
    scores: Float[Array, "n k"], valid: Bool[Array, "n"], *, epsilon: float, iterations: int
) -> Float[Array, "n k"]:
    """Assigns rows to columns so that all columns get the same share of the rows.

    Args:
      scores: similarity of each row to each column, in any float type.
      valid: the rows that count; the others neither give nor take.
      epsilon: temperature; small is hard.
      iterations: rounds of balancing columns, then rows.

    Returns:
      float32; valid rows sum to 1, the others are 0. After the last round columns are balanced as far as the rounds go.
    """
    # In logarithms: at a temperature of 0.05 the exponential of an ordinary score already leaves float32's range.
    logits = scores.astype(jnp.float32) / epsilon
    logits = logits - logits.max()  # a common factor changes nothing, and smaller numbers round less
    count = jnp.sum(valid)
    share = jnp.log(jnp.maximum(count, 1) / scores.shape[1])

    def balance(_: int, scales: tuple[Array, Array]) -> tuple[Array, Array]:
        # Scalings, not balanced copies: over many chips only vectors of length k are summed.
        row, _ = scales
        column = share - jax.nn.logsumexp(logits + row[:, None], axis=0, where=valid[:, None])
        column = jnp.where(count > 0, column, 0)
        return -jax.nn.logsumexp(logits + column, axis=1), column

    start = jnp.zeros(scores.shape[0]), jnp.zeros(scores.shape[1])
    _, column = jax.lax.fori_loop(0, iterations, balance, start)
    return jnp.where(valid[:, None], jax.nn.softmax(logits + column, axis=1), 0)
