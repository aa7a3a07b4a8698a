"""`skyjax eval --task=segmentation`: what frozen features know of each pixel, beside features that know less.

In: a checkpoint and records with label maps. Out: the same dict as probe.py's, printed, written and shown likewise. The
probe is logistic regression on single pixels; every block of pixels is tested once, at a gap from those that trained.

Rows: the fused features of the trained encoder; of the same encoder untrained; of the trained encoder with the dates
shuffled; and logistic regression on the raw series that the encoder saw.
"""

import argparse
import dataclasses
import functools
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

import skyjax
from skyjax.errors import UserError, nearest
from skyjax.evals import blocks, linear, probe, series
from skyjax.evals.blocks import METRICS, Pixels
from skyjax.evals.bootstrap import RESAMPLES, paired, sentence, with_interval
from skyjax.evals.features import FUSED, Encoder, untrained
from skyjax.evals.probe import PRETRAINED, UNTRAINED
from skyjax.evals.progress import track
from skyjax.input.records import RecordSource
from skyjax.sample import Sample

TASK = "segmentation"
SHUFFLED, SHUFFLED_SITE = "dates shuffled", "one date order a site"
RAW, MEANS = "raw series", "raw means, no dates"
# Every third C of the image probe: ten times as many fits are to be made here, on features that are less alike.
INVERSE_PENALTIES = linear.INVERSE_PENALTIES[::3]

# The pixels that train while C is chosen, those it is chosen on, and those that train in the end.
Parts = tuple[Bool[np.ndarray, "n"], Bool[np.ndarray, "n"], Bool[np.ndarray, "n"]]


@dataclasses.dataclass(frozen=True)
class Options:
    """What is probed and how.

    Attributes:
      dataset: a skyjax dataset whose records have label maps, or one class number a record of one pixel.
      label: the label probed; None where there is one only.
      modality: "fused"; "context"; or a modality, whose spatial features are averaged over dates.
      block: pixels a side of a block of the label map.
      gap: pixels around a tested block that do not train.
      folds: parts of the blocks, each tested once.
      least: pixels that a class needs to take part.
      seed: of the untrained encoder, the folds, the shuffled dates and the bootstrap.
      baselines: whether the other rows are made too; where models are compared with each other, they only cost.
    """

    dataset: str
    label: str | None = None
    modality: str = FUSED
    block: int = 8
    gap: int = 4
    folds: int = 8
    least: int = 30
    seed: int = 0
    baselines: bool = True


