"""Any folder of class folders of JPEG, PNG or GeoTIFF: where a set of one's own pictures starts.

Input: FOLDER/CLASS/IMAGE, or images in FOLDER itself, which are then unlabelled. Classes are numbered in the order of
their names. A GeoTIFF brings its place, pixel size and nodata. An image that cannot be used is named and passed over.

For other sensors than 8-bit pictures, copy this file and set SENSOR to a key of skyjax/sensors.toml and BANDS to the
names of the files' bands in their order (left empty: the sensor's bands in the sensor's order). For dates, positions or
several modalities, see data/benv2.py, which is short.
"""

import pathlib
from collections.abc import Iterator

from skyjax.errors import UserError
from skyjax.input.build import FileSamples
from skyjax.input.images import SUFFIXES, image_sample
from skyjax.sample import Sample

TITLE = "Images in class folders"
LICENCE = "that of the images"
SENSOR = "rgb"
BANDS: tuple[str, ...] = ()


def samples(folder: pathlib.Path) -> Iterator[Sample]:
    """One sample an image, labelled "class" by its folder."""
    classes = label_names(folder).get("class", [])
    numbers = {name: number for number, name in enumerate(classes)}
    files = [file for part in (classes or ["."]) for file in _images(folder / part)]

    source = "/".join(folder.resolve().parts[-2:])  # the split's name alone, "train", would say little

    def make(file: pathlib.Path) -> Sample:
        return image_sample(file, SENSOR, BANDS, label=numbers.get(file.parent.name), source=source)

    return FileSamples(files, make)


def label_names(folder: pathlib.Path) -> dict[str, list[str]]:
    """The classes: the names of the folders that hold images.

    Raises:
      UserError: there is no image at all.
    """
    classes = sorted(part.name for part in folder.iterdir() if part.is_dir() and _images(part))
    if not classes and not _images(folder):
        raise UserError(f'"{folder}" holds no images ({" ".join(SUFFIXES)}), nor do the folders in it')
    return {"class": classes} if classes else {}


def _images(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
