"""The table of sensors against numbers written down here by hand, and the refusals of wrong input."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from skyjax.errors import BadRecord, UserError
from skyjax.sensors import get_sensor, sensors, statistics


def test_table_holds_the_sensors_of_the_contract():
    bands = {key: len(sensor.bands) for key, sensor in sensors().items()}
    want = {"rgb": 3, "aerial": 4, "naip": 4, "worldview3": 8, "sentinel2-l1c": 13, "sentinel2-l2a": 12}
    assert bands == want | {"landsat8-9": 11, "sentinel1-grd": 2}
    assert {s.modality for s in sensors().values()} == {"optical", "multispectral", "sar"}


@pytest.mark.parametrize("key", sensors())
def test_every_band_is_plausible(key):
    sensor = get_sensor(key)
    assert sensor.statistics_source
    assert len(set(sensor.names)) == len(sensor.bands)
    low, high = sensor.valid_range
    for band in sensor.bands:
        assert low < band.mean < high
        assert band.std > 0
        assert band.gsd > 0
        assert (band.wavelength is None) == (sensor.modality == "sar")
        if band.wavelength is not None:
            assert 350 < band.wavelength < 13_000
            assert 0 < band.width < band.wavelength


def test_published_numbers_stand_where_they_belong():
    # SkySense's ten bands (lib/datasets/utils/dataset_colors.py), which are those of SSL4EO-S12, and ImageNet's.
    mean, std = statistics(["sentinel2-l2a", "sentinel2-l1c"], ["B02", "B08", "B8A", "B12", "B10"])
    assert_allclose(mean[0], [884.29673756, 2517.76053101, 2581.64687018, 1805.06846033, 0], rtol=1e-6)
    assert_allclose(std[0], [1155.15170768, 1474.78900051, 1439.3086061, 1343.48379601, 1], rtol=1e-6)
    assert_allclose(mean[1, 4], 22.10351321, rtol=1e-6)  # cirrus, which Level-2A lacks
    mean, std = statistics(["rgb"], ["blue", "red"])
    assert_allclose(mean, [[0.406 * 255, 0.485 * 255]], rtol=1e-6)
    assert_allclose(std, [[0.225 * 255, 0.229 * 255]], rtol=1e-6)
    assert mean.dtype == std.dtype == np.float32


def test_bands_meet_by_common_name():
    assert get_sensor("sentinel2-l2a").names[get_sensor("sentinel2-l2a").index("red")] == "B04"
    assert get_sensor("landsat8-9").names[get_sensor("landsat8-9").index("nir08")] == "B5"
    mean, std = statistics(["aerial", "rgb"], ["nir", "red"])
    assert_allclose(mean[1], [0, 123.675])  # a picture has no infrared: masked, mean 0 and std 1
    assert std[1, 0] == 1
    assert mean[0, 0] > 0


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(UserError, match=r'sentinel2-l2a: band "B8" is not known; did you mean "B08"\? Bands: B01 B02'):
        get_sensor("sentinel2-l2a").index("B8")
    with pytest.raises(UserError, match='sensor "sentinel2" is not known; did you mean "sentinel2-l'):
        get_sensor("sentinel2")
    assert get_sensor("sentinel2-l2a").find("thermal") is None


def test_measured_pixels():
    sentinel2, radar = get_sensor("sentinel2-l2a"), get_sensor("sentinel1-grd")
    values = np.array([[900, 800], [0, 800], [0, 0], [1, 1], [40_000, 40_000]], np.uint16)
    assert sentinel2.measured(values).tolist() == [True, False, False, True, False]
    decibels = np.array([[-12, -20], [np.nan, -20], [-12, -np.inf], [-118, -118], [2, -6]], np.float32)
    assert radar.measured(decibels).tolist() == [True, False, False, False, True]
    assert get_sensor("rgb").measured(np.zeros((2, 3), np.uint8)).all()  # black is a colour


@pytest.mark.parametrize(
    ("key", "values", "told"),
    [
        ("sentinel2-l2a", np.full((4, 2), 0.13, np.float32), "reflectance x 10,000"),  # a fraction
        ("rgb", np.full((4, 3), 0.4, np.float32), "0 to 255"),
        ("rgb", np.full((4, 3), 3000, np.uint16), "0 to 255"),  # 16 bit
        ("sentinel1-grd", np.full((4, 2), 0.08, np.float32), "10 log10"),  # linear power
        ("sentinel1-grd", np.full((4, 2), -4000, np.int16), "dB"),  # hundredths of dB
    ],
)
def test_another_scale_is_refused(key, values, told):
    with pytest.raises(BadRecord, match=told):
        get_sensor(key).check_scale(values, "a.tif")


def test_the_right_scale_passes():
    rng = np.random.default_rng(0)
    get_sensor("sentinel2-l2a").check_scale(rng.integers(1, 12_000, (50, 4)).astype(np.uint16))
    get_sensor("sentinel2-l2a").check_scale(np.zeros((50, 4), np.uint16))  # nothing but nodata says nothing
    get_sensor("sentinel1-grd").check_scale(rng.normal(-15, 6, (50, 2)).astype(np.float32))
    get_sensor("rgb").check_scale(np.zeros((50, 3), np.uint8))


def test_one_name_for_two_bands_is_told():
    with pytest.raises(UserError, match='"B11" is not the same band at sentinel2-l2a and landsat8-9'):
        statistics(("sentinel2-l2a", "landsat8-9"), ("B02", "B11"))
    mean, _ = statistics(("sentinel2-l2a", "landsat8-9"), ("blue", "swir16"))
    assert (mean > 0).all()
