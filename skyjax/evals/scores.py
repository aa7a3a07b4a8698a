"""Probe results as tables of the report: accuracy with its interval drawn, baselines muted, the run's own row strong.

In: probe.json, a list of what `probe.run` returns. Out: HTML.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from skyjax.evals.charts import confusion_matrix, interval, short, ticks
from skyjax.evals.probe import OURS, PRETRAINED
from skyjax.train.loop import write_files

PROBES = "probe.json"  # in a run's directory
MAX_CLASSES = 40  # in a table or a confusion matrix
MOST_NOTES = 3  # that stand open
# Tasks whose numbers are beside no other task's.
OWN_NUMBERS = {"zero_shot": "zero-shot", "retrieval": "retrieval", "captions": "captions", "vqa": "questions"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a probe's table; value and interval in percent, or, where `unit` is empty, scores of 100."""

    features: str
    method: str
    value: float
    low: float
    high: float
    unit: str = " %"

    @property
    def baseline(self) -> bool:
        """Whether these features know nothing of the pre-training."""
        return self.features not in OURS


def read_probes(path: pathlib.Path) -> list[dict[str, Any]]:
    """The results in a probe.json that have rows; none where the file is missing or is not JSON."""
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    results = results if isinstance(results, list) else [results]
    return [result for result in results if isinstance(result, dict) and rows(result)]


def keep_probe(path: pathlib.Path, result: Mapping[str, Any]) -> None:
    """Puts a result into a probe.json, in place of an earlier one of the same task, data and features."""

    def work(probe: Mapping[str, Any]) -> tuple[Any, ...]:
        return (
            *(probe.get(key) for key in ("task", "dataset", "test_dataset", "label")),
            probe.get("settings", {}).get("pooling"),
        )

    kept = [probe for probe in read_probes(path) if work(probe) != work(result)]
    write_files(path.parent, {path.name: json.dumps([*kept, result], indent=1)})


def rows(result: Mapping[str, Any]) -> list[Row]:
    """The rows of one result; a row without an interval gets its value as both ends."""
    found = []
    unit = "" if result.get("metric") == "score" else " %"  # BLEU and CIDEr are no shares
    for row in result.get("rows") or ():
        value = row.get("accuracy")
        if isinstance(value, int | float):
            low, high = (100 * float(row.get(end, value)) for end in ("low", "high"))
            found.append(
                Row(str(row.get("features", "")), str(row.get("method", "")), 100 * float(value), low, high, unit)
            )
    return found


def best_rows(results: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Row | None, Row | None]]:
    """What was probed -> the run's best row and the best baseline, over all tasks and methods that compare."""
    by_dataset: dict[str, list[Row]] = {}
    for result in results:
        # Of metrics that cannot be compared with each other, one speaks for all.
        chosen = [row for row in rows(result) if row.method == result.get("headline", row.method)]
        by_dataset.setdefault(comparable(result), []).extend(chosen)
    return {
        dataset: (
            max((row for row in every if not row.baseline), key=lambda row: row.value, default=None),
            max((row for row in every if row.baseline), key=lambda row: row.value, default=None),
        )
        for dataset, every in by_dataset.items()
    }


def verdict(ours: Row, theirs: Row) -> str:
    """What the two intervals allow to say."""
    if ours.low > theirs.high:
        return "clearly better than"
    if ours.high < theirs.low:
        return "clearly worse than"
    return "not clearly different from"


def probe_table(result: Mapping[str, Any], together: Sequence[Mapping[str, Any]] = ()) -> str:
    """One result: rows by method, with a line at each method's best baseline.

    All results `together` on one dataset share an axis, so that tables under each other can be compared.
    """
    every = rows(result)
    all_rows = [row for other in (result, *together) for row in rows(other)]
    low, high = min(row.low for row in all_rows), max(row.high for row in all_rows)
    top = 100.0 if high <= 100 else np.inf  # CIDEr goes to 1000
    axis = [tick for tick in ticks(max(0.0, low - 2), min(top, high + 2), count=5) if 0 <= tick <= top]
    parts = [
        '<table class="probe"><thead><tr><th scope="col">Features</th><th scope="col" class="number">'
        f"{escape(str(result.get('metric', 'accuracy')).capitalize())}</th>"
        f'<th scope="col" class="number">95 % interval</th><th scope="col" class="bar">{_axis(axis)}</th></tr></thead>'
    ]
    for method in dict.fromkeys(row.method for row in every):
        group = [row for row in every if row.method == method]
        best = max((row.value for row in group if row.baseline), default=None)
        parts.append(f'<tbody><tr class="method"><th scope="rowgroup" colspan="4">{escape(method)}</th></tr>')
        for row in sorted(group, key=lambda row: row.baseline):
            parts.append(_row(row, axis, best))
        parts.append("</tbody>")
    return "".join([*parts, "</table>"])


