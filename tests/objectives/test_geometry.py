import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from objectives_reference import match_days
from scipy import ndimage
from synthetic_views import Cut

from skyjax.objectives import geometry

GRIDS = [((4, 4), (6, 6)), ((5, 3), (4, 7))]
side = st.floats(0.2, 1.0)


@st.composite
def cuts(draw):
    height, width = draw(side), draw(side)
    top, left = draw(st.floats(0, 1)) * (1 - height), draw(st.floats(0, 1)) * (1 - width)
    return Cut(top, left, height, width, draw(st.integers(0, 3)), draw(st.booleans()))


@pytest.mark.parametrize("grids", GRIDS)
@given(student=cuts(), teacher=cuts())
@settings(max_examples=25, deadline=None)
def test_a_map_of_ground_coordinates_gives_the_student_its_own_places_back(grids, student, teacher):
    own_grid, other_grid = grids
    places = student.ground(own_grid).reshape(-1, 2)
    coordinates = teacher.ground(other_grid).reshape(1, -1, 2)

    local, inside = geometry.carry(
        geometry.token_centres(own_grid), jnp.asarray(student.to_view[None]), jnp.asarray(teacher.to_view[None])
    )
    index, weight = geometry.neighbours(local, other_grid)
    valid = jnp.ones(coordinates.shape[:2], bool)
    got = geometry.interpolate(jnp.asarray(coordinates, jnp.float32), valid, index, weight)[0]

    # Between the outermost centres the samples are exact; in the half token outside of them the nearest centre stands.
    want = np.clip(places, coordinates.min((0, 1)), coordinates.max((0, 1)))
    contained = teacher.contains(places)
    assert_allclose(np.asarray(got)[contained], want[contained], atol=2e-5)
    on_border = ~np.isclose(np.asarray(local), np.clip(local, 0, 1), atol=1e-4).all(-1)[0] == contained
    assert_array_equal(np.asarray(inside)[0][~on_border], contained[~on_border])


def test_places_outside_the_other_view_are_outside():
    student, teacher = Cut(0, 0, 0.5, 1), Cut(0.25, 0, 0.5, 0.5, turns=1)
    _, inside = geometry.carry(
        geometry.token_centres((4, 4)), jnp.asarray(student.to_view[None]), jnp.asarray(teacher.to_view[None])
    )
    want = np.zeros((4, 4), bool)
    want[2:, :2] = True  # rows at .3125 and .4375, columns at .125 and .375
    assert_array_equal(np.asarray(inside).reshape(4, 4), want)


def test_bilinear_samples_equal_scipy():
    rng = np.random.default_rng(0)
    tokens, points = rng.normal(size=(5, 7)), rng.random((40, 2))
    want = ndimage.map_coordinates(tokens, (points * [5, 7] - 0.5).T, order=1, mode="nearest")
    index, weight = geometry.neighbours(jnp.asarray(points[None], jnp.float32), (5, 7))
    got = geometry.interpolate(jnp.asarray(tokens.reshape(1, -1, 1)), jnp.ones((1, 35), bool), index, weight)
    assert_allclose(np.asarray(got)[0, :, 0], want, atol=1e-5)


def test_masked_neighbours_never_show():
    rng = np.random.default_rng(1)
    valid, points = rng.random(12) < 0.6, rng.random((1, 30, 2)).astype(np.float32)
    index, weight = geometry.neighbours(jnp.asarray(points), (3, 4))
    clean = rng.normal(size=(12, 2)).astype(np.float32)
    spoilt = np.where(valid[:, None], clean, np.nan)
    got, same = (geometry.interpolate(jnp.asarray(x[None]), valid[None], index, weight) for x in (spoilt, clean))
    assert_array_equal(got, same)

    for k in range(30):
        kept = np.asarray(weight)[0, k] * valid[np.asarray(index)[0, k]]
        want = kept @ clean[np.asarray(index)[0, k]] / kept.sum() if kept.sum() > 1e-3 else np.zeros(2)
        assert_allclose(got[0, k], want, atol=1e-4)
        assert_allclose(geometry.measured_share(valid[None], index, weight)[0, k], kept.sum(), atol=1e-6)


days = st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=4, max_size=4)


@given(mine=days, others=days)
@settings(max_examples=60, deadline=None)
def test_dates_pair_by_day_and_a_day_that_stands_twice_in_order(mine, others):
    own, other = (tuple(np.array(x) for x in zip(*dates, strict=True)) for dates in (mine, others))
    want = match_days(*own, *other)
    slot, paired = geometry.match_days(*map(jnp.asarray, own), *map(jnp.asarray, other))
    assert_array_equal(paired, [w is not None for w in want])
    assert [int(s) for s, w in zip(slot, want, strict=True) if w is not None] == [w for w in want if w is not None]


def test_permuted_slots_change_nothing_but_the_slot():
    own = jnp.array([10, 20, 30, 40])
    order = np.array([2, 0, 3, 1])
    slot, paired = geometry.match_days(own, jnp.ones(4, bool), own[order], jnp.ones(4, bool))
    assert_array_equal(order[np.asarray(slot)], np.arange(4))
    assert paired.all()
