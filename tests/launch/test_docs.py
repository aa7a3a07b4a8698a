"""Every command of docs/launch.md: gcloud knows its words, and the launchers take theirs (--dry-run)."""

import pathlib
import re

import gke
import slurm
import tpu_vm
from job import launcher

ROOT = pathlib.Path(__file__).parents[2]
LAUNCHERS = {"launch/gke.py": gke, "launch/tpu_vm.py": tpu_vm, "launch/slurm.py": slurm}


def test_commands_of_the_page(gcloud, programs, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs/launch.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    programs.record("gcloud", "kubectl", "docker", "git", "python")
    done = programs.bash("set -eu\n" + "\n".join(blocks))
    assert done.returncode == 0, done.stderr
    calls = [call.decode().split("\0")[:-1] for call in programs.take()]
    assert len(calls) >= sum(line.startswith(("gcloud", "python", "docker")) for line in "\n".join(blocks).splitlines())
    # What the calls need was set: no value is empty.
    assert not [word for call in calls for word in call if word.endswith("=")]
    checked = {gcloud.check("\0".join([*call, ""]).encode()) for call in calls if call[0] == "gcloud"}
    assert {"container node-pools create", "storage buckets create", "services enable"} <= checked
    started = [call[1:] for call in calls if call[0] == "python"]
    assert {script for script, *_ in started} == set(LAUNCHERS)
    for script, *words in started:
        assert launcher(lambda script=script, words=words: LAUNCHERS[script].main([*words, "--dry-run"])) == 0
