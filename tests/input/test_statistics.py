"""Streamed statistics against numpy on everything at once, in float64."""

import dataclasses

import hypothesis
import hypothesis.strategies as some
import numpy as np
import PIL.Image
import pytest
from numpy.testing import assert_allclose

from skyjax.errors import UserError
from skyjax.input import records, statistics
from skyjax.sample import Sample, make_sequence

NOWHERE = np.full(2, np.nan, np.float32)


def sentinel2(rng, dates, bands, offset=0):
    values = rng.integers(1, 9000, (dates, 5, 7, len(bands))).astype(np.uint16) + np.uint16(offset)
    values[0, 0, 0] = 0
    clear = rng.random((dates, 5, 7)) > 0.3
    return make_sequence(values, "sentinel2-l2a", bands, days=np.arange(dates), clear=clear)


def test_rows_equal_numpy_on_all_pixels(tmp_path):
    rng = np.random.default_rng(0)
    a, b = sentinel2(rng, 3, ("B02", "B03")), sentinel2(rng, 5, ("B03", "B12"), offset=3000)
    radar = make_sequence(
        rng.normal(-14, 3, (2, 5, 7, 2)).astype(np.float32), "sentinel1-grd", ("VV", "VH"), days=np.arange(2)
    )
    samples = [Sample({"multispectral": a, "sar": radar}, NOWHERE), Sample({"multispectral": b}, NOWHERE)]
    records.write(samples, tmp_path / "set")
    rows = {(row["sensor"], row["band"]): row for row in statistics.stats(tmp_path / "set")}

    pixels = {
        ("sentinel2-l2a", "B02"): a.values[a.clear][:, 0],
        ("sentinel2-l2a", "B03"): np.concatenate([a.values[a.clear][:, 1], b.values[b.clear][:, 0]]),
        ("sentinel2-l2a", "B12"): b.values[b.clear][:, 1],
        ("sentinel1-grd", "VV"): radar.values[..., 0],
        ("sentinel1-grd", "VH"): radar.values[..., 1],
    }
    assert list(rows) == list(pixels)  # the order of the table
    for key, want in pixels.items():
        assert rows[key]["count"] == want.size
        assert_allclose(rows[key]["mean"], want.astype(np.float64).mean(), rtol=1e-12)
        assert_allclose(rows[key]["std"], want.astype(np.float64).std(), rtol=1e-12)
    assert rows["sentinel2-l2a", "B02"]["table_mean"] == pytest.approx(884.29673756)
    assert rows["sentinel2-l2a", "B02"]["table_std"] == pytest.approx(1155.15170768)


@hypothesis.given(some.lists(some.integers(0, 40), min_size=1, max_size=6), some.integers(0, 1000))
def test_merging_parts_equals_the_whole(sizes, seed):
    # A large mean over a small spread is where a sum of squares would lose every digit.
    pixels = np.random.default_rng(seed).normal(1e8, 1, (sum(sizes), 2))
    merged = statistics.Moments.of(pixels[:0])
    for part in np.split(pixels, np.cumsum(sizes)[:-1]):
        merged = merged.merge(statistics.Moments.of(part))
    assert merged.count.tolist() == [len(pixels)] * 2
    if len(pixels):
        assert_allclose(merged.mean, pixels.mean(0), rtol=1e-14)
        assert_allclose(merged.std, pixels.std(0), rtol=1e-7, atol=1e-7)


def test_invalid_dates_and_nan_don_t_count(tmp_path):
    values = np.full((2, 2, 2, 2), -10, np.float32)
    values[0, 0, 0] = np.nan
    values[1] = np.nan
    sequence = make_sequence(values, "sentinel1-grd", ("VV", "VH"), days=np.arange(2))
    assert [row["count"] for row in statistics.rows([Sample({"sar": sequence}, NOWHERE)])] == [3, 3]
    optical = sentinel2(np.random.default_rng(0), 4, ("B02",))
    second = dataclasses.replace(optical, valid=np.array([True, False, True, True]))
    (row,) = statistics.rows([Sample({"multispectral": second}, NOWHERE)])
    assert row["count"] == optical.clear[[0, 2, 3]].sum()


def test_a_sequence_without_a_clear_pixel_gives_rows_without_numbers():
    sequence = make_sequence(np.zeros((2, 3, 3, 1), np.uint16), "sentinel2-l2a", ("B02",), days=np.arange(2))
    (row,) = statistics.rows([Sample({"multispectral": sequence}, NOWHERE)])
    assert row["count"] == 0
    assert row["mean"] is row["std"] is None  # so that JSON can hold it


def test_the_table_shows_measured_beside_known(capsys):
    sequence = sentinel2(np.random.default_rng(0), 2, ("B02", "B12"))
    rows = statistics.rows([Sample({"multispectral": sequence}, NOWHERE)])
    rows[1]["mean"] = None
    statistics.print_table(rows)
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if "B02" in line]
    assert line.split()[:2] == ["sentinel2-l2a", "B02"]
    assert f"{rows[0]['mean']:,.2f}" in line
    assert "884.30" in line
    assert "1,155.15" in line
    assert any("B12" in line and "none" in line for line in lines)


def test_a_bad_record_is_named_and_left_out(tmp_path, caplog):
    sample = Sample({"multispectral": sentinel2(np.random.default_rng(0), 2, ("B02",))}, NOWHERE)
    records.write([sample, sample], tmp_path / "set")
    whole = statistics.stats(tmp_path / "set")
    path = tmp_path / "set" / "samples-00000.array_record"
    data = bytearray(path.read_bytes())
    data[200] ^= 0xFF
    path.write_bytes(data)
    (row,) = statistics.stats(tmp_path / "set")
    assert row["count"] == whole[0]["count"] // 2
    assert "record 0 is corrupt" in caplog.text


def test_a_folder_that_is_no_dataset(tmp_path):
    with pytest.raises(UserError, match=r"holds neither images .* nor records"):
        statistics.stats(tmp_path)


def test_a_folder_of_images(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (3, 6, 5, 3)).astype(np.uint8)
    for i, image in enumerate(images):
        PIL.Image.fromarray(image).save(tmp_path / f"{i}.png")
    rows = statistics.stats(tmp_path)
    assert [(row["sensor"], row["band"], row["count"]) for row in rows] == [
        ("rgb", band, 90) for band in ("red", "green", "blue")
    ]
    np.testing.assert_allclose([row["mean"] for row in rows], images.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose([row["std"] for row in rows], images.std((0, 1, 2)), rtol=1e-12)
