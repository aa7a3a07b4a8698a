import html.parser
import json
import math
import re

import numpy as np
import pytest

from skyjax.config import to_json
from skyjax.errors import UserError
from skyjax.evals import curves, gallery, pictures, probe, report, scores
from skyjax.evals.report import write_report
from skyjax.input import records
from skyjax.sample import Sample

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
SECTIONS = {"learning", "health", "pace", "probes", "features", "data", "config", "reproduce"}
PROBES = [
    {
        "task": "linear",
        "dataset": "data/sample/eurosat",
        "metric": "accuracy",
        "sizes": {"train": 2400, "val": 600, "test": 150},
        "settings": {"split": "by folder"},
        "notes": ["small images"],
        "rows": [
            {"features": probe.PRETRAINED, "method": "L-BFGS", "accuracy": 0.8474, "low": 0.8361, "high": 0.8583},
            {"features": "image statistics", "method": "L-BFGS", "accuracy": 0.8041, "low": 0.7932, "high": 0.8149},
            {
                "features": "untrained encoder",
                "method": "L-BFGS",
                "accuracy": 0.7566,
                "low": 0.75,
                "high": 0.763,
            },
        ],
        "classes": ["Forest", "River"],
        "per_class": {"L-BFGS": {"Forest": 0.9, "River": 0.9}},
        "confusion_of": "L-BFGS",
        "confusion": [[90, 10], [5, 45]],
    },
]