def class_table(result: Mapping[str, Any]) -> str:
    """The pre-trained encoder class by class, and its confusion matrix, as far as the result has them; may be empty."""
    shares, method = _class_shares(result)
    if not shares:
        return ""
    lines, left = [], len(shares) - MAX_CLASSES
    for number, (name, share) in enumerate(list(shares.items())[:MAX_CLASSES], 1):
        bar = f'<span class="track"><span style="width:{100 * share:.1f}%"></span></span>'
        lines.append(
            f'<tr><td class="number">{number}</td><th scope="row">{escape(name)}</th><td class="bar">{bar}</td>'
            f'<td class="number">{_percent(100 * share)}</td></tr>'
        )
    table = (
        f'<table class="class"><caption>{PRETRAINED} by class, {escape(method)}</caption><thead><tr>'
        '<th class="number">#</th><th>Class</th><th></th><th class="number">Right</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table>" + (f'<p class="details">and {left} more</p>' if left > 0 else "")
    )
    counts = np.asarray(result.get("confusion") or np.empty((0, 0)), np.float64)
    if counts.shape != (len(shares), len(shares)) or len(shares) > MAX_CLASSES:
        return f'<div class="classes">{table}</div>'
    meaning = "Rows: the true class. Columns: what the probe said. Blue on the diagonal is right, orange a mistake."
    matrix = f"<figure>{confusion_matrix(counts, list(shares))}<figcaption>{meaning}</figcaption></figure>"
    return f'<div class="classes">{table}{matrix}</div>'


def _class_shares(result: Mapping[str, Any]) -> tuple[dict[str, float], str]:
    """Class -> share right (F1 with several labels), of the method whose confusion is given, else of the last one."""
    per_class = result.get("per_class") or {}
    if not per_class:
        return {}, ""
    method = result.get("confusion_of")
    method = method if method in per_class else list(per_class)[-1]
    return {str(name): float(share) for name, share in per_class[method].items()}, str(method)


def details(result: Mapping[str, Any]) -> str:
    """One line on the data: path, classes, sizes of the parts, how they were split; then what the probe noted."""
    words = [str(result["dataset"])] if result.get("dataset") else []
    words += [f"{len(result['classes'])} classes"] if result.get("classes") else []
    words += [f"{count:,} {part}" for part, count in (result.get("sizes") or {}).items()]
    settings = result.get("settings") or {}
    words += [f"{key}: {settings[key]}" for key in ("pooling", "split") if settings.get(key)]
    prompts = list((result.get("prompts") or {}).values())
    words += [f'asked as "{prompts[0]}" and in other words'] if prompts else []
    notes = [f"Note: {escape(str(note))}." for note in result.get("notes") or ()]
    if not words and not notes:
        return ""
    lines = "<br>".join([escape("; ".join(words)), *notes[:MOST_NOTES]])
    more = notes[MOST_NOTES:]
    rest = f"<details><summary>{len(more)} more notes</summary><p>{'<br>'.join(more)}</p></details>" if more else ""
    return f'<div class="details"><p>{lines}</p>{rest}</div>'


def title(result: Mapping[str, Any]) -> str:
    """What a reader calls the thing probed: the last part of the data set's path, and the label where one is named."""
    path = str(result.get("dataset", "the probe set"))
    label = result.get("label")
    return (pathlib.PurePath(path).name or path) + (f", {label}" if label else "")


def comparable(result: Mapping[str, Any]) -> str:
    """What a reader calls it, with the task where its numbers are of another kind than a classifier's on features."""
    task = str(result.get("task", ""))
    return title(result) + (f" ({OWN_NUMBERS[task]})" if task in OWN_NUMBERS else "")


def summary(results: Sequence[Mapping[str, Any]]) -> str:
    """A sentence for each dataset: the best row beside the best baseline, and what their intervals allow to say."""
    sentences = []
    for dataset, (ours, theirs) in best_rows(results).items():
        if ours and theirs:
            sentences.append(
                f"On {dataset} its best probe ({ours.method}) reaches {_with_interval(ours)}, {verdict(ours, theirs)}"
                f" the best baseline, {theirs.features}: {theirs.value:.1f}{theirs.unit} ({_range(theirs)})."
            )
        elif ours:
            sentences.append(
                f"On {dataset} its best probe ({ours.method}) reaches {_with_interval(ours)}; no baseline."
            )
    return " ".join(sentences)


def _with_interval(row: Row) -> str:
    return f"{row.value:.1f}{row.unit} (95 % interval {_range(row)})"


def _range(row: Row) -> str:
    return f"{row.low:.1f}–{row.high:.1f}"


def _percent(value: float) -> str:
    return f"{value:.1f} %"


def _row(row: Row, axis: Sequence[float], best: float | None) -> str:
    kind = "baseline" if row.baseline else "ours"
    title = f"{row.features}, {row.method}: {_with_interval(row)}"
    bar = interval(row.value, row.low, row.high, axis, colour=kind, title=title, best=None if row.baseline else best)
    value = f"{row.value:.1f}{row.unit}"
    return (
        f'<tr class="{kind}"><th scope="row">{escape(row.features)}</th><td class="number">{value}</td>'
        f'<td class="number range">{_range(row)}</td><td class="bar">{bar}</td></tr>'
    )


def _axis(axis: Sequence[float]) -> str:
    parts = ['<svg class="interval" height="16" aria-hidden="true">']
    for index, tick in enumerate(axis):
        anchor = "start" if index == 0 else "end" if index == len(axis) - 1 else "middle"
        place = 100 * (tick - axis[0]) / (axis[-1] - axis[0])
        parts.append(f'<text class="tick" x="{place:.2f}%" y="12" text-anchor="{anchor}">{short(tick)}</text>')
    return "".join([*parts, "</svg>"])
