"""--dry-run prints what would be run: pasted into a shell it calls the same programs, with the same words and input.

The programs are stand-ins that record how they are called. gcloud's words are checked with gcloud's own table.
"""

import pathlib
import subprocess
import sys

import gke
import pytest
import slurm
import tpu_vm
from job import launcher

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = f"--config={ROOT / 'configs/pretrain_sample.py'}"
TRAIN = [CONFIG, "--workdir=gs://runs/first run's", "--config.data.sources=(('gs://data/it''s $HOME',1.0),)"]
CLOUD = ["--project=p", "--image=europe-docker.pkg.dev/p/i:1", "--topology=v5e:4x4"]
GKE = ["--project=p", "--cluster=c", "--location=l"]
VM = ["--project=p", "--zone=z"]

CALLS = {
    "gke": (gke, [*TRAIN, *CLOUD, *GKE]),
    "gke, slices": (gke, ["start", *TRAIN, *CLOUD, *GKE, "--slices=2", "--spot", "--env=A=b c"]),
    "gke, status": (gke, ["status", "--name=a", *GKE]),
    "gke, logs": (gke, ["logs", "--name=a", *GKE]),
    "gke, stop": (gke, ["stop", "--name=a", *GKE]),
    "vm": (tpu_vm, [*TRAIN, *CLOUD, *VM, "--reserved", "--service-account=s@p"]),
    "vm, start": (tpu_vm, ["start", *TRAIN, *CLOUD, *VM]),
    "vm, queued": (tpu_vm, [*TRAIN, *CLOUD, *VM, "--queued"]),
    "vm, slices": (tpu_vm, [*TRAIN, *CLOUD, *VM, "--queued", "--slices=2", "--spot", "--valid-for=6h"]),
    "vm, status": (tpu_vm, ["status", "--name=a", *VM]),
    "vm, logs": (tpu_vm, ["logs", "--name=a", *VM, "--queued"]),
    "vm, stop": (tpu_vm, ["stop", "--name=a", *VM, "--queued"]),
    "vm, delete": (tpu_vm, ["delete", "--name=a", *VM]),
    "vm, delete queued": (tpu_vm, ["delete", "--name=a", *VM, "--queued"]),
    "slurm": (slurm, [CONFIG, "--workdir=runs/x", "--config.seed=3", "--nodes=4", "--partition=gpu"]),
    "slurm, status": (slurm, ["status", "--name=a"]),
    "slurm, stop": (slurm, ["stop", "--name=a"]),
}
PROGRAMS = ("gcloud", "kubectl", "sbatch", "squeue", "scancel", "mkdir")


def printed(module, words, capsys):
    assert launcher(lambda: module.main([*words, "--dry-run"])) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("call", CALLS)
def test_prints_exactly_what_it_runs(call, programs, capsys, monkeypatch):
    module, words = CALLS[call]
    programs.record(*PROGRAMS)
    script = printed(module, words, capsys)
    assert programs.take() == []  # nothing was run
    done = programs.bash(script)
    assert done.returncode == 0, done.stderr
    pasted = programs.take()
    for name, value in programs.environment.items():
        monkeypatch.setenv(name, value)
    assert launcher(lambda: module.main(words)) == 0
    run = programs.take()
    # A shell's here-document ends with a line's end, as the text does.
    assert [entry.rstrip(b"\n") for entry in run] == [entry.rstrip(b"\n") for entry in pasted]
    assert run


def test_a_step_that_fails_is_the_last(programs, capsys, monkeypatch):
    programs.record("kubectl")
    programs.add("gcloud", "#!/bin/bash\nexit 3\n")
    monkeypatch.setenv("PATH", programs.environment["PATH"])
    monkeypatch.setenv("RECORDS", programs.environment["RECORDS"])
    assert launcher(lambda: gke.main(CALLS["gke"][1])) == 3
    assert programs.take() == []
    assert "gcloud ended with 3; nothing after it was run" in capsys.readouterr().err


@pytest.mark.parametrize(("state", "code"), [("ACTIVE", 0), ("SUSPENDED", 1), ("FAILED", 1)])
def test_waits_for_a_queued_resource(state, code, programs, capsys):
    """Two polls that find it waiting, then the state; the run is started only where there are machines."""
    script = printed(*CALLS["vm, slices"], capsys)
    programs.add("sleep", "#!/bin/bash\n")
    programs.add(
        "gcloud",
        f"""#!/bin/bash
        case " $* " in *" describe "*) ;; *" ssh "*) echo STARTED ; exit ;; *) exit ;; esac
        echo x >> "$RECORDS/../polls"
        [ "$(wc -l < "$RECORDS/../polls")" -gt 2 ] && echo {state} || echo WAITING_FOR_RESOURCES
        """,
    )
    done = programs.bash(f"set -e\n{script}")
    assert done.returncode == code
    assert done.stdout.count("pretrain-sample: WAITING_FOR_RESOURCES") == 2
    assert ("STARTED" in done.stdout) == (code == 0)


def test_gcloud_knows_every_word(gcloud, programs, capsys):
    programs.record(*PROGRAMS)
    for call, (module, words) in CALLS.items():
        if not call.startswith("slurm"):
            programs.bash(printed(module, words, capsys))
    checked = {gcloud.check(call) for call in programs.take() if call.startswith(b"gcloud")}
    assert len(checked) == 9, checked  # create, describe, ssh, delete for each of two, and get-credentials


@pytest.mark.parametrize(
    ("module", "words", "sentence"),
    [
        (gke, [*TRAIN, *CLOUD[:1], *CLOUD[2:], *GKE], "--image=... is missing"),
        (gke, ["logs", *GKE], "--config=... is missing"),
        (tpu_vm, [*TRAIN, *CLOUD, *VM, "--slices=2"], "add --queued"),
        (tpu_vm, [*TRAIN, *CLOUD, *VM, "--spot", "--reserved"], "leave one out"),
        (tpu_vm, [*TRAIN, *CLOUD[:2], "--topology=tpu7x:4x4x4", *VM], "use launch/gke.py"),
        (tpu_vm, ["--config=/etc/hostname", "--workdir=gs://runs/x", *CLOUD, *VM], "is not a Python file"),
        (slurm, [CONFIG, "--workdir=gs://runs/x"], "not a folder that the nodes"),
        (slurm, [CONFIG, "--workdir=a b"], "cannot stand in a batch script"),
        (slurm, [CONFIG, "--workdir=x", "--nodes=0"], "1 or more"),
        (slurm, [CONFIG, "--workdir=x", "--grace=99999"], "65535"),
        (slurm, ["logs", CONFIG], "--workdir=... is missing"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_2(module, words, sentence, capsys):
    assert launcher(lambda: module.main([*words, "--dry-run"])) == 2
    out, errors = capsys.readouterr()
    assert sentence in errors
    assert errors.startswith("skyjax: ")
    assert errors.count("\n") == 1
    assert out == ""


def test_configs_from_elsewhere_are_not_in_the_image(tmp_path, capsys):
    config = tmp_path / "mine.py"
    config.write_text((ROOT / "configs/pretrain_sample.py").read_text())
    words = [f"--config={config}", "--workdir=gs://runs/x", *CLOUD, *GKE, "--dry-run"]
    assert launcher(lambda: gke.main(words)) == 2
    assert "not in this checkout" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["gke", "tpu_vm", "slurm"])
def test_scripts_run_from_anywhere_and_help(script, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / f"{script}.py"), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"python launch/{script}.py --config=" in done.stdout
