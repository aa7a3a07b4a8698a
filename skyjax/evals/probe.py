"""`skyjax eval --task=knn|linear`: what frozen features know, beside features that know nothing of pre-training.

In: a checkpoint and a labelled set. Out: one dict, which is printed as a table, written by --json and --csv, and shown
by the report. Rows of the same table saw the same images at the same size in the same parts.
"""

import argparse
import csv
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import rich.console
import rich.table
from jaxtyping import Float, Shaped

import skyjax
from skyjax.errors import UserError
from skyjax.evals import knn, linear
from skyjax.evals.baselines import Extractor, fill, finite_mean, image_statistics, random_convolution
from skyjax.evals.bootstrap import RESAMPLES, interval, score
from skyjax.evals.datasets import LabelledSet, open_dataset
from skyjax.evals.features import FUSED, Encoder, encoder_features, extract_all, untrained
from skyjax.evals.progress import track

TASKS = ("knn", "linear")
PRETRAINED, UNTRAINED = "pre-trained encoder", "untrained encoder"
DECODER = "decoder"  # of a row that the checkpoint writes itself, without a small model
OURS = (PRETRAINED, DECODER)  # rows that know of the training
STATISTICS, CONVOLUTION = "image statistics", "random convolutional features"
_PART_WORDS = {"val": "validation"}
LARGEST = 4  # times the training view's side; larger images are shrunk, unless --image-size says otherwise
_BASELINE_IMAGES = 300  # of the training part, from which the baselines take bands and filters
_DECISIVE = {"knn": f"kNN {knn.NEIGHBOURS[0]}", "linear": "linear L-BFGS"}  # whose mistakes are listed

