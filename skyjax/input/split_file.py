"""Split files as retrieval and captioning papers hand them out (Karpathy and Fei-Fei, 2015): images, splits, sentences.

    {"images": [{"filename": "1.jpg", "split": "test", "sentences": [{"raw": "many planes at an airport"}, ...]}, ...]}

In: such a file, and a folder with its images. Out: where each image lies, its part, and its sentences as they are.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from skyjax.errors import UserError
from skyjax.input.images import SUFFIXES, list_images

# What sources call their parts; "restval" is the rest of COCO's validation images, which trains.
PART_NAMES = {
    "train": "train",
    "training": "train",
    "restval": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


@dataclasses.dataclass(frozen=True)
class Listed:
    """One image of a split file: its file, "train", "val", "test" or the file's own word, and its sentences."""

    file: pathlib.Path
    part: str
    texts: tuple[str, ...]


def read_split_file(path: pathlib.Path, images: pathlib.Path | None = None) -> tuple[Listed, ...]:
    """Every image that a split file lists, in its order.

    Args:
      path: the file.
      images: folder of its images; where left out they are looked for beside the file and below.

    Raises:
      UserError: there is no such file or folder, it is no split file, or an image is missing or found twice.
    """
    told = _read(path)
    if images is not None and not images.is_dir():
        raise UserError(f'--images={images}: there is no such folder; name the one that holds the images of "{path}"')
    find, found = _Finder(path, path.parent if images is None else images), []
    for entry in told:
        part = str(entry.get("split") or "").lower()
        file = find(str(entry.get("filepath") or ""), _filename(path, entry))
        found.append(Listed(file, PART_NAMES.get(part, part), _raw(entry)))
    return tuple(found)


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f'there is no file "{path}"; name a split file (.json)')
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
