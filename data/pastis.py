"""PASTIS-R: three dates of Sentinel-2 and of Sentinel-1, ascending and descending, with a map of crops.

Source: PASTIS-R (Sainte Fare Garnot et al., 2022) as packed by GEO-Bench-2; images and labels Etalab 2.0 / CC-BY-4.0.
Input: one .npz and one .json a patch: `s2` int16 (3, 10, 32, 32), `s1a` and `s1d` float16 (3, 3, 32, 32),
`semantic` uint8 (3, 32, 32).

Traps:
- Patches were resized by the source from 128 to 32 pixels of the same 1.28 km, so a pixel is 40 m.
- Sentinel-1 has VV, VH and their difference; the third says nothing new and is left out.
- Sentinel-2 is Theia's surface reflectance: dark pixels may be negative. int16 holds them.
- No cloud mask is given: a cloudy date counts as clear here, so one should not read `clear` as "no cloud".
- Only `semantic[0]` holds classes; 19 is "void" and becomes -1.
"""

import json
import pathlib
from collections.abc import Iterator

import numpy as np

from skyjax.input.build import FileSamples, channels_last, list_files, load_arrays, to_days
from skyjax.sample import Sample, make_sequence

TITLE = "PASTIS-R patches: Sentinel-2 and Sentinel-1, three dates each"
LICENCE = "CC-BY-4.0 and Etalab-2.0"
ATTRIBUTION = (
    "PASTIS-R (Sainte Fare Garnot et al. 2022), GEO-Bench-2; labels: IGN, RPG (Etalab 2.0);"
    " contains modified Copernicus Sentinel data"
)
BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
VOID = 19
CROPS = (
    *("Background", "Meadow", "Soft winter wheat", "Corn", "Winter barley", "Winter rapeseed", "Spring barley"),
    *("Sunflower", "Grapevine", "Beet", "Winter triticale", "Winter durum wheat", "Fruits, vegetables, flowers"),
    *("Potatoes", "Leguminous fodder", "Soybeans", "Orchard", "Mixed cereal", "Sorghum"),
)


def samples(folder: pathlib.Path) -> Iterator[Sample]:
    """One sample a patch, with its map of crops."""
    return FileSamples(list_files(folder, "*.npz"), _patch)


def label_names(folder: pathlib.Path) -> dict[str, list[str]]:
    """Names of the classes of each label."""
    return {"crops": list(CROPS)}


def _patch(path: pathlib.Path) -> Sample:
    arrays, about = load_arrays(path), json.loads(path.with_suffix(".json").read_text())
    dates = {name: item["dates"] for name, item in about["_subitems"].items()}
    radar = np.concatenate([arrays["s1a"][:, :2], arrays["s1d"][:, :2]]).astype(np.float32)
    sequences = {
        "multispectral": make_sequence(
            channels_last(arrays["s2"]), "sentinel2-l2a", BANDS, days=to_days(dates["s2"]), gsd=40, name=path.name
        ),
        "sar": make_sequence(
            channels_last(radar),
            "sentinel1-grd",
            ("VV", "VH"),
            days=to_days(dates["s1a"] + dates["s1d"]),
            gsd=40,
            name=path.name,
        ),
    }
    crops = arrays["semantic"][0].astype(np.int16)
    labels = {"crops": np.where(crops == VOID, -1, crops).astype(np.int16)}
    lonlat = np.array([about["lon"], about["lat"]], np.float32)
    return Sample(sequences, lonlat, labels=labels, id=about["patch_id"], source="pastis-r")
