"""The probes with words on a run that was trained with texts, by the commands that users give."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

import skyjax
from skyjax import cli
from skyjax.evals import answering
from skyjax.input import records
from skyjax.input.tokenizer import train_tokenizer
from skyjax.train import loop

pytestmark = pytest.mark.usefixtures("quick_compilation")

TEXTS = (
    ("a forest by a river", "trees and water", "presence\tIs there a tree?\tyes"),
    ("a town with many roads", "presence\tIs there a tree?\tno", "presence\tIs there a road?\tyes"),
)
LENGTH = 24


@pytest.fixture(scope="module")
def run(tiny_config, add_words, sample_records, tmp_path_factory):
    """A workdir after one step, and sites of one modality with captions and a class."""
    folder = tmp_path_factory.mktemp("words")
    corpus = folder / "captions.txt"
    corpus.write_text("\n".join(text.replace("\t", " ") for texts in TEXTS for text in texts * 20))
    tokenizer = train_tokenizer([corpus], 300, folder / "words.model")
    sites = [
        dataclasses.replace(sample, texts=TEXTS[number % 2], labels={"class": np.array(number % 2)})
        for number, sample in enumerate(records.RecordSource(sample_records))
        if "sar" in sample.sequences
    ]
    # One number of dates: each is a shape that is compiled.
    first = {name: slice(1) for name in ("values", "days", "valid", "clear")}
    for number, site in enumerate(sites):
        sequence = site.sequences["sar"]
        parts = {name: getattr(sequence, name)[one] for name, one in first.items()}
        sites[number] = dataclasses.replace(site, sequences={"sar": dataclasses.replace(sequence, **parts)})
    records.write(sites, folder / "records", about={"label_names": {"class": ["Forest", "Town"]}})
    config = tiny_config(modalities=("sar",), steps=1, data__local_views__count=0)
    add_words(config, tokenizer, LENGTH, captions=1, from_labels=0, kind="softmax")
    with config.unlocked():
        config.data.sources = ((str(folder / "records"), 1.0),)
        config.objective.weights.update({"pixel": 0, "object": 0})
        config.optimizer.weight_decay_multipliers = ((".*", 0.0),)
    loop.train(config, folder / "run", report=lambda workdir: workdir)
    return folder / "run", folder / "records"


def evaluate(run, task, *more):
    workdir, dataset = run
    out = workdir.parent / f"{task}.json"
    words = (f"--checkpoint={workdir}", f"--task={task}", f"--dataset={dataset}", f"--json={out}", *more)
    assert cli.main(["eval", *words]) == 0
    return json.loads(out.read_text())


@pytest.mark.parametrize("modality", ["fused", "sar"])
def test_retrieval(run, modality):
    result = evaluate(run, "retrieval", f"--modality={modality}", "--hash-bits=8")
    assert len(result["rows"]) == 2 * 7
    assert [row["rotation"] for row in result["hashing"]["codes"]] == ["random", "learned (ITQ)"]
    assert all(0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1 for row in result["rows"])


def test_zero_shot(run):
    result = evaluate(run, "zero_shot", "--label=class", "--split=all")
    assert result["classes"] == ["Forest", "Town"]
    assert sum(map(sum, result["confusion"])) == result["sizes"]["test"]


@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR is a Java program")
def test_captions(run):
    result = evaluate(run, "captions", "--decode=beam")
    assert len(result["said"]) == result["sizes"]["test"]
    assert {row["method"] for row in result["rows"]} >= {"BLEU-1", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"}


def test_questions(run):
    """The decoder's row is there by itself, and each answer is to its own image and question."""
    result = evaluate(run, "vqa")
    assert {row["method"] for row in result["rows"] if row["features"] == "decoder"} == {
        "presence",
        "average",
        "overall",
    }
    model, source = skyjax.load(run[0]), records.RecordSource(run[1])
    samples = [source[0], source[1]]
    asked = [["Is there a tree?"], ["How many roads are there?", "a river " * 30]]
    output = model.encode(samples)
    want = [
        [model.words.caption(output["fused"][[i]], output["fused_valid"][[i]], questions=[each])[0] for each in every]
        for i, every in enumerate(asked)
    ]
    assert answering.by_decoder(model, model.words, [])(samples, asked) == want
    assert len({text for every in want for text in every}) > 1
    assert all(text for every in want for text in every)  # also where the question alone is longer than a row


def test_the_report_shows_where_words_look(run):
    """After retrieval: probe.json holds its pictures."""
    evaluate(run, "retrieval")
    assert cli.main(["report", f"--workdir={run[0]}"]) == 0
    page = (run[0] / "report.html").read_text()
    assert "Where words look" in page
    assert "Image to text, worst" in page  # there are more images than the best show; of four texts none may be left
