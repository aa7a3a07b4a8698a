"""Zero-shot, retrieval and captions with a model that sees the grey level of an image and reads it from a text."""

import argparse
import base64
import io
import json
import shutil

import ml_collections
import numpy as np
import PIL.Image
import pytest
from test_report import Page

from skyjax.errors import UserError
from skyjax.evals import attention, captions, extremes, retrieval, scores, words, zero_shot
from skyjax.evals.report import write_report
from skyjax.input.captions import prompts

CONFIG = ml_collections.ConfigDict(
    {"model": {"modalities": {"optical": {}}}, "data": {"global_views": {"size": {"optical": 8}}}, "seed": 0}
)
LEVELS = {"Forest": 30, "SeaLake": 90, "Highway": 150, "River": 210}
TEXTS = {30: "trees in a dark wood", 90: "a sea or lake", 150: "a highway", 210: "a bright river"}


def direction(level):
    """Grey levels as unit vectors along a quarter of a circle."""
    angle = np.asarray(level, float) / 255 * np.pi / 2
    return np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32)


class GreyWords:
    """Reads a text's level from the words of LEVELS and TEXTS; `alike` reads the same from every text."""

    streams, can_caption = ("fused",), True

    def __init__(self, alike=False):
        self.alike = alike

    def encode(self, texts):
        return direction([90 if self.alike else self.level(text) for text in texts])

    def project(self, stream, features):
        return direction(np.full(len(features), 90) if self.alike else features[:, 0])

    def caption(self, fused, valid, method, seed=0):
        levels = np.where(valid, fused[..., 0], 0).sum((1, 2)) / valid.sum((1, 2))
        return [TEXTS[min(TEXTS, key=lambda known, level=level: abs(known - level))] for level in levels]

    def look(self, fused, valid, texts, cells):
        """The first word looks at the first cell, the others everywhere."""
        first = np.zeros((cells, cells))
        first[0, 0] = 1
        even = np.full((cells, cells), 1 / cells**2)
        return [(text.split(), np.stack([first] + [even] * (len(text.split()) - 1))) for text in texts]

    @staticmethod
    def level(text):
        known = {"forest": 30, "wood": 30, "sea": 90, "highway": 150, "river": 210}
        return next((level for word, level in known.items() if word in text), 0)


class Grey:
    config = CONFIG

    def __init__(self, words):
        self.words = words

    def encode(self, samples):
        values = np.stack([s.sequences["optical"].values for s in samples]).astype(np.float32)
        fused = values.mean((1, 4))[..., None]
        return {"fused": fused, "fused_valid": np.ones(fused.shape[:3], bool), "pooled": fused.mean((1, 2))}


def grey(folder, name, level):
    folder.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(folder / name)


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Class folders; of SeaLake one image in five is as bright as a highway."""
    folder = tmp_path_factory.mktemp("classes")
    for name, level in LEVELS.items():
        for i in range(10 if name == "SeaLake" else 5):
            wrong = name == "SeaLake" and i % 5 == 4
            grey(folder / name, f"{name}_{i}.png", 150 if wrong else level + i)
    return folder


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A split file of 12 images and 24 captions: of three levels the images are told apart by nothing."""
    folder = tmp_path_factory.mktemp("told")
    entries = []
    for i in range(12):
        level = list(LEVELS.values())[i % 4]
        grey(folder / "images", f"{i}.png", level)
        sentences = [{"raw": text} for text in (TEXTS[level], f"{TEXTS[level]} , number {i}")]
        entries.append({"filename": f"{i}.png", "split": "test", "sentences": sentences})
    (folder / "own.json").write_text(json.dumps({"images": entries}))
    return folder / "own.json"


def rows(result, features="pre-trained encoder"):
    return {row["method"]: row for row in result["rows"] if row["features"] == features}


def test_classes_are_told_by_their_names(classes):
    result = zero_shot.compare(Grey(GreyWords()), zero_shot.Options(str(classes), split="all"))
    row = rows(result)["zero-shot top-1"]
    assert row["accuracy"] == pytest.approx(23 / 25)
    assert row["low"] < row["accuracy"] < row["high"] <= 1
    assert result["per_class"]["zero-shot top-1"] == {"Forest": 1, "Highway": 1, "River": 1, "SeaLake": 0.8}
    confusion = np.array(result["confusion"])
    assert confusion[3, 1] == 2
    assert np.trace(confusion) == 23
    assert rows(result, "largest class, always")["zero-shot top-1"]["accuracy"] == 10 / 25
    assert rows(result, "chance")["zero-shot top-1"]["accuracy"] == 1 / 4


