"""The report of a run: one HTML file that needs nothing else and no network.

In: a run's directory: config.json, versions.json, metrics.jsonl, goodput.json, probe.json, the records that its config
names and its newest checkpoint. What is missing is said in a sentence; nothing here stops a run.
"""

import dataclasses
import datetime
import json
import logging
import pathlib
import string
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from skyjax.errors import UserError
from skyjax.evals import curves, gallery, pictures, scores, word_gallery
from skyjax.evals.charts import Mark, short
from skyjax.evals.curves import Figure, Metrics
from skyjax.sample import MODALITIES, Sample
from skyjax.train import goodput
from skyjax.train.loop import machine
from skyjax.train.pretrained import Pretrained

TEMPLATE = pathlib.Path(__file__).with_suffix(".html")


@dataclasses.dataclass(frozen=True)
class Run:
    """All that a run's directory says about it; what is missing is empty."""

    workdir: pathlib.Path
    config: Mapping[str, Any]
    metrics: Metrics
    versions: Mapping[str, str]
    probes: Sequence[Mapping[str, Any]]

    @property
    def step(self) -> int:
        """The last logged step, 0 before the first."""
        return int(self.metrics.steps[-1]) if len(self.metrics.steps) else 0

    @property
    def steps(self) -> int | None:
        """How many steps the run is meant to have."""
        steps = self.config.get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def folders(self) -> list[str]:
        """The data sets that it was trained on."""
        try:
            return [str(source[0]) for source in self.config.get("data", {}).get("sources", ())]
        except (AttributeError, TypeError, LookupError):  # a stranger's config.json
            return []


def write_report(workdir: pathlib.Path) -> pathlib.Path:
    """Writes report.html into a run's directory and returns its path. A part that cannot be made says why.

    Raises:
      UserError: there is no such directory, or it may not be written.
    """
    workdir = pathlib.Path(workdir)
    if not workdir.is_dir():
        raise UserError(f'"{workdir}" is not a run\'s directory; name the --workdir of a training')
    run = Run(
        workdir,
        _read_object(workdir / "config.json"),
        curves.read_metrics(workdir / "metrics.jsonl"),
        {name: str(version) for name, version in _read_object(workdir / "versions.json").items()},
        scores.read_probes(workdir / scores.PROBES),
    )
    samples = _samples(run)
    sections = [
        ("learning", "Learning", lambda: _learning(run)),
        ("health", "Health of the features", lambda: _health(run)),
        ("pace", "Pace", lambda: _pace(run)),
        ("probes", "Probes", lambda: _probes(run)),
        ("features", "What the features see", lambda: _features(run, samples)),
        ("data", "The data", lambda: _data(run, samples)),
        ("config", "Configuration", lambda: _config(run)),
        ("reproduce", "Versions and how to reproduce", lambda: _reproduce(run)),
    ]
    page = string.Template(TEMPLATE.read_text()).substitute(
        title=escape(workdir.resolve().name),
        header=_tried("header", lambda: _header(run)),
        links="".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in sections),
        sections="".join(_section(key, title, make) for key, title, make in sections),
    )
    path = workdir / "report.html"
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f'"{path}" cannot be written: {error.strerror}') from error
    return path


def _read_object(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _section(key: str, title: str, make: Callable[[], str]) -> str:
    return f'<section id="{key}"><h2>{escape(title)}</h2>{_tried(title, make)}</section>'


def _tried(title: str, make: Callable[[], str]) -> str:
    try:
        return make()
    except Exception as error:  # a report that fails would spoil a finished run
        logging.getLogger(__name__).warning("report: %s: %s", title, error, exc_info=True)
        return _gone(f"This part could not be made: {error}")


def _gone(sentence: str) -> str:
    return f'<p class="gone">{escape(sentence)}</p>'


def _header(run: Run) -> str:
    name = escape(run.workdir.resolve().name)
    done = run.steps is not None and run.step >= run.steps
    status = "done" if done else f"stopped at step {run.step:,}" if run.step else "not started"
    if run.steps and not done:
        status += f" of {run.steps:,}"
    notices = "".join(f"<li>{escape(notice)}</li>" for notice in _notices(run))
    facts = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in _facts(run).items())
    return (
        f'<div class="kicker">skyjax pre-training report</div><div class="title"><h1>{name}</h1>'
        f'<span class="status {"done" if done else "stopped"}">{status}</span></div>'
        f'<p class="summary">{escape(_summary(run, done))}</p><dl class="facts">{facts}</dl>'
        + (f'<ul class="notices">{notices}</ul>' if notices else "")
    )


