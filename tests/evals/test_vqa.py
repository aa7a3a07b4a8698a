import dataclasses
import json
import types

import ml_collections
import numpy as np
import pytest
from numpy.testing import assert_allclose

import skyjax
from skyjax import cli
from skyjax.errors import UserError
from skyjax.evals import bilinear, probe, questions, scores, vqa
from skyjax.input import records
from skyjax.sample import Sample, make_sequence

CONFIG = ml_collections.ConfigDict(
    {"model": {"modalities": {"optical": {}}}, "data": {"global_views": {"size": {"optical": 8}}}}
)
NOUNS = ("lake", "desert")


class Brightness:
    """Stands in for a model: it knows how bright each quarter of an image is, times `gain`, and noise."""

    config = CONFIG

    def __init__(self, gain):
        self.gain = gain

    def encode(self, samples):
        values = np.stack([s.sequences["optical"].values for s in samples]).astype(np.float32)
        cells = self.gain * values.reshape(len(samples), 2, 4, 2, 4, 3).mean((2, 4))
        cells[..., 1:] = 90 + 40 * np.sin(97 * values[:, 0, :2, :2, 1:])
        return {"fused": cells, "fused_valid": np.ones(cells.shape[:3], bool), "encoder": {}, "encoder_valid": {}}


def asked_of(dark, rng):
    """Texts on an image that shows a lake where it is dark and a desert where it is not, never both."""
    found = []
    for _ in range(5):
        noun = NOUNS[int(rng.integers(2))]
        there = (noun == "lake") == dark
        found.append(f"presence\tIs there a {noun}?\t{'yes' if there else 'no'}")
        count = int(rng.integers(101, 105)) if there else 0
        found.append(f"count\tHow many {noun}s are there?\t{count}")
    return tuple(found)


