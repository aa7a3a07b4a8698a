"""BigEarthNet v1: pairs of a Sentinel-2 and a Sentinel-1 patch of 1.2 km, as their original GeoTIFFs.

Source: BigEarthNet-MM (Sumbul et al., 2021), CDLA-Permissive-1.0. Version 2, packed otherwise: benv2.py.
Input: BigEarthNet-S1*/NAME/NAME_VV.tif and _VH.tif with NAME_labels_metadata.json, which names the Sentinel-2 patch;
BigEarthNet-S2*/NAME/NAME_B01.tif .. _B12.tif with its own.

Traps:
- Bands of 20 m and 60 m are repeated to the 10 m grid, so that no value is made up.
- Both images have their own dates, hours to days apart.
- Sentinel-2 is Level-2A of 2017 and 2018, before any offset. Cloud and snow are not marked. 0 is nodata.
- No labels are kept: version 2 corrected them.
"""

import json
import pathlib
from collections.abc import Iterator

import numpy as np
import rasterio
import rasterio.warp

from skyjax.errors import BadRecord
from skyjax.input.build import FileSamples, channels_last, list_files, repeat_pixels
from skyjax.sample import Sample, make_sequence
from skyjax.sensors import get_sensor

TITLE = "BigEarthNet v1 pairs: Sentinel-2, Sentinel-1"
LICENCE = "CDLA-Permissive-1.0"
ATTRIBUTION = "BigEarthNet-MM (Sumbul et al. 2021); contains modified Copernicus Sentinel data"
SIZE = 120  # pixels a side at 10 m
METADATA = "_labels_metadata.json"


def samples(folder: pathlib.Path) -> Iterator[Sample]:
    """One sample a pair."""
    return FileSamples(list_files(folder, f"BigEarthNet-S1*/*/*{METADATA}"), _pair)


def _pair(path: pathlib.Path) -> Sample:
    about = json.loads(path.read_text())
    name = about["corresponding_s2_patch"]
    found = sorted(path.parents[2].glob(f"BigEarthNet-S2*/{name}"))
    if not found:
        raise BadRecord(f'"{path}" belongs to {name}, which is not there')
    told = json.loads((found[0] / f"{name}{METADATA}").read_text())
    radar = [path.with_name(path.name.replace(METADATA, f"_{band}.tif")) for band in ("VV", "VH")]
    bands = get_sensor("sentinel2-l2a").names
    sequences = {
        "multispectral": make_sequence(
            _read([found[0] / f"{name}_{band}.tif" for band in bands]),
            "sentinel2-l2a",
            bands,
            days=_day(told["acquisition_date"]),
            gsd=10,
            name=name,
        ),
        "sar": make_sequence(
            _read(radar),
            "sentinel1-grd",
            ("VV", "VH"),
            days=_day(about["acquisition_time"]),
            gsd=10,
            name=path.name,
        ),
    }
    return Sample(sequences, _position(radar[0]), id=name, source="bigearthnet-v1")


def _day(time: str) -> np.ndarray:
    return np.array([np.datetime64(time[:10], "D").astype(int)])


def _read(files: list[pathlib.Path]) -> np.ndarray:
    """Bands of one file each as one image (1, h, w, c)."""
    bands = []
    for path in files:
        try:
            with rasterio.open(path, driver="GTiff") as file:
                band = file.read()
        except rasterio.RasterioIOError as error:
            raise BadRecord(f'"{path}" is missing, truncated or corrupt: {error}') from error
        bands.append(repeat_pixels(band, SIZE // band.shape[-1]))
    return channels_last(np.concatenate(bands)[None])


def _position(path: pathlib.Path) -> np.ndarray:
    """Longitude and latitude of an image's middle."""
    with rasterio.open(path, driver="GTiff") as file:
        x = (file.bounds.left + file.bounds.right) / 2
        y = (file.bounds.bottom + file.bounds.top) / 2
        (lon,), (lat,) = rasterio.warp.transform(file.crs, "EPSG:4326", [x], [y])
    return np.array([lon, lat], np.float32)
