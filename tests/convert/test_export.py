"""`skyjax export`: each file is held to skyjax before it is put in place; its card says what strangers must know."""

import dataclasses
import json
import types

import jax
import ml_collections
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from released_files import Maker, bits, save

import skyjax
from skyjax.cli import main
from skyjax.convert import exchange, export, files, importing, model_card, trial
from skyjax.errors import UserError
from skyjax.models import skysense
from skyjax.train import loop
from skyjax.train.pretrained import Pretrained

pytestmark = pytest.mark.usefixtures("quick_compilation")


def trained(config, step=7):
    """A model of our own as if read from a checkpoint; dates and biases are not zero."""
    params = skysense.init(config.model, jax.random.key(0))
    table = skysense.init_prototypes(config.model, jax.random.key(1))
    statistics = loop.statistics_table(config.model)
    data = [list(source) for source in config.data.sources]
    return Pretrained(config, params, statistics, step, prototypes=table, data=data)


@pytest.fixture(scope="module")
def sar(tiny_config):
    """A single encoder of ours with its fusion and geo-prototypes."""
    prototypes = {"regions": 2, "count": 3, "width": 8, "momentum": 0.9, "epsilon": 0.05, "iterations": 3}
    return trained(tiny_config(modalities=("sar",), model__prototypes=prototypes | {"frozen": False}))


@pytest.fixture(scope="module")
def every(tiny_config):
    return trained(tiny_config())


@pytest.fixture
def checkpoint(sar, monkeypatch):
    """What --checkpoint=run reads."""
    load = Pretrained.load
    monkeypatch.setattr(Pretrained, "load", lambda path: sar if str(path) == "run" else load(path))
    return "run"


def listed(model):
    return model.listed()


def test_released_file_in_and_out_by_the_commands(tmp_path, capsys):
    path = save(tmp_path / "s1.pth", Maker().vit(channels=2, depth=1), None)
    assert main(["import", f"--source={path}", f"--out={tmp_path / 'folder'}"]) == 0
    words = ["export", f"--checkpoint={tmp_path / 'folder'}", "--format=skysense"]
    capsys.readouterr()
    assert main([*words, f"--out={tmp_path / 'back.pth'}", f"--json={tmp_path / 'back.json'}"]) == 0
    out, errors = capsys.readouterr()
    assert "largest error on random images with missing dates and modalities: 0.0e+00" in out
    assert "comparing" in errors
    assert bits(tmp_path / "back.pth") == bits(path)
    result = json.loads((tmp_path / "back.json").read_text())
    assert (result["error"], result["format"]) == (0, "skysense")
    card = (tmp_path / "MODEL_CARD.md").read_text()
    assert "# back.pth" in card
    assert "0.0e+00" in card
    assert "non-commercial research only" in card
    assert "| VV | – | 10 | -12.5485 | 5.25698 |" in card
    assert "in dB of sigma nought" in card


def test_safetensors_folder_is_read_back_with_everything(checkpoint, sar, tmp_path):
    export.run(checkpoint, "safetensors", tmp_path / "out")
    model = skyjax.load(tmp_path / "out")
    jax.tree.map(assert_array_equal, model.params, sar.params)
    assert_array_equal(model.prototypes, sar.prototypes)
    assert (model.step, model.statistics) == (7, sar.statistics)
    assert model.config.model.to_dict().keys() == sar.config.model.to_dict().keys()
    images = next(iter(trial.cases(sar)))
    assert trial.largest_error(trial.encoder(sar)(images), trial.encoder(model)(images)) == 0
    notes = json.loads((tmp_path / "out" / "skyjax.json").read_text())
    assert notes["format"] == 1
    assert notes["skyjax"] == skyjax.__version__
    export.run(tmp_path / "out", "safetensors", tmp_path / "again")
    for name in ("model.safetensors", "skyjax.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_the_card_of_our_own_names_data_licences_and_bands(checkpoint, sample_records, tmp_path):
    export.run(checkpoint, "safetensors", tmp_path / "out")
    card = (tmp_path / "out" / "MODEL_CARD.md").read_text()
    for words in (
        "Sentinel-1 C-band SAR",
        f"| {sample_records} | 1.0 | 24 |",
        "7 steps of 4 sites each",
        "Not stated by whoever trained it",
        "| geo-prototypes | 2² regions, 3 of width 8 |",
        'skyjax.load("out")',
    ):
        assert words in card
    assert "$" not in card


def test_our_weights_under_the_released_names(every, tmp_path):
    """All modalities: the layout of a whole checkpoint, and nothing lost but the last day of leap years."""
    export._write_skysense(every, tmp_path / "a.pth")
    tensors, _ = files.read(tmp_path / "a.pth")
    model = every.config.model
    assert tensors["ctpe"].shape == (1, 365, model.spatial_width)
    assert tensors["backbone_gep.stages.1.blocks.1.attn.w_msa.relative_coords_table"].shape == (1, 7, 7, 2)
    kernel = np.asarray(every.params["multispectral"]["patch_embed"]["kernel"])
    assert_array_equal(tensors["backbone_s2.patch_embed.projection.weight"], kernel.transpose(3, 2, 0, 1))
    with pytest.raises(UserError, match=r"3 channels, and SkySense's have 10; name them in order"):
        importing.run(tmp_path / "a.pth", tmp_path / "back")
    importing.run(tmp_path / "a.pth", tmp_path / "back", bands=["multispectral:B02,B03,B04"], heads="1")
    back = skyjax.load(tmp_path / "back")
    got, want = listed(back), listed(every)
    assert got.keys() == want.keys()
    assert_array_equal(got.pop("fusion.dates")[:365], want.pop("fusion.dates")[:365])
    for name in want:
        assert got[name].tobytes() == want[name].tobytes()
    part = back.config.model.modalities
    assert part.optical.window == model.modalities.optical.window
    assert tuple(part.optical.depths) == tuple(model.modalities.optical.depths)


def test_notes_tell_what_a_released_file_does_not(every, sar):
    notes = " ".join(export._notes_skysense(every))
    assert "31 December of leap years is left out" in notes
    assert "they are multispectral:1,sar:1,fusion:1 (skyjax import --heads=multispectral:1,sar:1,fusion:1)" in notes
    assert "Windows' padding was masked in training" in notes
    assert "The window is 4" in notes
    assert "Geo-prototypes are left out" in " ".join(export._notes_skysense(sar))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"modalities.optical.stem": "conv"}, "convolutional stem"),
        ({"modalities.optical.kind": "vit"}, "optical is a vit, and released files have a swin_v2 there"),
        ({"modalities.sar.up_factor": None}, "sar has no up-head"),
    ],
)
def test_parts_without_released_names_are_refused(change, sentence, every):
    model = ml_collections.ConfigDict(every.config.model.to_dict())
    with model.ignore_type():
        model.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=sentence):
        exchange.to_released({}, model, None)


