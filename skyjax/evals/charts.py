"""Charts as inline SVG: lines over steps, intervals in a table cell, a confusion matrix.

In: arrays of numbers and names. Out: strings of SVG without script, style or address; colours and fonts are the page's
(report.html). A series' colour is its CSS class, so that the dark theme and print can change it.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from html import escape

import numpy as np

# Space around the plot for the tick labels, in the chart's own pixels: left, right, top, bottom.
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 10, 26
MAX_POINTS = 600  # a line has more only as the least and the greatest of each stretch
MAX_TITLES = 80  # hover strips a chart
SMOOTHED_SHARE = 0.05  # of all points, the window of the smoothed line


@dataclasses.dataclass(frozen=True)
class Series:
    """One line: steps in order, values (NaN where there is none), and the CSS class of its colour."""

    name: str
    colour: str
    steps: np.ndarray
    values: np.ndarray


@dataclasses.dataclass(frozen=True)
class Mark:
    """Something that happened at a step: `kind` is "skipped", "resumed" or "alarm"; the title says it in words."""

    step: float
    kind: str
    title: str


@dataclasses.dataclass(frozen=True)
class Scale:
    """From values to positions along one axis, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The position of a value; on a logarithmic axis nothing lies below its low end."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, low))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    size: tuple[int, int] = (380, 220),
    log: bool = False,
    from_zero: bool = False,
    smoothed: bool = True,
    references: Sequence[tuple[float, str]] = (),
    marks: Sequence[Mark] = (),
) -> str:
    """Lines over training steps: each raw and light, with its smoothed line on top.

    Args:
      series: at least one of them with a finite value.
      label: what the chart shows, for those who can't see it.
      size: width and height of the view box; text is meant to be read at about this size.
      log: logarithmic values; values of 0 and below are left out.
      from_zero: the value axis starts at 0.
      smoothed: False where nothing is noise, such as a schedule: then the line itself is the strong one.
      references: (value, text) of horizontal lines, such as an alarm; they widen the axis.
      marks: skipped steps (triangles), resumed runs (upright lines), alarms (dots on the top edge).
    """
    width, height = size
    if log:
        series = [dataclasses.replace(s, values=np.where(s.values > 0, s.values, np.nan)) for s in series]
    values = np.concatenate([s.values[np.isfinite(s.values)] for s in series])
    levels = np.concatenate([values, [value for value, _ in references]])
    low, high, y_ticks = _axis(0.0 if from_zero else float(levels.min()), float(levels.max()), log)
    y = Scale(low, high, height - BOTTOM, TOP, log)
    last = max(float(s.steps[-1]) for s in series)
    x = Scale(0.0, last if last > 0 else 1.0, LEFT, width - RIGHT)

    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">']
    parts += [_y_tick(value, text, y, width) for value, text in zip(y_ticks, _tick_texts(y_ticks, log), strict=True)]
    parts += _x_ticks(x, height, count=max(3, width // 110))
    parts += [_reference(value, y, width) for value, _ in references]
    parts += [_mark(mark, x, height) for mark in marks if x.low <= mark.step <= x.high]
    for line in series:
        parts.append(f'<path class="raw {line.colour}" d="{_path(line.steps, line.values, x, y)}"/>')
    for line in series:
        values = smooth(line.values) if smoothed else line.values
        parts.append(f'<path class="smooth {line.colour}" d="{_path(line.steps, values, x, y)}"/>')
    parts += [_lone_point(line, x, y) for line in series]
    parts += [_reference_text(value, text, y, width) for value, text in references]
    parts += _hover_strips(series, x, height)
    return "".join([*parts, "</svg>"])


def smooth(values: np.ndarray) -> np.ndarray:
    """A straight line fitted to the window around each point, taken at the point; NaN stays NaN and counts for nothing.

    Unlike a mean it does not bend a slope at the ends, where the window has one side only.
    """
    reach = round(len(values) * SMOOTHED_SHARE / 2)
    finite = np.isfinite(values)
    here = np.arange(len(values), dtype=np.float64)
    first, last = (
        np.maximum(np.arange(len(values)) - reach, 0),
        np.minimum(np.arange(len(values)) + reach + 1, len(values)),
    )

    def window(terms: np.ndarray) -> np.ndarray:
        sums = np.concatenate([[0.0], np.cumsum(np.where(finite, terms, 0.0))])
        return sums[last] - sums[first]

    count = np.maximum(window(np.ones(len(values))), 1)
    place, level = window(here) / count, window(values) / count
    spread = window(here**2) / count - place**2
    together = window(here * np.where(finite, values, 0.0)) / count - place * level
    slope = np.where(spread > 1e-6, together / np.maximum(spread, 1e-6), 0.0)
    return np.where(finite, level + slope * (here - place), np.nan)


def ticks(low: float, high: float, count: int = 4, *, whole: bool = False) -> list[float]:
    """About `count` steps of 1, 2, 2.5 or 5 times a power of ten, from at or below `low` to at or above `high`.

    With `whole`, steps are whole numbers.
    """
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    sizes = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
    step = next(size * power for size in sizes if size * power * count >= (high - low) * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten with their 2 and 5 (powers alone over more than three decades) that enclose low to high."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    wide = math.log10(high / low) > 3
    every = [digit * 10.0**exponent for exponent in exponents for digit in ((1,) if wide else (1, 2, 5))]
    below = max(value for value in every if value <= low * (1 + 1e-9))
    above = min((value for value in every if value >= high * (1 - 1e-9) and value > below), default=every[-1])
    return [value for value in every if below <= value <= above]


def interval(
    value: float, low: float, high: float, axis: Sequence[float], *, colour: str, title: str, best: float | None = None
) -> str:
    """A dot with its interval on a shared axis (ticks), as wide as the table cell; `best` is the line to beat."""

    def at(number: float) -> str:
        share = (number - axis[0]) / (axis[-1] - axis[0])
        return f"{100 * min(max(share, 0.0), 1.0):.2f}%"

    grid = "".join(f'<line class="grid" x1="{at(tick)}" x2="{at(tick)}" y1="0" y2="26"/>' for tick in axis)
    beat = "" if best is None else f'<line class="beat" x1="{at(best)}" x2="{at(best)}" y1="0" y2="26"/>'
    return (
        f'<svg class="interval {colour}" height="26" role="img" aria-label="{escape(title)}"><title>{escape(title)}'
        f'</title>{grid}{beat}<line class="whisker" x1="{at(low)}" x2="{at(high)}" y1="13" y2="13"/>'
        f'<circle cx="{at(value)}" cy="13" r="4.5"/></svg>'
    )


def confusion_matrix(counts: np.ndarray, classes: Sequence[str]) -> str:
    """Rows are the true class, columns what was said, darker where a greater share of the row went."""
    k = len(classes)
    cell = max(12, min(30, 300 // k))
    left = cell + 4
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    parts = [
        f'<svg class="chart confusion" viewBox="0 0 {left + k * cell + 1} {left + k * cell + 1}" role="img"'
        f' style="max-width:{left + k * cell + 1}px" aria-label="Confusion matrix of {k} classes">'
    ]
    for i in range(k):
        centre = left + (i + 0.5) * cell
        parts.append(f'<text class="tick" x="{left - 5}" y="{centre + 4:g}" text-anchor="end">{i + 1}</text>')
        parts.append(f'<text class="tick" x="{centre:g}" y="{left - 5}" text-anchor="middle">{i + 1}</text>')
        for j in range(k):
            place = f'x="{left + j * cell}" y="{left + i * cell}" width="{cell - 1}" height="{cell - 1}"'
            title = f"{classes[i]} called {classes[j]}: {counts[i, j]:g} ({100 * shares[i, j]:.1f} %)"
            kind = "right" if i == j else "wrong"
            # A square root shows the few mistakes beside the many hits.
            parts.append(
                f'<rect class="cell {kind}" {place} fill-opacity="{math.sqrt(shares[i, j]):.2f}">'
                f"<title>{escape(title)}</title></rect>"
            )
            if cell >= 24 and counts[i, j]:
                shade = "strong" if shares[i, j] > 0.4 else "faint"
                parts.append(
                    f'<text class="count {shade}" x="{left + (j + 0.5) * cell - 0.5:g}" y="{centre + 3:g}"'
                    f' text-anchor="middle">{counts[i, j]:g}</text>'
                )
    return "".join([*parts, "</svg>"])


def short(value: float, *, like: float | None = None, digits: int = 4) -> str:
    """A number of a tick or a legend: four digits, no trailing zeros; 12k, 2.5e-4. Written as `like` would be."""
    if not math.isfinite(value):
        return "–"
    size = abs(value if like is None else like)
    if value == 0:
        return "0"
    if size >= 10_000:
        power, unit = (1e6, "M") if size >= 1e6 else (1e3, "k")
        return f"{value / power:.{digits}g}".replace("-", "−") + unit
    if size < 0.01:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}".replace("-", "−")
    return f"{value:.{digits}g}".replace("-", "−")


def _axis(low: float, high: float, log: bool) -> tuple[float, float, list[float]]:
    marks = log_ticks(low, high) if log else ticks(low, high)
    return marks[0], marks[-1], marks


def _tick_texts(every: Sequence[float], log: bool) -> list[str]:
    """What stands beside each tick, with as many digits as tell them apart; empty where a line is enough."""
    digits = 4
    while digits < 12 and len({short(value, like=every[-1], digits=digits) for value in every}) < len(every):
        digits += 1
    texts = [short(value, like=every[-1], digits=digits) for value in every]
    if log and len(every) > 6:
        # A long logarithmic axis has a line at each 1, 2, 5 but a word only at the powers of ten.
        powers = [math.isclose(math.log10(value) % 1, 0, abs_tol=1e-9) for value in every]
        return [text if power else "" for text, power in zip(texts, powers, strict=True)]
    return texts


def _y_tick(value: float, text: str, y: Scale, width: int) -> str:
    height = y(value)
    return (
        f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>'
        f'<text class="tick" x="{LEFT - 7}" y="{height + 4:.1f}" text-anchor="end">{text}</text>'
    )


def _x_ticks(x: Scale, height: int, count: int) -> list[str]:
    inside = [value for value in ticks(x.low, x.high, count, whole=True) if value <= x.high]
    parts = []
    for index, value in enumerate(inside):
        place, near_end = x(value), x(value) > x.end - 14
        anchor = "start" if index == 0 else "end" if near_end else "middle"
        text = f"step {short(value)}" if index == 0 else short(value)
        parts.append(
            f'<line class="axis" x1="{place:.1f}" x2="{place:.1f}" y1="{height - BOTTOM}" y2="{height - 22}"/>'
        )
        parts.append(f'<text class="tick" x="{place:.1f}" y="{height - 8}" text-anchor="{anchor}">{text}</text>')
    parts.append(f'<line class="axis" x1="{x.start}" x2="{x.end}" y1="{height - BOTTOM}" y2="{height - BOTTOM}"/>')
    return parts


def _reference(value: float, y: Scale, width: int) -> str:
    return f'<line class="reference" x1="{LEFT}" x2="{width - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'


def _reference_text(value: float, text: str, y: Scale, width: int) -> str:
    height = y(value)
    beside = height - 5 if height > TOP + 16 else height + 13
    return f'<text class="reference" x="{width - RIGHT - 2}" y="{beside:.1f}" text-anchor="end">{escape(text)}</text>'


def _mark(mark: Mark, x: Scale, height: int) -> str:
    place, floor = x(mark.step), height - BOTTOM
    shapes: dict[str, str] = {
        "skipped": f'<path d="M{place:.1f} {floor - 9}l5 9h-10z"/>',
        "resumed": f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{TOP}" y2="{floor}"/>',
        "alarm": f'<circle cx="{place:.1f}" cy="{TOP}" r="3.5"/>',
    }
    return f'<g class="mark {mark.kind}">{shapes[mark.kind]}<title>{escape(mark.title)}</title></g>'


def _path(steps: np.ndarray, values: np.ndarray, x: Scale, y: Scale) -> str:
    """Path data; a value that is not finite breaks the line."""
    chosen = _thin(values)
    parts, pen = [], "M"
    for step, value in zip(steps[chosen].tolist(), values[chosen].tolist(), strict=True):
        if not math.isfinite(value):
            pen = "M"
            continue
        parts.append(f"{pen}{x(step):.1f} {y(value):.1f}")
        pen = "L"
    return "".join(parts)


def _thin(values: np.ndarray) -> np.ndarray:
    """Which points to draw: all, or of each stretch the least and the greatest, so that no spike is lost."""
    if len(values) <= MAX_POINTS:
        return np.arange(len(values))
    chosen = [np.array([0, len(values) - 1])]
    for stretch in np.array_split(np.arange(len(values)), MAX_POINTS // 2):
        part = values[stretch]
        for filler, extreme in ((np.inf, np.argmin), (-np.inf, np.argmax)):
            chosen.append(stretch[[extreme(np.where(np.isfinite(part), part, filler))]])
        chosen.append(stretch[~np.isfinite(part)][:1])
    return np.unique(np.concatenate(chosen))


def _lone_point(line: Series, x: Scale, y: Scale) -> str:
    """A path of one point draws nothing: a dot instead."""
    finite = np.flatnonzero(np.isfinite(line.values))
    if len(finite) != 1:
        return ""
    step, value = float(line.steps[finite[0]]), float(line.values[finite[0]])
    return f'<circle class="point {line.colour}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="3.5"/>'


def _hover_strips(series: Sequence[Series], x: Scale, height: int) -> list[str]:
    """Upright strips, unseen until hovered, whose titles give all values at that step."""
    every = np.unique(np.concatenate([s.steps for s in series]))
    shown = every[np.unique(np.linspace(0, len(every) - 1, min(len(every), MAX_TITLES)).round().astype(int))]
    tables = [dict(zip(s.steps.tolist(), s.values.tolist(), strict=True)) for s in series]
    edges = [x.start, *((x(float(a)) + x(float(b))) / 2 for a, b in itertools.pairwise(shown)), x.end]
    parts = []
    for step, (left, right) in zip(shown.tolist(), itertools.pairwise(edges), strict=True):
        lines = [f"{s.name} {short(table.get(step, math.nan))}" for s, table in zip(series, tables, strict=True)]
        title = escape("\n".join([f"step {step:,.0f}", *lines]))
        parts.append(
            f'<rect class="hit" x="{left:.1f}" width="{max(right - left, 0.5):.1f}" y="{TOP}"'
            f' height="{height - TOP - BOTTOM}"><title>{title}</title></rect>'
        )
    return parts
