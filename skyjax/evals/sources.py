"""Where labelled examples come from: class folders, skyjax datasets, TFDS.

Opening a source lists its examples and their labels; an image is read when its example is asked.
"""

import collections
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from skyjax.errors import BadRecord, UserError, nearest
from skyjax.input.images import SUFFIXES, image_sample, list_images, read_image
from skyjax.input.records import DESCRIPTION, RecordSource
from skyjax.input.split_file import PART_NAMES
from skyjax.sample import Sample, make_sequence
from skyjax.sensors import Sensor, get_sensor, sensors

DEFAULT_SENSOR = "rgb"
_TFDS_FILE = "features.json"


@dataclasses.dataclass(frozen=True)
class Example:
    """One example: its file or key, its class number or flags, the source's own part or "", and how to read it."""

    name: str
    label: int | tuple[bool, ...]
    part: str
    read: Callable[[], Sample]


@dataclasses.dataclass(frozen=True)
class Pool:
    """All examples of a source; `several` where an example has flags instead of one class."""

    name: str
    classes: tuple[str, ...]
    examples: Sequence[Example]
    several: bool = False
    notes: tuple[str, ...] = ()


def open_pool(path: str, *, sensor: str | None, bands: tuple[str, ...], label: str | None) -> Pool:
    """The examples of a folder of class folders, a skyjax dataset or a TFDS data set; see `datasets.open_dataset`."""
    folder = pathlib.Path(path)
    if path.startswith("tfds:"):
        pool = _tfds(path.removeprefix("tfds:"), sensor, bands, label)
    elif not folder.is_dir():
        raise UserError(f'dataset: there is no folder "{path}"; name a folder of class folders or a skyjax dataset')
    elif (folder / DESCRIPTION).is_file():
        pool = _records(folder, sensor, bands, label)
    elif (folder / _TFDS_FILE).is_file():
        pool = _tfds(path, sensor, bands, label)
    else:
        pool = _class_folders(folder, sensor, bands, label)
    if len(pool.classes) < 2:
        raise UserError(
            f'{pool.name} has one class only ("{pool.classes[0]}"); a probe tells two or more apart: name the folder'
            " that holds the class folders"
        )
    return pool


# Class folders


def _class_folders(folder: pathlib.Path, sensor: str | None, bands: tuple[str, ...], label: str | None) -> Pool:
    if label is not None:
        raise UserError(f'--label={label} is for skyjax datasets; the classes of "{folder}" are its folders')
    table = get_sensor(sensor or DEFAULT_SENSOR)
    inside = _folders(folder)
    parts = {part.name.lower() for part in inside}
    if parts and parts <= set(PART_NAMES):
        found = [(PART_NAMES[part.name.lower()], each) for part in inside for each in _folders(part)]
    else:
        found = [("", each) for each in inside]
    files = [(part, each.name, image) for part, each in found for image in list_images(each)]
    if not files:
        raise UserError(f'"{folder}" holds no class folders with images ({" ".join(SUFFIXES)}){_deeper(folder)}')
    classes = tuple(sorted({name for _, name, _ in files}))
    empty = sorted({each.name for _, each in found} - set(classes))
    names = _check_bands([image for _, _, image in files], table, bands)
    examples = [
        Example(
            str(image.relative_to(folder)),
            classes.index(name),
            part,
            functools.partial(image_sample, image, table.key, names, source=folder.name),
        )
        for part, name, image in files
    ]
    notes = (f"folders without images were passed over: {', '.join(empty)}",) if empty else ()
    return Pool(f'"{folder}"', classes, examples, notes=(*notes, "dates are unknown: every image has day 0"))


def _folders(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))


def _deeper(folder: pathlib.Path) -> str:
    if any(file.suffix.lower() in SUFFIXES for file in folder.iterdir()):
        return ", but images without a class; put each class into a folder of its own"
    return "; name the folder that holds them"


