"""Swin Transformer V2: the encoder of high-resolution images.

Res-post-norm, scaled cosine attention, a continuous position bias over log-spaced offsets, no bias on keys, patch
merging with the norm after the projection, an extra norm every few blocks (Liu et al., 2022; SkySense's settings).
Blocks come in pairs: an unshifted and a shifted one. A stage is one scan over its pairs; one of odd depth ends on an
unshifted block.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from skyjax.models.layers import (
    Compute,
    FeedForward,
    LayerNorm,
    Linear,
    PatchEmbed,
    Projections,
    attend,
    depth,
    drop_path,
    stack,
    take_layers,
)
from skyjax.models.stem import make_stem

EPSILON = 1e-5
BIAS_HIDDEN = 512  # width of the position-bias MLP
MAX_LOGIT_SCALE = math.log(100.0)
# Added to a score across the seam of a shifted window. At logit scales near 100 such a place can still be the nearest,
# and released weights have learned with it.
SEAM = -100.0


class SwinV2(nnx.Module):
    """Images -> one feature a cell of patch_size * 2 ** (stages - 1) pixels."""

    def __init__(
        self,
        *,
        channels: int,
        patch_size: int,
        width: int,
        depths: Sequence[int],
        heads: Sequence[int],
        window: int,
        extra_norm_every: int,
        compute: Compute,
        rngs: nnx.Rngs,
        stem: str = "patch",
        mask_padding: bool = True,
    ):
        """`mask_padding`: what fills up a window is not attended to; False: it is, as zeros, as published."""
        if len(depths) != len(heads):
            raise ValueError(f"depths {tuple(depths)} and heads {tuple(heads)} name different numbers of stages")
        if any(length < 1 for length in depths):
            raise ValueError(f"depths {tuple(depths)}: a stage has one block or more")
        self.patch_embed = make_stem(stem, patch_size, channels, width, compute.dtype, rngs)
        self.patch_norm = LayerNorm(width, EPSILON, rngs)
        for i, length in enumerate(depths):
            sizes = width * 2**i, length, heads[i], window, extra_norm_every
            setattr(self, f"stage{i}", Stage(*sizes, compute, rngs, downsample=i > 0, mask_padding=mask_padding))
        self.norm = LayerNorm(width * 2 ** (len(depths) - 1), EPSILON, rngs)
        self.depths = tuple(depths)
        self.compute = compute

    def __call__(
        self, images: Float[Array, "n h w c"], bands: Bool[Array, "n c"] | None = None, key: jax.Array | None = None
    ) -> Float[Array, "n i j d"]:
        """Features of the last stage, normed.

        Args:
          images: normalised; what is missing holds 0. Any size: the bottom and right are padded.
          bands: the bands that are there; None: all.
          key: turns stochastic depth on.
        """
        return self.norm(self.stages(images, bands, key)[-1])

    def stages(
        self, images: Float[Array, "n h w c"], bands: Bool[Array, "n c"] | None = None, key: jax.Array | None = None
    ) -> list[Float[Array, "n i j d"]]:
        """What each stage gives, before any final norm; arguments as in `__call__`."""
        x = self.patch_norm(self.patch_embed(images, bands))
        total = sum(self.depths)
        rates, keys = self.compute.rates(total), self.compute.keys(key, total)
        outputs = []
        start = 0
        for i, length in enumerate(self.depths):
            own = slice(start, start + length)
            x = getattr(self, f"stage{i}")(x, rates[own], None if keys is None else keys[own])
            outputs.append(x)
            start += length
        return outputs


class Stage(nnx.Module):
    """Patch merging where `downsample`, then `length` blocks."""

    def __init__(
        self,
        width: int,
        length: int,
        heads: int,
        window: int,
        extra_norm_every: int,
        compute: Compute,
        rngs: nnx.Rngs,
        *,
        downsample: bool = False,
        mask_padding: bool = True,
    ):
        self.downsample = PatchMerging(width, compute.dtype, rngs) if downsample else None

        def block(rngs: nnx.Rngs) -> Block:
            return Block(width, heads, window, compute.dtype, rngs, mask_padding=mask_padding)

        counts = {"unshifted": length - length // 2, "shifted": length // 2}
        self.pairs = nnx.Dict({name: stack(block, count, rngs) for name, count in counts.items() if count})
        count = length // extra_norm_every if extra_norm_every else 0  # 0: no extra norms
        self.extra_norms = stack(lambda r: LayerNorm(width, EPSILON, r), count, rngs) if count else None
        self.extra_norm_every = extra_norm_every
        self.window = window
        self.compute = compute

    def __call__(
        self, x: Float[Array, "n h w d"], rates: np.ndarray, keys: jax.Array | None
    ) -> Float[Array, "n i j e"]:
        """`rates` and `keys`: one a block."""
        if self.downsample is not None:
            x = self.downsample(x)
        # A grid that is a single window has nothing to shift.
        shift = self.window // 2 if min(x.shape[1:3]) > self.window else 0
        length = len(rates)
        own = (rates, keys, *self._norms(length))
        count = length // 2
        normed = self.extra_norms is not None
        odd = normed and self.extra_norm_every % 2 == 1  # of an even period, each norm stands behind a shifted block
        first, second = self._block(0, count, odd), self._block(shift, count, normed)

        def pair(x: Array, inputs: Any) -> Array:
            unshifted, shifted, own = inputs
            return second(first(x, unshifted, take_layers(own, 0)), shifted, take_layers(own, 1))

        if count:
            inputs = jax.tree.map(lambda leaf: leaf[: 2 * count].reshape(count, 2, *leaf.shape[1:]), own)
            pairs = take_layers(self.pairs["unshifted"], slice(count)), self.pairs["shifted"], inputs
            x = self.compute.run(pair, x, pairs)
        if length % 2:
            x = self._block(0, 1, odd)(x, take_layers(self.pairs["unshifted"], -1), take_layers(own, -1))
        return x

    def _norms(self, length: int) -> tuple[Any, np.ndarray | None]:
        """An extra norm for each block, and whether it stands there, so that one scan runs all."""
        if self.extra_norms is None:
            return None, None
        blocks = np.arange(length)
        nearest = np.minimum(blocks // self.extra_norm_every, depth(self.extra_norms) - 1)
        return take_layers(self.extra_norms, nearest), (blocks + 1) % self.extra_norm_every == 0

    def _block(self, shift: int, length: int, normed: bool) -> Callable[[Array, Any, Any], Array]:
        """A block of a stack of `length` and, where `normed`, the extra norm behind it: of `x`, the block, its own."""

        def run(x: Array, block: Any, own: Any) -> Array:
            rate, key, norm, stands = own
            x = block(x, shift, rate, key)
            return jnp.where(stands, norm(x), x) if normed else x

        return self.compute.block(run, length)


class PatchMerging(nnx.Module):
    """Four neighbours -> one cell of twice the width: a 2 x 2 convolution of stride 2 without bias, then the norm."""

    def __init__(self, width: int, dtype: Any, rngs: nnx.Rngs):
        self.reduction = PatchEmbed(2, width // 2, width, dtype, rngs, use_bias=False)
        self.norm = LayerNorm(width, EPSILON, rngs)

    def __call__(self, x: Float[Array, "n h w d"]) -> Float[Array, "n i j e"]:
        """A map of half the rows and columns, rounded up."""
        return self.norm(self.reduction(x))


class Block(nnx.Module):
    """Window attention and a feed-forward, each normed after and with stochastic depth."""

    def __init__(self, width: int, heads: int, window: int, dtype: Any, rngs: nnx.Rngs, *, mask_padding: bool = True):
        self.attention = WindowAttention(width, heads, window, dtype, rngs, mask_padding=mask_padding)
        self.norm1 = LayerNorm(width, EPSILON, rngs)
        self.feed_forward = FeedForward(width, dtype, rngs)
        self.norm2 = LayerNorm(width, EPSILON, rngs)

    def __call__(
        self, x: Float[Array, "n h w d"], shift: int, rate: Any, key: jax.Array | None
    ) -> Float[Array, "n h w d"]:
        """One block whose windows are moved by `shift` places; `rate` and `key` are of stochastic depth."""
        first, second = (None, None) if key is None else jax.random.split(key)
        x = x + drop_path(self.norm1(self.attention(x, shift)), rate, first)
        return x + drop_path(self.norm2(self.feed_forward(x)), rate, second)


class WindowAttention(nnx.Module):
    """Scaled cosine attention inside windows."""

    def __init__(self, width: int, heads: int, window: int, dtype: Any, rngs: nnx.Rngs, *, mask_padding: bool = True):
        if window < 2:
            raise ValueError(f"window {window} is too small; it must be 2 or more")
        self.projections = Projections(width, heads, dtype, rngs, key_bias=False)
        self.logit_scale = nnx.Param(jnp.full((heads,), math.log(10.0)))
        self.bias_up = Linear(2, BIAS_HIDDEN, jnp.float32, rngs)
        self.bias_down = Linear(BIAS_HIDDEN, heads, jnp.float32, rngs, use_bias=False)
        self.window = window
        self.mask_padding = mask_padding

    def __call__(self, x: Float[Array, "n h w d"], shift: int) -> Float[Array, "n h w d"]:
        """What each place gathers in its window, on a grid of any size; windows are moved by `shift` places."""
        n, h, w, d = x.shape
        # A grid below the window is one smaller window: the same numbers as padding it and masking the padding.
        rows, columns = min(self.window, h), min(self.window, w)
        padded = (h + -h % rows, w + -w % columns)
        x = jnp.pad(x, ((0, 0), (0, padded[0] - h), (0, padded[1] - w), (0, 0)))
        x = jnp.roll(x, (-shift, -shift), (1, 2)) if shift else x
        down, across = padded[0] // rows, padded[1] // columns
        windows = x.reshape(n, down, rows, across, columns, d).swapaxes(2, 3)
        windows = windows.reshape(n, down * across, rows * columns, d)

        query, key, value = self.projections.split(windows)
        scale = jnp.exp(jnp.minimum(self.logit_scale[...], MAX_LOGIT_SCALE))[:, None, None]
        # Padded places count as ground where they are not masked.
        ground = (h, w) if self.mask_padding else padded
        seam, visible = _barriers(*ground, rows, columns, shift)
        bias = self._bias(rows, columns)
        bias = bias if seam is None else bias + jnp.asarray(seam)[:, None]
        mask = None if visible is None else jnp.asarray(visible)[:, None]
        gathered = attend(_unit(query), _unit(key), value, scale=scale, bias=bias, mask=mask)

        x = self.projections.join(gathered).reshape(n, down, across, rows, columns, d).swapaxes(2, 3)
        x = x.reshape(n, *padded, d)
        x = jnp.roll(x, (shift, shift), (1, 2)) if shift else x
        return x[:, :h, :w]

    def _bias(self, rows: int, columns: int) -> Float[Array, "a q q"]:
        """The position bias of each pair of places in a window of `rows` x `columns`."""
        table = self.bias_down(jax.nn.relu(self.bias_up(jnp.asarray(_log_offsets(self.window)))))
        return 16 * jax.nn.sigmoid(table[_offset_index(self.window, rows, columns)]).transpose(2, 0, 1)


def _unit(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Unit vectors; the zero vector stays, with a finite gradient."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    squares = jnp.sum(wide**2, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))).astype(x.dtype)


@functools.lru_cache
def _log_offsets(window: int) -> np.ndarray:
    """((2 window - 1)^2, 2) offsets between places: scaled to 8 at the window's edge, then the logarithm to base 8."""
    steps = np.arange(1 - window, window) / (window - 1) * 8
    logs = np.sign(steps) * np.log2(np.abs(steps) + 1) / 3
    return np.stack(np.meshgrid(logs, logs, indexing="ij"), -1).reshape(-1, 2).astype(np.float32)


