"""What a run logged, and the figures that the report draws of it.

In: metrics.jsonl, one JSON object a logged step. Out: figures, each with its chart (charts.py), its legend and two
sentences: what the curve means, and what would be bad.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from skyjax.evals.charts import Mark, Series, line_chart, short, smooth
from skyjax.train import metrics as train_metrics

COLOURS = {name: f"s-{name}" for name in ("optical", "multispectral", "sar", "fused")}
_ORDER = {"optical": 0, "multispectral": 1, "sar": 2, "fused": 9}
OTHER_COLOURS = ("s-a", "s-b", "s-c", "s-rest")
# Level -> title, what it means, what would be bad.
LEVELS = {
    "pixel": (
        "Pixel level",
        "A place in one view should be told as that place, on that day, in the teacher's other view.",
        "flat after the warm-up, above all at a dotted line, which is a uniform guess.",
    ),
    "object": (
        "Object level",
        "The same for groups of like places, such as fields or roofs, found in the teacher's view.",
        "flat after the warm-up, or near 0 within a few steps: all groups have become one.",
    ),
    "image": (
        "Image level",
        "The same for the mean over the whole view.",
        "flat after the warm-up, or near 0 within a few steps: all images have become one.",
    ),
    "alignment": (
        "Alignment between modalities",
        "Of all sites in the batch, is the one that the other sensor saw the nearest?",
        "not falling: the sensors are not learning to agree.",
    ),
    "spread": (
        "Spread regulariser",
        "Pushes neighbouring features apart; lower is more spread out.",
        "rising steadily while the effective rank falls.",
    ),
    "text": (
        "Images and captions",
        "Of all captions in the batch, is the site's own the nearest, and the other way round?",
        "flat after the warm-up: no word says which image it was told of.",
    ),
    "words": (
        "Words and places",
        "Do the words of a caption find more of what they say in its own site than in a few others?",
        "flat after the warm-up: words look everywhere alike.",
    ),
    "caption": (
        "Captions written",
        "What the decoder gives for the next token of a caption or an answer: -log of its probability.",
        "falling as before while captions (skyjax eval --task=captions) stay the same for all images.",
    ),
}
PACE = {
    "learning_rate": ("Learning rate", "Warm-up, then cosine decay.", "a shape that you did not set."),
    "gradient_norm": ("Gradient norm", "The length of the gradient before clipping.", "growing over many steps."),
    "samples_per_second": ("Throughput", "Samples a second.", "sinking: the input pipeline or the machine is held up."),
}
WIDE, NARROW = (1120, 300), (380, 240)


@dataclasses.dataclass(frozen=True)
class Metrics:
    """The logged steps in order.

    Attributes:
      columns: name -> one value a step, NaN where a step lacks it.
      steps: of the lines, increasing.
      resumed: steps that the run went on from after it had been further.
    """

    steps: np.ndarray
    columns: Mapping[str, np.ndarray]
    resumed: tuple[int, ...] = ()

    def last(self, name: str) -> float | None:
        """The newest finite value, or None."""
        column = self.columns.get(name, np.empty(0))
        finite = column[np.isfinite(column)]
        return float(finite[-1]) if len(finite) else None

    def series(self, name: str, title: str, colour: str) -> Series | None:
        """The steps that have this metric; None where no value is finite."""
        column = self.columns.get(name)
        if column is None or not np.isfinite(column).any():
            return None
        return Series(title, colour, self.steps, column)


@dataclasses.dataclass(frozen=True)
class Figure:
    """A chart with what stands around it; `legend` is (name, colour class, newest value). `narrow` is for phones."""

    title: str
    chart: str
    legend: tuple[tuple[str, str, str], ...]
    meaning: str
    bad: str
    narrow: str = ""


def read_metrics(path: pathlib.Path) -> Metrics:
    """All lines of a metrics.jsonl, of none where there is no file; where a step falls back, the later lines count."""
    by_step: dict[int, dict[str, Any]] = {}
    resumed: list[int] = []
    for line in train_metrics.read(path) if path.is_file() else ():
        if not isinstance(line, dict) or not _is_number(line.get("step")):
            continue
        step = int(line["step"] or 0)
        if by_step and step <= next(reversed(by_step)):
            resumed.append(step)
            by_step = {earlier: values for earlier, values in by_step.items() if earlier < step}
        by_step[step] = line
    steps = list(by_step)
    names = dict.fromkeys(key for step in steps for key, value in by_step[step].items() if _is_number(value))
    columns = {
        name: np.array([_number(by_step[step].get(name)) for step in steps], np.float64)
        for name in names
        if name != "step"
    }
    return Metrics(np.array(steps, np.float64), columns, tuple(resumed))


def marks(metrics: Metrics) -> list[Mark]:
    """Where steps were skipped and where the run was resumed."""
    found = [Mark(step, "resumed", f"resumed at step {step:,}") for step in metrics.resumed]
    skipped = metrics.columns.get("skipped", np.zeros(0))
    total = 0.0
    for step, count in zip(metrics.steps.tolist(), skipped.tolist(), strict=False):
        if math.isfinite(count) and count > total:
            found.append(Mark(step, "skipped", f"{count - total:g} skipped by step {step:,.0f} (loss not finite)"))
            total = count
    return found


def alarms(metrics: Metrics, config: Mapping[str, Any]) -> list[Mark]:
    """The first step of each stretch after the warm-up in which an effective rank lies below the alarm line."""
    line = config.get("objective", {}).get("rank_alarm")
    warm = metrics.steps >= config.get("optimizer", {}).get("warmup_steps", 0)
    found = []
    for name, column in metrics.columns.items():
        if name.startswith("rank/") and isinstance(line, int | float):
            below = (column < line) & warm
            for index in np.flatnonzero(below & ~np.concatenate([[False], below[:-1]])).tolist():
                step = float(metrics.steps[index])
                title = f"effective rank of {name.split('/')[-1]} fell to {short(column[index])} at step {step:,.0f}"
                found.append(Mark(step, "alarm", title))
    return found


def loss_figures(metrics: Metrics, config: Mapping[str, Any]) -> list[Figure]:
    """The total first and wide, then one chart a level with a line a modality or pair."""
    events = marks(metrics)
    figures = []
    total = metrics.series("loss", "total", "s-fused")
    if total is not None:
        label = f"Total loss over steps, newest value {short(metrics.last('loss') or math.nan)}"
        charts = [line_chart([total], label=label, size=size, marks=events) for size in (WIDE, NARROW)]
        figures.append(
            Figure(
                "Total loss",
                charts[0],
                ((total.name, total.colour, _newest(total, True)),),
                "What the optimizer lowers: the weighted sum of the terms below. Light: each step; strong: smoothed.",
                "rising after the warm-up, or jumps that don't come back.",
                narrow=charts[1],
            )
        )
    terms = [name for name in metrics.columns if name.startswith("loss/")]
    groups: dict[str, list[str]] = {level: [] for level in LEVELS}
    for name in terms:
        groups.setdefault(name.split("/")[1], []).append(name)
    objective = config.get("objective", {})
    for level, names in groups.items():
        title, meaning, bad = LEVELS.get(
            level, (level.capitalize(), "A term of the loss.", "rising after the warm-up.")
        )
        references = _uniform_guess(objective) if level in ("pixel", "object", "image") else []
        figure = _figure(
            metrics, names, title, meaning, bad, marks=events, references=references, optional_references=True
        )
        figures += [figure] if figure else []
    return figures


def health_figures(metrics: Metrics, config: Mapping[str, Any]) -> list[Figure]:
    """Effective rank with its alarm line, and spread."""
    alarm = config.get("objective", {}).get("rank_alarm")
    references = [(float(alarm), f"alarm below {short(alarm)}")] if _is_number(alarm) else []
    rank = _figure(
        metrics,
        [name for name in metrics.columns if name.startswith("rank/")],
        "Effective rank",
        "How many directions the features of a batch really use.",
        "falling towards 1, where all images get the same feature (collapse). A warning is logged below the alarm.",
        marks=[*marks(metrics), *alarms(metrics, config)],
        references=references,
        from_zero=True,
    )
    spread = _figure(
        metrics,
        [name for name in metrics.columns if name.startswith("spread/")],
        "Spread",
        "The standard deviation of the features over a batch.",
        "sinking to 0: the features no longer tell the images apart.",
        marks=marks(metrics),
        from_zero=True,
    )
    return [figure for figure in (rank, spread) if figure]


def pace_figures(metrics: Metrics) -> list[Figure]:
    """Learning rate, gradient norm and throughput."""
    figures = []
    for name, (title, meaning, bad) in PACE.items():
        values = metrics.columns.get(name, np.empty(0))
        positive = values[np.isfinite(values) & (values > 0)]
        # Gradients span decades at the start; a linear axis would press the rest flat.
        log = name == "gradient_norm" and len(positive) > 1 and positive.max() > 20 * positive.min()
        figure = _figure(
            metrics,
            [name],
            title,
            meaning,
            bad,
            marks=marks(metrics),
            from_zero=not log,
            log=log,
            smoothed=name != "learning_rate",
        )
        figures += [figure] if figure else []
    return figures


def other_figures(metrics: Metrics) -> list[Figure]:
    """Every number that was logged and has no place above."""
    placed = {"loss", "skipped", "nonfinite_in_a_row", "seconds", "samples", *PACE}
    names = [
        name for name in metrics.columns if name not in placed and not name.startswith(("loss/", "rank/", "spread/"))
    ]
    figures = [_figure(metrics, [name], name.replace("_", " "), "", "", smoothed=False) for name in names]
    return [figure for figure in figures if figure]


def _figure(
    metrics: Metrics,
    names: Sequence[str],
    title: str,
    meaning: str,
    bad: str,
    *,
    references: Sequence[tuple[float, str]] = (),
    optional_references: bool = False,
    smoothed: bool = True,
    **chart: Any,
) -> Figure | None:
    spare = iter(OTHER_COLOURS)
    lines = []
    # Fused last: what the run is about lies on top of the other lines.
    for name in sorted(names, key=lambda name: _ORDER.get(name.split("/")[-1], 5)):
        short_name = name.split("/")[-1]
        colour = COLOURS.get(short_name) or ("s-fused" if len(names) == 1 else next(spare, OTHER_COLOURS[-1]))
        line = metrics.series(name, short_name.replace("_", " ").replace("sar", "SAR"), colour)
        lines += [line] if line else []
    if not lines:
        return None
    if optional_references:
        references = [(value, text) for value, text in references if _is_near(value, lines)]
    label = f"{title} over steps: " + ", ".join(f"{line.name} ends at {_newest(line, smoothed)}" for line in lines)
    legend = tuple((line.name, line.colour, _newest(line, smoothed)) for line in lines)
    return Figure(
        title, line_chart(lines, label=label, references=references, smoothed=smoothed, **chart), legend, meaning, bad
    )


def _newest(line: Series, smoothed: bool) -> str:
    values = smooth(line.values) if smoothed else line.values
    return short(float(values[np.isfinite(values)][-1]))


def _uniform_guess(objective: Mapping[str, Any]) -> list[tuple[float, str]]:
    """The cross-entropy of a student that gives every head class the same chance: ln(classes)."""
    classes = objective.get("classes")
    if objective.get("kind") != "dino" or not isinstance(classes, int) or classes < 2:
        return []
    return [(math.log(classes), f"uniform guess: ln {classes} = {math.log(classes):.2f}")]


def _is_near(value: float, lines: Sequence[Series]) -> bool:
    """Whether a line at `value` would not squeeze the curves into less than half of the chart."""
    low = min(float(np.nanmin(np.where(np.isfinite(line.values), line.values, np.nan))) for line in lines)
    high = max(float(np.nanmax(np.where(np.isfinite(line.values), line.values, np.nan))) for line in lines)
    return low - (high - low) <= value <= high + (high - low)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> float:
    return float(value) if _is_number(value) else math.nan
