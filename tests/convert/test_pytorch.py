"""The PyTorch export against skyjax, on images in which everything can be missing."""

import dataclasses
import datetime
import json
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file, save_file

from skyjax.config import load_config
from skyjax.convert import pytorch
from skyjax.errors import UserError
from skyjax.models import skysense
from skyjax.models.prototypes import region_of
from skyjax.models.resize import bicubic_matrix
from skyjax.models.resize import to_grid as jax_to_grid
from skyjax.sample import MODALITIES
from skyjax.train.loop import statistics_table
from skyjax.train.pretrained import Pretrained

torch = pytest.importorskip("torch")
SkyjaxEncoder = pytest.importorskip("skyjax.convert.pytorch.skyjax_encoder").SkyjaxEncoder

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
LONLAT = np.array([[151.2, -33.9], [np.nan, 10.0], [-180.0, 90.0]], np.float32)
PIXELS = {"optical": (21, 26), "multispectral": (7, 4), "sar": (5, 8)}
NOT_THE_MODULE = ("transformers", "skyjax", "jax", "flax")


def config(**changes):
    """The smallest model that has every part; odd depths, extra norms, an up-head on one of the sequences."""
    vit = {"kind": "vit", "width": 8, "depth": 2, "heads": 2}
    model = ml_collections.ConfigDict(
        {
            "dtype": "float32",
            "remat": "none",
            "scan": False,
            "drop_path": 0.3,
            "spatial_width": 32,
            "modalities": {
                "optical": {
                    "kind": "swin_v2",
                    "sensors": ("rgb", "aerial"),
                    "bands": ("red", "green", "blue"),
                    "stem": "patch",
                    "patch_size": 2,
                    "width": 16,
                    "depths": (3, 1),
                    "heads": (1, 2),
                    "window": 3,
                    "extra_norm_every": 2,
                    "mask_padding": True,
                },
                "multispectral": vit
                | {
                    "sensors": ("sentinel2-l2a",),
                    "bands": ("B02", "B03", "B04"),
                    "patch_size": 2,
                    "image_size": 6,
                    "up_factor": 2,
                },
                "sar": vit
                | {
                    "sensors": ("sentinel1-grd",),
                    "bands": ("VV", "VH"),
                    "patch_size": 3,
                    "image_size": 6,
                    "width": 32,
                    "up_factor": None,
                },
            },
            "fusion": {"width": 8, "depth": 2, "heads": 2},
            "prototypes": {
                "regions": 4,
                "count": 5,
                "width": 6,
                "momentum": 0.9,
                "epsilon": 0.05,
                "iterations": 3,
                "frozen": False,
            },
        },
        convert_dict=True,
    )
    model.update_from_flattened_dict(changes)
    return model


def alone(name, **changes):
    """One encoder by itself."""
    model = config(**{f"modalities.{name}.{key}": value for key, value in changes.items()})
    model.fusion = model.prototypes = None
    for other in set(model.modalities) - {name}:
        del model.modalities[other]
    return model


VARIANTS = {
    "all parts": config(),
    "convolutional stem, padding attended to, odd period": config(
        **{
            "modalities.optical.stem": "conv",
            "modalities.optical.depths": (2, 2),
            "modalities.optical.window": 4,
            "modalities.optical.mask_padding": False,
            "modalities.optical.extra_norm_every": 1,
            "prototypes": None,
        }
    ),
    "optical alone": alone("optical", depths=(1, 2), extra_norm_every=0, window=8, mask_padding=False),
    "SAR alone": alone("sar"),
    "ViT with a convolutional stem": alone("sar", stem="conv", patch_size=4, image_size=8),
}


def pretrained(model):
    shapes = jax.eval_shape(lambda key: skysense.init(model, key), jax.random.key(0))
    rng = np.random.default_rng(1)

    def parameter(path, leaf):
        # Nothing stands at a value where a mistake would not show: zero biases, unit scales.
        near = {"scale": 1.0, "logit_scale": 2.3}.get(path[-1].key, 0.0)
        return (near + 0.3 * rng.normal(size=leaf.shape)).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(parameter, shapes)
    table = None
    if model.prototypes is not None:
        table = rng.normal(size=(model.prototypes.regions**2, model.prototypes.count, model.prototypes.width))
        table = table.astype(np.float32)
    whole = ml_collections.ConfigDict({"model": model})
    return Pretrained(whole, params, statistics_table(model), 7, prototypes=table)


