"""`skyjax eval --task=vqa`: answers to questions about images, beside what the question alone tells.

In: a checkpoint and images with questions (evals/questions.py). Out: the same dict as probe.py's, printed, written and
shown likewise. The head (evals/bilinear.py) sees the mean, the spread and the largest value of each feature over the
image's places, since a mean alone does not count, and the question: its words and pairs of words, and beside them the
text tower's features where the checkpoint has one.

Rows: the trained encoder, what the checkpoint's decoder writes where it has one (evals/answering.py), the encoder
untrained, image statistics, the question without an image, and the answer that is most common for the question's type
in the training part. Columns: accuracy by type, the mean of types ("average") and the share of all questions
("overall"), as RSVQA reports them, on answers classed as there; "as written" is the accuracy on a type's answers that
were not classed, of which the head knows the most common ones.
"""

import argparse
import collections
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

import skyjax
from skyjax.errors import UserError
from skyjax.evals import answering, bilinear, probe
from skyjax.evals.answering import Answerer
from skyjax.evals.baselines import fill, finite_mean, image_statistics
from skyjax.evals.bootstrap import RESAMPLES, sentence, with_interval
from skyjax.evals.features import FUSED, Encoder, untrained
from skyjax.evals.probe import DECODER, OURS, PRETRAINED, STATISTICS, UNTRAINED
from skyjax.evals.progress import track
from skyjax.evals.questions import QuestionSet, bag_of_words, open_questions
from skyjax.sample import Sample

TASK = "vqa"
QUESTION, MAJORITY = "question alone", "most common answer of the type"
AVERAGE, OVERALL = "average", "overall"
MOST_QUESTIONS = 20_000  # that train; more say little more about the same images
MOST_ANSWERS = 100  # of those as written
_BATCH = answering.IMAGES  # one shape of images for all rows


@dataclasses.dataclass(frozen=True)
class Options:
    """What is probed and how.

    Attributes:
      dataset: images with questions.
      test_dataset: the test part, where it lies elsewhere.
      modality: "fused", or the modality whose spatial encoder is probed.
      image_size: pixels a side.
      seed: of the untrained encoder, the folds, the questions drawn where there are many, and the bootstrap.
    """

    dataset: str
    test_dataset: str | None = None
    modality: str = FUSED
    image_size: int | None = None
    seed: int = 0


def run(checkpoint: str | pathlib.Path, dataset: str, **options: Any) -> dict[str, Any]:
    """Probes a checkpoint: a run's directory or one of its checkpoints. Options and result: `Options`, `compare`.

    Raises:
      UserError: the checkpoint or the data set is missing or cannot be used.
    """
    model = skyjax.load(checkpoint)
    chosen = Options(str(dataset), **options)
    return {"checkpoint": str(checkpoint)} | compare(model, untrained(model, chosen.seed), chosen)


def compare(
    model: Encoder, fresh: Encoder, options: Options, *, answerers: Mapping[str, Answerer] | None = None
) -> dict[str, Any]:
    """Probes a model's answers beside the baselines.

    Args:
      model: as `skyjax.load` returns it.
      fresh: the same untrained.
      options: see there.
      answerers: name of a row -> who answers in words, beside the model's own decoder. An answer is right where its
        class is that of the true one.

    Returns:
      As `probe.compare`, with these differences: a row's `method` is the type of question that `accuracy`, `low` and
      `high` are of; `paired` has for each baseline and type the difference, `features` (the pre-trained encoder, or the
      decoder) minus `baseline`, with its interval over the same images; `per_class` is of classes of answers.
    """
    known = (FUSED, *model.config.model.modalities)
    if options.modality not in known:
        raise UserError(f"--modality={options.modality} is not in this checkpoint; it has {', '.join(known)}")
    asked = open_questions(
        options.dataset,
        test_path=options.test_dataset,
        image_size=options.image_size,
        largest=probe.largest_sides(model),
    )
    words = _question_features(model, asked)
    rows, seconds = _image_features(model, fresh, asked, options)
    train = np.flatnonzero(~asked.test)
    if len(train) > MOST_QUESTIONS:
        train = np.sort(np.random.default_rng(options.seed).choice(train, MOST_QUESTIONS, replace=False))
    test = np.flatnonzero(asked.test)
    said: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # classes, and answers as written
    chosen, spent = {}, {}
    jobs: dict[str, np.ndarray | None] = {**rows, QUESTION: None}
    for name, images in track(list(jobs.items()), len(jobs), "probes: vqa"):
        start = time.perf_counter()
        said[name], chosen[name] = _answers(asked, bilinear.Asked(words, asked.image, images), train, test, options)
        spent[name] = round(time.perf_counter() - start, 2)
    said[MAJORITY] = _most_common(asked, train, test)
    written = [answer for answer, tests in zip(asked.answer, asked.test, strict=True) if not tests]
    for name, answerer in {**answering.own(model, written), **(answerers or {})}.items():
        start = time.perf_counter()
        said[name] = _written(asked, test, answerer, name)
        spent[name] = round(time.perf_counter() - start, 2)
    said = {name: said[name] for name in sorted(said, key=lambda name: name not in OURS)}
    dimension = {name: 0 if images is None else images.shape[1] for name, images in jobs.items()}
    return _result(asked, test, said, options, dimension, chosen, seconds | spent) | {
        "sizes": {"train": len(train), "val": 0, "test": len(test)},
        "settings": _settings(model, asked, options, len(words.T), DECODER in said),
    }