def test_one_encoder_of_ours_has_no_prefix(tiny_config):
    config = tiny_config(modalities=("optical",))
    with config.unlocked(), config.ignore_type():
        config.model.fusion = None
    model = trained(config)
    tensors = exchange.to_released(listed(model), config.model, None)
    assert "patch_embed.projection.weight" in tensors
    assert not [name for name in tensors if name.startswith("backbone") or name == "ctpe"]


def test_a_lossy_file_is_not_put_in_place(checkpoint, tmp_path, monkeypatch):
    """The check looks at what was written, not at what was meant."""
    write = export.files.write

    def flipped(path, tensors):
        write(path, {**tensors, "ctpe": tensors["ctpe"] + 1e-7})

    monkeypatch.setattr(export.files, "write", flipped)
    with pytest.raises(RuntimeError, match=r"not lossless.*fusion\.dates"):
        export.run(checkpoint, "skysense", tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("format", "name"), [("skysense", "a.pth"), ("safetensors", "folder")])
def test_a_failed_export_leaves_the_earlier_one(format, name, checkpoint, tmp_path, monkeypatch):
    out = tmp_path / name
    export.run(checkpoint, format, out)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    broken = dataclasses.replace(export.FORMATS[format], check=lambda *_: 1 / 0)
    monkeypatch.setitem(export.FORMATS, format, broken)
    with pytest.raises(ZeroDivisionError):
        export.run(checkpoint, format, out)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_card_of_something_else_is_not_written_over(tmp_path):
    (tmp_path / "MODEL_CARD.md").write_text("# mine\n")
    assert export._beside(tmp_path / "a.pth", "# a.pth\n").name == "a.pth.MODEL_CARD.md"
    assert (tmp_path / "MODEL_CARD.md").read_text() == "# mine\n"
    (tmp_path / "MODEL_CARD.md").write_text("# a.pth\nold\n")
    assert export._beside(tmp_path / "a.pth", "# a.pth\n").name == "MODEL_CARD.md"


def test_the_error_of_the_pytorch_export_is_told(sar, monkeypatch, tmp_path):
    monkeypatch.setattr(export.pytorch, "check", lambda *_: 3e-4)
    check = export._check_pytorch(sar, tmp_path)
    assert check.error == 3e-4
    assert "largest error 3.0e-04. That is more than the usual 1e-05" in check.sentence


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--format=onix", "--out=x"], "--format=onix is not known"),
        (["--format=skysens", "--out=x"], 'did you mean "skysense"?'),
        (["--format=skysense", "--out=x.onnx"], 'must end in .pth or .safetensors, not ".onnx"'),
        (["--format=safetensors", "--out=x"], 'there is no "none"'),
    ],
)
def test_mistakes_are_one_sentence(words, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--checkpoint=none", *words]) == 2
    out, errors = capsys.readouterr()
    assert sentence in errors.splitlines()[-1]
    assert out == ""
    assert not list(tmp_path.iterdir())


def test_random_images_lack_dates_bands_pixels_and_modalities(every):
    first, second = trial.cases(every)
    assert list(first) == ["optical", "multispectral", "sar"]
    assert list(second) == ["multispectral", "sar"]
    assert not first["sar"]["valid"][0].any()
    for images in first.values():
        assert not images["valid"].all()
        assert not images["clear"].all()
        assert np.isnan(images["values"]).any()
        assert (images["days"] == trial.LEAP_DAY).any()
    assert not first["multispectral"]["bands"].all()


def test_largest_error_counts_masks_and_what_is_not_finite():
    tree = {"a": np.array([1.0, -4.0]), "valid": np.array([True]), "context": None}
    assert trial.largest_error(tree, tree) == 0
    assert trial.largest_error(tree, tree | {"a": np.array([1.0, -4.2])}) == pytest.approx(0.05)
    assert trial.largest_error(tree, tree | {"valid": np.array([False])}) == float("inf")
    assert trial.largest_error(tree, tree | {"a": np.array([1.0, np.nan])}) == float("inf")
    assert trial.largest_error(tree, tree | {"a": np.ones(3)}) == float("inf")


def test_unknown_things_are_said_to_be_unknown():
    nobody = types.SimpleNamespace(data=None)
    assert model_card._data(nobody) == "Unknown."
    assert "Not stated" in model_card._no_licence(None)