def random_images(model, seed=0):
    """Three sites in stored units: dates, bands, pixels and whole modalities are missing."""
    rng = np.random.default_rng(seed)
    images = {}
    for name, part in model.modalities.items():
        table = statistics_table(model)[name]
        b, t, c = 3, 3, len(part.bands)
        shape = (b, t, *PIXELS[name], c)
        values = (np.mean(table["mean"]) + np.mean(table["std"]) * rng.normal(size=shape)).astype(np.float32)
        values[rng.random(shape) < 0.02] = np.nan
        clear = rng.random(shape[:4]) < 0.8
        clear[0, 0, :3] = False
        clear[0, :, : shape[2] // 2, : shape[3] // 2] = False  # a corner that nothing has seen
        valid = rng.random((b, t)) < 0.7
        valid[0] = True
        bands = np.ones((b, c), bool)
        bands[1, -1] = False
        days = rng.integers(-3000, 20_000, (b, t)).astype(np.int32)
        days[0] = [18_627, 18_628, 11_016]  # 31 December 2020, the day after, 29 February 2000
        sensor = rng.integers(0, len(part.sensors), b).astype(np.int32)
        images[name] = {
            "values": values,
            "days": days,
            "valid": valid,
            "clear": clear,
            "sensor": sensor,
            "bands": bands,
        }
    images[name]["valid"][2] = False
    return images


def normalized(model, images):
    """By hand, a site at a time."""
    result = {}
    for name, x in images.items():
        table = statistics_table(model)[name]
        values = np.zeros(x["values"].shape, np.float32)
        for i, row in enumerate(x["sensor"]):
            mean, std = np.float32(table["mean"][row]), np.float32(table["std"][row])
            there = x["clear"][i][..., None] & x["valid"][i][:, None, None, None] & x["bands"][i]
            found = (x["values"][i] - mean) / std
            values[i] = np.where(there & np.isfinite(found), found, 0)
        result[name] = {key: value for key, value in x.items() if key != "sensor"} | {"values": values}
    return result


def quick_jit(function):
    """Compilation without optimisation: it is most of these tests' time."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def run_skyjax(model, images, grid=None):
    config = model.config.model
    apply = quick_jit(
        lambda params, table, images: skysense.apply(config, params, images, grid=grid, lonlat=LONLAT, prototypes=table)
    )
    return jax.tree.map(np.asarray, apply(model.params, model.prototypes, normalized(config, images)))


def run_torch(model, images, grid=None, lonlat=LONLAT):
    with torch.no_grad():
        return jax.tree.map(np.asarray, model(images, lonlat, grid))


def load(folder):
    return pytorch.run_file(folder / pytorch.MODULE, "export").SkyjaxEncoder.from_folder(folder)


def assert_agree(want, got, tolerance=1e-5):
    assert jax.tree.structure(want) == jax.tree.structure(got)
    for (path, wanted), given in zip(jax.tree.leaves_with_path(want), jax.tree.leaves(got), strict=True):
        name = jax.tree_util.keystr(path)
        if wanted.dtype.kind == "f":
            assert given.shape == wanted.shape, name
            assert np.abs(given - wanted).max() <= tolerance * np.abs(wanted).max(), name
        else:
            assert_array_equal(given, wanted, err_msg=name)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The model with every part and the folder of its export."""
    model = pretrained(VARIANTS["all parts"])
    folder = tmp_path_factory.mktemp("exported")
    pytorch.write(model, folder)
    return model, folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_gives_what_skyjax_gives(variant, tmp_path):
    model = pretrained(VARIANTS[variant])
    pytorch.write(model, tmp_path)
    images = random_images(model.config.model)
    want = run_skyjax(model, images)
    assert_agree(want, run_torch(load(tmp_path), images))
    assert want["fused_valid"].any()
    assert not want["fused_valid"].all()


def test_fewer_modalities_on_another_grid(exported):
    model, folder = exported
    images = random_images(model.config.model, seed=1)
    del images["multispectral"]
    assert_agree(run_skyjax(model, images, (9, 4)), run_torch(load(folder), images, (9, 4)))


def test_what_is_not_given_is_all_there(exported):
    model, folder = exported
    images = {"sar": random_images(model.config.model)["sar"]}
    images["sar"]["values"] = np.nan_to_num(images["sar"]["values"])
    short = {"sar": {key: images["sar"][key] for key in ("values", "days")}}
    ones = {key: np.ones_like(images["sar"][key]) for key in ("valid", "clear", "bands")}
    whole = {"sar": images["sar"] | ones | {"sensor": np.zeros(3, np.int32)}}
    encoder = load(folder)
    assert_agree(run_torch(encoder, whole), run_torch(encoder, short))


def test_what_it_cannot_take_is_named(exported):
    _, folder = exported
    encoder = load(folder)
    values, days = np.zeros((1, 1, 4, 4, 3), np.float32), np.zeros((1, 1), np.int32)
    with pytest.raises(ValueError, match="optical, multispectral, sar"):
        encoder({"radar": {"values": values, "days": days}})
    with pytest.raises(ValueError, match=r"\(1, 1, 4, 4, 3\).* VV, VH"):
        encoder({"sar": {"values": values, "days": days}})
    with pytest.raises(ValueError, match=r"\(1, 4, 4, 3\)"):
        encoder({"optical": {"values": values[0], "days": days}})


def test_stored_types_are_taken_as_they_are(exported):
    _, folder = exported
    encoder = load(folder)
    rng = np.random.default_rng(0)
    values = rng.integers(0, 10_000, (2, 1, 4, 4, 3)).astype(np.uint16)
    days = np.zeros((2, 1), np.int32)
    stored = run_torch(encoder, {"multispectral": {"values": values, "days": days}}, lonlat=None)
    floats = run_torch(encoder, {"multispectral": {"values": np.float32(values), "days": days}}, lonlat=None)
    assert_agree(floats, stored)


def test_without_its_table_there_is_no_context(exported, tmp_path):
    model, _ = exported
    pytorch.write(dataclasses.replace(model, prototypes=None), tmp_path)
    assert run_torch(load(tmp_path), random_images(model.config.model))["context"] is None


def test_gradients_are_those_of_skyjax(exported):
    model, folder = exported
    config, images = model.config.model, random_images(model.config.model, seed=2)
    inputs = normalized(config, images)
    rng = np.random.default_rng(3)
    weights = {
        name: rng.normal(size=x.shape).astype(np.float32)
        for name, x in run_torch(load(folder), images).items()
        if name in ("fused", "context", "pooled")
    }

    def loss(params):
        out = skysense.apply(config, params, inputs, lonlat=LONLAT, prototypes=model.prototypes)
        return sum(jnp.sum(out[name] * weight) for name, weight in weights.items())

    gradient = quick_jit(jax.grad(loss))(model.params)
    want = pytorch.state_dict(dataclasses.replace(model, params=gradient))
    encoder = load(folder)
    out = encoder(images, LONLAT)
    sum((out[name] * torch.tensor(weight)).sum() for name, weight in weights.items()).backward()
    got = {name: parameter.grad.numpy() for name, parameter in encoder.named_parameters()}
    assert got.keys() == want.keys() - {"prototypes.table"}
    for name, given in got.items():
        # Softmax takes no notice of a key's bias: its gradient is nothing but rounding.
        scale = 0.1 if name.endswith("key.bias") else np.abs(want[name]).max()
        assert scale > 1e-3, name
        assert np.abs(given - want[name]).max() <= 1e-4 * scale, name


def test_bfloat16_runs_and_keeps_its_statistics(exported):
    model, folder = exported
    images = random_images(model.config.model)
    encoder = load(folder)
    want = run_torch(encoder, images)
    with torch.no_grad():
        got = encoder.to(torch.bfloat16)(images, LONLAT)
    assert got["fused"].dtype == torch.bfloat16
    assert got["pooled"].dtype == torch.float32
    # Each rounding is 0.4 %, and there are some tens of them in a row.
    difference = (got["context"].float().numpy() - want["context"])[want["fused_valid"]]
    assert 0 < np.sqrt(np.mean(difference**2)) < 0.05 * want["context"].std()


def test_stochastic_depth_acts_in_training_alone(exported):
    model, folder = exported
    encoder, images = load(folder), random_images(model.config.model)
    quiet = encoder(images)["fused"]
    torch.manual_seed(0)
    first, second = (encoder.train()(images)["fused"] for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(encoder.eval()(images)["fused"], quiet)


def test_it_compiles_as_one_graph(exported):
    model, folder = exported
    encoder, images = load(folder), jax.tree.map(torch.as_tensor, random_images(model.config.model))
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(images)["context"], encoder(images)["context"])


def test_the_mean_of_stochastic_depth_is_the_branch():
    module = pytorch.run_file(pytorch.HERE / pytorch.MODULE, "export")
    torch.manual_seed(0)
    dropped = module.drop_path(torch.ones(20_000, 2), 0.3, True)
    assert set(dropped.unique().tolist()) == {0.0, float(torch.tensor(1) / 0.7)}
    assert torch.equal(dropped[:, 0], dropped[:, 1])
    assert abs(dropped.mean() - 1) < 0.02


def test_cosines_are_scaled_by_100_at_most():
    module = pytorch.run_file(pytorch.HERE / pytorch.MODULE, "export")
    attention = module.WindowAttention(8, 2, 2, True)
    x = torch.randn(1, 4, 4, 8)
    results = []
    for scale in (99, 100, 1000):
        torch.nn.init.constant_(attention.logit_scale, np.log(scale))
        results.append(attention(x, 0))
    assert torch.equal(results[1], results[2])
    assert not torch.equal(results[0], results[1])


def test_resampling_is_that_of_jax():
    module = pytorch.run_file(pytorch.HERE / pytorch.MODULE, "export")
    features = np.random.default_rng(0).normal(size=(1, 2, 5, 7, 3)).astype(np.float32)
    cases = ((5, 7), (3, 2)), ((4.5, 6.25), (11, 9)), ((4.2, 7), (5, 3))
    wanted = quick_jit(lambda x: [jax_to_grid(x, *case) for case in cases])(features)
    for case, want in zip(cases, wanted, strict=True):
        assert_allclose(module.to_grid(torch.tensor(features), *case), want, atol=1e-6)


def test_position_resize_is_that_of_skyjax():
    table = torch.randn(1, 1, 6, 6)
    want = bicubic_matrix(6, 9) @ table[0, 0].numpy() @ bicubic_matrix(6, 4).T
    assert_allclose(torch.nn.functional.interpolate(table, (9, 4), mode="bicubic")[0, 0], want, atol=1e-6)


def test_day_of_year_is_the_calendars():
    module = pytorch.run_file(pytorch.HERE / pytorch.MODULE, "export")
    days = np.arange(-40_000, 60_000, 7)
    epoch = datetime.date(1970, 1, 1)
    want = [(epoch + datetime.timedelta(int(day))).timetuple().tm_yday - 1 for day in days]
    assert module.day_of_year(torch.tensor(days)).tolist() == want


def test_regions_are_those_of_skyjax():
    module = pytorch.run_file(pytorch.HERE / pytorch.MODULE, "export")
    rng = np.random.default_rng(0)
    lonlat = np.float32([rng.uniform(-400, 400, 500), rng.uniform(-95, 95, 500)]).T
    lonlat[:4] = [[180, 0], [-180, -90], [np.nan, 3], [0, 90]]
    prototypes = module.Prototypes(4, {"regions": 8, "count": 1, "width": 64})
    # Bank `r` is the unit vector `r`, so that what is found names its region.
    prototypes.table = torch.eye(64)[:, None]
    prototypes.out = torch.nn.Identity()
    with torch.no_grad():
        found = prototypes(torch.zeros(500, 1, 1, 4), lonlat)[:, 0, 0, 4:]
    got = torch.where(found.sum(-1) > 0, found.argmax(-1), -1)
    assert_array_equal(got, region_of(jnp.asarray(lonlat), 8))


def test_loading_is_strict(exported, tmp_path):
    _, folder = exported
    weights = load_file(folder / "model.safetensors")
    del weights["fusion.dates"]
    for name in ("config.json", pytorch.MODULE):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"fusion\.dates"):
        load(tmp_path)


