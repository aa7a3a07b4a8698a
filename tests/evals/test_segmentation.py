import dataclasses
import types

import ml_collections
import numpy as np
import pytest

from skyjax.errors import UserError
from skyjax.evals import blocks, probe, segmentation
from skyjax.input import records
from skyjax.sample import Sample, make_sequence

DAYS = 18_000 + 20 * np.arange(8)
CONFIG = ml_collections.ConfigDict(
    {
        "model": {"modalities": {"sar": {"bands": ("VV", "VH")}, "optical": {"bands": ("red",)}}},
        "data": {"global_views": {"size": {"sar": 4, "optical": 4}}},
    }
)


class Phenology:
    """Stands in for a model: it knows the mean of the early and of the late dates of a pixel, with `noise`."""

    config = CONFIG

    def __init__(self, noise):
        self.noise = noise

    def encode(self, samples):
        values = np.stack([s.sequences["sar"].values for s in samples])
        days = np.stack([s.sequences["sar"].days for s in samples])
        early = (days < DAYS[4])[:, :, None, None, None]
        halves = [np.where(early == half, values, 0).sum(1) / (early == half).sum(1) for half in (True, False)]
        fused = np.concatenate(halves, -1)
        noise = np.random.default_rng(len(samples) + int(1e6 * abs(values.sum()) % 1e6)).normal(size=fused.shape)
        return {"fused": fused + self.noise * noise, "context": None, "spatial": {}, "spatial_valid": {}}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Fields of 4 pixels a side: class 3 is bright early, 5 is bright late, and of both the mean is the same."""
    rng = np.random.default_rng(0)
    samples = []
    for number in range(2):
        chart = np.repeat(np.repeat(rng.integers(0, 2, (8, 8)) * 2 + 3, 4, 0), 4, 1)
        late = (DAYS[4] <= DAYS)[:, None, None]
        bright = np.where(late == (chart == 5), 1.5, -1.5)
        values = (-12 + bright[..., None] + rng.normal(0, 2, (8, 32, 32, 2))).astype(np.float32)
        sequence = make_sequence(values, "sentinel1-grd", ("VV", "VH"), days=DAYS)
        chart[:4, :4], chart[0, :3] = -1, 9
        samples.append(Sample({"sar": sequence}, np.zeros(2, np.float32), labels={"crop": chart}, id=f"site {number}"))
    one = dataclasses.replace(samples[0], labels={"crop": np.full((32, 32), 3)}, id="one crop")
    folder = tmp_path_factory.mktemp("series") / "set"
    records.write([*samples, one], folder)
    return folder


@pytest.fixture(scope="module")
def result(dataset):
    return segmentation.compare(Phenology(0.2), Phenology(30.0), segmentation.Options(str(dataset)))


def value(result, features, metric="pixel accuracy"):
    (row,) = [row for row in result["rows"] if (row["features"], row["method"]) == (features, metric)]
    return row


def test_what_knows_the_order_of_the_dates_wins(result):
    """Early and late tell the classes apart, the mean over dates does not; nor does a date in a wrong place."""
    assert value(result, "pre-trained encoder")["accuracy"] > 0.9
    assert value(result, "raw series")["accuracy"] > 0.9
    assert value(result, "raw means, no dates")["accuracy"] < 0.6
    assert value(result, "untrained encoder")["accuracy"] < 0.75
    assert value(result, "dates shuffled")["accuracy"] < value(result, "pre-trained encoder")["low"]


def test_rows_are_what_the_report_and_the_table_read(result, capsys):
    assert len(result["rows"]) == 6 * len(blocks.METRICS)
    for row in result["rows"]:
        assert 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1
    assert [result["features"][name]["dimension"] for name in result["features"]][:2] == [4, 4]
    assert (
        np.trace(result["confusion"]) / np.sum(result["confusion"]) == value(result, "pre-trained encoder")["accuracy"]
    )
    probe.print_table(result)
    printed = capsys.readouterr().out
    assert "raw series" in printed
    assert "not told apart" in printed


def test_differences_are_paired(result):
    """A baseline that is wrong where the model is wrong, and elsewhere too, is worse in every draw."""
    for each in result["paired"]:
        ours, theirs = (
            value(result, name, each["metric"])["accuracy"] for name in ("pre-trained encoder", each["baseline"])
        )
        assert each["difference"] == pytest.approx(ours - theirs)
        assert each["low"] <= each["difference"] <= each["high"]
    found = {each["baseline"]: each for each in result["paired"] if each["metric"] == "pixel accuracy"}
    assert found["raw means, no dates"]["low"] > 0.2
    assert found["raw series"]["low"] < 0.02


def test_small_classes_and_sites_of_one_class_are_left_out(result):
    assert result["classes"] == ["3", "5"]
    assert result["sizes"]["test"] == 2 * (32 * 32 - 16)
    assert result["blocks"] == 2 * 16
    assert "1 of 3 sites have one class only and were left out" in result["notes"]
    assert "classes of fewer than 30 pixels were left out: 9 (6)" in result["notes"]


def test_the_maps_are_the_answers_where_they_belong(result):
    truth, said = (np.array([site[key] for site in result["maps"]]) for key in ("truth", "said"))
    assert [site["site"] for site in result["maps"]] == ["site 0", "site 1"]
    assert ((truth < 0) == (said < 0)).all()
    right = (truth == said)[truth >= 0].mean()
    assert right == value(result, "pre-trained encoder")["accuracy"]
    assert (truth[:, 8:12, 8:12] >= 0).all()


def test_no_pixel_trains_within_the_gap(dataset):
    options = segmentation.Options(str(dataset), gap=3, folds=4)
    pixels = blocks.labelled_pixels(segmentation.open_sites(options).labels, block=8)
    fold = blocks.deal(pixels, 4, 0)
    for test in range(4):
        inner, validation, again = segmentation._parts(pixels, fold, test, options)
        tested = fold[pixels.block] == test
        for parts in ((inner, validation), (inner, tested), (validation, tested), (again, tested)):
            for site in range(2):
                first, second = (pixels.place[part & (pixels.site == site)] for part in parts)
                distance = np.abs(first[:, None] - second).max(2)
                assert distance.min() > 3


def test_a_feature_of_the_block_alone_is_worth_nothing(dataset):
    """What a neighbour's label tells, the gap must keep out of the training part."""
    options = segmentation.Options(str(dataset))
    sites = segmentation.open_sites(options)
    pixels = blocks.labelled_pixels(sites.labels, block=8)
    fold = blocks.deal(pixels, options.folds, 0)
    features = np.eye(pixels.blocks, dtype=np.float32)[pixels.block]
    parts = [segmentation._parts(pixels, fold, test, options) for test in range(options.folds)]
    said, _ = segmentation._test_all(features, pixels, fold, parts, 2)
    assert (said == pixels.label).mean() < 0.6


