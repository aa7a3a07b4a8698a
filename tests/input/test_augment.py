import jax
import ml_collections
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.optimize import minimize_scalar

from skyjax.errors import UserError
from skyjax.input.augment import BLUR, augment, check

OFF = {
    "brightness": 0.0,
    "band_gain": 0.0,
    "contrast": 0.0,
    "saturation": 0.0,
    "blur": 0.0,
    "solarize": 0.0,
    "speckle": 0.0,
    "gain": 0.0,
}
MEAN, STD = np.array([100.0, 80.0, 60.0], np.float32), np.array([50.0, 40.0, 20.0], np.float32)


def pixels(t=2, size=16, cloudy=0.0, seed=0):
    rng = np.random.default_rng(seed)
    mask = np.broadcast_to(rng.random((t, size, size, 1)) >= cloudy, (t, size, size, 3))
    return np.where(mask, rng.normal(size=(t, size, size, 3)), 0).astype(np.float32), mask


def run(modality, values, mask, keys=1, **strengths):
    """Results for some keys, with all but the named strengths off; values as given for unclear pixels too."""
    config = ml_collections.ConfigDict(OFF | strengths)
    function = jax.jit(jax.vmap(lambda key: augment(modality, key, values, mask, MEAN, STD, config)))
    return np.asarray(function(jax.random.split(jax.random.key(0), keys)))


@pytest.mark.parametrize("modality", ["optical", "multispectral", "sar"])
def test_everything_off_leaves_every_bit(modality):
    values, mask = pixels(cloudy=0.3)
    np.testing.assert_array_equal(run(modality, values, mask)[0], values)


@pytest.mark.parametrize(("modality", "changed"), [("optical", True), ("multispectral", False), ("sar", True)])
def test_which_modality_is_changed_and_gaps_stay_zero(modality, changed):
    values, mask = pixels(cloudy=0.3)
    on = dict.fromkeys(OFF, 0.5) | {"blur": 1.0, "solarize": 1.0}
    for got in run(modality, values, mask, keys=3, **on):
        assert bool(np.abs(got - values).max() > 0.05) is changed
        np.testing.assert_array_equal(got[~mask], 0)
        assert np.isfinite(got).all()


@pytest.mark.parametrize("modality", ["optical", "sar"])
def test_nothing_measured_stays_nothing(modality):
    on = dict.fromkeys(OFF, 0.5) | {"blur": 1.0, "solarize": 1.0}
    got = run(modality, np.zeros((1, 4, 4, 3), np.float32), np.zeros((1, 4, 4, 3), bool), **on)
    np.testing.assert_array_equal(got, 0)


def test_brightness_is_a_gain_of_the_stored_values():
    values, mask = pixels()
    factors = []
    for got in run("optical", values, mask, keys=40, brightness=0.3):
        ratio = (got * STD + MEAN) / (values * STD + MEAN)
        np.testing.assert_allclose(ratio, np.median(ratio), rtol=2e-3)
        factors.append(np.median(ratio))
    assert 0.7 <= min(factors) < 0.8
    assert 1.2 < max(factors) <= 1.3


def test_band_gain_is_one_gain_of_the_stored_values_a_band():
    values, mask = pixels()
    factors = []
    for got in run("optical", values, mask, keys=40, band_gain=0.2):
        ratio = (got * STD + MEAN) / (values * STD + MEAN)
        np.testing.assert_allclose(ratio, np.broadcast_to(np.median(ratio, (0, 1, 2)), ratio.shape), rtol=2e-3)
        factors.append(np.median(ratio, (0, 1, 2)))
    assert 0.8 <= np.min(factors) < 0.83
    assert 1.17 < np.max(factors) <= 1.2
    assert np.abs(np.corrcoef(np.transpose(factors))[np.triu_indices(3, 1)]).max() < 0.5  # bands draw for themselves


def test_contrast_stretches_about_the_mean_of_what_is_clear():
    values, mask = pixels(cloudy=0.4)
    for got in run("optical", values, mask, keys=5, contrast=0.4):
        for date, before, seen in zip(got, values, mask, strict=True):
            centre = before[seen].mean()
            np.testing.assert_allclose(date[seen].mean(), centre, atol=1e-5)
            ratio = (date[seen] - centre) / (before[seen] - centre)
            np.testing.assert_allclose(ratio, np.median(ratio), atol=2e-2)
            assert 0.6 <= np.median(ratio) <= 1.4