def _check_bands(images: Sequence[pathlib.Path], table: Sensor, bands: tuple[str, ...]) -> tuple[str, ...]:
    """The bands' names, after a look at the first image that can be read: a wrong flag spoils every image alike."""
    for image in images[:20]:
        try:
            shape = read_image(image).shape
        except BadRecord:
            continue
        return band_names(table, bands, shape[2], f'"{image}"')
    return band_names(table, bands, len(bands or table.bands), "")


def band_names(table: Sensor, bands: tuple[str, ...], count: int, name: str) -> tuple[str, ...]:
    """Names for `count` bands: those asked for, else the sensor's; three of red, green, blue and more are these.

    Raises:
      UserError: the numbers differ, or a band is not known.
    """
    names = bands or table.names
    for band in bands:
        table.index(band)
    if not bands and count == 3 and names[:3] == ("red", "green", "blue"):
        names = names[:3]
    if len(names) != count:
        fitting = [key for key, other in sensors().items() if len(other.bands) == count]
        hint = f"sensors with {count} bands: {', '.join(fitting)}; " if fitting else ""
        raise UserError(
            f'{name} has {count} bands, but the sensor "{table.key}" was asked for {len(names)} ({" ".join(names)});'
            f" {hint}say what the images hold: --sensor=KEY --bands=NAME,NAME,..."
        )
    return names


# skyjax datasets


def _records(folder: pathlib.Path, sensor: str | None, bands: tuple[str, ...], label: str | None) -> Pool:
    if sensor or bands:
        raise UserError(f'"{folder}" is a skyjax dataset, whose records say their sensor and bands; leave out --sensor')
    source = RecordSource(folder)
    labels: dict[str, list[tuple[int, str, np.ndarray]]] = collections.defaultdict(list)
    bad: list[Example] = []
    for i in range(len(source)):
        try:
            sample = source[i]
        except BadRecord:
            # Read again with the rest, where bad ones are named and counted.
            bad.append(Example(source.name(i), 0, "", functools.partial(source.__getitem__, i)))
            continue
        for name, value in sample.labels.items():
            if np.asarray(value).dtype.kind != "f":  # shares and amounts are no classes
                labels[name].append((i, sample.id or source.name(i), np.asarray(value)))
    chosen = _choose_label(folder, labels, label)
    found = labels[chosen]
    there: list[tuple[int, str, Any]]
    axes = {value.ndim for _, _, value in found}
    if axes == {0}:
        several, there = False, [(i, name, int(value)) for i, name, value in found if value >= 0]
    elif axes == {1} and len({len(value) for _, _, value in found}) == 1:
        several, there = (
            True,
            [(i, name, tuple((value > 0).tolist())) for i, name, value in found if (value >= 0).all()],
        )
    else:
        raise UserError(
            f'"{folder}": label "{chosen}" is a map or of varying length; a probe needs one class an example'
        )
    known = source.description.get("label_names", {}).get(chosen)
    classes, numbers = _record_classes(there, known, several)
    examples = [
        Example(name, value if several else numbers[value], "", functools.partial(source.__getitem__, i))
        for i, name, value in there
    ]
    none = len(source) - len(there) - len(bad)
    notes = (f'{none:,} of {len(source):,} records have no label "{chosen}" and were passed over',) if none else ()
    if several:
        bad = [dataclasses.replace(example, label=(False,) * len(classes)) for example in bad]
    return Pool(f'"{folder}"', classes, [*examples, *bad], several, notes)


def _choose_label(folder: pathlib.Path, labels: dict[str, Any], label: str | None) -> str:
    if not labels:
        raise UserError(f'"{folder}" has no labels; a probe needs them')
    if label is None and len(labels) == 1:
        return next(iter(labels))
    if label is None:
        raise UserError(f'"{folder}" has the labels {", ".join(sorted(labels))}; choose one by --label=NAME')
    if label not in labels:
        raise UserError(
            f'"{folder}" has no label "{label}"{nearest(label, labels)}; it has {", ".join(sorted(labels))}'
        )
    return label


