"""What Swin-V2, ViT and fusion share: projections, norms, attention, the pre-norm layer and the scanned stack.

Parameters are float32; the compute runs in `Compute.dtype`, norms and softmax in float32. Leaves are named kernel,
bias and scale, because the optimizer's multipliers go by the end of a parameter's path.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

MLP_RATIO = 4
TOKEN_STDDEV = 0.02  # of tokens and tables that are added to features

# What is kept of a block for the backward pass. The products of attention have batch axes: they are not kept by "dots".
_KEPT = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
REMAT = (*_KEPT, "none")

Carry = TypeVar("Carry")
Place: TypeAlias = Callable[[Array], Array]


def as_they_lie(x: Array) -> Array:
    """Rows of activations, left where the compiler has them."""
    return x


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a part computes; the same for all parts of a model.

    Attributes:
      dtype: of activations; parameters stay float32.
      scan: run equal blocks by `lax.scan`; otherwise the loop is unrolled.
      remat: "full" recomputes each block in the backward pass, "dots" keeps what its projections give and recomputes
        the rest, "none" keeps all activations.
      drop_path: stochastic depth of the last block; the first has none.
      place: what the rows go through before and behind each block. Whoever knows of devices says there where they
        live; left to itself, a compiler may spread the width of activations as the weights are spread, and gather rows.
    """

    dtype: Any = jnp.float32
    scan: bool = True
    remat: str = "none"
    drop_path: float = 0.0
    place: Place = as_they_lie

    def __post_init__(self) -> None:
        if self.remat not in REMAT:
            raise ValueError(f'model.remat is "{self.remat}"; it is one of {", ".join(REMAT)}')

    def rates(self, length: int) -> np.ndarray:
        """Stochastic depth of each block, linear from 0."""
        return np.linspace(0.0, self.drop_path, length, dtype=np.float32)

    def keys(self, key: jax.Array | None, length: int) -> jax.Array | None:
        """A key a block; None, and with it no stochastic depth, outside training."""
        return None if key is None or self.drop_path == 0.0 else jax.random.split(key, length)

    def scans(self, length: int) -> bool:
        """Whether a stack of this length becomes a loop; a loop of one costs compile time and brings nothing."""
        return self.scan and length > 1

    def block(self, body: Callable[..., Any], length: int) -> Callable[..., Any]:
        """`body` with the remat policy, to be called for each of a stack of `length`; its first argument are rows."""

        def placed(x: Array, *own: Any) -> Array:
            return self.place(body(self.place(x), *own))

        # Inside a scan forward and backward are two loops, so nothing can merge the recomputed values with the first.
        if self.remat == "none":
            return placed
        return jax.checkpoint(placed, prevent_cse=not self.scans(length), policy=_KEPT[self.remat])

    def run(self, body: Callable[[Carry, Any], Carry], x: Carry, layers: Any) -> Carry:
        """Applies `body(x, layer)` along the leading axis of the arrays in `layers`."""
        length = depth(layers)
        if self.scans(length):
            return jax.lax.scan(lambda carry, layer: (body(carry, layer), None), x, layers)[0]
        for i in range(length):
            x = body(x, take_layers(layers, i))
        return x


def depth(layers: Any) -> int:
    """How many layers a stack has."""
    return jax.tree.leaves(layers)[0].shape[0]


def take_layers(layers: Any, index: int | slice | np.ndarray) -> Any:
    """One layer, or some layers, of a stack."""
    return jax.tree.map(lambda leaf: leaf[index], layers)


def stack(make: Callable[[nnx.Rngs], nnx.Module], length: int, rngs: nnx.Rngs) -> Any:
    """`length` modules of one kind as one module whose arrays have a leading axis."""
    one = nnx.vmap(lambda key: make(nnx.Rngs(key)), transform_metadata={nnx.PARTITION_NAME: None})
    return one(jax.random.split(rngs.params(), length))


