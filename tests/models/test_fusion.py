import datetime

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from quick import quick_jit

from skyjax.models.fusion import Fusion, day_of_year, seasons
from skyjax.models.layers import Compute

EPOCH = datetime.date(1970, 1, 1)


def test_day_of_year_agrees_with_the_calendar():
    start, end = datetime.date(1890, 1, 1), datetime.date(2101, 1, 1)  # 1900 and 2100 are no leap years, 2000 is
    dates = [start + datetime.timedelta(n) for n in range((end - start).days)]
    days = jnp.asarray([(date - EPOCH).days for date in dates], jnp.int32)
    got = jax.jit(day_of_year)(days)
    assert got.dtype == jnp.int32
    assert_array_equal(got, [date.timetuple().tm_yday - 1 for date in dates])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.dates(), min_size=64, max_size=64))
def test_day_of_year_in_any_year_of_the_calendar(dates):
    """Years 1 to 9999, as Python counts them."""
    days = np.array([(date - EPOCH).days for date in dates], np.int32)
    assert_array_equal(day_of_year(days), [date.timetuple().tm_yday - 1 for date in dates])


def test_the_table_of_dates_starts_as_smooth_years():
    table = np.asarray(seasons(jax.random.key(0), 2000), np.float64)
    assert table.shape == (366, 2000)
    assert_allclose(np.square(table).mean(1), 1, atol=0.15)  # of unit variance on every day
    alike = [np.mean(table * np.roll(table, days, axis=0)) / np.mean(np.square(table)) for days in (1, 30, 183)]
    # Closed form: of cycles 1 to 4 a year, the mean of their cosines at that distance.
    want = [np.mean(np.cos(2 * np.pi * np.arange(1, 5) * days / 366)) for days in (1, 30, 183)]
    assert_allclose(alike, want, atol=0.05)
    power = np.square(np.abs(np.fft.rfft(table, axis=0))).sum(1)
    assert power[1:5].sum() > 0.999999 * power.sum()
    made = [
        Fusion(spatial_width=6, width=8, depth=1, heads=2, compute=Compute(), rngs=nnx.Rngs(0), **more)
        for more in ({}, {"date_stddev": 1.0})
    ]
    assert_allclose(made[1].dates[...], made[0].dates[...] * 50, rtol=1e-5)
    assert_array_equal(made[1].projection.kernel[...], made[0].projection.kernel[...])


@pytest.fixture(scope="module")
def fusion():
    model = Fusion(spatial_width=6, width=8, depth=2, heads=2, compute=Compute(), rngs=nnx.Rngs(0))
    model.dates[...] = model.dates[...] * 50  # so that a wrong date shows
    graph, state = nnx.split(model)
    run = jax.jit(lambda *inputs: nnx.merge(graph, state)(*inputs))
    return model, run


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, 5, 3, 2, 6)).astype(np.float32)
    days = rng.integers(10_000, 20_000, (2, 5)).astype(np.int32)
    valid = rng.random((2, 5, 3, 2)) < 0.6
    valid[0, :, 0, 0] = False
    valid[1, 2] = True
    return features, days, valid


def test_scan_and_remat_change_nothing(inputs):
    """Values and gradients, of a model whose last layer computes its first token alone."""

    def run(**compute):
        compute = Compute(drop_path=0.2, **compute)
        graph, state = nnx.split(Fusion(spatial_width=6, width=8, depth=3, heads=2, compute=compute, rngs=nnx.Rngs(0)))
        weights = jnp.cos(jnp.arange(2 * 3 * 2 * 8.0)).reshape(2, 3, 2, 8)

        def loss(state):
            fused = nnx.merge(graph, state)(*inputs, key=jax.random.key(3))
            return jnp.sum(fused * weights), fused

        (_, fused), gradient = quick_jit(jax.value_and_grad(loss, has_aux=True))(state)
        return fused, nnx.to_pure_dict(gradient)

    want = run(scan=False)
    for other in ({}, {"remat": "full"}):
        jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-5), run(**other), want)


def test_places_in_turns_change_nothing(inputs):
    """Values and gradients; of 12 places, 5 turns become one, as no other divides them."""

    def run(parts):
        model = Fusion(
            spatial_width=6, width=8, depth=2, heads=2, compute=Compute(remat="dots"), rngs=nnx.Rngs(0), parts=parts
        )
        graph, state = nnx.split(model)
        weights = jnp.cos(jnp.arange(2 * 3 * 2 * 8.0)).reshape(2, 3, 2, 8)

        def loss(state):
            fused = nnx.merge(graph, state)(*inputs)
            return jnp.sum(fused * weights), fused

        (_, fused), gradient = quick_jit(jax.value_and_grad(loss, has_aux=True))(state)
        return fused, nnx.to_pure_dict(gradient)

    want = run(1)
    for parts in (4, 5):
        jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-5), run(parts), want)


def test_padding_changes_nothing(fusion, inputs):
    features, days, valid = inputs
    pad = np.random.default_rng(1).normal(size=(2, 3, 3, 2, 6)).astype(np.float32) * 1e3
    got = fusion[1](
        np.concatenate([pad, features], 1),
        np.concatenate([np.full((2, 3), 7, np.int32), days], 1),
        np.concatenate([np.zeros((2, 3, 3, 2), bool), valid], 1),
    )
    assert_allclose(got, fusion[1](*inputs), atol=1e-5)


def test_what_is_masked_is_not_looked_at(fusion, inputs):
    features, days, valid = inputs
    other = np.where(valid[..., None], features, 99)
    assert_allclose(fusion[1](other, days, valid), fusion[1](*inputs), atol=1e-5)
    assert np.abs(fusion[1](features, days, np.ones_like(valid)) - fusion[1](*inputs)).max() > 1e-3


def test_order_of_dates_does_not_matter_but_dates_do(fusion, inputs):
    order = [3, 0, 4, 1, 2]
    want = fusion[1](*inputs)
    features, days, valid = inputs
    assert_allclose(fusion[1](features[:, order], days[:, order], valid[:, order]), want, atol=1e-5)
    assert np.abs(fusion[1](features, days[:, order], valid) - want).max() > 1e-3


def test_dates_are_added_before_the_projection(fusion, inputs):
    model, run = fusion
    features, days, valid = inputs
    table = np.asarray(model.dates[...])
    year_days = [[(EPOCH + datetime.timedelta(int(day))).timetuple().tm_yday - 1 for day in row] for row in days]
    shifted = features + table[np.asarray(year_days)][:, :, None, None]
    dateless = nnx.clone(model)
    dateless.dates[...] = jnp.zeros((366, 6))
    assert_allclose(dateless(shifted, jnp.asarray(days), jnp.asarray(valid)), run(*inputs), atol=1e-5)


def test_places_do_not_see_each_other(fusion, inputs):
    features, days, valid = inputs
    other = features.copy()
    other[:, :, 1] += 1
    changed = np.abs(fusion[1](other, days, valid) - fusion[1](*inputs)).max(-1) > 1e-6
    assert not changed[:, [0, 2]].any()
    assert changed[1, 1].all()


def test_a_place_without_any_date_is_finite(fusion, inputs):
    features, days, valid = inputs
    got = fusion[1](features, days, np.zeros_like(valid))
    assert np.isfinite(got).all()
    assert_allclose(got, np.broadcast_to(got[0, 0, 0], got.shape), atol=1e-6)