def test_a_field_is_a_site_of_one_pixel(tmp_path):
    rng = np.random.default_rng(0)
    samples = []
    for i in range(80):
        values = (-12 + 3 * (i % 2) + rng.normal(0, 3, (8, 1, 1, 2))).astype(np.float32)
        sequence = make_sequence(values, "sentinel1-grd", ("VV", "VH"), days=DAYS)
        labels = {"cover": np.int16(i % 2), "flags": np.array([1, 0])}
        samples.append(Sample({"sar": sequence}, np.zeros(2, np.float32), labels=labels, id=f"field {i}"))
    records.write(samples, tmp_path / "fields", about={"label_names": {"cover": ["grass", "maize"]}})
    result = segmentation.compare(Phenology(0.0), Phenology(9.0), segmentation.Options(str(tmp_path / "fields")))
    assert result["classes"] == ["grass", "maize"]
    assert result["blocks"] == result["sizes"]["test"] == 80
    assert value(result, "pre-trained encoder")["accuracy"] > 0.85
    assert result["maps"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "crops"}, 'no map of labels "crops"; did you mean "crop"'),
        ({"least": 5000}, "has 0 classes of 5000 pixels or more"),
        ({"modality": "lidar"}, "--modality=lidar is not in this checkpoint"),
        ({"gap": 40}, "take a smaller --gap"),
    ],
)
def test_mistakes_are_named(dataset, options, message):
    with pytest.raises(UserError) as error:
        segmentation.compare(Phenology(0.2), Phenology(30.0), segmentation.Options(str(dataset), **options))
    assert message in str(error.value)


def test_a_model_of_other_images_is_refused(dataset):
    model = types.SimpleNamespace(
        config=ml_collections.ConfigDict({"model": {"modalities": {"optical": {"bands": ("red",)}}}})
    )
    with pytest.raises(UserError, match="the data set has sar, but this checkpoint encodes optical"):
        segmentation.compare(model, model, segmentation.Options(str(dataset)))
