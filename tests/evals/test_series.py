import dataclasses

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.interpolate import interp1d

from skyjax.errors import UserError
from skyjax.evals import series
from skyjax.sample import Sample, make_sequence
from skyjax.sensors import get_sensor

NEW_YEAR = int(np.datetime64("2021-01-01").astype(int))
BANDS = {"multispectral": ("B02", "B04", "B08"), "sar": ("VV", "VH")}


def site(seed=0, side=16, dates=6, name="site"):
    """Pixels hold their own row and column at 10 m; the radar's, at 20 m, are noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices((side, side))
    values = np.stack([1000 + 10 * rows, 1000 + 10 * columns, np.full((side, side), 3000)], -1)
    values = (values + 100 * np.arange(dates)[:, None, None, None]).astype(np.uint16)
    days = NEW_YEAR + np.sort(rng.permutation(np.arange(3, 120))[:dates])
    clear = rng.random((dates, side, side)) < 0.7
    radar = rng.normal(-12, 2, (dates - 1, side // 2, side // 2, 2)).astype(np.float32)
    sequences = {
        "multispectral": make_sequence(values, "sentinel2-l2a", BANDS["multispectral"], days=days, clear=clear),
        "sar": make_sequence(radar, "sentinel1-grd", BANDS["sar"], days=days[1:] + 1, gsd=20),
    }
    return Sample(sequences, np.zeros(2, np.float32), id=name)


def test_tiles_hold_what_lies_there():
    chart = np.full((16, 16), -1)
    chart[9, 2] = chart[1, 15] = 0
    sample = site()
    found = list(series.tiles([sample], [chart], block=8, size={"multispectral": 4, "sar": 2}))
    assert [(tile.top, tile.left, tile.height, tile.width) for tile in found] == [(0, 12, 4, 4), (8, 0, 4, 4)]
    optical, radar = sample.sequences["multispectral"], sample.sequences["sar"]
    for tile in found:
        got, rows, columns = tile.sample.sequences, slice(tile.top, tile.top + 4), slice(tile.left, tile.left + 4)
        assert_array_equal(got["multispectral"].values, optical.values[:, rows, columns])
        assert_array_equal(got["multispectral"].clear, optical.clear[:, rows, columns])
        half = slice(rows.start // 2, rows.stop // 2), slice(columns.start // 2, columns.stop // 2)
        assert_array_equal(got["sar"].values, radar.values[:, *half])
        top, left, bottom, right = got["multispectral"].extent
        assert [top, left, bottom, right] == [80 - 10 * tile.top, -80 + 10 * tile.left, top - 40, left + 40]


def test_no_tile_crosses_a_block():
    """A view larger than a block is cut to it, and one that does not divide it gives way."""
    chart = np.zeros((16, 16), int)
    for size in (5, 8, 16):
        found = list(series.tiles([site()], [chart], block=8, size={"multispectral": size, "sar": size}))
        assert {tile.height for tile in found} == {8}
        assert len(found) == 4
        assert {tile.sample.sequences["sar"].values.shape[1:3] for tile in found} == {(size, size)}


def test_shuffling_moves_images_not_days():
    sequence = site(dates=40).sequences["multispectral"]
    sequence = dataclasses.replace(sequence, valid=np.arange(40) % 5 > 0)
    got = series.shuffle_dates(sequence, np.random.default_rng(0))
    assert_array_equal(got.days, sequence.days)
    brightness = sequence.values[:, 0, 0, 2].astype(int)  # tells the images apart
    order = np.searchsorted(brightness, got.values[:, 0, 0, 2])
    assert_array_equal(order[~sequence.valid], np.flatnonzero(~sequence.valid))
    assert sorted(order) == list(range(40))
    assert (order != np.arange(40)).mean() > 0.6
    assert_array_equal(got.clear, sequence.clear[order])


def test_orders_differ_between_tiles_or_only_between_sites():
    charts = [np.zeros((16, 16), int)] * 2
    size = {"multispectral": 8, "sar": 4}

    def orders(shuffle, seed=0):
        found = series.tiles([site(), site()], charts, block=8, size=size, shuffle=shuffle, seed=seed)
        return [tuple(tile.sample.sequences["multispectral"].values[:, 0, 0, 2].tolist()) for tile in found]

    assert len(set(orders(None))) == 1
    assert len(set(orders("tile"))) > 4
    by_site = orders("site")
    assert len(set(by_site[:4])) == len(set(by_site[4:])) == 1
    assert by_site[0] != by_site[4]
    assert by_site != orders("site", seed=1)


class Reflectance:
    """Stands in for a model: a cell's features are its mean row and column, read from the pixels of the first date."""

    def encode(self, samples):
        assert len(samples) == series.BATCH_SIZE
        values = np.stack([s.sequences["multispectral"].values[0, ..., :2] for s in samples]).astype(np.float32)
        b, h, w, c = values.shape
        fused = values.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))
        spatial = np.stack([fused, 3 * fused, 100 + fused], 1)
        valid = np.array([True, True, False])[:, None, None] & np.ones(spatial.shape[:4], bool)
        return {"fused": fused, "context": None, "spatial": {"sar": spatial}, "spatial_valid": {"sar": valid}}