def _summary(run: Run, done: bool) -> str:
    first, last = _ends(run.metrics)
    if not run.step:
        return "Nothing has been logged yet: the run has not reached its first logged step."
    batch, modalities = run.config.get("batch_size"), run.config.get("model", {}).get("modalities", {})
    counted = [f"{run.step * batch:,} samples"] if isinstance(batch, int) else []
    named = [gallery.TITLES[modality] for modality in MODALITIES if modality in modalities]
    seen = f" ({', '.join(counted + named)})" if counted or named else ""
    reach = f"The run finished all {run.step:,} steps" if done else f"The run stands at step {run.step:,}"
    fall = "" if first is None or last is None else f"; the loss went from {short(first)} to {short(last)}"
    return f"{reach}{seen}{fall}. {scores.summary(run.probes) or 'It has not been probed yet.'}"


def _ends(metrics: Metrics) -> tuple[float | None, float | None]:
    """The first logged loss and the newest, smoothed as in the chart."""
    line = metrics.series("loss", "loss", "")
    if line is None:
        return None, None
    smoothed = curves.smooth(line.values)
    finite = smoothed[smoothed == smoothed]
    return float(finite[0]), float(finite[-1])


def _facts(run: Run) -> dict[str, str]:
    metrics, batch = run.metrics, run.config.get("batch_size")
    seconds, rank, last = metrics.last("seconds"), metrics.last("rank/fused"), _ends(metrics)[1]
    speed = metrics.columns.get("samples_per_second", np.full(1, np.nan))
    revision, dirty, _ = run.versions.get("git", "not recorded").partition("-dirty")
    log = run.workdir / "metrics.jsonl"
    when = datetime.datetime.fromtimestamp(log.stat().st_mtime if log.is_file() else time.time()).astimezone()
    return {
        "Last step logged" if log.is_file() else "Written": f"{when:%Y-%m-%d %H:%M}",
        "Git revision": revision[:12] + (", with local changes" if dirty else ""),
        "Hardware" if "hardware" in run.versions else "This page made on": run.versions.get("hardware", machine()),
        "Duration": "not recorded" if seconds is None else _duration(seconds),
        "Steps": f"{run.step:,}" + (f" of {run.steps:,}" if run.steps else ""),
        "Samples seen": f"{run.step * batch:,}" if isinstance(batch, int) else "not recorded",
        "Final loss": "–" if last is None else short(last),
        "Effective rank, fused": "–" if rank is None else short(rank),
        "Samples a second, median": short(float(np.nanmedian(speed))) if np.isfinite(speed).any() else "–",
    }


def _duration(seconds: float) -> str:
    """The two largest of days, hours, minutes and seconds."""
    left = round(seconds)
    parts: list[str] = []
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        if left >= size or (unit == "s" and not parts):
            parts.append(f"{left // size} {unit}")
        left %= size
    return " ".join(parts[:2])


def _notices(run: Run) -> list[str]:
    """What someone who opens the report must not miss."""
    found = []
    skipped = run.metrics.last("skipped") or 0
    if skipped:
        found.append(f"{skipped:g} of {run.step:,} steps were skipped because loss or gradient was not finite.")
    bad = run.metrics.last("bad_samples") or 0
    if bad:
        found.append(f"{bad:,.0f} places in the batches stayed empty: their record could not be read (see stderr).")
    if any(
        run.metrics.columns[name][-1:] != run.metrics.columns[name][-1:]
        for name in ("loss",) & run.metrics.columns.keys()
    ):
        found.append("The newest loss is not a finite number.")
    alarms = curves.alarms(run.metrics, run.config)
    rank, line = run.metrics.last("rank/fused"), run.config.get("objective", {}).get("rank_alarm")
    if alarms and rank is not None and rank < line:
        found.append(f"Possible collapse: the effective rank ends at {short(rank)}, below the alarm line of {line:g}.")
    elif alarms:
        found.append(f"The {alarms[-1].title}, below the alarm line of {line:g}, and rose again.")
    return found


