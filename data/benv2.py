"""BigEarthNet v2: one Sentinel-2 and one Sentinel-1 image of a patch of 1.2 km, with 19 land-cover classes.

Source: BigEarthNet v2.0 (reBEN, Clasen et al., 2024) as packed by GEO-Bench-2, CDLA-Permissive-1.0.
Input: one .npz and one .json a patch. The arrays come in one of two forms: one array a band at its own resolution
(`B02` (1, 120, 120), `B05` (1, 60, 60), `B01` (1, 20, 20), `VV`, `VH`), or `s1` (2, 120, 120) and `s2` (12, 120, 120).

Traps:
- `s1` has VH before VV.
- Bands of 20 m and 60 m are repeated to the 10 m grid. In the second form the source has interpolated them.
- Both images get the date of the Sentinel-2 image; the radar's, some days apart, isn't given.
- 0 is nodata in Sentinel-2.
- Cloud and snow are flags of the whole patch. A patch with either is left as it is: pixels aren't told apart.
"""

import json
import pathlib
from collections.abc import Iterator

import numpy as np

from skyjax.input.build import FileSamples, channels_last, list_files, load_arrays, repeat_pixels
from skyjax.sample import Sample, make_sequence
from skyjax.sensors import get_sensor

TITLE = "BigEarthNet v2 pairs: Sentinel-2, Sentinel-1"
LICENCE = "CDLA-Permissive-1.0"
ATTRIBUTION = "BigEarthNet v2.0 (Clasen et al. 2024), GEO-Bench-2; contains modified Copernicus Sentinel data"
SIZE = 120  # pixels a side at 10 m
CLASSES = (
    "Urban fabric",
    "Industrial or commercial units",
    "Arable land",
    "Permanent crops",
    "Pastures",
    "Complex cultivation patterns",
    "Land principally occupied by agriculture, with significant areas of natural vegetation",
    "Agro-forestry areas",
    "Broad-leaved forest",
    "Coniferous forest",
    "Mixed forest",
    "Natural grassland and sparsely vegetated areas",
    "Moors, heathland and sclerophyllous vegetation",
    "Transitional woodland, shrub",
    "Beaches, dunes, sands",
    "Inland wetlands",
    "Coastal wetlands",
    "Inland waters",
    "Marine waters",
)


def samples(folder: pathlib.Path) -> Iterator[Sample]:
    """One sample a patch, labelled by the classes that are present."""
    return FileSamples(list_files(folder, "*.npz"), _patch)


def label_names(folder: pathlib.Path) -> dict[str, list[str]]:
    """Names of the entries of each label."""
    return {"classes": list(CLASSES)}


def _patch(path: pathlib.Path) -> Sample:
    arrays, about = load_arrays(path), json.loads(path.with_suffix(".json").read_text())
    optical_bands = get_sensor("sentinel2-l2a").names
    optical = arrays["s2"] if "s2" in arrays else _stack(arrays, optical_bands)
    radar, polarisations = (
        (arrays["s1"], ("VH", "VV")) if "s1" in arrays else (_stack(arrays, ("VV", "VH")), ("VV", "VH"))
    )
    days = np.array([int(about["stac:time_start"]) // 86_400])
    sequences = {
        "multispectral": make_sequence(
            channels_last(optical[None]), "sentinel2-l2a", optical_bands, days=days, gsd=10, name=path.name
        ),
        "sar": make_sequence(
            channels_last(radar[None]), "sentinel1-grd", polarisations, days=days, gsd=10, name=path.name
        ),
    }
    classes = np.array([name in about["labels"] for name in CLASSES], np.uint8)
    lonlat = np.array([about["lon"], about["lat"]], np.float32)
    return Sample(sequences, lonlat, labels={"classes": classes}, id=path.stem, source="bigearthnet-v2")


def _stack(arrays: dict[str, np.ndarray], bands: tuple[str, ...]) -> np.ndarray:
    """Bands of one array each on the 10 m grid, (c, h, w)."""
    return np.concatenate([repeat_pixels(arrays[band], SIZE // arrays[band].shape[-1]) for band in bands])
