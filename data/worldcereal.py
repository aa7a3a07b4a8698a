"""WorldCereal reference sites: a year or two of Sentinel-2 and Sentinel-1 over fields, many dates cloudy.

Source: WorldCereal reference data (Van Tricht et al., 2023), CC-BY-4.0.
Input: one .npz and one .json a site: `s2_10m` (t, 4, 64, 64), `s2_20m` (t, 6, 32, 32), `scl_20m` (t, 32, 32),
`s1_20m_db` (t, 2, 32, 32), dates as yyyymmdd; `lc` and `ct` (64, 64), codes of land cover and crop type.

Traps:
- One site's .npz has its position as lat, lon. The JSON's is lon, lat for every site; it is the one that is used.
- 20 m bands are repeated to the 10 m grid, so that no value is made up. A site without 10 m bands stays at 20 m, with
  the bands that it has.
- Scene classes that are clear: 4 vegetation, 5 bare, 6 water, 7 unclassified. Not clear: 0 nodata, 1 saturated, 2 dark
  (mostly shadow), 3 cloud shadow, 8 and 9 cloud, 10 cirrus, 11 snow.
- 0 is nodata in the images and "no label" in the label maps, where it becomes -1. Other codes are kept as they are.
- Sentinel-1 is in dB already, at 20 m.
- monthly_100x100.npz, which lies beside the sites in some copies, is of another kind (composites): sites have a JSON.
"""

import json
import pathlib
from collections.abc import Iterator

import numpy as np

from skyjax.errors import UserError
from skyjax.input.build import FileSamples, channels_last, list_files, load_arrays, repeat_pixels, to_days
from skyjax.sample import Sample, Sequence, make_sequence

TITLE = "WorldCereal sites: Sentinel-2 and Sentinel-1 sequences"
LICENCE = "CC-BY-4.0"
ATTRIBUTION = "WorldCereal reference data (Van Tricht et al. 2023); contains modified Copernicus Sentinel data"
BANDS_10M = ("B02", "B03", "B04", "B08")
BANDS_20M = ("B05", "B06", "B07", "B8A", "B11", "B12")
CLEAR_CLASSES = (4, 5, 6, 7)


def samples(folder: pathlib.Path) -> Iterator[Sample]:
    """One sample a site, with maps of land-cover and crop-type codes."""
    files = [file for file in list_files(folder, "*.npz") if file.with_suffix(".json").is_file()]
    if not files:
        raise UserError(f'"{folder}" has no .npz with a .json beside it; --input is the folder of the sites')
    return FileSamples(files, _site)


def _site(path: pathlib.Path) -> Sample:
    arrays, about = load_arrays(path), json.loads(path.with_suffix(".json").read_text())
    sequences = {
        "multispectral": _sentinel2(arrays, path.name),
        "sar": make_sequence(
            channels_last(arrays["s1_20m_db"]),
            "sentinel1-grd",
            ("VV", "VH"),
            days=to_days(arrays["s1_date"]),
            clear=np.all(arrays["s1_20m_db"] != 0, axis=1),
            gsd=20,
            name=path.name,
        ),
    }
    labels = {
        name: np.where(arrays[key] == 0, -1, arrays[key]).astype(np.int16)
        for name, key in (("land_cover", "lc"), ("crop_type", "ct"))
    }
    return Sample(
        sequences, np.array(about["lonlat"], np.float32), labels=labels, id=about["site"], source="worldcereal"
    )


def _sentinel2(arrays: dict[str, np.ndarray], name: str) -> Sequence:
    bands: tuple[str, ...] = BANDS_20M
    values, clear = arrays["s2_20m"], np.isin(arrays["scl_20m"], CLEAR_CLASSES)
    fine = "s2_10m" in arrays
    if fine:
        values = np.concatenate([arrays["s2_10m"], repeat_pixels(values, 2)], axis=1)
        clear, bands = repeat_pixels(clear, 2), BANDS_10M + BANDS_20M
    days = to_days(arrays["s2_20m_date"])
    gsd = 10 if fine else 20
    return make_sequence(channels_last(values), "sentinel2-l2a", bands, days=days, clear=clear, gsd=gsd, name=name)
