"""`skyjax eval --task=zero_shot`: classes told by their names alone; no label is looked at before the answer.

A class is the mean of the unit vectors of its name in every template of input/captions.toml; an image is of the class
that it is most alike. In: a checkpoint with words, and a labelled set. Out: the same dict as probe.py's.
"""

import argparse
import dataclasses
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

import skyjax
from skyjax.errors import UserError
from skyjax.evals import probe, words
from skyjax.evals.bootstrap import RESAMPLES, interval
from skyjax.evals.datasets import PARTS, TRAIN_PER_CLASS, split_by_hash
from skyjax.evals.features import FUSED
from skyjax.evals.probe import PRETRAINED
from skyjax.evals.reading import look_at
from skyjax.evals.sources import Pool, open_pool
from skyjax.input.captions import class_words, prompts
from skyjax.train.words import Words

TASK = "zero_shot"
METHOD = "zero-shot top-1"
LARGEST_CLASS, CHANCE = "largest class, always", "chance"
ALL = "all"


@dataclasses.dataclass(frozen=True)
class Options:
    """What is probed and how.

    Attributes:
      dataset: labelled images; see `datasets.open_dataset`.
      split: "train", "val", "test" or "all" of them. Where left out: the source's own test part, else its val part;
        where it has no parts, those images that a probe with `train_per_class` training images would test on.
      train_per_class: see `split`; 300 where left out.
      modality: the image side that meets words.
      sensor: key in sensors.toml of the images.
      bands: their names in order.
      label: the label that is told.
      image_size: pixels a side.
      seed: of the bootstrap.
    """

    dataset: str
    split: str | None = None
    train_per_class: int | None = None
    modality: str = FUSED
    sensor: str | None = None
    bands: tuple[str, ...] = ()
    label: str | None = None
    image_size: int | None = None
    seed: int = 0


def run(checkpoint: str | pathlib.Path, dataset: str, **options: Any) -> dict[str, Any]:
    """Probes a checkpoint: a run's directory or one of its checkpoints. Options and result: `Options`, `compare`.

    Raises:
      UserError: the checkpoint has no words, or the data set is missing or cannot be used.
    """
    return {"checkpoint": str(checkpoint)} | compare(skyjax.load(checkpoint), Options(str(dataset), **options))


def compare(model: words.Worded, options: Options) -> dict[str, Any]:
    """Tells the classes, beside saying the largest class always and by chance.

    Returns:
      As `probe.compare`; `sizes` has the tested images alone, `prompts` class -> its first template filled.
    """
    text = words.words_of(model, TASK)
    words.check_stream(text, options.modality)
    pool = open_pool(options.dataset, sensor=options.sensor, bands=options.bands, label=options.label)
    if pool.several:
        raise UserError(f"{pool.name} has several labels an image; --task={TASK} tells one: choose it by --label=NAME")
    which, told = choose(pool, options.split, options.train_per_class)
    images = look_at(pool.examples, which, image_size=options.image_size, largest=probe.largest_sides(model))
    which = np.array(sorted(images.digests), int)
    truth = np.array([pool.examples[i].label for i in which.tolist()], int)
    vectors, seconds = words.image_vectors(model, text, images, which, options.modality)
    start = time.perf_counter()
    centres = class_vectors(text, pool.classes)
    cosines = vectors @ centres.T
    right, said = top_one(cosines, truth)
    spent = time.perf_counter() - start
    counts = np.bincount(truth, minlength=len(pool.classes))
    confusion = np.zeros((len(pool.classes), len(pool.classes)), int)
    np.add.at(confusion, (truth, said), 1)
    answers = {
        PRETRAINED: right,
        LARGEST_CLASS: (truth == counts.argmax()).astype(float),
        CHANCE: np.full(len(truth), 1 / len(pool.classes)),
    }
    dimension = {PRETRAINED: vectors.shape[1], LARGEST_CLASS: 0, CHANCE: 0}
    each = np.bincount(truth, right, minlength=len(pool.classes)) / np.maximum(counts, 1)
    absent = [name for name, count in zip(pool.classes, counts, strict=True) if not count]
    notes = [*pool.notes, *images.notes]
    notes += [f"classes without a tested image: {', '.join(absent)}"] if absent else []
    return {
        "task": TASK,
        "dataset": options.dataset,
        "test_dataset": None,
        "metric": "accuracy",
        "classes": list(pool.classes),
        "sizes": {"test": len(which)},
        "rows": [
            {
                "features": name,
                "method": METHOD,
                "accuracy": float(answer.mean()),
                **dict(zip(("low", "high"), interval(answer, np.ones(len(answer)), seed=options.seed), strict=True)),
                "chosen": None,
                "dimension": dimension[name],
                "seconds": round(spent, 2) if name == PRETRAINED else 0.0,
            }
            for name, answer in answers.items()
        ],
        "per_class": {METHOD: dict(zip(pool.classes, each.tolist(), strict=True))},
        "confusion": confusion.tolist(),
        "confusion_of": METHOD,
        "features": {
            name: {"dimension": dimension[name], "seconds": round(seconds, 2) if name == PRETRAINED else 0.0}
            for name in answers
        },
        "prompts": {name: prompts(name)[0] for name in pool.classes},
        "settings": {
            "split": told,
            "image_size": {m: list(size) for m, size in images.sizes.items()},
            "pooling": words.pooling(options.modality),
            "classes": f"mean of the unit vectors of {len(prompts(''))} templates",
            "ties": "classes that are equally alike share an image",
            "interval": f"95 %, bootstrap over test images, {RESAMPLES} draws",
            "seed": options.seed,
        },
        "notes": [*notes, *_same_words(pool.classes)],
    }


