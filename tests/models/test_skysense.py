import re

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from quick import quick_jit
from tiny_model import CONFIG, SIZES, changed, random_images, tiny

from skyjax.models import plain, skysense
from skyjax.models.parameters import table


@pytest.fixture(scope="module")
def model():
    config = tiny()
    params = quick_jit(lambda key: skysense.init(config, key))(jax.random.key(0))
    return config, params, quick_jit(lambda images: skysense.apply(config, params, images))


def test_output_is_as_agreed(model):
    _, _, run = model
    got = run(random_images())
    assert jax.tree.map(lambda x: (x.shape, x.dtype.name), got) == {
        "encoder": {
            "optical": ((2, 1, 2, 2, 16), "float32"),
            "multispectral": ((2, 3, 3, 3, 8), "float32"),
            "sar": ((2, 2, 3, 3, 8), "float32"),
        },
        "encoder_valid": {
            "optical": ((2, 1, 2, 2), "bool"),
            "multispectral": ((2, 3, 3, 3), "bool"),
            "sar": ((2, 2, 3, 3), "bool"),
        },
        "spatial": {m: ((2, dates, 6, 6, 16), "float32") for m, (dates, _) in SIZES.items()},
        "spatial_valid": {m: ((2, dates, 6, 6), "bool") for m, (dates, _) in SIZES.items()},
        "fused": ((2, 6, 6, 16), "float32"),
        "fused_valid": ((2, 6, 6), "bool"),
        "context": None,
        "pooled": ((2, 16), "float32"),
        "days": {m: ((2, dates), "int32") for m, (dates, _) in SIZES.items()},
    }
    assert all(valid.all() for valid in jax.tree.leaves([got["spatial_valid"], got["fused_valid"]]))
    assert_allclose(got["pooled"], np.asarray(got["fused"]).mean((1, 2)), atol=1e-6)


def test_every_parameter_has_one_rule_of_each_list(model):
    rows = table(model[1]).rows
    for rules in (CONFIG.optimizer.learning_rate_multipliers, CONFIG.optimizer.weight_decay_multipliers):
        for row in rows:
            assert sum(bool(re.fullmatch(rule, f"encoder/{row.path}")) for rule, _ in rules) == 1, row.path
    assert table(model[1]).parts.keys() == {"optical", "multispectral", "sar", "up_heads", "fusion"}


def test_parameters_are_born_from_shapes_alone(model):
    config, params, _ = model
    abstract = jax.eval_shape(lambda key: skysense.init(config, key), jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}
    assert not np.array_equal(params["multispectral"]["positions"], params["sar"]["positions"])  # a key each


def test_a_date_that_is_not_there_changes_nothing_else(model):
    _, _, run = model
    images = random_images()
    short = jax.tree.map(lambda x: x, images)
    short["sar"] = {name: x if name == "bands" else x[:, :1] for name, x in images["sar"].items()}
    valid = np.array([[True, False]] * 2)
    got, want = run(changed(images, "sar", valid=valid)), run(short)
    assert_allclose(got["fused"], want["fused"], atol=1e-5)
    assert_allclose(got["spatial"]["sar"][:, :1], want["spatial"]["sar"], atol=1e-5)
    assert not got["spatial_valid"]["sar"][:, 1].any()


def test_an_absent_modality_and_a_masked_one_are_the_same(model):
    _, _, run = model
    images = random_images()
    masked = changed(images, "sar", valid=np.zeros((2, 2), bool))
    without_bands = changed(images, "sar", bands=np.zeros((2, 2), bool))
    absent = {m: images[m] for m in ("optical", "multispectral")}
    want = run(absent)
    assert "sar" not in want["spatial"]
    for other in (masked, without_bands):
        assert_allclose(run(other)["fused"], want["fused"], atol=1e-5)