def test_check_measures_the_written_files(tmp_path):
    sequences = config(**{"modalities.multispectral.depth": 1, "modalities.sar.depth": 1})
    del sequences.modalities["optical"]
    model = pretrained(sequences)
    pytorch.write(model, tmp_path)
    assert 0 < pytorch.check(model, tmp_path) <= 1e-5
    weights = load_file(tmp_path / "model.safetensors")
    weights["sar.layers.0.norm1.bias"] = weights["sar.layers.0.norm1.bias"] + 0.01
    save_file(weights, tmp_path / "model.safetensors")
    assert pytorch.check(model, tmp_path) > 1e-4


def test_pytorch_is_needed_for_the_check_alone(exported, tmp_path, monkeypatch):
    model, _ = exported
    monkeypatch.setitem(sys.modules, "torch", None)
    pytorch.write(model, tmp_path)
    with pytest.raises(UserError, match=r"pip install torch==2\.13\.0"):
        pytorch.check(model, tmp_path)


def run_elsewhere(program, folder, *arguments, **environment):
    """A program that has nothing of skyjax but the export."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)], cwd=folder, env=environment, check=True
    )


BLOCK = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {NOT_THE_MODULE}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
"""


def test_the_module_needs_torch_and_safetensors_alone(exported, tmp_path):
    model, folder = exported
    images = {"sar": random_images(model.config.model)["sar"]}
    images["sar"] = {key: images["sar"][key] for key in ("values", "days", "valid")}
    save_file(images["sar"], tmp_path / "images.safetensors")
    run_elsewhere(
        BLOCK
        + textwrap.dedent("""
        folder, elsewhere = sys.argv[1:]
        sys.path.insert(0, folder)
        import torch
        from safetensors.torch import load_file, save_file
        from skyjax_encoder import SkyjaxEncoder
        model = SkyjaxEncoder.from_folder(folder)
        assert not model.training
        with torch.inference_mode():
            out = model({"sar": load_file(elsewhere + "/images.safetensors")})
        save_file({"fused": out["fused"]}, elsewhere + "/out.safetensors")
        """),
        tmp_path,
        folder,
        tmp_path,
    )
    got = load_file(tmp_path / "out.safetensors")["fused"]
    assert_array_equal(got, run_torch(load(folder), images, lonlat=None)["fused"])


