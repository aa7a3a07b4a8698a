"""SIGTERM and hangs, in processes of their own."""

import pathlib
import signal
import subprocess
import sys
import time

import pytest

PREEMPTION = """
import hashlib, sys, time
from skyjax.train.preemption import Preemption
with Preemption() as preemption:
    if sys.argv[1] == "stepping":
        preemption.something_to_save()
    print("ready", flush=True)
    if sys.argv[1] == "compiling":
        hashlib.pbkdf2_hmac("sha256", b"", b"", 200_000_000)  # like a compilation: long, in C, without the lock
    while not preemption.requested:
        time.sleep(0.01)
    print("saving", flush=True)
    if sys.argv[1] == "stepping":
        time.sleep(float(sys.argv[2]))
sys.exit(75)
"""

WATCHDOG = """
import sys, time
from skyjax.train.watchdog import Watchdog
def step_that_hangs():
    time.sleep(60)
with Watchdog(0.5) as watchdog:
    for _ in range(4):
        time.sleep(0.2)
        watchdog.beat()
    print("beating", flush=True)
    if sys.argv[1] == "hang":
        step_that_hangs()
"""


@pytest.fixture
def start():
    """Starts one of the scripts; ends it when the test is over."""
    started = []

    def run(code, *arguments):
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("when", ["starting", "compiling"])
def test_before_the_first_step_it_ends_at_once(start, when):
    process = start(PREEMPTION, when)
    assert process.stdout.readline() == "ready\n"
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 75
    assert time.monotonic() - sent < 5
    assert "nothing to save" in process.stderr.read()


def test_after_a_step_the_loop_may_save(start):
    process = start(PREEMPTION, "stepping", "0.2")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 75
    assert process.stdout.read() == "saving\n"
    assert "saving after this step" in process.stderr.read()


def test_a_second_one_ends_it_at_once(start):
    process = start(PREEMPTION, "stepping", "60")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 143


def catches_sigterm(process):
    """As the kernel tells it."""
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    mask = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(mask.split()[1], 16) & 1 << (signal.SIGTERM - 1))


def test_the_command_listens_before_it_imports_jax(start, tmp_path):
    code = "import sys; from skyjax.cli import main; sys.exit(main())"
    config = pathlib.Path(__file__).parents[2] / "configs" / "pretrain_sample.py"
    process = start(code, "train", f"--config={config}", f"--workdir={tmp_path / 'run'}")
    deadline = time.monotonic() + 30
    while not catches_sigterm(process):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert "jaxlib" not in pathlib.Path(f"/proc/{process.pid}/maps").read_text()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 75
    assert process.stderr.read() == "skyjax: SIGTERM: nothing to save\n"


def test_one_inside_of_another_hands_over(start):
    """The inner one saves; when it is left, the outer one ends the process at once."""
    code = """
import os, signal, time
from skyjax.train.preemption import Preemption
with Preemption():
    with Preemption() as inner:
        inner.something_to_save()
        os.kill(os.getpid(), signal.SIGTERM)
        while not inner.requested:
            time.sleep(0.01)
    print("saved", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(20)
"""
    process = start(code)
    assert process.wait(timeout=10) == 75
    assert process.stdout.read() == "saved\n"


def test_watchdog_prints_stacks_and_exits(start):
    process = start(WATCHDOG, "hang")
    assert process.wait(timeout=30) == 124
    assert process.stdout.read() == "beating\n"
    errors = process.stderr.read()
    assert "no step was finished for 0.5 s" in errors
    assert "step_that_hangs" in errors


def test_watchdog_lets_a_run_that_beats_end(start):
    process = start(WATCHDOG, "end")
    assert process.wait(timeout=30) == 0
    assert process.stderr.read() == ""
