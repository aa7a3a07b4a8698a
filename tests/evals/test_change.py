import dataclasses
import json

import ml_collections
import numpy as np
import pytest
from numpy.testing import assert_allclose

import skyjax
from skyjax import cli
from skyjax.errors import UserError
from skyjax.evals import blocks, change, pairs, probe, scores
from skyjax.input import records
from skyjax.sample import Sample, make_sequence

SIDE = 64
CONFIG = ml_collections.ConfigDict(
    {"model": {"modalities": {"optical": {"bands": ("red",)}}}, "data": {"global_views": {"size": {"optical": 16}}}}
)


class Texture:
    """Stands in for a model: it knows how rough each cell of 4 x 4 pixels is, times `gain`."""

    config = CONFIG

    def __init__(self, gain):
        self.gain = gain

    def encode(self, samples):
        values = np.stack([s.sequences["optical"].values[0] for s in samples]).astype(np.float32)
        assert values.shape[1:] == (16, 16, 3)
        rough = values.reshape(len(samples), 4, 4, 4, 4, 3).std((2, 4))
        noise = np.random.default_rng(0).normal(size=rough.shape)
        return {"fused": self.gain * rough + noise, "context": None, "spatial": {}, "spatial_valid": {}}


def pair(rng, number):
    """Smooth cells, each brighter or darker at the second date; where there was a change, pixels are so one by one."""
    chart = np.zeros((SIDE, SIDE), np.int16)
    for _ in range(6):
        row, column = 4 * rng.integers(0, 14, 2)
        chart[row : row + 8, column : column + 8] = 1
    ground = 100 + rng.normal(0, 3, (2, SIDE, SIDE, 3)) + rng.normal(0, 20, (2, 16, 16, 1)).repeat(4, 1).repeat(4, 2)
    shade, rough = rng.choice([-1, 1], (16, 16, 3)).repeat(4, 0).repeat(4, 1), rng.choice([-1, 1], (SIDE, SIDE, 3))
    ground[1] += 15 * np.where(chart[..., None] == 1, rough, shade)
    sequence = make_sequence(
        ground.clip(0, 255).astype(np.uint8), "rgb", ("red", "green", "blue"), days=np.array([0, 0])
    )
    chart[:4, :4] = -1
    return Sample({"optical": sequence}, np.zeros(2, np.float32), labels={"flooded": chart}, id=f"site {number}")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("change") / "set"
    records.write([pair(rng, number) for number in range(3)], folder)
    return folder


@pytest.fixture(scope="module")
def result(dataset):
    return change.compare(Texture(1.0), Texture(0.0), change.Options(str(dataset), block=16))


def value(result, features, metric):
    (row,) = [row for row in result["rows"] if (row["features"], row["method"]) == (features, metric)]
    return row


def test_f1_and_iou_against_loops():
    rng = np.random.default_rng(0)
    truth, said = rng.random(200) < 0.2, rng.random(200) < 0.4
    hit = sum(t and s for t, s in zip(truth, said, strict=True))
    either = sum(t or s for t, s in zip(truth, said, strict=True))
    precision, recall = hit / said.sum(), hit / truth.sum()
    confusion = np.zeros((2, 2))
    for t, s in zip(truth, said, strict=True):
        confusion[int(t), int(s)] += 1
    assert_allclose(change.f1(confusion), 2 * precision * recall / (precision + recall))
    assert_allclose(change.iou(confusion), hit / either)
    assert change.f1(np.array([[9.0, 0], [0, 0]])) == 0
    assert change.iou(np.stack([confusion] * 3)).shape == (3,)


def test_differences_are_the_last_date_minus_the_first(dataset):
    sample = records.RecordSource(dataset)[1]
    site = pairs.site_of(sample, "flooded")
    first, last = sample.sequences["optical"].values.astype(float)
    std = np.array([58.395, 57.12, 57.375])  # of sensors.toml, rgb
    got = pairs.values(site, 1).at(np.argwhere(np.ones((SIDE, SIDE), bool))).reshape(SIDE, SIDE, 6)
    assert_allclose(got[..., :3], (last - first) / std, atol=1e-5)
    assert_allclose(got[..., 3:], np.abs(last - first) / std, atol=1e-5)
    around = pairs.values(site, 5).values[20, 30]
    assert_allclose(around[:3], (last - first)[18:23, 28:33].mean((0, 1)) / std, atol=1e-5)
    rough = pairs.encoded(Texture(1.0), [site], kind="fused", block=16)[0].at(np.array([[21, 34]]))[0]
    inside = np.s_[20:24, 32:36]
    assert_allclose(rough[:3], last[inside].std((0, 1)) - first[inside].std((0, 1)), atol=1e-4)


def test_features_that_see_the_change_find_it(result):
    ours = value(result, "pre-trained encoder", "F1 of change")
    assert ours["accuracy"] > 0.85
    for name in ("untrained encoder", change.VALUES, change.EVERYTHING):
        assert value(result, name, "F1 of change")["high"] < ours["low"], name
    by_iou = value(result, "pre-trained encoder", "IoU of change")["accuracy"]
    assert_allclose(by_iou, ours["accuracy"] / (2 - ours["accuracy"]))


def test_everything_changed_is_twice_the_share(result, dataset):
    source = records.RecordSource(dataset)
    charts = np.stack([source[i].labels["flooded"] for i in range(3)])
    share = (charts == 1).sum() / (charts >= 0).sum()
    assert_allclose(value(result, change.EVERYTHING, "F1 of change")["accuracy"], 2 * share / (1 + share))
    assert result["sizes"]["test"] == (charts >= 0).sum()


