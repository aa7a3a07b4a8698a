"""Preempted, killed and hung: what becomes of a run of two processes.

The state is a counter and one array spread over both processes, and the step sums over both, so that all compiles at
once. Loader, loop, checkpoints and what the processes tell each other are those of any run.
"""

import os
import re
import shutil
import signal
import time

import jax
import numpy as np
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


def test_the_state_is_what_it_was(preempted):
    """From two processes by way of one."""
    *_, last = preempted[2]
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {"params": {"kernel": jax.ShapeDtypeStruct((2048, 1024), np.float32, sharding=here)}}
    got = checkpoint.load(checkpoint.find(last.workdir), wanted, partial=True)
    np.testing.assert_array_equal(got["params"]["kernel"].ravel(), np.arange(2**21))


@pytest.mark.slow
def test_from_one_process_to_four(preempted, small, launch, tmp_path):
    _, steps, (_, _, last) = preempted
    workdir = shutil.copytree(last.workdir, tmp_path / "run")
    run = launch(changed(small, steps=steps[-1][-1] + 8), workdir, 4, before=COUNTING)
    assert run.wait() == 0, run.output[-4000:]
    assert [line["loss"] for line in run.lines()] == [16 * (line["step"] - 1) + 6 for line in run.lines()]
    assert [line["step"] for line in run.lines()] == list(range(1, steps[-1][-1] + 9))
    # Its words are those of one process, whoever sums them.
    notes = [checkpoint.read_notes(checkpoint.find(where)) for where in (workdir, last.workdir)]
    assert notes[0]["checksums"]["params/kernel"] == notes[1]["checksums"]["params/kernel"]


def test_all_go_on_from_what_all_can_read(small, launch, tmp_path):
    """Process 1 cannot read the notes of the newest checkpoint, nor the arrays of the one before; process 0 could."""
    workdir, kept = tmp_path / "run", changed(small, checkpoint__keep=3, watchdog__seconds=60.0)
    assert launch(changed(kept, steps=6, checkpoint__every=2), workdir, 2, before=COUNTING).wait() == 0
    failing = """
from skyjax.train import checkpoint
def fails_on(call, step):
    def failing(path, *arguments):
        found = call(path, *arguments)
        if me == 1 and path.name == step:
            raise OSError(5, "Input/output error")
        return found
    return failing
checkpoint.ocp.metadata = fails_on(checkpoint.ocp.metadata, "6")
checkpoint.ocp.load = fails_on(checkpoint.ocp.load, "4")
"""
    run = launch(changed(kept, steps=8), workdir, 2, before=COUNTING + failing)
    assert run.wait() == 0, run.output[-4000:]
    assert run.output.count("another process cannot read it; going on from step 2") == 2
    assert run.output.count("Input/output error; going on from step 2") == 2
    assert [line["loss"] for line in run.lines()] == [16 * step + 6 for step in range(8)]
    assert checkpoint.steps(workdir / "checkpoints.damaged") == [4, 6]
    assert checkpoint.steps(workdir / checkpoint.FOLDER) == [2, 8]


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
    assert "[1] skyjax: SIGTERM: nothing to save" in run.output


@pytest.mark.parametrize(("barrier", "saved"), [("compiled", False), ("begin", True)])
def test_sigterm_just_before_the_first_step_ends_all_alike(small, launch, tmp_path, barrier, saved):
    """To process 1, when all have compiled. Either none takes a step, or all do and save."""
    workdir = tmp_path / "run"
    signalled = """
import pathlib, signal
from skyjax.train import hosts
real = hosts.compile_together
class Client:
    def wait_at_barrier(self, name, *arguments):
        if (name, at) == ("skyjax: begin", "begin"):
            stop()
        found.wait_at_barrier(name, *arguments)
        if (name, at) == ("skyjax: compiled", "compiled"):
            stop()
def stop():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)
def signalled(*arguments, **options):
    global found
    found = hosts.distributed.global_state.client
    hosts.distributed.global_state.client = Client()
    compiled = real(*arguments, **options)
    hosts.distributed.global_state.client = found
    return compiled
if me == 1:
    loop.compile_together = signalled
"""
    run = launch(small, workdir, 2, before=COUNTING + f"at = {barrier!r}" + signalled)
    assert run.wait() == 75, run.output
    assert bool(checkpoint.steps(workdir / checkpoint.FOLDER)) == saved, run.output
    assert ("[0] skyjax: a process left before the first step: nothing to save" in run.output) != saved


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


@pytest.mark.slow
def test_a_frozen_process_ends_the_others_and_is_named(small, launch, tmp_path):
    """It neither dies nor answers, as on a host that swaps or lost its network."""
    run = launch(small, tmp_path / "run", 2, before=COUNTING, grace=20)
    run.until(lambda: len(run.lines()) > 5)
    os.kill(run.pid(1), signal.SIGSTOP)
    stopped = time.monotonic()
    while os.path.exists(f"/proc/{run.pid(0)}") and time.monotonic() < stopped + 100:
        time.sleep(0.1)
    assert time.monotonic() - stopped < 60
    assert run.wait() == 1, run.output
    assert "process 1 did not end by itself and was killed, and the others cannot go on without it" in run.output


def test_a_second_sigterm_ends_all_at_once(small, launch, tmp_path):
    """Both are in the middle of an evaluation that never asks whether to stop."""
    deaf = """
def evaluate(state, step, stop):
    workdir.with_name(f"evaluating-{me}").touch()
    time.sleep(1000)
"""
    evaluated = changed(small, eval__every=3)
    run = launch(evaluated, tmp_path / "run", 2, before=COUNTING + deaf, arguments=", evaluators=[evaluate]")
    run.until(lambda: all((tmp_path / f"evaluating-{number}").exists() for number in (0, 1)))
    run.process.send_signal(signal.SIGTERM)
    run.until(lambda: run.output.count("SIGTERM: saving after this step") == 2)
    again = time.monotonic()
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 1
    assert time.monotonic() - again < 10
    assert "was ended by a second SIGTERM (143)" in run.output
