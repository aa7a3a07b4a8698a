"""`skyjax import`: released files of any size come in without a config, and what is wrong with one is said."""

import json
import os
import pickle
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from released_files import Maker, bits, buffers, save, under

from skyjax.cli import main
from skyjax.convert import exchange, files, importing
from skyjax.errors import UserError
from skyjax.train import weights


def imported(path, out, **options):
    result = importing.run(path, out, **options)
    return result, weights.load(out)


def exported(folder, path):
    """The released file again."""
    found = weights.load(folder)
    files.write(path, exchange.to_released(found.listed, found.config.model, found.source))
    return path


@pytest.fixture(scope="module")
def whole():
    return Maker().whole(optical={"every": 2, "all_norms": True})


@pytest.fixture
def path(whole, tmp_path):
    return save(tmp_path / "skysense.pth", whole)


def test_sizes_are_read_from_the_weights(tmp_path):
    maker = Maker()
    tensors = maker.whole(
        optical={"width": 12, "depths": (1, 3, 5), "heads": (1, 2, 3), "every": 3, "patch": 2, "window": 6},
        multispectral={"width": 256, "depth": 1, "patch": 2, "side": 3},
        sar={"width": 8, "depth": 3, "patch": 8, "side": 2},
        fusion={"width": 320, "depth": 1},
        factor=2,
    )
    result, found = imported(save(tmp_path / "a.safetensors", tensors), tmp_path / "out")
    model = found.config.model
    optical, multispectral, sar = (model.modalities[m] for m in ("optical", "multispectral", "sar"))
    assert (optical.kind, optical.patch_size, optical.width, optical.window) == ("swin_v2", 2, 12, 6)
    assert (tuple(optical.depths), tuple(optical.heads), optical.extra_norm_every) == ((1, 3, 5), (1, 2, 3), 3)
    assert optical.mask_padding is False
    assert (multispectral.width, multispectral.depth, multispectral.heads) == (256, 1, 4)
    assert (multispectral.patch_size, multispectral.image_size, multispectral.up_factor) == (2, 6, 2)
    assert (sar.width, sar.depth, sar.heads, sar.patch_size, sar.image_size) == (8, 3, 4, 8, 16)
    assert (model.fusion.width, model.fusion.depth, model.fusion.heads, model.spatial_width) == (320, 1, 5, 48)
    assert result["equal_tensors"] == len(tensors)


def test_usual_sizes_where_the_weights_tell_nothing(path, tmp_path):
    result, found = imported(path, tmp_path / "out")
    assert found.config.model.modalities.optical.window == 8
    told = importing.describe(result)
    assert "Window: 8, as released; change it by --window=" in told
    assert "multispectral 4, sar 4, fusion 4 (width / 64, or 4 below a width of 256" in told
    assert "Epsilon of the layer norms, which files do not tell: swin_v2 1e-05, vit 1e-06, fusion 1e-05." in told
    assert "31 December of leap years is a copy of 31 December" in told


def test_options_go_before_the_usual(path, tmp_path):
    _, found = imported(path, tmp_path / "out", heads="fusion:2,8", window=4)
    model = found.config.model
    assert (model.modalities.optical.window, model.fusion.heads, model.modalities.sar.heads) == (4, 2, 8)


def test_statistics_are_those_that_skysense_publishes(path, tmp_path):
    _, found = imported(path, tmp_path / "out")
    optical, sar = found.statistics["optical"], found.statistics["sar"]
    np.testing.assert_allclose(optical["mean"], [np.multiply((0.485, 0.456, 0.406), 255)] * len(optical["sensors"]))
    np.testing.assert_allclose(optical["std"], [np.multiply((0.229, 0.224, 0.225), 255)] * len(optical["sensors"]))
    np.testing.assert_allclose(sar["mean"], [[-12.54847273, -20.19237134]], rtol=1e-6)
    bands = ["B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12"]
    assert found.statistics["multispectral"]["bands"] == bands
    assert found.statistics["multispectral"]["mean"][0][4] == pytest.approx(2194.6423161)
    assert found.statistics["multispectral"]["std"][0][9] == pytest.approx(1343.48379601)


