"""Words in exports: the whole text side in a weights folder, tower and projections in PyTorch."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file, save_file
from test_pytorch import BLOCK, run_elsewhere

import skyjax
from skyjax.cli import main
from skyjax.convert import export, pytorch, trial
from skyjax.errors import UserError
from skyjax.input.tokenizer import train_tokenizer
from skyjax.train import loop
from skyjax.train import state as states
from skyjax.train.pretrained import Pretrained
from skyjax.train.words import Words

pytestmark = pytest.mark.usefixtures("quick_compilation")

LENGTH = 24
VARIANTS = {
    "sees both ways, last token": ({"causal": False, "pool": "last"}, "sigmoid", False),
    "causal, mean": ({"causal": True, "pool": "mean", "depth": 2}, "softmax", True),
    "learned query": ({"causal": False, "pool": "query"}, "softmax", True),
}


@pytest.fixture(scope="module")
def make(tiny_config, add_words, tmp_path_factory):
    """A function: a name of VARIANTS -> a model with words whose parameters are nowhere 0 or 1."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "texts.txt").write_text("\n".join(text for text in trial.TEXTS if text) * 9)

    def made(variant):
        tower, kind, lower = VARIANTS[variant]
        tokenizer = train_tokenizer([folder / "texts.txt"], 300, folder / f"{lower}.model", lower_case=lower)
        config = add_words(tiny_config(modalities=("sar",)), tokenizer, LENGTH, kind=kind)
        with config.unlocked():
            config.model.text.update(tower)
        rng = np.random.default_rng(0)
        params = jax.tree.map(
            lambda x: (x + 0.2 * rng.normal(size=x.shape)).astype(np.float32),
            states.init_params(config, jax.random.key(0)),
        )
        towers = {name: params[name] for name in ("text", "decoder")}
        words = Words(config, towers, params["heads"]["image_text"], tokenizer)
        tables, data = loop.statistics_table(config.model), [list(source) for source in config.data.sources]
        return Pretrained(config, params["encoder"], tables, 7, data=data, words=words)

    return made


@pytest.fixture(scope="module")
def model(make):
    return make("sees both ways, last token")


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """A weights folder, written as the command writes it."""
    out = tmp_path_factory.mktemp("weights") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pretrained, "load", lambda path: skyjax_load(path) if str(path) != "run" else model)
        assert main(["export", "--checkpoint=run", "--format=safetensors", f"--out={out}", f"--json={out}.json"]) == 0
    return out


skyjax_load = Pretrained.load


