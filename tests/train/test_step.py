"""The step: teacher, skipped updates, accumulation. Losses and encoders have tests of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from skyjax.input.loader import Loader
from skyjax.models import skysense
from skyjax.train import loop, state
from skyjax.train.step import loss_and_gradients, make_step, split


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


@pytest.fixture(scope="module")
def stepped(first, step, batch):
    """(state before, state after, metrics) of one step."""
    after, metrics = step(copy(first), batch)
    return first, after, {name: float(value) for name, value in metrics.items()}


def test_teacher_starts_as_a_copy_in_buffers_of_its_own(first, assert_same_bits):
    assert_same_bits(first["teacher"], first["params"])
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(first)]
    assert len(set(pointers)) == len(pointers)


def test_teacher_is_the_moving_average_by_the_schedule(stepped, config):
    before, after, metrics = stepped
    momentum = 1 - (1 - config.optimizer.teacher_momentum) * (np.cos(0) + 1) / 2
    assert_allclose(metrics["teacher_momentum"], momentum, rtol=1e-6)
    rest = jax.tree.map(
        lambda new, old, student: np.abs(
            new - (momentum * np.float64(old) + (1 - momentum) * np.float64(student))
        ).max(),
        after["teacher"],
        before["teacher"],
        after["params"],
    )
    assert max(jax.tree.leaves(rest)) < 1e-6
    moved = jax.tree.map(lambda new, old: np.abs(np.asarray(new - old)).max(), after["params"], before["params"])
    assert max(jax.tree.leaves(moved)) > 1e-5


def test_momentum_follows_the_step_of_the_state(first, step, batch, config):
    late = copy(first)
    late["step"] += 20
    _, metrics = step(late, batch)
    want = 1 - (1 - config.optimizer.teacher_momentum) * (np.cos(np.pi * 20 / config.steps) + 1) / 2
    assert_allclose(float(metrics["teacher_momentum"]), want, rtol=1e-6)


def test_over_many_steps_the_teacher_is_the_float64_loop_over_the_students(first, step, batch, config):
    """From the middle of the schedule, where it is steepest; one step of them is not finite and moves nothing."""
    now = copy(first)
    now["step"] += 12
    now["teacher"] = jax.tree.map(lambda x: 1.5 * x + 0.1, now["teacher"])  # far from the student, so that it moves
    teacher = jax.tree.map(np.float64, now["teacher"])
    start = teacher
    for number in range(12, 18):
        if number == 15:
            extra = now["params"]["encoder"]["fusion"]["extra_token"]
            now["params"]["encoder"]["fusion"]["extra_token"] = extra * jnp.nan
            now, _ = step(now, batch)
            now["params"]["encoder"]["fusion"]["extra_token"] = jnp.zeros_like(extra)
            continue
        now, _ = step(now, batch)
        momentum = 1 - (1 - config.optimizer.teacher_momentum) * (1 + np.cos(np.pi * number / config.steps)) / 2
        teacher = jax.tree.map(
            lambda t, s, m=momentum: m * t + (1 - m) * np.float64(s), teacher, jax.device_get(now["params"])
        )
    jax.tree.map(lambda got, want: assert_allclose(got, want, atol=1e-6), jax.device_get(now["teacher"]), teacher)
    moved = jax.tree.map(lambda end, begin: np.abs(end - begin).max(), teacher, start)
    assert min(jax.tree.leaves(moved)) > 1e-3


def test_metrics_have_every_term_and_their_weighted_sum_is_the_loss(stepped, config):
    _, _, metrics = stepped
    terms = {name.split("/", 1)[1]: value for name, value in metrics.items() if name.startswith("loss/")}
    assert {"pixel/fused", "object/sar", "image/multispectral", "alignment/multispectral-sar"} <= terms.keys()
    weights = config.objective.weights
    assert_allclose(
        sum(weights[name.split("/")[0]] * value for name, value in terms.items()), metrics["loss"], rtol=1e-5
    )
    assert np.isfinite(list(metrics.values())).all()


def test_a_term_that_the_batch_has_nothing_of_is_unknown(first, step, batch):
    alone = jax.tree.map(lambda x: x, batch)
    alone["global"]["sar"] = {
        **batch["global"]["sar"],
        **{name: jnp.zeros_like(batch["global"]["sar"][name]) for name in ("valid", "student_valid", "clear")},
    }
    _, metrics = step(copy(first), alone)
    unknown = {name for name, value in metrics.items() if np.isnan(float(value))}
    assert unknown == {
        "loss/alignment/multispectral-sar",
        "loss/spread/sar",
        *(f"loss/{level}/sar" for level in ("pixel", "object", "image")),
    }


def test_a_step_that_is_not_finite_leaves_the_state_bit_equal(first, step, batch, assert_same_bits):
    poisoned = copy(first)
    poisoned["params"]["encoder"]["fusion"]["extra_token"] *= jnp.inf
    poisoned["counters"]["nonfinite_in_a_row"] += 3
    before = copy(poisoned)
    after, metrics = step(poisoned, batch)
    assert not np.isfinite(float(metrics["loss"]))
    for part in ("params", "teacher", "optimizer", "prototypes"):
        assert_same_bits(after[part], before[part])
    assert int(after["step"]) == 1
    assert (int(after["counters"]["skipped"]), int(after["counters"]["nonfinite_in_a_row"])) == (1, 4)


def test_a_finite_step_ends_the_row(first, step, batch):
    counted = copy(first)
    counted["counters"] = {"skipped": first["counters"]["skipped"] + 5, "nonfinite_in_a_row": first["step"] + 3}
    after, metrics = step(counted, batch)
    assert (float(metrics["skipped"]), float(metrics["nonfinite_in_a_row"])) == (5, 0)
    assert int(after["counters"]["skipped"]) == 5


GERMANY, AMAZON = 14 * 16 + 8, 7 * 16 + 5  # of 16 x 16 cells: rows of sin(latitude), columns of longitude


def moved_regions(before, after):
    """Numbers of the regions whose prototypes differ."""
    return set(
        np.flatnonzero((np.asarray(before["prototypes"]) != np.asarray(after["prototypes"])).any((1, 2))).tolist()
    )


def test_prototypes_move_where_the_batch_was_and_nowhere_else(stepped, batch, config):
    """The batch has sites in one region of Germany, sites in the Amazon, and sites that nobody knows the place of."""
    before, after, _ = stepped
    assert np.isnan(batch["lonlat"]).any()
    assert moved_regions(before, after) == {GERMANY, AMAZON}
    # A step goes 1 - momentum of the way to what was seen, whose rows have at most the length of a query.
    change = (np.asarray(after["prototypes"]) - 0.9 * np.asarray(before["prototypes"]))[[GERMANY, AMAZON]] / 0.1
    length = np.linalg.norm(change, axis=-1) / np.sqrt(config.model.prototypes.width)
    assert (length < 1.001).all()
    assert (length > 0.1).all()


def test_prototypes_are_the_teachers(stepped, first, step, batch):
    """Neither the student's weights nor what it was not shown matter; the teacher's do."""
    _, after, _ = stepped
    student = copy(first)
    student["params"] = jax.tree.map(lambda x: x * 1.5, student["params"])
    other, _ = step(student, batch)
    np.testing.assert_array_equal(other["prototypes"], after["prototypes"])

    hidden = jax.tree.map(lambda x: x, batch)
    for m in ("multispectral", "sar"):
        dates = hidden["global"][m]["student_valid"]
        hidden["global"][m] = {**hidden["global"][m], "student_valid": dates.at[:, :, 0].set(False)}
    other, _ = step(copy(first), hidden)
    np.testing.assert_array_equal(other["prototypes"], after["prototypes"])

    teacher = copy(first)
    teacher["teacher"] = jax.tree.map(lambda x: x * 1.5, teacher["teacher"])
    other, _ = step(teacher, batch)
    assert np.abs(other["prototypes"] - after["prototypes"]).max() > 1e-3


def test_prototypes_stay_where_nothing_is_known_or_seen(first, step, batch):
    lost = {**batch, "lonlat": jnp.full_like(batch["lonlat"], jnp.nan)}
    after, metrics = step(copy(first), lost)
    assert moved_regions(first, after) == set()
    assert np.isfinite(float(metrics["loss"]))
    blind = jax.tree.map(lambda x: x, batch)
    south = batch["lonlat"][:, 1] < 0
    for m in ("multispectral", "sar"):
        images = blind["global"][m]
        blind["global"][m] = {**images, "clear": images["clear"] & ~south[:, None, None, None, None]}
    after, _ = step(copy(first), blind)
    assert moved_regions(first, after) == {GERMANY}


def test_order_of_samples_does_not_matter_to_prototypes(stepped, first, step, batch):
    _, want, _ = stepped
    order = np.random.default_rng(0).permutation(8)
    after, _ = step(copy(first), jax.tree.map(lambda x: x[order], batch))
    assert_allclose(after["prototypes"], want["prototypes"], atol=1e-4)


def test_frozen_prototypes_pass_through(first, batch, config):
    frozen = config.copy_and_resolve_references()
    with frozen.unlocked():
        frozen.model.prototypes.frozen = True
    tables = loop.statistics_table(config.model)
    statistics = {m: (np.float32(t["mean"]), np.float32(t["std"])) for m, t in tables.items()}
    traced = jax.jit(make_step(frozen, statistics)).trace(first, batch)
    given = dict(zip(leaves_named((first, batch)), traced.jaxpr.jaxpr.invars, strict=True))
    returned = dict(zip(leaves_named(traced.out_info), traced.jaxpr.jaxpr.outvars, strict=True))
    assert [name for name in given if given[name] is returned.get(name)] == ["[0]['prototypes']"]


def leaves_named(tree):
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def test_without_prototypes_the_state_is_as_it_was(tiny_config, config):
    """So that checkpoints from before there were any can be read."""
    assert "prototypes" not in state.abstract(tiny_config(modalities=("sar",)))
    assert state.abstract(config)["prototypes"].shape == (256, 16, 256)


def test_the_step_was_compiled_once(stepped, jitted):
    """After all that the tests above gave it: fresh states, late ones and poisoned ones."""
    assert jitted._cache_size() == 1


def test_split_takes_every_kth_sample():
    batch = {"index": np.arange(6), "global": {"x": np.arange(12).reshape(6, 2)}}
    parts = split(batch, 3)
    assert parts["index"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert parts["global"]["x"].tolist() == [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]]


def one_gradient(tiny_config, **changes):
    """The batch, and loss, terms and gradients to it, of a model of one modality with these changes."""
    config = tiny_config(modalities=("multispectral",), **changes)
    tables = loop.statistics_table(config.model)
    statistics = {m: (np.float32(t["mean"]), np.float32(t["std"])) for m, t in tables.items()}
    loader = Loader(config)
    batch = next(loader)
    loader.close()
    params = state.init_params(config, jax.random.key(0))
    # The teacher differs, or student and teacher would agree and gradients would be small.
    teacher = state.init_params(config, jax.random.key(1))
    table = skysense.init_prototypes(config.model, jax.random.key(2))
    run = jax.jit(lambda *x: loss_and_gradients(config, statistics, *x))
    return batch, *run(params, teacher, batch, jnp.int32(0), table)


def test_bfloat16_computes_near_float32_and_keeps_float32_gradients(tiny_config):
    changes = {"model__drop_path": 0.0, "data__local_views__count": 0}
    _, want, _, right = one_gradient(tiny_config, **changes)
    _, got, _, gradients = one_gradient(tiny_config, model__dtype="bfloat16", **changes)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
    assert_allclose(got, want, rtol=2e-2)
    flat, flat_right = (
        jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in (gradients, right)
    )
    cosine = flat @ flat_right / jnp.linalg.norm(flat) / jnp.linalg.norm(flat_right)
    assert cosine > 0.98


def test_micro_batches_equal_the_whole_batch(tiny_config):
    """With terms that are per sample: no balancing, no alignment, no spread, no drop path."""
    changes = {
        "batch_size": 6,
        "model__drop_path": 0.0,
        "data__local_views__count": 0,
        "objective__sinkhorn_iterations": 0,
        "objective__weights__alignment": 0.0,
        "objective__weights__spread": 0.0,
        "model__prototypes": {
            "regions": 4,
            "count": 3,
            "width": 8,
            "momentum": 0.9,
            "epsilon": 0.05,
            "iterations": 3,
            "frozen": False,
        },
    }
    (batch, *whole), (_, *summed) = (one_gradient(tiny_config, micro_batches=parts, **changes) for parts in (1, 2))
    (whole, terms, gradients), (summed, parts_terms, parts_gradients) = whole, summed
    # The parts must differ in what they hold, or counts could be mixed up without a trace.
    valid = np.asarray(batch["global"]["multispectral"]["student_valid"]).sum((1, 2))
    assert valid[::2].sum() != valid[1::2].sum()
    assert_allclose(summed, whole, rtol=1e-5)
    for name, total in terms["sums"].items():
        assert_allclose(parts_terms["sums"][name], total, rtol=2e-5, err_msg=name)
        assert_allclose(parts_terms["counts"][name], terms["counts"][name], err_msg=name)
    # What belongs to a sample comes back in the samples' order, and moves the table once, as the whole batch would.
    np.testing.assert_array_equal(parts_terms["centres"]["regions"], terms["centres"]["regions"])
    assert len(set(terms["centres"]["regions"].tolist())) == 3
    assert_allclose(parts_terms["centres"]["centres"], terms["centres"]["centres"], atol=1e-4)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradients))
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=2e-5 * scale), parts_gradients, gradients)
