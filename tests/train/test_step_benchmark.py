"""The benchmark of the step: skyjax's step is that of its peer in PyTorch, and the check can tell when it is not."""

import copy
import pathlib
import sys

import pytest

from skyjax.config import run_file

pytestmark = pytest.mark.slow  # compiles a step with every term: a minute
torch = pytest.importorskip("torch")
BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"

# Sequences alone, two views and a local one: everything but Swin-V2, which tests/convert holds to skyjax.
TINY = {
    "model.spatial_width": 16,
    "model.fusion.width": 16,
    "model.fusion.depth": 1,
    "model.fusion.heads": 1,
    **{
        f"model.modalities.{m}.{key}": value
        for m in ("multispectral", "sar")
        for key, value in {"width": 16, "depth": 1, "heads": 1, "image_size": 8}.items()
    },
    "objective.classes": 16,
    "objective.head_hidden": 16,
    "objective.head_bottleneck": 8,
    "objective.pixel.tokens": 5,
    # As many clusters as cells that overlap: nearest neighbours tie, and rounding picks one.
    "objective.object.clusters": 2,
    "data.dates.multispectral": 3,
    "data.dates.sar": 2,
    "data.local_views.count": 1,
}


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(BENCHMARKS))
    yield run_file(BENCHMARKS / "step.py", "benchmark")
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def sides(benchmark, _quick_compilation):
    """Both sides after their check, the peer as it was before, and the differences that were found."""
    config = benchmark.same_work("mini", 3, TINY)
    with config.unlocked():
        del config.model.modalities["optical"]
    batch = benchmark.varied_batch(config)
    ours = benchmark.Ours(config, batch)
    theirs = benchmark.Theirs(config, ours.state, batch)
    before = copy.deepcopy(theirs.step)
    terms = {}
    found = benchmark.differences(ours, theirs, terms)
    return theirs, before, terms, found


def test_the_two_steps_are_one(benchmark, sides):
    *_, terms, found = sides
    assert found.keys() == benchmark.LIMITS.keys()
    assert {name: value for name, value in found.items() if not value <= benchmark.LIMITS[name]} == {}
    assert {name.split("/")[0] for name in terms} == {"loss", "pixel", "object", "image", "alignment", "spread"}


@pytest.mark.parametrize(
    ("key", "value", "differs"),
    [
        ("student_temperature", 0.11, "pixel/fused"),
        ("sinkhorn_iterations", 2, "image/sar"),
        ("pixel", {"tokens": 4}, "pixel/sar"),
        ("object", {"clusters": 2, "iterations": 1, "epsilon": 0.05}, "object/multispectral"),
        ("spread", {"floor": 0.2}, "spread/fused"),
    ],
)
def test_another_objective_shows(benchmark, sides, key, value, differs):
    theirs, before, terms, _ = sides
    other = copy.deepcopy(before)
    other.config = other.config.copy_and_resolve_references()
    with other.config.unlocked():
        other.config.objective[key] = type(other.config.objective[key])(value)
    _, got = other.loss(theirs.batch, torch.tensor(theirs.draws))
    assert abs(float(got[differs]) - terms[differs]) > 10 * benchmark.LIMITS["terms"]
