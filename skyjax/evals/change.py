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
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.ndimage
from jaxtyping import Float, Int

import skyjax
from skyjax.errors import UserError, nearest
from skyjax.evals import blocks, linear, probe, segmentation, series
from skyjax.evals.blocks import Pixels
from skyjax.evals.bootstrap import RESAMPLES, paired, sentence, with_interval
from skyjax.evals.features import FUSED, Encoder, untrained
from skyjax.evals.probe import PRETRAINED, UNTRAINED
from skyjax.evals.progress import track
from skyjax.input.records import RecordSource
from skyjax.sample import Sample
from skyjax.sample import Sequence as Images
from skyjax.sensors import get_sensor

TASK = "change"
VALUES, AROUND = "difference of pixel values", "difference of means around a pixel"
EVERYTHING = "everything changed"
CLASSES = ("unchanged", "changed")
INVERSE_PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
FOLDS = 4
MOST_PIXELS, MOST_CHOOSING = 20_000, 100_000  # that train, and that C is chosen on; neighbours say the same
_CELLS = 16  # features a side of a tile at most, and label pixels are as many times more
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


@dataclasses.dataclass(frozen=True)
class Site:
    """A site with its first and its last date alone, and its map: 1 changed, 0 not, -1 unknown."""

    first: Sample
    last: Sample
    chart: Int[np.ndarray, "h w"]


@dataclasses.dataclass(frozen=True)
class Cells:
    """Features of a site on a grid that may be coarser than its map; a pixel has those of the cell that it lies in."""

    values: Float[np.ndarray, "H W f"]
    shape: tuple[int, int]

    def at(self, place: Int[np.ndarray, "n 2"]) -> Float[np.ndarray, "n f"]:
        """The rows of pixels of the map."""
        row, column = (place[:, i] * self.values.shape[i] // self.shape[i] for i in range(2))
        return self.values[row, column]


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
    sites = open_pairs(options)
    pixels = blocks.labelled_pixels([site.chart for site in sites], block=options.block)
    fold = _folds(sites, pixels)
    features, seconds = _features(model, fresh, sites, options)
    tables, said, chosen, spent = {}, {}, {}, {}
    for name, cells in track(list(features.items()), len(features), "probes: change"):
        start = time.perf_counter()
        said[name], chosen[name] = _test_all(cells, pixels, fold, options)
        tables[name] = blocks.confusions(pixels, said[name], len(CLASSES))
        spent[name] = round(time.perf_counter() - start, 2)
    tables[EVERYTHING] = _everything(tables)
    draws = {name: blocks.redraw(table, seed=options.seed) for name, table in tables.items()}
    differences = paired(tables, draws, METRICS, PRETRAINED)
    ours, truth = said[PRETRAINED], tables[PRETRAINED].sum(0)
    sizes = {name: cells[0].values.shape[-1] for name, cells in features.items()} | {EVERYTHING: 0}
    return {
        "task": TASK,
        "dataset": options.dataset,
        "test_dataset": None,
        "label": options.label,
        "metric": "score",
        "classes": list(CLASSES),
        "sizes": {"train": min(MOST_PIXELS, len(pixels.label)), "val": 0, "test": len(pixels.label)},
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
        "maps": segmentation.charts([site.first for site in sites], [site.chart for site in sites], pixels, ours),
        "notes": [*_notes(sites, pixels), *(sentence(each, PRETRAINED) for each in differences)],
    }


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


# Sites


def open_pairs(options: Options) -> list[Site]:
    """The sites of a data set that have a map of changes and two dates of a modality.

    Raises:
      UserError: there is no such data set, label or site, or nothing changed anywhere.
    """
    source = RecordSource(options.dataset)
    every = [source[i] for i in range(len(source))]
    names = sorted({name for sample in every for name, value in sample.labels.items() if np.ndim(value) == 2})
    label = options.label or (names[0] if len(names) == 1 else None)
    if label not in names:
        hint = f"; it has {', '.join(names)}" if names else ""
        asked = f' "{label}"{nearest(label, names)}' if label else ""
        raise UserError(f'"{options.dataset}" has no one map of labels{asked}{hint}; choose one by --label=NAME')
    sites = []
    for sample in every:
        pairs = {m: pair for m, s in sample.sequences.items() if (pair := _first_and_last(s))}
        if label not in sample.labels or not pairs:
            continue
        chart = np.asarray(sample.labels[label]).astype(int).clip(-1, 1)
        for pair in pairs.values():
            if pair[0].clear.shape[1:] == chart.shape:  # where a date shows nothing, nothing can be said
                chart = np.where(pair[0].clear[0] & pair[1].clear[0], chart, -1)
        first, last = (
            dataclasses.replace(sample, sequences={m: pair[i] for m, pair in pairs.items()}) for i in range(2)
        )
        if (chart >= 0).any():
            sites.append(Site(first, last, chart))
    if not sites:
        raise UserError(f'"{options.dataset}" has no site with a map "{label}" and two dates of one modality')
    seen = np.unique(np.concatenate([site.chart[site.chart >= 0] for site in sites]))
    if len(seen) < len(CLASSES):
        raise UserError(f'"{options.dataset}": every pixel of "{label}" is {CLASSES[seen[0]]}; a probe needs both')
    return sites


def _first_and_last(sequence: Images) -> tuple[Images, Images] | None:
    dates = np.flatnonzero(sequence.valid)
    if len(dates) < 2:
        return None
    first, last = (
        dataclasses.replace(
            sequence,
            **{name: getattr(sequence, name)[i : i + 1] for name in ("values", "days", "valid", "clear")},
        )
        for i in (dates[0], dates[-1])
    )
    return first, last


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
        PRETRAINED: lambda: _encoded(model, sites, options),
        UNTRAINED: lambda: _encoded(fresh, sites, options),
        VALUES: lambda: [_values(site, 1) for site in sites],
        AROUND: lambda: [_values(site, _AROUND) for site in sites],
    }
    features, seconds = {}, {}
    for name, make in makers.items():
        start = time.perf_counter()
        features[name] = make()
        seconds[name] = time.perf_counter() - start
    return features, seconds