# Features


def _question_features(model: Encoder, asked: QuestionSet) -> Float[np.ndarray, "n w"]:
    bag = bag_of_words(asked.question, ~asked.test)
    words = getattr(model, "words", None)
    if words is None:
        return bag
    texts = sorted(set(asked.question))
    encoded = dict(zip(texts, words.encode(texts), strict=True))
    tower = np.stack([encoded[question] for question in asked.question]).astype(np.float32)
    # Both have the same spread in all, so that the principal axes are of both.
    return np.concatenate([bag / np.sqrt(bag.var(0).sum()), tower / np.sqrt(tower.var(0).sum() + 1e-12)], axis=1)


def _image_features(
    model: Encoder, fresh: Encoder, asked: QuestionSet, options: Options
) -> tuple[dict[str, Float[np.ndarray, "i d"]], dict[str, float]]:
    """Features -> a row an image; and the seconds that each took."""
    trained = sorted(set(asked.image[~asked.test].tolist()))
    statistics = image_statistics([asked.read(i) for i in trained[:300]])
    makers: dict[str, Callable[[list[Sample]], np.ndarray]] = {
        PRETRAINED: functools.partial(pooled, model, kind=options.modality),
        UNTRAINED: functools.partial(pooled, fresh, kind=options.modality),
        STATISTICS: statistics,
    }
    parts: dict[str, list[np.ndarray]] = {name: [] for name in makers}
    seconds = dict.fromkeys(makers, 0.0)
    starts = range(0, asked.images, _BATCH)
    for first in track(starts, len(starts), "features"):
        samples = [asked.read(i) for i in range(first, min(first + _BATCH, asked.images))]
        for name, make in makers.items():
            start = time.perf_counter()
            # Filled up, so that one shape is compiled.
            parts[name].append(make(samples + samples[-1:] * (_BATCH - len(samples)))[: len(samples)])
            seconds[name] += time.perf_counter() - start
    rows = {name: np.concatenate(each) for name, each in parts.items()}
    return {name: fill(each, finite_mean(each[trained])) for name, each in rows.items()}, seconds


def pooled(model: Encoder, samples: list[Sample], *, kind: str = FUSED) -> Float[np.ndarray, "b 3d"]:
    """Mean, standard deviation and maximum of each feature over an image's valid places and dates; 0 without any.

    Args:
      model: as `skyjax.load` returns it.
      samples: with images of one size.
      kind: "fused", or a modality, whose features before the up-head are taken.
    """
    output = model.encode(samples)
    if kind == FUSED:
        features, valid = output["fused"], output["fused_valid"]
    elif kind in output["encoder"]:
        features, valid = output["encoder"][kind], output["encoder_valid"][kind]
    else:
        there = ", ".join(output["encoder"])
        raise UserError(f"--modality={kind}: the data set has no {kind} images; it has {there}")
    features = np.asarray(features, np.float32).reshape(len(samples), -1, features.shape[-1])
    valid = np.asarray(valid, bool).reshape(len(samples), -1, 1)
    count = np.maximum(valid.sum(1), 1)
    mean = np.where(valid, features, 0).sum(1) / count
    spread = np.sqrt((np.where(valid, features - mean[:, None], 0) ** 2).sum(1) / count)
    largest = np.where(valid.any(1), np.where(valid, features, -np.inf).max(1), 0)
    return np.concatenate([mean, spread, largest], axis=1, dtype=np.float32)