def class_vectors(text: Words, classes: Sequence[str]) -> Float[np.ndarray, "k e"]:
    """A unit vector a class: of the mean of the unit vectors of its templates."""
    asked = [prompts(name) for name in classes]
    vectors, _ = words.text_vectors(text, [prompt for every in asked for prompt in every])
    mean = vectors.reshape(len(classes), -1, vectors.shape[1]).mean(1)
    return mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)


def top_one(
    cosines: Float[np.ndarray, "n k"], truth: Int[np.ndarray, "n"]
) -> tuple[Float[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """How right the most alike class is, and which it is; m classes that are equally alike are right by 1 / m."""
    first = cosines == cosines.max(1, keepdims=True)
    return first[np.arange(len(truth)), truth] / first.sum(1), cosines.argmax(1)


def choose(pool: Pool, split: str | None, train_per_class: int | None) -> tuple[Int[np.ndarray, "n"], str]:
    """Numbers of the images that are told, and which these are, in words.

    Raises:
      UserError: there is no such split.
    """
    every = np.arange(len(pool.examples))
    own = {part: np.array([i for i in every.tolist() if pool.examples[i].part == part], int) for part in PARTS}
    there = [part for part in PARTS if len(own[part])]
    if split == ALL:
        return every, "all images"
    if there:
        wanted = split or ("test" if "test" in there else "val" if "val" in there else "train")
        if wanted not in there:
            raise UserError(
                f'{pool.name} has no split "{wanted}"; it has {", ".join(there)}; take one, or --split={ALL}'
            )
        return own[wanted], f'the source\'s own part "{wanted}"'
    if split not in (None, "train", "test"):
        raise UserError(f'{pool.name} has no parts of its own, and so no split "{split}"; take train, test or {ALL}')
    labels = np.array([example.label for example in pool.examples], int)
    count = train_per_class or TRAIN_PER_CLASS
    train, test = split_by_hash([example.name for example in pool.examples], labels, train_per_group=count)
    if split == "train":
        return np.sort(train), f"by file-name hash, the up to {count} a class that a probe trains on"
    return np.sort(test), f"by file-name hash, all but the up to {count} a class that a probe trains on"


def _same_words(classes: Sequence[str]) -> list[str]:
    """Classes that have the same words cannot be told apart by them."""
    by_words: dict[str, list[str]] = {}
    for name in classes:
        by_words.setdefault(class_words(name), []).append(name)
    return [f"{' and '.join(names)} are called alike: {each}" for each, names in by_words.items() if len(names) > 1]


def from_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs what the command line asks for, prints the table and writes the files."""
    result = run(arguments.checkpoint, arguments.dataset, **probe.options_of(arguments, Options))
    probe.tell(result, arguments)
    return result
