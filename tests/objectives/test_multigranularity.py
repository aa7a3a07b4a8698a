import functools
import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import objectives_reference as reference
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from synthetic_views import Cut, random_cut

from skyjax.objectives import multigranularity
from skyjax.objectives.multigranularity import Maps

B, T = 3, 3
CONFIG = ml_collections.ConfigDict(
    {
        "sinkhorn_iterations": 3,
        "object": {"clusters": 2, "iterations": 3, "epsilon": 0.05},
        "pixel": {"tokens": 5},
        "weights": {"pixel": 1.0, "object": 1.0, "image": 1.0},
    }
)
NOISE = np.random.default_rng(5).random((B, 1000)).astype(np.float32)


def maps_of(cuts, days, grid, *, seen=None, places=None, features=None):
    """Maps whose features are (row, column, day) on the ground; `cuts` is b lists of v cuts, `days` is (b, v, t)."""
    b, v, t = days.shape
    ground = np.stack([[cut.ground(grid) for cut in row] for row in cuts])  # b v h w 2
    ground = np.broadcast_to(ground[:, :, None], (b, v, t, *grid, 2))
    day = np.broadcast_to(days[..., None, None, None], (b, v, t, *grid, 1))
    valid = np.ones(days.shape, bool)
    seen = valid if seen is None else seen
    return Maps(
        features=jnp.asarray(np.concatenate([ground, day], -1) if features is None else features, jnp.float32),
        places=jnp.asarray(np.ones((b, v, t, *grid), bool) if places is None else places),
        days=jnp.asarray(days),
        valid=jnp.asarray(valid),
        seen=jnp.asarray(seen),
        asked=jnp.asarray(np.broadcast_to(seen[..., None, None], (b, v, t, *grid))),
        to_view=jnp.asarray(np.stack([[cut.to_view for cut in row] for row in cuts])),
    )


@pytest.fixture(scope="module")
def scene():
    """Global and local views of three sites; the teacher's slots are permuted, the student dropped some dates."""
    rng = np.random.default_rng(0)
    cuts = [[random_cut(rng) for _ in range(2)] for _ in range(B)]
    local_cuts = [[random_cut(rng, (0.15, 0.4)) for _ in range(2)] for _ in range(B)]
    days = np.stack([rng.permuted(np.tile([3, 5, 8], (2, 1)), axis=1) for _ in range(B)])
    teacher = maps_of(cuts, days, (6, 6), places=rng.random((B, 2, T, 6, 6)) < 0.8)
    order = np.stack([rng.permuted(np.tile([3, 5, 8], (2, 1)), axis=1) for _ in range(B)])
    student = maps_of(cuts, order, (6, 6), seen=rng.random((B, 2, T)) < 0.7)
    local_student = maps_of(local_cuts, order[..., :2], (3, 3))
    return student, local_student, teacher, cuts, local_cuts


@functools.partial(jax.jit, static_argnames=("same_views", "tokens"))
def pixel(student, teacher, noise=NOISE, *, same_views=True, tokens=5):
    pairs = multigranularity.pair_views(student, teacher, same_views=same_views)
    draws = math.prod(pairs.dated.shape[1:]) * pairs.inside.shape[2]
    return multigranularity.pixel_rows(student, teacher, pairs, tokens=tokens, noise=noise[:, :draws])


@jax.jit
def objects(students, teacher):
    pairs = [multigranularity.pair_views(maps, teacher, same_views=i == 0) for i, maps in enumerate(students)]
    return multigranularity.object_rows(students, teacher, pairs, config=CONFIG)


@jax.jit
def images(student, teacher):
    pairs = multigranularity.pair_views(student, teacher, same_views=True)
    return multigranularity.image_rows(student, teacher, pairs)


def expected_counts(student, teacher, cuts, other_cuts, same_views):
    """(b, p, t) places that count, by loops over dates and scipy-free bilinear weights on the ground."""
    counts = []
    for i in range(B):
        for v, cut in enumerate(cuts[i]):
            for u, other in enumerate(other_cuts[i]):
                if same_views and u == v:
                    continue
                slots = reference.match_days(
                    np.array(student.days[i, v]),
                    np.array(student.valid[i, v]),
                    np.array(teacher.days[i, u]),
                    np.array(teacher.seen[i, u]),
                )
                places = cut.ground(student.grid).reshape(-1, 2)
                for s, slot in enumerate(slots):
                    if slot is None or not student.seen[i, v, s]:
                        counts.append(0)
                        continue
                    clear = np.array(teacher.places[i, u, slot]).reshape(-1)
                    centres = other.ground(teacher.grid).reshape(-1, 2)
                    clipped = np.clip(places, centres.min(0), centres.max(0))
                    # The weight of a token is the product of two hats around its centre.
                    step = np.array([other.height, other.width]) / teacher.grid
                    hats = np.maximum(1 - np.abs(clipped[:, None] - centres[None]) / step, 0).prod(-1)
                    counts.append(int(np.sum(other.contains(places) & (hats @ clear >= 0.5 - 1e-5))))
    return np.array(counts).reshape(B, -1)


