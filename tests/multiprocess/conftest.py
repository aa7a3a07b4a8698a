"""Runs of several real processes on this computer, started as users start them: by launch/local.py."""

import dataclasses
import os
import pathlib
import subprocess
import sys
import time

import pytest

from skyjax.config import to_json
from skyjax.train import metrics

LAUNCHER = pathlib.Path(__file__).parents[2] / "launch" / "local.py"
PATIENCE = 600  # seconds; a run takes 10 to 30 on a quiet machine

# `skyjax train` without its report. Each process leaves its id where a test finds it.
RUN = """
import os, pathlib, sys
import skyjax
from skyjax.config import read_config
from skyjax.train import loop
workdir = pathlib.Path(sys.argv[2])
workdir.with_name(f"{workdir.name}.pid-{os.environ['SKYJAX_PROCESS']}").write_text(str(os.getpid()))
{before}
sys.exit(loop.train(read_config(sys.argv[1]), workdir{arguments}))
"""


@dataclasses.dataclass
class Launch:
    """A launcher with its processes."""

    process: subprocess.Popen
    workdir: pathlib.Path
    log: pathlib.Path

    @property
    def output(self):
        return self.log.read_text()

    def pid(self, number):
        return int(self.workdir.with_name(f"{self.workdir.name}.pid-{number}").read_text())

    def lines(self):
        path = self.workdir / metrics.FILE
        return metrics.read(path) if path.exists() else []

    def until(self, condition):
        """Waits until the run has come so far."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, self.output[-4000:]
            assert time.monotonic() < deadline, self.output[-4000:]
            time.sleep(0.02)

    def wait(self):
        """The launcher's exit code."""
        try:
            return self.process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.output[-4000:]) from None


@pytest.fixture(scope="module")
def launch(tmp_path_factory, compile_cache):
    """A function that starts a run of some processes; all that still runs at the end is killed."""
    started = []

    def start(config, workdir, processes, *, devices=1, before="", arguments="", grace=20):
        folder = tmp_path_factory.mktemp("launch")
        (folder / "config.json").write_text(to_json(config))
        # Nothing here runs for long: optimising it would take longer than all tests.
        environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "TF_CPP_MIN_LOG_LEVEL": "1"}
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(compile_cache)}
        environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
        script = RUN.replace("{before}", before).replace("{arguments}", arguments)
        flags = [f"--processes={processes}", f"--devices-per-process={devices}", f"--grace={grace}"]
        command = [sys.executable, "-c", script, str(folder / "config.json"), str(workdir)]
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, str(LAUNCHER), *flags, "--", *command], env=environment, stdout=log, stderr=log
            )
        started.append(process)
        return Launch(process, workdir, folder / "log")

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=60)


@pytest.fixture(scope="module")
def small(tiny_config):
    """One modality: for tests in which the step itself is not in question."""
    return tiny_config(
        modalities=("multispectral",),
        steps=1_000_000,
        batch_size=4,
        checkpoint__every=0,
        data__local_views__count=0,
        watchdog__seconds=300.0,
        mesh__data=1,
        mesh__fsdp=-1,
    )
