"""Runs every command of the README in order, as a reader would type them. `make test` is left to the caller.

python tests/readme.py
"""

import pathlib
import re
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]


def commands(text: str) -> list[tuple[str, str]]:
    """(language, code) of each fenced block that a reader would run, one entry a command of a shell block."""
    found = []
    for language, code in re.findall(r"^```(sh|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if language == "python":
            found.append((language, code))
            continue
        joined = code.replace("\\\n", " ")
        found += [(language, line) for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    return found


def main() -> int:
    """Runs them; the first that fails ends the run."""
    for language, code in commands((ROOT / "README.md").read_text()):
        if code.startswith(("make test", "git clone", "cd ")):
            continue
        print(f"--- {code.strip()}", flush=True)
        start = time.monotonic()
        if language == "python":
            done = subprocess.run([".venv/bin/python", "-c", code], cwd=ROOT, check=False)
        else:
            done = subprocess.run(["bash", "-euo", "pipefail", "-c", code], cwd=ROOT, check=False)
        print(f"--- {time.monotonic() - start:.0f} s, exit {done.returncode}", flush=True)
        if done.returncode:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