class Page(html.parser.HTMLParser):
    """Checks that every tag is closed in order, and keeps what the tests look at."""

    def __init__(self, path):
        super().__init__()
        self.open, self.ids, self.addresses, self.tags = [], set(), [], set()
        self.rows, self.text = [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        self.ids |= {attributes["id"]} if "id" in attributes else set()
        self.addresses += [
            attributes[key] for key in ("src", "href", "xlink:href", "data", "action") if key in attributes
        ]
        if tag == "tr":
            self.rows.append([])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert tag not in VOID
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if {"td", "th"} & set(self.open) and "title" not in self.open:
            self.rows[-1].append(data)


def lines(steps=60):
    return [
        {
            "step": step,
            "loss": 10 - step / 20,
            "loss/pixel/optical": 6 - step / 30,
            "loss/pixel/fused": 6.1 - step / 30,
            "loss/alignment/optical-sar": 3.0,
            "loss/text/fused": 5 - step / 40,
            "loss/caption": 4 - step / 40,
            "loss/novel": 1.0,
            "rank/fused": 1.5 if 20 <= step <= 30 else 6.0,
            "spread/fused": 0.4,
            "learning_rate": 1e-3,
            "gradient_norm": 2.0,
            "samples_per_second": None if step == 5 else 40.0,
            "skipped": int(step >= 40),
            "bad_samples": 3 * (step >= 50),
            "teacher_momentum": 0.99,
            "seconds": 61.0 * step,
        }
        for step in range(5, steps + 1, 5)
    ]


def write_run(folder, config=None, metrics=(), probes=None, versions=None):
    folder.mkdir(exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(to_json(config))
    if metrics:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    if probes is not None:
        (folder / "probe.json").write_text(json.dumps(probes))
    if versions is not None:
        (folder / "versions.json").write_text(json.dumps(versions))
    return folder


class Model:
    """Stands in for a checkpoint: features are noise of the right shapes."""

    @staticmethod
    def load(workdir):
        return Model()

    def encode(self, sample):
        rng, t = np.random.default_rng(0), {m: len(s.days) for m, s in sample.sequences.items()}
        return {
            "spatial": {m: rng.normal(size=(1, n, 4, 4, 8)) for m, n in t.items()},
            "spatial_valid": {m: np.ones((1, n, 4, 4), bool) for m, n in t.items()},
            "days": {m: s.days[None] for m, s in sample.sequences.items()},
            "fused": rng.normal(size=(1, 4, 4, 8)),
            "fused_valid": np.full((1, 4, 4), bool(t)),
        }


@pytest.fixture(scope="module")
def page(tmp_path_factory, tiny_config):
    """A finished run's report."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    versions = {"git": "0123456789abcdef-dirty", "hardware": "2 CPU cores", "jax": "0.10.2"}
    write_run(folder, tiny_config(steps=60), lines(), PROBES, versions)
    seconds = {"initialise": 30, "compile": 90, "step": 420, "checkpoint": 0, "lost": 60}
    (folder / "goodput.json").write_text(json.dumps({"step": 60, "starts": 3, "seconds": seconds}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "Pretrained", Model)
        return Page(write_report(folder))


def test_a_finished_run_has_every_section(page):
    text = "".join(page.text)
    assert page.ids >= SECTIONS
    assert "The run finished all 60 steps (240 samples, optical, multispectral, SAR)" in text
    assert "reaches 84.7 % (95 % interval 83.6–85.8), clearly better than the best baseline, image statistics" in text
    assert "1 of 60 steps were skipped" in text
    assert "3 places in the batches stayed empty: their record could not be read" in text
    assert "The effective rank of fused fell to 1.5 at step 20, below the alarm line of 2, and rose again" in text
    for title in (
        "Pixel level",
        "Alignment between modalities",
        "Images and captions",
        "Captions written",
        "Novel",
        "Effective rank",
        "Throughput",
        "teacher momentum",
    ):
        assert title in text
    assert "uniform guess: ln 16 = 2.77" in text
    assert "could not be made" not in text


def test_where_the_time_went(page):
    text = " ".join("".join(page.text).split())
    assert "Useful time: 70.0% of 10 min in 3 starts" in text
    for part in ("step 70.0% 7 min", "compile 15.0% 1 min 30 s", "lost 10.0% 1 min", "initialise 5.0% 30 s"):
        assert part in text
    assert "checkpoint 0" not in text


def test_nothing_is_fetched_and_nothing_runs(page):
    assert all(re.match(r"data:image/|#", address) for address in page.addresses)
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base"}
    assert "img" in page.tags
    template = report.TEMPLATE.read_text()
    assert not re.search(r"@import|url\(|https?:", template)


def test_the_table_says_what_the_json_says(page):
    rows = {row[0]: row[1:] for row in page.rows if len(row) >= 3}
    for want in PROBES[0]["rows"]:
        value, interval = rows[want["features"]][:2]
        assert value == f"{100 * want['accuracy']:.1f} %"
        assert interval == f"{100 * want['low']:.1f}–{100 * want['high']:.1f}"
    assert ["1", "Forest", "90.0 %"] in page.rows
    assert ["2", "River", "90.0 %"] in page.rows
    text = "".join(page.text)
    assert "2 classes; 2,400 train; 600 val; 150 test; split: by folder" in text
    assert "Note: small images." in text
    assert "Forest called River: 10 (10.0 %)" in text


def test_several_labels_have_classes_but_no_confusion():
    result = {
        "classes": ["a", "b"],
        "per_class": {"x": {"a": 0.1, "b": 0.2}, "y": {"a": 0.25, "b": 1.0}},
        "confusion": None,
    }
    table = scores.class_table(result)
    assert "25.0 %" in table
    assert "100.0 %" in table
    assert "<figure>" not in table
    assert scores.class_table({}) == ""


def test_the_config_and_the_versions_are_there(page):
    assert ["batch_size", "4"] in page.rows
    assert ["pixel.tokens", "4"] in page.rows
    assert ["jax", "0.10.2"] in page.rows
    text = "".join(page.text)
    assert "git checkout 0123456789abcdef\n" in text
    assert "0123456789ab, with local changes" in text
    assert "2 CPU cores" in text
    assert "Duration1 h 1 min" in text


@pytest.mark.parametrize("metrics", [[], lines(5), [{"step": 5}], [{"step": 5, "loss": None}]])
def test_what_is_missing_is_said(tmp_path, metrics):
    page = Page(write_report(write_run(tmp_path / "run", metrics=metrics)))
    text = "".join(page.text)
    assert page.ids >= SECTIONS
    assert "No probe yet" in text
    assert "config.json is missing" in text
    assert "the config names no data" in text
    assert ("No metrics yet" in text) == (not metrics)
    assert "could not be made" not in text


def test_broken_files_are_said_not_raised(tmp_path, tiny_config):
    folder = write_run(tmp_path / "run", tiny_config(), lines())
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 65, "lo')
    (folder / "probe.json").write_text("[{")
    (folder / "versions.json").write_text("[]")
    text = "".join(Page(write_report(folder)).text)
    assert "The run finished all 60 steps" in text
    assert "No probe yet" in text
    assert "No picture of the features" in text


def test_a_config_of_records_that_are_gone(tmp_path, tiny_config):
    config = tiny_config()
    with config.unlocked():
        config.data.sources = ((str(tmp_path / "gone"), 1.0),)
    text = "".join(Page(write_report(write_run(tmp_path / "run", config))).text)
    assert text.count("No pictures:") == 2
    assert "Nothing has been logged yet" in text


def test_a_part_that_fails_does_not_take_the_page_with_it(tmp_path, monkeypatch, tiny_config):
    class Broken:
        @staticmethod
        def load(workdir):
            raise RuntimeError("a < b")

    monkeypatch.setattr(report, "Pretrained", Broken)
    page = Page(write_report(write_run(tmp_path / "run", tiny_config(), lines())))
    assert page.ids >= SECTIONS
    assert "This part could not be made: a < b" in "".join(page.text)


def test_no_checkpoint_is_a_sentence(tmp_path, monkeypatch, tiny_config):
    class Missing:
        @staticmethod
        def load(workdir):
            raise UserError("there is no checkpoint")

    monkeypatch.setattr(report, "Pretrained", Missing)
    text = "".join(Page(write_report(write_run(tmp_path / "run", tiny_config(), lines()))).text)
    assert "No picture of the features: there is no checkpoint" in text


def test_samples_with_nothing_to_show(tmp_path, monkeypatch, tiny_config):
    empty = Sample({}, np.full(2, np.nan, np.float32), id="<empty>", source="nowhere")
    records.write([empty], tmp_path / "records", about={"licence": "CC-BY-4.0", "attribution": "<nobody>"})
    config = tiny_config()
    with config.unlocked():
        config.data.sources = ((str(tmp_path / "records"), 1.0),)
    monkeypatch.setattr(report, "Pretrained", Model)
    text = "".join(Page(write_report(write_run(tmp_path / "run", config))).text)
    assert "No sample has a date that the model can read" in text
    assert "<empty> place not known" in text
    assert "CC-BY-4.0. <nobody>" in text


def test_hostile_names_are_text(tmp_path):
    hostile = "<script>alert(1)</script>"
    probes = [
        {
            "task": hostile,
            "dataset": hostile,
            "rows": [{"features": hostile, "method": hostile, "accuracy": 0.5}],
            "classes": [hostile, '"><b>'],
            "per_class": {hostile: {hostile: 0.25, '"><b>': 0.5}},
            "confusion": [[1, 2], [3, 4]],
        }
    ]
    metrics = [{"step": 1, "loss": 1.0, f"loss/{hostile}/{hostile}": 1.0, hostile: 2.0}]
    folder = write_run(
        tmp_path / "<b>run&", metrics=metrics, probes=probes, versions={"command": hostile, "hardware": hostile}
    )
    (folder / "config.json").write_text(json.dumps({hostile: {hostile: hostile}, "name": hostile}))
    page = Page(write_report(folder))
    assert "script" not in page.tags
    assert "".join(page.text).count(hostile) > 8


def test_of_lines_for_one_step_the_later_counts(tmp_path):
    again = [{"step": 40, "loss": 1.0}, {"step": 45, "loss": 2.0}]
    write_run(tmp_path, metrics=lines() + again)
    got = curves.read_metrics(tmp_path / "metrics.jsonl")
    assert got.steps.tolist() == [5, 10, 15, 20, 25, 30, 35, 40, 45]
    assert got.columns["loss"][-2:].tolist() == [1.0, 2.0]
    assert math.isnan(got.columns["rank/fused"][-1])
    assert got.resumed == (40,)
    assert [mark.kind for mark in curves.marks(got)] == ["resumed"]


def test_skipped_steps_and_alarms_are_marked_once(tmp_path):
    write_run(tmp_path, metrics=lines())
    got = curves.read_metrics(tmp_path / "metrics.jsonl")
    assert [(mark.step, mark.kind) for mark in curves.marks(got)] == [(40, "skipped")]
    assert [mark.step for mark in curves.alarms(got, {"objective": {"rank_alarm": 2.0}})] == [20]
    assert curves.alarms(got, {}) == []
    late = {"objective": {"rank_alarm": 2.0}, "optimizer": {"warmup_steps": 26}}
    assert [mark.step for mark in curves.alarms(got, late)] == [30]


def test_a_collapse_that_lasts_is_called_one(tmp_path, tiny_config):
    text = "".join(Page(write_report(write_run(tmp_path / "run", tiny_config(steps=100), lines(25)))).text)
    assert "Possible collapse: the effective rank ends at 1.5, below the alarm line of 2" in text
    assert "stopped at step 25 of 100" in text


def row(features, value, low, high):
    return scores.Row(features, "m", value, low, high)


def test_the_verdict_needs_intervals_apart():
    baseline = row("image statistics", 50, 45, 55)
    assert scores.verdict(row(probe.PRETRAINED, 60, 56, 64), baseline) == "clearly better than"
    assert scores.verdict(row(probe.PRETRAINED, 57, 53, 61), baseline) == "not clearly different from"
    assert scores.verdict(row(probe.PRETRAINED, 40, 36, 44), baseline) == "clearly worse than"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.6, "1 min"), (412, "6 min 52 s"), (3661, "1 h 1 min"), (90_000, "1 d 1 h")]
)
def test_durations_have_their_two_largest_units(seconds, text):
    assert report._duration(seconds) == text


def test_a_probe_replaces_an_earlier_one_of_its_kind_and_no_other(tmp_path):
    path = tmp_path / scores.PROBES

    def result(task, pooling, accuracy):
        rows = [{"features": "a", "method": "m", "accuracy": accuracy}]
        return {"task": task, "dataset": "d", "rows": rows, "settings": {"pooling": pooling}}

    for task, pooling, accuracy in (("knn", "fused", 0.1), ("knn", "optical", 0.2), ("linear", "fused", 0.3)):
        scores.keep_probe(path, result(task, pooling, accuracy))
    scores.keep_probe(path, result("knn", "fused", 0.4))
    assert [probe["rows"][0]["accuracy"] for probe in scores.read_probes(path)] == [0.2, 0.3, 0.4]
    with pytest.raises(UserError, match="none"):
        scores.keep_probe(tmp_path / scores.PROBES / "none" / scores.PROBES, result("knn", "fused", 0.1))


def test_label_maps_stand_beside_what_was_said():
    maps = [{"site": "a field & more", "truth": [[0, -1], [1, 1]], "said": [[1, -1], [1, 1]]}]
    page = gallery.label_sheet({"classes": ["wheat", "<maize>"], "maps": maps})
    assert page.count("<img") == 2
    assert "a field &amp; more" in page
    assert "&lt;maize&gt;" in page
    assert gallery.label_sheet({"classes": ["wheat"], "maps": []}) == ""


def test_a_label_picture_has_one_colour_a_class():
    colours = pictures.class_colours(3)
    assert len({tuple(colour) for colour in colours.tolist()}) == 3
    image = pictures.label_picture(np.array([[2, -1], [0, 2]]), colours)
    assert (image[0, 0] == colours[2]).all()
    assert (image[1, 1] == colours[2]).all()
    assert tuple(image[0, 1]) not in {tuple(colour) for colour in colours.tolist()}


def test_two_labels_of_one_data_set_are_kept_and_told_apart(tmp_path):
    rows = [{"features": scores.PRETRAINED, "method": "pixel accuracy", "accuracy": 0.5, "low": 0.4, "high": 0.6}]
    for label in ("crop_type", "land_cover", "crop_type"):
        result = {"task": "segmentation", "dataset": "runs/sites", "label": label, "rows": rows}
        scores.keep_probe(tmp_path / "probe.json", result)
    kept = scores.read_probes(tmp_path / "probe.json")
    assert [scores.title(result) for result in kept] == ["sites, land_cover", "sites, crop_type"]
    assert set(scores.best_rows(kept)) == {"sites, land_cover", "sites, crop_type"}
