"""Images with questions for probes: whose questions train, whose test, and which answers count as one.

In: a folder of skyjax datasets train/val/test, or one dataset; texts of three fields, type, question and answer
(docs/records.md). Out: `QuestionSet`. A part is of images: all questions of an image are on one side.

Answers are classed as RSVQA (Lobry et al. 2020) classes them: areas into 0, up to 10, 100, 1,000 and more m2; counts
into 0, up to 10, 100, 1,000 and more, where those of the training part go beyond 100. All others stand for themselves.
"""

import collections
import dataclasses
import functools
import itertools
import pathlib
import re
from collections.abc import Callable, Collection, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from skyjax.errors import BadRecord, UserError
from skyjax.evals.datasets import hold_out
from skyjax.evals.reading import look_at
from skyjax.evals.sources import Example
from skyjax.input.records import DESCRIPTION, RecordSource
from skyjax.input.split_file import PART_NAMES
from skyjax.sample import Sample

UNTYPED = "question"
FEW_COUNTS = 100  # a collection whose counts stay below tells them one by one
WORDS = 1000
_EDGES = (10, 100, 1000)
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*(m2)?")


@dataclasses.dataclass(frozen=True)
class QuestionSet:
    """Questions about images.

    Attributes:
      name: what the user called it.
      images: how many there are.
      image: number of each question's image.
      kind, question, answer: of each question, as written.
      test: whether a question is of the test part; the others train.
      classed: of each answer, its class.
      class_of: (kinds, answers) -> the classes of other answers to questions of these kinds.
      split: how the parts came about, in words.
      notes: what a reader of the results should know.
      sizes: modality -> (height, width) of every image.
      read: number of an image -> its sample.
    """

    name: str
    images: int
    image: Int[np.ndarray, "n"]
    kind: tuple[str, ...]
    question: tuple[str, ...]
    answer: tuple[str, ...]
    test: Bool[np.ndarray, "n"]
    classed: tuple[str, ...]
    class_of: Callable[[Sequence[str], Sequence[str]], tuple[str, ...]]
    split: str
    notes: tuple[str, ...]
    sizes: dict[str, tuple[int, int]]
    read: Callable[[int], Sample]


def open_questions(
    path: str, *, test_path: str | None = None, image_size: int | None = None, largest: dict[str, int] | None = None
) -> QuestionSet:
    """Opens, splits, reads and checks a set.

    A source with a part "test" is tested on it, and "val" joins what trains; one without is tested on "val". Where
    there are no parts, the last fifth of the images by the hash of their ids tests.

    Args:
      path: a folder that `skyjax data build` made.
      test_path: another, whose images test; all of `path` then trains.
      image_size: pixels a side that every image is resized to.
      largest: modality -> longest side in pixels; larger images are shrunk to it.

    Raises:
      UserError: there is no such folder, nothing to train or test on, or more than 1 % of the images cannot be read.
    """
    found = _read_parts(path)
    if test_path is not None:
        other = _read_parts(test_path)
        tested = "test" if any(each.part == "test" for each in other) else "val"
        tests = [each for each in other if each.part in ("", tested)]
        found = [dataclasses.replace(each, part="train") for each in found if each.part != "test"]
        found += [dataclasses.replace(each, part="test") for each in tests]
        split = f'test: "{test_path}"'
    else:
        found, split = _with_parts(found)
    images = look_at([each.example for each in found], np.arange(len(found)), image_size=image_size, largest=largest)
    found = [dataclasses.replace(each, number=i) for i, each in enumerate(found) if i in images.digests]
    numbers = [each.number for each in found]
    rows = [(i, each.part == "test", *fields) for i, each in enumerate(found) for fields in each.questions]
    for part, tests_it in (("training", False), ("test", True)):
        if not any(row[1] == tests_it for row in rows):
            raise UserError(f'"{path}" has no question in its {part} part; --task=vqa needs images with questions')
    image, test, kind, question, answer = zip(*rows, strict=True)
    class_of = functools.partial(classed, large=_large_counts(kind, answer, ~np.array(test, bool)))
    trained = {images.digests[each.number] for each in found if each.part != "test"}
    copies = sum(each.part == "test" and images.digests[each.number] in trained for each in found)
    notes = (*images.notes, *([f"{copies} test images are copies of training images"] if copies else ()))
    return QuestionSet(
        path,
        len(found),
        np.array(image, int),
        kind,
        question,
        answer,
        np.array(test, bool),
        class_of(kind, answer),
        class_of,
        split,
        notes,
        dict(images.sizes),
        lambda i: images.read(numbers[i]),
    )


