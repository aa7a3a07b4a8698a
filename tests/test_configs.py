"""The shipped configs: every key is there, every parameter has its rules, and SkySense has the paper's sizes."""

import math
import pathlib
import re
import subprocess
import sys

import jax
import pytest
from jax.sharding import AbstractMesh

from skyjax.config import keys, load_config
from skyjax.errors import UserError
from skyjax.models.parameters import PAPER, parts
from skyjax.parallel import flops
from skyjax.parallel.mesh import AXES
from skyjax.parallel.sharding import SMALL, state_shardings
from skyjax.train import plan as plans
from skyjax.train import state as states

ROOT = pathlib.Path(__file__).parents[1]
SKYSENSE = ROOT / "configs" / "skysense.py"
SIZES = ("tiny", "small", "base", "large", "huge")


@pytest.fixture(scope="module", params=SIZES)
def sized(request):
    """Name, config and abstract state of each size."""
    config = load_config(SKYSENSE, [f"size={request.param}"])
    return request.param, config, states.abstract(config)


@pytest.fixture(scope="module")
def huge():
    """The abstract state of the default size."""
    return states.abstract(load_config(SKYSENSE))


def counts(state):
    lines = parts(state["params"]["encoder"], state["params"]["heads"], state["prototypes"])
    return {line.name: line.count for line in lines}


def test_huge_has_the_published_sizes(huge):
    found = counts(huge)
    assert found == found | {
        "optical": 655_074_704,
        "multispectral": 302_738_432,
        "sar": 302_607_360,
        "up_heads/multispectral": 46_182_400,
        "up_heads/sar": 46_182_400,
        "fusion": 305_195_008,
        "fusion/dates": 365 * 2816 + 2816,  # the leap day is our own
        "prototypes/table (state)": 4096 * 100 * 512,
        "encoder with prototypes": 1_870_824_848,
    }
    assert huge["params"]["encoder"]["fusion"]["dates"].shape == (366, 2816)
    assert huge["prototypes"].shape == (4096, 100, 512)
    # Heads are ours: the paper's 189 M of "others" have no names.
    assert found["total"] == found["encoder with prototypes"] + found["heads"] == 2_038_165_905
    assert found["total"] == pytest.approx(2.06e9, rel=0.05)


def test_what_the_paper_rounds_is_near(huge):
    found = counts(huge)
    units = {"M": 1e6, "B": 1e9}
    for name, text in PAPER.items():
        number, unit = re.match(r"([\d.]+) ([MB])", text).groups()
        # Geo-prototypes: 215 M is the paper's own number, the width of 512 our reading of it.
        tolerance = {"geo-prototypes": 0.02, "heads": 0.15, "total": 0.05}.get(name, 0.003)
        assert found[name] == pytest.approx(float(number) * units[unit], rel=tolerance), name


def test_every_size_has_every_key(sized):
    name, config, _ = sized
    assert config.size == name
    every = {key for key in keys(load_config(ROOT / "configs" / "pretrain_sample.py")) if ".statistics" not in key}
    assert every - set(keys(config)) == set()


@pytest.mark.parametrize("shape", [(2, 16, 2), (1, 64, 1)])
def test_every_array_has_a_place(sized, shape):
    """The optimizer's rules are checked as the abstract state is made."""
    mesh = AbstractMesh(shape, AXES)
    for leaf, sharding in zip(*map(jax.tree.leaves, (sized[2], state_shardings(sized[2], mesh))), strict=True):
        own = math.prod(sharding.shard_shape(leaf.shape))
        assert own * mesh.shape["fsdp"] <= leaf.size or leaf.size * leaf.dtype.itemsize < SMALL, leaf.shape


def test_an_unknown_size_names_those_there_are():
    with pytest.raises(UserError, match=r'size "medium" is not known; it is one of tiny, small, base, large, huge$'):
        load_config(SKYSENSE, ["size=medium"])