def test_it_tests_what_a_probe_would_test(classes):
    result = zero_shot.compare(Grey(GreyWords()), zero_shot.Options(str(classes), train_per_class=2))
    assert result["sizes"] == {"test": 3 * 3 + 8}
    with pytest.raises(UserError, match="no parts of its own"):
        zero_shot.compare(Grey(GreyWords()), zero_shot.Options(str(classes), split="val"))


def test_a_source_with_a_test_part_alone_is_told(classes, tmp_path):
    shutil.copytree(classes, tmp_path / "set" / "test")
    result = zero_shot.compare(Grey(GreyWords()), zero_shot.Options(str(tmp_path / "set")))
    assert result["sizes"] == {"test": 25}
    with pytest.raises(UserError, match='no split "train"; it has test'):
        zero_shot.compare(Grey(GreyWords()), zero_shot.Options(str(tmp_path / "set"), split="train"))


def test_a_class_is_the_mean_of_its_unit_templates():
    class Words(GreyWords):
        def encode(self, texts):
            vectors = np.array([[len(text), text.count("e"), 1.0] for text in texts], np.float32)
            return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    got = zero_shot.class_vectors(Words(), ["SeaLake", "River"])
    for name, vector in zip(["SeaLake", "River"], got, strict=True):
        total = np.zeros(3)
        for prompt in prompts(name):
            one = np.array([len(prompt), prompt.count("e"), 1.0])
            total += one / np.linalg.norm(one)
        np.testing.assert_allclose(vector, total / np.linalg.norm(total), atol=1e-6)


def test_equally_alike_classes_share_an_image():
    right, said = zero_shot.top_one(np.array([[1, 1, 0], [0, 1, 0], [1, 1, 1]]), np.array([1, 1, 2]))
    np.testing.assert_allclose(right, [1 / 2, 1, 1 / 3])
    assert said.tolist() == [0, 1, 0]


def by_loop(level_of_image, level_of_caption, owner, k):
    """Recall both ways where levels are all that is known: the expectation for ties, by counting."""
    to_text, to_image = [], []
    for i, level in enumerate(level_of_image):
        alike = [c for c, other in enumerate(level_of_caption) if other == level]
        own = sum(owner[c] == i for c in alike)
        miss = 1.0
        for place in range(min(k, len(alike))):
            miss *= (len(alike) - own - place) / (len(alike) - place)
        to_text.append(1 - max(miss, 0))
    for level in level_of_caption:
        to_image.append(min(k / sum(other == level for other in level_of_image), 1))
    return np.mean(to_text), np.mean(to_image)


@pytest.fixture(scope="module")
def found(told):
    return retrieval.compare(Grey(GreyWords()), retrieval.Options(str(told), hash_bits=8))


def test_recall_is_that_of_a_loop(found):
    levels = [list(LEVELS.values())[i % 4] for i in range(12)]
    every = []
    for k in (1, 5, 10):
        want = by_loop(levels, np.repeat(levels, 2), np.repeat(np.arange(12), 2), k)
        for way, value in zip(("image to text", "text to image"), want, strict=True):
            row = rows(found)[f"{way} R@{k}"]
            assert row["accuracy"] == pytest.approx(value)
            assert row["low"] - 1e-9 <= value <= row["high"] + 1e-9
            every.append(value)
    assert rows(found)["mean recall"]["accuracy"] == pytest.approx(np.mean(every))
    assert rows(found, "chance")["text to image R@5"]["accuracy"] == pytest.approx(5 / 12)
    assert found["sizes"] == {"test": 12, "captions": 24}
    assert "12 of 24 captions are word for word those of another image too" in found["notes"]


def test_a_model_that_tells_nothing_apart_has_chance(told):
    result = retrieval.compare(Grey(GreyWords(alike=True)), retrieval.Options(str(told)))
    for method, row in rows(result).items():
        assert row["accuracy"] == pytest.approx(rows(result, "chance")[method]["accuracy"])


