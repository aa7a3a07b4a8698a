import argparse
import csv
import dataclasses
import functools
import io
import json
import types

import ml_collections
import numpy as np
import PIL.Image
import pytest
import rich.console
from numpy.testing import assert_allclose
from sklearn.metrics import confusion_matrix
from sklearn.neighbors import KNeighborsClassifier

from skyjax.errors import UserError
from skyjax.evals import probe
from skyjax.evals.baselines import random_convolution
from skyjax.evals.datasets import open_dataset
from skyjax.evals.features import encoder_features, extract_all
from skyjax.input import records
from skyjax.sample import Sample, make_sequence

CONFIG = ml_collections.ConfigDict(
    {"model": {"modalities": {"optical": {}, "sar": {}}}, "data": {"global_views": {"size": {"optical": 4, "sar": 4}}}}
)


class MeanColour:
    """Stands in for a trained model: what it knows of an image is its mean colour, times `gain`, and noise."""

    config = CONFIG

    def __init__(self, gain):
        self.gain, self.batches = gain, []

    def encode(self, samples):
        self.batches.append(len(samples))
        values = np.stack([s.sequences["optical"].values for s in samples]).astype(np.float32)
        cells = values.reshape(len(samples), 1, 2, 4, 2, 4, 3).mean((3, 5))
        pooled = self.gain * (cells.mean((1, 2, 3)) - 90) + 5 * np.sin(values[:, 0, 0, 0].astype(np.float32))
        valid = np.arange(4).reshape(1, 1, 2, 2).repeat(len(samples), 0) != 1  # the upper right cell is not valid
        return {"pooled": pooled, "encoder": {"optical": cells}, "encoder_valid": {"optical": valid}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of noisy colour; the stripes of two of them differ in direction."""
    folder = tmp_path_factory.mktemp("classes")
    rng = np.random.default_rng(0)
    for name, colour in (("Field", (120, 100, 70)), ("Forest", (40, 90, 50)), ("Lake", (50, 70, 110))):
        (folder / name).mkdir()
        for i in range(30):
            stripes = 30 * (np.indices((8, 8))[int(name == "Field")] % 2)[..., None]
            image = np.array(colour) + stripes + rng.normal(0, 25, 3) + rng.normal(0, 10, (8, 8, 3))
            PIL.Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / name / f"{name}_{i}.png")
    return folder


@pytest.fixture(scope="module", autouse=True)
def _few_filters():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "random_convolution", functools.partial(random_convolution, filters=16))
        yield


@pytest.fixture(scope="module")
def tables(folder):
    model, fresh = MeanColour(1.0), MeanColour(0.02)
    options = probe.Options("knn", str(folder))
    return {
        "knn": probe.compare(model, fresh, options),
        "linear": probe.compare(model, fresh, dataclasses.replace(options, task="linear")),
    }


def rows(result, method):
    return {row["features"]: row for row in result["rows"] if row["method"] == method}


def test_an_imported_encoder_shrinks_no_image():
    """It has a model and no views by which an image would be too large."""
    config = ml_collections.ConfigDict({"model": {}})
    assert probe.largest_sides(types.SimpleNamespace(config=config)) == {}


@pytest.mark.parametrize(
    ("task", "methods"), [("knn", ["kNN 20", "kNN 5"]), ("linear", ["linear AdamW", "linear L-BFGS"])]
)
def test_every_method_has_every_row(tables, task, methods):
    result = tables[task]
    assert list(dict.fromkeys(row["method"] for row in result["rows"])) == methods
    for method in methods:
        assert set(rows(result, method)) == {
            "pre-trained encoder",
            "untrained encoder",
            "image statistics",
            "random convolutional features",
        }
    for row in result["rows"]:
        assert 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1
        assert (row["chosen"] is None) == (task == "knn")
    assert result["sizes"] == {"train": 36, "val": 9, "test": 45}
    assert [result["features"][name]["dimension"] for name in result["features"]] == [3, 3, 33, 32]


def test_features_that_know_beat_those_that_do_not(tables):
    for task, method in (("knn", "kNN 5"), ("linear", "linear L-BFGS")):
        found = rows(tables[task], method)
        assert found["pre-trained encoder"]["accuracy"] > found["untrained encoder"]["accuracy"] + 0.1
        assert found["image statistics"]["accuracy"] > 0.7


def test_the_knn_row_is_what_sklearn_says(folder, tables):
    data = open_dataset(str(folder))
    model = MeanColour(1.0)
    bank = np.concatenate([data.parts["train"], data.parts["val"]])
    known = model.encode([data.read(i) for i in bank])["pooled"]
    asked = model.encode([data.read(i) for i in data.parts["test"]])["pooled"]

    asked, known = ((rows - known.mean(0)) / known.std(0) for rows in (asked, known))

    def weights(distance):
        return np.exp((1 - distance) / 0.07)

    peer = KNeighborsClassifier(5, metric="cosine", weights=weights).fit(known, data.labels[bank])
    said, truth = peer.predict(asked), data.labels[data.parts["test"]]
    row = rows(tables["knn"], "kNN 5")["pre-trained encoder"]
    assert row["accuracy"] == pytest.approx(np.mean(said == truth), abs=1e-6)
    counts = confusion_matrix(truth, said)
    want = dict(zip(data.classes, np.diag(counts) / counts.sum(1), strict=True))
    assert tables["knn"]["per_class"]["kNN 5"] == pytest.approx(want)


def test_the_confusion_matrix_is_of_the_method_it_names(tables):
    for result in tables.values():
        counts = np.array(result["confusion"])
        row = rows(result, result["confusion_of"])["pre-trained encoder"]
        assert counts.sum() == result["sizes"]["test"]
        assert np.trace(counts) / counts.sum() == pytest.approx(row["accuracy"])


def test_a_modality_is_the_mean_over_valid_places_and_batches_are_filled(folder):
    data = open_dataset(str(folder))
    model = MeanColour(1.0)
    which = data.parts["test"][:21]
    (got,), _ = [
        list(part.values())
        for part in extract_all(data, which, {"a": encoder_features(model, kind="optical", batch_size=8)})
    ]
    assert model.batches == [8, 8, 8]
    for i, features in zip(which, got, strict=True):
        image = data.read(i).sequences["optical"].values[0].astype(float)
        cells = [image[:4, :4], image[4:, :4], image[4:, 4:]]
        assert_allclose(features, np.mean([cell.mean((0, 1)) for cell in cells], axis=0), rtol=1e-5)


def test_several_labels_are_scored_by_micro_f1(tmp_path):
    rng = np.random.default_rng(0)
    samples = []
    for i in range(40):
        flags = rng.random(3) < 0.5
        values = (60 + 120 * flags + rng.normal(0, 10, (1, 8, 8, 3))).astype(np.uint8)
        sequence = make_sequence(values, "rgb", ("red", "green", "blue"), days=np.zeros(1, int))
        labels = {"cover": flags.astype(np.int8)}
        samples.append(Sample({"optical": sequence}, np.full(2, np.nan, np.float32), labels=labels, id=f"s{i}"))
    records.write(samples, tmp_path / "set")
    for task, method in (("knn", "kNN 5"), ("linear", "linear L-BFGS")):
        result = probe.compare(MeanColour(1.0), MeanColour(0.02), probe.Options(task, str(tmp_path / "set")))
        assert result["metric"] == "micro-F1"
        assert result["confusion"] is None
        assert rows(result, method)["pre-trained encoder"]["accuracy"] > 0.85


def test_the_table_says_all_numbers(tables):
    text = io.StringIO()
    probe.print_table(tables["linear"], rich.console.Console(file=text, width=140))
    for row in tables["linear"]["rows"]:
        assert f"{100 * row['accuracy']:.1f}" in text.getvalue()
        assert row["features"] in text.getvalue()
    assert "36 train, 9 validation, 45 test" in text.getvalue()
    assert "Note: dates are unknown" in text.getvalue()


def test_json_and_csv(tables, tmp_path):
    probe.write_json(tables["knn"], tmp_path / "new" / "result.json")
    assert json.loads((tmp_path / "new" / "result.json").read_text()) == tables["knn"]
    for result in tables.values():
        probe.append_csv(result, tmp_path / "all.csv")
    with (tmp_path / "all.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 16
    assert float(lines[0]["accuracy"]) == tables["knn"]["rows"][0]["accuracy"]
    assert {line["image_size"] for line in lines} == {"optical:8x8"}


def test_an_unwritable_file_is_named(tables, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--csv"):
        probe.append_csv(tables["knn"], tmp_path / "file" / "all.csv")
    with pytest.raises(UserError, match="--json"):
        probe.write_json(tables["knn"], tmp_path / "file" / "all.json")


def test_options_reach_the_probe(monkeypatch, tables, capsys, tmp_path):
    parser = argparse.ArgumentParser()
    probe.add_arguments(parser)
    seen = {}

    def remember(checkpoint, task, dataset, **options):
        seen.update(options, checkpoint=checkpoint, task=task, dataset=dataset)
        return tables["knn"]

    monkeypatch.setattr(probe, "run", remember)
    words = ["--checkpoint=C", "--task=knn", "--dataset=D", "--test-dataset=E", "--train-per-class=7", "--sensor=naip"]
    words += ["--bands=red,nir", f"--json={tmp_path / 'r.json'}", "--modality=sar", "--image-size=32", "--label=x"]
    probe.from_arguments(parser.parse_args(words))
    assert seen == {
        **{"checkpoint": "C", "task": "knn", "dataset": "D", "test_dataset": "E", "train_per_class": 7, "seed": 0},
        **{"sensor": "naip", "bands": ("red", "nir"), "modality": "sar", "image_size": 32, "label": "x"},
    }
    assert "kNN 20" in capsys.readouterr().out
    assert (tmp_path / "r.json").is_file()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"modality": "multispectral"},
            "--modality=multispectral is not in this checkpoint; it has fused, optical, sar",
        ),
        ({"modality": "sar"}, "the data set has no sar images; it has optical"),
        ({"task": "knnn"}, "--task=knnn is not known; tasks: knn, linear"),
    ],
)
def test_a_mistake_is_named(folder, options, words):
    with pytest.raises(UserError, match=words):
        probe.compare(MeanColour(1), MeanColour(1), probe.Options(**{"task": "knn", "dataset": str(folder), **options}))
