"""TerraMesh: one Sentinel-2 and one Sentinel-1 image of a place, as GeoTIFFs of its validation part.

Source: TerraMesh (Blumenstiel et al., 2025), CC-BY-SA-4.0.
Input: a folder a product with one file a place, of the same name: S2L2A int16 (12, 224, 224), S1RTC float32 (2, 224,
224) in dB. The others are not read, but for the time that LULC has of Sentinel-2.

Traps:
- Sentinel-2's file has no time of its own; files derived from it (LULC, NDVI, S2RGB) carry it as `datetime`.
- Both images have their own dates, hours to days apart.
- Sentinel-1 is terrain-corrected gamma nought, not sigma nought: on slopes and in general some tenths of dB apart.
"""

import pathlib
from collections.abc import Iterator

import numpy as np
import rasterio
import rasterio.warp

from skyjax.errors import BadRecord
from skyjax.input.build import FileSamples, channels_last, list_files
from skyjax.sample import Sample, make_sequence
from skyjax.sensors import get_sensor

TITLE = "TerraMesh places: Sentinel-2 and Sentinel-1, one date each"
LICENCE = "CC-BY-SA-4.0"
ATTRIBUTION = "TerraMesh (Blumenstiel et al. 2025); contains modified Copernicus Sentinel data"
TIME_FROM = "LULC"


def samples(folder: pathlib.Path) -> Iterator[Sample]:
    """One sample a place, without labels."""
    return FileSamples(list_files(folder, "S2L2A/*.tif"), _place)


def _place(path: pathlib.Path) -> Sample:
    folder = path.parents[1]
    optical, _, lonlat = _read(path)
    _, optical_day, _ = _read(folder / TIME_FROM / path.name)
    radar, radar_day, _ = _read(folder / "S1RTC" / path.name)
    if optical_day is None or radar_day is None:
        raise BadRecord(f'"{path}": no tag "datetime" in {TIME_FROM} or S1RTC')
    bands = get_sensor("sentinel2-l2a").names
    sequences = {
        "multispectral": make_sequence(
            channels_last(optical[None]), "sentinel2-l2a", bands, days=np.array([optical_day]), gsd=10, name=path.name
        ),
        "sar": make_sequence(
            channels_last(radar[None]),
            "sentinel1-grd",
            ("VV", "VH"),
            days=np.array([radar_day]),
            gsd=10,
            name=path.name,
        ),
    }
    return Sample(sequences, lonlat, id=path.stem, source="terramesh")


def _read(path: pathlib.Path) -> tuple[np.ndarray, int | None, np.ndarray]:
    """Pixels (c, h, w), the day of the tag `datetime`, longitude and latitude of the middle."""
    try:
        with rasterio.open(path, driver="GTiff") as file:
            x = (file.bounds.left + file.bounds.right) / 2
            y = (file.bounds.bottom + file.bounds.top) / 2
            (lon,), (lat,) = rasterio.warp.transform(file.crs, "EPSG:4326", [x], [y])
            told = file.tags().get("datetime")
            day = None if told is None else int(np.datetime64(told[:10], "D").astype(int))
            return file.read(), day, np.array([lon, lat], np.float32)
    except rasterio.RasterioIOError as error:
        raise BadRecord(f'"{path}" is missing, truncated or corrupt: {error}') from error
