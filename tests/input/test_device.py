import jax
import ml_collections
import numpy as np
import pytest

from skyjax.input.device import measured, normalize, prepare

STRENGTHS = ("brightness", "contrast", "saturation", "blur", "solarize", "speckle", "gain")
AUGMENT = dict.fromkeys(STRENGTHS, 0.4)
TYPES = {"optical": np.uint8, "multispectral": np.uint16, "sar": np.float32}
STATISTICS = {
    m: (rng.uniform(50, 100, (2, 3)).astype(np.float32), rng.uniform(5, 30, (2, 3)).astype(np.float32))
    for m, rng in zip(TYPES, map(np.random.default_rng, range(3)), strict=True)
}


def images(rng, dtype, views, b=4, t=2, size=6):
    shape = (b, views, t, size, size, 3)
    values = rng.integers(0, 200, shape).astype(dtype)
    if dtype == np.float32:
        values[0, 0, 0, 1, 2, 1] = np.nan
    return {
        "values": values,
        "days": np.zeros(shape[:3], np.int32),
        "student_days": np.zeros(shape[:3], np.int32),
        "valid": rng.random(shape[:3]) < 0.8,
        "student_valid": np.zeros(shape[:3], bool),
        "clear": rng.random(shape[:-1]) < 0.8,
        "sensor": rng.integers(0, 2, b).astype(np.int32),
        "bands": rng.random((b, 3)) < 0.8,
    }


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    groups = {
        name: {"to_view": np.zeros((4, v, 2, 3), np.float32), **{m: images(rng, t, v) for m, t in TYPES.items()}}
        for name, v in (("global", 2), ("local", 3))
    }
    return {"index": np.array([7, 8, 9, 4_000_000_000], np.uint32), "bad": np.zeros(4, bool), **groups}


@pytest.fixture(scope="module")
def prepared():
    config = ml_collections.ConfigDict(AUGMENT)
    return jax.jit(lambda batch: prepare(batch, statistics=STATISTICS, augment=config, seed=3))


def normalized_by_loop(images, mean, std):
    want = np.zeros(images["values"].shape)
    for b, v, t, i, j, c in np.ndindex(want.shape):
        value = float(images["values"][b, v, t, i, j, c])
        if images["clear"][b, v, t, i, j] and images["valid"][b, v, t] and images["bands"][b, c] and np.isfinite(value):
            row = images["sensor"][b]
            want[b, v, t, i, j, c] = (value - float(mean[row, c])) / float(std[row, c])
    return want


def test_values_are_normalised_by_their_sensor_and_gaps_hold_the_mean(batch):
    for m in TYPES:
        images, (mean, std) = batch["global"][m], STATISTICS[m]
        got = np.asarray(normalize(images, mean, std))
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, normalized_by_loop(images, mean, std), rtol=1e-5, atol=1e-5)
        first = {k: x if k in ("sensor", "bands") else x[:, 0] for k, x in images.items()}
        np.testing.assert_array_equal(normalize(first, mean, std), got[:, 0])  # plain sequences, without views


@pytest.mark.parametrize("config", [None, ml_collections.ConfigDict(dict.fromkeys(AUGMENT, 0.0))])
def test_without_augmentation_it_is_pure_normalisation(batch, config):
    got = prepare(batch, statistics=STATISTICS, augment=config, seed=3)
    for group in ("global", "local"):
        for m in TYPES:
            np.testing.assert_array_equal(got[group][m]["values"], normalize(batch[group][m], *STATISTICS[m]))


def test_augmented_values_are_zero_where_nothing_was_measured(batch, prepared):
    got = prepared(batch)
    for group in ("global", "local"):
        for m in TYPES:
            values = np.asarray(got[group][m]["values"])
            gap = ~np.broadcast_to(measured(batch[group][m]), values.shape)
            assert gap.any()
            np.testing.assert_array_equal(values[gap], 0)
            assert np.isfinite(values).all()
            plain = np.asarray(normalize(batch[group][m], *STATISTICS[m]))
            assert np.allclose(values, plain, atol=1e-6) is (m == "multispectral")


def test_everything_but_the_values_passes_through(batch, prepared):
    got = prepared(batch)
    for m in TYPES:
        for key in set(batch["global"][m]) - {"values"}:
            np.testing.assert_array_equal(got["global"][m][key], batch["global"][m][key])
    np.testing.assert_array_equal(got["index"], batch["index"])
    assert set(got) == set(batch)


def test_a_sample_gets_the_same_pixels_at_any_place_of_any_batch(batch, prepared):
    order = np.array([2, 3, 0, 1])
    moved = jax.tree.map(lambda x: x[order], batch)
    alone = jax.tree.map(lambda x: x[3:], batch)
    want, got, single = prepared(batch), prepared(moved), prepared(alone)
    for group in ("global", "local"):
        for m in TYPES:
            values = np.asarray(want[group][m]["values"])
            np.testing.assert_allclose(got[group][m]["values"], values[order], rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(single[group][m]["values"], values[3:], rtol=1e-6, atol=1e-6)


def test_views_samples_and_seeds_draw_differently(batch):
    """SAR gain only: one number a view, read off as a difference in dB."""
    config = ml_collections.ConfigDict(dict.fromkeys(AUGMENT, 0.0) | {"gain": 2.0})
    full = jax.tree.map(np.copy, batch)
    for group in ("global", "local"):
        images = full[group]["sar"]
        images["valid"][:] = images["clear"][:] = images["bands"][:] = True
        images["values"] = np.nan_to_num(images["values"])

    def gains(seed):
        got = prepare(full, statistics=STATISTICS, augment=config, seed=seed)
        found = []
        for group in ("global", "local"):
            images = full[group]["sar"]
            std = STATISTICS["sar"][1][images["sensor"]][:, None, None, None, None]
            change = (np.asarray(got[group]["sar"]["values"]) - normalize(images, *STATISTICS["sar"])) * std
            found.append(np.asarray(change).mean(axis=(2, 3, 4, 5)))
            np.testing.assert_allclose(
                change, np.broadcast_to(found[-1][:, :, None, None, None, None], change.shape), atol=1e-3
            )
        return np.concatenate(found, axis=1)

    first, second = gains(0), gains(1)
    assert first.shape == (4, 5)
    assert len(np.unique(np.round(np.concatenate([first, second]), 3))) == 40