def test_codes_stand_beside_exact_search(found):
    about = found["hashing"]
    assert about["exact"]["recall"]["mean recall"] == pytest.approx(rows(found)["mean recall"]["accuracy"])
    (random,) = about["codes"]  # 8 bits are more than this space is wide: nothing to learn
    assert random["bytes"] == 1
    assert about["exact"]["bytes"] == 8
    assert random["loss"] == pytest.approx(about["exact"]["recall"]["mean recall"] - random["recall"]["mean recall"])
    assert random["milliseconds"] > 0
    assert "no learned rotation" in about["notes"][0]


def test_examples_have_their_pictures(found):
    for way, every in found["examples"].items():
        assert [example["kind"] for example in every] == ["best"] * 4 + ["worst"] * 4
        for example in every:
            assert {str(i) for i in example["images"]} <= found["pictures"].keys()
            assert len(example["found"]) == 3
            own = example["query"] if way == "image to text" else example["own"]
            assert own in example["images"]
    assert all(uri.startswith("data:image/") for uri in found["pictures"].values())


@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR is a Java program")
def test_captions_are_scored_and_shown(told, capsys):
    result = captions.compare(Grey(GreyWords()), captions.Options(str(told)))
    assert rows(result)["BLEU-4"]["accuracy"] == pytest.approx(1, abs=1e-6)
    assert rows(result)["word for word"]["accuracy"] == 1
    assert rows(result, "caption of another image")["word for word"]["accuracy"] < 0.7
    assert rows(result, "caption of another image")["METEOR"]["accuracy"] < rows(result)["METEOR"]["low"]
    assert result["said"][1] == {
        "image": "1.png",
        "said": "a sea or lake",
        "told": ["a sea or lake", "a sea or lake , number 1"],
    }
    assert "4 different captions were written for 12 images" in result["notes"]
    assert len(result["examples"]) == 12
    retrieval.print_table(result)
    assert "METEOR" in capsys.readouterr().out


def test_the_report_shows_retrievals_captions_and_where_words_look(found, told, tmp_path):
    example = {"kind": "worst", "image": 3, "said": "a <wood>", "told": ["a river"], "cider": 0.1}
    said = {"task": "captions", "dataset": "own.json", "rows": found["rows"][:1], "examples": [example]}
    (tmp_path / "probe.json").write_text(json.dumps([found, said | {"pictures": found["pictures"]}]))
    page = write_report(tmp_path).read_text()
    Page(tmp_path / "report.html")  # every tag is closed in its order
    for way in ("Image to text", "Text to image"):
        for kind in ("best", "worst"):
            assert f"{way}, {kind}" in page
    assert "a &lt;wood&gt;" in page
    assert all(uri in page for uri in found["pictures"].values())
    assert "Binary codes of 8 bits" in page
    assert "Where words look" in page
    assert all(uri in page for each in found["attention"] for _, uri in each["words"])


def test_what_is_told_alike_is_shown_once():
    """Three sites, two of which are told by the same words; the third is found by everything."""
    texts = ["a wood", "a sea", "a wood", "a sea", "a road"]
    owner = np.array([0, 0, 1, 1, 2])
    unit = np.eye(3, dtype=np.float32)
    vectors = unit[[0, 1, 0, 1, 2]]
    images = unit[[0, 1, 2]] + 0.1
    to_text = extremes.extremes(lambda part: images[part] @ vectors.T, np.arange(3), owner, texts, False)
    assert len(to_text) == 3
    for example in to_text:
        assert len({each["item"] for each in example["found"]}) == 3
    (first,) = [example for example in to_text if example["query"] == 1]
    assert [each["item"] for each in first["found"]] == ["a sea", "a wood", "a road"]
    assert [each["right"] for each in first["found"]] == [True, True, False]
    to_image = extremes.extremes(lambda part: vectors[part] @ images.T, owner, np.arange(3), texts, True)
    for kind, count in (("best", 3), ("worst", 0)):  # a site is shown once, be it as the best or as the worst
        asked = [example["query"] for example in to_image if example["kind"] == kind]
        assert len(asked) == len(set(asked)) == count