# The peak of a process that pytest starts can only be read from inside: getrusage's begins at pytest's own.
DRY_RUN = """
import pathlib, re, sys
from skyjax.cli import main
assert main(["train", "--config=" + sys.argv[1], "--dry-run", "--workdir=nowhere"]) == 0
print("peak", re.search("VmHWM:[^0-9]+([0-9]+)", pathlib.Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads the peak of memory as Linux tells it")
def test_a_dry_run_of_huge_takes_little_memory(tmp_path):
    words = [sys.executable, "-c", DRY_RUN, str(SKYSENSE)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\n= encoder with prototypes +1,870,824,848 ", done.stdout)
    assert re.search(r"\n= total +2,038,165,905 .* 2\.06 B\n", done.stdout)
    assert int(re.search(r"peak (\d+)", done.stdout)[1]) < 1.5 * 2**20  # KiB; the parameters alone take 8 GB
    assert not list(tmp_path.iterdir())


def test_the_documented_table_is_what_the_code_counts(sized):
    name, config, state = sized
    found = counts(state)
    view = sum(flops.encoder(config.model, flops.view_images(config)["global"][1]).values())
    line = next(x for x in (ROOT / "docs" / "models.md").read_text().splitlines() if x.startswith(f"| {name} |"))
    columns = ("optical", "multispectral", "sar", "fusion with up-heads and dates", "geo-prototypes")
    millions = [f"{found[column] / 1e6:.1f}" for column in (*columns, "encoder with prototypes", "heads", "total")]
    want = [name, *millions, f"{view / 1e9:,.0f}", f"{flops.model_flops(config) / 1e12:.1f}"]
    assert [cell.strip() for cell in line.strip("|").split("|")] == want


def test_time_series_takes_every_set_that_is_there(tmp_path):
    path = ROOT / "configs" / "time_series.py"
    config = load_config(path, [f"records={tmp_path}"])
    assert {pathlib.Path(folder).parent for folder, _ in config.data.sources} == {tmp_path}
    names = {pathlib.Path(folder).name: share for folder, share in config.data.sources}
    assert all((ROOT / "data" / f"{name}.py").is_file() for name in names)
    # Each builder of dated multispectral or radar images; treesatai knows but the year, flair2 is optical.
    assert set(names) == {
        *("triples", "worldcereal", "worldcereal_pixels", "worldcereal_monthly", "cropharvest", "biomassters"),
        *("pastis", "benv2", "bigearthnet", "terramesh"),
    }
    for name in ("pastis", "triples"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dataset.json").write_text("{}")
    some = {
        pathlib.Path(folder).name: share for folder, share in load_config(path, [f"records={tmp_path}"]).data.sources
    }
    assert some == pytest.approx({"triples": 2 / 3, "pastis": 1 / 3})
    assert sum(names.values()) == pytest.approx(1)


def test_time_series_has_every_key_and_every_parameter_its_rules():
    config = load_config(ROOT / "configs" / "time_series.py")
    every = {key for key in keys(load_config(ROOT / "configs" / "pretrain_sample.py")) if "optical" not in key}
    assert every - set(keys(config)) == set()
    encoder = states.abstract(config)["params"]["encoder"]  # refuses a parameter that no rule or that two rules name
    assert encoder["fusion"]["dates"].shape == (366, 48)


def test_image_text_of_plain_images_of_one_s_own():
    path = ROOT / "configs" / "image_text.py"
    config = load_config(path, ["modalities=optical", "pixels=96", "sources=a/train,b"])
    assert config.data.sources == (("a/train", 0.5), ("b", 0.5))
    assert list(config.model.modalities) == ["optical"]
    assert (config.model.modalities.optical.patch_size, config.data.global_views.size.optical) == (16, 96)
    assert config.objective.text.streams == ("fused",)  # which are the optical ones
    batch = plans.abstract_batch(config, 4)
    assert batch["global"]["optical"]["values"].shape == (4, 2, 1, 96, 96, 3)
    assert set(batch["global"]) == {"to_view", "optical"}
    states.abstract(config)
    with pytest.raises(UserError, match='size "huge" is not known; it is one of small, base'):
        load_config(path, ["size=huge"])