def test_a_weights_folder_has_the_whole_text_side(model, folder, tmp_path):
    result = json.loads(folder.with_name("out.json").read_text())
    assert result["words"] == sum(x.size for x in jax.tree.leaves((model.words.params, model.words.head)))
    back = skyjax.load(folder)
    assert_array_equal(back.words.encode(trial.TEXTS), model.words.encode(trial.TEXTS))
    rng = np.random.default_rng(1)
    fused, valid = rng.normal(size=(2, 2, 2, 16)).astype(np.float32), np.ones((2, 2, 2), bool)
    assert back.words.streams == model.words.streams
    for stream in model.words.streams:
        want = model.words.project(stream, fused[:, 0, 0])
        assert np.abs(want).max() > 0.1
        assert_array_equal(back.words.project(stream, fused[:, 0, 0]), want)
    asked = ["a forest?", "a river?"]
    assert back.words.caption(fused, valid, questions=asked) == model.words.caption(fused, valid, questions=asked)
    for got, want in zip(*(each.words.look(fused, valid, asked, 2) for each in (back, model)), strict=True):
        assert got[0] == want[0]
        assert_array_equal(got[1], want[1])
    assert (back.words.temperature, back.words.bias) == (model.words.temperature, model.words.bias)
    export.run(folder, "safetensors", tmp_path / "again")
    for name in ("model.safetensors", "words.safetensors", "tokenizer.model", "skyjax.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_a_folder_without_words_is_one_of_an_encoder(folder, tmp_path):
    """As they were written before there were words in them: the config tells of a text tower all the same."""
    for name in ("model.safetensors", "skyjax.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    notes = json.loads((folder / "skyjax.json").read_text())
    del notes["words"]
    (tmp_path / "skyjax.json").write_text(json.dumps(notes))
    assert skyjax.load(tmp_path).words is None


def drop(name):
    def damage(folder):
        tensors = load_file(folder / "words.safetensors")
        del tensors[name]
        save_file(tensors, folder / "words.safetensors")

    return damage


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "words.safetensors").unlink(), r'words\.safetensors" cannot be read'),
        (lambda folder: (folder / "tokenizer.model").unlink(), r'tokenizer\.model" cannot be read'),
        (drop("decoder.layers.0.cross.key.kernel"), r"missing: decoder\.layers\.0\.cross\.key\.kernel"),
        (drop("heads.image_text.streams.fused.kernel"), r"missing: heads\.image_text\.streams\.fused\.kernel"),
        (lambda folder: (folder / "skyjax.json").write_text(changed(folder, words=1)), "of another kind"),
        (lambda folder: (folder / "skyjax.json").write_text(changed(folder, words="0" * 64)), "is not the tokenizer"),
    ],
)
def test_damage_is_one_sentence(damage, sentence, folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage(tmp_path)
    with pytest.raises(UserError, match=sentence):
        skyjax.load(tmp_path)


def changed(folder, **values):
    return json.dumps(json.loads((folder / "skyjax.json").read_text()) | values)


def test_card_and_notes_tell_of_words(model, folder, tmp_path, capsys):
    card = (folder / "MODEL_CARD.md").read_text()
    for words in (
        "a text tower that fused, sar met and a decoder that writes",
        'model.words.project("fused", features)',
        "| text tower | width 16, depth 1, heads 2, vocabulary",
        "captions were made of its labels",
    ):
        assert words in card
    assert "Text tower, projections to words and decoder are left out" in " ".join(export._notes_skysense(model))
    assert "decoder is left out" in " ".join(export._notes_pytorch(model))
    assert export._notes_pytorch(dataclasses.replace(model, words=None)) == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_pytorch_gives_the_vectors_of_skyjax(variant, make, tmp_path):
    model = make(variant)
    pytorch.write(model, tmp_path)
    assert 0 < pytorch.check(model, tmp_path) <= 1e-5
    module = pytorch.run_file(tmp_path / pytorch.MODULE, "export")
    words = module.SkyjaxWords.from_folder(tmp_path)
    got, want = words.encode(trial.TEXTS).detach().numpy(), model.words.encode(trial.TEXTS)
    assert_allclose(got, want, atol=1e-5)
    assert_allclose(np.linalg.norm(got, axis=1), [1, 1, 0, 1, 1], atol=1e-5)
    assert np.abs(got[0] - got[1]).max() > 0.05
    assert (words.kind, words.temperature, words.bias) == (
        model.words.kind,
        model.words.temperature,
        model.words.bias,
    )
    assert tuple(words.streams) == model.words.streams


def test_the_check_of_pytorch_looks_at_words(model, tmp_path):
    pytorch.write(model, tmp_path)
    weights = load_file(tmp_path / "words.safetensors")
    for name in ("text.layers.0.feed_forward.up.weight", "streams.sar.weight"):
        save_file(weights | {name: weights[name] + 0.01}, tmp_path / "words.safetensors")
        assert pytorch.check(model, tmp_path) > 1e-4


def test_the_command_tells_what_pytorch_gets(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Pretrained, "load", lambda path: model)
    assert main(["export", "--checkpoint=run", "--format=pytorch", f"--out={tmp_path / 'out'}"]) == 0
    out = capsys.readouterr().out
    count = sum(x.size for x in load_file(tmp_path / "out" / "words.safetensors").values())
    assert f"{count:,} of words, as pytorch" in out
    assert "on a few texts: largest error" in out
    assert "The decoder is left out" in out
    card = (tmp_path / "out" / "MODEL_CARD.md").read_text()
    assert 'SkyjaxWords.from_folder("out")' in card


def test_pytorch_needs_nothing_of_skyjax(model, tmp_path):
    pytorch.write(model, tmp_path / "folder")
    images = next(iter(trial.cases(model)))["sar"]
    save_file({"values": images["values"], "days": images["days"]}, tmp_path / "images.safetensors")
    (tmp_path / "texts.json").write_text(json.dumps(trial.TEXTS))
    run_elsewhere(
        BLOCK
        + """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from safetensors.torch import load_file, save_file
from skyjax_encoder import SkyjaxEncoder, SkyjaxWords
words = SkyjaxWords.from_folder(sys.argv[1])
with torch.inference_mode():
    out = SkyjaxEncoder.from_folder(sys.argv[1])({"sar": load_file("images.safetensors")})
    found = {"texts": words.encode(json.load(open("texts.json"))), "images": words.images(out)}
save_file(found, "found.safetensors")
try:
    words.images(out, "optical")
except ValueError as error:
    assert "fused, sar" in str(error)
else:
    raise AssertionError
""",
        tmp_path,
        tmp_path / "folder",
    )
    found = load_file(tmp_path / "found.safetensors")
    assert_allclose(found["texts"], model.words.encode(trial.TEXTS), atol=1e-5)
    assert found["images"].shape == (2, 8)
    assert_allclose(np.linalg.norm(found["images"], axis=1), 1, atol=1e-5)


def test_a_model_without_texts_has_no_words_in_pytorch(model, tmp_path):
    pytorch.write(dataclasses.replace(model, words=None), tmp_path)
    assert not (tmp_path / "words.safetensors").exists()
    module = pytorch.run_file(tmp_path / pytorch.MODULE, "export")
    with pytest.raises(ValueError, match="trained without texts"):
        module.SkyjaxWords.from_folder(tmp_path)
