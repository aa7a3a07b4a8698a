"""Builders of questions and of pairs of dates, against the files that they read."""

import json
import pathlib

import numpy as np
import PIL.Image
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from skyjax.errors import UserError
from skyjax.evals.questions import open_questions
from skyjax.input.build import build, load_builder
from skyjax.input.captions import captions
from skyjax.input.records import RecordSource

DATA = pathlib.Path(__file__).parents[2] / "data"
QUESTIONS = DATA / "sample" / "rsvqa_lr"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rsvqa") / "lr"
    return folder, build(DATA / "rsvqa.py", QUESTIONS, folder)


def test_each_split_is_a_dataset_of_its_own(built):
    folder, summary = built
    about = json.loads((QUESTIONS / "images.json").read_text())
    rows = [json.loads(line) for line in (QUESTIONS / "qa.jsonl").read_text().splitlines()]
    assert summary.count == len(about) == 14
    assert not summary.bad
    assert sorted(each.name for each in folder.iterdir()) == ["train", "val"]
    for part in ("train", "val"):
        source = RecordSource(folder / part)
        samples = [source[i] for i in range(len(source))]
        assert [sample.id for sample in samples] == [
            key for key in sorted(about, key=int) if about[key]["split"] == part
        ]
        for sample in samples:
            want = [
                f"{row['type']}\t{row['question']}\t{row['answer']}" for row in rows if str(row["img_id"]) == sample.id
            ]
            assert [" ".join(text.split()) for text in sample.texts] == [" ".join(text.split()) for text in want]
            assert sample.source == f"rsvqa_lr/{part}"
            sequence = sample.sequences["optical"]
            with PIL.Image.open(QUESTIONS / "images" / f"{sample.id}.png") as image:
                assert_array_equal(sequence.values[0], np.asarray(image))
            assert_allclose(sequence.extent, [1280, -1280, -1280, 1280])
            known = about[sample.id]
            assert_allclose(sample.lonlat, [known["lon"], known["lat"]], rtol=1e-6)
            date = str(np.datetime64(int(sequence.days[0]), "D")).replace("-", "")
            assert date == known["date"]


def test_questions_are_probed_and_told(built):
    folder, _ = built
    asked = open_questions(str(folder))
    assert asked.images == 14
    assert len(set(asked.image[asked.test])) == 4
    assert set(asked.kind) == {"comp", "count", "presence", "rural_urban"}
    assert {"0", "between 1 and 10", "between 11 and 100", "between 101 and 1000"} <= set(asked.classed)
    sample = RecordSource(folder / "val")[0]
    pairs = [tuple(text.split("\t")[1:]) for text in sample.texts]
    found = captions(sample, seed=0, number=4, questions=pairs)
    assert len(found) == 4
    assert not any("\t" in text for text in found)


def test_what_is_missing_is_named(tmp_path, built):
    with pytest.raises(UserError, match=r"images\.json"):
        build(DATA / "rsvqa.py", tmp_path, tmp_path / "out")
    folder = tmp_path / "torn"
    (folder / "images").mkdir(parents=True)
    (folder / "images.json").write_text(json.dumps({"7": {"split": "train"}}))
    (folder / "qa.jsonl").write_text('{"img_id": 7, "type": "count", "question": "How many?", "answer": "3"}\n')
    with pytest.raises(UserError, match='images" holds no'):
        build(DATA / "rsvqa.py", folder, tmp_path / "out")
    (folder / "images" / "8.png").write_bytes(b"")
    with pytest.raises(UserError, match="lacks the image of 1 entries"):
        build(DATA / "rsvqa.py", folder, tmp_path / "out")
    other = tmp_path / "half"
    other.mkdir()
    (other / "images.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        build(DATA / "rsvqa.py", other, tmp_path / "out")
    other = tmp_path / "rest"
    other.mkdir()
    (other / "images.json").write_text("{}")
    (other / "qa.jsonl").write_text('{"img_id": 7}\n')
    with pytest.raises(UserError, match="line 1, is not a question"):
        build(DATA / "rsvqa.py", other, tmp_path / "out")
    with pytest.raises(UserError, match="makes a folder of several"):
        build(DATA / "rsvqa.py", QUESTIONS, built[0] / "train")


def test_spacenet8(tmp_path):
    rng = np.random.default_rng(0)
    before, after = (rng.integers(1, 255, (3, 32, 32), np.uint8) for _ in range(2))
    after[:, :4] = 0
    mask = (rng.random((1, 32, 32)) < 0.2).astype(np.uint8)
    np.savez(tmp_path / "a.npz", pre_image=before, post_image=after, mask=mask)
    about = {"stac:geotransform": [-90.0, 4e-6, 0.0, 30.0, 0.0, -4e-6], "lon": -90.0, "lat": 30.0, "patch_id": "a"}
    (tmp_path / "a.json").write_text(json.dumps(about))
    (sample,) = load_builder(DATA / "spacenet8.py").samples(tmp_path)
    sequence, flooded = sample.sequences["optical"], sample.labels["flooded"]
    assert_array_equal(sequence.values[0], before.transpose(1, 2, 0))
    assert_array_equal(sequence.values[1], after.transpose(1, 2, 0))
    assert_array_equal(flooded[4:], mask[0, 4:])
    assert (flooded[:4] == -1).all()
    assert not sequence.clear[1, :4].any()
    # 32 steps of 4e-6 degrees, at 111.3 km a degree of latitude and its cosine times that of longitude.
    assert_allclose(sequence.extent[0] - sequence.extent[2], 32 * 4e-6 * 111_320, rtol=1e-3)
    assert_allclose(sequence.extent[3] - sequence.extent[1], 32 * 4e-6 * 111_320 * 0.8660, rtol=1e-3)
