"""The builder of captioned images, against the split file and the pictures that it reads."""

import json
import pathlib

import numpy as np
import PIL.Image
import pytest
from numpy.testing import assert_array_equal

from skyjax.errors import UserError
from skyjax.evals.captioned import open_captioned
from skyjax.input.build import build
from skyjax.input.records import RecordSource

BUILDER = pathlib.Path(__file__).parents[2] / "data" / "captioned.py"
ENTRIES = [
    ("b.png", "train", ["a  field .", "Crops beside a road"]),
    ("a.tif", "restval", ["a lake"]),
    ("c.jpg", "test", ["a harbour", "boats"]),
]


def write(folder, entries=ENTRIES, name="dataset.json"):
    (folder / "imgs").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for each, _, _ in entries:
        PIL.Image.fromarray(rng.integers(0, 255, (9, 12, 3)).astype(np.uint8)).save(folder / "imgs" / each)
    listed = [{"filename": n, "split": p, "sentences": [{"raw": t} for t in texts]} for n, p, texts in entries]
    (folder / name).write_text(json.dumps({"images": listed, "dataset": "ucm"}))
    return folder


def test_each_split_is_a_dataset_with_all_its_captions(tmp_path):
    folder, out = write(tmp_path / "ucm"), tmp_path / "out"
    summary = build(BUILDER, folder, out)
    assert summary.count == 3
    assert sorted(each.name for each in out.iterdir()) == ["test", "train"]
    source = RecordSource(out / "train")
    samples = [source[i] for i in range(len(source))]
    assert [(sample.id, sample.texts, sample.source) for sample in samples] == [
        ("b", ("a field .", "Crops beside a road"), "ucm/train"),
        ("a", ("a lake",), "ucm/train"),
    ]
    for sample, name in zip(samples, ("b.png", "a.tif"), strict=True):
        with PIL.Image.open(folder / "imgs" / name) as image:
            assert_array_equal(sample.sequences["optical"].values[0], np.asarray(image))


def test_records_and_split_file_tell_the_probes_the_same(tmp_path):
    folder = write(tmp_path / "ucm")
    build(BUILDER, folder, tmp_path / "out")
    for part in ("train", "test"):
        of_file = open_captioned(str(folder / "dataset.json"), split=part)
        of_records = open_captioned(str(tmp_path / "out"), split=part)
        assert of_records.captions == of_file.captions
        for i in range(len(of_file.captions)):
            one, other = (each.read(i).sequences["optical"].values for each in (of_file, of_records))
            assert_array_equal(one, other)


def test_what_cannot_be_built_is_refused(tmp_path):
    folder = write(tmp_path / "two")
    (folder / "more.json").write_text("{}")
    with pytest.raises(UserError, match=r"2 .json files, not one split file: dataset.json, more.json"):
        build(BUILDER, folder, tmp_path / "out")
    other = write(tmp_path / "odd", [("a.png", "dev", ["a lake"])])
    with pytest.raises(UserError, match='split "dev"; the splits are train, val, test'):
        build(BUILDER, other, tmp_path / "out")
