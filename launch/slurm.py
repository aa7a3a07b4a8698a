"""Starts `skyjax train` on a SLURM cluster: whole nodes, one task a GPU.

    python launch/slurm.py --config=configs/skysense.py --workdir=/shared/runs/first --nodes=4 --gpus-per-node=8 \\
        --setup="source .venv/bin/activate" [--partition=NAME --account=NAME --time=1-00:00:00]

status, logs and stop need --name or --config, and logs --workdir. The checkout and the workdir lie where all nodes see
them.
"""

import argparse
import pathlib
import re
import shlex
import sys
from collections.abc import Sequence

from job import ROOT, Step, launcher, make_parser, name_of, parse, perform, require, train

from skyjax.errors import UserError

SCRIPT = pathlib.Path(__file__).with_name("on_slurm.sh")


def main(words: Sequence[str] | None = None) -> int:
    """Does what the words say; returns the exit code."""
    options, overrides = parse(_parser(), words)
    name = name_of(options)
    if options.action == "start":
        script = batch_script(options, overrides)
        steps = [Step(("mkdir", "-p", options.workdir)), Step(("sbatch",), script)]
    elif options.action == "status":
        steps = [Step(("squeue", "--me", f"--name={name}"))]
    elif options.action == "stop":
        steps = [Step(("scancel", "--me", f"--name={name}"))]
    else:
        require(options, "workdir")
        steps = [Step(("tail", "--follow=name", "--lines=100", f"{options.workdir}/slurm.log"))]
    return perform(steps, options.dry_run)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("launch/slurm.py", __doc__, ("start", "status", "logs", "stop"))
    parser.add_argument("--nodes", type=int, default=1, help="how many, each whole (default 1)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="and so tasks a node (default 8)")
    parser.add_argument("--time", default="1-00:00:00", help="limit of one attempt (default one day); it goes on after")
    parser.add_argument("--partition", help="of the cluster (default: its own)")
    parser.add_argument("--account", help="that is charged (default: the user's)")
    parser.add_argument("--setup", default="source .venv/bin/activate", help="a line that makes `skyjax` known")
    parser.add_argument("--grace", type=int, default=300, help="seconds to save in before the time limit (default 300)")
    parser.add_argument("--max-restarts", type=int, default=20, help="after crashes and hangs (default 20)")
    return parser


def batch_script(options: argparse.Namespace, overrides: Sequence[str]) -> str:
    """What sbatch gets.

    Raises:
      UserError: an option is missing or cannot be.
    """
    words = train(options, overrides)
    for option, value in (("--nodes", options.nodes), ("--gpus-per-node", options.gpus_per_node)):
        if value < 1:
            raise UserError(f"{option}={value}: it is 1 or more")
    if options.max_restarts < 0:
        raise UserError(f"--max-restarts={options.max_restarts} is not a number of restarts; it is 0 or more")
    if not 1 <= options.grace <= 65535:
        raise UserError(f"--grace={options.grace}: SLURM takes 1 to 65535 seconds")
    if "://" in options.workdir:
        raise UserError(f'--workdir="{options.workdir}" is not a folder that the nodes of a cluster share')
    # A directive ends at the line's end, and its value at a space.
    for option in ("workdir", "time", "partition", "account"):
        value = getattr(options, option)
        if value is not None and not re.fullmatch(r"[^\s'\"#\\]+", value):
            raise UserError(
                f'--{option}="{value}" cannot stand in a batch script: it has a space, a quote, "#" or "\\"'
            )
    directives = {
        "job-name": name_of(options),
        "nodes": options.nodes,
        "ntasks-per-node": options.gpus_per_node,
        "gpus-per-node": options.gpus_per_node,
        "exclusive": None,
        "mem": 0,  # all of the node's
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "requeue": None,
        # To the tasks, not to the batch script: skyjax saves and ends with 75.
        "signal": f"TERM@{options.grace}",
        "output": f"{options.workdir}/slurm.log",
        "open-mode": "append",
        "chdir": ROOT,
    }
    alone = ("exclusive", "requeue")
    lines = [
        f"#SBATCH --{name}" + ("" if name in alone else f"={value}")
        for name, value in directives.items()
        if name in alone or value is not None
    ]
    header = [
        f"COMMAND=({shlex.join(words)})",
        f"WORKDIR={shlex.quote(options.workdir)}",
        f"MAX_RESTARTS={options.max_restarts}",
        options.setup,
    ]
    return "\n".join(["#!/bin/bash", *lines, *header, SCRIPT.read_text()])


if __name__ == "__main__":
    sys.exit(launcher(main))
