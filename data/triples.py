"""TreeSatAI Time-Series: an aerial image with a year of Sentinel-2 and of Sentinel-1 at one forest site.

Source: TreeSatAI (Ahlswede et al., 2023) and its time series (Astruc et al., 2024), Lower Saxony, CC-BY-4.0.
Input: one .npz and one .json a site: `hr` (4, 304, 304) at 0.2 m; `s2` (t, 10, 6, 6); `s2_mask` (t, 2, 6, 6);
`s1_asc` and `s1_des` (t, 2, 6, 6); dates as yyyymmdd.

Traps:
- The aerial bands come as near infrared, green, blue, red. Their names carry the order; no pixel is moved.
- Of the aerial image only the year is known: it gets the first of July, when leaves are out.
- Sentinel-1 is linear backscatter with zeros, NaN and near-zeros at the swath's edge; here it becomes dB.
- In some files a Sentinel-1 pass is scrambled: VV and VH alternate within the image, by a pattern that differs between
  them. Such a pass is left out. It shows: over land VV is stronger than VH in almost every pixel (95 % and more
  in sound passes), in a scrambled one in half. A site where both passes are scrambled has no radar.
- Ascending and descending passes are one sequence in the order of days. A day may occur twice; both images stay.
- `s2_mask` gives per cent, not classes: a pixel is clear where snow and cloud are both below 50, so that neither is the
  likelier thing to be seen there. By this limit a third to a half of all dates are clear throughout.
- The aerial image spans 60.8 m, the satellites' 6 pixels 60 m, around the same middle.
"""

import json
import pathlib
from collections.abc import Iterator

import numpy as np

from skyjax.input.build import FileSamples, channels_last, list_files, load_arrays, to_days, to_decibels
from skyjax.sample import Sample, make_sequence

TITLE = "TreeSatAI Time-Series triples: aerial, Sentinel-2, Sentinel-1"
LICENCE = "CC-BY-4.0"
ATTRIBUTION = (
    "TreeSatAI (Ahlswede et al. 2023), TreeSatAI Time-Series (Astruc et al. 2024);"
    " contains modified Copernicus Sentinel data;"
    " aerial images: Landesamt für Geoinformation und Landesvermessung Niedersachsen"
)
AERIAL_BANDS = ("nir", "green", "blue", "red")
SENTINEL2_BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
GENERA = (
    *("Abies", "Acer", "Alnus", "Betula", "Cleared", "Fagus", "Fraxinus", "Larix", "Picea", "Pinus", "Populus"),
    *("Prunus", "Pseudotsuga", "Quercus", "Tilia"),
)
LEAST_VV_OVER_VH = 0.75  # share of pixels
SMALLEST_SHARE = 0.07  # of a genus that counts as present, as in TreeSatAI's own benchmark


def samples(folder: pathlib.Path) -> Iterator[Sample]:
    """One sample a site, labelled by the genera that are present and by the share of the area that each has."""
    return FileSamples(list_files(folder, "*.npz"), _site)


def label_names(folder: pathlib.Path) -> dict[str, list[str]]:
    """Names of the entries of each label."""
    return {"genera": list(GENERA), "shares": list(GENERA)}


def _site(path: pathlib.Path) -> Sample:
    arrays, about = load_arrays(path), json.loads(path.with_suffix(".json").read_text())
    sequences = {
        "optical": make_sequence(
            channels_last(arrays["hr"][None]),
            "aerial",
            AERIAL_BANDS,
            days=to_days([about["year"] * 10_000 + 701]),
            gsd=0.2,
            name=path.name,
        ),
        "multispectral": make_sequence(
            channels_last(arrays["s2"]),
            "sentinel2-l2a",
            SENTINEL2_BANDS,
            days=to_days(arrays["s2_date"]),
            clear=np.all(arrays["s2_mask"] < 50, axis=1),
            gsd=10,
            name=path.name,
        ),
    }
    passes = [name for name in ("s1_asc", "s1_des") if not _scrambled(arrays[name])]
    if passes:
        sequences["sar"] = make_sequence(
            channels_last(to_decibels(np.concatenate([arrays[name] for name in passes]))),
            "sentinel1-grd",
            ("VV", "VH"),
            days=to_days(np.concatenate([arrays[f"{name}_date"] for name in passes])),
            gsd=10,
            name=path.name,
        )
    share_of = dict(about["labels"])
    shares = np.array([share_of.get(genus, 0) for genus in GENERA], np.float32)
    present = (shares >= np.float32(SMALLEST_SHARE)).astype(np.uint8)
    lonlat = np.array(about["lonlat"], np.float32)
    return Sample(sequences, lonlat, labels={"genera": present, "shares": shares}, id=path.stem, source="treesatai-ts")


def _scrambled(radar: np.ndarray) -> bool:
    """Whether VV, VH (t, 2, h, w) are mixed up: see the traps."""
    return bool(np.mean(radar[:, 0] > radar[:, 1]) < LEAST_VV_OVER_VH)
