"""What is not there changes nothing: dates, modalities, pixels and bands, through the whole encoder."""

import datetime

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from quick import quick_jit
from tiny_model import changed, random_images, tiny

from skyjax.models import skysense

CAPACITY = {"optical": (2, 12), "multispectral": (4, 6), "sar": (3, 6)}  # dates, pixels
GRID = (6, 6)
BATCH = 3
BY_DATE = ("values", "days", "valid", "clear")
JUNK = np.array([np.nan, np.inf, -np.inf, 3e38, -1e30], np.float32)
ANY_DAY = st.integers(-(2**31), 2**31 - 1)

SEEDS = st.integers(0, 2**32 - 1)
few = settings(max_examples=25, deadline=None)


@pytest.fixture(scope="module")
def params():
    made = quick_jit(lambda key: skysense.init(tiny(), key))(jax.random.key(0))
    made["fusion"]["dates"] = made["fusion"]["dates"] * 50  # so that a wrong date shows
    return made


@pytest.fixture(scope="module")
def run(params):
    return quick_jit(lambda images: skysense.apply(tiny(), params, images, grid=GRID))


def random_site(seed, batch=BATCH, sizes=CAPACITY):
    """Images whose dates, pixels and bands are missing at random: some, most or none of a modality's."""
    rng = np.random.default_rng(seed)
    images = random_images(batch, sizes, seed % 1000)
    for m, x in images.items():
        for name, least in (("valid", 0.0), ("clear", 0.0), ("bands", 0.5)):
            images = changed(images, m, **{name: rng.random(x[name].shape) < rng.uniform(least, 1.2)})
    return images


def take(images, index):
    """Dates of every sample: modality -> (b, n) positions."""

    def one(m, name, x):
        return x[np.arange(len(x))[:, None], index[m]] if name in BY_DATE else x

    return {m: {name: one(m, name, x) for name, x in images[m].items()} for m in index}


def features(output):
    """All that is computed: without what is handed through."""
    return {name: part for name, part in output.items() if name != "days"}


def assert_finite_and_marked(output):
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(features(output)))
    empty = ~np.asarray(output["fused_valid"]).any((1, 2))
    assert_array_equal(np.asarray(output["pooled"])[empty], 0)


@few
@given(SEEDS, ANY_DAY)
def test_junk_under_any_mask_changes_no_bit(run, seed, day):
    images, rng = random_site(seed), np.random.default_rng(seed)
    junk = images
    for m, x in images.items():
        seen = (x["clear"] & x["valid"][..., None, None])[..., None] & x["bands"][:, None, None, None]
        values = np.where(seen, x["values"], rng.choice(JUNK, x["values"].shape))
        junk = changed(junk, m, values=values, days=np.where(x["valid"], x["days"], np.int32(day)))
    got, want = run(junk), run(images)
    jax.tree.map(assert_array_equal, features(got), features(want))
    assert_finite_and_marked(got)


@few
@given(SEEDS)
def test_dates_may_come_in_any_order(run, seed):
    images, rng = random_site(seed), np.random.default_rng(seed)
    order = {m: np.argsort(rng.random(x["days"].shape)) for m, x in images.items()}
    got, want = run(take(images, order)), run(images)
    for name in ("fused", "fused_valid", "pooled"):
        assert_allclose(got[name], want[name], atol=3e-5)
    for m in CAPACITY:
        moved = np.asarray(want["spatial"][m])[np.arange(BATCH)[:, None], order[m]]
        assert_allclose(got["spatial"][m], moved, atol=3e-5)


@few
@given(SEEDS, SEEDS)
def test_other_samples_of_the_batch_do_not_matter(run, seed, other):
    images, others = random_site(seed), random_site(other)
    mixed = jax.tree.map(lambda x, y: np.concatenate([y[:1], x[1:2], y[2:]]), images, others)
    got, want = run(mixed), run(images)
    jax.tree.map(lambda a, b: assert_allclose(a[1], b[1], atol=1e-5), got, want)


def test_a_sample_alone_is_as_among_others(run):
    images = random_site(5)
    got = run(jax.tree.map(lambda x: x[1:2], images))
    jax.tree.map(lambda a, b: assert_allclose(a, b[1:2], atol=1e-5), got, run(images))


