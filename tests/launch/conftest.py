"""Launchers are scripts that import their neighbours, so their folder is on the path; the programs they call record."""

import pathlib
import runpy
import shutil
import stat
import subprocess
import sys

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
sys.path.insert(0, str(LAUNCH))

RECORDER = """#!/bin/bash
{ printf '%s\\0' "${0##*/}" "$@"; [ -t 0 ] || cat; } > "$(mktemp "$RECORDS/XXXXXX")"
case " $* " in *" describe "*) echo ACTIVE ;; esac
"""


class Programs:
    """A folder of programs to be first on the path. `record` adds one that keeps its words and its input."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder / "bin"
        self.records = folder / "records"
        self.folder.mkdir()
        self.records.mkdir()
        self.environment = {"PATH": f"{self.folder}:/usr/bin:/bin", "RECORDS": str(self.records)}

    def add(self, name: str, script: str) -> None:
        path = self.folder / name
        path.write_text(script)
        path.chmod(path.stat().st_mode | stat.S_IEXEC)

    def record(self, *names: str) -> None:
        for name in names:
            self.add(name, RECORDER)

    def take(self) -> list[bytes]:
        """What was recorded since the last time, in any order: one entry a call."""
        found = []
        for path in self.records.iterdir():
            found.append(path.read_bytes())
            path.unlink()
        return sorted(found)

    def bash(self, script: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["/bin/bash", "-c", script],
            stdin=subprocess.DEVNULL,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )


@pytest.fixture
def programs(tmp_path):
    return Programs(tmp_path)


class Gcloud:
    """gcloud's own table of commands and flags, which comes with it for the completion of words."""

    def __init__(self, table: pathlib.Path) -> None:
        self.tree = runpy.run_path(str(table))["STATIC_COMPLETION_CLI_TREE"]

    def check(self, call: bytes) -> str:
        """Fails where gcloud would not know a word of a recorded call; returns its command, without name and flags."""
        words = call.decode().split("\0")[1:-1]
        node, flags, rest = self.tree, set(self.tree["flags"]), list(words)
        while rest and rest[0] in node.get("commands", {}):
            node = node["commands"][rest.pop(0)]
            flags |= set(node["flags"])
        assert not node.get("commands"), words  # a command, not a group of them
        given = {word.split("=")[0] for word in rest if word.startswith("--")}
        assert given <= flags, (words, given - flags)
        return " ".join(words[: len(words) - len(rest)])


@pytest.fixture(scope="session")
def gcloud():
    binary = shutil.which("gcloud")
    table = pathlib.Path(binary).resolve().parents[1] / "data/cli/gcloud_completions.py" if binary else None
    if table is None or not table.is_file():
        pytest.skip("gcloud is not installed")
    return Gcloud(table)
