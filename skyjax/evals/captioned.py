"""Captioned sets: images with one or more texts each, of one split.

In: a Karpathy-style split file with the images in a folder beside it, a skyjax dataset whose records have texts, or a
folder of such with subfolders train, val, test. Out: `CaptionedSet`, whose images all have the same size a modality.

    {"images": [{"filename": "1.jpg", "split": "test", "sentences": [{"raw": "many planes at an airport"}, ...]}, ...]}
"""

import collections
import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from skyjax.errors import BadRecord, UserError, nearest
from skyjax.evals.reading import look_at
from skyjax.evals.sources import DEFAULT_SENSOR, Example, band_names
from skyjax.input.images import image_sample, read_image
from skyjax.input.records import DESCRIPTION, RecordSource
from skyjax.input.split_file import PART_NAMES, read_split_file
from skyjax.sample import Sample
from skyjax.sensors import get_sensor

ALL = "all"
_TAKEN = ("test", "val", "train")  # the first that there is, where no split is named

# A sample without captions and the names of its label numbers -> captions for it.
Make = Callable[[Sample, Mapping[str, Any]], Sequence[str]]

logger = logging.getLogger("skyjax")


@dataclasses.dataclass(frozen=True)
class CaptionedSet:
    """Images of one split with their texts.

    Attributes:
      name: what the user called it.
      names: of the images.
      captions: of each image, one or more.
      sizes: modality -> (height, width) of every image.
      split: which split, in words.
      notes: what a reader of the results should know.
      read: number of an image -> its sample.
    """

    name: str
    names: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]
    sizes: Mapping[str, tuple[int, int]]
    split: str
    notes: tuple[str, ...]
    read: Callable[[int], Sample]


@dataclasses.dataclass(frozen=True)
class _Entry:
    part: str
    texts: tuple[str, ...]
    example: Example


def open_captioned(
    path: str,
    *,
    split: str | None = None,
    images: str | None = None,
    sensor: str | None = None,
    bands: Sequence[str] = (),
    image_size: int | None = None,
    largest: Mapping[str, int] | None = None,
    make: Make | None = None,
) -> CaptionedSet:
    """Opens a set, chooses a split and looks at its images.

    Args:
      path: a split file (.json), a skyjax dataset, or a folder with one in train, val and test each.
      split: "train", "val", "test", "all", or another that the source has; the first of test, val and train that there
        is where left out, and all where the source has no splits.
      images: folder of a split file's images; where left out they are looked for beside the file and below.
      sensor: key in sensors.toml of a split file's images; "rgb" where left out. Records know their own.
      bands: names, in the order of the images' bands; the sensor's where left out.
      image_size: pixels a side that every image is resized to.
      largest: modality -> longest side in pixels; larger images are shrunk to it.
      make: makes captions of records that have none.

    Raises:
      UserError: there is no such set, split or image, nothing has a caption, or more than 1 % of the images cannot be
        used.
    """
    source = pathlib.Path(path)
    if source.suffix == ".json":
        entries, notes = _split_file(source, images, sensor, tuple(bands))
    elif images is not None:
        raise UserError(f'--images={images} is for a split file (.json); "{path}" is none')
    elif sensor or bands:
        raise UserError(f'"{path}" is a skyjax dataset, whose records say their sensor and bands; leave out --sensor')
    else:
        entries, notes = _records(source, make)
    chosen, told = _choose(path, entries, split)
    captioned = [entry for entry in chosen if entry.texts]
    if not captioned:
        raise UserError(f'"{path}": none of the {len(chosen):,} images ({told}) has a caption; name another set')
    if len(captioned) < len(chosen):
        notes.append(f"{len(chosen) - len(captioned):,} of {len(chosen):,} images have no caption and were left out")
    looked = look_at(
        [entry.example for entry in captioned], np.arange(len(captioned)), image_size=image_size, largest=largest
    )
    good = sorted(looked.digests)
    return CaptionedSet(
        path,
        tuple(captioned[i].example.name for i in good),
        tuple(captioned[i].texts for i in good),
        looked.sizes,
        told,
        (*notes, *looked.notes),
        lambda i: looked.read(good[i]),
    )


def _choose(path: str, entries: Sequence[_Entry], split: str | None) -> tuple[list[_Entry], str]:
    counts = collections.Counter(entry.part for entry in entries)
    if split == ALL or (split is None and set(counts) <= {""}):
        return list(entries), "all images"
    wanted = next((part for part in _TAKEN if part in counts), None) if split is None else split.lower()
    wanted = PART_NAMES.get(wanted or "", wanted)
    found = [entry for entry in entries if entry.part == wanted]
    if not found:
        there = ", ".join(f"{part or 'no split'} ({count:,})" for part, count in sorted(counts.items()))
        near = nearest(str(split), counts)
        raise UserError(f'"{path}" has no split "{split}"{near}; it has {there}; take one, or --split={ALL}')
    return found, f'split "{wanted}"'


# Split files


def _split_file(
    path: pathlib.Path, images: str | None, sensor: str | None, bands: tuple[str, ...]
) -> tuple[list[_Entry], list[str]]:
    table = get_sensor(sensor or DEFAULT_SENSOR)
    listed = read_split_file(path, pathlib.Path(images) if images is not None else None)
    names = bands
    if listed[0].file.is_file():
        names = band_names(table, bands, read_image(listed[0].file).shape[2], f'"{listed[0].file}"')
    entries = []
    for each in listed:
        read = functools.partial(image_sample, each.file, table.key, names, source=path.stem)
        entries.append(_Entry(each.part, each.texts, Example(each.file.name, 0, "", read)))
    return entries, ["dates are unknown: every image has day 0"]


# skyjax datasets


def _records(folder: pathlib.Path, make: Make | None) -> tuple[list[_Entry], list[str]]:
    parts: Iterable[tuple[str, pathlib.Path]] = [("", folder)]
    if not (folder / DESCRIPTION).is_file():
        inside = sorted(folder.iterdir()) if folder.is_dir() else []
        parts = [(PART_NAMES[each.name.lower()], each) for each in inside if each.name.lower() in PART_NAMES]
        parts = [(part, each) for part, each in parts if (each / DESCRIPTION).is_file()]
    if not parts:
        raise UserError(
            f'dataset: "{folder}" is neither a split file (.json) nor a skyjax dataset, nor a folder with one in train,'
            " val and test"
        )
    entries, unreadable, made = [], 0, 0
    for part, each in parts:
        source = RecordSource(each)
        names = source.description.get("label_names", {})
        for i in range(len(source)):
            try:
                sample = source[i]
            except BadRecord as error:
                unreadable += 1
                logger.warning("%s; left out, %d so far", error, unreadable)
                continue
            # A text with a tab is a question with its answer (docs/records.md).
            texts = tuple(" ".join(text.split()) for text in sample.texts if "\t" not in text)
            if not texts and make is not None:
                texts = tuple(make(sample, names))
                made += bool(texts)
            read = functools.partial(source.__getitem__, i)
            entries.append(_Entry(part, texts, Example(sample.id or source.name(i), 0, "", read)))
    notes = [f"{unreadable:,} records cannot be read and were left out"] if unreadable else []
    if made:
        notes.append(f"{made:,} of {len(entries):,} records have no captions; theirs were made of labels and questions")
    return entries, notes