@pytest.mark.parametrize("end", [".pth", ".safetensors"])
@pytest.mark.parametrize("container", ["model", "state_dict", None])
def test_whole_files_come_back_bit_for_bit(whole, tmp_path, end, container):
    path = save(tmp_path / f"source{end}", whole, container)
    imported(path, tmp_path / "out")
    want, got = bits(path), bits(exported(tmp_path / "out", tmp_path / f"back{end}"))
    assert got == want
    assert list(got) == list(want)


PARTS = {
    "optical": lambda m: m.swin(depths=(1, 3), every=2, window=8),
    "multispectral": lambda m: m.vit(),
    "sar": lambda m: m.vit(channels=2),
}


@pytest.mark.parametrize("modality", PARTS)
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_files_of_one_encoder(modality, prefix, tmp_path):
    maker = Maker()
    tensors = under(prefix, PARTS[modality](maker) | {"mask_token": maker(1, 1, 8)})
    if modality == "multispectral":
        tensors["ctpe"] = maker(1, 365, 16)
    path = save(tmp_path / "one.pth", tensors, None)
    result, found = imported(path, tmp_path / "out")
    model = found.config.model
    assert list(model.modalities) == [modality]
    assert model.fusion is None
    assert model.modalities[modality].get("up_factor") is None
    assert f"{prefix}mask_token" in result["carried"]
    assert ("ctpe" in result["carried"]) == (modality == "multispectral")
    assert bits(exported(tmp_path / "out", tmp_path / "back.pth")) == bits(path)


def test_one_encoder_under_the_prefix_of_a_whole_file(tmp_path):
    maker = Maker()
    for number, tensors in enumerate(
        (
            under("backbone_s1.", maker.vit(channels=2)),
            under("backbone_s2.", maker.vit())
            | under("head_s2.", maker.up_head(spatial=12))
            | {"ctpe": maker(1, 365, 12)},
            under("backbone_hr.", maker.swin()) | under("fusion.", maker.fusion(spatial=16)),
        )
    ):
        path = save(tmp_path / f"{number}.pth", tensors)
        imported(path, tmp_path / "out")
        assert bits(exported(tmp_path / "out", tmp_path / "back.pth")) == bits(path)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_member_of_the_family_comes_back_bit_for_bit(data, tmp_path):
    draw = data.draw
    maker = Maker(dtype=draw(st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16])))
    vit = st.fixed_dictionaries(
        {
            "width": st.sampled_from([4, 8]),
            "depth": st.integers(1, 3),
            "patch": st.sampled_from([2, 4]),
            "side": st.integers(1, 4),
        }
    )
    depths = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    heads = tuple(draw(st.sampled_from([1, 2, 4])) for _ in depths)
    optical = {"width": 4, "depths": depths, "heads": heads, "every": draw(st.integers(0, 3))}
    optical |= {"window": draw(st.sampled_from([None, 2, 8, 9])), "all_norms": draw(st.booleans())}
    tensors = maker.whole(
        optical=draw(st.sampled_from([optical, optical, False])),
        multispectral=draw(st.one_of(vit, vit, st.just(False))),
        sar=draw(vit),
        fusion={"width": draw(st.sampled_from([4, 8])), "depth": draw(st.integers(1, 2))},
        factor=draw(st.integers(1, 2)),
        rows=draw(st.sampled_from([0, 365, 366])),
        mask_token=draw(st.booleans()),
        prefix=draw(st.sampled_from(["backbone_gep.", "backbone_hr."])),
    )
    names = draw(st.permutations(list(tensors)))
    path = save(tmp_path / "a.pth", {name: tensors[name] for name in names})
    imported(path, tmp_path / "out")
    want, got = bits(path), bits(exported(tmp_path / "out", tmp_path / "b.pth"))
    assert list(got) == list(want)
    assert got == want


