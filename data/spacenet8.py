"""SpaceNet 8: pictures of one place before and after a flood, with a map of what was flooded.

Source: SpaceNet 8 (Hänsch et al., 2022) as packed by GEO-Bench-2, CC-BY-SA-4.0.
Input: one .npz and one .json a patch: `pre_image` and `post_image` uint8 (3, 512, 512), `mask` uint8 (1, 512, 512).

Traps:
- Pan-sharpened pictures of 8 bits, not the sensor's 11: they are the sensor "rgb".
- A pixel is a step in degrees, so it is higher than wide: 0.38 m by 0.33 m at 30 degrees north.
- No date is given for either image. Both have day 0, and their order, before then after, is what is known of time.
- The two were taken from different angles by different satellites: roofs and trees lean, and not alike.
- The mask is of flooded roads and buildings, not of all water. Pixels where either image is black were not measured.
"""

import json
import pathlib
from collections.abc import Iterator

import numpy as np

from skyjax.errors import BadRecord
from skyjax.input.build import FileSamples, list_files, load_arrays
from skyjax.input.images import METRES_A_DEGREE
from skyjax.sample import Sample, make_sequence

TITLE = "SpaceNet 8: before and after a flood"
LICENCE = "CC-BY-SA-4.0"
ATTRIBUTION = "SpaceNet 8 (Hänsch et al. 2022), images (c) Maxar, GEO-Bench-2"


def samples(folder: pathlib.Path) -> Iterator[Sample]:
    """One sample a patch: a sequence of two dates and the map "flooded"."""
    return FileSamples(list_files(folder, "*.npz"), _patch)


def label_names(folder: pathlib.Path) -> dict[str, list[str]]:
    """Names of the classes of each label."""
    return {"flooded": ["not flooded", "flooded"]}


def _patch(path: pathlib.Path) -> Sample:
    arrays, about = load_arrays(path), json.loads(path.with_suffix(".json").read_text())
    if not {"pre_image", "post_image", "mask"} <= arrays.keys():
        raise BadRecord(f'"{path}" lacks pre_image, post_image or mask; it has {", ".join(sorted(arrays))}')
    values = np.stack([np.moveaxis(arrays[name], 0, -1) for name in ("pre_image", "post_image")])
    _, height, width, _ = values.shape
    step = about["stac:geotransform"]
    down = abs(step[5]) * METRES_A_DEGREE * height / 2
    across = abs(step[1]) * METRES_A_DEGREE * np.cos(np.radians(about["lat"])) * width / 2
    sequence = make_sequence(
        values,
        "rgb",
        ("red", "green", "blue"),
        days=np.zeros(2, int),
        clear=np.any(values, axis=-1),
        extent=np.array([down, -across, -down, across], np.float32),
        name=path.name,
    )
    flooded = np.where(sequence.clear.all(0), arrays["mask"][0].astype(np.int16), -1).astype(np.int16)
    lonlat = np.array([about["lon"], about["lat"]], np.float32)
    return Sample({"optical": sequence}, lonlat, labels={"flooded": flooded}, id=about["patch_id"], source="spacenet8")
