import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import objectives_reference as reference
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from skyjax.objectives import distillation, heads
from skyjax.objectives.distillation import Rows

B, R, C = 3, 5, 6


def config(**changes):
    values = {
        "kind": "dino",
        "classes": 7,
        "head_hidden": 8,
        "head_bottleneck": 4,
        "student_temperature": 0.1,
        "sinkhorn_iterations": 3,
        "infonce": {"temperature": 0.2, "negatives": R},
        "chunk": 1024,
        "weights": {"pixel": 1.0, "object": 0.0, "image": 0.0, "alignment": 0.0, "spread": 0.0},
    }
    return ml_collections.ConfigDict({**values, **changes})


def make_head(seed, settings):
    model = ml_collections.ConfigDict({"modalities": {}, "spatial_width": C, "fusion": {"width": C}})
    return heads.init_heads(settings, model, jax.random.key(seed))["fused"]["pixel"]


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    weight = np.where(rng.random((B, R)) < 0.7, rng.random((B, R)), 0).astype(np.float32)
    assert 0 < (weight == 0).sum() < B * R
    student, teacher = rng.normal(size=(2, B, R, C)).astype(np.float32)
    return Rows(student, teacher, weight, np.float32(weight.sum()))


def total(rows, settings, student_head, teacher_head):
    return jax.jit(functools.partial(distillation.distil, config=settings))(
        rows,
        student_head,
        teacher_head,
        teacher_temperature=jnp.float32(0.06),
        keys=jax.random.split(jax.random.key(3), B),
    )


@pytest.mark.parametrize("iterations", [0, 3])
@pytest.mark.parametrize("chunk", [1024, 2])
def test_dino_equals_a_float64_loop(rows, iterations, chunk):
    settings = config(sinkhorn_iterations=iterations, chunk=chunk)
    student_head, teacher_head = make_head(0, settings), make_head(1, settings)
    want = reference.dino(
        np.float64(rows.student).reshape(-1, C),
        np.float64(rows.teacher).reshape(-1, C),
        rows.weight.ravel(),
        student_head,
        teacher_head,
        temperature=0.1,
        epsilon=0.06,
        iterations=iterations,
    )
    assert_allclose(total(rows, settings, student_head, teacher_head), want, rtol=2e-5)


@pytest.mark.parametrize("chunk", [1024, 2])
def test_infonce_equals_a_float64_loop(rows, chunk):
    settings = config(kind="infonce", chunk=chunk)
    student_head, teacher_head = make_head(0, settings), make_head(1, settings)
    assert "classes" not in student_head
    want = reference.infonce(
        reference.project(student_head, np.float64(rows.student)),
        reference.project(teacher_head, np.float64(rows.teacher)),
        rows.weight,
        0.2,
    )
    assert_allclose(total(rows, settings, student_head, teacher_head), want, rtol=2e-5)


def test_a_normed_head_equals_float64_and_sees_no_masked_row(rows):
    settings = config(kind="infonce", head_norm="batch")
    student_head, teacher_head = make_head(0, settings), make_head(1, settings)
    valid = rows.weight > 0
    want = reference.infonce(
        reference.project(student_head, np.float64(rows.student), valid),
        reference.project(teacher_head, np.float64(rows.teacher), valid),
        rows.weight,
        0.2,
    )
    assert_allclose(total(rows, settings, student_head, teacher_head), want, rtol=2e-5)
    assert abs(want - float(total(rows, config(kind="infonce"), student_head, teacher_head))) > 1e-3


@pytest.mark.parametrize("kind", ["dino", "infonce"])
def test_gradients_reach_the_student_alone_and_do_not_depend_on_the_chunk(rows, kind):
    whole, chunked = (config(kind=kind, chunk=chunk) for chunk in (1024, 2))
    student_head, teacher_head = make_head(0, whole), make_head(1, whole)

    def gradients(settings):
        def loss(student, teacher, student_head, teacher_head):
            both = rows._replace(student=student, teacher=teacher)
            return total(both, settings, student_head, teacher_head)

        return jax.grad(loss, (0, 1, 2, 3))(rows.student, rows.teacher, student_head, teacher_head)

    got = gradients(whole)
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-5), got, gradients(chunked))
    assert np.abs(got[0]).max() > 0
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(got[2]))
    assert_array_equal(got[1], 0)
    assert all(np.abs(leaf).max() == 0 for leaf in jax.tree.leaves(got[3]))


@pytest.mark.parametrize("head_norm", ["none", "batch"])
@pytest.mark.parametrize("kind", ["dino", "infonce"])
def test_masked_rows_leave_no_trace(rows, kind, head_norm):
    settings = config(kind=kind, head_norm=head_norm)
    student_head, teacher_head = make_head(0, settings), make_head(1, settings)
    spoilt = rows._replace(
        student=np.where(rows.weight[..., None] > 0, rows.student, np.nan),
        teacher=np.where(rows.weight[..., None] > 0, rows.teacher, np.inf),
    )

    def loss(head, rows):
        return total(rows, settings, head, teacher_head)

    clean, got = (jax.value_and_grad(loss)(student_head, x) for x in (rows, spoilt))
    jax.tree.map(assert_array_equal, got, clean)


@pytest.mark.parametrize("head_norm", ["none", "batch"])
@pytest.mark.parametrize("kind", ["dino", "infonce"])
def test_no_rows_at_all_give_zero_and_zero_gradients(rows, kind, head_norm):
    settings = config(kind=kind, head_norm=head_norm)
    head = make_head(0, settings)
    nothing = rows._replace(weight=np.zeros((B, R), np.float32))
    value, gradient = jax.value_and_grad(lambda h: total(nothing, settings, h, head))(head)
    assert value == 0
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient))


def test_infonce_takes_a_bounded_number_of_negatives_from_each_other_sample(rows):
    settings = config(kind="infonce", infonce={"temperature": 0.2, "negatives": 1})
    student_head, teacher_head = make_head(0, settings), make_head(1, settings)
    every = rows._replace(weight=np.ones((B, R), np.float32))
    # With two negatives an anchor, each no nearer than cosine 1 and no farther than -1, the loss has bounds.
    positive = np.sum(
        reference.project(student_head, np.float64(rows.student))
        * reference.project(teacher_head, np.float64(rows.teacher)),
        -1,
    )
    bound = np.log(1 + (B - 1) * np.exp((1 - positive) / 0.2)).sum()
    few = total(every, settings, student_head, teacher_head)
    many = total(every, config(kind="infonce"), student_head, teacher_head)
    assert few < bound
    assert few < many


@pytest.mark.parametrize(("key", "value"), [("kind", "info"), ("head_norm", "layer")])
def test_what_is_not_known_is_told(key, value):
    with pytest.raises(ValueError, match=f'objective.{key} is "{value}"; it is one of'):
        make_head(0, config(**{key: value}))


def test_the_only_modality_is_not_compared_twice():
    model = ml_collections.ConfigDict({"modalities": {"sar": {}}, "spatial_width": C, "fusion": None})
    assert heads.streams_of(model) == ["sar"]
    assert heads.init_heads(config(), model, jax.random.key(0)).keys() == {"sar"}
    model.prototypes = {"regions": 4}
    assert heads.streams_of(model) == ["sar", "fused"]
