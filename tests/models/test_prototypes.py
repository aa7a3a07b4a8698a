import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from quick import quick_jit
from test_assignment import balance_by_loop

from skyjax.models import prototypes
from skyjax.models.prototypes import Prototypes, region_of

REGIONS, COUNT, WIDTH, FUSED = 4, 3, 8, 6
EPSILON, ITERATIONS, MOMENTUM = 0.05, 3, 0.9

regions_of = jax.jit(region_of, static_argnums=1)


def region_by_hand(longitude, latitude, regions):
    """Float64: walks over the cells' edges instead of computing an index."""
    if not np.isfinite([longitude, latitude]).all() or abs(latitude) > 90:
        return -1
    edges = np.linspace(-1, 1, regions + 1)
    row = sum(np.sin(np.radians(latitude)) >= edge for edge in edges[1:-1])
    while longitude < -180:
        longitude += 360
    while longitude >= 180:
        longitude -= 360
    column = sum(longitude >= -180 + 360 * i / regions for i in range(1, regions))
    return row * regions + column


@pytest.mark.parametrize(
    ("longitude", "latitude", "region"),
    [
        (-180.0, -90.0, 0),
        (180.0, -90.0, 0),  # the date line from the other side
        (179.99, -90.0, 3),
        (540.0, -90.0, 0),
        (190.0, 90.0, 12),
        (-190.0, 90.0, 15),
        (0.0, 0.0, 10),
        (-0.01, -0.01, 5),
        (0.0, 29.99, 10),  # the sine of 30 degrees is a half
        (0.0, 30.01, 14),
        (np.float32(-180) * np.float32(1 + 2**-23), 0.0, 11),
        (np.nan, 10.0, -1),
        (10.0, np.nan, -1),
        (np.nan, np.nan, -1),
        (np.inf, 10.0, -1),
        (10.0, 90.5, -1),
        (10.0, -np.inf, -1),
    ],
)
def test_edges_of_regions(longitude, latitude, region):
    got = regions_of(jnp.asarray([[longitude, latitude]], jnp.float32), 4)
    assert got.dtype == jnp.int32
    assert got.tolist() == [region]
    assert region_by_hand(longitude, latitude, 4) == region


@settings(max_examples=200, deadline=None)
@given(
    st.floats(-720, 720, width=32) | st.just(np.nan), st.floats(-90, 90, width=32) | st.just(np.nan), st.integers(1, 64)
)
def test_any_position_has_its_region(longitude, latitude, regions):
    got = int(region_of(jnp.asarray([[longitude, latitude]], jnp.float32), regions)[0])
    hair = 1e-3  # degrees; float32 has to say on which side of an edge a position lies no better than that
    near = {
        region_by_hand(longitude + x, np.clip(latitude + y, -90, 90), regions)
        for x, y in itertools.product((-hair, 0, hair), repeat=2)
    }
    # Near the poles the sine hardly moves: there a hair of the sine counts, not of the latitude.
    if np.isfinite(latitude):
        sines = np.clip(np.sin(np.radians(latitude)) + np.array([-1e-6, 1e-6]), -1, 1)
        near |= {region_by_hand(longitude, np.degrees(np.arcsin(s)), regions) for s in sines}
    assert got in near


@pytest.mark.parametrize("regions", [4, 7])
def test_regions_have_equal_area(regions):
    """A spiral that visits the whole sphere evenly is as long in every cell."""
    n = 200_000
    height = 1 - (2 * np.arange(n) + 1) / n
    longitude = np.arange(n) * 180 * (3 - np.sqrt(5)) % 360 - 180
    lonlat = np.stack([longitude, np.degrees(np.arcsin(height))], -1).astype(np.float32)
    counts = np.bincount(np.asarray(regions_of(lonlat, regions)), minlength=regions**2)
    assert_allclose(counts, n / regions**2, rtol=5e-3)


@pytest.fixture(scope="module")
def module():
    rngs = nnx.Rngs(0)
    module = Prototypes(fused_width=FUSED, width=WIDTH, dtype=jnp.float32, rngs=rngs)
    for linear in (module.query, module.out):
        linear.bias[...] = jax.random.normal(rngs.params(), linear.bias.shape)
    return module