class Linear(nnx.LinearGeneral):
    """A projection of the last axis to `outputs`, which may be several axes; `learn_bias`: it has a gradient."""

    def __init__(
        self,
        inputs: int,
        outputs: int | Sequence[int],
        dtype: Any,
        rngs: nnx.Rngs,
        *,
        use_bias: bool = True,
        learn_bias: bool = True,
    ):
        # 1 / sqrt(width) is the usual 0.02 at 2,500 features; at 64 that would leave each block almost an identity.
        init = nnx.initializers.lecun_normal()
        super().__init__(inputs, outputs, use_bias=use_bias, dtype=dtype, kernel_init=init, rngs=rngs)
        self.learn_bias = learn_bias

    def __call__(self, x: Float[Array, "*b d"], out_sharding: Any = None) -> Array:
        """`x` projected."""
        # XLA on a CPU takes twice the time for the gradient of kernel and bias where there are several leading axes.
        rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        kernel = self.kernel[...].astype(self.dtype)
        flat = kernel.reshape(len(kernel), -1)
        y = jax.lax.dot_general(rows, flat, (((1,), (0,)), ((), ())), out_sharding=out_sharding)
        if self.bias is not None:
            bias = self.bias[...] if self.learn_bias else jax.lax.stop_gradient(self.bias[...])
            y = _add_bias(y, bias.astype(self.dtype).ravel())
        return y.reshape(*x.shape[:-1], *kernel.shape[1:])


@jax.custom_vjp
def _add_bias(rows: Float[Array, "n d"], bias: Float[Array, " d"]) -> Float[Array, "n d"]:
    """The bias on every row. Its gradient is a product, summed in float32."""
    return rows + bias


def _add_bias_backward(_: None, gradient: Float[Array, "n d"]) -> tuple[Array, Array]:
    # As a sum, XLA on a CPU fuses it with what gave the gradient and computes that (behind `up`, the derivative of the
    # GELU) a second time for it, one number after the other: a sixth of the backward pass of Swin-V2 at base width.
    wide = jnp.promote_types(gradient.dtype, jnp.float32)
    ones = jnp.ones(len(gradient), gradient.dtype)
    total = jnp.matmul(ones, gradient, precision="highest", preferred_element_type=wide)
    return gradient, total.astype(gradient.dtype)


_add_bias.defvjp(lambda rows, bias: (rows + bias, None), _add_bias_backward)


