import functools
import importlib.util
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from synthetic_views import DATES, FUSED_WIDTH, WIDTH, make_output, make_views

from skyjax.objectives.heads import init_heads
from skyjax.objectives.objective import objective, teacher_temperature

B = 4
MODEL = ml_collections.ConfigDict(
    {"modalities": {m: {} for m in DATES}, "spatial_width": WIDTH, "fusion": {"width": FUSED_WIDTH}}
)


def settings(**changes):
    values = {
        "kind": "dino",
        "classes": 8,
        "head_hidden": 8,
        "head_bottleneck": 4,
        "student_temperature": 0.1,
        "teacher_temperature": (0.04, 0.07),
        "sinkhorn_iterations": 3,
        "weights": {"pixel": 1.0, "object": 0.5, "image": 2.0, "alignment": 0.1, "spread": 0.1},
        "infonce": {"temperature": 0.2, "negatives": 2},
        "chunk": 1024,
        "pixel": {"tokens": 3},
        "object": {"clusters": 2, "iterations": 2, "epsilon": 0.05},
        "alignment": {"temperature": 0.1},
    }
    return ml_collections.ConfigDict({**values, **changes})


def model_of(*modalities):
    return ml_collections.ConfigDict({**MODEL.to_dict(), "modalities": {m: {} for m in modalities}})


def scene(modalities=tuple(DATES), *, local=True, seed=0):
    """Student, teacher, views of a batch."""
    rng = np.random.default_rng(seed)
    views = {"global": make_views(rng, B, 2, modalities)}
    if local:
        views["local"] = make_views(rng, B, 2, modalities, area=(0.15, 0.4))
        for m in modalities:
            views["local"][m]["days"] = views["global"][m]["days"]
    student = {
        name: make_output(rng, view, grid=4 if name == "global" else 2, student=True) for name, view in views.items()
    }
    teacher = {"global": make_output(rng, views["global"], grid=4, student=False)}
    return student, teacher, views


def make_run(**changes):
    """The objective and its gradient with respect to features and heads, jitted."""
    config = settings(**changes)

    def run(student, teacher, views, heads, teacher_heads, index, counts=None):
        def loss(student, teacher, heads, teacher_heads):
            return objective(
                config,
                student,
                teacher,
                views,
                heads,
                teacher_heads,
                index=index,
                seed=0,
                teacher_temperature=0.05,
                counts=counts,
            )

        def features_only(student, teacher, heads, teacher_heads):
            # Masks are not differentiated.
            return loss(
                _with_features(all_student, student), _with_features(all_teacher, teacher), heads, teacher_heads
            )

        all_student, all_teacher = student, teacher
        return jax.value_and_grad(features_only, (0, 1, 2, 3), has_aux=True)(
            _features(student), _features(teacher), heads, teacher_heads
        )

    return jax.jit(run)


@functools.cache
def compiled():
    """With the plain settings, compiled once for all tests."""
    return make_run()


def _features(outputs):
    return {name: {"spatial": o["spatial"], "fused": o["fused"]} for name, o in outputs.items()}


def _with_features(outputs, features):
    return {name: {**o, **features[name]} for name, o in outputs.items()}


def heads_of(config, model=MODEL):
    return [init_heads(config, model, jax.random.key(seed)) for seed in (0, 1)]


INDEX = np.arange(B, dtype=np.uint32)
LEVELS = {f"{level}/{stream}" for level in ("pixel", "object", "image") for stream in (*DATES, "fused")}
PAIRS = {f"alignment/{pair}" for pair in ("optical-multispectral", "optical-sar", "multispectral-sar")}
SPREADS = {f"spread/{stream}" for stream in (*DATES, "fused")}


@pytest.fixture(scope="module")
def result():
    return compiled()(*scene(), *heads_of(settings()), INDEX)


def test_every_level_of_every_modality_pair_and_spread_is_a_term_and_the_loss_their_weighted_sum(result):
    (loss, terms), _ = result
    assert set(terms["sums"]) == set(terms["counts"]) == LEVELS | PAIRS | SPREADS
    weights = settings().weights
    want = sum(weights[k.split("/")[0]] * v / max(terms["counts"][k], 1) for k, v in terms["sums"].items())
    assert_allclose(loss, want, rtol=1e-5)
    assert set(terms["metrics"]) == {"rank/fused", "spread/fused"}
    assert 1 < terms["metrics"]["rank/fused"] <= 2 * B - 1


def test_the_teacher_gets_no_gradient_and_every_parameter_of_the_student_one(result):
    _, (student, teacher, heads, teacher_heads) = result
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves((teacher, teacher_heads)))
    for path, leaf in jax.tree_util.tree_leaves_with_path((student, heads)):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


