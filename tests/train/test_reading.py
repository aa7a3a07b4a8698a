"""A run with words: one modality, captions of 24 sites; trained, resumed, loaded, started from, with adapters."""

import dataclasses
import json

import jax
import ml_collections
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import skyjax
from skyjax.convert import export
from skyjax.errors import UserError
from skyjax.input import records
from skyjax.input.loader import Loader, open_source
from skyjax.input.texts import questions_of
from skyjax.input.tokenizer import train_tokenizer
from skyjax.train import loop, plan, words_file
from skyjax.train import state as states

TEXTS = {
    0: ("a forest by a river", "trees and water"),
    1: ("presence\tIs there a tree?\tno",),
    2: (),
}
LENGTH = 32
DECAYS = ((r".*/(bias|scale|positions|dates|extra_token|class_token|logit_scale|temperature|table|lora_[ab])", 0.0),)


@pytest.fixture(scope="module")
def config(tiny_config, add_words, sample_records, tmp_path_factory):
    """Sites of one modality; two of three have texts."""
    folder = tmp_path_factory.mktemp("words")
    corpus = folder / "captions.txt"
    corpus.write_text("\n".join(text.replace("\t", " ") for texts in TEXTS.values() for text in texts * 20))
    tokenizer = train_tokenizer([corpus], 330, folder / "words.model")
    sites = [
        dataclasses.replace(sample, texts=TEXTS[number % 3])
        for number, sample in enumerate(records.RecordSource(sample_records))
    ]
    records.write([site for site in sites if "sar" in site.sequences], folder / "records")
    config = tiny_config(modalities=("sar",), steps=4, data__local_views__count=0)
    add_words(config, tokenizer, LENGTH)
    with config.unlocked():
        config.data.sources = ((str(folder / "records"), 1.0),)
        config.optimizer.weight_decay_multipliers = (*DECAYS, (r".*/(kernel|classes)", 1.0))
    return config


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    assert loop.train(config, workdir) == 0
    return workdir


@pytest.fixture(scope="module")
def model(run):
    return skyjax.load(run)


def test_a_batch_is_what_plans_take_it_for_and_holds_the_words_of_its_samples(config):
    loader = Loader(config)
    batch = next(loader)
    told = plan.abstract_batch(config, config.batch_size)["text"]
    jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype) or pytest.fail("shapes"), batch["text"], told)
    seen = set()
    for _ in range(6):
        tokens, there, written = (batch["text"][name] for name in ("tokens", "valid", "written"))
        for row in range(config.batch_size):
            captions = tuple(loader.tokenizer.decode(tokens[row], there[row]))
            assert (batch["text"]["words"][row][0] == batch["text"]["words"][row][1]) == (captions[0] == captions[1])
            answer = written["tokens"][row][written["counted"][row]]
            seen.add((frozenset(captions), loader.tokenizer.decode(answer[None])[0]))
        batch = next(loader)
    loader.close()
    captions = frozenset(TEXTS[0])
    assert {(captions, text) for text in captions} <= seen
    assert any(text == "no" and all("no tree" in caption for caption in captions) for captions, text in seen)
    assert any(not any(texts) for texts, _ in seen)


def test_questions_are_texts_with_tabs():
    assert questions_of(("a forest", "q?\ta", "count\thow many?\t3")) == (("q?", "a"), ("how many?", "3"))


def test_every_term_of_words_is_logged_and_moves_its_parameters(run, model, config):
    (*_, last) = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    assert {"loss/text/sar", "loss/text/fused", "loss/words", "loss/caption"} <= last.keys()
    fresh = states.init_params(config, jax.random.key(config.seed))
    for name in ("text", "decoder"):
        before, after = leaves(fresh[name]), leaves(model.words.params[name])
        still = {path for path, value in before.items() if np.array_equal(value, after[path])}
        assert all(path.endswith("key/bias") for path in still), still  # they have no gradient


