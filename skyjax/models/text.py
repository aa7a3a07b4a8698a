"""The text tower: token ids to one embedding a text, in the space that images are compared in.

A pre-norm transformer over learned positions, as CLIP's (Radford et al. 2021, section 2.4) and SigLIP's (Zhai et al.
2023): causal or not; pooled by the last valid token, which is eos, by a learned query, or by the mean; then a norm and
a projection. Unlike SigLIP's, padding is never looked at. `model.text`, its keys and sizes: docs/text.md.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from skyjax.errors import UserError, nearest
from skyjax.models.layers import (
    Compute,
    FeedForward,
    LayerNorm,
    Linear,
    Place,
    Projections,
    TransformerLayer,
    as_they_lie,
    run_transformer,
    stack,
    token,
)
from skyjax.models.plain import Config, Params, bind, fresh
from skyjax.models.tokens import Tokens, look_at, visible

EPSILON = 1e-6
POOLS = ("last", "query", "mean")

_CLIP = {"depth": 12, "length": 77, "causal": True, "pool": "last"}
_SIGLIP = {"length": 64, "causal": False, "pool": "last"}
PRESETS = {
    "clip-b": {"width": 512, "heads": 8, "embed_dim": 512, **_CLIP},
    "clip-l": {"width": 768, "heads": 12, "embed_dim": 768, **_CLIP},
    "siglip-b": {"width": 768, "depth": 12, "heads": 12, "embed_dim": 768, **_SIGLIP},
    "siglip-l": {"width": 1024, "depth": 24, "heads": 16, "embed_dim": 1024, **_SIGLIP},
}


def preset(name: str, vocabulary: int, **changes: Any) -> dict[str, Any]:
    """The `model.text` of a published size.

    Args:
      name: a key of PRESETS.
      vocabulary: rows of the table: the tokenizer's `size` or more.
      changes: keys with other values.

    Raises:
      UserError: there is no such preset.
    """
    if name not in PRESETS:
        raise UserError(f'text preset "{name}" is not known{nearest(name, PRESETS)}; there are {", ".join(PRESETS)}')
    return {"vocabulary": vocabulary, **PRESETS[name], **changes}


def init(model_config: Config, key: jax.Array) -> Params:
    """Fresh float32 parameters of `model.text`: "tokens", "positions", "layers", "norm", "pool", "projection".

    Raises:
      ValueError: `pool` is not known, or heads don't divide the width.
    """
    return fresh(TextTower, model_config, key)


def apply(
    model_config: Config,
    params: Params,
    tokens: Int32[Array, "b n"],
    valid: Bool[Array, "b n"],
    *,
    key: jax.Array | None = None,
    place: Place = as_they_lie,
) -> dict[str, Array]:
    """Features of texts.

    Args:
      model_config: `config.model`, with `text`.
      params: as `init` gives them.
      tokens: ids, the valid ones first; n is `text.length` or less.
      valid: the ids that are there. What stands elsewhere changes nothing.
      key: turns stochastic depth on (`text.drop_path`).
      place: see models/layers.py, `Compute`.

    Returns:
      "tokens" (b, n, d), the last layer's, normed; "pooled" (b, d) and "embedding" (b, e), float32 and of any length.
      A row without a valid token gives finite features that mean nothing.
    """
    return bind(TextTower, model_config, params, place)(tokens, valid, key)


class TextTower(nnx.Module):
    """As the module's docstring says; parameters by `init`, features by `apply`."""

    def __init__(self, config: Config, rngs: nnx.Rngs, place: Place = as_they_lie):
        part = config.text
        if part.pool not in POOLS:
            raise ValueError(f'model.text.pool is "{part.pool}"; it is one of {", ".join(POOLS)}')
        compute = Compute(jnp.dtype(config.dtype), config.scan, config.remat, part.get("drop_path", 0.0), place)
        dtype, width, heads = compute.dtype, part.width, part.heads
        self.tokens = Tokens(part.vocabulary, width, dtype, rngs)
        self.positions = token((part.length, width), rngs)
        self.layers = stack(lambda r: TransformerLayer(width, heads, EPSILON, dtype, r), part.depth, rngs)
        self.norm = LayerNorm(width, EPSILON, rngs)
        self.pool = QueryPool(width, heads, dtype, rngs) if part.pool == "query" else None
        self.projection = Linear(width, part.embed_dim, dtype, rngs, use_bias=False)
        self.kind, self.causal, self.compute = part.pool, part.causal, compute

    def __call__(
        self, tokens: Int32[Array, "b n"], valid: Bool[Array, "b n"], key: jax.Array | None
    ) -> dict[str, Array]:
        """As `apply`."""
        n, length = tokens.shape[1], len(self.positions[...])
        if n > length:
            raise ValueError(f"texts of {n} tokens; model.text.length is {length}")
        # An id under a mask may be anything, also none of the table's.
        x = self.tokens(jnp.where(valid, tokens, 0)) + self.positions[...][:n].astype(self.compute.dtype)
        x = run_transformer(self.compute, self.layers, x, visible(valid, causal=self.causal), key)
        x = self.norm(x)
        pooled = self.pool(x, valid) if self.pool is not None else _pool(self.kind, x, valid)
        embedding = self.projection(pooled)
        return {"tokens": x, "pooled": pooled.astype(jnp.float32), "embedding": embedding.astype(jnp.float32)}


class QueryPool(nnx.Module):
    """A learned query gathers the valid tokens, then a feed-forward (as Zhai et al. 2022, section 3.3)."""

    def __init__(self, width: int, heads: int, dtype: Any, rngs: nnx.Rngs):
        self.extra_token = token((width,), rngs)
        self.attention = Projections(width, heads, dtype, rngs)
        self.norm = LayerNorm(width, EPSILON, rngs)
        self.feed_forward = FeedForward(width, dtype, rngs)

    def __call__(self, x: Float[Array, "b n d"], valid: Bool[Array, "b n"]) -> Float[Array, "b d"]:
        """One feature a row."""
        query = jnp.broadcast_to(self.extra_token[...].astype(x.dtype), (len(x), 1, x.shape[-1]))
        gathered = look_at(self.attention, query, x, valid)[:, 0]
        return gathered + self.feed_forward(self.norm(gathered))


def _pool(kind: str, x: Float[Array, "b n d"], valid: Bool[Array, "b n"]) -> Float[Array, "b d"]:
    """The last valid token, or the mean of all; 0 where there is none."""
    count = valid.sum(axis=1, keepdims=True)
    weights = (valid if kind == "mean" else jnp.arange(x.shape[1]) == count - 1).astype(jnp.float32)
    # As a product: a gather of rows would be a scatter on the way back.
    total = jnp.einsum("bn,bnd->bd", weights, x.astype(jnp.float32), precision="highest")
    return (total / jnp.maximum(count, 1) if kind == "mean" else total).astype(x.dtype)
