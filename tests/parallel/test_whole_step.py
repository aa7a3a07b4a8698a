"""The whole step on eight devices is that of one, however the mesh divides batch, parameters and widths."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import whole_step
from numpy.testing import assert_allclose, assert_array_equal

from skyjax.config import to_json

ONE = "1x1x1"
# All three kinds of splitting in one; each alone takes as long to compile.
QUICK, SLOW = ("2x2x2",), ("8x1x1", "1x8x1", "1x1x8")
TOLERANCE = 1e-5

# Every axis that a rule splits can be split by 8, and every part is there: three modalities, fusion of two layers under
# a scan, geo-prototypes that move, all levels, alignment and spread. Local views take the same way as global ones.
CHANGES = {
    "batch_size": 16,
    "data__local_views__count": 0,
    # Rounding of a score is divided by its temperature: at a fiftieth the last bits of gradients would be noise.
    "objective__teacher_temperature": (0.5, 0.5),
    "objective__student_temperature": 0.5,
    "objective__alignment__temperature": 0.5,
    "model__modalities__optical__depths": (1, 1),
    "model__modalities__optical__heads": (2, 2),
    "model__modalities__multispectral__heads": 2,
    "model__modalities__sar__heads": 2,
    "model__fusion__heads": 2,
    "model__fusion__depth": 2,
    "model__prototypes": {
        "regions": 8,
        "count": 8,
        "width": 16,
        "momentum": 0.9,
        "epsilon": 0.05,
        "iterations": 3,
        "frozen": False,
    },
}


def compute(config, folder, meshes):
    """Mesh -> path -> array."""
    (folder / "config.json").write_text(to_json(config))
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, str(pathlib.Path(whole_step.__file__)), str(folder / "config.json"), str(folder)]
    done = subprocess.run([*command, *meshes], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {mesh: dict(np.load(folder / f"{mesh}.npz")) for mesh in meshes}


@pytest.fixture(scope="module")
def config(tiny_config):
    return tiny_config(**CHANGES)


@pytest.fixture(scope="module")
def quick(config, tmp_path_factory):
    return compute(config, tmp_path_factory.mktemp("quick"), (ONE, *QUICK))


@pytest.fixture(scope="module")
def slow(config, tmp_path_factory):
    return compute(config, tmp_path_factory.mktemp("slow"), (ONE, *SLOW))


def check(found, mesh):
    one, many = found[ONE], found[mesh]
    assert one.keys() == many.keys()
    for path in (path for path in one if path.startswith("born/")):
        assert_array_equal(many[path], one[path], err_msg=path)

    gradients = {path: x for path, x in one.items() if path.startswith("after/optimizer/gradients/")}
    norm = np.sqrt(sum(np.sum(np.float64(x) ** 2) for x in gradients.values()))
    for path, want in one.items():
        if path.startswith(("born/", "metrics/")):
            continue
        floor = 1e-6 * norm if path in gradients else 0
        largest = max(np.abs(want).max(), floor)
        error = np.abs(np.float64(many[path]) - want).max()
        times = 2 if "/nu/" in path else 1  # a gradient's square is off by twice its own share
        assert error <= times * TOLERANCE * largest, f"{path}: {error:.1e} of {largest:.1e}"

    terms = [path for path in one if path.startswith("metrics/loss")]
    assert len(terms) > 15
    for path in terms:
        assert np.isfinite(one[path]), path
        assert_allclose(many[path], one[path], rtol=TOLERANCE, err_msg=path)


@pytest.mark.parametrize("mesh", QUICK)
def test_a_step_on_a_mixed_mesh_is_that_of_one_device(quick, mesh):
    check(quick, mesh)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", SLOW)
def test_a_step_on_eight_devices_is_that_of_one(slow, mesh):
    check(slow, mesh)