def write(folder, numbers, seed):
    rng = np.random.default_rng(seed)
    samples = []
    for number in numbers:
        dark = number % 3 == 0
        values = rng.integers(0, 60, (1, 8, 8, 3)) + (20 if dark else 90)
        sequence = make_sequence(values.astype(np.uint8), "rgb", ("red", "green", "blue"), days=np.zeros(1, int))
        texts = ("a place", *asked_of(dark, rng))
        samples.append(Sample({"optical": sequence}, np.zeros(2, np.float32), texts=texts, id=f"image {number}"))
    records.write(samples, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    write(folder / "train", range(40), 0)
    write(folder / "val", range(100, 120), 1)
    return folder


@pytest.fixture(scope="module")
def result(folder):
    yes = {"always yes": lambda samples, asked: [["yes"] * len(each) for each in asked]}
    return vqa.compare(Brightness(1.0), Brightness(0.0), vqa.Options(str(folder)), answerers=yes)


class Writer:
    """Stands in for the text side: it sees whether a place is dark, and writes what `asked_of` makes of it."""

    can_caption = True
    config = ml_collections.ConfigDict({"data": {"text": {"length": 9}}})

    def __init__(self):
        self.tokenizer = self
        self.shapes = set()

    def encode(self, texts, length=None):
        if length is None:  # the tower's
            return np.array([[1.0, "lake" in text] for text in texts], np.float32)
        return list(texts), None

    def decode(self, tokens, valid):
        """As an uncased tokenizer does."""
        return [text.lower() for text in tokens]

    def caption(self, fused, valid, questions):
        self.shapes.add(fused.shape)
        there = [("lake" in q) == (f[..., 0].mean() < 85) for f, q in zip(fused, questions, strict=True)]
        return [
            ("103" if each else "0") if "many" in q else ("yes" if each else "no")
            for each, q in zip(there, questions, strict=True)
        ]


def test_the_decoder_answers_beside_the_others(folder, tmp_path):
    """Each image is encoded once for all of its questions; what an uncased tokenizer writes is known again."""
    for part in ("train", "val"):
        source = records.RecordSource(folder / part)
        samples = [source[i] for i in range(len(source))]
        texts = [tuple(text.replace("\tyes", "\tYes") for text in sample.texts) for sample in samples]
        kept = [slice(1 + 2 * (i % 5)) for i in range(len(samples))]  # as many questions as it happens, or none
        samples = [dataclasses.replace(s, texts=t[k]) for s, t, k in zip(samples, texts, kept, strict=True)]
        records.write(samples, tmp_path / part)
    model = Brightness(1.0)
    model.words = Writer()
    alone = vqa.compare(Brightness(1.0), Brightness(0.0), vqa.Options(str(tmp_path)))
    assert all(row["features"] != "decoder" for row in alone["rows"])
    encoded = Brightness.encode
    sizes = []
    model.encode = lambda samples: sizes.append(len(samples)) or encoded(model, samples)
    result = vqa.compare(model, Brightness(0.0), vqa.Options(str(tmp_path)))
    images = sum(result["settings"]["images"].values())
    assert sum(sizes) == 8 * (-(-images // 8) + -(-result["settings"]["images"]["test"] // 8))
    assert len(model.words.shapes) == 1
    for kind in ("presence", "count", "overall"):
        assert value(result, "decoder", kind)["accuracy"] == 1
    assert value(result, "decoder", "count, as written")["accuracy"] < 1  # it says 103 of every lake
    against = {(each["features"], each["baseline"], each["metric"]): each["difference"] for each in result["paired"]}
    for baseline in (vqa.QUESTION, vqa.MAJORITY):
        want = 1 - value(result, baseline, "overall")["accuracy"]
        assert_allclose(against["decoder", baseline, "overall"], want, atol=1e-12)
        assert any(note.startswith(f"decoder minus {baseline}, overall") for note in result["notes"])
    want = value(result, "pre-trained encoder", "overall")["accuracy"] - 1
    assert_allclose(against["pre-trained encoder", "decoder", "overall"], want, atol=1e-12)
    shown = scores.rows(result)
    assert {row.features for row in shown if not row.baseline} == {"pre-trained encoder", "decoder"}
    assert "(overall) reaches 100.0 %" in scores.summary([result])


def value(result, features, method):
    (row,) = [row for row in result["rows"] if (row["features"], row["method"]) == (features, method)]
    return row


@pytest.mark.parametrize(
    ("kind", "answer", "want"),
    [
        ("count", "0", "0"),
        ("count", "1", "between 1 and 10"),
        ("count", "10", "between 1 and 10"),
        ("count", "11", "between 11 and 100"),
        ("count", "100", "between 11 and 100"),
        ("count", "101", "between 101 and 1000"),
        ("count", "15939", "more than 1000"),
        ("few", "7", "7"),
        ("area", "0m2", "0m2"),
        ("area", "4m2", "between 0m2 and 10m2"),
        ("area", "10623m2", "more than 1000m2"),
        ("area", "152m2", "between 100m2 and 1000m2"),
        ("rural_urban", "rural", "rural"),
    ],
)
def test_answers_are_classed_as_rsvqa_classes_them(kind, answer, want):
    assert questions.classed([kind], [answer], large={"count"}) == (want,)


def test_pairs_of_words_tell_who_is_compared_with_whom():
    texts = ["more roads than forests", "more forests than roads", "more lakes than lakes"]
    bag = questions.bag_of_words(texts, np.array([True, True, False]))
    assert (bag[0] != bag[1]).any()
    words = {"more", "roads", "than", "forests", "^ more", "more roads", "roads than", "than forests", "forests $"}
    assert bag[0].sum() == len(words)
    assert bag[2].sum() == len({"more", "than", "^ more"})  # what never trained is not known


def test_accuracies_against_loops():
    """Types, their mean and all questions, of redrawn images, question by question."""
    rng = np.random.default_rng(0)
    image = np.repeat(np.arange(2, 9), rng.integers(1, 6, 7))
    kinds = [("a", "b", "c")[int(rng.integers(3))] for _ in image]
    right = rng.random(len(image)) < 0.5
    draws = vqa.image_draws(image, resamples=40, seed=3)
    got = vqa.accuracies(right, kinds, image, draws=draws)
    assert (draws[1:].sum(1) == 7).all()
    assert draws[1:].std(0)[2:].min() > 0
    for row, draw in enumerate(draws):
        counts = {kind: [0, 0] for kind in "abc"}
        for kind, hit, number in zip(kinds, right, image, strict=True):
            for _ in range(int(draw[number])):
                counts[kind][0] += int(hit)
                counts[kind][1] += 1
        shares = {kind: hits / total for kind, (hits, total) in counts.items() if total}
        for kind, share in shares.items():
            assert_allclose(got[kind][row], share)
        assert_allclose(got["average"][row], sum(shares.values()) / len(shares))
        total = [sum(each) for each in zip(*counts.values(), strict=True)]
        assert_allclose(got["overall"][row], total[0] / total[1])
    assert_allclose(got["overall"][0], right.mean())  # the first has each image once


def test_features_are_mean_spread_and_maximum_of_valid_places():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, 3, 3, 4)) - 5
    valid = rng.random((2, 3, 3)) < 0.6
    valid[1] = False
    model = types.SimpleNamespace(encode=lambda samples: {"fused": features, "fused_valid": valid})
    got = vqa.pooled(model, [None, None])
    seen = features[0][valid[0]]
    assert_allclose(got[0], np.concatenate([seen.mean(0), seen.std(0), seen.max(0)]), rtol=1e-5)
    assert (got[1] == 0).all()


def test_products_tell_what_neither_image_nor_question_tells():
    """Exclusive or: the answer is yes where the bit of the question is not that of the image."""
    rng = np.random.default_rng(0)
    images, image, question = rng.normal(size=(60, 5)).astype(np.float32), np.arange(240) % 60, rng.integers(0, 2, 240)
    labels = ((images[image, 0] > 0) != question.astype(bool)).astype(int)
    words = np.eye(2, dtype=np.float32)[question]
    trains = image < 40
    for seen, least, most in ((images, 0.85, 1.0), (None, 0.0, 0.65)):
        asked = bilinear.Asked(words, image, seen)
        choice = bilinear.choose(asked[trains], labels[trains], num_classes=2)
        said = bilinear.predict(asked[trains], labels[trains], asked[~trains], choice=choice, num_classes=2)
        assert least <= (said == labels[~trains]).mean() <= most


def test_what_sees_the_image_answers_better(result):
    for kind in ("presence", "count"):
        ours = value(result, "pre-trained encoder", kind)
        assert ours["accuracy"] > 0.95
        assert value(result, "question alone", kind)["high"] < ours["low"]
        assert value(result, "untrained encoder", kind)["accuracy"] < 0.8
        (against,) = [each for each in result["paired"] if (each["baseline"], each["metric"]) == (vqa.MAJORITY, kind)]
        assert against["low"] > 0
        assert_allclose(
            against["difference"], ours["accuracy"] - value(result, vqa.MAJORITY, kind)["accuracy"], atol=1e-12
        )
    # Which of four numbers it was cannot be known; none at all can.
    assert 0.4 < value(result, "pre-trained encoder", "count, as written")["accuracy"] < 0.85
    assert value(result, "always yes", "count")["accuracy"] == 0
    assert 0.3 < value(result, "always yes", "presence")["accuracy"] < 0.7


def test_majority_is_of_the_type_and_of_the_training_part(folder, result):
    said = {"presence": [], "count": []}
    truth = {"presence": [], "count": []}
    for part, found in (("train", said), ("val", truth)):
        source = records.RecordSource(folder / part)
        for i in range(len(source)):
            for text in source[i].texts[1:]:
                kind, _, answer = text.split("\t")
                found[kind].append({"yes": "yes", "no": "no", "0": "0"}.get(answer, "some"))
    for kind in said:
        best = max(set(said[kind]), key=said[kind].count)
        share = truth[kind].count(best) / len(truth[kind])
        assert_allclose(value(result, vqa.MAJORITY, kind)["accuracy"], share)


def test_result_is_what_table_and_report_read(result, capsys, tmp_path):
    assert result["sizes"] == {"train": 400, "val": 0, "test": 200}
    assert result["settings"]["images"] == {"train": 40, "test": 20}
    assert result["classes"] == ["0", "between 101 and 1000", "no", "yes"]
    probe.print_table(result)
    probe.append_csv(result, tmp_path / "rows.csv")
    probe.write_json(result, tmp_path / "result.json")
    assert "most common answer of the type" in capsys.readouterr().out
    assert "question alone" in scores.probe_table(result)
    assert "between 101 and 1000" in scores.class_table(result)


def test_command(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(skyjax, "load", lambda path: Brightness(1.0))
    monkeypatch.setattr(vqa, "untrained", lambda model, seed: Brightness(0.0))
    out = tmp_path / "result.json"
    asked = ["--task=vqa", f"--dataset={folder / 'train'}", f"--test-dataset={folder / 'val'}", f"--json={out}"]
    assert cli.main(["eval", f"--checkpoint={tmp_path}", *asked]) == 0
    assert "count, as written" in capsys.readouterr().out
    assert json.loads(out.read_text())["sizes"] == {"train": 400, "val": 0, "test": 200}


def test_a_text_tower_is_asked_too(folder):
    """A tower that knows nothing but the noun, and a bag of words that knows it as well."""
    asked = questions.open_questions(str(folder))
    bag = vqa._question_features(Brightness(1.0), asked)
    words = types.SimpleNamespace(encode=lambda texts: np.array([[1.0, "lake" in text] for text in texts], np.float32))
    both = vqa._question_features(types.SimpleNamespace(words=words), asked)
    assert both.shape[1] == bag.shape[1] + 2
    assert_allclose(both[:, -1] > 0, ["lake" in text for text in asked.question])
    assert_allclose(both[:, :-2].var(0).sum(), both[:, -2:].var(0).sum(), rtol=1e-4)


def test_parts(folder, tmp_path):
    asked = questions.open_questions(str(folder))
    assert asked.images == 60
    assert not set(asked.image[asked.test]) & set(asked.image[~asked.test])
    one = questions.open_questions(str(folder / "train"))
    assert len(set(one.image[one.test])) == 8  # a fifth of 40
    other = questions.open_questions(str(folder / "train"), test_path=str(folder / "val"))
    assert other.answer == asked.answer
    assert other.test.tolist() == asked.test.tolist()
    write(tmp_path / "three" / "train", range(40), 0)
    write(tmp_path / "three" / "val", range(3), 1)
    write(tmp_path / "three" / "test", range(4), 1)
    three = questions.open_questions(str(tmp_path / "three"))
    assert len(set(three.image[three.test])) == 4
    assert any("3 test images are copies" in note for note in three.notes)


def test_wrong_data_is_one_sentence(folder, sample_records, tmp_path):
    for path, words in ((tmp_path, "is not a skyjax dataset, nor a folder"), (sample_records, "has no question")):
        with pytest.raises(UserError, match=words):
            questions.open_questions(str(path))
    with pytest.raises(UserError, match="--modality=sar is not in this checkpoint"):
        vqa.compare(Brightness(1.0), Brightness(0.0), vqa.Options(str(folder), modality="sar"))


def test_one_seed_one_result(folder):
    options = dataclasses.replace(vqa.Options(str(folder)), seed=5)
    first, again = (vqa.compare(Brightness(1.0), Brightness(0.0), options) for _ in range(2))
    assert [row["accuracy"] for row in first["rows"]] == [row["accuracy"] for row in again["rows"]]
    assert first["paired"] == again["paired"]
