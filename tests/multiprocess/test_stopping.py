"""Preempted, killed and hung: what becomes of a run of two processes.

The state is a counter and one array spread over both processes, and the step sums over both, so that all compiles at
once. Loader, loop, checkpoints and what the processes tell each other are those of any run.
"""

import os
import re
import signal
import time

import pytest
from changed import changed

from skyjax.train import checkpoint, goodput

COUNTING = """
import jax, jax.numpy as jnp, time
from skyjax.parallel.sharding import replicated, state_shardings
me = int(os.environ["SKYJAX_PROCESS"])
def fresh():
    zero = jnp.zeros((), jnp.int32)
    kernel = jnp.arange(2**21, dtype=jnp.float32).reshape(2048, 1024)
    counters = {"skipped": zero, "nonfinite_in_a_row": zero}
    return {"step": zero, "params": {"kernel": kernel}, "optimizer": {"count": zero}, "counters": counters}
def create(config, mesh):
    return jax.jit(fresh, out_shardings=state_shardings(jax.eval_shape(fresh), mesh))()
loop.states.abstract, loop.states.create = lambda config: jax.eval_shape(fresh), create
def counting(config, statistics, state, mesh):
    names = ("rank/fused", "spread/fused", "skipped", "nonfinite_in_a_row")
    def step(state, batch):
        optimizer = {"count": state["optimizer"]["count"] + 1}
        metrics = dict.fromkeys(names, jnp.zeros(())) | {"loss": jnp.float32(batch["index"].sum())}
        return {**state, "step": state["step"] + 1, "optimizer": optimizer}, metrics
    return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings(state, mesh), replicated(mesh)))
loop.jit_step = counting
"""
# From its fifth batch on, process 1 does not get any; or only after a while.
STUCK = """
count, real = [0], loop.Loader.__next__
def forever():
    time.sleep(1000)
def next_batch(loader):
    count[0] += 1
    if me == 1 and count[0] > 5:
        wait()
    return real(loader)
loop.Loader.__next__ = next_batch
"""
EVALUATOR = """
def evaluate(state, step, stop):
    workdir.with_name("evaluating").touch()
    while not stop():
        time.sleep(0.02)
    return {}
"""


@pytest.fixture(scope="module")
def preempted(small, launch, tmp_path_factory):
    """A run stopped by SIGTERM to process 1 alone: first while step 7 is evaluated, then between two steps.

    Process 1 reads slowly. Then it goes on as one process, and ends.
    """
    workdir = tmp_path_factory.mktemp("preempted") / "run"
    first = launch(
        changed(small, eval__every=7), workdir, 2, before=COUNTING + EVALUATOR, arguments=", evaluators=[evaluate]"
    )
    first.until(lambda: workdir.with_name("evaluating").exists())
    os.kill(first.pid(1), signal.SIGTERM)
    codes = [first.wait()]
    steps = [checkpoint.steps(workdir / checkpoint.FOLDER)]

    slowly = COUNTING + STUCK + "wait = lambda: time.sleep(0.6)\n"
    second = launch(small, workdir, 2, before=slowly)
    second.until(lambda: len(second.lines()) > 20)
    os.kill(second.pid(1), signal.SIGTERM)
    codes.append(second.wait())
    steps.append(checkpoint.steps(workdir / checkpoint.FOLDER))

    third = launch(changed(small, steps=steps[-1][-1] + 3), workdir, 1, before=COUNTING)
    codes.append(third.wait())
    return codes, steps, (first, second, third)


def test_all_agree_on_the_step_and_save(preempted):
    codes, steps, runs = preempted
    assert codes == [75, 75, 0], runs[0].output + runs[1].output
    assert steps[0] == [7]
    assert steps[1][-1] > 20


def test_it_goes_on_where_it_stopped_with_as_many_processes_as_there_are(preempted):
    _, steps, (_, _, last) = preempted
    lines = last.lines()
    assert [line["step"] for line in lines] == list(range(1, steps[1][-1] + 4))
    # Every sample once and in order: the step's loss is the sum of its four global indices.
    assert [line["loss"] for line in lines] == [16 * (line["step"] - 1) + 6 for line in lines]
    found = goodput.read(last.workdir / goodput.FILE)
    assert found["starts"] == 3
    assert found["seconds"]["lost"] == 0
    assert found["seconds"]["evaluate"] > 0


def test_the_slow_process_is_named(preempted):
    """By 0.6 s a batch. On a busy computer the other is now and then slow too, by less."""
    _, _, (_, second, last) = preempted
    assert "process 1 is slow: it takes 0." in second.output
    found = [line for line in last.lines() if line.get("slow_process_seconds", 0) > 0.4]
    assert len(found) >= 3
    assert {line["slow_process"] for line in found} == {1}


def test_sigterm_before_the_first_step_ends_all_with_nothing_saved(small, launch, tmp_path):
    """Process 1 compiles for long."""
    workdir = tmp_path / "run"
    compiling = """
import pathlib
def slow(config, statistics, state, mesh):
    workdir.with_name("compiling").touch()
    if me == 1:
        time.sleep(1000)
    return counting(config, statistics, state, mesh)
loop.jit_step = slow
"""
    run = launch(small, workdir, 2, before=COUNTING + compiling, grace=20)
    run.until(lambda: workdir.with_name("compiling").exists())
    time.sleep(1)
    os.kill(run.pid(1), signal.SIGTERM)
    sent = time.monotonic()
    while os.path.exists(f"/proc/{run.pid(1)}") and time.monotonic() < sent + 20:
        time.sleep(0.05)
    assert time.monotonic() - sent < 10
    assert run.wait() == 75, run.output
    assert checkpoint.steps(workdir / checkpoint.FOLDER) == []
    assert "[1] skyjax: SIGTERM before the first step: nothing to save" in run.output


def test_a_killed_process_ends_the_others_and_is_named(small, launch, tmp_path):
    run = launch(small, tmp_path / "run", 2, before=COUNTING, grace=100)
    run.until(lambda: len(run.lines()) > 5)
    os.kill(run.pid(1), signal.SIGKILL)
    killed = time.monotonic()
    assert run.wait() == 1, run.output
    assert time.monotonic() - killed < 60
    assert "process 1 was ended by SIGKILL (137), and the others cannot go on without it" in run.output
    assert re.search(r"process 0 (crashed \(1\)|was aborted by the runtime, which lost a peer \(134\))\n", run.output)


def test_a_hang_ends_with_stacks(small, launch, tmp_path):
    hanging = COUNTING + STUCK + "wait = forever\n"
    run = launch(changed(small, watchdog__seconds=25.0), tmp_path / "run", 2, before=hanging, grace=60)
    assert run.wait() == 1, run.output
    assert "no step was finished for 25 s" in run.output
    assert "in forever" in run.output  # the stack of the thread that hangs
    assert "hung (124)" in run.output