@dataclasses.dataclass(frozen=True)
class _Image:
    example: Example
    part: str
    questions: tuple[tuple[str, str, str], ...]
    number: int = -1


def _read_parts(path: str) -> list[_Image]:
    folder = pathlib.Path(path)
    if (folder / DESCRIPTION).is_file():
        return _read(folder, "")
    inside = sorted(each for each in folder.iterdir() if (each / DESCRIPTION).is_file()) if folder.is_dir() else []
    parts = [(each, PART_NAMES[each.name.lower()]) for each in inside if each.name.lower() in PART_NAMES]
    if not parts:
        raise UserError(
            f'"{path}" is not a skyjax dataset, nor a folder of such called train, val and test; make one: skyjax data'
            " build --source=data/rsvqa.py"
        )
    return [image for each, part in parts for image in _read(each, part)]


def _read(folder: pathlib.Path, part: str) -> list[_Image]:
    source = RecordSource(folder)
    found = []
    for i in range(len(source)):
        read = functools.partial(source.__getitem__, i)
        try:
            sample = read()
        except BadRecord:  # read again with the rest, where bad ones are named and counted
            found.append(_Image(Example(source.name(i), 0, part, read), part, ()))
            continue
        questions = tuple(_fields(text) for text in sample.texts if "\t" in text)
        if questions:
            found.append(_Image(Example(sample.id or source.name(i), 0, part, read), part, questions))
    return found


def _fields(text: str) -> tuple[str, str, str]:
    fields = text.split("\t")
    return (fields[-3] if len(fields) > 2 else UNTYPED, fields[-2], fields[-1])


def _with_parts(found: Sequence[_Image]) -> tuple[list[_Image], str]:
    parts = {each.part for each in found}
    if "train" in parts and parts & {"val", "test"}:
        tested = "test" if "test" in parts else "val"
        return (
            [dataclasses.replace(each, part="test" if each.part == tested else "train") for each in found],
            f'the source\'s own parts, tested on "{tested}"',
        )
    names = [each.example.name for each in found]
    _, tests = hold_out(names, np.zeros(len(found), int), np.arange(len(found)))
    chosen = set(tests.tolist())
    return (
        [dataclasses.replace(each, part="test" if i in chosen else "train") for i, each in enumerate(found)],
        "a fifth of the images tests, by the hash of their ids",
    )


def classed(kinds: Sequence[str], answers: Sequence[str], *, large: Collection[str]) -> tuple[str, ...]:
    """The class of each answer: see the module's words.

    Args:
      kinds: of the questions.
      answers: as written.
      large: kinds whose counts are classed, since some that train are beyond FEW_COUNTS.
    """
    found = []
    for kind, answer in zip(kinds, answers, strict=True):
        match = _NUMBER.fullmatch(answer.strip())
        found.append(_class(float(match[1]), match[2] or "") if match and (match[2] or kind in large) else answer)
    return tuple(found)


def _large_counts(kinds: Sequence[str], answers: Sequence[str], train: Bool[np.ndarray, "n"]) -> set[str]:
    matches = [_NUMBER.fullmatch(answer.strip()) for answer in answers]
    rows = zip(kinds, matches, train, strict=True)
    return {kind for kind, match, here in rows if here and match and not match[2] and float(match[1]) > FEW_COUNTS}


def _class(number: float, unit: str) -> str:
    if number == 0:
        return f"0{unit}"
    low = f"0{unit}" if unit else "1"
    for edge in _EDGES:
        if number <= edge:
            return f"between {low} and {edge}{unit}"
        low = f"{edge}{unit}" if unit else str(edge + 1)
    return f"more than {_EDGES[-1]}{unit}"


def bag_of_words(questions: Sequence[str], train: Bool[np.ndarray, "n"]) -> Float[np.ndarray, "n w"]:
    """1 where a question has a word or a pair of neighbours, of the WORDS most common ones that train.

    Pairs tell "more roads than forests" from "more forests than roads".
    """
    texts = [_words(question) for question in questions]
    counts = collections.Counter(word for words, here in zip(texts, train, strict=True) if here for word in words)
    known = {
        word: i for i, (word, _) in enumerate(sorted(counts.items(), key=lambda each: (-each[1], each[0]))[:WORDS])
    }
    bag = np.zeros((len(texts), len(known)), np.float32)
    for row, words in zip(bag, texts, strict=True):
        row[[known[word] for word in words if word in known]] = 1
    return bag


def _words(question: str) -> set[str]:
    words = re.findall(r"\w+", question.lower())
    ends = ["^", *words, "$"]
    return {*words, *(" ".join(pair) for pair in itertools.pairwise(ends))}