@pytest.fixture(scope="module")
def inputs():
    """Eight samples in three regions, one alone, one without a position and one without a valid place."""
    rng = np.random.default_rng(0)
    lonlat = np.array([[10, 5], [11, 6], [12, 7], [-100, -50], [-101, -51], [100, 40], [np.nan, 40], [13, 8]])
    fused = rng.normal(size=(8, 3, 4, FUSED))
    valid = rng.random((8, 3, 4)) < 0.7
    valid[7] = False
    table = rng.normal(size=(REGIONS**2, COUNT, WIDTH))
    return tuple(np.asarray(x, np.float32) if x.dtype != bool else x for x in (lonlat, fused, valid, table))


def linear_by_hand(linear, x):
    return np.float64(x) @ np.float64(linear.kernel[...]) + np.float64(linear.bias[...])


def query_by_hand(module, fused):
    query = linear_by_hand(module.query, fused)
    return (query - query.mean()) / np.sqrt(query.var() + 1e-5)


def context_by_hand(module, lonlat, fused, table):
    context = np.zeros(fused.shape)
    for i, row, column in np.ndindex(fused.shape[:3]):
        query = query_by_hand(module, fused[i, row, column])
        region = region_by_hand(*lonlat[i], REGIONS)
        found = np.zeros(WIDTH)
        if region >= 0:
            weights = np.exp([query @ prototype / np.sqrt(WIDTH) for prototype in np.float64(table[region])])
            found = sum(w * np.float64(prototype) for w, prototype in zip(weights, table[region], strict=True))
            found /= weights.sum()
        context[i, row, column] = linear_by_hand(module.out, np.concatenate([fused[i, row, column], found]))
    return context


def update_by_hand(module, lonlat, fused, valid, table):
    """A loop over samples, then over regions, in float64."""
    told = {}
    for i in range(len(fused)):
        region = region_by_hand(*lonlat[i], REGIONS)
        queries = np.array([query_by_hand(module, x) for x in fused[i][valid[i]]])
        if region < 0 or not len(queries):
            continue
        bank = np.float64(table[region])
        cosines = np.array([[q @ k / np.linalg.norm(q) / np.linalg.norm(k) for k in bank] for q in queries])
        assigned = balance_by_loop(cosines, np.ones(len(queries), bool), EPSILON, ITERATIONS)
        told.setdefault(region, []).append((assigned.T @ queries) / assigned.sum(0)[:, None])
    want = np.float64(table)
    for region, all_centres in told.items():
        want[region] = MOMENTUM * want[region] + (1 - MOMENTUM) * np.mean(all_centres, axis=0)
    return want, told


def run_update(module, lonlat, fused, valid, table):
    return np.asarray(updated(*nnx.split(module), lonlat, fused, valid, table))


@functools.partial(jax.jit, static_argnums=0)
def updated(graph, state, lonlat, fused, valid, table):
    regions = jnp.where(valid.any((1, 2)), region_of(lonlat, REGIONS), -1)
    queries = nnx.merge(graph, state).queries(fused).reshape(len(fused), -1, WIDTH)
    centres = prototypes.centres(
        queries,
        valid.reshape(len(valid), -1),
        prototypes.lookup(table, regions),
        epsilon=EPSILON,
        iterations=ITERATIONS,
    )
    return prototypes.update(table, centres, regions, MOMENTUM)


def run_context(module, lonlat, fused, table):
    regions = region_of(jnp.asarray(lonlat), REGIONS)
    return module(jnp.asarray(fused), prototypes.lookup(jnp.asarray(table), regions), regions >= 0)


def test_context_agrees_with_the_loop(module, inputs):
    lonlat, fused, _, table = inputs
    assert_allclose(run_context(module, lonlat, fused, table), context_by_hand(module, lonlat, fused, table), atol=1e-5)


def test_update_agrees_with_the_loop(module, inputs):
    table = inputs[-1]
    want, told = update_by_hand(module, *inputs)
    assert sorted(len(samples) for samples in told.values()) == [1, 2, 3]
    got = run_update(module, *inputs)
    assert_allclose(got, want, atol=2e-5)
    unseen = sorted(set(range(REGIONS**2)) - told.keys())
    assert_array_equal(got[unseen], table[unseen])