# Answers


def _answers(
    asked: QuestionSet,
    features: bilinear.Asked,
    train: Int[np.ndarray, "n"],
    test: Int[np.ndarray, "m"],
    options: Options,
) -> tuple[tuple[np.ndarray, np.ndarray], float]:
    """The class said of each test question, the answer as written, and the C chosen."""
    classes = np.array(asked.classed)
    names, labels = np.unique(classes[train], return_inverse=True)
    choice = bilinear.choose(features[train], labels, num_classes=len(names), seed=options.seed)
    predict = functools.partial(bilinear.predict, choice=choice)
    said = names[predict(features[train], labels, features[test], num_classes=len(names))].astype(object)
    written = said.copy()
    kinds, answers = np.array(asked.kind), np.array(asked.answer)
    for kind in _classed_kinds(asked):
        common = [answer for answer, _ in collections.Counter(answers[train][kinds[train] == kind]).most_common()]
        common = common[:MOST_ANSWERS]
        here = train[(kinds[train] == kind) & np.isin(answers[train], common)]
        there = kinds[test] == kind
        if len(here) and there.any():
            told, numbers = np.unique(answers[here], return_inverse=True)
            written[there] = told[predict(features[here], numbers, features[test[there]], num_classes=len(told))]
    return (said, written), choice.penalty


def _classed_kinds(asked: QuestionSet) -> list[str]:
    rows = zip(asked.kind, asked.answer, asked.classed, strict=True)
    return sorted({kind for kind, answer, classed in rows if answer != classed})


def _most_common(
    asked: QuestionSet, train: Int[np.ndarray, "n"], test: Int[np.ndarray, "m"]
) -> tuple[np.ndarray, np.ndarray]:
    """What is said most often of a type where it trains; of equals the first in the order of letters."""

    def of(answers: Sequence[str]) -> np.ndarray:
        counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for i in train:
            counts[asked.kind[i]][answers[i]] += 1
        best = {kind: min(each, key=lambda answer: (-each[answer], answer)) for kind, each in counts.items()}
        return np.array([best.get(asked.kind[i], "") for i in test], object)

    return of(asked.classed), of(asked.answer)


