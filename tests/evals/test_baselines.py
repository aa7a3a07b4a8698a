import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from skyjax.evals.baselines import (
    STATISTICS,
    convolve,
    fill,
    finite_mean,
    image_statistics,
    random_convolution,
)
from skyjax.sample import Sample, make_sequence

NOWHERE = np.full(2, np.nan, np.float32)


def sample(values, clear=None, sensor="rgb", bands=("red", "green", "blue")):
    values = np.asarray(values)
    sequence = make_sequence(values, sensor, bands, days=np.arange(len(values)), clear=clear)
    return Sample({"optical": sequence}, NOWHERE)


def picture(seed, size=16, dates=1, bands=3):
    return np.random.default_rng(seed).integers(0, 256, (dates, size, size, bands), np.uint8)


def test_statistics_of_a_band_by_hand():
    values = picture(0)
    clear = np.random.default_rng(1).random((1, 16, 16)) < 0.7
    got = image_statistics([sample(values)])([sample(values, clear)]).reshape(3, STATISTICS)
    image, seen = values[0].astype(float), clear[0]
    for band in range(3):
        pixels = sorted(image[i, j, band] for i in range(16) for j in range(16) if seen[i, j])
        down = [
            abs(image[i + 1, j, band] - image[i, j, band])
            for i in range(15)
            for j in range(16)
            if seen[i, j] and seen[i + 1, j]
        ]
        across = [
            abs(image[i, j + 1, band] - image[i, j, band])
            for i in range(16)
            for j in range(15)
            if seen[i, j] and seen[i, j + 1]
        ]
        want = [np.mean(pixels), np.std(pixels), *np.percentile(pixels, [5, 25, 50, 75, 95])]
        want += [np.mean(down), np.std(down), np.mean(across), np.std(across)]
        assert_allclose(got[band], want, rtol=1e-4)


def test_bands_meet_by_name_and_what_is_missing_is_the_mean():
    four = sample(picture(0, bands=4), sensor="aerial", bands=("nir", "red", "green", "blue"))
    three = sample(picture(1))
    features = image_statistics([three, four])([three, four]).reshape(2, 4, STATISTICS)
    assert np.isnan(features[0, 3]).all()  # rgb has no nir
    assert np.isfinite(features[0, :3]).all()
    assert_allclose(features[1, 3, 0], four.sequences["optical"].values[..., 0].mean(), rtol=1e-5)
    flat = features.reshape(2, -1)
    filled = fill(flat, finite_mean(flat))
    assert_allclose(filled[0, 3 * STATISTICS :], flat[1, 3 * STATISTICS :], rtol=1e-6)


def test_nan_pixels_are_left_out_and_nothing_seen_is_missing():
    values = picture(0).astype(np.float32)
    holes = values.copy()
    holes[:, :4] = np.nan
    extract = image_statistics([sample(values)])
    want = extract([sample(values[:, 4:])])
    assert_allclose(extract([sample(holes)]), want, rtol=1e-5)
    assert np.isnan(extract([sample(np.full_like(values, np.nan))])).all()


@pytest.mark.parametrize("block", [13, 2048])
def test_the_convolution_is_xlas(block, monkeypatch):
    monkeypatch.setattr("skyjax.evals.baselines._BLOCK", block)
    convolve.clear_cache()  # the block is part of the program
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, 12, 10, 2)).astype(np.float32)
    kernel = rng.normal(size=(5, 5, 2, 6)).astype(np.float32)
    offset = rng.normal(size=6).astype(np.float32)
    response = np.asarray(
        jax.lax.conv_general_dilated(images, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    )
    response = response - offset
    want = [np.maximum(response - 0.5, 0).mean((1, 2)), np.maximum(-response - 0.5, 0).mean((1, 2))]
    got = convolve(jnp.asarray(images), jnp.asarray(kernel), jnp.asarray(offset))
    assert_allclose(got, np.concatenate(want, axis=1), rtol=1e-4, atol=1e-4)


def test_filters_see_whitened_patches():
    """Over the images that they come from, responses are about as large in every direction: no filter is dead."""
    train = [sample(picture(i) // 4 + 60) for i in range(20)]
    features = random_convolution(train, filters=16)(train)
    assert features.shape == (20, 32)
    assert np.isfinite(features).all()
    assert (features.mean(0) > 1e-3).all()
    assert features.mean(0).max() < 20 * features.mean(0).min()


def test_a_sample_of_two_dates_is_the_mean_of_its_dates():
    dates = picture(3, dates=2)
    extract = random_convolution([sample(picture(i)) for i in range(4)], filters=8)
    both, first, second = extract([sample(dates), sample(dates[:1]), sample(dates[1:])])
    assert_allclose(both, (first + second) / 2, rtol=1e-4)


def test_small_images_get_small_filters_and_absent_modalities_are_missing():
    train = [sample(picture(i, size=6)) for i in range(4)]
    features = random_convolution(train, filters=8)([train[0], Sample({}, NOWHERE)])
    assert np.isfinite(features[0]).all()
    assert np.isnan(features[1]).all()