CSV_COLUMNS = (
    *("dataset", "checkpoint", "features", "method", "metric", "accuracy", "low", "high", "chosen", "dimension"),
    *("train", "val", "test", "image_size", "pooling", "split"),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is probed and how; see `datasets.open_dataset` for the images.

    Attributes:
      task: "knn" or "linear".
      dataset: labelled images.
      test_dataset: the test part, where it lies elsewhere.
      train_per_class: training images a class; None for the source's own part, or 300.
      modality: "fused", or the modality whose spatial encoder is probed.
      sensor: key in sensors.toml of the images.
      bands: their names in order.
      label: the label probed.
      image_size: pixels a side.
      seed: of the untrained encoder, the random filters, the batches of AdamW and the bootstrap.
    """

    task: str
    dataset: str
    test_dataset: str | None = None
    train_per_class: int | None = None
    modality: str = FUSED
    sensor: str | None = None
    bands: tuple[str, ...] = ()
    label: str | None = None
    image_size: int | None = None
    seed: int = 0


def run(checkpoint: str | pathlib.Path, task: str, dataset: str, **options: Any) -> dict[str, Any]:
    """Probes a checkpoint: a run's directory or one of its checkpoints. Options and result: `Options`, `compare`.

    Raises:
      UserError: the checkpoint or the data set is missing or cannot be used.
    """
    model = skyjax.load(checkpoint)
    chosen = Options(task, str(dataset), **options)
    result = compare(model, untrained(model, chosen.seed), chosen)
    return {"checkpoint": str(checkpoint)} | result


def compare(model: Encoder, fresh: Encoder, options: Options) -> dict[str, Any]:
    """Probes a model beside its untrained twin and the baselines.

    Returns:
      task, dataset, test_dataset, metric, classes, sizes (examples a part), rows (features, method, accuracy, low,
      high, chosen, dimension, seconds), per_class (method -> class -> share right, of the model), confusion (truth x
      said, of the method `confusion_of`; None with several labels), features (name -> dimension, seconds), settings,
      notes.
      Shares and intervals are fractions of 1; `accuracy` is micro-F1 where `metric` says so.
    """
    task, seed = options.task, options.seed
    if task not in TASKS:
        raise UserError(f"--task={task} is not known; tasks: {', '.join(TASKS)}")
    examples = open_dataset(
        options.dataset,
        test_path=options.test_dataset,
        train_per_class=options.train_per_class,
        sensor=options.sensor,
        bands=options.bands,
        label=options.label,
        image_size=options.image_size,
        largest=largest_sides(model),
    )
    known = tuple(model.config.model.modalities)
    if not set(known) & set(examples.sizes):
        raise UserError(
            f'"{options.dataset}" has {", ".join(examples.sizes)} images, but this checkpoint encodes'
            f" {', '.join(known)}; say by --sensor what the images are, or take another checkpoint"
        )
    features, seconds = _features(examples, _extractors(model, fresh, examples, options))
    several = examples.labels.ndim == 2
    result: dict[str, Any] = {
        "task": task,
        "dataset": options.dataset,
        "test_dataset": options.test_dataset,
        "metric": "micro-F1" if several else "accuracy",
        "classes": list(examples.classes),
        "sizes": {name: len(part) for name, part in examples.parts.items()},
        "rows": [],
        "per_class": {},
        "confusion": None,
        "confusion_of": None if several else _DECISIVE[task],
        "features": {
            name: {"dimension": parts["test"].shape[1], "seconds": round(seconds[name], 2)}
            for name, parts in features.items()
        },
        "settings": _settings(examples, options.modality, seed),
        "notes": list(examples.notes),
    }
    labels = {name: examples.labels[part] for name, part in examples.parts.items()}
    jobs = [
        (name, method, answer)
        for name, parts in features.items()
        for method, answer in _methods(task, parts, labels, len(examples.classes), seed).items()
    ]
    for name, method, answer in track(jobs, len(jobs), f"probes: {task}"):
        start = time.perf_counter()
        predicted, chosen = answer()
        _add_row(result, name, method, labels["test"], predicted, chosen, time.perf_counter() - start, seed)
    return result


def largest_sides(model: Encoder) -> dict[str, int]:
    """Modality -> longest side that an image of a data set keeps; an imported encoder names no views, and no limit."""
    views = model.config.get("data", {}).get("global_views", {})
    return {m: LARGEST * side for m, side in views.get("size", {}).items()}


def _extractors(model: Encoder, fresh: Encoder, examples: LabelledSet, options: Options) -> dict[str, Extractor]:
    chosen = np.random.default_rng(options.seed).permutation(examples.parts["train"])[:_BASELINE_IMAGES]
    train = [examples.read(i) for i in chosen.tolist()]
    return {
        PRETRAINED: encoder_features(model, kind=options.modality),
        UNTRAINED: encoder_features(fresh, kind=options.modality),
        STATISTICS: image_statistics(train),
        CONVOLUTION: random_convolution(train, seed=options.seed),
    }


def _features(
    examples: LabelledSet, extractors: Mapping[str, Extractor]
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, float]]:
    """Features -> part -> (n, d), gaps filled by the training part's mean; and the seconds of each."""
    found, seconds = extract_all(examples, np.concatenate(list(examples.parts.values())), extractors)
    ends = np.cumsum([len(part) for part in examples.parts.values()])[:-1]
    features = {}
    for name, rows in found.items():
        parts = dict(zip(examples.parts, np.split(rows, ends), strict=True))
        mean = finite_mean(parts["train"])
        features[name] = {part: fill(values, mean) for part, values in parts.items()}
    return features, seconds


Answer = Callable[[], tuple[np.ndarray, float | None]]


def _methods(
    task: str,
    features: Mapping[str, Float[np.ndarray, "n d"]],
    labels: Mapping[str, np.ndarray],
    num_classes: int,
    seed: int,
) -> dict[str, Answer]:
    """Method -> a function that gives what it says of the test part, and what it chose."""
    if task == "knn":
        return {f"kNN {k}": _nearest(features, labels, num_classes, k) for k in knn.NEIGHBOURS}
    train, validation = (linear.Part(features[part], labels[part]) for part in ("train", "val"))

    def adamw() -> tuple[np.ndarray, float]:
        fit = linear.fit_adamw(train, validation, features["test"], num_classes=num_classes, seed=seed)
        return fit.predicted, fit.chosen

    def lbfgs() -> tuple[np.ndarray, float]:
        fit = linear.fit_lbfgs(train, validation, features["test"], num_classes=num_classes)
        return fit.predicted, fit.chosen

    return {"linear AdamW": adamw, "linear L-BFGS": lbfgs}


def _nearest(features: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray], num_classes: int, k: int) -> Answer:
    """There is nothing to choose, so the validation part joins the bank."""

    def answer() -> tuple[np.ndarray, None]:
        bank = np.concatenate([features["train"], features["val"]])
        # The same for every row. An angle is worth nothing where one number dwarfs the others, as in statistics in raw
        # units, or where all features share most of their length, as an encoder's do.
        prepare = linear.standardiser(bank)
        cosine, index = knn.neighbours(prepare(bank), prepare(features["test"]), k)
        known = np.concatenate([labels["train"], labels["val"]])
        return knn.predict(cosine, index, known, k=k, num_classes=num_classes), None

    return answer