def token(shape: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Param:
    """A learned token or table."""
    return nnx.Param(TOKEN_STDDEV * jax.random.truncated_normal(rngs.params(), -2, 2, shape))


class LayerNorm(nnx.LayerNorm):
    """Layer norm over the last axis, computed in float32 (the type of its parameters) and returned in the input's."""

    def __init__(self, width: int, epsilon: float, rngs: nnx.Rngs):
        super().__init__(width, epsilon=epsilon, use_fast_variance=False, rngs=rngs)

    def __call__(self, x: Float[Array, "*b d"], *, mask: Array | None = None) -> Float[Array, "*b d"]:
        """`x` with mean 0 and variance 1 a row, then scaled and shifted."""
        # Flat for the same reason as in Linear.
        return super().__call__(x.reshape(-1, x.shape[-1]), mask=mask).astype(x.dtype).reshape(x.shape)


def unit_bias(width: int, rngs: nnx.Rngs) -> nnx.Param:
    """A bias as large as what it is added to.

    The norm that follows takes the length off each token, and with it how bright a patch is and how much contrast it
    has, the best that a small model has to go by; beside a bias they turn the token's direction and stay.
    """
    return nnx.Param(jax.random.normal(rngs.params(), (width,)))


def scale_up_missing(tokens: Float[Array, "n i j d"], bands: Bool[Array, "n c"]) -> Float[Array, "n i j d"]:
    """What the present bands add to an embedding, scaled by their share: its size tells not how many there are."""
    share = jnp.maximum(bands.mean(-1), 1 / bands.shape[-1])
    return tokens * (1 / share).astype(tokens.dtype)[:, None, None, None]


class PatchEmbed(nnx.Module):
    """A convolution whose stride is its size; images are padded with zeros at the bottom and right to whole patches."""

    def __init__(
        self, patch_size: int, channels: int, width: int, dtype: Any, rngs: nnx.Rngs, *, use_bias: bool = True
    ):
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (patch_size, patch_size, channels, width), jnp.float32))
        self.bias = unit_bias(width, rngs) if use_bias else None
        self.dtype = dtype

    def __call__(self, x: Float[Array, "n h w c"], bands: Bool[Array, "n c"] | None = None) -> Float[Array, "n i j d"]:
        """One token a patch.

        Args:
          x: images; a masked band must hold zeros.
          bands: the bands that are there. A missing one adds nothing; see `scale_up_missing`.
        """
        kernel = self.kernel[...].astype(self.dtype)
        patch = kernel.shape[0]
        n, h, w, c = x.shape
        x = jnp.pad(x.astype(self.dtype), ((0, 0), (0, -h % patch), (0, -w % patch), (0, 0)))
        rows, columns = x.shape[1] // patch, x.shape[2] // patch
        patches = x.reshape(n, rows, patch, columns, patch, c).swapaxes(2, 3).reshape(n * rows * columns, -1)
        tokens = (patches @ kernel.reshape(patches.shape[1], -1)).reshape(n, rows, columns, -1)
        if bands is not None:
            tokens = scale_up_missing(tokens, bands)
        return tokens if self.bias is None else tokens + self.bias[...].astype(self.dtype)


def attend(
    query: Float[Array, "*b q a d"],
    key: Float[Array, "*b k a d"],
    value: Float[Array, "*b k a d"],
    *,
    scale: float | Float[Array, "a 1 1"],
    bias: Float[Array, "... a q k"] | None = None,
    mask: Bool[Array, "..."] | None = None,
) -> Float[Array, "*b q a d"]:
    """Attention of `a` heads; scores and softmax are float32.

    Args:
      query, key, value: tokens before heads before width.
      scale: factor of the scores.
      bias: added to the scores; broadcasts to (*b, a, q, k).
      mask: True where a query may see a key; broadcasts to (*b, a, q, k). Each query must see one key at least.
    """
    wide = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("...qad,...kad->...aqk", query, key, preferred_element_type=wide) * scale
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(wide).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("...aqk,...kad->...qad", weights, value)


class Projections(nnx.Module):
    """Query, key and value of each head, and the projection of what attention gathers."""

    def __init__(self, width: int, heads: int, dtype: Any, rngs: nnx.Rngs, *, key_bias: bool = True):
        if width % heads:
            raise ValueError(f"a width of {width} cannot be shared by {heads} heads; width must be a multiple of heads")
        self.query = Linear(width, width, dtype, rngs)
        # It moves all scores of a query alike, which the softmax takes off again: its gradient is 0. Computed, it would
        # be rounding, another on each mesh, of which AdamW makes whole steps.
        self.key = Linear(width, width, dtype, rngs, use_bias=key_bias, learn_bias=False)
        self.value = Linear(width, width, dtype, rngs)
        self.out = Linear(width, width, dtype, rngs)
        self.heads = heads

    def split(self, x: Float[Array, "*b n d"], queries: int | None = None) -> tuple[Array, Array, Array]:
        """Query, key and value as (*b, n, heads, d / heads); queries of the first tokens only, if said so."""
        query, key, value = self.query(x[..., :queries, :]), self.key(x), self.value(x)
        query, key, value = (y.reshape(*y.shape[:-1], self.heads, -1) for y in (query, key, value))
        return query, key, value

    def join(self, gathered: Float[Array, "*b n a d"]) -> Float[Array, "*b n e"]:
        """The heads side by side, projected."""
        return self.out(gathered.reshape(*gathered.shape[:-2], -1))


