import json
import pathlib
import shutil
import sys

import numpy as np
import pytest
import sacrebleu

from skyjax.errors import UserError
from skyjax.evals import caption_scores

EXAMPLE = json.loads(pathlib.Path(__file__).with_name("caption_example.json").read_text())
OTHER_NAMES = {"Bleu_1": "BLEU-1", "Bleu_2": "BLEU-2", "Bleu_3": "BLEU-3", "Bleu_4": "BLEU-4", "ROUGE_L": "ROUGE-L"}
SAID = [image["said"] for image in EXAMPLE["images"]]
TOLD = [image["told"] for image in EXAMPLE["images"]]

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="METEOR and the PTB tokenizer are Java programs")


@pytest.fixture(scope="module")
def scores():
    return caption_scores.score({"model": SAID}, TOLD)["model"]


@pytest.fixture(scope="module")
def tokenized():
    return caption_scores.tokenize([[*told, said] for said, told in zip(SAID, TOLD, strict=True)])


@needs_java
def test_scores_are_those_of_the_package_by_its_own_evaluation(scores):
    """The values beside the example were written without skyjax, by write_caption_example.py."""
    for theirs, value in EXAMPLE["scores"].items():
        assert scores[OTHER_NAMES.get(theirs, theirs)].value == pytest.approx(value, rel=1e-9)
    for i, image in enumerate(EXAMPLE["images"]):
        for theirs, value in image["scores"].items():
            assert scores[OTHER_NAMES.get(theirs, theirs)].each[i] == pytest.approx(value, rel=1e-9, abs=1e-12)


@needs_java
def test_bleu_is_also_sacrebleu(scores, tokenized):
    said = [every[-1] for every in tokenized]
    most = max(map(len, tokenized)) - 1
    told = [[every[n] if n < len(every) - 1 else None for every in tokenized] for n in range(most)]
    for n in (1, 2, 3, 4):
        judge = sacrebleu.BLEU(tokenize="none", smooth_method="none", max_ngram_order=n, force=True)
        want = judge.corpus_score(said, told).score / 100
        assert scores[f"BLEU-{n}"].value == pytest.approx(want, rel=1e-6)


@needs_java
def test_word_for_word_is_after_tokenizing(scores):
    """One caption of the eight is one of people's; blanks, letters and full stops do not count."""
    assert scores["word for word"].value == 1 / 8
    assert caption_scores.tokenize([["A  field, (here)!"], ["a field -lrb- here -rrb-"]])[0] == [
        "a field -lrb- here -rrb-"
    ]


@needs_java
def test_intervals_hold_the_value(scores):
    for name, score in scores.items():
        assert score.low <= score.value <= score.high, name
        assert score.low < score.high, name


@needs_java
def test_what_would_break_the_protocol_is_taken_out():
    """An empty caption, a line's end within one, METEOR's own separator, letters beyond ASCII."""
    found = caption_scores.tokenize([["", "a field\nof\r rape\u2028seed", " . "], ["été|||à la plage", "50° N"]])
    assert found[0] == ["nothing", "a field of rape seed", "nothing"]
    assert "|||" not in found[1][0]
    assert found[1][0].startswith("été")
    assert found[1][1] == "50 ° n"


def test_bleu_of_drawn_counts_is_bleu_of_drawn_captions():
    """The interval's draws against sacrebleu on the captions drawn, each as often as it is."""
    rng = np.random.default_rng(0)
    said = [" ".join(rng.choice(list("abcd"), rng.integers(4, 9))) for _ in range(6)]
    told = [[" ".join(rng.choice(list("abcd"), rng.integers(4, 9))) for _ in range(2)] for _ in range(6)]
    times = np.array([0, 2, 1, 0, 3, 1])
    found = caption_scores._bleu(told, [[text] for text in said], times[None])
    drawn = np.repeat(np.arange(6), times)
    for n in (1, 2):
        judge = sacrebleu.BLEU(tokenize="none", smooth_method="none", max_ngram_order=n, force=True)
        want = judge.corpus_score([said[i] for i in drawn], [[told[i][r] for i in drawn] for r in range(2)]).score / 100
        assert found[f"BLEU-{n}"].low == pytest.approx(want, rel=1e-6)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"needs Java, which is not found.*install a Java runtime"):
        caption_scores.check_tools()
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(UserError, match=r"skyjax\[captions\]"):
        caption_scores.check_tools()