def _add_row(
    result: dict[str, Any],
    name: str,
    method: str,
    truth: np.ndarray,
    predicted: np.ndarray,
    chosen: float | None,
    seconds: float,
    seed: int,
) -> None:
    above, below = score(truth, predicted)
    low, high = interval(above, below, seed=seed)
    result["rows"].append(
        {
            "features": name,
            "method": method,
            "accuracy": float(above.sum() / max(below.sum(), 1)),
            "low": low,
            "high": high,
            "chosen": chosen,
            "dimension": result["features"][name]["dimension"],
            "seconds": round(seconds, 2),
        }
    )
    if name != PRETRAINED:
        return
    classes = result["classes"]
    if truth.ndim == 2:
        each = 2 * (truth & predicted).sum(0) / np.maximum(truth.sum(0) + predicted.sum(0), 1)
    else:
        confusion = np.zeros((len(classes), len(classes)), int)
        np.add.at(confusion, (truth, predicted), 1)
        each = recalls(confusion)
        if method == result["confusion_of"]:
            result["confusion"] = confusion.tolist()
    result["per_class"][method] = dict(zip(classes, each.tolist(), strict=True))


def recalls(confusion: Shaped[np.ndarray, "k k"]) -> Float[np.ndarray, "k"]:
    """Share of each true class that was said right; 0 for a class without examples."""
    return np.diag(confusion) / np.maximum(confusion.sum(1), 1)


def _settings(examples: LabelledSet, kind: str, seed: int) -> dict[str, Any]:
    pooling = "mean of the fused features over valid places"
    if kind != FUSED:
        pooling = f"mean of the {kind} encoder over valid places and dates"
    return {
        "split": examples.split,
        "image_size": {m: list(size) for m, size in examples.sizes.items()},
        "pooling": pooling,
        "normalisation": "sensor statistics of the checkpoint",
        "knn": f"cosine, vote exp(s / {knn.TEMPERATURE}), standardised, bank: train and val",
        "adamw": f"{linear.EPOCHS} epochs, batch {linear.BATCH_SIZE}, weight decay {linear.WEIGHT_DECAY}, learning rate"
        f" of {len(linear.LEARNING_RATES)} by val",
        "lbfgs": f"standardised, C of {len(linear.INVERSE_PENALTIES)} by val, fitted again on train and val",
        "interval": f"95 %, bootstrap over test examples, {RESAMPLES} draws",
        "seed": seed,
    }


def print_table(result: Mapping[str, Any], console: rich.console.Console | None = None) -> None:
    """The table on stdout: features down, methods across, then the classes."""
    console = console or rich.console.Console()
    methods = list(dict.fromkeys(row["method"] for row in result["rows"]))
    sizes = result["sizes"]
    settings = result["settings"]
    table = rich.table.Table(
        title=f"{result['task']} on {result['dataset']}: {result['metric']} in %, 95 % interval", title_justify="left"
    )
    table.add_column("features", no_wrap=True)
    table.add_column("dim", justify="right")
    for method in methods:
        table.add_column(method, justify="right")
    for name, about in result["features"].items():
        cells = [
            f"{100 * row['accuracy']:.1f} ({100 * row['low']:.1f}–{100 * row['high']:.1f})"
            for row in result["rows"]
            if row["features"] == name
        ]
        style = "bold" if name in OURS else None
        table.add_row(name, str(about["dimension"]), *cells, style=style)
    console.print(table)
    classes = rich.table.Table(title=f"{PRETRAINED}, by class, %", title_justify="left")
    classes.add_column("class")
    for method in result["per_class"]:
        classes.add_column(method, justify="right")
    for name in result["classes"]:
        classes.add_row(name, *(f"{100 * each[name]:.1f}" for each in result["per_class"].values()))
    console.print(classes)
    counts = ", ".join(f"{count:,} {_PART_WORDS.get(part, part)}" for part, count in sizes.items())
    console.print(f"{len(result['classes'])} classes; {counts} ({settings['split']})", highlight=False)
    for note in result["notes"]:
        console.print(f"Note: {note}.", highlight=False)


