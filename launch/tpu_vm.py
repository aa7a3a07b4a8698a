"""Starts `skyjax train` on Cloud TPU VMs: one slice at once, or by a queued resource, which also gives several slices.

    python launch/tpu_vm.py --config=configs/skysense.py --workdir=gs://BUCKET/runs/first --topology=v5e:16x16 \\
        --image=REGION-docker.pkg.dev/PROJECT/skyjax/skyjax:1 --project=PROJECT --zone=ZONE [--queued --slices=2 --spot]

up makes the machines and starts the run there; start does the second alone. The other actions need --name, --project,
--zone and, where it was given, --queued. stop ends the run, which saves; the machines stay, and cost, until delete.
"""

import argparse
import pathlib
import shlex
import sys
from collections.abc import Sequence

from job import (
    Step,
    add_slices,
    buckets,
    launcher,
    make_parser,
    mounted,
    name_of,
    parse,
    perform,
    require,
    restarts,
    slice_of,
    train_in_cloud,
)

from skyjax.errors import UserError

SCRIPT = pathlib.Path(__file__).with_name("on_tpu_vm.sh")
SCOPES = "https://www.googleapis.com/auth/cloud-platform"  # for the buckets and the image
# A queued resource that failed or was preempted does not come back: delete it and ask again.
WAIT = """while :; do
  state=$({describe}) || exit 1
  echo "{name}: $state"
  case $state in ACTIVE) exit 0 ;; FAILED|SUSPENDING|SUSPENDED|DELETING) exit 1 ;; esac
  sleep 30
done"""


def main(words: Sequence[str] | None = None) -> int:
    """Does what the words say; returns the exit code."""
    options, overrides = parse(_parser(), words)
    name = name_of(options)
    kind = "queued-resources" if options.queued else "tpu-vm"
    tpus = ("gcloud", "compute", "tpus", kind)
    where = (f"--project={options.project}", f"--zone={options.zone}")
    everywhere = ("--worker=all", *(("--node=all", "--batch-size=all") if options.queued else ()))
    steps: list[Step] = []
    if options.action in ("up", "start"):
        script = on_vm(options, overrides)
        if options.action == "up":
            steps += create(options, name, tpus, where)
        steps.append(Step((*tpus, "ssh", name, *where, *everywhere, f"--command={script}")))
    elif options.action == "status":
        steps.append(Step((*tpus, "describe", name, *where)))
    elif options.action == "logs":
        steps.append(
            Step((*tpus, "ssh", name, *where, "--worker=0", "--command=sudo journalctl --unit=skyjax --follow"))
        )
    elif options.action == "stop":
        steps.append(Step((*tpus, "ssh", name, *where, *everywhere, "--command=sudo systemctl disable --now skyjax")))
    else:
        steps.append(Step((*tpus, "delete", name, *where, *(("--force",) if options.queued else ()))))
    return perform(steps, options.dry_run)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("launch/tpu_vm.py", __doc__, ("up", "start", "status", "logs", "stop", "delete"))
    add_slices(parser)
    parser.add_argument("--zone", required=True, help="of the machines")
    parser.add_argument("--queued", action="store_true", help="by a queued resource: waits for room; several slices")
    parser.add_argument("--valid-for", help="how long a queued resource may wait, as in 6h (default: for ever)")
    parser.add_argument("--reserved", action="store_true", help="from the project's reservation")
    parser.add_argument("--service-account", help="of the machines, which may use the buckets (default: the project's)")
    parser.add_argument("--grace", type=int, default=600, help="seconds between SIGTERM and SIGKILL (default 600)")
    return parser


def create(options: argparse.Namespace, name: str, tpus: Sequence[str], where: Sequence[str]) -> list[Step]:
    """Makes the machines, and waits until they are there.

    Raises:
      UserError: an option is missing or cannot be; or Cloud TPU has no machines of this kind.
    """
    part = slice_of(options)
    if part.accelerator_type is None:
        raise UserError(f"topology: Cloud TPU VMs have no {part.generation}; use launch/gke.py")
    if options.spot and options.reserved:
        raise UserError("--spot and --reserved exclude each other; leave one out")
    words = [*tpus, "create", name, *where, f"--accelerator-type={part.accelerator_type}", f"--scopes={SCOPES}"]
    words += ["--spot"] if options.spot else []
    words += ["--reserved"] if options.reserved else []
    words += [f"--service-account={options.service_account}"] if options.service_account else []
    if not options.queued:
        if options.slices > 1 or options.valid_for:
            raise UserError("--slices and --valid-for belong to a queued resource; add --queued")
        return [Step((*words, f"--version={part.runtime_version}"))]
    words.append(f"--runtime-version={part.runtime_version}")
    words += (
        [f"--node-count={options.slices}", f"--node-prefix={name}"] if options.slices > 1 else [f"--node-id={name}"]
    )
    words += [f"--valid-until-duration={options.valid_for}"] if options.valid_for else []
    describe = shlex.join([*tpus, "describe", name, *where, "--format=value(state.state)"])
    return [Step(tuple(words)), Step(("bash", "-c", WAIT.format(describe=describe, name=name)))]


def on_vm(options: argparse.Namespace, overrides: Sequence[str]) -> str:
    """The script that each machine's bash runs.

    Raises:
      UserError: an option is missing or cannot be.
    """
    require(options, "image")
    words = train_in_cloud(options, overrides)
    header = {
        "IMAGE": shlex.quote(options.image),
        "COMMAND": f"({shlex.join(mounted(words))})",
        "BUCKETS": f"({shlex.join(buckets(words))})",
        "WORKDIR_BUCKET": shlex.quote(buckets([options.workdir])[0]),
        "MAX_RESTARTS": str(restarts(options)),
        "GRACE": str(options.grace),
    }
    return "\n".join([*(f"{name}={value}" for name, value in header.items()), SCRIPT.read_text()])


if __name__ == "__main__":
    sys.exit(launcher(main))