def test_counts_are_known_from_masks_alone(result):
    student, teacher, views = scene()
    nowhere = jax.tree.map(lambda x: np.full_like(x, np.nan), [_features(student), _features(teacher)])
    (_, terms), _ = compiled()(
        _with_features(student, nowhere[0]), _with_features(teacher, nowhere[1]), views, *heads_of(settings()), INDEX
    )
    assert terms["counts"] == result[0][1]["counts"]


def test_micro_batches_with_the_counts_of_all_add_up_for_terms_that_are_per_sample():
    # Without balancing no level compares samples; alignment and spread always do.
    weights = {"pixel": 1.0, "object": 0.5, "image": 2.0, "alignment": 0.0, "spread": 0.0}
    run = make_run(sinkhorn_iterations=0, weights=weights)
    batch, heads = scene(("multispectral",)), heads_of(settings(), model_of("multispectral"))
    (loss, terms), (_, _, gradient, _) = run(*batch, *heads, INDEX, None)
    assert set(terms["sums"]) == {name for name in LEVELS if name.endswith(("multispectral", "fused"))}
    halves = [jax.tree.map(lambda x, s=s: x[s], (batch, INDEX)) for s in (slice(0, 2), slice(2, 4))]
    parts = [run(*half, *heads, index, terms["counts"]) for half, index in halves]
    assert_allclose(sum(value for (value, _), _ in parts), loss, rtol=1e-5)
    jax.tree.map(lambda a, b, c: assert_allclose(a + b, c, atol=1e-5), *(g for _, (_, _, g, _) in parts), gradient)
    for name, count in terms["counts"].items():
        assert_allclose(sum(t["counts"][name] for (_, t), _ in parts), count)
        assert_allclose(sum(t["sums"][name] for (_, t), _ in parts), terms["sums"][name], rtol=1e-4, atol=1e-4)


def test_permuted_slots_change_nothing():
    """Dates are paired by day: where all places are scored, the order in which a view holds its dates has no effect."""
    student, teacher, views = scene(("multispectral",), local=False)
    config = {"pixel": {"tokens": 1000}}
    run = make_run(**config)
    heads = heads_of(settings(**config), model_of("multispectral"))
    (want, _), _ = run(student, teacher, views, *heads, INDEX)

    order = np.array([2, 0, 1])

    def permute(x):
        return np.stack([x[:, 0], x[:, 1][:, order]], axis=1)

    images = views["global"]["multispectral"]
    views["global"]["multispectral"] = {name: permute(x) for name, x in images.items()}
    for output in (student["global"], teacher["global"]):
        for name in ("spatial", "spatial_valid"):
            output[name] = {"multispectral": permute(output[name]["multispectral"])}
    (got, _), _ = run(student, teacher, views, *heads, INDEX)
    assert_allclose(got, want, rtol=1e-5)


@functools.cache
def optical_alone(kind):
    return make_run(kind=kind)


@pytest.mark.parametrize("kind", ["dino", "infonce"])
def test_optical_alone_without_local_views(kind):
    config = settings(kind=kind)
    (loss, terms), gradients = optical_alone(kind)(
        *scene(("optical",), local=False), *heads_of(config, model_of("optical")), INDEX
    )
    assert np.isfinite(loss)
    assert set(terms["sums"]) == {
        f"{level}/{stream}" for level in ("pixel", "object", "image", "spread") for stream in ("optical", "fused")
    }
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_nothing_to_compare_is_zero_with_zero_gradients():
    student, teacher, views = scene()
    for name, output in student.items():
        for m in DATES:
            views[name][m]["student_valid"][:] = False
            output["spatial_valid"][m][:] = False
        output["fused_valid"][:] = False
    (loss, terms), gradients = compiled()(student, teacher, views, *heads_of(settings()), INDEX)
    assert loss == 0
    assert all(count == 0 for count in terms["counts"].values())
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradients))


def test_a_bad_record_leaves_no_trace_in_levels_and_alignment(result):
    """An empty sample stands in its place: whatever the encoder makes of it reaches nothing."""
    student, teacher, views = scene()
    heads = heads_of(settings())
    for name in ("global", "local"):
        for m in DATES:
            for key in ("valid", "student_valid"):
                views[name][m][key][1] = False
        for output in [outputs[name] for outputs in (student, teacher) if name in outputs]:
            for m in DATES:
                output["spatial_valid"][m][1] = False
            output["fused_valid"][1] = False
    (clean, terms), (gradient, _, by_head, _) = compiled()(student, teacher, views, *heads, INDEX)
    assert all(terms["counts"][k] < result[0][1]["counts"][k] for k in LEVELS)
    assert all(np.all(leaf[1] == 0) for leaf in jax.tree.leaves(gradient))
    for junk in (1e3, np.nan):
        for outputs in (student, teacher):
            for output in outputs.values():
                for x in (*output["spatial"].values(), output["fused"]):
                    x[1] = junk
        (spoilt, _), (_, _, by_head_spoilt, _) = compiled()(student, teacher, views, *heads, INDEX)
        assert_array_equal(spoilt, clean)
        jax.tree.map(assert_array_equal, by_head_spoilt, by_head)