def append_csv(result: Mapping[str, Any], path: str | pathlib.Path) -> None:
    """Adds the result's rows to a CSV file, with a header where it is new."""
    path = pathlib.Path(path)
    settings = result["settings"]
    shared = {
        **{key: result.get(key, "") for key in ("dataset", "checkpoint", "metric")},
        **result["sizes"],
        "image_size": " ".join(f"{m}:{h}x{w}" for m, (h, w) in settings["image_size"].items()),
        "pooling": settings["pooling"],
        "split": settings["split"],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not path.is_file() or not path.stat().st_size
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, CSV_COLUMNS, extrasaction="ignore")
            if fresh:
                writer.writeheader()
            writer.writerows({**shared, **row} for row in result["rows"])
    except OSError as error:
        raise UserError(f'--csv: "{path}" cannot be written: {error.strerror}') from error


def write_json(result: Mapping[str, Any], path: str | pathlib.Path) -> None:
    """The result as one JSON object."""
    path = pathlib.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise UserError(f'--json: "{path}" cannot be written: {error.strerror}') from error


def add_arguments(parser: argparse.ArgumentParser, other_tasks: tuple[str, ...] = ()) -> None:
    """The options of `skyjax eval`; tasks of other modules take them too, as far as they have a meaning there."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a run's directory or a checkpoint")
    parser.add_argument("--task", required=True, choices=(*TASKS, *other_tasks))
    parser.add_argument("--dataset", required=True, metavar="PATH", help="class folders, a skyjax dataset, tfds:NAME")
    parser.add_argument("--test-dataset", metavar="PATH", help="test images, where they lie elsewhere")
    parser.add_argument("--train-per-class", type=int, metavar="N", help="training images a class (300)")
    parser.add_argument("--modality", default=FUSED, help="probe this modality's encoder instead of the fused features")
    parser.add_argument("--sensor", metavar="KEY", help="what the images were taken with (rgb)")
    parser.add_argument("--bands", metavar="NAME,...", help="the images' bands in order (the sensor's)")
    parser.add_argument("--label", metavar="NAME", help="which label of a skyjax dataset")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="resize every image to this side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON")
    parser.add_argument("--csv", metavar="FILE", help="append the rows to a CSV file")


def options_of(arguments: argparse.Namespace, kind: Any) -> dict[str, Any]:
    """What the command line says of a task's options, by their names; `run` is told task and data set by itself.

    Args:
      arguments: of `skyjax eval`.
      kind: the task's dataclass of options.
    """
    given = vars(arguments) | {"bands": tuple(name for name in (arguments.bands or "").split(",") if name)}
    names = {field.name for field in dataclasses.fields(kind)} - {"task", "dataset"}
    return {name: value for name, value in given.items() if name in names}


def from_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs what the command line asks for, prints the table and writes the files."""
    result = run(arguments.checkpoint, arguments.task, arguments.dataset, **options_of(arguments, Options))
    tell(result, arguments)
    return result


def tell(
    result: Mapping[str, Any],
    arguments: argparse.Namespace,
    show: Callable[[Mapping[str, Any]], None] = print_table,
) -> None:
    """Prints the table, by `show`, and writes the files that the command line asks for; pictures go to the report."""
    show(result)
    if arguments.json:
        write_json(
            {key: value for key, value in result.items() if key not in ("pictures", "attention")}, arguments.json
        )
    if arguments.csv:
        append_csv(result, arguments.csv)