def _learning(run: Run) -> str:
    if not len(run.metrics.steps):
        return _gone("No metrics yet: metrics.jsonl is missing or has no line.")
    figures = curves.loss_figures(run.metrics, run.config)
    if not figures:
        return _gone("No loss was logged.")
    return _mark_keys(curves.marks(run.metrics)) + _figures(figures)


def _health(run: Run) -> str:
    figures = curves.health_figures(run.metrics, run.config)
    if not figures:
        return _gone("No effective rank or spread has been logged yet.")
    lead = '<p class="lead">A loss can fall because all features have become one. These two curves would show it.</p>'
    events = [*curves.marks(run.metrics), *curves.alarms(run.metrics, run.config)]
    return lead + _mark_keys(events) + _figures(figures)


def _pace(run: Run) -> str:
    figures = curves.pace_figures(run.metrics)
    others = curves.other_figures(run.metrics)
    if not figures and not others:
        return _gone("No learning rate, gradient norm or throughput has been logged yet.")
    spent = _goodput(goodput.read(run.workdir / goodput.FILE))
    more = f"<details><summary>Everything else that was logged</summary>{_figures(others)}</details>" if others else ""
    return spent + _figures(figures) + more


def _goodput(totals: Mapping[str, Any] | None) -> str:
    """A bar of where the time of all starts went, useful time first."""
    if totals is None:
        return ""
    share = goodput.shares(totals["seconds"])
    order = sorted(share, key=lambda account: (account != goodput.USEFUL, -share[account]))
    spent = [account for account in order if share[account] > 0]
    bar = "".join(
        f'<span class="account {account}" style="width:{100 * share[account]:.2f}%"'
        f' title="{goodput.ACCOUNTS[account]}"></span>'
        for account in spent
    )
    legend = "".join(
        f'<span><i class="account {account}"></i>{goodput.ACCOUNTS[account]} <b>{share[account]:.1%}</b>'
        f" {_duration(totals['seconds'][account])}</span>"
        for account in spent
    )
    starts = f" in {totals['starts']:,} starts" if totals["starts"] > 1 else ""
    title = f"Useful time: {share[goodput.USEFUL]:.1%} of {_duration(sum(totals['seconds'].values()))}{starts}"
    meaning = (
        "The share of the wall time that went into steps. Waiting for data counts where the devices stood idle; lost is"
        " what a killed run did after its last checkpoint. <b>Bad:</b> a wide part that is not steps."
    )
    return (
        f'<figure class="goodput"><div class="figure-title">{title}</div><div class="legend">{legend}</div>'
        f'<div class="bar-of-time" role="img" aria-label="{title}">{bar}</div>'
        f"<figcaption>{meaning}</figcaption></figure>"
    )


def _mark_keys(found: Iterable[Mark]) -> str:
    """The legend of the marks that occur in a section's charts."""
    shapes = {
        "skipped": ('<path d="M6 1l5 10h-10z"/>', "skipped steps"),
        "resumed": ('<line x1="6" x2="6" y1="0" y2="12"/>', "resumed"),
        "alarm": ('<circle cx="6" cy="6" r="3.5"/>', "the effective rank falls below the alarm line"),
    }
    kinds = {mark.kind for mark in found}
    keys = [
        f'<span><svg viewBox="0 0 12 12" class="mark {kind}" aria-hidden="true">{shape}</svg>{text}</span>'
        for kind, (shape, text) in shapes.items()
        if kind in kinds
    ]
    return f'<p class="marks">{"".join(keys)}</p>' if keys else ""


def _figures(figures: Sequence[Figure]) -> str:
    return f'<div class="figures">{"".join(map(_figure, figures))}</div>'


