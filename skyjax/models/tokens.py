"""What text tower and decoder share: the table of tokens, who sees whom in a row, and looking at other tokens."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from skyjax.models.layers import Linear, Projections, attend, token


class Tokens(nnx.Module):
    """A learned row a token id, to read tokens by and to score them by."""

    def __init__(self, vocabulary: int, width: int, dtype: Any, rngs: nnx.Rngs):
        self.table = token((vocabulary, width), rngs)
        self.dtype = dtype

    def __call__(self, tokens: Int32[Array, "*b"]) -> Float[Array, "*b d"]:
        """The row of each id; ids must lie within the table."""
        return self.table[...][tokens].astype(self.dtype)

    def scores(self, features: Float[Array, "*b d"]) -> Float[Array, "*b k"]:
        """Logits of every id, float32 or wider."""
        table = self.table[...].astype(self.dtype)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        return jnp.einsum("...d,kd->...k", features.astype(self.dtype), table, preferred_element_type=wide)


def visible(valid: Bool[Array, "b n"], *, causal: bool) -> Bool[Array, "b n n"]:
    """Which tokens each may look at: valid ones, not behind it if causal; and itself, so that none sees nothing."""
    n = valid.shape[1]
    itself = jnp.eye(n, dtype=bool)
    return (valid[:, None, :] & jnp.tri(n, dtype=bool) if causal else valid[:, None, :]) | itself


def heads_of(project: Linear, x: Float[Array, "*b n d"], heads: int) -> Float[Array, "*b n a e"]:
    """`x` projected, the heads side by side."""
    y = project(x)
    return y.reshape(*y.shape[:-1], heads, -1)


def look_at(
    attention: Projections, x: Float[Array, "b q d"], memory: Float[Array, "b n d"], mask: Bool[Array, "b n"]
) -> Float[Array, "b q d"]:
    """What tokens `x` gather from those of `memory` that are there."""
    query = heads_of(attention.query, x, attention.heads)
    key, value = (heads_of(project, memory, attention.heads) for project in (attention.key, attention.value))
    gathered = attend(query, key, value, scale=query.shape[-1] ** -0.5, mask=mask[:, None, None, :])
    return attention.join(gathered)
