import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from skyjax.models.assignment import assign, column_offsets, sinkhorn


def balance_by_loop(scores, valid, epsilon, iterations):
    """Plain float64 Sinkhorn-Knopp on the exponentials."""
    matrix = np.exp((scores - scores.max()) / epsilon) * valid[:, None]
    for _ in range(iterations):
        for row in np.flatnonzero(valid):
            matrix[row] = matrix[row] / matrix[row].sum()
        matrix = matrix / matrix.sum(0) * valid.sum() / matrix.shape[1]
    for row in np.flatnonzero(valid):
        matrix[row] = matrix[row] / matrix[row].sum()
    return matrix


balance = jax.jit(sinkhorn, static_argnames=("epsilon", "iterations"))


@pytest.mark.parametrize("iterations", [0, 1, 3, 50])
def test_agrees_with_the_loop(iterations):
    rng = np.random.default_rng(0)
    scores, valid = rng.uniform(-1, 1, (9, 5)), np.arange(9) % 4 != 1
    got = balance(jnp.asarray(scores, jnp.float32), jnp.asarray(valid), epsilon=0.05, iterations=iterations)
    assert got.dtype == jnp.float32
    assert_allclose(got, balance_by_loop(scores, valid, 0.05, iterations), atol=2e-5)
    assert_array_equal(got[~valid], 0)


def test_columns_are_balanced_in_the_end():
    scores = np.random.default_rng(0).normal(size=(40, 6))
    scores[:, 0] += 3  # left alone, every row would choose this one
    valid = np.arange(40) < 30
    got = balance(jnp.asarray(scores), jnp.asarray(valid), epsilon=0.5, iterations=50)
    assert_allclose(got.sum(0), 5, rtol=1e-3)


def test_masked_rows_do_not_matter_even_when_they_are_nan():
    rng = np.random.default_rng(0)
    scores, valid = rng.normal(size=(8, 4)).astype(np.float32), np.arange(8) < 5
    broken = np.where(valid[:, None], scores, np.nan).astype(np.float32)
    want = balance(jnp.asarray(scores[:5]), jnp.ones(5, bool), epsilon=0.1, iterations=3)
    got = balance(jnp.asarray(broken), jnp.asarray(valid), epsilon=0.1, iterations=3)
    assert_allclose(got[:5], want, atol=1e-6)
    assert_array_equal(got[5:], 0)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    magnitude=st.sampled_from([0.0, 1.0, 100.0, 1e4]),
    count=st.integers(0, 6),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_rows_sum_to_one_whatever_the_scores(seed, magnitude, count, dtype):
    scores = jnp.asarray(np.random.default_rng(seed).normal(size=(6, 4)) * magnitude, dtype)
    valid = jnp.arange(6) < count
    got = np.asarray(balance(scores, valid, epsilon=0.05, iterations=3))
    assert np.isfinite(got).all()
    assert (got >= 0).all()
    assert_allclose(got.sum(1), np.asarray(valid, float), atol=1e-5)


def test_blocks_of_rows_give_the_balance_of_all_rows():
    rng = np.random.default_rng(0)
    rows, columns, valid = rng.normal(size=(3, 2, 4, 5)), rng.normal(size=(6, 5)), rng.random((3, 2, 4)) < 0.7
    rows, columns = jnp.asarray(rows, jnp.float32), jnp.asarray(columns, jnp.float32)

    def score(block):
        return block @ columns.T

    offsets = column_offsets(rows, jnp.asarray(valid), score, epsilon=0.5, iterations=3)
    got = np.asarray(assign(score(rows), offsets, epsilon=0.5))[valid]
    want = balance_by_loop(np.float64(score(rows)).reshape(-1, 6), valid.ravel(), 0.5, 3)
    assert_allclose(got, want[valid.ravel()], atol=1e-5)


def test_columns_that_are_far_from_every_row_are_filled_all_the_same():
    scores = np.random.default_rng(0).normal(size=(12, 3)) - np.array([0, 0, 30.0])
    got = balance(jnp.asarray(scores, jnp.float32), jnp.ones(12, bool), epsilon=1.0, iterations=100)
    assert_allclose(got.sum(0), 4, rtol=1e-3)