def _figure(figure: Figure) -> str:
    legend = "".join(
        f'<span><i class="key {colour}"></i>{escape(name)} <b>{value}</b></span>'
        for name, colour, value in figure.legend
    )
    caption = f"{escape(figure.meaning)} <b>Bad:</b> {escape(figure.bad)}" if figure.meaning else ""
    chart = figure.chart
    if figure.narrow:
        chart = f'<div class="broad">{chart}</div><div class="narrow">{figure.narrow}</div>'
    return (
        f'<figure{" class=wide" if figure.narrow else ""}><div class="figure-title">{escape(figure.title)}</div>'
        f'<div class="legend">{legend}</div>{chart}<figcaption>{caption}</figcaption></figure>'
    )


def _probes(run: Run) -> str:
    if not run.probes:
        return _gone("No probe yet: run skyjax eval on this directory, or look for a missing or unreadable probe.json.")
    parts = [
        '<p class="lead">Frozen features, tested once, by a small classifier on top or by words. The dot is the value,'
        " the bar its 95 % bootstrap interval, the dashed line the best baseline of that method. <b>Bad:</b> a blue bar"
        " that touches the dashed line or lies left of it: training added nothing that the baseline doesn't know.</p>"
    ]
    for result in run.probes:
        task = str(result.get("task", ""))
        parts.append(f'<h3>{escape(scores.title(result))} <span class="quiet">{escape(task)}</span></h3>')
        together = [other for other in run.probes if scores.comparable(other) == scores.comparable(result)]
        parts.append(scores.details(result) + scores.probe_table(result, together))
        parts.append(gallery.label_sheet(result) + scores.class_table(result) + word_gallery.sheet(result))
    return "".join(parts)


def _samples(run: Run) -> dict[str, list[Sample]] | str:
    """Samples by source, or why there are none."""
    if not run.folders:
        return "No pictures: the config names no data."
    try:
        return pictures.samples_by_source(run.folders)
    except UserError as error:
        return f"No pictures: {error}"


def _features(run: Run, samples: dict[str, list[Sample]] | str) -> str:
    if isinstance(samples, str):
        return _gone(samples)
    try:
        model = Pretrained.load(run.workdir)
    except UserError as error:
        return _gone(f"No picture of the features: {error}")
    groups = pictures.feature_pictures(model.encode, samples)
    return gallery.feature_sheet(groups) if groups else _gone("No sample has a date that the model can read.")


def _data(run: Run, samples: dict[str, list[Sample]] | str) -> str:
    if isinstance(samples, str):
        return _gone(samples)
    return gallery.data_sheet(samples, pictures.credits(run.folders))


def _config(run: Run) -> str:
    if not run.config:
        return _gone("config.json is missing or unreadable.")
    plain = {key: value for key, value in run.config.items() if not isinstance(value, Mapping)}
    groups = {"run": plain, **{key: value for key, value in run.config.items() if isinstance(value, Mapping)}}
    parts = []
    for name, group in groups.items():
        lines = list(_flat(group))
        count = f'<span class="quiet">{len(lines)} {"key" if len(lines) == 1 else "keys"}</span>'
        parts.append(f"<details><summary>{escape(name)} {count}</summary>{_pairs(lines)}</details>")
    return "".join(parts)


def _flat(group: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in group.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def _reproduce(run: Run) -> str:
    name = run.workdir.resolve().name
    command = run.versions.get("command") or f"skyjax train --config=configs/{name}.py --workdir={run.workdir}"
    revision = run.versions.get("git", "").removesuffix("-dirty")
    lines = [*([f"git checkout {revision}"] if revision else []), command]
    parts = [f"<pre>{escape(chr(10).join(lines))}</pre>"]
    packages = {name: version for name, version in run.versions.items() if name not in ("git", "hardware", "command")}
    if packages:
        parts.append(f"<details><summary>Versions</summary>{_pairs(packages.items())}</details>")
    else:
        parts.append(_gone("The versions of the packages were not recorded."))
    return "".join(parts)


def _pairs(lines: Iterable[tuple[str, str]]) -> str:
    """A table of names and values."""
    rows = (f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in lines)
    return f"<table>{''.join(rows)}</table>"