def test_numbers_that_do_not_compare_are_told_apart(tmp_path):
    """Recall, CIDEr and a classifier's accuracy on one set: each has its own sentence, unit and axis."""

    def result(task, metric, ours, theirs, **more):
        rows = [
            {"features": features, "method": "m", "accuracy": value, "low": value - 0.01, "high": value + 0.01}
            for features, value in (("pre-trained encoder", ours), ("something", theirs))
        ]
        return {"task": task, "dataset": "a/set", "metric": metric, "rows": rows, **more}

    told = [
        result("retrieval", "recall", 0.4, 0.1),
        result("captions", "score", 0.3, 2.5),
        result("knn", "accuracy", 0.7, 0.6, notes=[f"note <{i}>" for i in range(5)]),
        result("linear", "accuracy", 0.8, 0.65, per_class={"m": {f"class {i}": 0.5 for i in range(99)}}),
    ]
    sentences = scores.summary(told).split(". On")
    assert [text.removeprefix("On ").split(" its")[0].strip() for text in sentences] == [
        "set (retrieval)",
        "set (captions)",
        "set",
    ]
    assert "reaches 40.0 %" in sentences[0]
    assert "clearly better than" in sentences[0]
    assert "reaches 30.0 (" in sentences[1]
    assert "something: 250.0 (" in sentences[1]
    assert "reaches 80.0 %" in sentences[2]
    assert "something: 65.0 %" in sentences[2]
    (tmp_path / "probe.json").write_text(json.dumps(told))
    page = write_report(tmp_path)
    text = " ".join(Page(page).text)
    assert "2 more notes" in text
    assert "note <4>" in text
    assert "class 39" in text
    assert "class 40" not in text
    assert "and 59 more" in text


def test_pictures_of_the_report_are_small(found):
    for uri in found["pictures"].values():
        image = PIL.Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
        assert max(image.size) <= 2 * 164
        assert len(uri) < 60_000


def test_a_word_lights_the_cells_that_it_looks_at():
    image = np.full((8, 8, 3), 200, np.uint8)
    share = np.array([[0.5, 0.25], [0.25, 0.0]])
    shown = attention.lit(image, share)
    assert shown[:4, :4].min() == 200
    assert np.unique(shown[:4, 4:]).tolist() == [120]  # 0.2 + 0.8 / 2
    assert np.unique(shown[4:, 4:]).tolist() == [40]


def test_another_image_is_never_the_own():
    texts = [[f"text {i}"] for i in range(9)]
    taken = captions.of_another(texts, seed=0)
    assert sorted(taken) == sorted(text for (text,) in texts)
    assert all(text != own for text, (own,) in zip(taken, texts, strict=True))


def test_a_model_without_words_is_refused(classes, told):
    for task, options in ((zero_shot, zero_shot.Options(str(classes))), (retrieval, retrieval.Options(str(told)))):
        with pytest.raises(UserError, match=f"--task={task.TASK} needs a checkpoint that was trained with texts"):
            task.compare(Grey(None), options)
    with pytest.raises(UserError, match=r"--modality=sar never met words in this checkpoint.*fused"):
        retrieval.compare(Grey(GreyWords()), retrieval.Options(str(told), modality="sar"))
    silent = GreyWords()
    silent.can_caption = False
    with pytest.raises(UserError, match="needs a checkpoint with a decoder"):
        captions.compare(Grey(silent), captions.Options(str(told)))


def test_equal_texts_are_read_once_and_bad_vectors_refused():
    class Words(GreyWords):
        asked = ()

        def encode(self, texts):
            self.asked = texts
            return super().encode(texts) * (np.nan if "broken" in texts else 1)

    reader = Words()
    vectors, _ = words.text_vectors(reader, ["a sea", "a river", "a sea"])
    assert list(reader.asked) == ["a sea", "a river"]
    np.testing.assert_array_equal(vectors, direction([90, 210, 90]))
    with pytest.raises(UserError, match="1 of 1 vectors of this checkpoint are not finite"):
        words.text_vectors(reader, ["broken"])


def test_pictures_go_to_the_report_and_not_into_the_json(found, tmp_path, capsys):
    arguments = argparse.Namespace(json=str(tmp_path / "out.json"), csv=str(tmp_path / "out.csv"))
    retrieval.probe.tell(found, arguments, retrieval.print_table)
    assert "pictures" not in json.loads((tmp_path / "out.json").read_text())
    assert "binary codes of 8 bits" in capsys.readouterr().out
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 1 + len(found["rows"])
    scores.keep_probe(tmp_path / "probe.json", found)
    assert scores.read_probes(tmp_path / "probe.json")[0]["pictures"] == found["pictures"]
