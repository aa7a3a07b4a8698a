"""Samples as ArrayRecord files: each record is one sample as safetensors bytes.

In: samples of any source. Out: a folder with samples-00000.array_record and so on, and dataset.json, which describes
them. The format is documented in docs/records.md; array_record and safetensors are enough to read it.
"""

import collections
import dataclasses
import json
import math
import os
import pathlib
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from skyjax.errors import BadRecord, UserError
from skyjax.sample import STORED_TYPES, Sample, Sequence

FORMAT = "skyjax-sample 1"
DESCRIPTION = "dataset.json"
SHARD_SIZE = 256 * 2**20  # bytes
_HERE = ("", ".", "..")  # what is no file in a folder
_MOST_RECORDS = 2**40  # in a file
# As --compression says it -> for the writer. One record a group: a sample is read without its neighbours.
COMPRESSIONS = {"zstd": "group_size:1,zstd:1", "none": "group_size:1,uncompressed"}
_READER_OPTIONS = "readahead_buffer_size:0"  # reads are random
# Of safetensors -> numpy's; those that a record may hold.
_TYPES = {
    "BOOL": np.dtype(bool),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    **{f"{kind}{bits}": np.dtype(f"<{kind.lower()}{bits // 8}") for kind in "IU" for bits in (8, 16, 32, 64)},
}


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was written: the folder, the number of samples, bytes on disk, dataset.json's content."""

    folder: pathlib.Path
    count: int
    size: int
    description: dict[str, Any]


def encode(sample: Sample) -> bytes:
    """One sample as safetensors bytes (docs/records.md)."""
    arrays = {"lonlat": np.asarray(sample.lonlat, np.float32)}
    for modality, sequence in sample.sequences.items():
        arrays[f"{modality}/values"] = sequence.values
        arrays[f"{modality}/days"] = np.asarray(sequence.days, np.int32)
        arrays[f"{modality}/valid"] = sequence.valid
        arrays[f"{modality}/clear"] = sequence.clear
        arrays[f"{modality}/extent"] = np.asarray(sequence.extent, np.float32)
    for name, label in sample.labels.items():
        arrays[f"labels/{name}"] = np.asarray(label)
    words = {
        "format": FORMAT,
        "id": sample.id,
        "source": sample.source,
        "texts": json.dumps(list(sample.texts), ensure_ascii=False),
        "sequences": json.dumps({m: {"sensor": s.sensor, "bands": s.bands} for m, s in sample.sequences.items()}),
    }
    # safetensors writes an array's buffer as it lies in memory, whatever its strides say.
    return safetensors.numpy.save({name: np.asarray(array, order="C") for name, array in arrays.items()}, words)


