"""Starts a command as several processes of one run on this computer, joined over loopback.

    python launch/local.py --processes=2 -- skyjax train --config=configs/pretrain_sample.py --workdir=runs/two

Each line that a process prints comes out behind its number: "[1] ...". SIGTERM and Ctrl-C go to all of them as SIGTERM:
they save and end with 75; a second one ends them at once. When a process is lost, the others get --grace seconds to say
what they saw and are then killed, since a step needs all of them.

Exit code: 0 when all ended with 0; 75 when all were preempted; 2 a user's mistake; 1 otherwise, and the process that
was lost is named.
"""

import argparse
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR, EXIT_PREEMPTED = 0, 1, 2, 75
MEANINGS = {
    1: "crashed (1)",
    2: "refused what it was given (2)",
    75: "was preempted (75)",
    124: "hung (124)",
    134: "was aborted by the runtime, which lost a peer (134)",
    143: "was ended by a second SIGTERM (143)",
}


def environment(coordinator: str, processes: int, process: int, devices: int) -> dict[str, str]:
    """What a process needs to know of its place in the run, beside the environment that it inherits."""
    added = {
        "SKYJAX_COORDINATOR": coordinator,
        "SKYJAX_PROCESSES": str(processes),
        "SKYJAX_PROCESS": str(process),
    }
    if devices:
        added |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    return added


class Child:
    """One process of the run; its output is forwarded line by line.

    Attributes:
      ended: when it did; None while it runs.
      asked: whether it was sent SIGTERM.
    """

    def __init__(self, number: int, command: Sequence[str], added: Mapping[str, str]) -> None:
        self.number = number
        self.ended: float | None = None
        self.killed = self.asked = False
        self._process = subprocess.Popen(
            list(command),
            env={**os.environ, "PYTHONUNBUFFERED": "1", **added},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches the launcher alone, which passes it on once
        )
        self._threads = []
        for source, target in ((self._process.stdout, sys.stdout), (self._process.stderr, sys.stderr)):
            self._threads.append(threading.Thread(target=self._forward, args=(source, target), daemon=True))
            self._threads[-1].start()

    @property
    def code(self) -> int | None:
        """As a shell counts: 128 + the signal that ended it; None while it runs."""
        code = self._process.poll()
        if code is not None and self.ended is None:
            self.ended = time.monotonic()
        return code if code is None or code >= 0 else 128 - code

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to it and to what it started."""
        self.asked |= number == signal.SIGTERM
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """Ends it, as it does not by itself."""
        self.killed = True
        self.send(signal.SIGCONT)  # one that was stopped would never see the end of its pipes
        self.send(signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """Returns when all that it printed is out."""
        for thread in self._threads:
            thread.join(timeout=5)

    def told(self) -> str:
        """How it ended, in words."""
        code = self.code
        if self.killed:
            return "did not end by itself and was killed"
        if code is not None and code > 128 and code not in MEANINGS:
            return f"was ended by {signal.Signals(code - 128).name} ({code})"
        return MEANINGS.get(code or 0, f"ended with {code}")

    def _forward(self, source: IO[str], target: IO[str]) -> None:
        for line in source:
            target.write(f"[{self.number}] {line}")
            target.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command as several processes; see the top of this file for the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    split = words.index("--") if "--" in words else len(words)
    options = _parser().parse_args(words[:split])
    command = words[split + 1 :]
    if not command:
        return _refuse("there is no command; write it behind --, as in: -- skyjax train --config=... --workdir=...")
    if options.processes < 1 or options.devices_per_process < 0 or options.grace < 0:
        return _refuse("--processes is 1 or more, --devices-per-process and --grace are 0 or more")
    coordinator = f"127.0.0.1:{options.port or free_port()}"
    added = [
        environment(coordinator, options.processes, process, options.devices_per_process)
        for process in range(options.processes)
    ]
    if options.dry_run:
        for variables in added:
            print(shlex.join(["env", *(f"{name}={value}" for name, value in variables.items()), *command]))
        return EXIT_DONE
    return run(command, added, options.grace)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/local.py",
        description=(__doc__ or "").splitlines()[0],
        epilog="example: python launch/local.py --processes=2 -- skyjax train --config=... --workdir=...",
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=int, default=2, help="how many (default: 2)")
    parser.add_argument("--devices-per-process", type=int, default=0, help="virtual CPU devices (default: jax's)")
    parser.add_argument("--port", type=int, default=0, help="of the first process on 127.0.0.1 (default: a free one)")
    parser.add_argument("--grace", type=float, default=20, help="seconds that the others get when one is lost")
    parser.add_argument("--dry-run", action="store_true", help="print the commands with their environment; start none")
    return parser


def _refuse(sentence: str) -> int:
    print(f"launch/local.py: {sentence}", file=sys.stderr)
    return EXIT_USER_ERROR


def free_port() -> int:
    """A port of this computer that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run(command: Sequence[str], added: Sequence[Mapping[str, str]], grace: float) -> int:
    """Starts one process for each environment and waits for all; returns the launcher's exit code."""
    children: list[Child] = []

    def forward(*_: object) -> None:
        for child in children:
            child.send(signal.SIGTERM)

    old = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for number, variables in enumerate(added):
            children.append(Child(number, command, variables))
        _wait(children, grace)
    except FileNotFoundError:
        return _refuse(f'there is no command "{command[0]}"')
    finally:
        for child in children:
            if child.code is None:
                child.kill()
            child.close()
        for number, handler in old.items():
            signal.signal(number, handler)
    return _judge(children)


def _wait(children: Sequence[Child], grace: float) -> None:
    """Returns when all have ended, or some time after one was lost."""
    ending = None
    while any(child.code is None for child in children):
        codes = [child.code for child in children]
        now = time.monotonic()
        if ending is None and any(code not in (None, EXIT_DONE) for code in codes):
            ending = now
        if ending is not None and now > ending + grace / 4 and EXIT_PREEMPTED in codes:
            # One that was stopped before its first step ends alone: it had nothing to save, nor have the others.
            for child in children:
                if child.code is None and not child.asked:
                    child.send(signal.SIGTERM)
        if ending is not None and now > ending + grace:
            return
        time.sleep(0.05)


def _judge(children: Sequence[Child]) -> int:
    """The launcher's exit code; says who was lost."""
    codes = [child.code for child in children]
    if all(code == EXIT_DONE for code in codes):
        return EXIT_DONE
    if all(code in (EXIT_DONE, EXIT_PREEMPTED) for code in codes):
        return EXIT_PREEMPTED
    failed = [child for child in children if child.code not in (EXIT_DONE, EXIT_PREEMPTED)]
    # The runtime aborts those that lost a peer, so the lost one is another: one that is gone, or one that is stuck.
    lost = min(failed, key=lambda child: (child.code == 134, child.ended or 0.0))
    for child in failed:
        blame = ", and the others cannot go on without it" if child is lost and len(children) > 1 else ""
        print(f"launch/local.py: process {child.number} {child.told()}{blame}", file=sys.stderr)
    return EXIT_USER_ERROR if lost.code == EXIT_USER_ERROR else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
