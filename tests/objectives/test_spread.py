import jax
import jax.numpy as jnp
import numpy as np
import objectives_reference as reference
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from skyjax.objectives import spread

VALID = np.array([1, 1, 0, 1, 1, 0], bool)


@pytest.fixture(scope="module")
def features():
    return np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


def test_koleo_equals_a_float64_loop_over_the_valid_rows(features):
    total, count = spread.koleo(jnp.asarray(features), VALID)
    assert_allclose(total, reference.koleo(np.float64(features[VALID]), 0.01), rtol=1e-5)
    assert count == 4


def test_koleo_moves_points_apart_and_masked_rows_not_at_all(features):
    def loss(x):
        return spread.koleo(x, VALID)[0]

    spoilt = np.where(VALID[:, None], features, np.nan)
    value, gradient = jax.value_and_grad(loss)(spoilt)
    assert_array_equal(gradient[~VALID], 0)
    assert loss(np.where(VALID[:, None], features - 0.01 * gradient, 0)) < value


@pytest.mark.parametrize("valid", [np.zeros(6, bool), np.arange(6) == 2, np.ones(6, bool)])
def test_koleo_of_duplicates_one_row_or_none_is_finite(valid):
    value, gradient = jax.value_and_grad(lambda x: spread.koleo(x, valid)[0])(jnp.ones((6, 4)))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert spread.koleo(jnp.ones((6, 4)), valid)[1] == (6 if valid.all() else 0)


@pytest.mark.parametrize("shape", [(6, 4), (6, 9)])
def test_effective_rank_equals_the_singular_values_of_the_valid_rows(shape):
    features = np.random.default_rng(1).normal(size=shape)
    points = reference.unit(features[VALID])
    eigenvalues = np.linalg.svd(points - points.mean(0), compute_uv=False) ** 2
    got = jax.jit(spread.effective_rank)(jnp.asarray(features, jnp.float32), VALID)
    assert_allclose(got, eigenvalues.sum() ** 2 / (eigenvalues**2).sum(), rtol=1e-5)


def test_effective_rank_of_a_line_a_point_and_nothing_is_one():
    line = np.stack([np.cos(np.linspace(0, 1e-2, 8)), np.sin(np.linspace(0, 1e-2, 8)), np.zeros(8)], 1)
    point = np.ones((8, 3)) + 1e-7 * np.random.default_rng(0).normal(size=(8, 3))
    everything = np.ones(8, bool)
    assert_allclose(spread.effective_rank(jnp.asarray(line, jnp.float32), everything), 1, atol=1e-2)
    assert spread.effective_rank(jnp.asarray(point, jnp.float32), everything) == 1
    assert spread.effective_rank(jnp.asarray(point, jnp.float32), ~everything) == 1


def test_spread_equals_numpy(features):
    want = reference.unit(np.float64(features[VALID])).std(0).mean()
    assert_allclose(spread.spread(jnp.asarray(features), VALID), want, rtol=1e-5)
    assert spread.spread(jnp.asarray(features), np.zeros(6, bool)) == 0
