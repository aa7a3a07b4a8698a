"""CropHarvest: twelve months of Sentinel-2 and Sentinel-1 around a labelled point, as its GeoTIFFs have them.

Source: CropHarvest (Tseng et al., 2021), CC-BY-SA-4.0.
Input: one GeoTIFF a point, named NUMBER-DATASET_START_END.tif with dates as yyyy-mm-dd: 17 layers a month, named
VV, VH, B1 .. B12, temperature_2m, total_precipitation, from the second month on with _1 .. _11 behind; then elevation
and slope.

Traps:
- Sentinel-2 is top of atmosphere, Level-1C; B10 (cirrus) is there. Its bands are called B1, not B01.
- A month is a composite of 30 days, counted from START; it gets the middle day.
- The grid is in degrees: a pixel is 0.00009, which is 10 m in latitude and a little less in longitude.
- A composite is of the least cloudy images; what is left of clouds is not marked.
- Sentinel-1 is in dB. Weather and terrain are left out.
"""

import pathlib
import re
from collections.abc import Iterator

import numpy as np
import rasterio
from jaxtyping import Float

from skyjax.errors import BadRecord
from skyjax.input.build import FileSamples, channels_last, list_files, to_days
from skyjax.sample import Sample, Sequence, make_sequence
from skyjax.sensors import get_sensor

TITLE = "CropHarvest points: twelve months of Sentinel-2 and Sentinel-1"
LICENCE = "CC-BY-SA-4.0"
ATTRIBUTION = "CropHarvest (Tseng et al. 2021); contains modified Copernicus Sentinel data"
BANDS = get_sensor("sentinel2-l1c").names
MONTHS, DAYS_A_MONTH = 12, 30


def samples(folder: pathlib.Path) -> Iterator[Sample]:
    """One sample a point, without labels."""
    return FileSamples(list_files(folder, "*.tif"), _point)


def _point(path: pathlib.Path) -> Sample:
    start = re.search(r"_(\d{4})-(\d\d)-(\d\d)_", path.name)
    if start is None:
        raise BadRecord(f'"{path}" does not say its first day: expected NUMBER-DATASET_yyyy-mm-dd_yyyy-mm-dd.tif')
    try:
        with rasterio.open(path, driver="GTiff") as file:
            layers = dict(zip(file.descriptions, file.read().astype(np.float32), strict=True))
            middle = (file.bounds.left + file.bounds.right) / 2, (file.bounds.bottom + file.bounds.top) / 2
    except rasterio.RasterioIOError as error:
        raise BadRecord(f'"{path}" is truncated or corrupt: {error}') from error
    days = to_days([int("".join(start.groups()))]) + DAYS_A_MONTH // 2 + DAYS_A_MONTH * np.arange(MONTHS)

    def sequence(sensor: str, bands: tuple[str, ...]) -> Sequence:
        values = np.stack([_month(layers, bands, month, path) for month in range(MONTHS)])
        return make_sequence(channels_last(values), sensor, bands, days=days, gsd=10, name=path.name)

    sequences = {
        "multispectral": sequence("sentinel2-l1c", BANDS),
        "sar": sequence("sentinel1-grd", ("VV", "VH")),
    }
    return Sample(sequences, np.array(middle, np.float32), id=path.stem, source="cropharvest")


def _month(
    layers: dict[str, np.ndarray], bands: tuple[str, ...], month: int, path: pathlib.Path
) -> Float[np.ndarray, "c h w"]:
    """Bands by name: B01 is B1 in the first month and B1_1 in the second."""
    names = [f"{band.replace('B0', 'B')}{f'_{month}' if month else ''}" for band in bands]
    missing = [name for name in names if name not in layers]
    if missing:
        raise BadRecord(f'"{path}" has no layer "{missing[0]}"')
    return np.stack([layers[name] for name in names])
