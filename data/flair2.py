"""FLAIR #2: aerial images of France at 0.2 m with land-cover masks. Optical only.

Source: FLAIR #2 (Garioud et al., 2023), IGN, as packed by GEO-Bench-2, Etalab-2.0.
Input: one .npz and one .json an image: `aerial` uint8 (5, 512, 512), `mask` uint8 (1, 512, 512).

Traps:
- The fifth channel is height, not a band; it is left out.
- Mask classes count from 1 to 19; here from 0 to 18. 19 in the file is "other", kept as class 18.
"""

import json
import pathlib
from collections.abc import Iterator

import numpy as np

from skyjax.input.build import FileSamples, channels_last, list_files, load_arrays
from skyjax.sample import Sample, make_sequence

TITLE = "FLAIR #2 aerial images"
LICENCE = "Etalab-2.0"
ATTRIBUTION = "FLAIR #2 (Garioud et al. 2023), IGN, GEO-Bench-2"
BANDS = ("red", "green", "blue", "nir")
CLASSES = (
    *("building", "pervious surface", "impervious surface", "bare soil", "water", "coniferous", "deciduous"),
    *("brushwood", "vineyard", "herbaceous vegetation", "agricultural land", "plowed land", "swimming pool", "snow"),
    *("clear cut", "mixed", "ligneous", "greenhouse", "other"),
)


def samples(folder: pathlib.Path) -> Iterator[Sample]:
    """One sample an image, with its land-cover map."""
    return FileSamples(list_files(folder, "*.npz"), _image)


def label_names(folder: pathlib.Path) -> dict[str, list[str]]:
    """Names of the classes of each label."""
    return {"land_cover": list(CLASSES)}


def _image(path: pathlib.Path) -> Sample:
    arrays, about = load_arrays(path), json.loads(path.with_suffix(".json").read_text())
    optical = make_sequence(
        channels_last(arrays["aerial"][None, : len(BANDS)]),
        "aerial",
        BANDS,
        days=np.array([int(about["stac:time_start"]) // 86_400]),
        gsd=0.2,
        name=path.name,
    )
    labels = {"land_cover": arrays["mask"][0].astype(np.int16) - 1}
    lonlat = np.array([about["lon"], about["lat"]], np.float32)
    return Sample({"optical": optical}, lonlat, labels=labels, id=about["image_id"], source="flair2")