def _written(
    asked: QuestionSet, test: Int[np.ndarray, "m"], answerer: Answerer, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """The class of what an answerer writes, and what it writes."""
    order = np.argsort(asked.image[test], kind="stable")
    images, starts = np.unique(asked.image[test][order], return_index=True)
    own = np.split(order, starts[1:])
    words = np.empty(len(test), object)
    for first in track(range(0, len(images), _BATCH), -(-len(images) // _BATCH), f"answers: {name}"):
        rows = own[first : first + _BATCH]
        samples = [asked.read(int(i)) for i in images[first : first + _BATCH]]
        said = answerer(samples, [[asked.question[test[i]] for i in each] for each in rows])
        for each, texts in zip(rows, said, strict=True):
            words[each] = texts
    return np.array(asked.class_of([asked.kind[i] for i in test], words.tolist()), object), words


# Scores


def accuracies(
    right: Bool[np.ndarray, "n"], kinds: Sequence[str], image: Int[np.ndarray, "n"], *, draws: Float[np.ndarray, "r i"]
) -> dict[str, Float[np.ndarray, "r"]]:
    """Accuracy of each type, the mean of types, and that of all questions, for each draw of images.

    Args:
      right: whether a question was answered.
      kinds: types of the questions.
      image: number of each question's image.
      draws: how often each image was drawn. A draw without a question of a type has no such type; its accuracy is NaN.
    """
    kind, number = np.unique(np.array(kinds), return_inverse=True)
    above, below = (np.zeros((draws.shape[1], len(kind))) for _ in range(2))
    np.add.at(above, (image, number), right)
    np.add.at(below, (image, number), 1)
    hits, asked = draws @ above, draws @ below
    each = np.divide(hits, asked, out=np.full(hits.shape, np.nan), where=asked > 0)
    found = {str(name): each[:, i] for i, name in enumerate(kind)}
    return found | {AVERAGE: np.nanmean(each, axis=1), OVERALL: hits.sum(1) / np.maximum(asked.sum(1), 1)}


def image_draws(image: Int[np.ndarray, "n"], *, resamples: int = RESAMPLES, seed: int = 0) -> Float[np.ndarray, "r i"]:
    """How often each image is drawn: as many as there are, with replacement. The first row has each once."""
    images = np.unique(image)
    drawn = np.random.default_rng(seed).multinomial(len(images), np.full(len(images), 1 / len(images)), size=resamples)
    counts = np.zeros((resamples + 1, int(image.max()) + 1))
    counts[0, images] = 1
    counts[1:, images] = drawn
    return counts


def _result(
    asked: QuestionSet,
    test: Int[np.ndarray, "m"],
    said: Mapping[str, tuple[np.ndarray, np.ndarray]],
    options: Options,
    dimension: Mapping[str, int],
    chosen: Mapping[str, float],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    kinds, image = [asked.kind[i] for i in test], asked.image[test]
    truth, written = np.array(asked.classed, object)[test], np.array(asked.answer, object)[test]
    draws = image_draws(image, seed=options.seed)
    scores = {}
    for name, (classes, words) in said.items():
        scores[name] = accuracies(classes == truth, kinds, image, draws=draws)
        exact = accuracies(words == written, kinds, image, draws=draws)
        scores[name] |= {f"{kind}, as written": exact[kind] for kind in _classed_kinds(asked) if kind in exact}
    methods = list(scores[PRETRAINED])
    paired: list[dict[str, Any]] = [
        {
            "features": ours,
            "baseline": name,
            "metric": method,
            **_interval(scores[ours][method] - scores[name][method], "difference"),
        }
        for ours in (PRETRAINED, DECODER)
        for name in (said if ours in said else ())
        if name not in (PRETRAINED, ours)
        for method in methods
    ]
    names = sorted(set(truth.tolist()))
    hits = said[PRETRAINED][0] == truth
    return {
        "task": TASK,
        "dataset": options.dataset,
        "test_dataset": options.test_dataset,
        "metric": "accuracy",
        "headline": OVERALL,
        "classes": names,
        "rows": [
            {
                "features": name,
                "method": method,
                **_interval(scores[name][method], "accuracy"),
                "chosen": chosen.get(name),
                "dimension": dimension.get(name, 0),
                "seconds": seconds.get(name, 0.0),
            }
            for method in methods
            for name in said
        ],
        "paired": paired,
        "per_class": {OVERALL: {name: float(hits[truth == name].mean()) for name in names}},
        "confusion": None,
        "confusion_of": None,
        "features": {
            name: {"dimension": dimension.get(name, 0), "seconds": round(seconds.get(name, 0.0), 2)} for name in said
        },
        "notes": [
            *asked.notes,
            *(sentence(each, each["features"]) for each in paired if _told(each)),
        ],
    }


def _told(paired: Mapping[str, Any]) -> bool:
    """Whether a difference stands among the notes; all stand in the result."""
    in_sum = paired["metric"] in (AVERAGE, OVERALL)
    return paired["baseline"] in (MAJORITY, QUESTION) and (paired["features"] == PRETRAINED or in_sum)


def _interval(values: Float[np.ndarray, "r"], name: str) -> dict[str, float]:
    """The value of the first draw, which has each image once, with the interval of the others."""
    return with_interval(values[0], values[1:], name)


def _settings(model: Encoder, asked: QuestionSet, options: Options, dimension: int, decoder: bool) -> dict[str, Any]:
    kind = "fused features" if options.modality == FUSED else f"{options.modality} encoder's features"
    tower = " and the text tower's features" if getattr(model, "words", None) is not None else ""
    return {
        "split": asked.split,
        "image_size": {m: list(size) for m, size in asked.sizes.items()},
        "images": {
            "train": len(np.unique(asked.image[~asked.test])),
            "test": len(np.unique(asked.image[asked.test])),
        },
        "pooling": f"mean, spread and maximum of the {kind} over valid places",
        "normalisation": "sensor statistics of the checkpoint",
        "questions": f"words and pairs of words{tower}, {dimension} in all",
        "head": "logistic regression on principal axes of question and image and their products; axes and C by"
        f" {bilinear.FOLDS} folds of training images",
        **({DECODER: "writes greedily, on the fused features of all places"} if decoder else {}),
        "interval": f"95 %, bootstrap over test images, {RESAMPLES} draws; differences are paired",
        "seed": options.seed,
    }


def from_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs what the command line asks for, prints the table and writes the files."""
    result = run(arguments.checkpoint, arguments.dataset, **probe.options_of(arguments, Options))
    probe.tell(result, arguments)
    return result
