"""Our JobSet beside the one that xpk makes, field by field; and our table of slices beside xpk's.

xpk is Google's own launcher for TPUs on GKE. It wants old versions of what skyjax uses, so it gets an environment of
its own. Every field that differs stands here with its reason.
"""

import json
import math
import os
import subprocess
import sys

import accelerators
import gke
import pytest
import yaml

from skyjax.errors import UserError

pytestmark = pytest.mark.slow
XPK = "xpk==1.16.0"
POD = "spec.replicatedJobs.0.template.spec.template"
CONTAINER = f"{POD}.spec.containers.0"

DIFFERENT = {
    "metadata.labels": "Kueue's queue where one is named; xpk's own label on the run",
    "spec.ttlSecondsAfterFinished": "nothing is deleted that nobody asked to delete: the pods' logs stay",
    "spec.network": "JobSet's defaults, written out: the names are what processes find each other by",
    "spec.failurePolicy": "20 restarts instead of none, only after the last attempt's pods are gone; FailJobSet alike",
    "spec.replicatedJobs.0.name": "slice instead of slice-job",
    "spec.replicatedJobs.0.template.spec.completionMode": "JobSet's default, written out",
    "spec.replicatedJobs.0.template.spec.podReplacementPolicy": "the only one with a podFailurePolicy, written out",
    "spec.replicatedJobs.0.template.spec.podFailurePolicy": "xpk gives up at every code but 42 and signals; we at 2",
    f"{POD}.metadata.labels": "xpk's own label on the run",
    f"{POD}.metadata.annotations": "buckets as folders",
    f"{POD}.spec.serviceAccountName": "the one that may use the buckets",
    f"{POD}.spec.schedulerName": "Kubernetes' default, written out by xpk",
    f"{POD}.spec.imagePullSecrets": "xpk writes a secret of the name None where there is none",
    f"{POD}.spec.priorityClassName": "a class that xpk adds to its clusters",
    f"{POD}.spec.terminationGracePeriodSeconds": "600 s: a checkpoint of many GB is not written in 30",
    f"{POD}.spec.tolerations": "with its effect",
    f"{POD}.spec.volumes": "buckets as folders; shared memory under another name",
    f"{CONTAINER}.name": "skyjax instead of jax-tpu",
    f"{CONTAINER}.command": "no shell: xpk polls its child every 5 s from a bash with a trap",
    f"{CONTAINER}.env": "Python unbuffered",
    f"{CONTAINER}.ports": "named for people; on the host's network they are all open anyway",
    f"{CONTAINER}.volumeMounts": "buckets as folders; shared memory under another name",
}

DIFFERENT_TPU7X = {
    f"{POD}.spec.nodeSelector.cloud.google.com/placement-policy-name": "the policy of the node pools that xpk makes",
}


@pytest.fixture(scope="module")
def xpk(tmp_path_factory):
    """The folder of xpk's environment: 380 MB, a few minutes to install."""
    folder = tmp_path_factory.mktemp("xpk")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    subprocess.run([folder / "venv/bin/pip", "install", "--quiet", XPK], check=True)
    yield folder
    subprocess.run(["rm", "-rf", folder / "venv"], check=True)