class FeedForward(nnx.Module):
    """Two projections around an exact GELU."""

    def __init__(self, width: int, dtype: Any, rngs: nnx.Rngs):
        self.up = Linear(width, MLP_RATIO * width, dtype, rngs)
        self.down = Linear(MLP_RATIO * width, width, dtype, rngs)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Each row by itself."""
        return self.down(gelu(self.up(x)))


@jax.custom_vjp
def gelu(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """x times the normal distribution's share below x, computed in float32 or wider (Hendrycks and Gimpel 2016).

    Its derivative is computed from x. Left to automatic differentiation, steps on the way are kept in float32 as well,
    each as large as the widest activation of a layer: a tenth of what a step of SkySense's size moves through memory.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * _normal_share(wide)).astype(x.dtype)


def _gelu_backward(x: Array, gradient: Array) -> tuple[Array]:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    density = jnp.exp(-jnp.square(wide) / 2) / math.sqrt(2 * math.pi)
    return ((gradient * (_normal_share(wide) + wide * density)).astype(x.dtype),)


def _normal_share(x: Array) -> Array:
    return jax.lax.erfc(-x * math.sqrt(0.5)) / 2


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


class TransformerLayer(nnx.Module):
    """A pre-norm layer. Stochastic depth acts on the feed-forward branch alone, as in the published modules."""

    def __init__(self, width: int, heads: int, epsilon: float, dtype: Any, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(width, epsilon, rngs)
        self.attention = Projections(width, heads, dtype, rngs)
        self.norm2 = LayerNorm(width, epsilon, rngs)
        self.feed_forward = FeedForward(width, dtype, rngs)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        mask: Bool[Array, "b n"] | Bool[Array, "b q n"] | None,
        rate: Any,
        key: jax.Array | None,
        queries: int | None = None,
    ) -> Float[Array, "b q d"]:
        """The tokens after this layer.

        Args:
          x: tokens.
          mask: the tokens that may be looked at, by all or by each; None: all.
          rate, key: of stochastic depth.
          queries: how many tokens, from the first, are wanted; None: all.
        """
        query, keys, value = self.attention.split(self.norm1(x), queries)
        visible = None if mask is None else mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]
        gathered = attend(query, keys, value, scale=query.shape[-1] ** -0.5, mask=visible)
        x = x[:, :queries] + self.attention.join(gathered)
        return x + drop_path(self.feed_forward(self.norm2(x)), rate, key)


def run_transformer(
    compute: Compute,
    layers: Any,
    x: Float[Array, "b n d"],
    mask: Bool[Array, "b n"] | Bool[Array, "b q n"] | None,
    key: jax.Array | None,
    queries: int | None = None,
) -> Float[Array, "b q d"]:
    """A stack of `TransformerLayer` over `x`; arguments as there. `queries` spares the last layer what nobody reads."""
    length = depth(layers)
    rates = compute.rates(length)
    inputs = (layers, rates, compute.keys(key, length))
    whole = length if queries is None else length - 1
    body = compute.block(lambda x, layer, rate, key: layer(x, mask, rate, key), whole)
    x = compute.run(lambda x, inputs: body(x, *inputs), x, take_layers(inputs, slice(whole)))
    if queries is None:
        return x
    last = compute.block(lambda x, layer, rate, key: layer(x, mask, rate, key, queries), 1)
    return last(x, *take_layers(inputs, -1))


def drop_path(branch: Float[Array, "b *n d"], rate: Any, key: jax.Array | None) -> Float[Array, "b *n d"]:
    """Drops the whole branch of a row with probability `rate` and scales the others up; no key: returns it as it is."""
    if key is None:
        return branch
    keep = jax.random.bernoulli(key, 1 - rate, (branch.shape[0],) + (1,) * (branch.ndim - 1))
    return branch * (keep / (1 - rate)).astype(branch.dtype)
