"""1, 2 and 4 processes are one run: the same samples, the same losses."""

import pytest
from numpy.testing import assert_allclose

from skyjax.train import checkpoint, goodput

STEPS = 3
COUNTS = (1, 2, 4)


@pytest.fixture(scope="module")
def config(tiny_config):
    """All terms of the objective, geo-prototypes included, and a fresh local view."""
    prototypes = {"regions": 16, "count": 4, "width": 16, "momentum": 0.9, "epsilon": 0.05, "iterations": 3}
    return tiny_config(
        modalities=("multispectral", "sar"),
        steps=STEPS,
        batch_size=8,
        checkpoint__every=0,
        model__prototypes=prototypes | {"frozen": False},
    )


@pytest.fixture(scope="module")
def runs(config, launch, tmp_path_factory):
    """Processes -> the finished run. One after another: a step of four waits for the slowest."""
    found = {}
    for processes in COUNTS:
        workdir = tmp_path_factory.mktemp("equal") / f"{processes}"
        found[processes] = launch(config, workdir, processes)
        assert found[processes].wait() == 0, found[processes].output[-4000:]
    return found


def test_every_step_stands_once(runs):
    for run in runs.values():
        assert [line["step"] for line in run.lines()] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("processes", COUNTS[1:])
def test_samples_are_the_same(runs, processes):
    """A number over the words of all views and the places of their samples in the global order."""
    alone, many = ([line["samples"] for line in runs[n].lines()] for n in (1, processes))
    assert many == alone
    assert len(set(alone)) == STEPS


@pytest.mark.parametrize("processes", COUNTS[1:])
def test_losses_are_the_same(runs, processes):
    for alone, many in zip(runs[1].lines(), runs[processes].lines(), strict=True):
        names = [name for name in alone if name == "loss" or name.startswith("loss/")]
        assert len(names) > 10
        for name in names:
            if alone[name] is None:  # nothing of it in the batch
                assert many[name] is None
            else:
                assert_allclose(many[name], alone[name], rtol=1e-5, atol=1e-7, err_msg=f"{alone['step']} {name}")


@pytest.mark.parametrize("processes", COUNTS)
def test_one_process_writes_and_all_save(runs, processes):
    run = runs[processes]
    assert checkpoint.steps(run.workdir / checkpoint.FOLDER) == [STEPS]
    found = goodput.read(run.workdir / goodput.FILE)
    assert (found["step"], found["starts"]) == (STEPS, 1)
    assert run.output.count(f"step {STEPS}/{STEPS}") == 1
    assert f"[0] step {STEPS}/{STEPS}" in run.output