def decode(record: bytes, *, name: str = "record") -> Sample:
    """The sample of a record.

    Args:
      record: safetensors bytes.
      name: of the record, for messages.

    Raises:
      BadRecord: it is truncated or corrupt, or what it holds breaks the sample contract.
    """
    try:
        arrays, words = _parse(record)
        if words.get("format") != FORMAT:
            raise BadRecord(f'format is "{words.get("format")}", not "{FORMAT}"')
        sequences = {
            modality: Sequence(
                **{field: arrays[f"{modality}/{field}"] for field in ("values", "days", "valid", "clear", "extent")},
                sensor=told["sensor"],
                bands=tuple(told["bands"]),
            )
            for modality, told in json.loads(words["sequences"]).items()
        }
        labels = {key.removeprefix("labels/"): array for key, array in arrays.items() if key.startswith("labels/")}
        if not all(_is_label(label) for label in labels.values()):
            raise BadRecord("a label is made neither of whole numbers nor of shares from 0 to 1")
        texts = tuple(json.loads(words["texts"]))
        if not all(isinstance(text, str) for text in texts):
            raise BadRecord("its texts are not a list of strings")
        return Sample(sequences, arrays["lonlat"], texts, labels, words["id"], words["source"])
    except UserError as error:
        raise BadRecord(f"{name}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise BadRecord(f"{name} is truncated or corrupt ({len(record):,} bytes): {reason[:200]}") from error


def _is_label(value: np.ndarray) -> bool:
    if value.dtype.kind in "iub":
        return True
    return value.dtype == np.float32 and value.ndim == 1 and bool(np.all((value >= 0) & (value <= 1)))


def _parse(record: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of safetensors bytes, as read-only views of them, and the strings.

    The library's own loader from bytes copies every array and leaves the strings out. What the header claims is held
    against the bytes that are there before anything is made of it.

    Raises:
      ValueError, TypeError, KeyError, AttributeError, RecursionError: the bytes are not what the format says.
    """
    size = int.from_bytes(record[:8], "little")
    if not 2 <= size <= len(record) - 8:
        raise ValueError(f"its header claims {size:,} bytes")
    header = json.loads(record[8 : 8 + size])
    words = header.pop("__metadata__", {})
    if not all(isinstance(word, str) for word in words.values()):
        raise ValueError("its metadata holds something else than strings")
    arrays, end, start = {}, 0, 8 + size
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (first, last) = _TYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, first, last)):
            raise ValueError(f'"{name}" has a shape or a place that is not made of whole numbers')
        if first != end or math.prod(shape) * dtype.itemsize != last - first or last > len(record) - start:
            raise ValueError(f'"{name}" claims the shape {shape} and the bytes {first:,} to {last:,}')
        arrays[name] = np.ndarray(shape, dtype, record, start + first)
        end = last
    if end != len(record) - start:
        raise ValueError(f"{len(record) - start - end:,} bytes belong to no array")
    for name, array in arrays.items():
        # Any byte but 0 and 1 in a bool is undefined behaviour in numpy: two "True" could differ.
        if array.dtype == bool and array.size and array.view(np.uint8).max() > 1:
            raise ValueError(f'"{name}" holds bytes that are neither true nor false')
    return arrays, words


def write(
    samples: Iterable[Sample],
    folder: str | os.PathLike[str],
    *,
    shard_size: int = SHARD_SIZE,
    about: dict[str, Any] | None = None,
    compression: str = "zstd",
) -> Summary:
    """Writes a dataset, whole or not at all: under another name beside `folder` first, renamed when complete.

    Args:
      samples: in the order that they are to have.
      folder: new, empty, or a dataset that is replaced.
      shard_size: bytes of records after which the next file is begun.
      about: more for dataset.json: licence, names of classes.
      compression: "zstd", or "none": a third to three quarters larger, and read in a third of the time. Readers take
        both.

    Raises:
      UserError: compression is not known, there is no sample, no room, no permission, or something else at `folder`.
    """
    if compression not in COMPRESSIONS:
        raise UserError(f'compression "{compression}" is not one of {", ".join(COMPRESSIONS)}')
    folder = pathlib.Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f'"{folder}" is a file; a dataset is a folder, name another')
    if folder.is_dir() and any(folder.iterdir()) and not (folder / DESCRIPTION).is_file():
        raise UserError(f'"{folder}" holds something that is not a skyjax dataset; name another folder or empty it')
    partial = _beside(folder)
    try:
        description = _write_shards(samples, partial, shard_size, COMPRESSIONS[compression]) | (about or {})
        if not description["count"]:
            raise UserError(f'"{folder}" was not written: the source gave no sample')
        (partial / DESCRIPTION).write_text(json.dumps(description, indent=1, ensure_ascii=False) + "\n")
        _put_in_place(partial, folder)
    except _WriteError as error:
        raise UserError(f'"{folder}" could not be written: {error.__cause__}; is the disk full?') from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Summary(folder, description["count"], sum(f.stat().st_size for f in folder.iterdir()), description)


def _beside(folder: pathlib.Path) -> pathlib.Path:
    """A new folder on the same disk, to be renamed."""
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        return pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.absolute().parent))
    except OSError as error:
        raise UserError(
            f'"{folder}" cannot be written: {error.strerror}; choose a folder that you may write'
        ) from error


def _put_in_place(partial: pathlib.Path, folder: pathlib.Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    partial.chmod(0o777 & ~mask)  # mkdtemp made it for the owner alone
    old = partial.with_name(f"{partial.name}-old")
    if folder.is_dir():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


class _WriteError(Exception):
    """The disk's refusal, told apart from what the source of the samples may raise."""


class _Shard:
    """One file being written."""

    def __init__(self, path: pathlib.Path, options: str):
        self.path, self.count, self.size = path, 0, 0
        self._writer = self._ask(ArrayRecordWriter, str(path), options)

    def add(self, record: bytes) -> None:
        self._ask(self._writer.write, record)
        self.count += 1
        self.size += len(record)

    def close(self) -> None:
        self._ask(self._writer.close)

    def _ask(self, act: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return act(*arguments)
        except (OSError, RuntimeError) as error:  # array_record tells of a full disk by RuntimeError
            raise _WriteError from error


def _write_shards(samples: Iterable[Sample], folder: pathlib.Path, shard_size: int, options: str) -> dict[str, Any]:
    shards: list[_Shard] = []
    sources: collections.Counter[str] = collections.Counter()
    modalities: dict[str, dict[str, Any]] = {}
    for sample in samples:
        if not shards or shards[-1].size >= shard_size:
            if shards:
                shards[-1].close()
            shards.append(_Shard(folder / f"samples-{len(shards):05d}.array_record", options))
        shards[-1].add(encode(sample))
        sources[sample.source] += 1
        _describe(sample, modalities)
    if shards:
        shards[-1].close()
    return {
        "format": FORMAT,
        "count": sum(shard.count for shard in shards),
        "shards": [{"file": shard.path.name, "count": shard.count} for shard in shards],
        "sources": dict(sources),
        "modalities": modalities,
    }


def _describe(sample: Sample, modalities: dict[str, dict[str, Any]]) -> None:
    """Adds a sample's sensors and bands to what dataset.json says of its modalities."""
    for modality, sequence in sample.sequences.items():
        entry = modalities.setdefault(modality, {"samples": 0, "dates": 0, "dtype": "uint8", "sensors": {}})
        entry["samples"] += 1
        entry["dates"] += len(sequence.days)
        entry["dtype"] = widest_type((entry["dtype"], sequence.values.dtype.name))
        bands = entry["sensors"].setdefault(sequence.sensor, [])
        bands.extend(band for band in sequence.bands if band not in bands)


def widest_type(names: Iterable[str]) -> str:
    """The narrowest of STORED_TYPES that holds all of these: a batch's type where sources differ."""
    widest = np.result_type(*names).name
    return widest if widest in STORED_TYPES else "float32"


def _check_description(told: Mapping[str, Any]) -> None:
    """Holds dataset.json to its form; it may be a stranger's.

    Raises:
      ValueError, TypeError, KeyError, AttributeError: it is something else.
    """
    for shard in told["shards"]:
        # A name alone: a path would read files elsewhere.
        if (
            not isinstance(shard["file"], str)
            or shard["file"] != os.path.basename(shard["file"])
            or shard["file"] in _HERE
        ):
            raise ValueError(f"a file of it is called {shard['file']!r}, which is not a name in its folder")
        if type(shard["count"]) is not int or not 0 <= shard["count"] < _MOST_RECORDS:
            raise ValueError(f'"{shard["file"]}" is said to hold {shard["count"]!r} records')
    for modality, about in told["modalities"].items():
        if about["dtype"] not in STORED_TYPES:
            raise ValueError(f"{modality} is said to be of the type {about['dtype']!r}")
        for sensor, bands in about["sensors"].items():
            if not isinstance(sensor, str) or not all(isinstance(band, str) for band in bands):
                raise ValueError(f"{modality}: a band's name is no word")
    for names in told.get("label_names", {}).values():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("label_names is not a list of names for each label")


def folder_at(path: str | os.PathLike[str]) -> Any:
    """A local folder as pathlib has it, or a folder of a bucket (gs://BUCKET/PATH), which is used alike.

    Raises:
      UserError: the library that speaks to the bucket is not installed.
    """
    text = os.fspath(path)
    if "://" not in text:
        return pathlib.Path(text)
    try:
        folder = epath.Path(text)
        folder.is_dir()  # asks for the library
    except (ImportError, ValueError) as error:
        raise UserError(
            f'"{text}" is in a bucket, and what reads it is missing ({str(error).splitlines()[0]}): for gs://'
            " pip install gcsfs, or mount the bucket and name the folder where it is mounted"
        ) from error
    except Exception as error:  # of the network, of permissions: each library has its own
        raise UserError(f'"{text}" cannot be reached: {(str(error).splitlines() or [repr(error)])[0][:200]}') from error
    return folder


class RecordSource:
    """A dataset's samples by number: random access, safe in threads, picklable, opened when first read."""

    def __init__(self, folder: str | os.PathLike[str]):
        """Opens dataset.json only.

        Raises:
          UserError: the folder, its dataset.json or one of its files is missing or not what it should be.
        """
        self.folder = folder_at(folder)
        path = self.folder / DESCRIPTION
        try:
            self.description: dict[str, Any] = json.loads(path.read_text())
            if self.description.get("format") != FORMAT:
                raise UserError(
                    f'"{path}" is of format "{self.description.get("format")}", not "{FORMAT}"; build it again'
                )
            _check_description(self.description)
            self._files = [shard["file"] for shard in self.description["shards"]]
            counts = [shard["count"] for shard in self.description["shards"]]
        except FileNotFoundError as error:
            raise UserError(
                f'"{folder}" is not a skyjax dataset (no {DESCRIPTION}); make one: skyjax data build'
            ) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = str(error) or type(error).__name__
            raise UserError(f'"{path}" cannot be read ({reason[:200]}); build the dataset again') from error
        missing = [name for name in self._files if not (self.folder / name).is_file()]
        if missing:
            raise UserError(f'"{self.folder / missing[0]}" is missing; build the dataset again')
        self._ends = np.cumsum(counts)
        self._readers: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Sample:
        """One sample.

        Raises:
          BadRecord: this record cannot be used; others may.
          UserError: the whole file cannot.
        """
        shard, record = self._locate(index)
        reader = self._reader(shard)
        try:
            data = reader.read([record])[0]
        except (RuntimeError, IndexError) as error:
            raise BadRecord(f"{self.name(index)} is corrupt: {error}") from error
        return decode(data, name=self.name(index))

    def __repr__(self) -> str:
        return f"RecordSource({str(self.folder)!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # a copy opens its own files: readers don't travel

    def name(self, index: int) -> str:
        """The record's place, as messages say it: "samples-00007.array_record: record 1312"."""
        shard, record = self._locate(index)
        return f"{self._files[shard]}: record {record}"

    def _locate(self, index: int) -> tuple[int, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        index = int(index) % len(self)
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - (int(self._ends[shard - 1]) if shard else 0)

    def _reader(self, shard: int) -> Any:
        with self._lock:
            if shard not in self._readers:
                path, want = self.folder / self._files[shard], self.description["shards"][shard]["count"]
                reader = ArrayRecordReader(str(path), _READER_OPTIONS)
                found = reader.num_records() if reader.ok() else 0
                if found != want:
                    raise UserError(f'"{path}" is empty or truncated ({found:,} of {want:,} records); build it again')
                self._readers[shard] = reader
        return self._readers[shard]
