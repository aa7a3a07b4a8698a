"""Temporal fusion: all dates of all modalities at one place -> one token.

Attention runs over dates and modalities alone; places are folded into the batch. What is not there is masked as a key,
so that the result depends neither on padding nor on the order of the dates.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from skyjax.models.layers import TOKEN_STDDEV, Compute, Linear, TransformerLayer, run_transformer, stack, token

EPSILON = 1e-5
DAYS_A_YEAR = 366
DAYS_IN_400_YEARS = 146_097
CYCLES_A_YEAR = (1, 2, 3, 4)  # that the table of dates starts from; the fastest tells one season from the next


class Fusion(nnx.Module):
    """Date encoding, projection, an extra token, pre-norm layers; the extra token is the result."""

    def __init__(
        self,
        *,
        spatial_width: int,
        width: int,
        depth: int,
        heads: int,
        compute: Compute,
        rngs: nnx.Rngs,
        date_stddev: float = TOKEN_STDDEV,
        parts: int = 1,
    ):
        """`parts`: places go through the layers in so many turns, so that what lies between two layers stays small."""
        self.dates = nnx.Param(date_stddev * seasons(rngs.params(), spatial_width))
        self.projection = Linear(spatial_width, width, compute.dtype, rngs)
        self.extra_token = token((width,), rngs)
        self.layers = stack(lambda r: TransformerLayer(width, heads, EPSILON, compute.dtype, r), depth, rngs)
        self.compute = compute
        self.parts = parts

    def __call__(
        self,
        features: Float[Array, "b t h w s"],
        days: Int32[Array, "b t"],
        valid: Bool[Array, "b t h w"],
        key: jax.Array | None = None,
    ) -> Float[Array, "b h w d"]:
        """One token a place.

        Args:
          features: dates of all modalities, in any order, on one grid.
          days: since 1970-01-01.
          valid: the dates to look at, a place. A place without any gives a finite token that means nothing.
          key: turns stochastic depth on.
        """
        encoding = self.dates[...][day_of_year(days)].astype(features.dtype)
        x = self.projection(features + encoding[:, :, None, None, :])
        b, t, h, w, d = x.shape
        x = x.transpose(0, 2, 3, 1, 4).reshape(b * h * w, t, d)
        mask = valid.transpose(0, 2, 3, 1).reshape(b * h * w, t)
        # The extra token may always be looked at: no place is without a key.
        mask = jnp.concatenate([jnp.ones((b * h * w, 1), bool), mask], axis=1)
        first = jnp.broadcast_to(self.extra_token[...].astype(x.dtype), (b * h * w, 1, d))
        x = jnp.concatenate([first, x], axis=1)
        return self._run(x, mask, key)[:, 0].reshape(b, h, w, d)

    def _run(self, x: Float[Array, "n k d"], mask: Bool[Array, "n k"], key: jax.Array | None) -> Float[Array, "n 1 d"]:
        """The layers on all places, `parts` of them one after another; the first token of each is wanted."""
        parts = math.gcd(self.parts, len(x))
        if parts == 1:
            return run_transformer(self.compute, self.layers, x, mask, key, queries=1)

        def split(rows: Array) -> Array:
            # Every `parts`-th place goes into a part: so each device splits its own places.
            return jnp.moveaxis(rows.reshape(-1, parts, *rows.shape[1:]), 1, 0)

        def run(part: tuple[Array, Array, Array]) -> Array:
            x, mask, number = part
            own = None if key is None else jax.random.fold_in(key, number)
            return run_transformer(self.compute, self.layers, x, mask, own, queries=1)

        done = jax.lax.map(run, (split(x), split(mask), jnp.arange(parts)))
        return jnp.moveaxis(done, 0, 1).reshape(-1, 1, done.shape[-1])


def seasons(key: jax.Array, width: int) -> Float[Array, "366 width"]:
    """A first table of dates, each column a random curve of the year: normal amplitudes, in all of unit variance.

    Neighbouring days start alike and the year closes. As independent noise each of 366 rows would have to be learned
    from the few dates that fall on it.
    """
    phase = 2 * jnp.pi * jnp.arange(DAYS_A_YEAR)[:, None] / DAYS_A_YEAR * jnp.array(CYCLES_A_YEAR)
    waves = jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=1) / len(CYCLES_A_YEAR) ** 0.5
    return waves @ jax.random.normal(key, (waves.shape[1], width))


def day_of_year(days: Int32[Array, "*b"]) -> Int32[Array, "*b"]:
    """0 on 1 January to 364 or, in leap years, 365 on 31 December, of days since 1970-01-01 (Gregorian calendar)."""
    # The mean year is exact within a day or two, so the true year is this one, the one before or the one after.
    guess = 1970 + days * 400 // DAYS_IN_400_YEARS
    year = guess + (days >= _new_year(guess + 1)) - (days < _new_year(guess))
    return days - _new_year(year)


def _new_year(year: Int32[Array, "*b"]) -> Int32[Array, "*b"]:
    """Days from 1970-01-01 to 1 January of `year`."""
    before = year - 1
    return 365 * (year - 1970) + (before // 4 - before // 100 + before // 400) - 477  # 477 leap days up to 1969
