"""Starts `skyjax train` on GKE as a JobSet: one Job a slice, one pod a host.

    python launch/gke.py --config=configs/skysense.py --workdir=gs://BUCKET/runs/first --topology=v5p:4x4x8 \\
        --slices=2 --image=REGION-docker.pkg.dev/PROJECT/skyjax/skyjax:1 --project=PROJECT --cluster=CLUSTER \\
        --location=REGION

The other actions need --name, --project, --cluster and --location only. stop ends the run: its processes save and the
pods vanish; start goes on from there. docs/launch.md tells what the cluster needs.
"""

import argparse
import json
import pathlib
import string
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

import yaml
from job import (
    MOUNTS,
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

TEMPLATE = pathlib.Path(__file__).with_name("jobset.yaml")
# A checkpoint is written by all hosts and becomes visible by a rename, so none may remember what it saw a minute ago.
SHARED_WRITES = "implicit-dirs,rename-dir-limit=200000,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0"
# Records do not change.
READ_ONLY = "implicit-dirs,metadata-cache:ttl-secs:-1,metadata-cache:stat-cache-max-size-mb:-1"


def main(words: Sequence[str] | None = None) -> int:
    """Does what the words say; returns the exit code."""
    options, overrides = parse(_parser(), words)
    name = name_of(options)
    kubectl = ["kubectl", f"--namespace={options.namespace}"]
    if options.action == "start":
        last = Step((*kubectl, "apply", "--filename=-"), manifest(options, overrides))
    elif options.action == "stop":
        last = Step((*kubectl, "delete", "jobset", name))
    elif options.action == "status":
        last = Step((*kubectl, "get", "jobset,job,pod", f"--selector=jobset.sigs.k8s.io/jobset-name={name}"))
    else:
        # The first host of the first slice is process 0, which reports for all.
        first = "jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
        selector = f"--selector=jobset.sigs.k8s.io/jobset-name={name},{first}"
        last = Step((*kubectl, "logs", selector, "--container=skyjax", "--follow", "--tail=100"))
    where = (f"--location={options.location}", f"--project={options.project}")
    log_in = Step(("gcloud", "container", "clusters", "get-credentials", options.cluster, *where))
    return perform([log_in, last], options.dry_run)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("launch/gke.py", __doc__, ("start", "status", "logs", "stop"))
    add_slices(parser)
    parser.add_argument("--cluster", required=True, help="the GKE cluster, with JobSet 0.8 or newer")
    parser.add_argument("--location", required=True, help="region or zone of the cluster")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--service-account", default="skyjax", help="of Kubernetes, which may use the buckets")
    parser.add_argument("--queue", help="Kueue's local queue, where the cluster has Kueue")
    parser.add_argument("--reservation", help="name of the reservation that the chips are taken from")
    parser.add_argument("--grace", type=int, default=600, help="seconds between SIGTERM and SIGKILL (default 600)")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="may be repeated")
    return parser


def manifest(options: argparse.Namespace, overrides: Sequence[str]) -> str:
    """The JobSet, as YAML with comments.

    Raises:
      UserError: an option is missing or cannot be.
    """
    require(options, "image")
    part = slice_of(options)
    if options.slices > 1 and part.hosts == 1:
        raise UserError(
            f"--slices={options.slices}: on GKE each of several slices has several hosts, {options.topology} has one"
        )
    if options.grace < 1:
        raise UserError(f"--grace={options.grace} leaves no second to save in")
    words = train_in_cloud(options, overrides)
    if options.slices == 1:
        network: dict[str, Any] = {}
    else:  # traffic between slices goes past the pod network
        network = {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    selectors = {
        "cloud.google.com/gke-tpu-accelerator": part.gke_accelerator,
        "cloud.google.com/gke-tpu-topology": part.shape,
    }
    if options.spot:
        selectors["cloud.google.com/gke-spot"] = "true"
    if options.reservation:
        selectors["cloud.google.com/reservation-name"] = options.reservation
    labels = {"kueue.x-k8s.io/queue-name": options.queue} if options.queue else {}
    mounts = [{"name": f"bucket-{i}", "mountPath": f"{MOUNTS}/{bucket}"} for i, bucket in enumerate(buckets(words))]
    text = string.Template(TEMPLATE.read_text()).substitute(
        title=f"skyjax train on {options.slices} x {options.topology}: {options.slices * part.chips} chips on"
        f" {options.slices * part.hosts} hosts",
        name=json.dumps(name_of(options)),
        namespace=json.dumps(options.namespace),
        labels=_block({"labels": labels} if labels else {}, 2),
        max_restarts=restarts(options),
        slices=options.slices,
        hosts=part.hosts,
        chips=part.chips_per_host,
        grace=options.grace,
        service_account=json.dumps(options.service_account),
        network=_block(network, 12),
        selectors=_block(selectors, 14),
        image=json.dumps(options.image),
        command=_block(["tini", "--", *mounted(words)], 14),
        environment=_block(_environment(options.env), 14),
        mounts=_block(mounts, 14),
        volumes=_block(_volumes(options, words), 12),
    )
    return "".join(line for line in text.splitlines(keepends=True) if line.strip())


def _environment(pairs: Sequence[str]) -> list[dict[str, str]]:
    found = {"PYTHONUNBUFFERED": "1"}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f'--env="{pair}" is not NAME=VALUE')
        found[name] = value
    return [{"name": name, "value": value} for name, value in found.items()]


def _volumes(options: argparse.Namespace, words: Sequence[str]) -> list[dict[str, Any]]:
    """One volume a bucket: that of the workdir is written to, the others are read."""
    found = []
    for i, bucket in enumerate(buckets(words)):
        written = options.workdir.startswith(f"gs://{bucket}/")
        attributes = {"bucketName": bucket, "mountOptions": SHARED_WRITES if written else READ_ONLY}
        if options.slices > 1:  # on the host's network the driver would else ask as the node
            cluster = f"projects/{options.project}/locations/{options.location}/clusters/{options.cluster}"
            attributes |= {
                "hostNetworkPodKSA": "true",
                "identityProvider": f"https://container.googleapis.com/v1/{cluster}",
            }
        driver = {"driver": "gcsfuse.csi.storage.gke.io", "readOnly": not written, "volumeAttributes": attributes}
        found.append({"name": f"bucket-{i}", "csi": driver})
    return found


def _block(value: Any, indent: int) -> str:
    """YAML at an indentation; nothing for an empty value."""
    text = yaml.safe_dump(value, sort_keys=False, width=10_000) if value else ""
    return textwrap.indent(text.rstrip(), " " * indent)


if __name__ == "__main__":
    sys.exit(launcher(main))
