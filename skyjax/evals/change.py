"""`skyjax eval --task=change`: whether each pixel changed between two dates, beside what pixel values alone tell.

In: a checkpoint and records of sites with two or more dates and a map of labels: 0 unchanged, above
changed, -1 unknown.
Out: the same dict as probe.py's, printed, written and shown likewise. The probe is logistic regression on a pixel's
features of the last date minus those of the first, and the sizes of these differences. Each site is tested once, by a
probe of the other sites; with one site, blocks of it are dealt into folds instead.

Rows: the trained encoder; the same untrained; the difference of the pixel's values; that of the means around it; and
what comes of saying that everything changed. Changes are rare, so about half of the pixels that train did change. C and
the threshold are chosen by F1 on a quarter of the blocks that train, with the share of changes that they have.
"""

import argparse
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

import skyjax
from skyjax.errors import UserError
from skyjax.evals import blocks, linear, pairs, probe, segmentation
from skyjax.evals.blocks import Pixels
from skyjax.evals.bootstrap import RESAMPLES, paired, sentence, with_interval
from skyjax.evals.features import FUSED, Encoder, untrained
from skyjax.evals.pairs import CLASSES, Cells, Site
from skyjax.evals.probe import PRETRAINED, UNTRAINED
from skyjax.evals.progress import track

TASK = "change"
VALUES, AROUND = "difference of pixel values", "difference of means around a pixel"
EVERYTHING = "everything changed"
INVERSE_PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
FOLDS = 4
MOST_MAPS, MAP_SIDE = 8, 128  # of the sites that are kept for the report
MOST_PIXELS, MOST_CHOOSING = 20_000, 100_000  # that train, and that C is chosen on; neighbours say the same
_AROUND = 15  # pixels a side of a mean


@dataclasses.dataclass(frozen=True)
class Options:
    """What is probed and how.

    Attributes:
      dataset: a skyjax dataset whose records have two dates or more and a map of changes.
      label: its name; None where there is one map only.
      modality: "fused", or a modality.
      block: pixels a side of a block of the label map, which the bootstrap draws.
      seed: of the untrained encoder, the training pixels, the folds and the bootstrap.
    """

    dataset: str
    label: str | None = None
    modality: str = FUSED
    block: int = 64
    seed: int = 0


def run(checkpoint: str | pathlib.Path, dataset: str, **options: Any) -> dict[str, Any]:
    """Probes a checkpoint: a run's directory or one of its checkpoints. Options and result: `Options`, `compare`.

    Raises:
      UserError: the checkpoint or the data set is missing or cannot be used.
    """
    model = skyjax.load(checkpoint)
    chosen = Options(str(dataset), **options)
    return {"checkpoint": str(checkpoint)} | compare(model, untrained(model, chosen.seed), chosen)


def compare(model: Encoder, fresh: Encoder, options: Options) -> dict[str, Any]:
    """Probes a model's features of change beside the baselines.

    Returns:
      As `segmentation.compare`; the metrics are F1 and IoU of the pixels that changed.
    """
    known = (FUSED, *model.config.model.modalities)
    if options.modality not in known:
        raise UserError(f"--modality={options.modality} is not in this checkpoint; it has {', '.join(known)}")
    sites = pairs.open_pairs(options.dataset, options.label)
    pixels = blocks.labelled_pixels([site.chart for site in sites], block=options.block)
    fold = _folds(sites, pixels)
    features, seconds = _features(model, fresh, sites, options)
    tables, said, chosen, spent = {}, {}, {}, {}
    for name, cells in track(list(features.items()), len(features), "probes: change"):
        start = time.perf_counter()
        said[name], fits = _test_all(cells, pixels, fold, options)
        chosen[name] = float(np.median([fit.penalty for fit in fits]))
        tables[name] = blocks.confusions(pixels, said[name], len(CLASSES))
        spent[name] = round(time.perf_counter() - start, 2)
    tables[EVERYTHING] = _everything(tables)
    draws = {name: blocks.redraw(table, seed=options.seed) for name, table in tables.items()}
    differences = paired(tables, draws, METRICS, PRETRAINED)
    ours, truth = said[PRETRAINED], tables[PRETRAINED].sum(0)
    maps = segmentation.charts([site.first for site in sites], [site.chart for site in sites], pixels, ours)
    sizes = {name: cells[0].values.shape[-1] for name, cells in features.items()} | {EVERYTHING: 0}
    return {
        "task": TASK,
        "dataset": options.dataset,
        "test_dataset": None,
        "label": options.label,
        "metric": "score",
        "classes": list(CLASSES),
        "sizes": {"train": round(np.mean([fit.pixels for fit in fits])), "val": 0, "test": len(pixels.label)},
        "blocks": pixels.blocks,
        "rows": [
            {
                "features": name,
                "method": metric,
                **with_interval(measure(tables[name].sum(0)), measure(draws[name])),
                "chosen": chosen.get(name),
                "dimension": sizes[name],
                "seconds": spent.get(name, 0.0),
            }
            for metric, measure in METRICS.items()
            for name in tables
        ],
        "paired": differences,
        "per_class": {"recall": dict(zip(CLASSES, probe.recalls(truth).tolist(), strict=True))},
        "confusion": truth.astype(int).tolist(),
        "confusion_of": "recall",
        "features": {name: {"dimension": sizes[name], "seconds": round(seconds.get(name, 0.0), 2)} for name in tables},
        "settings": _settings(model, sites, options),
        "maps": [{name: _coarse(value) for name, value in each.items()} for each in maps[:MOST_MAPS]],
        "notes": [*_notes(sites, pixels), *(sentence(each, PRETRAINED) for each in differences)],
    }


