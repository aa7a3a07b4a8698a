"""The launcher by itself, with commands of the shell."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

LAUNCHER = pathlib.Path(__file__).parents[2] / "launch" / "local.py"


def launch(*arguments, script="true", **options):
    command = [sys.executable, str(LAUNCHER), *arguments, "--", "sh", "-c", script]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_each_process_knows_its_place_and_its_lines_are_numbered():
    run = launch("--processes=3", script="echo $SKYJAX_PROCESS of $SKYJAX_PROCESSES at $SKYJAX_COORDINATOR; echo >&2 e")
    output, errors = run.communicate(timeout=60)
    assert run.returncode == 0
    lines = sorted(output.splitlines())
    address = lines[0].rsplit(" ", 1)[1]
    assert lines == [f"[{number}] {number} of 3 at {address}" for number in range(3)]
    assert address.startswith("127.0.0.1:")
    assert sorted(errors.splitlines()) == ["[0] e", "[1] e", "[2] e"]


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        ("exit 0", 0, ""),
        ("exit 75", 75, ""),
        ("exit $((75 * SKYJAX_PROCESS))", 75, ""),
        ("exit 2", 2, "process 0 refused what it was given (2)"),
        ("[ $SKYJAX_PROCESS = 1 ] && exit 3; exec sleep 60", 1, "process 1 ended with 3, and the others cannot"),
        ("[ $SKYJAX_PROCESS = 1 ] && kill -9 $$; exec sleep 60", 1, "process 1 was ended by SIGKILL (137), and"),
        (
            "[ $SKYJAX_PROCESS = 0 ] && exit 134; exec sleep 60",
            1,
            "process 1 did not end by itself and was killed, and",
        ),
        ("[ $SKYJAX_PROCESS = 0 ] && { sleep 0.5; exit 134; }; exit 124", 1, "process 1 hung (124), and the others"),
    ],
)
def test_exit_codes(script, code, said):
    run = launch("--processes=2", "--grace=1", script=script)
    _, errors = run.communicate(timeout=30)
    assert run.returncode == code
    assert said in errors


def test_ctrl_c_reaches_all_as_sigterm_once():
    script = "trap 'echo asked; exit 75' TERM; echo ready; while true; do sleep 0.1; done"
    run = launch("--processes=2", script=script)
    assert [run.stdout.readline()[3:] for _ in range(2)] == [" ready\n"] * 2
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=30)
    assert sorted(output.splitlines()) == ["[0] asked", "[1] asked"]
    assert run.returncode == 75


def test_one_that_is_preempted_alone_takes_the_others_along():
    """Before the first step a process ends with 75 by itself, having nothing to save."""
    script = "[ $SKYJAX_PROCESS = 0 ] && exit 75; trap 'exit 75' TERM; while true; do sleep 0.1; done"
    began = time.monotonic()
    run = launch("--processes=2", "--grace=8", script=script)
    run.communicate(timeout=30)
    assert run.returncode == 75
    assert time.monotonic() - began < 8


def test_dry_run_prints_commands_that_a_shell_understands(tmp_path):
    command = [sys.executable, str(LAUNCHER), "--processes=2", "--devices-per-process=3", "--port=5000", "--dry-run"]
    done = subprocess.run([*command, "--", "sh", "-c", "env"], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for number, line in enumerate(lines):
        found = subprocess.run(line, shell=True, capture_output=True, text=True, check=True, env={**os.environ})
        assert f"SKYJAX_PROCESS={number}" in found.stdout.splitlines()
        assert "SKYJAX_COORDINATOR=127.0.0.1:5000" in found.stdout.splitlines()
        assert "JAX_NUM_CPU_DEVICES=3" in found.stdout.splitlines()


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--processes=2"], "there is no command"), (["--processes=0", "--", "true"], "1 or more")]
)
def test_what_cannot_be_is_told(arguments, said):
    done = subprocess.run([sys.executable, str(LAUNCHER), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr
