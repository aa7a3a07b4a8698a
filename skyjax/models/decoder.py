"""The decoder: writes text on the tokens of an image, for captions and for answers of any words.

A causal pre-norm transformer whose layers look at the words so far, then at the image (CoCa, Yu et al. 2022, section
3.2; the layer is Vaswani et al.'s 2017 with the norms first). Image tokens go through a norm and a projection; beside
them stands a learned one that may always be looked at, so that an image without a valid place is no special case.
`features` and `logits` are for training, `remember` and `step` for generation (models/generate.py): one word at a time,
with the keys and values of what was before. `model.decoder`, its keys: docs/text.md.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from skyjax.models.layers import (
    Compute,
    FeedForward,
    LayerNorm,
    Linear,
    Place,
    Projections,
    as_they_lie,
    attend,
    depth,
    drop_path,
    stack,
    token,
)
from skyjax.models.plain import Config, Params, bind, fresh
from skyjax.models.tokens import Tokens, heads_of, look_at, visible

EPSILON = 1e-6


class Memory(NamedTuple):
    """What generation keeps: keys and values of the image's tokens, and of the words so far (l layers, r rows).

    Rows are several for an image where several texts are written of it.
    """

    image_key: Float[Array, "l b m a e"]
    image_value: Float[Array, "l b m a e"]
    image_valid: Bool[Array, "b m"]
    key: Float[Array, "l b r n a e"]
    value: Float[Array, "l b r n a e"]


def init(model_config: Config, key: jax.Array) -> Params:
    """Fresh float32 parameters of `model.decoder`: "tokens", "positions", "memory", "layers", "norm", perhaps "words".

    Raises:
      ValueError: heads don't divide the width.
    """
    return fresh(Decoder, model_config, key)


def features(
    model_config: Config,
    params: Params,
    tokens: Int32[Array, "b n"],
    valid: Bool[Array, "b n"],
    images: Float[Array, "b m c"],
    images_valid: Bool[Array, "b m"],
    *,
    key: jax.Array | None = None,
    place: Place = as_they_lie,
) -> Float[Array, "b n d"]:
    """Teacher-forced features: those at a token tell the next one.

    Args:
      model_config: `config.model`, with `decoder`.
      params: as `init` gives them.
      tokens: ids, the valid ones first; n is `decoder.length` or less.
      valid: the ids that are there.
      images: tokens of the image, as the fused features of all places.
      images_valid: those that are there. Values elsewhere are never read.
      key: turns stochastic depth on (`decoder.drop_path`).
      place: see models/layers.py, `Compute`.
    """
    return bind(Decoder, model_config, params, place)(tokens, valid, images, images_valid, key)


def logits(model_config: Config, params: Params, features: Float[Array, "*b d"]) -> Float[Array, "*b k"]:
    """Scores of every id of the vocabulary, float32, of what `features` gives."""
    return bind(Decoder, model_config, params).scores(features)


class Decoder(nnx.Module):
    """As the module's docstring says."""

    def __init__(self, config: Config, rngs: nnx.Rngs, place: Place = as_they_lie):
        part = config.decoder
        compute = Compute(jnp.dtype(config.dtype), config.scan, config.remat, part.get("drop_path", 0.0), place)
        dtype, width = compute.dtype, part.width
        image_width = config.spatial_width if config.fusion is None else config.fusion.width
        self.tokens = Tokens(part.vocabulary, width, dtype, rngs)
        self.positions = token((part.length, width), rngs)
        self.memory_norm = LayerNorm(image_width, EPSILON, rngs)
        self.memory = Linear(image_width, width, dtype, rngs)
        self.extra_token = token((width,), rngs)
        self.layers = stack(lambda r: DecoderLayer(width, part.heads, dtype, r), part.depth, rngs)
        self.norm = LayerNorm(width, EPSILON, rngs)
        self.words = None if part.tied else Tokens(part.vocabulary, width, dtype, rngs)
        self.compute = compute

    def __call__(
        self,
        tokens: Int32[Array, "b n"],
        valid: Bool[Array, "b n"],
        images: Float[Array, "b m c"],
        images_valid: Bool[Array, "b m"],
        key: jax.Array | None,
    ) -> Float[Array, "b n d"]:
        """As `features`."""
        n, length = tokens.shape[1], len(self.positions[...])
        if n > length:
            raise ValueError(f"texts of {n} tokens; model.decoder.length is {length}")
        memory, there = self._memory(images, images_valid)
        seen = visible(valid, causal=True)
        compute, layers = self.compute, depth(self.layers)
        inputs = (self.layers, compute.rates(layers), compute.keys(key, layers))
        body = compute.block(lambda x, layer, rate, key: layer(x, seen, memory, there, rate, key), layers)
        # An id under a mask may be anything, also none of the table's.
        x = self.tokens(jnp.where(valid, tokens, 0)) + self.positions[...][:n].astype(compute.dtype)
        return self.norm(compute.run(lambda x, inputs: body(x, *inputs), x, inputs))

    def scores(self, features: Float[Array, "*b d"]) -> Float[Array, "*b k"]:
        """As `logits`."""
        return (self.tokens if self.words is None else self.words).scores(features)

    def remember(self, images: Float[Array, "b m c"], images_valid: Bool[Array, "b m"], rows: int, n: int) -> Memory:
        """The memory of an image with `rows` texts of up to `n` tokens each, none written yet."""
        memory, there = self._memory(images, images_valid)
        heads = self.layers.cross.heads

        def of_layer(layer: DecoderLayer) -> tuple[Array, Array]:
            return heads_of(layer.cross.key, memory, heads), heads_of(layer.cross.value, memory, heads)

        image_key, image_value = jax.lax.map(of_layer, self.layers)
        layers, b, _, a, e = image_key.shape
        empty = jnp.zeros((layers, b, rows, n, a, e), image_key.dtype)
        return Memory(image_key, image_value, there, empty, empty)

    def step(
        self, memory: Memory, tokens: Int32[Array, "b r"], position: Int32[Array, ""]
    ) -> tuple[Float[Array, "b r d"], Memory]:
        """Features of one more token of each row, at `position`, and the memory with it."""
        x = self.tokens(tokens) + self.positions[...][position].astype(self.compute.dtype)
        before = jnp.arange(memory.key.shape[3]) <= position

        def body(x: Array, inputs: Any) -> tuple[Array, tuple[Array, Array]]:
            layer, image_key, image_value, keys, values = inputs
            return layer.step(x, image_key, image_value, memory.image_valid, keys, values, before, position)

        inputs = (self.layers, memory.image_key, memory.image_value, memory.key, memory.value)
        x, (keys, values) = jax.lax.scan(body, x, inputs)
        return self.norm(x), memory._replace(key=keys, value=values)

    def _memory(
        self, images: Float[Array, "b m c"], valid: Bool[Array, "b m"]
    ) -> tuple[Float[Array, "b k d"], Bool[Array, "b k"]]:
        """The image's tokens as the layers see them, the learned one first."""
        images = jnp.where(valid[..., None], images, 0)
        tokens = self.memory(self.memory_norm(images))
        first = jnp.broadcast_to(self.extra_token[...].astype(tokens.dtype), (len(tokens), 1, tokens.shape[-1]))
        there = jnp.concatenate([jnp.ones((len(valid), 1), bool), valid], axis=1)
        return jnp.concatenate([first, tokens], axis=1), there


class DecoderLayer(nnx.Module):
    """Looks at the words so far, then at the image, then a feed-forward; stochastic depth as in TransformerLayer."""

    def __init__(self, width: int, heads: int, dtype: Any, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(width, EPSILON, rngs)
        self.attention = Projections(width, heads, dtype, rngs)
        self.norm2 = LayerNorm(width, EPSILON, rngs)
        self.cross = Projections(width, heads, dtype, rngs)
        self.norm3 = LayerNorm(width, EPSILON, rngs)
        self.feed_forward = FeedForward(width, dtype, rngs)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        seen: Bool[Array, "b n n"],
        memory: Float[Array, "b m d"],
        there: Bool[Array, "b m"],
        rate: Any,
        key: jax.Array | None,
    ) -> Float[Array, "b n d"]:
        """All tokens at once: `seen` says which each may look at, `there` which of the image's are."""
        query, keys, value = self.attention.split(self.norm1(x))
        gathered = attend(query, keys, value, scale=query.shape[-1] ** -0.5, mask=seen[:, None])
        x = x + self.attention.join(gathered)
        x = x + look_at(self.cross, self.norm2(x), memory, there)
        return x + drop_path(self.feed_forward(self.norm3(x)), rate, key)

    def step(
        self,
        x: Float[Array, "b r d"],
        image_key: Float[Array, "b m a e"],
        image_value: Float[Array, "b m a e"],
        there: Bool[Array, "b m"],
        keys: Float[Array, "b r n a e"],
        values: Float[Array, "b r n a e"],
        before: Bool[Array, " n"],
        position: Int32[Array, ""],
    ) -> tuple[Float[Array, "b r d"], tuple[Array, Array]]:
        """One token of each row: its features, and keys and values with its own."""
        query, key, value = self.attention.split(self.norm1(x)[:, :, None])
        scale = query.shape[-1] ** -0.5
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(all_, new.astype(all_.dtype), position, axis=2)
            for all_, new in ((keys, key), (values, value))
        )
        x = x + self.attention.join(attend(query, keys, values, scale=scale, mask=before))[:, :, 0]
        # The rows of an image are its queries: its keys and values stand there once, whatever the number of rows.
        query = heads_of(self.cross.query, self.norm2(x), self.cross.heads)
        x = x + self.cross.join(attend(query, image_key, image_value, scale=scale, mask=there[:, None, None, :]))
        return x + self.feed_forward(self.norm3(x)), (keys, values)