def test_what_stands_in_the_place_of_a_missing_modality_changes_no_bit():
    """One site without radar, one whose student was not shown any: neither's radar features reach anything."""
    student, teacher, views = scene()
    for name, images in views.items():
        images["sar"]["valid"][1] = images["sar"]["student_valid"][1:3] = False
        student[name]["spatial_valid"]["sar"][1:3] = False
    teacher["global"]["spatial_valid"]["sar"][1] = False
    results = []
    for junk in (0.0, -1e4, np.nan):
        for name in views:
            student[name]["spatial"]["sar"][1:3] = junk
        teacher["global"]["spatial"]["sar"][1] = junk
        results.append(compiled()(student, teacher, views, *heads_of(settings()), INDEX))
    assert results[0][0][1]["counts"]["alignment/optical-sar"] > 0
    for result in results[1:]:
        jax.tree.map(assert_array_equal, result, results[0])


DEGENERATE = {
    "identical": lambda features: np.ones_like(features),
    "zero": np.zeros_like,
    "one direction": lambda features: features[..., :1] * np.ones_like(features),
    "enormous": lambda features: 1e15 * features,
}


@pytest.mark.parametrize("measured", ["everything", "one token", "nothing"])
@pytest.mark.parametrize("tokens", DEGENERATE)
@pytest.mark.parametrize("kind", ["dino", "infonce"])
def test_degenerate_tokens_give_finite_losses_and_gradients(kind, tokens, measured):
    """Whatever a network may come to: through clusters, heads, balancing and spread."""
    student, teacher, views = scene(("optical",), local=False)
    for output in (student["global"], teacher["global"]):
        output["spatial"]["optical"], output["fused"] = (
            DEGENERATE[tokens](x) for x in (output["spatial"]["optical"], output["fused"])
        )
        for valid in (output["spatial_valid"]["optical"], output["fused_valid"]):
            if measured != "everything":
                valid[:] = False
            if measured == "one token":
                valid[..., 1, 2] = True
    views["global"]["optical"]["student_valid"][:] = True
    views["global"]["to_view"][:] = [[1, 0, 0], [0, 1, 0]]
    heads = heads_of(settings(kind=kind), model_of("optical"))
    (loss, terms), gradients = optical_alone(kind)(student, teacher, views, *heads, INDEX)
    assert np.isfinite(loss)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((terms["sums"], gradients)))
    assert (terms["counts"]["object/optical"] > 0) == (measured != "nothing")


def test_a_level_of_weight_zero_has_neither_head_nor_term():
    config = settings(weights={"pixel": 0.0, "object": 0.0, "image": 1.0, "alignment": 0.0, "spread": 0.0})
    heads = init_heads(config, MODEL, jax.random.key(0))
    assert {stream: list(head) for stream, head in heads.items()} == {s: ["image"] for s in (*DATES, "fused")}
    run = functools.partial(objective, config, index=INDEX, seed=0, teacher_temperature=0.05)
    _, terms = jax.eval_shape(run, *scene(), heads, heads)
    assert set(terms["sums"]) == {f"image/{stream}" for stream in (*DATES, "fused")}


def test_teacher_temperature_is_a_cosine_over_the_steps():
    config = settings()
    for step in (0, 3, 10, 20):
        share = min(step / 10, 1)
        want = 0.07 + (0.04 - 0.07) * (1 + math.cos(math.pi * share)) / 2
        assert_allclose(teacher_temperature(config, step, 10), want, rtol=1e-5)
    assert_allclose(jax.jit(lambda s: teacher_temperature(config, s, 10))(jnp.int32(5)), 0.055, rtol=1e-5)


def test_every_head_of_the_sample_config_matches_one_rule_of_the_optimizer():
    path = pathlib.Path(__file__).parents[2] / "configs" / "pretrain_sample.py"
    spec = importlib.util.spec_from_file_location("pretrain_sample", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    heads = jax.eval_shape(lambda key: init_heads(config.objective, config.model, key), jax.random.key(0))
    names = ["heads/" + "/".join(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(heads)]
    for rules in (config.optimizer.learning_rate_multipliers, config.optimizer.weight_decay_multipliers):
        for name in names:
            assert sum(re.fullmatch(rule, name) is not None for rule, _ in rules) == 1, name


def test_heads_depend_on_their_name_alone():
    config = settings()
    both = init_heads(config, MODEL, jax.random.key(0))
    alone = init_heads(config, model_of("sar"), jax.random.key(0))
    jax.tree.map(assert_array_equal, both["sar"], alone["sar"])
    leaves = [np.asarray(head["pixel"]["classes"]) for name, head in both.items() if name != "alignment"]
    assert all(not np.array_equal(a, b) for i, a in enumerate(leaves) for b in leaves[:i])