@functools.lru_cache
def _offset_index(window: int, rows: int, columns: int) -> np.ndarray:
    """(q, k) row of `_log_offsets` for the offset from key to query in a window of `rows` x `columns`."""
    places = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(-1, 2)
    offset = places[:, None] - places[None] + window - 1
    return offset[..., 0] * (2 * window - 1) + offset[..., 1]


@functools.lru_cache
def _barriers(h: int, w: int, rows: int, columns: int, shift: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(windows, q, k): what is added to scores across the seam, and whether not one of two is padding; None: nothing.

    After the roll, the last windows hold pieces from opposite edges, and padding lies wherever it was rolled to.
    """
    piece_rows, piece_columns = _pieces(h, rows, shift), _pieces(w, columns, shift)
    pieces = np.where(
        (piece_rows[:, None] < 0) | (piece_columns[None] < 0), -1, 2 * piece_rows[:, None] + piece_columns[None]
    )
    down, across = pieces.shape[0] // rows, pieces.shape[1] // columns
    windows = pieces.reshape(down, rows, across, columns).swapaxes(1, 2).reshape(down * across, rows * columns)
    padding = windows < 0
    seam = np.where(windows[:, :, None] == windows[:, None, :], 0, SEAM).astype(np.float32) if shift else None
    return seam, padding[:, :, None] == padding[:, None, :] if padding.any() else None


def _pieces(size: int, window: int, shift: int) -> np.ndarray:
    """Which piece of the ground each place of one padded, rolled axis belongs to; -1 is padding."""
    padded = size + -size % window
    place = np.roll(np.arange(padded), -shift)
    wrapped = np.arange(padded) >= padded - shift
    return np.where(place >= size, -1, wrapped.astype(int))
