import json
import pathlib

import numpy as np
import pytest
import sentencepiece
from numpy.testing import assert_array_equal

from skyjax.cli import main
from skyjax.errors import UserError
from skyjax.input import records
from skyjax.input.tokenizer import Tokenizer, read_texts, train_tokenizer
from skyjax.sample import Sample

ENGLISH = pathlib.Path(__file__).parents[2] / "data" / "sample" / "tokenizer" / "albert_en_30k_spiece.model"
PLACES = ("a forest", "a river", "maize fields", "a harbour with 12 ships", "Snow on Mont Blanc", "houses")
TEXTS = [f"{image} of {place}" for place in PLACES for image in ("an aerial image", "a radar image", "A picture")]
UNKNOWN = "Œuvre 地球, 117 Kühe"  # not one of its letters is in TEXTS but some


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "captions.txt"
    path.write_text("\n".join(TEXTS) + "\n\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def words(corpus):
    return train_tokenizer([corpus], 330, corpus.with_name("words.model"))


def test_every_text_comes_back(words):
    texts = [*TEXTS, UNKNOWN]
    tokens, valid = words.encode(texts, 64)
    assert tokens.dtype == np.int32
    assert tokens.shape == valid.shape == (len(texts), 64)
    assert words.decode(tokens, valid) == words.decode(tokens) == texts


def test_ids_are_sentencepieces_between_bos_and_eos(words):
    library = sentencepiece.SentencePieceProcessor(model_file=str(words.path))
    tokens, valid = words.encode([TEXTS[0], TEXTS[4]], 40)
    for row, there, text in zip(tokens, valid, (TEXTS[0], TEXTS[4]), strict=True):
        want = [words.bos, *library.encode(text), words.eos]
        assert_array_equal(row, want + [words.pad] * (40 - len(want)))
        assert_array_equal(there, np.arange(40) < len(want))
    assert (words.pad, words.bos, words.eos) == (0, 2, 3)
    assert words.size == library.vocab_size()


def test_pieces_of_one_word_stay_together(words):
    text = "a forest, UNSEEN 地球 houses"
    (tokens,), (valid,) = words.encode([text], 64)
    found = words.split(tokens[valid])
    assert [word for word, _ in found] == text.split()
    assert [place for _, places in found for place in places] == list(range(1, valid.sum() - 1))
    assert len(found[2][1]) > 1
    assert words.split(tokens[valid][:1]) == []


def test_a_long_text_keeps_its_start_and_eos(words):
    whole = words.encode(TEXTS[:1], 64)[0][0]
    tokens, valid = words.encode(TEXTS[:1], 6)
    assert_array_equal(tokens[0], [*whole[:5], words.eos])
    assert valid.all()


def test_no_text_is_no_valid_token(words):
    tokens, valid = words.encode([None, "", "  \n", "river"], 8)
    assert_array_equal(valid.any(1), [False, False, False, True])
    assert_array_equal(tokens[:3], words.pad)
    assert words.decode(tokens, valid)[:3] == ["", "", ""]


def test_pairs_score_the_answer_and_its_eos(words):
    question, answer = "is a river there?", "maize"
    tokens, valid, scored = words.encode_pairs([question, question, question * 9], [answer, None, answer], 40)
    asked, told = words.encode([question], 40)[0][0], words.encode([answer], 40)[0][0]
    asked, told = asked[: (asked != words.pad).sum()], told[1 : (told != words.pad).sum()]
    assert_array_equal(tokens[0][valid[0]], [*asked, *told])
    assert_array_equal(tokens[0][scored[0]], told)
    assert_array_equal(tokens[1][valid[1]], asked)
    assert not scored[1].any()
    assert_array_equal(tokens[2][scored[2]], told)  # what doesn't fit is of the question
    assert valid[2].all()
    assert words.decode(tokens, scored)[0] == answer


def test_training_is_the_same_twice_and_lower_case_folds(corpus, words, tmp_path):
    again = train_tokenizer([corpus], 330, tmp_path / "again.model")
    assert again.digest == words.digest
    folded = train_tokenizer([corpus], 330, tmp_path / "folded.model", lower_case=True)
    assert folded.decode(folded.encode(["A PICTURE of Snow"], 32)[0]) == ["a picture of snow"]
    folded.save(tmp_path / "copy.model")
    assert Tokenizer(tmp_path / "copy.model").digest == folded.digest


def test_an_uncased_model_without_names_for_bos_and_eos():
    english = Tokenizer(ENGLISH)
    library = sentencepiece.SentencePieceProcessor(model_file=str(ENGLISH))
    assert (english.size, english.pad) == (30_000, 0)
    assert [library.id_to_piece(i) for i in (english.bos, english.eos)] == ["[CLS]", "[SEP]"]
    tokens, valid = english.encode(["A Café in Zürich"], 16)
    assert library.unk_id() not in tokens
    assert english.decode(tokens, valid) == ["a cafe in zurich"]


def test_ids_that_a_model_lacks_are_reserved_beyond_it(corpus, tmp_path):
    path = tmp_path / "bare.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=file, vocab_size=40, bos_id=-1, eos_id=-1, minloglevel=2
        )
    bare = Tokenizer(path)
    assert (bare.pad, bare.bos, bare.eos, bare.size) == (40, 41, 42, 43)
    tokens, valid = bare.encode(TEXTS[:2], 32)
    assert tokens.max() == 42
    assert bare.decode(tokens, valid) == TEXTS[:2]


