"""Pictures and rasters: what is read, and what is refused."""

import numpy as np
import PIL.Image
import pytest
import rasterio
from numpy.testing import assert_allclose, assert_array_equal

from skyjax.errors import BadRecord, UserError
from skyjax.input.images import image_sample, read_image


def gradient(bands=3, dtype=np.uint8, scale=1):
    rows, columns, band = np.indices((20, 30, bands))
    return (scale * (rows * 3 + columns * 2 + band * 40 + 1)).astype(dtype)


def save_geotiff(path, values, **profile):
    options = {"crs": "EPSG:32632", "transform": rasterio.Affine(10, 0, 500_000, 0, -10, 5_800_000)} | profile
    shape = {"height": values.shape[0], "width": values.shape[1], "count": values.shape[2]}
    with rasterio.open(path, "w", driver="GTiff", dtype=values.dtype, **shape, **options) as raster:
        raster.write(np.moveaxis(values, -1, 0))
    return path


@pytest.fixture
def geotiff(tmp_path):
    return save_geotiff(tmp_path / "a.tif", gradient(4, np.uint16, 10))


def test_png_is_read_exactly(tmp_path):
    values = gradient()
    PIL.Image.fromarray(values).save(tmp_path / "a.png")
    assert_array_equal(read_image(tmp_path / "a.png"), values)


def test_jpeg_is_read_nearly(tmp_path):
    values = gradient()
    PIL.Image.fromarray(values).save(tmp_path / "a.jpg", quality=95)
    assert_allclose(read_image(tmp_path / "a.jpg").astype(int), values, atol=12)


def test_other_modes_of_pictures(tmp_path):
    values = gradient()
    PIL.Image.fromarray(np.dstack([values, np.full((20, 30), 9, np.uint8)])).save(tmp_path / "alpha.png")
    assert_array_equal(read_image(tmp_path / "alpha.png"), values)  # alpha is no band
    PIL.Image.fromarray(values).quantize(256).save(tmp_path / "palette.png")
    assert read_image(tmp_path / "palette.png").shape == (20, 30, 3)
    PIL.Image.fromarray(values[..., 0]).save(tmp_path / "grey.png")
    assert_array_equal(read_image(tmp_path / "grey.png"), values[..., :1])
    deep = gradient(1, np.uint16, 300)[..., 0]
    PIL.Image.fromarray(deep).save(tmp_path / "deep.png")
    assert_array_equal(read_image(tmp_path / "deep.png")[..., 0], deep)
    assert read_image(tmp_path / "deep.png").dtype == np.uint16


def test_geotiff_brings_its_place_and_size(geotiff):
    assert_array_equal(read_image(geotiff), gradient(4, np.uint16, 10))
    sample = image_sample(geotiff, "sentinel2-l2a", ("B02", "B03", "B04", "B08"), label=3, source="mine")
    sequence = sample.sequences["multispectral"]
    assert sequence.values.shape == (1, 20, 30, 4)
    assert sequence.extent.tolist() == [100, -150, -100, 150]
    # 500,150 m east and 5,799,900 m north in zone 32: 150 m east of 9 E; one degree of latitude is about 111.2 km.
    assert sample.lonlat[0] == pytest.approx(9 + 150 / (111_320 * np.cos(np.radians(52.35))), abs=1e-5)
    assert sample.lonlat[1] == pytest.approx(52.349, abs=1e-2)
    assert sample.labels["class"] == 3
    assert (sample.id, sample.source) == ("a", "mine")


def test_geotiff_in_degrees_and_feet(tmp_path):
    degrees = save_geotiff(
        tmp_path / "d.tif", gradient(), crs="EPSG:4326", transform=rasterio.Affine(1e-4, 0, 10, 0, -1e-4, 60)
    )
    extent = image_sample(degrees).sequences["optical"].extent
    assert_allclose(extent[0] - extent[2], 20e-4 * 111_320, rtol=1e-3)
    assert_allclose(extent[3] - extent[1], 30e-4 * 111_320 * 0.5, rtol=1e-2)  # cos 60 = 1/2
    feet = save_geotiff(tmp_path / "f.tif", gradient(), crs="EPSG:2263")
    extent = image_sample(feet).sequences["optical"].extent
    assert_allclose(extent[0] - extent[2], 20 * 10 * 1200 / 3937, rtol=1e-5)  # US survey feet