def test_transformers_loads_saves_and_loads_again(exported, tmp_path):
    model, folder = exported
    images = random_images(model.config.model)["sar"]
    save_file({key: images[key] for key in ("values", "days", "valid")}, tmp_path / "images.safetensors")
    run_elsewhere(
        """
        import sys, warnings
        import torch
        from safetensors.torch import load_file
        from transformers import AutoModel
        folder, elsewhere = sys.argv[1:]
        images = {"sar": load_file(elsewhere + "/images.safetensors")}
        model = AutoModel.from_pretrained(folder, trust_remote_code=True)
        assert type(model).__name__ == "SkyjaxModel" and not model.training
        again = elsewhere + "/again"
        model.save_pretrained(again)
        second = AutoModel.from_pretrained(again, trust_remote_code=True)
        sys.path.insert(0, again)
        from skyjax_encoder import SkyjaxEncoder
        third = SkyjaxEncoder.from_folder(again)
        half = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
        assert half.dtype == torch.bfloat16
        with torch.inference_mode():
            fused = [m(images, torch.zeros(3, 2))["context"] for m in (model, second, third)]
            assert torch.equal(fused[0], fused[1]) and torch.equal(fused[0], fused[2])
            assert half(images)["pooled"].isfinite().all()
        model(images)["pooled"].sum().backward()
        """,
        tmp_path,
        folder,
        tmp_path,
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path / "cache"),
    )
    exported, saved = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "again"))
    assert exported.keys() == saved.keys()
    for name, array in exported.items():
        assert_array_equal(saved[name], array)


def test_all_files_are_as_readable_as_any(exported, tmp_path):
    _, folder = exported
    (tmp_path / "any").touch()
    modes = {path.name: path.stat().st_mode for path in folder.iterdir() if path.is_file()}
    assert set(modes) == {pytorch.MODULE, pytorch.WRAPPER, "config.json", "model.safetensors"}
    assert set(modes.values()) == {(tmp_path / "any").stat().st_mode}


def test_config_names_what_the_weights_are(exported):
    model, folder = exported
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "skyjax"
    assert config["statistics"]["multispectral"]["bands"] == ["B02", "B03", "B04"]
    assert config["statistics"]["optical"]["sensors"] == ["rgb", "aerial"]
    assert_array_equal(config["statistics"]["sar"]["mean"], model.statistics["sar"]["mean"])


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.py")))
def test_it_is_made_of_every_shipped_config(name):
    """Its keys that tell how training starts and computes included."""
    model = load_config(CONFIGS / name).model
    with torch.device("meta"):
        encoder = SkyjaxEncoder({"model": model.to_dict(), "statistics": statistics_table(model)})
    assert encoder.modalities == tuple(m for m in MODALITIES if m in model.modalities)
