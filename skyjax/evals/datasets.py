"""Labelled sets for probes: examples with a label, in a training, a validation and a test part.

In: a folder of class folders (JPEG, PNG, GeoTIFF), a skyjax dataset, or a TFDS data set (evals/sources.py).
Out: `LabelledSet`, whose samples all have the same image size a modality. Every image is read once at the start: one
that cannot be used is named and left out, and more than 1 % of them is an error.

Where the source has no parts of its own, each class is put in the order of a hash of its file names without their
endings: the first `train_per_class` train (half of the class where it has fewer than twice as many), the rest test. The
last fifth of the training part is the validation part, on which a probe chooses. The same files make the same parts on
every machine, and a file that is added moves few others.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Int

from skyjax.errors import UserError
from skyjax.evals.reading import look_at
from skyjax.evals.sources import Pool, open_pool
from skyjax.sample import Sample

TRAIN_PER_CLASS = 300
VALIDATION_SHARE = 0.2
PARTS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True)
class LabelledSet:
    """Examples with labels and parts.

    Attributes:
      name: what the user called it.
      classes: their names, in the order of their numbers.
      labels: class numbers (n,), or flags (n, classes) where an example may have several.
      parts: "train", "val" and "test" -> numbers of examples; "train" has none of "val".
      sizes: modality -> (height, width) of every image.
      split: how the parts came about, in words.
      notes: what a reader of the results should know.
      read: number of an example -> its sample.
    """

    name: str
    classes: tuple[str, ...]
    labels: np.ndarray
    parts: Mapping[str, Int[np.ndarray, "n"]]
    sizes: Mapping[str, tuple[int, int]]
    split: str
    notes: tuple[str, ...]
    read: Callable[[int], Sample]


def open_dataset(
    path: str,
    *,
    test_path: str | None = None,
    train_per_class: int | None = None,
    sensor: str | None = None,
    bands: Sequence[str] = (),
    label: str | None = None,
    image_size: int | None = None,
    largest: Mapping[str, int] | None = None,
) -> LabelledSet:
    """Opens, splits, reads and checks a labelled set.

    Args:
      path: a folder of class folders, a skyjax dataset, "tfds:NAME", or a TFDS folder ("tfds:PATH" or PATH).
      test_path: the same for the test part alone; all of `path` then is for training.
      train_per_class: training images a class, validation part included. 300 where left out, but all where the source
        has a training part of its own.
      sensor: key in sensors.toml of the images; "rgb" where left out. A skyjax dataset knows its own.
      bands: their names, in the order of the images' bands; the sensor's where left out.
      label: which label of a skyjax dataset, or which class feature of TFDS.
      image_size: pixels a side that every image is resized to.
      largest: modality -> longest side in pixels; larger images are shrunk to it.

    Raises:
      UserError: there is nothing to read, one class only, a class of one image, classes that differ between training
        and test, or more than 1 % of the images cannot be used.
    """
    if train_per_class is not None and train_per_class < 2:
        raise UserError(f"--train-per-class={train_per_class} is too few; a class needs 2 or more to train and choose")
    pool = open_pool(path, sensor=sensor, bands=tuple(bands), label=label)
    parts, split = _parts(pool, train_per_class) if test_path is None else _train_only(pool, train_per_class)
    if test_path is not None:
        test = open_pool(test_path, sensor=sensor, bands=tuple(bands), label=label)
        pool, parts = _join(pool, parts, test)
        split += f'; test: all of "{test_path}"'
    used = np.sort(np.concatenate(list(parts.values())))
    images = look_at(pool.examples, used, typical=parts["train"].tolist(), image_size=image_size, largest=largest)
    good = images.digests
    parts = {name: np.array([i for i in part.tolist() if i in good], int) for name, part in parts.items()}
    labels = np.array([example.label for example in pool.examples])
    _check_parts(pool, labels, parts)
    notes = (*pool.notes, *images.notes, *_copies_note(parts, images.digests))
    return LabelledSet(path, pool.classes, labels, parts, images.sizes, split, notes, images.read)


def split_by_hash(
    names: Sequence[str], groups: Int[np.ndarray, "n"], *, train_per_group: int
) -> tuple[Int[np.ndarray, "train"], Int[np.ndarray, "test"]]:
    """Numbers of the examples that train and of those that test, each group by the hash of its names.

    Args:
      names: of the files; their folders and endings don't count.
      groups: class number of each.
      train_per_group: of each group these train, or half of the group where it has fewer than twice as many.
    """
    train, test = [], []
    for order in _hash_order(names, groups):
        count = train_per_group if len(order) >= 2 * train_per_group else len(order) // 2
        train += order[:count]
        test += order[count:]
    return np.array(train, int), np.array(test, int)


def hold_out(
    names: Sequence[str], groups: Int[np.ndarray, "n"], members: Int[np.ndarray, "m"]
) -> tuple[Int[np.ndarray, "train"], Int[np.ndarray, "val"]]:
    """Splits a training part: the last fifth of each group by hash validates, at least one where the group has two."""
    train, validation = [], []
    for order in _hash_order([names[i] for i in members], groups[members]):
        count = round(VALIDATION_SHARE * len(order)) or int(len(order) > 1)
        train += members[order[: len(order) - count]].tolist()
        validation += members[order[len(order) - count :]].tolist()
    return np.array(train, int), np.array(validation, int)


def _hash_order(names: Sequence[str], groups: Int[np.ndarray, "n"]) -> list[list[int]]:
    def key(i: int) -> tuple[bytes, str]:
        stem = os.path.splitext(os.path.basename(names[i]))[0]
        return hashlib.sha256(stem.encode()).digest(), names[i]

    return [sorted(np.flatnonzero(groups == group).tolist(), key=key) for group in np.unique(groups)]


def _groups(pool: Pool) -> Int[np.ndarray, "n"]:
    """What is split class by class; examples with several labels are one group."""
    labels = np.array([example.label for example in pool.examples])
    return labels if labels.ndim == 1 else np.zeros(len(labels), int)


def _parts(pool: Pool, train_per_class: int | None) -> tuple[dict[str, np.ndarray], str]:
    names, groups = [example.name for example in pool.examples], _groups(pool)
    own = {part: np.array([i for i, e in enumerate(pool.examples) if e.part == part], int) for part in PARTS}
    if len(own["train"]):
        if not len(own["test"]):
            if not len(own["val"]):
                raise UserError(f'{pool.name} has a part "train" but none to test on; name one: --test-dataset=PATH')
            own["test"], own["val"] = own["val"], own["val"][:0]
        told = "the source's own parts"
        if train_per_class is not None:
            own["train"] = _first(names, groups, own["train"], train_per_class)
            told += f", of train the first {train_per_class} a class by file-name hash"
        if not len(own["val"]):
            own["train"], own["val"] = hold_out(names, groups, own["train"])
            told += "; validation: a fifth of train by file-name hash"
        return own, told
    if len(own["test"]) or len(own["val"]):
        raise UserError(f'{pool.name} has a part to test on but no part "train"; add it, or name another --dataset')
    _refuse_single_images(pool, groups)
    count = (train_per_class or TRAIN_PER_CLASS) * (len(pool.classes) if pool.several else 1)
    train, test = split_by_hash(names, groups, train_per_group=count)
    train, validation = hold_out(names, groups, train)
    told = f"by file-name hash, up to {train_per_class or TRAIN_PER_CLASS} a class train, a fifth of them validation"
    return {"train": train, "val": validation, "test": test}, told


def _train_only(pool: Pool, train_per_class: int | None) -> tuple[dict[str, np.ndarray], str]:
    """All of the source but a test part of its own is for training."""
    names, groups = [example.name for example in pool.examples], _groups(pool)
    own = {part: np.array([i for i, e in enumerate(pool.examples) if e.part == part], int) for part in PARTS}
    if not len(own["train"]):
        own["train"] = np.array([i for i, e in enumerate(pool.examples) if not e.part], int)
        train_per_class = train_per_class or TRAIN_PER_CLASS
    told = "train: all of the training images"
    if train_per_class is not None:
        own["train"] = _first(names, groups, own["train"], train_per_class * (len(pool.classes) if pool.several else 1))
        told = f"train: the first {train_per_class} a class by file-name hash"
    if not len(own["val"]):
        own["train"], own["val"] = hold_out(names, groups, own["train"])
        told += ", a fifth of them validation"
    return {"train": own["train"], "val": own["val"], "test": own["test"][:0]}, told


def _first(
    names: Sequence[str], groups: Int[np.ndarray, "n"], members: Int[np.ndarray, "m"], count: int
) -> Int[np.ndarray, "k"]:
    orders = _hash_order([names[i] for i in members], groups[members])
    return members[[i for order in orders for i in order[:count]]]


def _join(pool: Pool, parts: dict[str, np.ndarray], test: Pool) -> tuple[Pool, dict[str, np.ndarray]]:
    """Training examples of one source and test examples of another, numbered through."""
    absent, unknown = set(pool.classes) - set(test.classes), set(test.classes) - set(pool.classes)
    if absent or unknown:
        wrong = f"lacks {_quoted(absent)}" if absent else f"has {_quoted(unknown)} beside the training classes"
        raise UserError(f"{test.name} {wrong}; the classes of --dataset and --test-dataset must have the same names")
    if pool.several != test.several:
        raise UserError(f"{test.name} and {pool.name} differ in how many labels an example has; choose by --label")
    chosen = [e for e in test.examples if e.part == "test"] or list(test.examples)
    if not pool.several:  # the names agree, their order may not
        number = {i: pool.classes.index(name) for i, name in enumerate(test.classes)}
        chosen = [dataclasses.replace(e, label=number[e.label]) for e in chosen if isinstance(e.label, int)]
    elif pool.classes != test.classes:
        raise UserError(f"{test.name} and {pool.name} have their labels in different orders; build them alike")
    first = len(pool.examples)
    joined = dataclasses.replace(pool, examples=[*pool.examples, *chosen], notes=(*pool.notes, *test.notes))
    return joined, parts | {"test": np.arange(first, first + len(chosen))}


def _refuse_single_images(pool: Pool, groups: Int[np.ndarray, "n"]) -> None:
    numbers, counts = np.unique(groups, return_counts=True)
    single = [pool.classes[n] for n, count in zip(numbers, counts, strict=True) if count == 1]
    if single and not pool.several:
        raise UserError(
            f"{pool.name}: class {_quoted(single)} has a single image; a class needs one to train and one to test, so"
            " add images or leave the class out"
        )


def _check_parts(pool: Pool, labels: np.ndarray, parts: Mapping[str, np.ndarray]) -> None:
    if not all(len(parts[name]) for name in PARTS):
        counts = ", ".join(f"{name} {len(parts[name])}" for name in PARTS)
        raise UserError(f"{pool.name} is too small to train, choose and test ({counts}); give 4 images a class or more")
    if pool.several:
        return
    for name in ("train", "test"):
        absent = [c for number, c in enumerate(pool.classes) if number not in set(labels[parts[name]].tolist())]
        if absent:
            raise UserError(f'{pool.name}: class {_quoted(absent)} has no image in the part "{name}"; add some')


def _copies_note(parts: Mapping[str, np.ndarray], digests: Mapping[int, bytes]) -> list[str]:
    """Test images that the probe was trained on are no test."""
    trained = {digests[i] for name in ("train", "val") for i in parts[name].tolist()}
    copies = sum(digests[i] in trained for i in parts["test"].tolist())
    return [f"{copies:,} of {len(parts['test']):,} test images are copies of training images"] if copies else []


def _quoted(names: Sequence[str] | set[str]) -> str:
    names = sorted(names)
    shown = ", ".join(f'"{name}"' for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