def _coarse(value: Any) -> Any:
    """A map of at most MAP_SIDE pixels a side, by leaving some out; other values as they are."""
    if not isinstance(value, list):
        return value
    step = -(-max(len(value), len(value[0])) // MAP_SIDE)
    return [row[::step] for row in value[::step]]


def f1(confusion: Float[np.ndarray, "*r 2 2"]) -> Float[np.ndarray, "*r"]:
    """F1 of the pixels that changed; 0 where none did and none was said to."""
    hit, wrong = confusion[..., 1, 1], confusion[..., 0, 1] + confusion[..., 1, 0]
    return _ratio(2 * hit, 2 * hit + wrong)


def iou(confusion: Float[np.ndarray, "*r 2 2"]) -> Float[np.ndarray, "*r"]:
    """Intersection over union of the pixels that changed and those said to; 0 where there are neither."""
    hit, wrong = confusion[..., 1, 1], confusion[..., 0, 1] + confusion[..., 1, 0]
    return _ratio(hit, hit + wrong)


METRICS = {"F1 of change": f1, "IoU of change": iou}


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    above, below = np.asarray(above, float), np.asarray(below, float)
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def _folds(sites: Sequence[Site], pixels: Pixels) -> Int[np.ndarray, "n"]:
    """The fold of each pixel: its site, or where there is one site only that of its block."""
    if len(sites) > 1:
        return pixels.site
    return _dealt(pixels, np.arange(len(pixels.label)))[pixels.block]


# Features


def _features(
    model: Encoder, fresh: Encoder, sites: Sequence[Site], options: Options
) -> tuple[dict[str, list[Cells]], dict[str, float]]:
    makers = {
        PRETRAINED: lambda: pairs.encoded(model, sites, kind=options.modality, block=options.block),
        UNTRAINED: lambda: pairs.encoded(fresh, sites, kind=options.modality, block=options.block),
        VALUES: lambda: [pairs.values(site, 1) for site in sites],
        AROUND: lambda: [pairs.values(site, _AROUND) for site in sites],
    }
    features, seconds = {}, {}
    for name, make in makers.items():
        start = time.perf_counter()
        features[name] = make()
        seconds[name] = time.perf_counter() - start
    return features, seconds


# Probe


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted probe: (n, f) -> the log of the odds of a change (n,); the threshold on it; its C; pixels fitted on."""

    score: Callable[[Float[np.ndarray, "n f"]], Float[np.ndarray, "n"]]
    threshold: float
    penalty: float
    pixels: int


def _test_all(
    cells: Sequence[Cells], pixels: Pixels, fold: Int[np.ndarray, "n"], options: Options
) -> tuple[Int[np.ndarray, "n"], list[Fit]]:
    """What is said of every pixel when its fold is tested, and the probe of each fold."""
    rng = np.random.default_rng(options.seed)
    said = np.zeros(len(fold), int)
    fits = []
    for test in np.unique(fold):
        train = np.flatnonzero(fold != test)
        fit = _choose(cells, pixels, train, rng)
        fits.append(fit)
        for site in range(len(cells)):  # a site at a time: all pixels at once would fill the memory
            here = np.flatnonzero((fold == test) & (pixels.site == site))
            if len(here):
                said[here] = fit.score(cells[site].at(pixels.place[here])) > fit.threshold
    return said, fits


def _choose(cells: Sequence[Cells], pixels: Pixels, train: Int[np.ndarray, "m"], rng: np.random.Generator) -> Fit:
    """The C and the threshold with the highest F1 on the blocks held out; on all, where one of the parts has one class.

    It is not fitted again on all that trains: a threshold is of one fit.
    """
    held_out = _dealt(pixels, train)[pixels.block[train]] == 0
    inner, outer = train[~held_out], train[held_out]
    if any(len(np.unique(pixels.label[part])) < len(CLASSES) for part in (inner, outer)):
        inner = outer = train
    outer = _some(outer, MOST_CHOOSING, rng)
    rows = _rows(cells, pixels, which := _balanced(inner, pixels, rng))
    normalise = linear.standardiser(rows)
    path = linear.logistic_path(normalise(rows), pixels.label[which], INVERSE_PENALTIES, num_classes=len(CLASSES))
    tested, labels = _rows(cells, pixels, outer), pixels.label[outer]
    best, most = None, -1.0
    for penalty, weights in zip(INVERSE_PENALTIES, path, strict=True):
        score = functools.partial(_score, normalise=normalise, weights=weights[:, 1] - weights[:, 0])
        threshold, value = best_threshold(score(tested), labels)
        if value > most:
            best, most = Fit(score, threshold, penalty, len(which)), value
    assert best is not None
    return best


def _score(
    rows: Float[np.ndarray, "n f"], normalise: Callable[[np.ndarray], np.ndarray], weights: Float[np.ndarray, "f+1"]
) -> Float[np.ndarray, "n"]:
    return normalise(rows) @ weights[:-1] + weights[-1]


def best_threshold(scores: Float[np.ndarray, "n"], labels: Int[np.ndarray, "n"]) -> tuple[float, float]:
    """The threshold above which calling a change gives the highest F1, half way between two scores, and that F1."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    hits = np.cumsum(labels[order])
    values = 2 * hits / (np.arange(1, len(order) + 1) + labels.sum())  # where the first ones are said to change
    last = np.append(np.diff(ranked) != 0, True)  # of equal scores, all or none
    number = int(np.where(last, values, -1).argmax())
    below = ranked[number + 1] if number + 1 < len(ranked) else ranked[number] - 1
    return float((ranked[number] + below) / 2), float(values[number])


def _dealt(pixels: Pixels, which: Int[np.ndarray, "m"]) -> Int[np.ndarray, "blocks"]:
    """A number below FOLDS for each block, such that pixels of `which` that changed are in all of them."""
    changed = np.bincount(pixels.block[which], pixels.label[which], minlength=pixels.blocks)
    fold = np.empty(pixels.blocks, int)
    fold[np.argsort(-changed, kind="stable")] = np.arange(pixels.blocks) % FOLDS
    return fold


def _balanced(which: Int[np.ndarray, "m"], pixels: Pixels, rng: np.random.Generator) -> Int[np.ndarray, "k"]:
    """As many pixels that did not change as did, and at least a tenth of MOST_PIXELS."""
    changed = _some(which[pixels.label[which] == 1], MOST_PIXELS // 2, rng)
    rest = _some(which[pixels.label[which] == 0], max(len(changed), MOST_PIXELS // 10), rng)
    return np.sort(np.concatenate([changed, rest]))


def _some(which: Int[np.ndarray, "m"], most: int, rng: np.random.Generator) -> Int[np.ndarray, "k"]:
    return np.sort(rng.choice(which, most, replace=False)) if len(which) > most else which


def _rows(cells: Sequence[Cells], pixels: Pixels, which: Int[np.ndarray, "m"]) -> Float[np.ndarray, "m f"]:
    """Features of pixels, which are in the order of their sites."""
    parts = [cells[site].at(pixels.place[which[pixels.site[which] == site]]) for site in range(len(cells))]
    return np.concatenate(parts)


# Results


def _everything(tables: Mapping[str, np.ndarray]) -> Float[np.ndarray, "blocks 2 2"]:
    """The confusion of each block where every pixel is said to have changed."""
    counts = next(iter(tables.values())).sum(-1)
    return np.stack([np.zeros_like(counts), counts], axis=-1)


def _notes(sites: Sequence[Site], pixels: Pixels) -> list[str]:
    share = f"{100 * pixels.label.mean():.1f} % of the labelled pixels changed"
    if len(sites) == 1:
        return [share, "one site only: trained and tested on different blocks of it"]
    few = "; intervals are over their blocks and do not tell of other places" if len(sites) < 10 else ""
    return [share, f"{len(sites)} sites, each tested by a probe of the others{few}"]


def _settings(model: Encoder, sites: Sequence[Site], options: Options) -> dict[str, Any]:
    kind = "fused features" if options.modality == FUSED else f"{options.modality} features"
    views = model.config.get("data", {}).get("global_views", {}).get("size", {})
    split = f"{len(sites)} folds, a site each" if len(sites) > 1 else f"{FOLDS} folds of blocks"
    return {
        "split": f"{split}; blocks of {options.block} pixels a side",
        "image_size": {m: [int(side)] * 2 for m, side in views.items()},
        "pooling": f"{kind}, last date minus first, and the size of that",
        "normalisation": "sensor statistics of the checkpoint",
        "lbfgs": f"standardised, {MOST_PIXELS:,} pixels at most, C of {len(INVERSE_PENALTIES)} and the threshold by F1"
        f" on 1 of {FOLDS} of their blocks",
        "interval": f"95 %, bootstrap over blocks, {RESAMPLES} draws; differences are paired",
        "seed": options.seed,
    }


def from_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs what the command line asks for, prints the table and writes the files."""
    options = probe.options_of(arguments, Options)
    del options["block"]  # --block is of segmentation, whose maps are smaller
    result = run(arguments.checkpoint, arguments.dataset, **options)
    probe.tell(result, arguments)
    return result
