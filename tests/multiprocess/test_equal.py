"""1, 2 and 4 processes are one run: the same samples, the same losses. Killed and started again, two are themselves."""

import functools
import os
import signal

import pytest
from numpy.testing import assert_allclose

from skyjax.train import checkpoint, goodput

STEPS = 4
# Four compile the same step four times, on two cores.
MANY = [2, pytest.param(4, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def config(tiny_config, sample_records, more_records):
    """All terms of the objective, geo-prototypes included, and all that could make a run differ from another."""
    prototypes = {"regions": 16, "count": 4, "width": 16, "momentum": 0.9, "epsilon": 0.05, "iterations": 3}
    config = tiny_config(
        modalities=("multispectral", "sar"),
        steps=STEPS,
        batch_size=8,
        micro_batches=2,
        checkpoint__every=2,
        data__threads=2,
        data__prefetch=2,
        data__local_views__count=0,
        model__prototypes=prototypes | {"frozen": False},
    )
    with config.unlocked():
        config.data.sources = ((str(sample_records), 0.7), (str(more_records), 0.3))
    return config


@pytest.fixture(scope="module")
def run(config, launch, tmp_path_factory):
    """A function of the number of processes that gives the finished run; the mesh has a device a process."""

    @functools.cache
    def finished(processes):
        found = launch(config, tmp_path_factory.mktemp("equal") / f"{processes}", processes)
        assert found.wait() == 0, found.output[-4000:]
        return found

    return finished


@pytest.mark.parametrize("processes", MANY)
def test_samples_are_the_same(run, processes):
    """A number over the words of all views and the places of their samples in the global order."""
    alone, many = ([line["samples"] for line in run(n).lines()] for n in (1, processes))
    assert many == alone
    assert len(set(alone)) == STEPS


@pytest.mark.parametrize("processes", MANY)
def test_losses_are_the_same(run, processes):
    assert [line["step"] for line in run(processes).lines()] == list(range(1, STEPS + 1))
    for alone, many in zip(run(1).lines(), run(processes).lines(), strict=True):
        names = [name for name in alone if name == "loss" or name.startswith("loss/")]
        assert len(names) > 10
        for name in names:
            if alone[name] is None:  # nothing of it in the batch
                assert many[name] is None
            else:
                assert_allclose(many[name], alone[name], rtol=1e-5, atol=1e-7, err_msg=f"{alone['step']} {name}")


@pytest.mark.parametrize("processes", MANY)
def test_one_process_writes_and_all_save(run, processes):
    many = run(processes)
    assert checkpoint.steps(many.workdir / checkpoint.FOLDER) == [2, STEPS]
    found = goodput.read(many.workdir / goodput.FILE)
    assert (found["step"], found["starts"]) == (STEPS, 1)
    assert many.output.count(f"step {STEPS}/{STEPS}") == 1
    assert f"[0] step {STEPS}/{STEPS}" in many.output


# Neither process gets the batch of the last step.
BEFORE_THE_LAST = """
import time
real = loop.Loader.__next__
def next_batch(loader):
    if loader.position == 3 * 8:
        time.sleep(1000)
    return real(loader)
loop.Loader.__next__ = next_batch
"""


def test_two_killed_and_started_again_equal_themselves(config, run, launch, tmp_path):
    """Parameters, teacher, prototypes, optimizer, counters and metrics, to the bit."""
    workdir = tmp_path / "run"
    first = launch(config, workdir, 2, before=BEFORE_THE_LAST, grace=1)
    first.until(lambda: checkpoint.steps(workdir / checkpoint.FOLDER) == [2])
    os.kill(first.pid(1), signal.SIGKILL)
    assert first.wait() == 1
    second = launch(config, workdir, 2)
    assert second.wait() == 0, second.output[-4000:]
    assert "[0] going on from step 2" in second.output
    clocks = ("seconds", "samples_per_second", "slow_process", "slow_process_seconds")
    lines = [[{k: v for k, v in line.items() if k not in clocks} for line in one.lines()] for one in (second, run(2))]
    assert lines[0] == lines[1]
    one, other = (checkpoint.read_notes(where / checkpoint.FOLDER / str(STEPS)) for where in (workdir, run(2).workdir))
    assert one["checksums"] == other["checksums"]
    assert len(one["checksums"]) > 100
