"""WorldCereal monthly composites: a year of Sentinel-2 and Sentinel-1 over one square kilometre of fields.

Source: the test data of WorldCereal's classification, CC-BY-4.0.
Input: monthly_*.npz: `s2` uint16 (12, 9, 100, 100), `s1_raw` uint16 (12, 2, 100, 100), `date` yyyymmdd (12,); elevation
and slope are left out. Where it lies beside the sites of worldcereal.py, only the monthly file is read.

Traps:
- 65535 is nodata; whole months are missing.
- Bands are B02 B03 B04 B05 B06 B07 B08 B11 B12. The 20 m bands stand twice in each direction, B8A nowhere.
- Sentinel-1 is stored as a digital number: dB = 20 log10(DN) - 83.
- A composite has the first day of its month. It gets the 15th, as those of worldcereal_pixels.py.
- No position is given, nor labels.
"""

import pathlib
from collections.abc import Iterator

import numpy as np

from skyjax.errors import BadRecord
from skyjax.input.build import FileSamples, channels_last, list_files, load_arrays, to_days
from skyjax.sample import Sample, make_sequence

TITLE = "WorldCereal monthly composites: a year of Sentinel-2 and Sentinel-1"
LICENCE = "CC-BY-4.0"
ATTRIBUTION = "worldcereal-classification (WorldCereal consortium); contains modified Copernicus Sentinel data"
BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B11", "B12")
NODATA = 65_535


def samples(folder: pathlib.Path) -> Iterator[Sample]:
    """One sample a file."""
    return FileSamples(list_files(folder, "monthly_*.npz"), _square)


def _square(path: pathlib.Path) -> Sample:
    arrays = load_arrays(path)
    missing = [key for key in ("s2", "s1_raw", "date") if key not in arrays]
    if missing:
        raise BadRecord(f'"{path}" has no array "{missing[0]}"')
    days = to_days(arrays["date"]) + 14
    optical, digital = arrays["s2"], arrays["s1_raw"]
    there = (digital != NODATA) & (digital > 0)
    radar = np.where(there, 20 * np.log10(np.maximum(digital, 1)) - 83, np.nan).astype(np.float32)
    sequences = {
        "multispectral": make_sequence(
            channels_last(np.where(optical == NODATA, 0, optical)),  # 0 is the sensor's own nodata
            "sentinel2-l2a",
            BANDS,
            days=days,
            clear=(optical != NODATA).all(1),
            gsd=10,
            name=path.name,
        ),
        "sar": make_sequence(channels_last(radar), "sentinel1-grd", ("VV", "VH"), days=days, gsd=10, name=path.name),
    }
    return Sample(sequences, np.full(2, np.nan, np.float32), id=path.stem, source="worldcereal-monthly")
