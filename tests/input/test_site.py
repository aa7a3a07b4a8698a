"""Whole sites for encoding: the shared ground, at native pixels, with every valid date."""

import dataclasses

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from skyjax.errors import UserError
from skyjax.input.site import site_images
from skyjax.sample import Sample, Sequence

SENSORS = {"optical": ("aerial", "rgb"), "multispectral": ("sentinel2-l2a",)}
BANDS = {"optical": ("red", "green", "blue"), "multispectral": ("B04", "B08", "B11")}


def sequence(rng, sensor, bands, dates, size, extent, dtype=np.uint16):
    return Sequence(
        rng.integers(0, 200, (dates, *size, len(bands))).astype(dtype),
        np.arange(dates, dtype=np.int32) * 5 + 18000,
        np.ones(dates, bool),
        np.ones((dates, *size), bool),
        sensor,
        bands,
        np.array(extent, np.float32),
    )


def site(rng, **sequences):
    return Sample(sequences, np.zeros(2, np.float32), id="here")


def test_native_pixels_bit_for_bit_and_bands_by_name():
    rng = np.random.default_rng(0)
    stored = sequence(rng, "sentinel2-l2a", ("B08", "B02", "B04"), 3, (6, 8), (30, -40, -30, 40))
    stored = dataclasses.replace(stored, valid=np.array([True, False, True]))
    images = site_images([site(rng, multispectral=stored)], SENSORS, BANDS)
    assert set(images) == {"multispectral"}
    got = images["multispectral"]
    assert got["values"].dtype == np.uint16
    assert_array_equal(got["values"][0, ..., 0], stored.values[[0, 2], ..., 2])
    assert_array_equal(got["values"][0, ..., 1], stored.values[[0, 2], ..., 0])
    assert_array_equal(got["bands"], [[True, True, False]])
    assert_array_equal(got["days"], [[18000, 18010]])


def test_modalities_are_cut_to_the_ground_they_share():
    rng = np.random.default_rng(1)
    optical = sequence(rng, "rgb", ("red", "green", "blue"), 1, (20, 20), (20, -20, -20, 20), np.uint8)
    wider = sequence(rng, "sentinel2-l2a", ("B04", "B08"), 2, (8, 8), (40, -40, -40, 40))
    images = site_images([site(rng, optical=optical, multispectral=wider)], SENSORS, BANDS)
    assert images["optical"]["values"].shape == (1, 1, 20, 20, 3)
    assert_array_equal(images["optical"]["sensor"], [1])
    assert_array_equal(images["multispectral"]["values"][0, ..., :2], wider.values[:, 2:6, 2:6])


def test_fewer_dates_and_missing_modalities_are_masked():
    rng = np.random.default_rng(2)
    extent = (20, -20, -20, 20)
    one = site(rng, multispectral=sequence(rng, "sentinel2-l2a", ("B04",), 1, (4, 4), extent))
    two = site(rng, multispectral=sequence(rng, "sentinel2-l2a", ("B04",), 3, (4, 4), extent))
    none = site(rng, optical=sequence(rng, "rgb", ("red",), 1, (4, 4), extent, np.uint8))
    images = site_images([one, two, none], SENSORS, BANDS)
    assert_array_equal(images["multispectral"]["valid"].sum(1), [1, 3, 0])
    assert_array_equal(images["optical"]["valid"].sum(1), [0, 0, 1])


def test_what_does_not_fit_is_told():
    rng = np.random.default_rng(3)
    extent = (20, -20, -20, 20)
    small = site(rng, multispectral=sequence(rng, "sentinel2-l2a", ("B04",), 1, (4, 4), extent))
    large = site(rng, multispectral=sequence(rng, "sentinel2-l2a", ("B04",), 1, (8, 8), extent))
    with pytest.raises(UserError, match=r"sizes, \(4, 4\) and \(8, 8\) pixels, do not stack"):
        site_images([small, large], SENSORS, BANDS)
    same = site_images([small, large], SENSORS, BANDS, {"multispectral": (4, 4)})
    assert same["multispectral"]["values"].shape == (2, 1, 4, 4, 3)
    other = site(rng, multispectral=sequence(rng, "landsat8-9", ("B4",), 1, (4, 4), extent))
    with pytest.raises(UserError, match=r'sensor "landsat8-9" is not among those .* \(sentinel2-l2a\)'):
        site_images([other], SENSORS, BANDS)
