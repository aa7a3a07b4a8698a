"""Pictures: which bands become which colour, what the stretch does, and what the sheet marks."""

import dataclasses

import numpy as np
import PIL.Image
import pytest
from numpy.testing import assert_array_equal

from skyjax.errors import UserError
from skyjax.input.contact_sheet import UNCLEAR, contact_sheet, hatch, picture, stretch
from skyjax.sample import Sample, make_sequence

MARK = (226, 54, 84)
NOWHERE = np.full(2, np.nan, np.float32)


def sentinel2(bands, dates=1, size=16, seed=0):
    values = np.random.default_rng(seed).integers(100, 4000, (dates, size, size, len(bands))).astype(np.uint16)
    return make_sequence(values, "sentinel2-l2a", bands, days=18_000 + 5 * np.arange(dates))


def argsort_of_means(image):
    return np.argsort(image.reshape(-1, 3).mean(0)).tolist()


def test_true_colour_takes_bands_by_name():
    values = np.full((1, 8, 8, 4), 1000, np.uint16) + np.arange(64, dtype=np.uint16).reshape(1, 8, 8, 1)
    values += np.array([0, 9000, 2000, 1000], np.uint16)  # blue, infrared, red, green
    sequence = make_sequence(values, "sentinel2-l2a", ("B02", "B08", "B04", "B03"), days=np.array([0]))
    image = picture(sequence, 0)
    assert image.shape == (8, 8, 3)
    assert image.dtype == np.uint8
    assert argsort_of_means(image) == [2, 1, 0]  # blue darkest, red brightest; infrared takes no part


def test_stretch_is_the_percentiles_of_clear_pixels():
    sequence = sentinel2(("B04", "B03", "B02"))
    clear = sequence.clear.copy()
    clear[0, :4] = False
    values = sequence.values.copy()
    values[0, :4] = 20_000  # a cloud, which must not count
    sequence = dataclasses.replace(sequence, clear=clear, values=values)
    low, high = np.percentile(values[0, 4:], (2, 98))  # one pair for the three colours: hues stay true
    np.testing.assert_allclose(stretch(sequence, 0), [[low, high]] * 3, rtol=1e-6)
    image = picture(sequence, 0).astype(int)
    assert (image[:4] == 255).all()
    want = np.clip((values[0].astype(float) - low) / (high - low), 0, 1) * 255
    assert np.abs(image - want).max() < 1.01


def test_radar_is_vv_vh_and_their_difference():
    values = np.random.default_rng(0).normal((-10, -17), 2, (1, 12, 12, 2)).astype(np.float32)
    values[0, 3, 3] = np.nan
    swapped = make_sequence(values[..., ::-1], "sentinel1-grd", ("VH", "VV"), days=np.array([0]))
    sequence = make_sequence(values, "sentinel1-grd", ("VV", "VH"), days=np.array([0]))
    image = picture(sequence, 0)
    assert_array_equal(image, picture(swapped, 0))
    assert image[3, 3].tolist() == [128] * 3
    ratio = values[0, ..., 0] - values[0, ..., 1]
    brightest = ratio >= np.nanpercentile(ratio, 98.5)
    assert (image[brightest, 2] == 255).all()


@pytest.mark.parametrize("bands", [("B05", "B8A", "B11"), ("B08", "B04", "B03"), ("B12",)])
def test_sensors_without_true_colour_have_a_picture(bands):
    image = picture(sentinel2(bands), 0)
    assert image.shape == (16, 16, 3)
    assert image.std() > 20
    if len(bands) == 1:
        assert (image == image[..., :1]).all()  # grey


@pytest.mark.parametrize("values", [0, 500], ids=["nothing measured", "all the same"])
def test_an_image_without_contrast_has_a_picture(values):
    sequence = make_sequence(
        np.full((1, 4, 4, 3), values, np.uint16), "sentinel2-l2a", ("B04", "B03", "B02"), days=np.array([0])
    )
    assert np.isfinite(picture(sequence, 0)).all()


def test_one_date_with_a_missed_cloud_does_not_darken_the_others():
    sequence = sentinel2(("B04", "B03", "B02"), dates=12)
    want = stretch(sequence)
    values = sequence.values.copy()
    values[4] = 19_000
    got = stretch(dataclasses.replace(sequence, values=values))
    np.testing.assert_allclose(got, want, rtol=0.05)


def samples():
    series = sentinel2(("B02", "B03", "B04"), dates=40, size=6)
    clear = series.clear.copy()
    clear[::2] = False
    valid = series.valid.copy()
    valid[5] = False
    optical = make_sequence(np.full((1, 32, 32, 3), 90, np.uint8), "rgb", ("red", "green", "blue"), days=np.array([0]))
    return [
        Sample({"multispectral": dataclasses.replace(series, clear=clear, valid=valid)}, NOWHERE, id="cloudy"),
        Sample({"optical": optical}, np.array([-70.0, -10.0], np.float32), id="picture"),
        Sample({}, NOWHERE, id="nothing"),
    ]


def test_contact_sheet_marks_what_is_not_clear(tmp_path):
    cloudy, clear, nothing = samples()
    marks = {}
    for name, sample in (("cloudy", cloudy), ("clear", clear), ("nothing", nothing)):
        path = contact_sheet([sample], tmp_path / "deep" / f"{name}.png")
        page = np.asarray(PIL.Image.open(path))
        marks[name] = int((page == MARK).all(-1).sum())
        assert page.shape[1] == 1480
    swatch = marks["nothing"]  # the legend alone
    assert swatch > 0
    assert marks["clear"] == swatch
    assert marks["cloudy"] > swatch + 19 * 500  # 20 dates of 65 x 65, a quarter of each in lines; one is invalid
    pages = [PIL.Image.open(tmp_path / "deep" / f"{name}.png").height for name in ("cloudy", "nothing")]
    whole = PIL.Image.open(contact_sheet(samples(), tmp_path / "all.png"))
    assert whole.height > max(pages)


def test_contact_sheet_s_errors(tmp_path):
    with pytest.raises(UserError, match="there is no sample to show"):
        contact_sheet([], tmp_path / "a.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        contact_sheet(samples(), tmp_path / "file" / "a.png")
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        contact_sheet(samples(), "/dev/full")


def test_stripes_lie_on_unclear_pixels_alone():
    image = np.zeros((20, 20, 3), np.uint8)
    clear = np.ones((20, 20), bool)
    clear[:, 10:] = False
    striped = hatch(image, clear)
    assert_array_equal(striped[:, :10], 0)
    share = (striped[:, 10:] == UNCLEAR).all(-1).mean()
    assert 0.1 < share < 0.5
