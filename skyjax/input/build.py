"""Runs a builder of data/: the files of one source become a skyjax dataset, or a TFDS data set.

A builder is a Python file with `samples(folder) -> Iterator[Sample]`, or with a tfds GeneratorBasedBuilder. It may say
TITLE, LICENCE and ATTRIBUTION, and `label_names(folder)` for labels whose numbers have names; all of it goes into
dataset.json. One with PARTS, such as ("train", "val"), has `samples(folder, part)`: each part becomes a data set of its
own, OUT/PART, so that nothing trains on what tests. What builders share stands here too: listing files, passing over
bad ones, dates, grids, decibels.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import rich.console
import rich.progress
from jaxtyping import Float, Int, Int32, Shaped

from skyjax.config import run_file
from skyjax.errors import BadRecord, UserError, nearest
from skyjax.input import records
from skyjax.sample import Sample

logger = logging.getLogger("skyjax")

MAX_BYTES = 2**32  # of the arrays of one file, once unfolded


@dataclasses.dataclass(frozen=True)
class Summary(records.Summary):
    """What was written, and each file that could not be used -> reason."""

    bad: dict[str, str]

    def __str__(self) -> str:
        passed = f"; {len(self.bad):,} bad files passed over" if self.bad else ""
        return f"{self.folder}: {self.count:,} samples, {self.size / 1e6:,.1f} MB{passed}"


def build(
    source: str | os.PathLike[str],
    input_folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    compression: str = "zstd",
) -> Summary:
    """Builds a dataset at `out` from the files in `input_folder` by the builder `source`, such as data/triples.py.

    `compression` is that of `records.write`; a TFDS data set has its own.

    Raises:
      UserError: the builder or the folder is missing, no file can be used, or `out` cannot be written.
    """
    input_folder, out = pathlib.Path(input_folder), pathlib.Path(out)
    module = load_builder(pathlib.Path(source))
    if not input_folder.is_dir():
        raise UserError(f'"{input_folder}" is not a folder; --input is where the files of {module.__name__} lie')
    tfds_class = _tfds_builder(module)
    if tfds_class is not None:
        return _build_tfds(tfds_class, input_folder, out)
    if not hasattr(module, "PARTS"):
        return _write(module, input_folder, module.samples(input_folder), out, compression)
    if (out / records.DESCRIPTION).is_file():
        raise UserError(f'"{out}" is a data set, and {module.__name__} makes a folder of several; name another --out')
    streams = {part: module.samples(input_folder, part) for part in module.PARTS}
    there = [part for part in module.PARTS if getattr(streams[part], "total", 1)]
    if not there:
        raise UserError(f'"{input_folder}" has no sample in any part: {", ".join(module.PARTS)}')
    written = [_write(module, input_folder, streams[part], out / part, compression) for part in there]
    return Summary(
        out,
        sum(each.count for each in written),
        sum(each.size for each in written),
        {part: each.description for part, each in zip(there, written, strict=True)},
        {file: reason for each in written for file, reason in each.bad.items()},
    )


def _write(
    module: types.ModuleType, input_folder: pathlib.Path, stream: Iterable[Sample], out: pathlib.Path, compression: str
) -> Summary:
    about = {
        word.lower(): getattr(module, word) for word in ("TITLE", "LICENCE", "ATTRIBUTION") if hasattr(module, word)
    }
    if hasattr(module, "label_names"):
        about["label_names"] = module.label_names(input_folder)
    written = records.write(_with_progress(stream, module.__name__), out, about=about, compression=compression)
    return Summary(written.folder, written.count, written.size, written.description, getattr(stream, "bad", {}))


@functools.cache  # TFDS refuses a second class of one name in one process
def load_builder(source: str | pathlib.Path) -> types.ModuleType:
    """A builder's module, from its file; loaded once a process.

    Raises:
      UserError: there is no such file, it is not Python, or it builds nothing.
    """
    path = pathlib.Path(source)
    if not path.is_file():
        known = [str(other) for other in sorted(path.parent.glob("*.py"))] if path.parent.is_dir() else []
        raise UserError(f'builder: there is no file "{path}"{nearest(str(path), known)}')
    module = run_file(path, "builder")
    if not hasattr(module, "samples") and _tfds_builder(module) is None:
        raise UserError(f'builder: "{path}" has no samples(folder); data/class_folder.py shows one')
    return module


def _tfds_builder(module: types.ModuleType) -> Any | None:
    """The TFDS builder class that a module defines, without importing TFDS for those that define none."""
    for value in vars(module).values():
        bases = [f"{base.__module__}.{base.__name__}" for base in getattr(value, "__mro__", ())]
        if getattr(value, "__module__", "") == module.__name__ and any(
            b.endswith("GeneratorBasedBuilder") for b in bases
        ):
            return value
    return None


def _build_tfds(builder_class: Any, input_folder: pathlib.Path, out: pathlib.Path) -> Summary:
    import tensorflow_datasets as tfds

    config = tfds.download.DownloadConfig(
        manual_dir=input_folder,
        download_mode=tfds.GenerateMode.REUSE_CACHE_IF_EXISTS,  # an older build is replaced, not silently kept
    )
    try:
        builder = builder_class(data_dir=out, file_format="array_record")
        with contextlib.redirect_stdout(sys.stderr):  # TFDS tells its progress there, where results belong
            builder.download_and_prepare(download_config=config)
    except OSError as error:
        raise UserError(f'"{out}" could not be written: {error}') from error
    folder = pathlib.Path(builder.data_dir)
    splits = {name: split.num_examples for name, split in builder.info.splits.items()}
    size = sum(file.stat().st_size for file in folder.iterdir())
    return Summary(folder, sum(splits.values()), size, {"format": "tfds", "name": builder.name, "splits": splits}, {})


def _with_progress(stream: Iterable[Sample], title: str) -> Iterator[Sample]:
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True)) as progress:
        task = progress.add_task(f"samples of {title}", total=getattr(stream, "total", None))
        for sample in stream:
            yield sample
            progress.update(
                task, completed=getattr(stream, "position", None), advance=None if hasattr(stream, "position") else 1
            )


class FileSamples(Iterator[Sample]):
    """One sample a file. A file that cannot be used is named, counted and passed over.

    Attributes:
      total: number of files.
      position: files done.
      bad: file -> why it could not be used.
    """

    def __init__(self, files: Sequence[pathlib.Path], make: Callable[[pathlib.Path], Sample]):
        self.total, self.position, self.bad = len(files), 0, dict[str, str]()
        self._files, self._make = files, make

    def __next__(self) -> Sample:
        while self.position < self.total:
            file = self._files[self.position]
            self.position += 1
            try:
                return self._make(file)
            except (BadRecord, OSError, ValueError, LookupError) as error:  # also of a damaged file that lies beside it
                told = str(error) if isinstance(error, BadRecord) else f'"{file}" cannot be used: {error!r}'
                self.bad[str(file)] = told
                logger.warning("%s; passed over, %d of %d files so far", told, len(self.bad), self.position)
        if self.bad and len(self.bad) == self.total:
            raise UserError(f"none of {self.total:,} files can be used; the first: {next(iter(self.bad.values()))}")
        raise StopIteration


def list_files(folder: pathlib.Path, pattern: str) -> list[pathlib.Path]:
    """Files of a folder by glob pattern, sorted by name so that the order is the same everywhere.

    Raises:
      UserError: there are none.
    """
    found = sorted(file for file in folder.glob(pattern) if file.is_file())
    if not found:
        raise UserError(f'"{folder}" holds no {pattern}; --input is the folder that the files lie in')
    return found


def load_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Every array of an .npz file.

    Raises:
      BadRecord: it is truncated or corrupt.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            size = sum(entry.file_size for entry in arrays.zip.infolist())
            if size > MAX_BYTES:
                raise BadRecord(f'"{path}" would unfold to {size:,} bytes, more than {MAX_BYTES:,}; cut it into tiles')
            return {name: arrays[name] for name in arrays.files}
    except BadRecord:
        raise
    except Exception as error:  # numpy, zipfile and zlib raise what they like on damaged files
        raise BadRecord(f'"{path}" is truncated or corrupt: {str(error) or type(error).__name__}') from error


def to_days(dates: Int[np.ndarray, "t"] | Sequence[int]) -> Int32[np.ndarray, "t"]:
    """Days since 1970-01-01 of dates written as the numbers yyyymmdd."""
    texts = [f"{date:08d}" for date in np.asarray(dates).tolist()]
    iso = np.array([f"{text[:4]}-{text[4:6]}-{text[6:]}" for text in texts], "datetime64[D]")
    return iso.astype(np.int64).astype(np.int32)


def repeat_pixels(values: Shaped[np.ndarray, "*rest h w"], factor: int) -> Shaped[np.ndarray, "*rest H W"]:
    """Each pixel `factor` x `factor` times: a coarse band on a fine grid with no value made up."""
    return values.repeat(factor, -2).repeat(factor, -1)


def to_decibels(power: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """10 log10 of linear backscatter; NaN where it is not positive, since nothing was measured there."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(power > 0, 10 * np.log10(power), np.nan).astype(np.float32)


def channels_last(values: Shaped[np.ndarray, "t c h w"]) -> Shaped[np.ndarray, "t h w c"]:
    """The sample contract's axis order."""
    return np.ascontiguousarray(np.moveaxis(values, 1, -1))