def test_texts_of_files_and_records(tmp_path, words):
    split = {"images": [{"filename": "1.png", "split": "train", "sentences": [{"raw": "a b"}, {"raw": "c"}]}]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    (tmp_path / "pairs.jsonl").write_text('{"type": "count", "question": "how many?", "answer": "3"}\n\n')
    nowhere = np.full(2, np.nan, np.float32)
    labelled = Sample({}, nowhere, labels={"class": np.array(1)}, id="1")
    records.write(
        [Sample({}, nowhere, ("told", "so")), labelled, Sample({}, nowhere, ("presence\tIs there a road?\tyes",))],
        tmp_path / "records",
        about={"label_names": {"class": ["Forest", "SeaLake"]}},
    )
    assert list(read_texts(tmp_path / "split.json")) == ["a b", "c"]
    assert list(read_texts(tmp_path / "pairs.jsonl")) == ["how many?", "3"]
    first, second, *made = read_texts(tmp_path / "records")
    assert (first, second) == ("told", "so")
    asked = made.index("Is there a road?")
    assert asked > 1
    assert all("a sea or lake" in text for text in made[:asked])
    assert made[asked + 1] == "yes"
    assert made[asked + 2 :]
    assert all("a road" in text for text in made[asked + 2 :])


def test_the_command_trains_and_tells_the_size(corpus, tmp_path, capsys):
    out = tmp_path / "new" / "words.model"
    assert main(["data", "tokenizer", f"--input={corpus}", "--vocab-size=290", f"--out={out}"]) == 0
    made = Tokenizer(out)
    assert capsys.readouterr().out == f"{out}: 290 ids, 290 asked for; SHA-256 {made.digest}\n"


def test_mistakes_are_one_sentence(tmp_path, corpus, words):
    bad = tmp_path / "bad.model"
    bad.write_text("no model")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    for path, sentence in ((tmp_path / "none.model", "No such file"), (bad, "is not a SentencePiece model")):
        with pytest.raises(UserError, match=sentence):
            Tokenizer(path)
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        Tokenizer(empty)
    with pytest.raises(UserError, match="holds no text"):
        train_tokenizer([empty], 300, tmp_path / "x.model")
    with pytest.raises(UserError, match="ask for another --vocab-size"):
        train_tokenizer([corpus], 100, tmp_path / "x.model")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match="is not the text that its name says"):
        list(read_texts(tmp_path / "broken.json"))
    with pytest.raises(UserError, match="set it to 3 or more"):
        words.encode(["a"], 2)