@pytest.mark.parametrize("dates", [{"optical": 1, "multispectral": 3, "sar": 2}, {"multispectral": 1, "sar": 3}])
def test_any_number_of_dates_is_as_if_there_were_no_padding(run, dates):
    images, rng = random_images(BATCH, CAPACITY), np.random.default_rng(0)
    kept = {m: np.argsort(rng.random(x["days"].shape))[:, : dates.get(m, 0)] for m, x in images.items()}
    padded = images
    for m, x in images.items():
        valid = np.zeros(x["valid"].shape, bool)
        np.put_along_axis(valid, kept[m], True, axis=1)
        values = np.where(valid[..., None, None, None], x["values"], np.nan)
        padded = changed(padded, m, valid=valid, values=values)
    got, want = run(padded), run(take(images, {m: kept[m] for m in dates}))
    for name in ("fused", "fused_valid", "pooled"):
        assert_allclose(got[name], want[name], atol=3e-5)
    for m in dates:
        real = np.asarray(got["spatial"][m])[np.arange(BATCH)[:, None], kept[m]]
        assert_allclose(real, want["spatial"][m], atol=3e-5)


@pytest.mark.parametrize("alone", CAPACITY)
@pytest.mark.parametrize("mask", ["valid", "clear", "bands"])
def test_a_single_modality_is_as_with_the_others_masked(run, alone, mask):
    images = random_site(4)
    images = changed(
        images, alone, clear=np.ones_like(images[alone]["clear"]), valid=np.ones_like(images[alone]["valid"])
    )
    masked = images
    for m in set(CAPACITY) - {alone}:
        masked = changed(masked, m, **{mask: np.zeros_like(images[m][mask])})
    got, want = run(masked), run({alone: images[alone]})
    assert list(want["spatial"]) == [alone]
    for name in ("fused", "fused_valid", "pooled"):
        assert_allclose(got[name], want[name], atol=3e-5)
    assert want["fused_valid"].any()


@few
@given(SEEDS)
def test_an_empty_site_among_others_is_finite_and_marked(run, seed):
    images = random_site(seed)
    for m, x in images.items():
        mask = ("valid", "clear", "bands")[seed % 3]
        images = changed(images, m, **{mask: x[mask] & (np.arange(BATCH) != 1).reshape(-1, *(1,) * (x[mask].ndim - 1))})
    got = run(images)
    assert_finite_and_marked(got)
    assert not np.asarray(got["fused_valid"][1]).any()
    assert not any(np.asarray(valid[1]).any() for valid in got["spatial_valid"].values())
    assert_array_equal(got["pooled"][1], 0)


def test_gradients_are_finite_with_junk_under_the_masks(params):
    images = random_site(1, sizes={"optical": (1, 8), "multispectral": (2, 4)})
    for m, x in images.items():
        seen = (x["clear"] & x["valid"][..., None, None])[..., None] & x["bands"][:, None, None, None]
        seen[0] = False
        images = changed(images, m, values=np.where(seen, x["values"], np.nan), clear=x["clear"] & seen.any(-1))
    values = {m: x["values"] for m, x in images.items()}

    @quick_jit
    def gradients(params, values):
        def loss(params, values):
            got = skysense.apply(tiny(), params, {m: images[m] | {"values": x} for m, x in values.items()})
            return sum((x**2).sum() for x in jax.tree.leaves([got["spatial"], got["fused"], got["pooled"]]))

        return jax.grad(loss, argnums=(0, 1))(params, values)

    by_params, by_values = gradients(params, values)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves([by_params, by_values]))
    for m, x in values.items():
        assert_array_equal(np.asarray(by_values[m])[np.isnan(x)], 0)