def test_buffers_that_we_build_are_not_kept(tmp_path):
    path = save(tmp_path / "a.pth", Maker().swin(window=8))
    _, found = imported(path, tmp_path / "out")
    assert found.source["tensors"] == {}
    assert any(name.endswith("relative_position_index") for name in found.source["keys"])


def drop(*names):
    return lambda tensors: {name: value for name, value in tensors.items() if name not in names}


def add(**new):
    return lambda tensors: tensors | {name.replace("__", "."): np.zeros((2, 2), np.float32) for name in new}


def without(prefix):
    return lambda tensors: {name: value for name, value in tensors.items() if not name.startswith(prefix)}


def reshaped(name, *shape, dtype=np.float32):
    return lambda tensors: tensors | {name: np.zeros(shape, dtype)}


WRONG = {
    "missing": (
        drop("backbone_s2.layers.0.ln1.weight", "fusion.cls_token"),
        "2 missing: backbone_s2.layers.0.ln1.weight, fusion.cls_token",
    ),
    "a layer of those between": (
        without("backbone_s1.layers.0."),
        "12 missing: backbone_s1.layers.0.attn.attn.in_proj_bias",
    ),
    "left over": (
        add(backbone_gep__head=1, trainer=1),
        "2 left over: backbone_gep.head, trainer",
    ),
    "a norm between": (
        lambda t: t | {f"backbone_gep.stages.1.blocks.0.norm3.{end}": np.zeros(16, np.float32) for end in ("weight",)},
        "missing: backbone_gep.stages.0.blocks.0.norm3.bias",
    ),
    "an enormous number": (add(fusion__layers__999999999__ln1__weight=1), "1 left over: fusion.layers.999999999.ln1"),
    "no fusion": (without("fusion."), '"fusion.*", which joins them, is missing'),
    "no head": (without("head_s2."), '"head_s2.decoder.0.weight" and ".bias", which go between, are missing'),
    "no encoder before a head": (without("backbone_s2."), 'and the encoder before it, "backbone_s2.*", is missing'),
    "two optical encoders": (lambda t: t | under("backbone_hr.", Maker().swin()), 'twice, under "backbone_gep."'),
    "shape": (
        reshaped("backbone_s2.layers.1.ln2.weight", 9),
        "shapes that do not fit the others: backbone_s2.layers.1.ln2.weight (9,) instead of (8,)",
    ),
    "axes": (reshaped("fusion.porj_linear.weight", 9), "it must have 2 axes"),
    "type": (reshaped("ctpe", 1, 365, 16, dtype="f8"), "types other than float32, float16, bfloat16: ctpe float64"),
    "days": (reshaped("ctpe", 1, 364, 16), "it must be (1, 365, width)"),
    "head": (reshaped("head_s1.decoder.0.weight", 40, 8, 1, 1), "must be a square times"),
    "positions": (reshaped("backbone_s1.pos_embed", 1, 16, 8), "they must be one and a square grid"),
    "channels": (
        reshaped("backbone_s2.patch_embed.projection.weight", 8, 7, 4, 4),
        "multispectral has 7 channels, and SkySense's have 10; name them in order: --bands=multispectral:",
    ),
    "patches": (reshaped("backbone_s2.patch_embed.projection.weight", 8, 10, 4, 2), "square ones are supported"),
    "nothing of SkySense": (lambda t: {"conv1.weight": np.zeros(3, np.float32)}, "holds no part of SkySense"),
    "a segmentor": (
        lambda t: under("backbone.", Maker().swin()) | {"decode_head.weight": np.zeros(3, np.float32)},
        "1 left over: decode_head.weight",
    ),
    "a fusion alone": (lambda t: Maker().fusion(), "a fusion alone, which encodes nothing"),
    "a head alone": (lambda t: Maker().up_head(), "an up-head alone, which encodes nothing"),
    "a head alone with its prefix": (lambda t: under("head_s2.", Maker().up_head()), "no encoder"),
    "a table of another rule": (
        reshaped("backbone_gep.stages.0.blocks.0.attn.w_msa.relative_coords_table", 1, 15, 15, 2),
        "pretrained_window_sizes other than 0 are not supported",
    ),
    "two windows": (
        lambda t: t
        | {f"backbone_gep.stages.{i}.blocks.0.attn.w_msa.relative_coords_table": buffers(4 + i)["relative_coords_table"]
           for i in range(2)},
        "stages have windows of 4, 5; a model of skyjax has one for all stages",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_one_sentence(wrong, whole, tmp_path, capsys):
    change, sentence = WRONG[wrong]
    path = save(tmp_path / "a.safetensors", change(dict(whole)))
    assert main(["import", f"--source={path}", f"--out={tmp_path / 'out'}"]) == 2
    out, errors = capsys.readouterr()
    assert sentence in errors
    assert errors.splitlines()[-1].startswith("skyjax: ")
    assert out == ""
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--heads=3"], "3 heads do not share a width of 8"),
        (["--heads=optical:4"], '"optical" is not one of multispectral, sar, fusion'),
        (["--heads=four"], '"four" is not a number of heads'),
        (["--window=1"], "a window has 2 cells a side or more"),
        (["--bands=red,green"], "write MODALITY:BAND,BAND"),
        (["--bands=sentinel2:B02"], '"sentinel2" is neither a modality nor a sensor; did you mean "sentinel2-l2a"?'),
        (["--bands=optical:red", "--bands=rgb:red"], "the bands of optical are given twice"),
        (["--bands=optical:purple"], 'band "purple" is not known'),
    ],
)
def test_wrong_options_are_one_sentence(options, sentence, path, tmp_path, capsys):
    assert main(["import", f"--source={path}", f"--out={tmp_path / 'out'}", *options]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_four_optical_channels_are_red_green_blue_nir(tmp_path):
    path = save(tmp_path / "a.pth", Maker().swin(channels=4))
    _, found = imported(path, tmp_path / "out")
    assert found.statistics["optical"]["bands"] == ["red", "green", "blue", "nir"]
    row = found.statistics["optical"]["sensors"].index("aerial")
    assert found.statistics["optical"]["mean"][row][3] == found.statistics["optical"]["mean"][row][0]


def test_other_channels_are_named_by_the_user(tmp_path):
    path = save(tmp_path / "a.pth", Maker().vit(channels=3))
    with pytest.raises(UserError, match="an encoder of 3 channels"):
        importing.run(path, tmp_path / "out")
    _, found = imported(path, tmp_path / "out", bands=["landsat8-9:B2,B3,B10"])
    table = found.statistics["multispectral"]
    assert (table["sensors"], table["bands"]) == (["landsat8-9"], ["B2", "B3", "B10"])
    assert bits(exported(tmp_path / "out", tmp_path / "back.pth")) == bits(path)
    with pytest.raises(UserError, match="3 channels and --bands names 2"):
        importing.run(path, tmp_path / "out", bands=["landsat8-9:B2,B3"])


def test_bands_of_a_known_file_are_adapted_by_name(whole, path, tmp_path):
    result, found = imported(path, tmp_path / "out", bands=["multispectral:B04,B02"])
    assert tuple(found.config.model.modalities.multispectral.bands) == ("B04", "B02")
    assert found.source["adapted"] == ["multispectral"]
    kernel = found.listed["multispectral.patch_embed.kernel"]
    released = whole["backbone_s2.patch_embed.projection.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_allclose(kernel / kernel[0, 0, :1, :1] * released[0, 0, 2, 0], released[:, :, [2, 0]], rtol=1e-5)
    assert result["equal_tensors"] == len(whole) - 1
    again = bits(exported(tmp_path / "out", tmp_path / "back.pth"))
    want = bits(path)
    assert {name for name in want if again[name] != want[name]} == {"backbone_s2.patch_embed.projection.weight"}


def test_safetensors_need_no_torch_and_pth_says_so(whole, path, tmp_path, monkeypatch):
    other = save(tmp_path / "a.safetensors", whole)
    monkeypatch.setitem(sys.modules, "torch", None)
    imported(other, tmp_path / "out")
    exported(tmp_path / "out", tmp_path / "back.safetensors")
    assert safetensors.numpy.load_file(tmp_path / "back.safetensors").keys() == whole.keys()
    with pytest.raises(UserError, match=r"torch is not installed: pip install torch==2\.13\.0"):
        importing.run(path, tmp_path / "out")


class Evil:
    """A pickle that makes a folder when it is run."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("how", ["beside", "as the whole", "plain pickle"])
def test_pickles_are_not_run(how, whole, tmp_path):
    trap, path = tmp_path / "trap", tmp_path / "a.pth"
    if how == "beside":
        save(path, dict(list(whole.items())[:3]), meta=Evil(trap))
    elif how == "as the whole":
        import torch

        torch.save(Evil(trap), path)
    else:
        path.write_bytes(pickle.dumps({"model": Evil(trap)}))
    with pytest.raises(UserError, match=r"holds more than tensors|cannot be read"):
        importing.run(path, tmp_path / "out")
    assert not trap.exists()
    pickle.loads(pickle.dumps(Evil(trap)))
    assert trap.exists()  # so it would have done


def test_what_stands_beside_the_tensors_is_named(whole, tmp_path):
    path = save(tmp_path / "a.pth", whole, epoch=3, args={"lr": 0.1})
    result = importing.run(path, tmp_path / "out")
    assert "Beside the tensors, dropped: epoch, args" in importing.describe(result)


def test_files_that_claim_more_than_they_hold_are_refused(tmp_path):
    import torch

    path = tmp_path / "a.pth"
    torch.save({"model": {"wide": torch.zeros(1).expand(10**6, 10**6)}}, path)
    with pytest.raises(UserError, match='"wide" claims to be larger than what the file holds'):
        importing.run(path, tmp_path / "out")
    torch.save({"model": {"wide": torch.zeros(10**6)}}, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    with pytest.raises(UserError, match="would unfold to more than its own size"):
        importing.run(tmp_path / "bomb.pth", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("none.pth", None, "there is no file"),
        ("a.onnx", b"x", 'ends in ".onnx"'),
        ("a.pth", b"x" * 100, "cannot be read|holds more"),
        ("a.safetensors", b"x" * 100, "cannot be read"),
        ("a.safetensors", b"\xff" * 16, "cannot be read"),
    ],
)
def test_damaged_and_strange_files(name, content, sentence, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        importing.run(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_prints_and_writes_json(path, tmp_path, capsys):
    words = ["import", f"--source={path}", f"--out={tmp_path / 'out'}", f"--json={tmp_path / 'r' / 'a.json'}"]
    assert main(words) == 0
    assert main(words) == 0  # an earlier import is replaced
    out, errors = capsys.readouterr()
    assert "tensors equal the file's in every bit" in out
    assert "backbone_gep.mask_token" in out
    assert "Reading" in errors
    result = json.loads((tmp_path / "r" / "a.json").read_text())
    assert result["tensors"] == result["equal_tensors"]
    assert result["parts"][0]["prefix"] == "backbone_gep."


def test_a_folder_of_something_else_is_not_touched(path, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds something else"):
        importing.run(path, tmp_path / "mine")
    with pytest.raises(UserError, match="is a file; name a folder"):
        importing.run(path, path)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_a_failed_import_leaves_the_earlier_one(whole, path, tmp_path, monkeypatch):
    imported(path, tmp_path / "out")
    before = {entry.name: entry.read_bytes() for entry in (tmp_path / "out").iterdir()}

    def no_room(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save", no_room)
    with pytest.raises(UserError, match="No space left on device; is the disk full"):
        importing.run(path, tmp_path / "out")
    assert {entry.name: entry.read_bytes() for entry in (tmp_path / "out").iterdir()} == before
    assert not [entry for entry in tmp_path.iterdir() if "partial" in entry.name]