def test_nodata_and_nan_of_a_geotiff_are_not_clear(tmp_path):
    values = gradient(2, np.float32, -0.1)
    values[0, 0], values[1, 1], values[2, 2, 0] = -9999, np.nan, np.nan
    path = save_geotiff(tmp_path / "s1.tif", values, nodata=-9999)
    clear = image_sample(path, "sentinel1-grd").sequences["sar"].clear[0]
    assert clear.sum() == 20 * 30 - 3
    assert not clear[[0, 1, 2], [0, 1, 2]].any()


def test_mostly_nodata_is_no_other_scale(tmp_path):
    values = np.full((20, 30, 2), -9999, np.float32)
    values[:2] = -14
    sequence = image_sample(save_geotiff(tmp_path / "s1.tif", values, nodata=-9999), "sentinel1-grd").sequences["sar"]
    assert sequence.clear.sum() == 60
    with pytest.raises(BadRecord, match="90 % of the pixels lie outside -60 to 30"):
        image_sample(save_geotiff(tmp_path / "untold.tif", values), "sentinel1-grd")


def test_a_picture_has_no_place(tmp_path):
    PIL.Image.fromarray(gradient()).save(tmp_path / "a.png")
    sample = image_sample(tmp_path / "a.png")
    assert np.isnan(sample.lonlat).all()
    assert sample.sequences["optical"].extent.tolist() == [10, -15, -10, 15]
    assert not sample.labels
    assert image_sample(tmp_path / "a.png", "aerial").sequences["optical"].bands == ("red", "green", "blue")


@pytest.mark.parametrize("kind", ["jpg", "png", "tif"])
@pytest.mark.parametrize("keep", [0, 0.5], ids=["empty", "half"])
def test_truncated_image(tmp_path, kind, keep):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    path = tmp_path / f"a.{kind}"
    if kind == "tif":
        save_geotiff(path, noise, compress="deflate")
    else:
        PIL.Image.fromarray(noise).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(BadRecord, match=rf'a.{kind}" is truncated or corrupt: '):
        read_image(path)


@pytest.mark.parametrize("name", ["a.jpg", "a.tif", "a.png"])
def test_not_an_image(tmp_path, name):
    (tmp_path / name).write_text("a letter, not a picture")
    with pytest.raises(BadRecord, match="truncated or corrupt"):
        read_image(tmp_path / name)


def test_corrupt_geotiff(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    path = save_geotiff(tmp_path / "a.tif", noise, compress="deflate")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
    path.write_bytes(data)
    with pytest.raises(BadRecord, match=r"a\.tif"):
        read_image(path)


def test_wrong_input_is_named(tmp_path, geotiff):
    with pytest.raises(UserError, match="there is no image"):
        read_image(tmp_path / "nothing.png")
    with pytest.raises(BadRecord, match="has 4 bands, rgb 3: red green blue"):
        image_sample(geotiff)
    with pytest.raises(BadRecord, match="has 4 bands, sentinel2-l2a 2: B02 B03"):
        image_sample(geotiff, "sentinel2-l2a", ("B02", "B03"))
    with pytest.raises(UserError, match='did you mean "aerial"'):
        image_sample(geotiff, "areal")
    with pytest.raises(UserError, match='band "B8" is not known; did you mean "B08"'):
        image_sample(geotiff, "sentinel2-l2a", ("B02", "B03", "B04", "B8"))
    with pytest.raises(BadRecord, match="aerial is in DN, 0 to 255; check the sensor and the scale"):
        image_sample(geotiff, "aerial")