def jobset_of_xpk(folder, tpu_type, slices):
    words = ["--dry-run", f"--tpu-type={tpu_type}", f"--num-slices={slices}", "--project=p", "--zone=us-west4-a"]
    words += ["--cluster=c", "--workload=train", "--docker-image=i", "--command=skyjax train"]
    done = subprocess.run(
        [folder / "venv/bin/xpk", "workload", "create", *words],
        env=os.environ | {"HOME": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    text = done.stdout[done.stdout.index("apiVersion: jobset") :]
    return yaml.safe_load(text[: text.index("\n[XPK]")])


def ours(topology, slices):
    words = ["--config=configs/pretrain_sample.py", "--workdir=gs://runs/first", "--name=train", "--image=i"]
    words += [f"--topology={topology}", f"--slices={slices}", "--project=p", "--cluster=c", "--location=us-west4"]
    return yaml.safe_load(gke.manifest(*gke.parse(gke._parser(), words)))


def fields(value, path=""):
    """Path -> value of every leaf."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if not items:
        return {path: value} if value not in (None, {}, []) else {}
    found = {}
    for key, child in items:
        found |= fields(child, f"{path}.{key}" if path else str(key))
    return found


@pytest.mark.parametrize(
    ("topology", "tpu_type"), [("v5e:16x16", "v5litepod-256"), ("v5p:4x4x8", "v5p-256"), ("tpu7x:4x4x4", "tpu7x-128")]
)
def test_differs_from_xpk_where_it_says(topology, tpu_type, xpk):
    reasons = DIFFERENT | (DIFFERENT_TPU7X if topology.startswith("tpu7x") else {})
    theirs, mine = fields(jobset_of_xpk(xpk, tpu_type, 2)), fields(ours(topology, 2))
    namespace = mine.pop("metadata.namespace")  # xpk leaves it to kubectl
    assert namespace == "default"
    differ = {path for path in theirs.keys() | mine.keys() if theirs.get(path) != mine.get(path)}
    without_reason = {path for path in differ if not any(path.startswith(known) for known in reasons)}
    assert {path: (theirs.get(path), mine.get(path)) for path in without_reason} == {}
    assert {known for known in reasons if not any(path.startswith(known) for path in differ)} == set()
    # What matters most is the same, and is compared at all.
    same = theirs.keys() & mine.keys() - differ
    job = "spec.replicatedJobs.0.template.spec"
    assert {
        "spec.replicatedJobs.0.replicas",
        f"{job}.parallelism",
        f"{job}.completions",
        f"{job}.backoffLimit",
        f"{POD}.spec.restartPolicy",
        f"{POD}.spec.hostNetwork",
        f"{POD}.spec.dnsPolicy",
        f"{POD}.spec.nodeSelector.cloud.google.com/gke-tpu-accelerator",
        f"{POD}.spec.nodeSelector.cloud.google.com/gke-tpu-topology",
        f"{CONTAINER}.image",
        f"{CONTAINER}.resources.limits.google.com/tpu",
        f"{CONTAINER}.securityContext.privileged",
        "metadata.annotations.alpha.jobset.sigs.k8s.io/exclusive-topology",
    } <= same


def test_table_equals_that_of_xpk(xpk):
    """Every slice of ours that xpk has as well, by its type's name: topology, hosts, chips a host, labels, machines."""
    program = (
        "import json; from xpk.core.system_characteristics import UserFacingNameToSystemCharacteristics as table;"
        "print(json.dumps({name: [s.topology, s.vms_per_slice, s.chips_per_vm, s.gke_accelerator, s.gce_machine_type]"
        " for name, s in table.items()}))"
    )
    done = subprocess.run([xpk / "venv/bin/python", "-c", program], capture_output=True, text=True, check=True)
    table = json.loads(done.stdout.splitlines()[-1])
    generations = {"v4": "v4", "v5litepod": "v5e", "v5p": "v5p", "v6e": "v6e", "tpu7x": "tpu7x"}
    compared, without = {}, {}
    for name, (shape, hosts, chips, label, machine) in table.items():
        kind, _, count = name.rpartition("-")
        if kind not in generations or not count.isdecimal() or "x" not in shape:
            continue
        try:
            part = accelerators.find(f"{generations[kind]}:{shape}")
        except UserError:
            without[name] = math.prod(map(int, shape.split("x")))
            continue
        row = (part.hosts, part.chips_per_host, part.gke_accelerator, part.machine_type)
        assert row == (hosts, chips, label, machine), name
        if part.accelerator_type:
            assert part.accelerator_type == name
        compared.setdefault(kind, set()).add(name)
    assert set(compared) == set(generations)
    assert sum(map(len, compared.values())) > 100
    # One-chip machines, which need no launcher, and v5p beyond the largest slice that is rented out.
    assert {
        name for name, chips in without.items() if chips > 1 and not (name.startswith("v5p") and chips > 6144)
    } == set()