@pytest.mark.parametrize("which", ["global", "local"])
def test_pixel_rows_hold_the_same_ground_and_day_in_both(scene, which):
    student, local_student, teacher, cuts, local_cuts = scene
    same = which == "global"
    own, own_cuts = (student, cuts) if same else (local_student, local_cuts)
    rows = pixel(own, teacher, same_views=same, tokens=5)
    drawn = np.asarray(rows.weight) > 0
    mine, other = np.asarray(rows.student)[drawn], np.asarray(rows.teacher)[drawn]
    assert drawn.any()
    assert_allclose(mine[:, 2], other[:, 2], rtol=1e-6)  # the day, whatever its slot
    # A masked neighbour or the border moves the teacher's mean by less than a token, which is at most 1 / 6 wide.
    assert np.abs(mine[:, :2] - other[:, :2]).max() < 1 / 6

    places = expected_counts(own, teacher, own_cuts, cuts, same)
    assert_array_equal(drawn.reshape(*places.shape, -1).sum(-1), np.minimum(places, 5))
    assert rows.counted == drawn.sum()
    every = pixel(own, teacher, same_views=same, tokens=1000)
    assert every.counted == places.sum()


def test_pixel_rows_are_exact_where_all_four_neighbours_were_measured(scene):
    student, _, teacher, _, _ = scene
    whole = teacher._replace(places=jnp.ones_like(teacher.places))
    wide = [[Cut(0, 0, 1, 1, 1), Cut(0, 0, 1, 1, 2, flipped=True)]] * B
    inner = [[Cut(0.2, 0.1, 0.6, 0.7, 3), Cut(0.1, 0.3, 0.5, 0.5, flipped=True)]] * B
    teacher = maps_of(wide, np.asarray(whole.days), (6, 6))
    student = maps_of(inner, np.asarray(student.days), (6, 4))
    rows = pixel(student, teacher, tokens=1000)
    assert rows.counted == B * 2 * T * 24
    assert_allclose(rows.student, rows.teacher, atol=1e-5)


def test_draws_belong_to_the_sample_and_its_noise(scene):
    student, _, teacher, _, _ = scene
    rows = pixel(student, teacher)
    alone = pixel(*(jax.tree.map(lambda x: x[1:2], maps) for maps in (student, teacher)), NOISE[1:2])
    assert_array_equal(rows.student[1], alone.student[0])
    other = pixel(student, teacher, NOISE[::-1])
    assert not np.array_equal(rows.student, other.student)


def test_image_rows_are_means_over_measured_places_of_seen_dates(scene):
    student, _, teacher, _, _ = scene
    rows = images(student, teacher)
    at = 0
    for v, u in ((0, 1), (1, 0)):
        for s in range(T):
            for i in range(B):
                slot = int(np.flatnonzero(np.asarray(teacher.days[i, u]) == int(student.days[i, v, s]))[0])
                assert rows.weight[i, at] == student.seen[i, v, s]
                want = np.asarray(teacher.features[i, u, slot])[np.asarray(teacher.places[i, u, slot])].mean(0)
                assert_allclose(rows.teacher[i, at], want, rtol=1e-5)
            at += 1
    assert rows.counted == np.asarray(student.seen).sum()
    hidden = student._replace(places=student.places.at[0].set(False))
    assert images(hidden, teacher).counted == np.asarray(student.seen)[1:].sum()


def test_object_rows_find_the_two_halves_of_the_ground_in_both_views():
    # West of the middle the ground is one thing, east of it another; the views are turned against each other.
    cuts = [[Cut(0, 0, 1, 1), Cut(0, 0, 1, 1, 1, flipped=True)]] * B
    days = np.tile(np.array([3]), (B, 2, 1))
    west, east = np.array([5.0, 1, 0, 2]), np.array([5.0, -2, 1, 0])
    kinds = np.stack([[cut.ground((4, 4))[..., 1:] < 0.5 for cut in row] for row in cuts])[:, :, None]
    maps = maps_of(cuts, days, (4, 4), features=np.where(kinds, west, east))
    rows = objects([maps], maps)
    assert_allclose(rows.student, rows.teacher, atol=1e-3)
    for i in range(B):
        for p in range(2):
            found = np.asarray(rows.teacher)[i, 2 * p : 2 * p + 2]
            found = found[np.argsort(-found[:, 1])]
            assert_allclose(found, [west, east], atol=1e-2)
    assert_allclose(rows.weight, 0.5, atol=1e-3)
    assert rows.counted == B * 2


