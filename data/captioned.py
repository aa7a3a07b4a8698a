"""Images with captions of their own, listed by a split file: RSICD, UCM-captions, Sydney-captions and their like.

Input: one .json file whose "images" have filename, split and sentences (skyjax/input/split_file.py), and the images in
the folder or anywhere below. Each split becomes a data set of its own: OUT/train, OUT/val, OUT/test.

Traps:
- Pre-training takes OUT/train, or its numbers on OUT/test mean nothing.
- All captions of an image are kept; training draws `data.text.captions` of them a step.
- The pictures are 8-bit RGB of aerial or commercial satellites: sensor "rgb". For another copy this file, set SENSOR.
- Their day is 0 and their place unknown.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator

from skyjax.errors import UserError
from skyjax.input.build import FileSamples, list_files
from skyjax.input.images import image_sample
from skyjax.input.split_file import Listed, read_split_file
from skyjax.sample import Sample

TITLE = "Captioned images"
LICENCE = "that of the images"
PARTS = ("train", "val", "test")
SENSOR = "rgb"


def samples(folder: pathlib.Path, part: str) -> Iterator[Sample]:
    """One sample an image of a split, with all its captions."""
    chosen = {each.file: each for each in _listed(folder) if each.part == part}
    source = f"{folder.resolve().name}/{part}"

    def make(file: pathlib.Path) -> Sample:
        return dataclasses.replace(image_sample(file, SENSOR, source=source), texts=chosen[file].texts)

    return FileSamples(list(chosen), make)


@functools.cache
def _listed(folder: pathlib.Path) -> tuple[Listed, ...]:
    files = list_files(folder, "*.json")
    if len(files) != 1:
        names = ", ".join(file.name for file in files)
        raise UserError(f'"{folder}" has {len(files)} .json files, not one split file: {names}')
    listed = read_split_file(files[0])
    strange = sorted({each.part for each in listed} - set(PARTS))
    if strange:
        raise UserError(f'"{files[0]}" has images of the split "{strange[0]}"; the splits are {", ".join(PARTS)}')
    return listed
