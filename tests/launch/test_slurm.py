"""The batch script of launch/slurm.py, run here with stand-ins for SLURM's programs."""

import pathlib
import re

import pytest
import slurm

ROOT = pathlib.Path(__file__).parents[2]


def script(workdir, *words):
    options = [f"--config={ROOT / 'configs/pretrain_sample.py'}", f"--workdir={workdir}", "--setup=true", *words]
    return slurm.batch_script(*slurm.parse(slurm._parser(), options))


def test_directives():
    text = script("/shared/run", "--nodes=4", "--gpus-per-node=8", "--partition=gpu", "--account=me", "--grace=120")
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    directives = [line.removeprefix("#SBATCH --") for line in lines[1:] if line.startswith("#SBATCH --")]
    # SLURM reads none that stands behind a command.
    assert lines[1 : 1 + len(directives)] == [f"#SBATCH --{directive}" for directive in directives]
    assert {
        "nodes=4",
        "ntasks-per-node=8",
        "gpus-per-node=8",
        "requeue",
        "signal=TERM@120",
        "open-mode=append",
        "partition=gpu",
        "account=me",
        "output=/shared/run/slurm.log",
    } <= set(directives)
    assert not [directive for directive in directives if re.search(r"None|\s", directive)]


@pytest.fixture
def cluster(programs, tmp_path):
    programs.record("scontrol")
    programs.add("squeue", '#!/bin/bash\necho "$STATE"\n')
    programs.add("srun", '#!/bin/bash\nprintf "%s\\0" "$@" > "$RECORDS/../srun"\nexit "$CODE"\n')
    return programs


def attempt(cluster, workdir, code, state="RUNNING", *words):
    text = script(workdir, "--max-restarts=2", *words)
    done = cluster.bash(text, SLURM_JOB_ID="7", CODE=str(code), STATE=state)
    assert done.returncode == code, done.stderr
    return cluster.take() == [b"scontrol\0requeue\0007\0"]


@pytest.mark.parametrize(("code", "again"), [(0, False), (2, False), (75, True), (1, True), (124, True), (134, True)])
def test_requeued_by_the_exit_code(code, again, cluster, tmp_path):
    assert attempt(cluster, tmp_path, code) == again


def test_failures_are_counted_and_preemptions_are_not(cluster, tmp_path):
    codes = [75, 134, 75, 75, 75, 1, 75, 124]
    assert [attempt(cluster, tmp_path, code) for code in codes] == [True] * 7 + [False]


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", ""])
def test_a_cancelled_job_stays_so(state, cluster, tmp_path):
    assert not attempt(cluster, tmp_path, 75, state)


def test_tasks_get_the_command(cluster, tmp_path):
    attempt(cluster, tmp_path, 0, "RUNNING", "--config.data.sources=(('it''s $HOME',1.0),)")
    words = (tmp_path / "srun").read_bytes().decode().split("\0")[:-1]
    assert words[words.index("skyjax") :] == [
        "skyjax",
        "train",
        f"--config={ROOT / 'configs/pretrain_sample.py'}",
        f"--workdir={tmp_path}",
        "--config.data.sources=(('it''s $HOME',1.0),)",
    ]