def test_saturation_moves_along_the_grey_of_each_pixel():
    values, mask = pixels()
    for got in run("optical", values, mask, keys=5, saturation=0.5):
        grey = values.mean(-1, keepdims=True)
        np.testing.assert_allclose(got.mean(-1, keepdims=True), grey, atol=1e-5)
        factor = (got - grey).std() / (values - grey).std()
        np.testing.assert_allclose(got - grey, factor * (values - grey), atol=1e-4)
        assert 0.5 <= factor <= 1.5


def test_solarisation_turns_what_is_brighter_than_the_mean_with_its_probability():
    values, mask = pixels(size=4)
    turned = 0
    for got in run("optical", values, mask, keys=200, solarize=0.25):
        if not np.array_equal(got, values):
            np.testing.assert_array_equal(got, np.where(values > 0, -values, values))
            turned += 1
    assert 30 < turned < 70


def test_blur_is_a_gaussian_of_what_was_measured():
    """Against scipy's filter of the masked image and of the mask, away from the border: scipy treats it otherwise."""
    values, mask = pixels(t=1, size=32, cloudy=0.3)
    (got,) = run("optical", values, mask, blur=1.0)
    inside = (slice(None), slice(9, -9), slice(9, -9))

    def want(sigma):
        def smooth(x):
            return gaussian_filter(x.astype(float), (0, sigma, sigma, 0), truncate=9, mode="constant")

        return np.where(mask, smooth(values * mask) / np.maximum(smooth(mask), 1e-9), 0)

    def error(sigma):
        return np.abs(want(sigma)[inside] - got[inside]).max()

    coarse = min(np.linspace(*BLUR, 100), key=error)
    fitted = minimize_scalar(error, bounds=(coarse - 0.02, coarse + 0.02), method="bounded", options={"xatol": 1e-7})
    assert fitted.fun < 1e-4
    assert error(fitted.x + 0.05) > 1e-3


def test_blur_keeps_a_flat_image_flat_up_to_its_clouds_and_border():
    _, mask = pixels(cloudy=0.5)
    got = run("optical", np.where(mask, 1.5, 0).astype(np.float32), mask, keys=3, blur=1.0)
    np.testing.assert_allclose(got[:, mask], 1.5, rtol=1e-5)


def test_gain_is_one_constant_in_decibels_for_all_dates_and_bands():
    values, mask = pixels()
    gains = []
    for got in run("sar", values, mask, keys=40, gain=2.0):
        decibels = (got - values) * STD
        np.testing.assert_allclose(decibels, decibels.mean(), atol=1e-4)
        gains.append(decibels.mean())
    assert -2 <= min(gains) < -1.5
    assert 1.5 < max(gains) <= 2


def test_speckle_has_the_asked_spread_in_decibels_and_no_pattern():
    values, mask = pixels(t=3, size=32)
    (got,) = run("sar", values, mask, speckle=1.5)
    decibels = (got - values) * STD
    np.testing.assert_allclose(decibels.std(axis=(0, 1, 2)), 1.5, rtol=0.06)
    np.testing.assert_allclose(decibels.mean(), 0, atol=0.08)
    correlation = np.corrcoef(decibels.reshape(-1, 3).T) - np.eye(3)
    assert np.abs(correlation).max() < 0.1


def test_strengths_out_of_range_are_refused():
    check(ml_collections.ConfigDict(OFF))
    for key, value in (("blur", 1.2), ("brightness", -0.1), ("speckle", -1.0)):
        with pytest.raises(UserError, match=rf"data.augment.{key} is {value}"):
            check(ml_collections.ConfigDict(OFF | {key: value}))


def test_keys_are_not_shared_between_draws():
    """Contrast and saturation of the same view would be one number if a key were used twice."""
    values, mask = pixels(t=1, size=4)
    keys = 60
    contrast = run("optical", values, mask, keys=keys, contrast=0.5)
    saturation = run("optical", values, mask, keys=keys, saturation=0.5)
    grey = values.mean(-1, keepdims=True)
    stretch = (contrast - values.mean()).std(axis=(1, 2, 3, 4)) / (values - values.mean()).std()
    spread = (saturation - grey).std(axis=(1, 2, 3, 4)) / (values - grey).std()
    assert abs(np.corrcoef(stretch, spread)[0, 1]) < 0.5
