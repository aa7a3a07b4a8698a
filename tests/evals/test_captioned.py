import json

import numpy as np
import PIL.Image
import pytest

from skyjax.errors import UserError
from skyjax.evals.captioned import open_captioned
from skyjax.input import records
from skyjax.sample import Sample, make_sequence

ENTRIES = [
    ("a.png", "train", ["a field", "a green field"]),
    ("b.png", "restval", ["a lake"]),
    ("c.png", "val", ["a  forest\n"]),
    ("d.png", "test", ["a road", "two roads", "a road ."]),
    ("e.png", "test", []),
    ("f.png", "test", ["a town"]),
]


def split_file(folder, images, entries=ENTRIES):
    """A split file, and its pictures in a folder: the n-th is of grey level 10 n."""
    (folder / images).mkdir(parents=True, exist_ok=True)
    for number, (name, _, _) in enumerate(entries):
        PIL.Image.fromarray(np.full((8, 8, 3), 10 * number, np.uint8)).save(folder / images / name)
    told = [
        {"filename": name, "imgid": i, "split": part, "sentences": [{"raw": text, "tokens": []} for text in texts]}
        for i, (name, part, texts) in enumerate(entries)
    ]
    (folder / "dataset.json").write_text(json.dumps({"images": told, "dataset": "own"}))
    return str(folder / "dataset.json")


def level(captioned, i):
    return int(captioned.read(i).sequences["optical"].values[0, 0, 0, 0])


def test_a_split_file_is_read_as_it_is(tmp_path):
    path = split_file(tmp_path, "imgs")
    found = open_captioned(path)
    assert found.captions == (("a road", "two roads", "a road ."), ("a town",))
    assert [level(found, i) for i in range(2)] == [30, 50]
    assert found.names == ("d.png", "f.png")
    assert found.split == 'split "test"'
    assert "1 of 3 images have no caption and were left out" in found.notes
    assert open_captioned(path, split="train").captions == (("a field", "a green field"), ("a lake",))
    assert open_captioned(path, split="val").captions == (("a forest",),)
    assert len(open_captioned(path, split="all").captions) == 5


@pytest.mark.parametrize("images", [".", "images", "UCM/images"])
def test_images_are_found_beside_the_file_and_below(tmp_path, images):
    assert level(open_captioned(split_file(tmp_path, images), split="val"), 0) == 20


def test_images_may_lie_elsewhere(tmp_path):
    split_file(tmp_path / "away", "imgs")
    path = tmp_path / "told.json"
    path.write_text((tmp_path / "away" / "dataset.json").read_text())
    assert level(open_captioned(str(path), images=str(tmp_path / "away" / "imgs")), 0) == 30
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r'no image "a.png" in ".*none" or below it.*say by --images=DIR'):
        open_captioned(str(path), images=str(tmp_path / "none"))
    with pytest.raises(UserError, match="there is no such folder"):
        open_captioned(str(path), images=str(tmp_path / "nowhere"))


def test_an_image_of_two_places_is_not_guessed(tmp_path):
    path = split_file(tmp_path, "imgs")
    split_file(tmp_path / "more", "imgs")
    with pytest.raises(UserError, match=r'several images are called "a\.png"'):
        open_captioned(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is no split file"),
        ('{"images": []}', "lists no images"),
        ('{"images": [{"sentences": []}]}', "has no filename"),
        ('{"images": [{"filename": "x.png", "sentences": []}]}', 'no image "x.png"'),
    ],
)
def test_what_is_no_split_file_is_refused(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=message):
        open_captioned(str(tmp_path / "x.json"))


def test_a_split_that_is_not_there_is_named_with_those_that_are(tmp_path):
    path = split_file(tmp_path, ".", [("a.png", "test", ["a field"]), ("b.png", "train", ["a lake"])])
    with pytest.raises(UserError, match=r'no split "vall".*test \(1\), train \(1\); take one, or --split=all'):
        open_captioned(path, split="vall")


def sample(number, texts, labels=None):
    values = np.full((1, 4, 4, 3), number, np.uint8)
    sequence = make_sequence(values, "rgb", ("red", "green", "blue"), days=np.zeros(1, np.int32))
    return Sample({"optical": sequence}, np.zeros(2, np.float32), texts, labels or {}, f"site {number}", "own")


def test_records_with_texts_and_parts(tmp_path):
    records.write([sample(1, ("a field", "presence\tIs there a road?\tno")), sample(2, ())], tmp_path / "train")
    records.write([sample(3, ("a lake",)), sample(4, ("a forest", "trees"))], tmp_path / "test")
    found = open_captioned(str(tmp_path))
    assert found.captions == (("a lake",), ("a forest", "trees"))
    assert found.names == ("site 3", "site 4")
    # A question is no caption.
    assert open_captioned(str(tmp_path), split="train").captions == (("a field",),)
    assert open_captioned(str(tmp_path / "train")).split == "all images"


def test_labels_make_captions_where_there_are_none(tmp_path):
    records.write([sample(1, ("a field",)), sample(2, (), {"class": np.array(1)})], tmp_path / "set")
    found = open_captioned(str(tmp_path / "set"), make=lambda sample, names: [f"class {int(sample.labels['class'])}"])
    assert found.captions == (("a field",), ("class 1",))
    assert any("1 of 2 records have no captions" in note for note in found.notes)


def test_a_set_without_captions_is_refused(tmp_path):
    records.write([sample(1, ()), sample(2, ("a\tb\tc",))], tmp_path / "set")
    with pytest.raises(UserError, match=r"none of the 2 images .* has a caption"):
        open_captioned(str(tmp_path / "set"))
    with pytest.raises(UserError, match="neither a split file"):
        open_captioned(str(tmp_path / "nothing"))