def _record_classes(
    there: Sequence[tuple[int, str, Any]], known: Sequence[str] | None, several: bool
) -> tuple[tuple[str, ...], dict[int, int]]:
    """Names of the classes that occur, and the new number of each old one; flags keep all."""
    if not there:
        return ("none",), {}
    if several:
        count = len(there[0][2])
        return tuple(known) if known and len(known) == count else tuple(map(str, range(count))), {}
    present = sorted({value for _, _, value in there})
    name = [known[value] if known and value < len(known) else str(value) for value in present]
    return tuple(name), {value: number for number, value in enumerate(present)}


# TFDS, read without TensorFlow


def _tfds(name: str, sensor: str | None, bands: tuple[str, ...], label: str | None) -> Pool:
    import tensorflow_datasets as tfds  # slow to import

    table = get_sensor(sensor or DEFAULT_SENSOR)
    try:
        builder = tfds.builder_from_directory(_tfds_folder(name)) if pathlib.Path(name).is_dir() else tfds.builder(name)
        sources = {split: builder.as_data_source(split=split) for split in builder.info.splits}
    except Exception as error:  # TFDS raises its own, TensorFlow's and ArrayRecord's
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f'dataset: TFDS cannot open "{name}" without TensorFlow ({reason}); name the folder of a data set that was'
            " written as array_record: tfds:PATH"
        ) from error
    features = builder.info.features
    chosen = _tfds_feature(name, {k: v for k, v in features.items() if isinstance(v, tfds.features.ClassLabel)}, label)
    image = _tfds_feature(name, {k: v for k, v in features.items() if v.shape and len(v.shape) == 3}, None)
    parts = {split: PART_NAMES.get(split.lower(), "") for split in sources}
    if set(parts.values()) <= {"train"}:
        parts = dict.fromkeys(parts, "")
    names = band_names(table, bands, features[image].shape[2] or len(bands or table.bands), f'"{name}"')
    examples = list(_tfds_examples(sources, parts, image, chosen, table.key, names))
    if not examples:
        raise UserError(f'dataset: the TFDS data set "{name}" has no examples')
    return Pool(f'"tfds:{name}"', tuple(features[chosen].names), examples, notes=("dates are unknown: day 0",))


def _tfds_folder(name: str) -> str:
    """The folder of a version: the one given, or the newest below it."""
    found = sorted(pathlib.Path(name).rglob(_TFDS_FILE))
    if not found:
        raise FileNotFoundError(f"it holds no {_TFDS_FILE}")
    return str(found[-1].parent)


def _tfds_feature(name: str, features: dict[str, Any], wanted: str | None) -> str:
    if wanted in features:
        return str(wanted)
    if wanted is None and len(features) == 1:
        return next(iter(features))
    raise UserError(
        f'dataset: the TFDS data set "{name}" must have one image and one class feature; found {sorted(features)};'
        " choose the class by --label=NAME"
    )


def _tfds_examples(
    sources: dict[str, Any], parts: dict[str, str], image: str, label: str, sensor: str, bands: tuple[str, ...]
) -> Iterator[Example]:
    def read(source: Any, i: int, name: str) -> Sample:
        values = np.asarray(source[i][image])[None]
        sequence = make_sequence(values, sensor, bands, days=np.zeros(1, np.int32), name=name)
        return Sample({get_sensor(sensor).modality: sequence}, np.full(2, np.nan, np.float32), id=name, source="tfds")

    for split, source in sources.items():
        for i in range(len(source)):
            example = source[i]
            if example[label] < 0:  # unlabelled
                continue
            own = example.get("id", example.get("filename", b""))
            name = own.decode() if isinstance(own, bytes) else str(own)
            name = name or f"{split}-{i}"
            yield Example(name, int(example[label]), parts[split], functools.partial(read, source, i, name))