def test_masks_go_from_pixels_to_tokens_to_the_grid(model):
    _, _, run = model
    clear = np.ones((2, 3, 6, 6), bool)
    clear[0, 0, 0, 0] = False  # one of four pixels of a token
    clear[0, 1, 0, :2] = False  # two of four: still valid
    clear[0, 2, :2, 0] = False
    clear[0, 2, 0, 1] = False  # three of four: its clear pixel has no token
    optical = np.ones((2, 1, 16, 16), bool)
    optical[1, :, :8, :8] = False  # one of 2 x 2 cells
    images = changed(changed(random_images(), "multispectral", clear=clear), "optical", clear=optical)
    images = changed(images, "sar", valid=np.zeros((2, 2), bool))
    got = run(images)
    encoder = np.ones((3, 3, 3), bool)
    encoder[2, 0, 0] = False
    assert_array_equal(got["encoder_valid"]["multispectral"][0], encoder)
    cells = clear[0].copy()
    cells[2, :2, :2] = False
    assert_array_equal(got["spatial_valid"]["multispectral"][0], cells)
    assert_array_equal(got["encoder_valid"]["optical"][1, 0], [[False, True], [True, True]])
    near = np.asarray(got["spatial_valid"]["optical"][1, 0])
    assert not near[:2, :2].any()
    assert near[3:].all()
    assert near[:, 3:].all()
    one_date = {"values", "days", "valid", "clear"}
    alone = {"multispectral": {n: x[:, 2:] if n in one_date else x for n, x in images["multispectral"].items()}}
    got = run(alone)
    assert_array_equal(got["fused_valid"][0], cells[2])
    weights = cells[2] / cells[2].sum()
    assert_allclose(got["pooled"][0], np.einsum("hwd,hw->d", got["fused"][0], weights), atol=1e-6)


def test_nothing_valid_is_finite_and_marked(model):
    _, _, run = model
    images = {m: x | {"valid": np.zeros_like(x["valid"])} for m, x in random_images().items()}
    got = run(images)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
    assert not any(x.any() for x in jax.tree.leaves([got["encoder_valid"], got["spatial_valid"], got["fused_valid"]]))
    assert_array_equal(got["pooled"], 0)


def test_gradients_are_finite_where_nothing_is_valid(model):
    config, params, _ = model
    images = {m: x | {"valid": np.zeros_like(x["valid"])} for m, x in random_images().items()}

    @quick_jit
    @jax.grad
    def gradient(params):
        got = skysense.apply(config, params, images, key=jax.random.key(0))
        return sum(jnp.sum(x**2) for x in jax.tree.leaves([got["spatial"], got["fused"], got["pooled"]]))

    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient(params)))


def test_the_common_grid(model):
    config, params, run = model
    images = random_images(sizes={"optical": (1, 24), "sar": (2, 5)})
    assert run(images)["fused"].shape == (2, 3, 3, 16)  # optical cells of 8 pixels
    assert run({"sar": images["sar"]})["fused"].shape == (2, 5, 5, 16)  # cut from 3 tokens of 2 x 2 cells
    shapes = jax.eval_shape(lambda: skysense.apply(config, params, images, grid=(4, 7)))
    assert shapes["fused"].shape == (2, 4, 7, 16)
    alone = run({"optical": images["optical"]})
    assert_array_equal(alone["spatial"]["optical"], alone["encoder"]["optical"])


def test_a_site_of_three_cells_and_a_half_keeps_its_places(model):
    """28 pixels are 3.5 cells of 8; the fourth cell reaches over the edge, and must not shrink the site."""
    _, _, run = model
    images = random_images(sizes={"optical": (1, 28), "multispectral": (3, 7)})
    got = run(images)
    cells = np.asarray(got["encoder"]["optical"][:, 0])
    spatial = np.asarray(got["spatial"]["optical"][:, 0])
    assert spatial.shape == (2, 7, 7, 16)
    # The centre of grid cell 2 is (2 + 1/2) / 7 of the site = 1.25 cells: a quarter of the way from cell 0 to cell 1.
    want = 0.25 * cells[:, 0, 0] + 0.75 * cells[:, 1, 0]
    want = 0.25 * want + 0.75 * (0.25 * cells[:, 0, 1] + 0.75 * cells[:, 1, 1])
    assert_allclose(spatial[:, 2, 2], want, atol=1e-5)


def test_unknown_modalities_are_passed_over(model):
    config, params, run = model
    images = random_images()
    assert_array_equal(run(images | {"thermal": images["sar"]})["fused"], run(images)["fused"])
    with pytest.raises(ValueError, match=r"images has \['thermal'\], none of the model's modalities optical"):
        skysense.apply(config, params, {"thermal": images["sar"]})


def test_optical_may_be_a_vit():
    vit = CONFIG.model.modalities.sar.to_dict() | {
        "width": 8,
        "depth": 1,
        "heads": 2,
        "bands": ("red", "green", "blue"),
    }
    vit |= {"patch_size": 8, "image_size": 16, "up_factor": 2}
    config = tiny()
    config.modalities = ml_collections.ConfigDict({"optical": vit})
    images = random_images(sizes={"optical": (1, 16)})
    shapes = jax.eval_shape(lambda key: skysense.apply(config, skysense.init(config, key), images), jax.random.key(0))
    assert shapes["encoder"]["optical"].shape == (2, 1, 2, 2, 8)
    assert shapes["spatial"]["optical"].shape == (2, 1, 4, 4, 16)