def test_order_of_samples_does_not_matter(module, inputs):
    order = np.random.default_rng(1).permutation(8)
    lonlat, fused, valid, table = inputs
    got = run_update(module, lonlat[order], fused[order], valid[order], table)
    assert_allclose(got, run_update(module, *inputs), atol=1e-6)


def test_what_is_not_valid_is_not_read(module, inputs):
    lonlat, fused, valid, table = inputs
    broken = np.where(valid[..., None], fused, np.nan)
    assert_array_equal(run_update(module, lonlat, broken, valid, table), run_update(module, *inputs))


def test_every_prototype_gets_its_share(module):
    """Places that all look alike spread over the bank, and no prototype stays behind."""
    queries = np.random.default_rng(0).normal(size=(1, 60, WIDTH)).astype(np.float32) + 2
    bank = np.random.default_rng(1).normal(size=(1, COUNT, WIDTH)).astype(np.float32)
    bank[0, 0] = 2  # alone this one would take them all
    cosines = np.einsum("np,kp->nk", queries[0], bank[0])
    cosines /= np.linalg.norm(queries[0], axis=-1)[:, None] * np.linalg.norm(bank[0], axis=-1)
    assert (cosines.argmax(1) == 0).all()
    got = prototypes.centres(jnp.asarray(queries), jnp.ones((1, 60), bool), bank, epsilon=0.05, iterations=100)
    # With equal shares the mean of the centres is the mean of the queries.
    assert_allclose(got[0].mean(0), queries[0].mean(0), atol=1e-3)
    assert np.abs(got[0] - queries[0].mean(0)).max() > 0.1


def test_a_sample_without_places_leaves_its_bank_and_is_finite(inputs):
    bank = inputs[3][:1]
    queries, nowhere = jnp.ones((1, 5, WIDTH)), jnp.zeros((1, 5), bool)
    assert_array_equal(prototypes.centres(queries, nowhere, bank, epsilon=EPSILON, iterations=3), bank)


def test_no_gradient_reaches_the_table(module, inputs):
    lonlat, fused, _, table = inputs
    graph, state = nnx.split(module)

    @quick_jit
    def gradients(state, fused, table):
        def loss(state, fused, table):
            return jnp.square(run_context(nnx.merge(graph, state), lonlat, fused, table)).sum()

        return jax.grad(loss, argnums=(0, 1, 2))(state, fused, table)

    of_params, of_fused, of_table = gradients(state, fused, table)
    assert_array_equal(of_table, 0)
    assert np.isfinite(of_fused).all()
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(of_params))


def test_features_alike_have_finite_queries_and_gradients(module):
    """A query without any variance: the norm must not divide by zero."""
    flat = nnx.clone(module)
    flat.query.kernel[...] = jnp.zeros_like(flat.query.kernel[...])
    flat.query.bias[...] = jnp.ones(WIDTH)
    gradient = jax.grad(lambda x: flat.queries(x).sum())(jnp.ones((2, FUSED)))
    assert_array_equal(flat.queries(jnp.ones((2, FUSED))), 0)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("magnitude", [1.0, 1e4])
def test_bfloat16_stays_near_float32(module, inputs, magnitude):
    lonlat, fused, valid, table = inputs
    half = Prototypes(fused_width=FUSED, width=WIDTH, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    nnx.update(half, nnx.state(module))
    low = jnp.asarray(fused * magnitude, jnp.bfloat16)
    got, want = run_context(half, lonlat, low, table), run_context(module, lonlat, fused * magnitude, table)
    assert got.dtype == jnp.bfloat16
    assert np.abs(np.float32(got) - want).max() < 2e-2 * np.abs(want).max()
    got, want = run_update(half, lonlat, low, valid, table), run_update(module, lonlat, fused * magnitude, valid, table)
    assert got.dtype == np.float32
    # Queries differ by the rounding of their projection, and epsilon 0.05 makes twenty times that of an assignment.
    assert np.abs(got - want).max() < 0.1 * np.abs(want - table).max()