def test_object_weights_of_a_pair_and_date_sum_to_one_where_there_is_overlap(scene):
    student, local_student, teacher, _, _ = scene
    rows = objects([student, local_student], teacher)
    sums = np.asarray(rows.weight).reshape(B, -1, CONFIG.object.clusters).sum(-1)
    assert_allclose(sums[sums > 0], 1, atol=1e-5)
    assert rows.counted == (sums > 0).sum()
    assert 0 < rows.counted < sums.size


def test_what_the_teacher_sees_beside_the_students_view_does_not_move_its_clusters():
    rng = np.random.default_rng(2)
    cuts = [[Cut(0, 0, 1, 1), Cut(0.1, 0, 0.5, 0.5, 1)]]  # the second is the student's, in the north-west
    features = rng.normal(size=(1, 2, 1, 6, 6, 3))
    maps = maps_of(cuts, np.full((1, 2, 1), 7), (6, 6), features=features)
    outside = ~cuts[0][1].contains(cuts[0][0].ground((6, 6)))
    far = maps.features.at[0, 0, 0, outside].set(50.0)
    rows, moved = (objects([maps], maps._replace(features=f)) for f in (maps.features, far))
    of_second = slice(CONFIG.object.clusters, None)  # pairs are (0, 1), (1, 0)
    assert_array_equal(rows.teacher[:, of_second], moved.teacher[:, of_second])
    assert_array_equal(rows.student[:, of_second], moved.student[:, of_second])


@pytest.mark.parametrize("tokens", ["random", "identical"])
@pytest.mark.parametrize("measured", [0, 1, 16])
def test_object_rows_are_finite_for_no_token_one_token_and_equal_tokens(tokens, measured):
    rng = np.random.default_rng(0)
    cuts = [[Cut(0, 0, 1, 1), Cut(0, 0, 1, 1, 2)]]
    features = rng.normal(size=(1, 2, 1, 4, 4, 3)) if tokens == "random" else np.ones((1, 2, 1, 4, 4, 3))
    places = (np.arange(16) < measured).reshape(1, 1, 1, 4, 4) & np.ones((1, 2, 1, 1, 1), bool)
    maps = maps_of(cuts, np.full((1, 2, 1), 7), (4, 4), features=features, places=places)

    def loss(features):
        rows = objects([maps._replace(features=features)], maps)
        return jnp.sum(rows.weight[..., None] * jnp.square(rows.student)), rows

    (value, rows), gradient = jax.value_and_grad(loss, has_aux=True)(maps.features)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert np.isfinite(rows.teacher).all()
    assert rows.counted == (0 if measured == 0 else 2)
    assert_allclose(np.asarray(rows.weight).sum(), rows.counted, atol=1e-5)
    if measured == 0:
        assert_array_equal(gradient, 0)


def test_nothing_of_a_masked_token_reaches_an_object_row_or_its_gradient(scene):
    """Tokens that the teacher did not measure, and dates that the student was not shown, may hold anything."""
    student, local_student, teacher, _, _ = scene
    junk = [
        (student._replace(features=jnp.where(student.seen[..., None, None, None], student.features, value)),
         teacher._replace(features=jnp.where(teacher.places[..., None], teacher.features, value)))
        for value in (0.0, -1e6, np.nan)
    ]  # fmt: skip

    def loss(features, student, teacher):
        rows = objects([student._replace(features=features), local_student], teacher)
        return jnp.sum(rows.weight[..., None] * jnp.square(rows.student - rows.teacher)), rows

    (_, want), want_gradient = jax.value_and_grad(loss, has_aux=True)(junk[0][0].features, *junk[0])
    assert np.abs(want_gradient).max() > 0
    for mine, other in junk[1:]:
        (_, got), gradient = jax.value_and_grad(loss, has_aux=True)(mine.features, mine, other)
        jax.tree.map(assert_array_equal, got, want)
        assert_array_equal(gradient, want_gradient)


def test_clusters_start_far_apart_and_masked_tokens_belong_to_none():
    rng = np.random.default_rng(1)
    kinds = np.repeat(np.eye(4), 5, 0)[rng.permutation(20)]
    tokens = kinds + 0.01 * rng.normal(size=kinds.shape)
    valid = np.ones(20, bool)
    valid[[0, 7]] = False
    config = ml_collections.ConfigDict(CONFIG.to_dict())
    config.object.clusters = 4
    cluster = jax.jit(functools.partial(multigranularity.cluster, config=config))
    assignment = np.asarray(cluster(jnp.asarray(tokens, jnp.float32), valid))
    assert_array_equal(assignment[~valid], 0)
    assert_allclose(assignment[valid].sum(1), 1, atol=1e-5)
    together = assignment @ assignment.T > 0.5
    assert_array_equal(together[np.ix_(valid, valid)], (kinds @ kinds.T > 0.5)[np.ix_(valid, valid)])