def test_one_vit_without_up_head_and_fusion():
    """Then `spatial` is `encoder`, and `fused` is the mean of a place's valid dates."""
    config = tiny(**{"modalities.sar.up_factor": None, "modalities.sar.width": 16, "fusion": None})
    config.modalities = ml_collections.ConfigDict({"sar": config.modalities.sar.to_dict()})
    params = quick_jit(lambda key: skysense.init(config, key))(jax.random.key(0))
    assert params.keys() == {"sar"}
    images = random_images(sizes={"sar": (3, 6)})
    clear = np.random.default_rng(1).random((2, 3, 6, 6)) < 0.6
    clear[0, :, :2, :2] = False  # a place without any date
    images = changed(images, "sar", clear=clear)
    got = quick_jit(lambda images: skysense.apply(config, params, images))(images)
    assert_array_equal(got["spatial"]["sar"], got["encoder"]["sar"])
    assert_array_equal(got["spatial_valid"]["sar"], got["encoder_valid"]["sar"])
    valid = np.asarray(got["spatial_valid"]["sar"])
    assert not valid.all(axis=1).all()  # some dates are left out
    for i, row, column in np.ndindex(2, 3, 3):
        seen = np.float64(got["spatial"]["sar"][i, :, row, column])[valid[i, :, row, column]]
        want = seen.mean(0) if len(seen) else np.zeros(16)
        assert_allclose(got["fused"][i, row, column], want, atol=1e-6)
    assert_array_equal(got["fused_valid"], valid.any(axis=1))


PROTOTYPES = {"regions": 4, "count": 3, "width": 8, "momentum": 0.9, "epsilon": 0.05, "iterations": 3, "frozen": False}


def with_prototypes(config):
    config = config.copy_and_resolve_references()
    with config.unlocked(), config.ignore_type():
        config.prototypes = ml_collections.ConfigDict(PROTOTYPES)
    return config


def test_context_is_there_where_config_and_caller_have_prototypes(model):
    """It tells two regions apart; a place whose position is unknown has context too, of its features alone."""
    plain = model[0]
    config = with_prototypes(plain)
    params = quick_jit(lambda key: skysense.init(config, key))(jax.random.key(0))
    assert jax.tree.map(jnp.shape, params["prototypes"]) == {
        "query": {"kernel": (16, 8), "bias": (8,)},
        "out": {"kernel": (24, 16), "bias": (16,)},
    }
    prototypes = skysense.init_prototypes(config, jax.random.key(1))
    assert (prototypes.shape, prototypes.dtype) == ((16, 3, 8), jnp.float32)
    assert_allclose(prototypes.std(), 1, atol=0.1)

    @quick_jit
    def encode(images, lonlat):
        return skysense.apply(config, params, images, lonlat=lonlat, prototypes=prototypes)

    images = random_images()
    images = jax.tree.map(lambda x: np.repeat(x[:1], 2, axis=0), images)  # one site twice
    got = encode(images, np.array([[10, 10], [-100, 10]], np.float32))
    assert (got["context"].shape, got["context"].dtype) == (got["fused"].shape, got["fused"].dtype)
    assert np.abs(got["context"][0] - got["context"][1]).max() > 1e-3
    unknown = encode(images, np.full((2, 2), np.nan, np.float32))["context"]
    kernel, bias = (np.asarray(params["prototypes"]["out"][name]) for name in ("kernel", "bias"))
    assert_allclose(unknown, np.asarray(got["fused"]) @ kernel[:16] + bias, atol=1e-5)

    assert_array_equal(encode(images, None)["context"], unknown)
    assert jax.eval_shape(lambda: skysense.apply(config, params, images))["context"] is None
    # Dropped: the same parameters, and a config without.
    want = quick_jit(lambda images: skysense.apply(plain, params, images))(images)
    assert want["context"] is None
    assert_allclose(got["fused"], want["fused"], atol=1e-5)
    assert skysense.init_prototypes(plain, jax.random.key(1)) is None
    with pytest.raises(
        ValueError, match=r"prototypes has the shape \(9, 3, 8\); model.prototypes asks for \(16, 3, 8\)"
    ):
        jax.eval_shape(lambda: skysense.apply(config, params, images, prototypes=prototypes[:9]))