@dataclasses.dataclass(frozen=True)
class Sites:
    """Sites with their maps of class numbers, -1 where there is none; the classes' names; what was left out."""

    samples: Sequence[Sample]
    labels: list[Int[np.ndarray, "h w"]]
    classes: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Of the label maps."""
        return [(chart.shape[0], chart.shape[1]) for chart in self.labels]


def run(checkpoint: str | pathlib.Path, dataset: str, **options: Any) -> dict[str, Any]:
    """Probes a checkpoint: a run's directory or one of its checkpoints. Options and result: `Options`, `compare`.

    Raises:
      UserError: the checkpoint or the data set is missing or cannot be used.
    """
    model = skyjax.load(checkpoint)
    chosen = Options(str(dataset), **options)
    return {"checkpoint": str(checkpoint)} | compare(model, untrained(model, chosen.seed), chosen)


def compare(model: Encoder, fresh: Encoder, options: Options) -> dict[str, Any]:
    """Probes a model's features of pixels beside the baselines.

    Returns:
      As `probe.compare`, with these differences: a row's `method` names its metric, which `accuracy`, `low` and `high`
      are of, as fractions of 1; `paired` has for each baseline and metric the difference, pre-trained minus baseline,
      with its interval over the same blocks; `maps` has a site's true and said class numbers; `label`; `blocks`.
    """
    known = (FUSED, series.CONTEXT, *model.config.model.modalities)
    if options.modality not in known:
        raise UserError(f"--modality={options.modality} is not in this checkpoint; it has {', '.join(known)}")
    sites = open_sites(options)
    pixels = blocks.labelled_pixels(sites.labels, block=options.block)
    fold = blocks.deal(pixels, options.folds, options.seed)
    parts = [_parts(pixels, fold, test, options) for test in range(options.folds)]
    features, seconds = _features(model, fresh, sites, pixels, options)
    tables, predicted, chosen, spent = {}, {}, {}, {}
    for name, rows in track(list(features.items()), len(features), "probes: segmentation"):
        start = time.perf_counter()
        predicted[name], chosen[name] = _test_all(rows, pixels, fold, parts, len(sites.classes))
        tables[name] = blocks.confusions(pixels, predicted[name], len(sites.classes))
        spent[name] = round(time.perf_counter() - start, 2)
    draws = {name: blocks.redraw(table, seed=options.seed) for name, table in tables.items()}
    differences = paired(tables, draws, METRICS, PRETRAINED)
    truth = tables[PRETRAINED].sum(0)
    accuracy = next(iter(METRICS))
    return {
        "task": TASK,
        "dataset": options.dataset,
        "test_dataset": None,
        "label": options.label,
        "metric": "score",
        "classes": list(sites.classes),
        "sizes": _sizes(pixels, parts),
        "blocks": pixels.blocks,
        "rows": [
            {
                "features": name,
                "method": metric,
                **with_interval(measure(tables[name].sum(0)), measure(draws[name])),
                "chosen": chosen[name],
                "dimension": features[name].shape[1],
                "seconds": spent[name],
            }
            for metric, measure in METRICS.items()
            for name in features
        ],
        "paired": differences,
        "per_class": {accuracy: dict(zip(sites.classes, probe.recalls(truth).tolist(), strict=True))},
        "confusion": truth.astype(int).tolist(),
        "confusion_of": accuracy,
        "features": {
            name: {"dimension": rows.shape[1], "seconds": round(seconds[name], 2)} for name, rows in features.items()
        },
        "settings": _settings(model, options),
        "maps": charts(sites.samples, sites.labels, pixels, predicted[PRETRAINED]),
        "notes": [*sites.notes, *(sentence(each, PRETRAINED) for each in differences if each["metric"] == accuracy)],
    }


def open_sites(options: Options) -> Sites:
    """The records that have the label, with class numbers for the codes of classes that are large enough.

    Raises:
      UserError: there is no such data set or label, or fewer than two classes are left.
    """
    source = RecordSource(options.dataset)
    every = [source[i] for i in range(len(source))]
    names = sorted({name for sample in every for name, value in sample.labels.items() if np.ndim(value) in (0, 2)})
    if not names:
        raise UserError(f'"{options.dataset}" has no map of labels; segmentation needs one')
    label = options.label or (names[0] if len(names) == 1 else None)
    if label not in names:
        asked = f'no map of labels "{label}"{nearest(label, names)}; it has' if label else "several maps of labels:"
        raise UserError(f'"{options.dataset}" has {asked} {", ".join(names)}; choose one by --label=NAME')
    there = [sample for sample in every if np.ndim(sample.labels.get(label, np.zeros(1))) in (0, 2)]
    there = [sample for sample in there if any(s.valid.any() for s in sample.sequences.values())]
    codes = [np.atleast_2d(np.asarray(sample.labels[label])).astype(int) for sample in there]
    # A map of one class has nothing to tell apart but its site, which every feature knows.
    told = [chart.size == 1 or len(np.unique(chart[chart >= 0])) > 1 for chart in codes]
    notes = [f"{told.count(False)} of {len(told)} sites have one class only and were left out"] * (False in told)
    kept = [(s, c) for s, c, good in zip(there, codes, told, strict=True) if good]
    counts: dict[int, int] = {}
    for _, chart in kept:
        for code, count in zip(*np.unique(chart[chart >= 0], return_counts=True), strict=True):
            counts[int(code)] = counts.get(int(code), 0) + int(count)
    large = sorted(code for code, count in counts.items() if count >= options.least)
    small = sorted(set(counts) - set(large))
    if len(large) < 2:
        raise UserError(
            f'"{options.dataset}": label "{label}" has {len(large)} classes of {options.least} pixels or more; a probe'
            " tells two or more apart"
        )
    meaning = source.description.get("label_names", {}).get(label)
    title = {code: meaning[code] if meaning and code < len(meaning) else str(code) for code in counts}
    if small:
        listed = ", ".join(f"{title[code]} ({counts[code]})" for code in small)
        notes.append(f"classes of fewer than {options.least} pixels were left out: {listed}")
    numbers = {code: number for number, code in enumerate(large)}
    charts = [np.vectorize(lambda code: numbers.get(int(code), -1), otypes=[int])(chart) for _, chart in kept]
    return Sites([s for s, _ in kept], charts, tuple(title[code] for code in large), tuple(notes))


def _features(
    model: Encoder, fresh: Encoder, sites: Sites, pixels: Pixels, options: Options
) -> tuple[dict[str, Float[np.ndarray, "n d"]], dict[str, float]]:
    """Features -> a row a labelled pixel; and the seconds that each took."""
    size = view_size(model, sites.samples)
    bands = {m: tuple(part.bands) for m, part in model.config.model.modalities.items() if m in size}

    @functools.lru_cache(maxsize=1)  # the trained and the untrained encoder see the same tiles
    def tiles(shuffle: str | None) -> list[series.Tile]:
        return list(
            series.tiles(
                sites.samples, sites.labels, block=options.block, size=size, shuffle=shuffle, seed=options.seed
            )
        )

    def encoded(encoder: Encoder, shuffle: str | None = None) -> list[np.ndarray]:
        return series.model_features(encoder, tiles(shuffle), sites.shapes, kind=options.modality)

    makers = {
        PRETRAINED: lambda: encoded(model),
        UNTRAINED: lambda: encoded(fresh),
        SHUFFLED: lambda: encoded(model, "tile"),
        SHUFFLED_SITE: lambda: encoded(model, "site"),
        RAW: lambda: series.raw_series(sites.samples, sites.shapes, bands),
        MEANS: lambda: series.raw_means(sites.samples, sites.shapes, bands),
    }
    features, seconds = {}, {}
    for name, make in makers.items():
        if name != PRETRAINED and not options.baselines:
            continue
        start = time.perf_counter()
        maps = make()
        features[name] = np.stack([maps[s][r, c] for s, (r, c) in zip(pixels.site, pixels.place, strict=True)])
        seconds[name] = time.perf_counter() - start
    return features, seconds


def view_size(model: Encoder, samples: Sequence[Sample]) -> dict[str, int]:
    """Modality -> pixels a side of the views that the model was trained on, of the modalities that the sites have."""
    present = {m for sample in samples for m, s in sample.sequences.items() if s.valid.any()}
    size = model.config.get("data", {}).get("global_views", {}).get("size", {})
    found = {
        m: int(size.get(m, part.get("image_size", 8)))
        for m, part in model.config.model.modalities.items()
        if m in present
    }
    if not found:
        raise UserError(
            f"the data set has {', '.join(sorted(present))}, but this checkpoint encodes"
            f" {', '.join(model.config.model.modalities)}"
        )
    return found


def _test_all(
    features: Float[np.ndarray, "n d"],
    pixels: Pixels,
    fold: Int[np.ndarray, "blocks"],
    parts: Sequence[Parts],
    num_classes: int,
) -> tuple[Int[np.ndarray, "n"], float]:
    """What is said of every pixel when its block is tested, and the C chosen, the median over folds."""
    predicted = np.full(len(features), -1)
    chosen = []
    for test, (inner, validation, again) in enumerate(parts):
        tested = fold[pixels.block] == test
        fit = linear.fit_lbfgs(
            linear.Part(features[inner], pixels.label[inner]),
            linear.Part(features[validation], pixels.label[validation]),
            features[tested],
            num_classes=num_classes,
            again=linear.Part(features[again], pixels.label[again]),
            penalties=INVERSE_PENALTIES,
        )
        predicted[tested] = fit.predicted
        chosen.append(fit.chosen)
    return predicted, float(np.median(chosen))


def _parts(pixels: Pixels, fold: Int[np.ndarray, "blocks"], test: int, options: Options) -> Parts:
    """What trains and validates when the blocks of fold `test` are tested."""

    def beside(number: int) -> Bool[np.ndarray, "n"]:
        return blocks.near(pixels, fold == number, side=options.block, gap=options.gap)

    held_out = (test + 1) % options.folds
    again = ~beside(test)
    validation = again & (fold[pixels.block] == held_out)
    inner = again & ~beside(held_out)
    for name, part in (("training", inner), ("validation", validation)):
        if not part.any():
            raise UserError(
                f"fold {test} has no {name} pixel: {pixels.blocks} blocks of {options.block} pixels with a gap of"
                f" {options.gap} are too few for {options.folds} folds; take a smaller --gap or other --folds"
            )
    return inner, validation, again


def _sizes(pixels: Pixels, parts: Sequence[Parts]) -> dict[str, int]:
    """Pixels a part; of training and validation the mean over folds."""
    inner, validation, _ = (round(float(np.mean([part.sum() for part in each]))) for each in zip(*parts, strict=True))
    return {"train": inner, "val": validation, "test": len(pixels.label)}


def charts(
    samples: Sequence[Sample], labels: Sequence[np.ndarray], pixels: Pixels, predicted: Int[np.ndarray, "n"]
) -> list[dict[str, Any]]:
    """True and said class numbers of the sites that have a map, -1 where there is no label."""
    found = []
    for number, (sample, chart) in enumerate(zip(samples, labels, strict=True)):
        if chart.size == 1:
            continue
        said = np.full(chart.shape, -1)
        here = pixels.site == number
        said[tuple(pixels.place[here].T)] = predicted[here]
        found.append({"site": sample.id, "truth": chart.tolist(), "said": said.tolist()})
    return found


def _settings(model: Encoder, options: Options) -> dict[str, Any]:
    kind = options.modality
    pooling = {FUSED: "fused features of each pixel", series.CONTEXT: "geo-context of each pixel"}
    views = model.config.get("data", {}).get("global_views", {}).get("size", {})
    return {
        "split": f"{options.folds} folds of blocks of {options.block} pixels a side, a gap of {options.gap} pixels",
        "image_size": {m: [int(side)] * 2 for m, side in views.items()},
        "pooling": pooling.get(kind, f"{kind} features of each pixel, mean over valid dates"),
        "normalisation": "sensor statistics of the checkpoint",
        "lbfgs": f"standardised, C of {len(INVERSE_PENALTIES)} by the next fold, fitted again on all outside the gap",
        "raw": f"each band interpolated in time every {series.STEP} days, and where a clear date was near",
        "interval": f"95 %, bootstrap over blocks, {RESAMPLES} draws; differences are paired",
        "seed": options.seed,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `skyjax eval` that this task alone has."""
    defaults = Options("")
    for name, about in (
        ("block", "segmentation: pixels a side of a block that is tested at a time"),
        ("gap", "segmentation: pixels around it that do not train"),
        ("folds", "segmentation: parts of the blocks, each tested once"),
    ):
        default = getattr(defaults, name)
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{about} ({default})")


def from_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs what the command line asks for, prints the table and writes the files."""
    result = run(arguments.checkpoint, arguments.dataset, **probe.options_of(arguments, Options))
    probe.tell(result, arguments)
    return result
