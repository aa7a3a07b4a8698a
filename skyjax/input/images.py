"""Pictures and rasters as arrays and as samples: JPEG and PNG by Pillow, GeoTIFF by rasterio."""

import dataclasses
import os
import pathlib
import warnings

import numpy as np
import PIL.Image
import rasterio
import rasterio.errors
import rasterio.warp
from jaxtyping import Bool, Float, Shaped

from skyjax.errors import BadRecord, UserError
from skyjax.sample import Sample, make_sequence, stored
from skyjax.sensors import get_sensor

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")
METRES_A_DEGREE = 111_320  # of latitude, and of longitude at the equator
# Of pixels once unpacked, told by the header before anything is unpacked: some kilobytes can claim them all.
MAX_BYTES = 2**30
# Both libraries choose the reader by a file's content, not its name. A "picture" may else be PostScript, which Pillow
# has Ghostscript run, and a "GeoTIFF" a list of other files and addresses, which GDAL opens.
_PICTURES, _RASTERS = ("JPEG", "PNG"), "GTiff"


def list_images(folder: pathlib.Path) -> list[pathlib.Path]:
    """All images below a folder, in the order of their paths; hidden files are passed over."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
    )


def read_image(path: str | os.PathLike[str]) -> Shaped[np.ndarray, "h w c"]:
    """Pixels of a JPEG, PNG or GeoTIFF in a stored type; palettes become RGB, an alpha channel of a picture is dropped.

    Raises:
      BadRecord: the file is truncated, corrupt or of another kind.
      UserError: there is no such file.
    """
    return _read(pathlib.Path(path)).values


def image_sample(
    path: str | os.PathLike[str],
    sensor: str = "rgb",
    bands: tuple[str, ...] = (),
    *,
    day: int = 0,
    label: int | None = None,
    source: str = "",
) -> Sample:
    """A sample of one image of one date.

    Args:
      path: JPEG, PNG or GeoTIFF; a GeoTIFF's place, pixel size and nodata are used.
      sensor: key in sensors.toml.
      bands: names in the order of the file's bands. Where left out, they are the sensor's in its order; three bands of
        a sensor that begins with red, green and blue are those.
      day: days since 1970-01-01; 0 where unknown.
      label: class number, kept as the label "class".
      source: name of the collection.

    Raises:
      BadRecord: the image cannot be read, has another number of bands, or values of another scale.
      UserError: the sensor or a band is not known.
    """
    path = pathlib.Path(path)
    table, raster = get_sensor(sensor), _read(path)
    names = bands or table.names
    if not bands and table.names[:3] == ("red", "green", "blue") and raster.values.shape[2] == 3:
        names = names[:3]
    if raster.values.shape[2] != len(names):
        raise BadRecord(
            f'"{path}" has {raster.values.shape[2]} bands, {sensor} {len(names)}: {" ".join(names)};'
            " name the sensor and the bands that it has"
        )
    sequence = make_sequence(
        raster.values[None],
        sensor,
        names,
        days=np.array([day]),
        clear=raster.measured[None],
        extent=raster.extent,
        name=f'"{path}"',
    )
    labels = {} if label is None else {"class": np.array(label, np.int32)}
    return Sample({table.modality: sequence}, raster.lonlat, labels=labels, id=path.stem, source=source)


@dataclasses.dataclass(frozen=True)
class _Raster:
    values: Shaped[np.ndarray, "h w c"]
    measured: Bool[np.ndarray, "h w"]
    lonlat: Float[np.ndarray, "2"]
    extent: Float[np.ndarray, "4"] | None  # None: the file doesn't say


def _read(path: pathlib.Path) -> _Raster:
    if not path.is_file():
        raise UserError(f'there is no image "{path}"')
    try:
        return _read_raster(path) if path.suffix.lower() in (".tif", ".tiff") else _read_picture(path)
    except BadRecord:
        raise
    except Exception as error:  # Pillow, GDAL and PROJ raise what they like on damaged files
        reason = str(error).replace(str(path), "").strip(" :'\"") or type(error).__name__
        raise BadRecord(f'"{path}" is truncated or corrupt: {reason}') from error


def _read_picture(path: pathlib.Path) -> _Raster:
    with PIL.Image.open(path, formats=_PICTURES) as file:
        _check_size(path, file.width, file.height, max(len(file.getbands()), 3))
        picture: PIL.Image.Image = file
        if file.mode in ("P", "PA", "RGBA", "CMYK", "YCbCr", "RGBX"):
            picture = file.convert("RGB")
        elif file.mode in ("LA", "1"):
            picture = file.convert("L")
        values = np.asarray(picture)
    values = stored(values[:, :, None] if values.ndim == 2 else values)
    return _Raster(values, np.ones(values.shape[:2], bool), np.full(2, np.nan, np.float32), None)


def _read_raster(path: pathlib.Path) -> _Raster:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path, driver=_RASTERS) as raster:
            itemsize = max(np.dtype(dtype).itemsize for dtype in raster.dtypes)
            _check_size(path, raster.width, raster.height, raster.count * itemsize)
            values = stored(np.ascontiguousarray(np.moveaxis(raster.read(), 0, -1)))
            measured = raster.dataset_mask() > 0
            return _Raster(values, measured, *_place(raster))


def _check_size(path: pathlib.Path, width: int, height: int, pixel: int) -> None:
    """`pixel`: bytes of one."""
    if width * height * pixel > MAX_BYTES:
        raise BadRecord(
            f'"{path}" claims {width:,} x {height:,} pixels of {pixel} bytes, more than {MAX_BYTES >> 30} GiB; cut it'
            " into tiles"
        )


def _place(raster: rasterio.DatasetReader) -> tuple[Float[np.ndarray, "2"], Float[np.ndarray, "4"] | None]:
    """Longitude and latitude of the middle, and the extent around it; NaN and None where the file doesn't say."""
    if raster.crs is None:
        return np.full(2, np.nan, np.float32), None
    left, bottom, right, top = raster.bounds
    x, y = (left + right) / 2, (bottom + top) / 2
    (longitude,), (latitude,) = rasterio.warp.transform(raster.crs, "EPSG:4326", [x], [y])
    if raster.crs.is_geographic:
        down = METRES_A_DEGREE
        across = METRES_A_DEGREE * np.cos(np.radians(latitude))
    else:
        down = across = raster.crs.linear_units_factor[1]
    half_height, half_width = abs(top - bottom) / 2 * down, abs(right - left) / 2 * across
    extent = np.array([half_height, -half_width, -half_height, half_width], np.float32)
    return np.array([longitude, latitude], np.float32), extent