def test_prototypes_of_a_model_without_fusion_are_as_wide_as_its_maps():
    config = with_prototypes(tiny(**{"fusion": None, "modalities": {}}))
    config.modalities = ml_collections.ConfigDict({"optical": tiny().modalities.optical.to_dict()})
    shapes = jax.eval_shape(lambda key: skysense.init(config, key), jax.random.key(0))
    assert shapes["prototypes"]["out"]["kernel"].shape == (16 + 8, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"fusion": None},
            r"fusion is None, which goes with one modality only; .* has \['multispectral', 'optical', 'sar'\]",
        ),
        ({"modalities.sar.up_factor": None}, r"modalities.sar: .* no up-head, so width 8 must equal .* which is 16"),
        ({"spatial_width": 24}, r"modalities.optical: width 8 in 2 stages of depths ends at 16.*spatial_width is 24"),
        ({"modalities.sar.up_factor": 3}, r"modalities.sar: up_factor 3 must divide patch_size 2"),
        ({"modalities.sar.kind": "cnn"}, r'modalities.sar.kind is "cnn"'),
        ({"modalities.lidar": {}}, r"model.modalities has \['lidar'"),
    ],
)
def test_contradicting_configs_are_named(changes, message):
    config = tiny()
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict({k: v for k, v in changes.items() if k != "modalities.lidar"})
        if "modalities.lidar" in changes:
            config.modalities.lidar = ml_collections.ConfigDict()
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda key: skysense.init(config, key), jax.random.key(0))


def test_bfloat16_computes_near_float32(model):
    _, params, run = model
    config = tiny(dtype="bfloat16")
    images = random_images()
    got = quick_jit(lambda images: skysense.apply(config, params, images))(images)
    assert got["fused"].dtype == got["spatial"]["optical"].dtype == jnp.bfloat16
    assert got["pooled"].dtype == jnp.float32
    want = run(images)
    for name in ("fused", "pooled"):
        difference = np.asarray(got[name], np.float32) - want[name]
        assert np.abs(difference).max() < 0.05 * np.abs(want[name]).max()


def test_features_of_the_untrained_net_tell_samples_apart(model):
    _, _, run = model
    got = run(random_images(batch=12))
    features = {m: np.asarray(x).reshape(-1, 16) for m, x in got["spatial"].items()}
    features |= {"fused": np.asarray(got["fused"]).reshape(-1, 16), "pooled": np.asarray(got["pooled"])}
    for name, x in features.items():
        values = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2
        shares = values / values.sum()
        # Effective rank: over ten keys 3.3 to 5.3 of the pooled features, 5 to 11 of the others.
        assert np.exp(-(shares * np.log(shares + 1e-12)).sum()) > 2.5, name


def test_dates_of_a_sequence_are_encoded_one_by_one(model):
    _, _, run = model
    images = random_images()
    want = run(images)["spatial"]["sar"]
    order = {name: x if name == "bands" else x[:, ::-1] for name, x in images["sar"].items()}
    assert_allclose(run(images | {"sar": order})["spatial"]["sar"], want[:, ::-1], atol=1e-5)


def test_the_structure_is_made_once_a_config(model):
    config, params, _ = model
    images = random_images()
    plain._structure.cache_clear()
    for _ in range(2):
        jax.eval_shape(lambda: skysense.apply(config, params, images))
    assert plain._structure.cache_info().misses == 1


def test_parameters_at_the_published_size():
    """Counts of the published modules (Swin-V2-Huge, two ViT-L, up-heads, fusion); the table of dates is ours.

    The paper gives 215 million to the geo-prototypes: 4096 x 100 x 512 and 4 per cent of projections.
    """
    config = tiny(spatial_width=2816, scan=True)
    vit = {"patch_size": 4, "image_size": 64, "width": 1024, "depth": 24, "heads": 16, "up_factor": 4}
    for m, bands in (("multispectral", 10), ("sar", 2)):
        config.modalities[m].update(vit | {"bands": tuple(map(str, range(bands)))})
    config.modalities.optical.update({"width": 352, "depths": (2, 2, 18, 2), "heads": (8, 16, 32, 64), "window": 8})
    config.fusion.update({"width": 1024, "depth": 24, "heads": 16})
    config = with_prototypes(config)
    config.prototypes.update({"regions": 64, "count": 100, "width": 512})
    prototypes = jax.eval_shape(lambda key: skysense.init_prototypes(config, key), jax.random.key(0))
    assert prototypes.shape == (4096, 100, 512)
    params = jax.eval_shape(lambda key: skysense.init(config, key), jax.random.key(0))
    assert table(params).parts == {
        "optical": 655_074_704,
        "multispectral": 302_738_432,
        "sar": 302_607_360,
        "up_heads": 2 * 46_182_400,
        "fusion": 305_195_008 + 366 * 2816,
        "prototypes": (1024 + 1) * 512 + (1024 + 512 + 1) * 1024,
    }
