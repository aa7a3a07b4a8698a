"""RSVQA: images with questions and their answers, of low (Sentinel-2, 10 m) or high resolution (aerial, 15 cm).

Source: RSVQA (Lobry et al., 2020), CC-BY-4.0; the answers were made from OpenStreetMap, ODbL.
Input: `images/ID.png` or `.jpg`; `images.json`, ID -> split, lon, lat, res and, of most, date as yyyymmdd; `qa.jsonl`,
one question a line: img_id, type, question, answer. Each split becomes a data set of its own: OUT/train, OUT/val.

A question is a text of three fields with a tab between them, type, question and answer (docs/records.md).

Traps:
- The splits were made by the authors, by place. Pre-training takes OUT/train, or its numbers on OUT/val mean nothing.
- Answers are strings. A count may be any number; probes put them into RSVQA's classes, records keep them as they are.
- A type is short for its kind of question: "comp" compares two counts, "rural_urban" asks which of the two.
- The low-resolution images are pictures of 8 bits, not reflectance; so both collections are the sensor "rgb".
- Of the aerial images no date is given: day 0.
"""

import collections
import datetime
import functools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from skyjax.errors import BadRecord, UserError
from skyjax.input.build import FileSamples, list_files
from skyjax.input.images import read_image
from skyjax.sample import Sample, make_sequence

TITLE = "RSVQA: images with questions and answers"
LICENCE = "CC-BY-4.0 and, of the answers, ODbL-1.0"
ATTRIBUTION = (
    "RSVQA (Lobry et al. 2020); answers from OpenStreetMap (ODbL); contains modified Copernicus Sentinel data;"
    " aerial images: USGS"
)
PARTS = ("train", "val", "test")
BANDS = ("red", "green", "blue")


def samples(folder: pathlib.Path, part: str) -> Iterator[Sample]:
    """One sample an image of a split that has a question."""
    about, asked = _about(folder), _questions(folder)
    files = {file.stem: file for file in list_files(folder / "images", "*")}
    chosen = sorted((key for key, each in about.items() if each.get("split") == part and key in asked), key=_number)
    absent = sorted(set(chosen) - set(files))
    if absent:
        raise UserError(f'"{folder / "images"}" lacks the image of {len(absent)} entries of images.json: {absent[0]}')

    def make(file: pathlib.Path) -> Sample:
        return _image(file, about[file.stem], asked[file.stem], f"{folder.resolve().name}/{part}")

    return FileSamples([files[key] for key in chosen], make)


def _image(file: pathlib.Path, about: Mapping[str, Any], texts: Sequence[str], source: str) -> Sample:
    values = read_image(file)
    if values.shape[2] != len(BANDS):
        raise BadRecord(f'"{file}" has {values.shape[2]} bands, not red, green and blue')
    day = 0
    if about.get("date"):
        day = (datetime.datetime.strptime(about["date"], "%Y%m%d").date() - datetime.date(1970, 1, 1)).days
    gsd = float(about["res"].removesuffix("m")) if about.get("res") else None
    sequence = make_sequence(values[None], "rgb", BANDS, days=np.array([day]), gsd=gsd, name=file.name)
    lonlat = np.array([about.get("lon", np.nan), about.get("lat", np.nan)], np.float32)
    return Sample({"optical": sequence}, lonlat, texts=tuple(texts), id=file.stem, source=source)


@functools.cache
def _about(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    try:
        return json.loads(_read(folder / "images.json"))
    except ValueError as error:
        raise UserError(f'"{folder / "images.json"}" is not JSON: {error}') from error


@functools.cache
def _questions(folder: pathlib.Path) -> dict[str, list[str]]:
    found = collections.defaultdict(list)
    for number, line in enumerate(_read(folder / "qa.jsonl").splitlines(), 1):
        try:
            each = json.loads(line)
            fields = [" ".join(str(each[key]).split()) for key in ("type", "question", "answer")]
            found[str(each["img_id"])].append("\t".join(fields))
        except (ValueError, KeyError) as error:
            raise UserError(f'"{folder / "qa.jsonl"}", line {number}, is not a question: {error!r}') from error
    return found


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f'"{path}" cannot be read: {error.strerror}; --input is the folder that it lies in') from error


def _number(key: str) -> tuple[int, str]:
    return (int(key), key) if key.isdigit() else (0, key)