def _encoded(model: Encoder, sites: Sequence[Site], options: Options) -> list[Cells]:
    """Differences of the model's features, from tiles of the size of its training views."""
    size = segmentation.view_size(model, [site.first for site in sites])
    maps = []
    for which in ("first", "last"):
        samples = [getattr(site, which) for site in sites]
        # The model's cells are coarser than pixels: a map of cells is made, not one of pixels.
        every = max(1, max(size.values()) // _CELLS)
        grids = [np.zeros([-(-side // every) for side in site.chart.shape], int) for site in sites]
        found = list(series.tiles(samples, grids, block=max(1, options.block // every), size=size))
        shapes = [(grid.shape[0], grid.shape[1]) for grid in grids]
        maps.append(series.model_features(model, found, shapes, kind=options.modality))
    return [_difference(first, last, site) for first, last, site in zip(maps[0], maps[1], sites, strict=True)]


def _values(site: Site, side: int) -> Cells:
    """Differences of each band, in units of the sensor's spread, of means over `side` x `side` pixels.

    Each modality is brought to the map by repeating its pixels.
    """
    dates = []
    for sample in (site.first, site.last):
        bands = []
        for sequence in sample.sequences.values():
            sensor = get_sensor(sequence.sensor)
            std = np.array([sensor.bands[sensor.index(band)].std for band in sequence.bands], np.float32)
            values = np.nan_to_num(sequence.values[0].astype(np.float32)) / std
            values = scipy.ndimage.uniform_filter(values, (side, side, 0), mode="nearest") if side > 1 else values
            place = np.argwhere(np.ones(site.chart.shape, bool))
            bands.append(Cells(values, site.chart.shape).at(place).reshape(*site.chart.shape, -1))
        dates.append(np.concatenate(bands, axis=-1))
    return _difference(dates[0], dates[1], site)


def _difference(first: np.ndarray, last: np.ndarray, site: Site) -> Cells:
    change = last - first
    return Cells(np.concatenate([change, np.abs(change)], axis=-1, dtype=np.float32), site.chart.shape)


# Probe


def _test_all(
    cells: Sequence[Cells], pixels: Pixels, fold: Int[np.ndarray, "n"], options: Options
) -> tuple[Int[np.ndarray, "n"], float]:
    """What is said of every pixel when its fold is tested, and the C chosen, the median over folds."""
    rng = np.random.default_rng(options.seed)
    said = np.zeros(len(fold), int)
    chosen = []
    for test in np.unique(fold):
        train = np.flatnonzero(fold != test)
        penalty, threshold = _choose(cells, pixels, train, rng)
        normalise, weights = _fit(cells, pixels, _balanced(train, pixels, rng), [penalty])
        chosen.append(penalty)
        for site in range(len(cells)):  # a site at a time: all pixels at once would fill the memory
            here = np.flatnonzero((fold == test) & (pixels.site == site))
            if len(here):
                said[here] = _score(normalise(cells[site].at(pixels.place[here])), weights)[0] > threshold
    return said, float(np.median(chosen))


def _choose(
    cells: Sequence[Cells], pixels: Pixels, train: Int[np.ndarray, "m"], rng: np.random.Generator
) -> tuple[float, float]:
    """C and the threshold with the highest F1 on the blocks held out; on all, where one of the parts has one class."""
    held_out = _dealt(pixels, train)[pixels.block[train]] == 0
    inner, outer = train[~held_out], train[held_out]
    if any(len(np.unique(pixels.label[part])) < len(CLASSES) for part in (inner, outer)):
        inner = outer = train
    outer = _some(outer, MOST_CHOOSING, rng)
    normalise, weights = _fit(cells, pixels, _balanced(inner, pixels, rng), INVERSE_PENALTIES)
    scores, labels = _score(normalise(_rows(cells, pixels, outer)), weights), pixels.label[outer]
    best = (-1.0, INVERSE_PENALTIES[0], 0.0)
    for penalty, each in zip(INVERSE_PENALTIES, scores, strict=True):
        order = np.argsort(-each, kind="stable")
        hits = np.cumsum(labels[order])
        values = 2 * hits / (np.arange(1, len(order) + 1) + labels.sum())  # F1 where the first ones are said to change
        last = np.append(np.diff(each[order]) != 0, True)  # of equal scores, all or none
        number = int(np.where(last, values, -1).argmax())
        below = each[order[number + 1]] if number + 1 < len(order) else each[order[number]] - 1
        threshold = float((each[order[number]] + below) / 2)
        best = max(best, (float(values[number]), penalty, threshold), key=lambda found: found[0])
    return best[1], best[2]


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


def _fit(
    cells: Sequence[Cells], pixels: Pixels, which: Int[np.ndarray, "m"], penalties: Sequence[float]
) -> tuple[Callable[[np.ndarray], np.ndarray], Float[np.ndarray, "p f+1 2"]]:
    """How rows are standardised, and the weights for each C."""
    rows = _rows(cells, pixels, which)
    normalise = linear.standardiser(rows)
    return normalise, linear.logistic_path(normalise(rows), pixels.label[which], penalties, num_classes=len(CLASSES))


def _score(rows: Float[np.ndarray, "n f"], weights: Float[np.ndarray, "p f+1 2"]) -> Float[np.ndarray, "p n"]:
    """The log of the odds of a change."""
    change = weights[..., 1] - weights[..., 0]
    return (rows @ change[:, :-1].T + change[:, -1]).T


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
    result = run(
        arguments.checkpoint, arguments.dataset, label=arguments.label, modality=arguments.modality, seed=arguments.seed
    )
    probe.tell(result, arguments)
    return result
