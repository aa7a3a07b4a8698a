"""Writes what the golden tests compare with: python tests/golden/write_goldens.py [state] [small] [full]."""

import functools
import sys
from collections.abc import Mapping

import golden_collectives
import shipped

from skyjax.train import state as states


def write_state() -> None:
    """Where every array of every shipped config lives; seconds."""
    shipped.STATES.mkdir(exist_ok=True)
    for path in shipped.STATES.glob("*.txt"):
        path.unlink()
    for name in shipped.names():
        shipped.state_file(name).write_text(shipped.state_table(name, states.abstract(shipped.load(name))))
        print(shipped.state_file(name))


def write_collectives(cases: Mapping[str, golden_collectives.Case]) -> None:
    """What the chips of a compiled step send each other."""
    golden_collectives.FOLDER.mkdir(exist_ok=True)
    for name, case in cases.items():
        golden_collectives.file(name).write_text(golden_collectives.compiled(case))
        print(golden_collectives.file(name), flush=True)


PARTS = {
    "state": write_state,
    "small": functools.partial(write_collectives, golden_collectives.SMALL),  # a minute each
    "full": functools.partial(write_collectives, golden_collectives.FULL),  # minutes and 6 GB each
}


if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