def test_each_valid_date_takes_its_own_row_of_the_calendar(params):
    """Leap days, the last of December, before 1970 and after 2100, against Python's calendar."""
    dates = [
        [datetime.date(*date) for date in row]
        for row in (
            [(2020, 12, 31), (2019, 12, 31), (2020, 2, 29), (2019, 3, 1)],
            [(1900, 3, 2), (1968, 12, 31), (2104, 2, 29), (2401, 5, 5)],
            [(2000, 6, 6), (2000, 7, 7), (2000, 8, 8), (2000, 9, 9)],
        )
    ]
    days = np.array([[(date - datetime.date(1970, 1, 1)).days for date in row] for row in dates], np.int32)
    images = random_images(BATCH, {"multispectral": (4, 6)})
    valid, clear = images["multispectral"]["valid"], images["multispectral"]["clear"]
    valid[2, 0] = False  # no date
    clear[2, 1] = False  # nothing but cloud
    clear[2, 2, :, :5] = False  # a clear edge

    @quick_jit
    @jax.grad
    def gradient(table, images):
        got = skysense.apply(tiny(), params | {"fusion": params["fusion"] | {"dates": table}}, images)
        return (got["fused"] ** 2 * got["fused_valid"][..., None]).sum()

    table = params["fusion"]["dates"]
    rows = np.flatnonzero(np.any(gradient(table, changed(images, "multispectral", days=days)), axis=1))
    seen = [*dates[0], *dates[1], *dates[2][2:]]
    assert_array_equal(rows, sorted({date.timetuple().tm_yday - 1 for date in seen}))
    assert rows.max() == 365


def test_bfloat16_is_near_float32_under_masks(params, run):
    config = tiny(dtype="bfloat16")
    images = random_site(2)
    got, want = quick_jit(lambda images: skysense.apply(config, params, images, grid=GRID))(images), run(images)
    assert_finite_and_marked(got)
    for name in ("spatial_valid", "fused_valid"):
        jax.tree.map(assert_array_equal, got[name], want[name])
    for name in ("fused", "pooled"):
        difference = np.abs(np.asarray(got[name], np.float32) - want[name])
        assert difference.max() < 0.05 * np.abs(want[name]).max()


def test_four_and_five_optical_channels(params):
    """A model of more bands, of which three are there, is the model of three: a missing band adds nothing."""
    images = random_images(BATCH, {"optical": (1, 12)})
    embedding = params["optical"]["patch_embed"]
    want = quick_jit(lambda images: skysense.apply(tiny(), params, images))(images)
    for count in (4, 5):
        config = tiny(**{"modalities.optical.bands": tuple("abcde"[:count])})
        # Three bands of `count` are scaled up by count / 3.
        kernel = np.full((4, 4, count, 8), 7, np.float32)
        kernel[:, :, :3] = np.asarray(embedding["kernel"]) * 3 / count
        own = params | {"optical": params["optical"] | {"patch_embed": embedding | {"kernel": kernel}}}
        values = np.full((BATCH, 1, 12, 12, count), np.nan, np.float32)
        values[..., :3] = images["optical"]["values"]
        more = changed(images, "optical", values=values, bands=np.tile(np.arange(count) < 3, (BATCH, 1)))
        got = quick_jit(lambda images, config=config, own=own: skysense.apply(config, own, images))(more)
        assert_allclose(got["fused"], want["fused"], atol=1e-4)


@pytest.mark.parametrize(
    ("optical", "multispectral", "sar"),
    [((1, 1), (7, 3), (1, 2)), ((40, 17), (1, 1), (3, 5))],
)
def test_images_of_any_size(params, optical, multispectral, sar):
    """Not whole patches, nor whole windows; what stands beyond the edge, marked as not clear, changes no token."""
    sizes = {"optical": optical, "multispectral": multispectral, "sar": sar}
    square = random_images(2, {m: (2, max(size)) for m, size in sizes.items()})
    images = {}
    for m, (h, w) in sizes.items():
        x = square[m]
        images[m] = x | {"values": x["values"][:, :, :h, :w], "clear": x["clear"][:, :, :h, :w]}
    run = quick_jit(lambda images: skysense.apply(tiny(), params, images, grid=multispectral))
    got = run(images)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
    assert got["fused"].shape == (2, *multispectral, 16)
    assert np.asarray(got["fused_valid"]).all()
    assert all(np.asarray(valid).all() for valid in got["spatial_valid"].values())
    padded = {}
    for m, x in images.items():
        patch = 4 if m == "optical" else 2
        pad = [(0, 0), (0, 0), *((0, -size % patch) for size in sizes[m])]
        values = np.pad(x["values"], [*pad, (0, 0)], constant_values=np.nan)
        padded[m] = x | {"values": values, "clear": np.pad(x["clear"], pad)}
    more = run(padded)
    for m in sizes:
        assert_allclose(more["encoder"][m], got["encoder"][m], atol=1e-5)
