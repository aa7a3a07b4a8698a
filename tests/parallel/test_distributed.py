"""Processes find each other by what the environment says, and a wrong variable is one sentence."""

import os
import socket
import subprocess
import sys

import pytest

from skyjax.errors import UserError
from skyjax.parallel.distributed import explicit, kind

COMPLETE = {"SKYJAX_COORDINATOR": "10.0.0.2:8476", "SKYJAX_PROCESSES": "4", "SKYJAX_PROCESS": "3"}
SLURM_STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "16", "SLURM_PROCID": "3"}
GKE_SLICE = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1", "TPU_SKIP_MDS_QUERY": "true"}


@pytest.mark.parametrize(
    ("environment", "want"),
    [
        ({}, ""),
        (COMPLETE, "environment"),
        (COMPLETE | {"SKYJAX_PROCESSES": "1", "SKYJAX_PROCESS": "0"}, ""),
        (COMPLETE | SLURM_STEP | GKE_SLICE, "environment"),
        (GKE_SLICE, "tpu"),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ML_PLATFORM": "JAX"}, ""),  # one host of GKE
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_COORDINATOR_ADDRESS": "a"}, "tpu"),  # one host a slice
        ({"TPU_ML_PLATFORM": "JAX"}, "tpu"),  # a TPU VM: its metadata server knows the hosts
        ({"TPU_ML_PLATFORM": "JAX", "TPU_SKIP_MDS_QUERY": "1"}, ""),
        ({"TPU_ML_PLATFORM": "JAX", "JAX_PLATFORMS": "cpu"}, ""),
        (SLURM_STEP, "slurm"),
        (SLURM_STEP | {"SLURM_NTASKS": "1"}, ""),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16"}, ""),  # the batch script, outside of srun
    ],
)
def test_who_says_that_there_are_several(environment, want):
    assert kind(environment) == want


def test_the_three_variables():
    assert explicit(COMPLETE) == ("10.0.0.2:8476", 4, 3)
    assert explicit(COMPLETE | {"SKYJAX_COORDINATOR": "[::1]:1"})[0] == "[::1]:1"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"SKYJAX_COORDINATOR": ""}, "SKYJAX_COORDINATOR is not set"),
        ({"SKYJAX_PROCESSES": "", "SKYJAX_PROCESS": ""}, "SKYJAX_PROCESSES and SKYJAX_PROCESS are not set"),
        ({"SKYJAX_COORDINATOR": "10.0.0.2"}, "HOST:PORT"),
        ({"SKYJAX_COORDINATOR": "host:0"}, "HOST:PORT"),
        ({"SKYJAX_COORDINATOR": "host:99999"}, "HOST:PORT"),
        ({"SKYJAX_PROCESSES": "0"}, "1 or more"),
        ({"SKYJAX_PROCESSES": "four"}, "1 or more"),
        ({"SKYJAX_PROCESS": "4"}, "0 to 3"),
        ({"SKYJAX_PROCESS": "-1"}, "0 to 3"),
    ],
)
def test_wrong_variables(change, sentence):
    with pytest.raises(UserError, match=sentence):
        kind(COMPLETE | change)


def test_jax_says_that_it_runs_on_a_tpu_vm():
    """What `kind` relies on, from jax itself: forced, since there are no chips here; and not so without force."""
    program = "import jax, os; print(os.environ.get('TPU_ML_PLATFORM'), os.environ.get('TPU_SKIP_MDS_QUERY'))"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "JAX_"))}
    for forced, want in (({"JAX_FORCE_TPU_INIT": "1"}, "JAX 1"), ({}, "None 1")):
        done = subprocess.run(
            [sys.executable, "-c", program], env=clean | forced, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == want


def test_command_refuses_half_a_cluster(tmp_path):
    words = ["train", "--config=configs/pretrain_sample.py", f"--workdir={tmp_path / 'run'}"]
    program = "import sys; from skyjax.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        env=os.environ | {"SKYJAX_PROCESSES": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("skyjax: SKYJAX_COORDINATOR and SKYJAX_PROCESS are not set")
    assert not (tmp_path / "run").exists()


# Everything that `skyjax train` does before: had one of these touched a device, `initialise` would raise.
MEMBER = """
from skyjax.config import load_config
from skyjax.evals.report import write_report
from skyjax.parallel import distributed
from skyjax.train import loop
load_config("configs/pretrain_sample.py", [])
how = distributed.initialise()
import jax
from jax.experimental import multihost_utils
print(how, jax.process_index(), jax.process_count(), multihost_utils.process_allgather(jax.process_index()).tolist())
"""


@pytest.mark.parametrize("cluster", ["environment", "slurm"])
def test_two_processes_find_each_other(cluster):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "SKYJAX_", "SLURM_"))}
    processes = []
    for i in range(2):
        if cluster == "environment":
            told = {"SKYJAX_COORDINATOR": f"127.0.0.1:{port}", "SKYJAX_PROCESSES": "2", "SKYJAX_PROCESS": str(i)}
        else:
            told = SLURM_STEP | {"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_PROCID": str(i)}
            told |= {"SLURM_LOCALID": str(i), "JAX_COORDINATOR_PORT": str(port)}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", MEMBER],
                env=clean | {"JAX_PLATFORMS": "cpu"} | told,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    ended = [process.communicate(timeout=120) for process in processes]
    for i, (out, errors) in enumerate(ended):
        assert out.splitlines()[-1:] == [f"{cluster} {i} 2 [0, 1]"], errors