def test_maps_have_every_pixel_said_once(result):
    assert [each["site"] for each in result["maps"]] == ["site 0", "site 1", "site 2"]
    truth, said = (np.array([each[name] for each in result["maps"]]) for name in ("truth", "said"))
    assert ((truth < 0) == (said < 0)).all()
    confusion = np.array([[((truth == t) & (said == s)).sum() for s in (0, 1)] for t in (0, 1)])
    assert confusion.tolist() == result["confusion"]


def test_a_site_is_tested_by_the_others(dataset):
    """Labels of the tested site, turned around, change nothing of what is said of it."""
    options = change.Options(str(dataset), block=16)
    sites = pairs.open_pairs(str(dataset), None)
    cells = pairs.encoded(Texture(1.0), sites, kind="fused", block=16)
    said = []
    for flip in (False, True):
        charts = [site.chart.copy() for site in sites]
        if flip:
            charts[1] = np.where(charts[1] >= 0, 1 - charts[1], -1)
        pixels = blocks.labelled_pixels(charts, block=16)
        predicted, _ = change._test_all(cells, pixels, pixels.site == 1, options)
        said.append(predicted[pixels.site == 1])
    assert (said[0] == said[1]).all()
    assert 0 < said[0].mean() < 1


def test_one_site_is_tested_block_by_block(dataset, tmp_path):
    records.write([records.RecordSource(dataset)[0]], tmp_path / "one")
    result = change.compare(Texture(1.0), Texture(0.0), change.Options(str(tmp_path / "one"), block=16))
    assert value(result, "pre-trained encoder", "F1 of change")["accuracy"] > 0.8
    assert any("one site only" in note for note in result["notes"])


def test_threshold_is_where_f1_is_highest():
    """Against all thresholds tried one by one; some scores are equal."""
    rng = np.random.default_rng(1)
    labels = (rng.random(400) < 0.1).astype(int)
    scores = np.round(labels + rng.normal(0, 0.7, 400), 1).astype(np.float32)
    threshold, value = change.best_threshold(scores, labels)

    def f1(least):
        confusion = np.zeros((2, 2))
        np.add.at(confusion, (labels, (scores > least).astype(int)), 1)
        return change.f1(confusion)

    assert_allclose(value, f1(threshold))
    assert_allclose(value, max(f1(least) for least in [*scores, scores.min() - 1]))


def test_blocks_that_choose_have_changes_too():
    rng = np.random.default_rng(0)
    block, label = np.arange(6000) // 100, np.zeros(6000, int)
    label[block % 9 == 4] = rng.random((block % 9 == 4).sum()) < 0.3  # seven blocks of sixty
    pixels = blocks.Pixels(np.zeros(6000, int), np.zeros((6000, 2), int), block, label)
    fold = change._dealt(pixels, np.arange(6000))
    assert all(label[fold[block] == number].sum() > 20 for number in range(change.FOLDS))
    balanced = change._balanced(np.arange(6000), pixels, rng)
    assert label[balanced].sum() == label.sum()
    assert len(balanced) == label.sum() + change.MOST_PIXELS // 10


def test_what_a_date_does_not_show_is_not_said(dataset):
    sample = records.RecordSource(dataset)[0]
    clear = np.ones((2, SIDE, SIDE), bool)
    clear[1, 40:44] = False
    sequence = dataclasses.replace(sample.sequences["optical"], clear=clear)
    site = pairs.site_of(dataclasses.replace(sample, sequences={"optical": sequence}), "flooded")
    assert (site.chart[40:44] == -1).all()
    assert (site.chart[:40] == np.clip(sample.labels["flooded"][:40], -1, 1)).all()
    assert (site.first.sequences["optical"].values[0] == sequence.values[0]).all()
    assert (site.last.sequences["optical"].values[0] == sequence.values[1]).all()


def test_result_is_what_table_and_report_read(result, capsys, tmp_path):
    probe.print_table(result)
    probe.append_csv(result, tmp_path / "rows.csv")
    probe.write_json(result, tmp_path / "result.json")
    assert "difference of pixel values" in capsys.readouterr().out
    assert "F1 of change" in scores.probe_table(result)
    assert "recall" in scores.class_table(result)


def test_maps_are_kept_small():
    chart = np.arange(300 * 200).reshape(300, 200)
    assert change._coarse(chart.tolist()) == chart[::3, ::3].tolist()
    assert change._coarse("site 1") == "site 1"


def test_command(dataset, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(skyjax, "load", lambda path: Texture(1.0))
    monkeypatch.setattr(change, "untrained", lambda model, seed: Texture(0.0))
    out = tmp_path / "result.json"
    asked = ["--task=change", f"--dataset={dataset}", "--label=flooded", f"--json={out}"]
    assert cli.main(["eval", f"--checkpoint={tmp_path}", *asked]) == 0
    assert "IoU of change" in capsys.readouterr().out
    assert json.loads(out.read_text())["label"] == "flooded"


def test_wrong_data_is_one_sentence(dataset, sample_records, tmp_path):
    with pytest.raises(UserError, match="has no map of labels"):
        pairs.open_pairs(str(sample_records), None)
    with pytest.raises(UserError, match=r'no map of labels "flood".*flooded'):
        pairs.open_pairs(str(dataset), "flood")
    sample = records.RecordSource(dataset)[0]
    still = np.zeros((SIDE, SIDE), np.int16)
    records.write([Sample(sample.sequences, sample.lonlat, labels={"flooded": still}, id="still")], tmp_path / "still")
    with pytest.raises(UserError, match="is unchanged"):
        pairs.open_pairs(str(tmp_path / "still"), None)
