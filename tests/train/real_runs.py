"""Training runs in processes of their own, to be killed where a test wants; and what is left of a run, to compare."""

import json
import os
import pathlib
import re
import subprocess
import sys
import time

import jax

from skyjax.config import to_json
from skyjax.train import checkpoint, metrics, state

PATIENCE = 900  # seconds for what takes 2 to 10 on a quiet machine
TIMES = ("seconds", "samples_per_second")
MARK = "evaluating"

# As `skyjax train`, with an evaluation that takes some time and leaves a mark while it lasts.
RUN = """
import pathlib, sys, time
import skyjax
from skyjax.config import read_config
from skyjax.train import loop
from real_runs import MARK, weight
workdir = pathlib.Path(sys.argv[2])
def evaluate(state, step, stop):
    workdir.joinpath(MARK).touch()
    until = time.monotonic() + 0.5
    while time.monotonic() < until and not stop():
        time.sleep(0.01)
    workdir.joinpath(MARK).unlink()
    return weight(state)
sys.exit(loop.train(read_config(sys.argv[1]), workdir, evaluators=[evaluate]))
"""


def weight(state):
    """An evaluation's numbers: something that depends on all bits of the teacher."""
    return {"weight": sum(float(leaf.sum()) for leaf in jax.tree.leaves(state["teacher"]["encoder"]["fusion"]))}


def lines(workdir):
    """metrics.jsonl without what the clock says."""
    found = [json.loads(line) for line in (workdir / metrics.FILE).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in found]


def final_state(workdir, config):
    """Of the newest checkpoint, on one device."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), state.abstract(config)
    )
    return checkpoint.load(checkpoint.find(workdir), abstract)


class RealRun:
    """One start of a run.

    Args:
      config: the experiment.
      workdir: may hold what an earlier start left.
      compile_cache: folder of compiled programs.
    """

    def __init__(self, config, workdir, compile_cache):
        self.workdir, self.folder = workdir, workdir / checkpoint.FOLDER
        self.before = self._config_time()
        path = workdir.with_name(f"{workdir.name}.json")
        path.write_text(to_json(config))
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(compile_cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(pathlib.Path(__file__).parent)]),
        }
        self.log = workdir.with_name(f"{workdir.name}.log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", RUN, str(path), str(workdir)], env=environment, stdout=log, stderr=log
            )

    def until(self, condition):
        """Waits for it; False where the run ends before."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.001)
        return True

    def kill(self):
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def wait(self):
        """Its exit code."""
        return self.process.wait(timeout=PATIENCE)

    def _config_time(self):
        path = self.workdir / "config.json"
        return path.stat().st_mtime_ns if path.exists() else 0

    def started(self):
        """Whether it has read its checkpoint and written its config; now it compiles."""
        return self._config_time() != self.before

    def logged(self):
        """The last step that it logged itself, by what it prints: metrics.jsonl may be an earlier start's."""
        found = re.findall(r"^step (\d+)/", self.log.read_text(), re.MULTILINE)
        return int(found[-1]) if found else 0

    def saving(self):
        """Steps of which half a checkpoint lies on the disk."""
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return [int(name.split(".")[0]) for name in names if "orbax-checkpoint-tmp" in name]

    def evaluating(self):
        """Whether it evaluates now, or was killed while it did."""
        return (self.workdir / MARK).exists()