def test_cells_come_back_to_their_place():
    samples, charts = [site(name="a"), site(side=8, name="b")], [np.zeros((16, 16), int), np.zeros((8, 8), int)]
    charts[1][:, 4:] = -1
    found = list(series.tiles(samples, charts, block=8, size={"multispectral": 4, "sar": 2}))
    maps = series.model_features(Reflectance(), found, [(16, 16), (8, 8)])
    rows, columns = np.indices((16, 16))
    want = 1000 + 10 * (np.stack([rows, columns], -1) // 2 * 2 + 0.5)
    assert_allclose(maps[0], want)
    assert_allclose(maps[1][:, :4], want[:8, :4])
    assert_allclose(maps[1][:, 4:], 0)
    # A modality's features are the mean over its valid dates.
    (radar, _) = series.model_features(Reflectance(), found, [(16, 16), (8, 8)], kind="sar")
    assert_allclose(radar, 2 * want)
    with pytest.raises(UserError, match="no geo-context"):
        series.model_features(Reflectance(), found, [(16, 16), (8, 8)], kind="context")


def test_the_raw_series_is_interpolated_between_clear_dates():
    sample = site(dates=6)
    (got,) = series.raw_series([sample], [(16, 16)], BANDS)
    optical, radar = sample.sequences["multispectral"], sample.sequences["sar"]
    first = min(optical.days[0], radar.days[0]) - NEW_YEAR
    steps = got.shape[-1] // 7
    times = NEW_YEAR + first + series.STEP * np.arange(steps)
    assert times[-1] >= max(optical.days[-1], radar.days[-1]) > times[-2]
    row, column = 3, 10
    b04 = get_sensor("sentinel2-l2a").bands[get_sensor("sentinel2-l2a").index("B04")]
    seen = optical.clear[:, row, column]
    known = (optical.values[seen, row, column, 1] - b04.mean) / b04.std
    ends = (known[0], known[-1])
    want = interp1d(optical.days[seen], known, bounds_error=False, fill_value=ends)(times)
    pixel = got[row, column]
    assert_allclose(pixel[: 4 * steps].reshape(steps, 4)[:, 1], want, rtol=1e-5)
    near = [any(abs(time - day) <= 5 for day in optical.days[seen]) for time in times]
    assert_array_equal(pixel[: 4 * steps].reshape(steps, 4)[:, 3], near)
    vh = get_sensor("sentinel1-grd").bands[get_sensor("sentinel1-grd").index("VH")]
    known = (radar.values[:, row // 2, column // 2, 1] - vh.mean) / vh.std
    ends = (known[0], known[-1])
    want = interp1d(radar.days, known, bounds_error=False, fill_value=ends)(times)
    assert_allclose(pixel[4 * steps :].reshape(steps, 3)[:, 1], want, rtol=1e-5)


def test_a_band_that_is_not_there_is_zero():
    sample = site()
    (got,) = series.raw_means([sample], [(16, 16)], {"multispectral": ("B02", "B11", "B08")})
    assert_allclose(got[..., 1], 0)
    seen = sample.sequences["multispectral"].clear.any(0)
    assert ((np.abs(got[..., 2]) > 0.1) == seen).all()  # one that was never seen is 0 too
