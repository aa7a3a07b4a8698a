"""Captioned sets: images with one or more texts each, of one split.

In: a Karpathy-style split file with the images in a folder beside it, a skyjax dataset whose records have texts, or a
folder of such with subfolders train, val, test. Out: `CaptionedSet`, whose images all have the same size a modality.

    {"images": [{"filename": "1.jpg", "split": "test", "sentences": [{"raw": "many planes at an airport"}, ...]}, ...]}
"""

import collections
import dataclasses
import functools
import json
import logging
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from skyjax.errors import BadRecord, UserError, nearest
from skyjax.evals.reading import look_at
from skyjax.evals.sources import DEFAULT_SENSOR, PART_NAMES, Example, band_names
from skyjax.input.images import SUFFIXES, image_sample, list_images, read_image
from skyjax.input.records import DESCRIPTION, RecordSource
from skyjax.sample import Sample
from skyjax.sensors import get_sensor

ALL = "all"
_PARTS = PART_NAMES | {"restval": "train"}  # what COCO's split file calls the rest of its validation images
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
    wanted = _PARTS.get(wanted or "", wanted)
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
    told = _read(path)
    if images is not None and not pathlib.Path(images).is_dir():
        raise UserError(f'--images={images}: there is no such folder; name the one that holds the images of "{path}"')
    find = _Finder(path, pathlib.Path(images) if images is not None else path.parent)
    files = [find(str(entry.get("filepath") or ""), _filename(path, entry)) for entry in told]
    names = bands
    if files and files[0].is_file():
        names = band_names(table, bands, read_image(files[0]).shape[2], f'"{files[0]}"')
    entries = []
    for entry, file in zip(told, files, strict=True):
        read = functools.partial(image_sample, file, table.key, names, source=path.stem)
        part = str(entry.get("split") or "").lower()
        entries.append(_Entry(_PARTS.get(part, part), _raw(entry), Example(file.name, 0, "", read)))
    return entries, ["dates are unknown: every image has day 0"]


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f'dataset: there is no file "{path}"; name a split file or a skyjax dataset')
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f'"{path}" is not JSON: {error}') from error
    listed = told.get("images") if isinstance(told, dict) else None
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise UserError(f'"{path}" is no split file: it has no list "images" whose entries have filename and sentences')
    if not listed:
        raise UserError(f'"{path}" lists no images')
    return listed


def _filename(path: pathlib.Path, entry: Mapping[str, Any]) -> str:
    name = entry.get("filename") or entry.get("file_name")
    if not isinstance(name, str):
        raise UserError(f'"{path}": an entry of "images" has no filename: {json.dumps(entry)[:120]}')
    return name


def _raw(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """An entry's sentences as they are; from their tokens where they are not."""
    found = []
    for sentence in entry.get("sentences") or ():
        tokens = sentence.get("tokens") if isinstance(sentence, dict) else None
        text = sentence if isinstance(sentence, str) else sentence.get("raw") or " ".join(tokens or ())
        found.append(" ".join(text.split()))
    return tuple(text for text in found if text)


class _Finder:
    """Finds a split file's images: in the folder itself, else by their name anywhere below it."""

    def __init__(self, path: pathlib.Path, folder: pathlib.Path):
        self._path, self._folder = path, folder

    def __call__(self, below: str, name: str) -> pathlib.Path:
        """The file.

        Raises:
          UserError: there is none, or several of this name.
        """
        for file in (self._folder / below / name, self._folder / name):
            if file.is_file():
                return file
        found = self._by_name.get(pathlib.PurePosixPath(name).name, [])
        if len(found) == 1:
            return found[0]
        if not found:
            raise UserError(
                f'"{self._path}": there is no image "{name}" in "{self._folder}" or below it'
                f" ({' '.join(SUFFIXES)}); say by --images=DIR where they are"
            )
        raise UserError(
            f'"{self._path}": several images are called "{name}": {found[0]}, {found[1]}; say by --images=DIR which'
        )

    @functools.cached_property
    def _by_name(self) -> dict[str, list[pathlib.Path]]:
        found: dict[str, list[pathlib.Path]] = {}
        for file in list_images(self._folder):
            found.setdefault(file.name, []).append(file)
        return found


# skyjax datasets


def _records(folder: pathlib.Path, make: Make | None) -> tuple[list[_Entry], list[str]]:
    parts: Iterable[tuple[str, pathlib.Path]] = [("", folder)]
    if not (folder / DESCRIPTION).is_file():
        inside = sorted(folder.iterdir()) if folder.is_dir() else []
        parts = [(_PARTS[each.name.lower()], each) for each in inside if each.name.lower() in _PARTS]
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