def test_vectors_captions_answers_and_looks(model, config):
    sites = open_source(config.data.sources[0][0])
    output = model.encode([sites[0]])
    vectors = model.words.encode(["a forest by a river", "", "trees and water"], batch_size=2)
    assert_allclose(model.encode_text(["a forest by a river", "", "trees and water"]), vectors, atol=1e-6)
    assert_allclose(np.linalg.norm(vectors, axis=1), [1, 0, 1], atol=1e-5)
    assert_allclose(np.linalg.norm(model.words.project("fused", output["pooled"]), axis=1), 1, atol=1e-5)
    with pytest.raises(UserError, match="optical"):
        model.words.project("optical", output["pooled"])
    assert model.words.kind == "sigmoid"
    assert 0.01 <= model.words.temperature <= 1
    one, other = (
        model.words.caption(output["fused"], output["fused_valid"], "beam", beams=2, questions=[question])
        for question in ("Is there a tree?", "Is there a river by the forest?")
    )
    assert isinstance(one[0], str)
    assert isinstance(other[0], str)
    with pytest.raises(UserError, match="greedy"):
        model.words.caption(output["fused"], output["fused_valid"], "best")
    ((pieces, shares),) = model.words.look(output["fused"], output["fused_valid"], ["trees and water"], 2)
    assert len(pieces) == len(shares)
    assert_allclose(shares.sum((1, 2)), 1, rtol=1e-5)


def test_a_run_does_not_go_on_with_another_tokenizer(run, config, tmp_path):
    corpus = tmp_path / "other.txt"
    corpus.write_text("\n".join(f"field number {i}" for i in range(50)))
    train_tokenizer([corpus], 290, tmp_path / "other.model")
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
        changed.data.text.tokenizer = str(tmp_path / "other.model")
    with pytest.raises(UserError, match="not the tokenizer that this run began with"):
        loop.train(changed, run)


def test_a_second_stage_starts_from_the_first_and_leaves_what_is_frozen(run, model, config, tmp_path):
    second = config.copy_and_resolve_references()
    with second.unlocked():
        second.seed = 5
        second.steps = 2
        second.optimizer.teacher_momentum = second.optimizer.final_teacher_momentum = 0.0
        second.start = ml_collections.ConfigDict({"checkpoint": str(run), "parameters": "(encoder|text)/.*"})
        second.lora = ml_collections.ConfigDict({"targets": r"text/.*/(query|value)/kernel", "rank": 2, "scale": 2.0})
        second.optimizer.learning_rate_multipliers = (("(encoder|heads|decoder)/.*", 1.0), ("text/.*lora_[ab]", 1.0))
        frozen = (r"text/.*(?<!lora_[ab])", 0.0)
        second.optimizer.learning_rate_multipliers = (*second.optimizer.learning_rate_multipliers, frozen)
    assert loop.train(second, tmp_path / "second") == 0
    later = skyjax.load(tmp_path / "second")
    before, after = (leaves(m.words.params["text"]) for m in (model, later))
    assert before.keys() == after.keys()
    for path, value in before.items():
        # The teacher is an average: of equal numbers too it is equal but for rounding.
        moved = np.abs(value - after[path]).max() > 1e-6
        assert moved == path.endswith(("query/kernel", "value/kernel")), path
    # An export has the adapters in its kernels, and reads without knowing of them.
    export.run(tmp_path / "second", "safetensors", tmp_path / "weights")
    again = skyjax.load(tmp_path / "weights")
    assert not [name for name in words_file.listed(again.words) if "lora" in name]
    jax.tree.map(assert_array_equal, again.words.params, later.words.params)
    texts = ["trees and water", "a forest"]
    assert_array_equal(again.words.encode(texts), later.words.encode(texts))
    assert np.abs(again.words.encode(texts) - model.words.encode(texts)).max() > 1e-4


def leaves(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(tree)}


def test_what_cannot_be_taken_over_is_named(run, config, tmp_path):
    wrong = config.copy_and_resolve_references()
    with wrong.unlocked():
        wrong.start = ml_collections.ConfigDict({"checkpoint": str(run), "parameters": "encoders/.*"})
    with pytest.raises(UserError, match="matches no parameter"):
        loop.train(wrong, tmp_path / "none")
    with wrong.unlocked():
        wrong.start.parameters = "text/.*"
        wrong.model.text.width = 32
    with pytest.raises(UserError, match="other shapes: text/"):
        loop.train(wrong, tmp_path / "wide")


def test_samples_without_text_are_masked_out(config):
    """The loader gives them rows without a token."""
    loader = Loader(config)
    batches = [next(loader)["text"] for _ in range(5)]
    loader.close()
    missing = np.concatenate([~batch["valid"].any((1, 2)) for batch in batches])
    assert missing.any()
    assert_array_equal(np.concatenate([batch["written"]["counted"].any(1) for batch in batches])[missing], False)
