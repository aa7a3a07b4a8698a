"""TreeSatAI: an aerial image with one Sentinel-2 and one Sentinel-1 image of a forest stand.

Source: TreeSatAI (Ahlswede et al., 2023) as packed by GEO-Bench-2, CC-BY-4.0.
Input: one .npz and one .json a stand: `aerial` uint8 (4, 304, 304), `s2` uint16 (12, 6, 6), `s1` float32 (3, 6, 6).

Traps:
- Aerial bands come as near infrared, green, blue, red; Sentinel-2's as B02 B03 B04 B08 B05 B06 B07 B8A B11 B12 B01 B09.
- `s1` is VV, VH and their ratio; the third is left out. Where `s1` has another shape or type the file is broken.
- Only the year of the aerial image is known: everything gets the first of July. Sentinel-2 flies since 2015, so the
  satellite images of older stands are of another year than they say.
- The three images have grids of their own: their extents, from the transforms, are not centred on each other.
"""

import json
import pathlib
from collections.abc import Iterator

import numpy as np

from skyjax.errors import BadRecord
from skyjax.input.build import FileSamples, channels_last, list_files, load_arrays, to_days
from skyjax.sample import Sample, Sequence, make_sequence

TITLE = "TreeSatAI stands: aerial, Sentinel-2, Sentinel-1"
LICENCE = "CC-BY-4.0"
ATTRIBUTION = (
    "TreeSatAI (Ahlswede et al. 2023), GEO-Bench-2; contains modified Copernicus Sentinel data;"
    " aerial images: Landesamt für Geoinformation und Landesvermessung Niedersachsen"
)
AERIAL_BANDS = ("nir", "green", "blue", "red")
SENTINEL2_BANDS = ("B02", "B03", "B04", "B08", "B05", "B06", "B07", "B8A", "B11", "B12", "B01", "B09")


def samples(folder: pathlib.Path) -> Iterator[Sample]:
    """One sample a stand, without labels: data/triples.py has those of this collection."""
    return FileSamples(list_files(folder, "*.npz"), _stand)


def _stand(path: pathlib.Path) -> Sample:
    arrays, about = load_arrays(path), json.loads(path.with_suffix(".json").read_text())
    if arrays["s1"].dtype != np.float32 or arrays["s1"].shape[0] != 3:
        raise BadRecord(f'"{path}" has a broken s1 ({arrays["s1"].dtype}, {arrays["s1"].shape}); leave it out')
    days, items = to_days([int(about["year"]) * 10_000 + 701]), about["_subitems"]
    middle = _middle(items["aerial"]["transform"], arrays["aerial"].shape)

    def sequence(key: str, sensor: str, bands: tuple[str, ...]) -> Sequence:
        values = arrays[key][: len(bands)]
        extent = _extent(items[key]["transform"], values.shape, middle)
        return make_sequence(channels_last(values[None]), sensor, bands, days=days, extent=extent, name=path.name)

    sequences = {
        "optical": sequence("aerial", "aerial", AERIAL_BANDS),
        "multispectral": sequence("s2", "sentinel2-l2a", SENTINEL2_BANDS),
        "sar": sequence("s1", "sentinel1-grd", ("VV", "VH")),
    }
    lonlat = np.array([about["lon"], about["lat"]], np.float32)
    return Sample(sequences, lonlat, id=path.name.split(".tif")[0], source="treesatai")


def _middle(transform: list[float], shape: tuple[int, ...]) -> tuple[float, float]:
    """Northing and easting of an image's middle. EPSG:25832 and 32632 differ by less than a metre."""
    return transform[5] + transform[4] * shape[1] / 2, transform[2] + transform[0] * shape[2] / 2


def _extent(transform: list[float], shape: tuple[int, ...], middle: tuple[float, float]) -> np.ndarray:
    top, left = transform[5] - middle[0], transform[2] - middle[1]
    return np.array([top, left, top + transform[4] * shape[1], left + transform[0] * shape[2]], np.float32)
