"""The JobSet that launch/gke.py renders: valid by strict schemas, right in its numbers, and what it does at each end.

The Job inside is validated by the schemas of Kubernetes itself (kubernetes-validate), which know no JobSet and pass an
unknown kind in silence; its envelope is validated by jobset.schema.json.
"""

import copy
import itertools
import json
import pathlib

import gke
import jsonschema
import kubernetes_validate
import pytest
import yaml

from skyjax import cli
from skyjax.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
SCHEMA = json.loads(pathlib.Path(__file__).with_name("jobset.schema.json").read_text())
WORDS = [
    "--config=configs/pretrain_sample.py",
    "--workdir=gs://runs-bucket/first",
    "--topology=v5p:4x4x8",
    "--image=europe-docker.pkg.dev/p/skyjax/skyjax:1",
    "--project=p",
    "--cluster=c",
    "--location=us-east5",
]


def render(*words):
    return yaml.safe_load(text(*words))


def text(*words):
    return gke.manifest(*gke.parse(gke._parser(), [*WORDS, *words]))


def mistakes(jobset):
    """What the two schemas say against it."""
    found = [error.message for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(jobset)]
    for replicated in jobset["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **replicated["template"]}
        try:
            kubernetes_validate.validate(job, "1.32", strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(str(error.message))
    return found


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5e:16x16", "v6e:4x8", "v4:2x2x4", "v5p:8x8x16", "tpu7x:4x4x4"])
@pytest.mark.parametrize("slices", [1, 4])
def test_manifests_are_valid(topology, slices):
    if topology == "v5e:2x2" and slices > 1:
        with pytest.raises(UserError, match="several hosts"):
            render(f"--topology={topology}", f"--slices={slices}")
        return
    for extra in itertools.product(["--spot", "--max-restarts=0"], ["--queue=q", "--reservation=r"], ["--env=A=b: c"]):
        assert mistakes(render(f"--topology={topology}", f"--slices={slices}", *extra)) == []


def test_mistakes_are_found():
    """What the validators are for: a typo in the envelope, in the Job, in the pod, and a wrong type."""
    good = render("--slices=2")

    def changed(*path, to):
        jobset = copy.deepcopy(good)
        *parents, last = path
        place = jobset
        for key in parents:
            place = place[key]
        place[last] = to
        return jobset

    job = ("spec", "replicatedJobs", 0, "template", "spec")
    assert mistakes(changed("spec", "failurePolicy", "maxRestart", to=3))
    assert mistakes(changed("spec", "failurePolicy", "rules", 0, "onJobFailureReasons", to=["PodFailurePolic"]))
    assert mistakes(changed(*job, "backofLimit", to=0))
    assert mistakes(changed(*job, "parallelism", to="32"))
    assert mistakes(changed(*job, "template", "spec", "containers", 0, "resource", to={}))


def parts(*words):
    jobset = render(*words)
    replicated = jobset["spec"]["replicatedJobs"][0]
    job = replicated["template"]["spec"]
    return jobset, replicated, job, job["template"]["spec"], job["template"]["spec"]["containers"][0]


def test_one_job_a_slice_and_one_pod_a_host():
    """v5p:4x4x8: 128 chips, 4 a host, so 32 hosts a slice."""
    jobset, replicated, job, pod, container = parts("--slices=3", "--spot", "--reservation=r", "--queue=q")
    assert replicated["replicas"] == 3
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    assert job["parallelism"] == job["completions"] == 32
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x8",
        "cloud.google.com/gke-spot": "true",
        "cloud.google.com/reservation-name": "r",
    }
    assert jobset["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "q"}
    assert jobset["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert text("--slices=3").startswith("# skyjax train on 3 x v5p:4x4x8: 384 chips on 96 hosts\n")


def test_longest_name_still_names_hosts():
    """NAME-slice-JOB-POD is a host's name: 63 characters, here with 9999 slices of 1536 hosts."""
    name = "a" * 45
    assert parts(f"--name={name}")[0]["metadata"]["name"] == name
    assert len(f"{name}-slice-9999-1536") <= 63
    with pytest.raises(UserError, match="at most 45"):
        render(f"--name={name}a")


def fate(jobset, code, disrupted=False):
    """What Kubernetes and JobSet do about a pod that ends so: the documented rules, first match first."""
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    action = "Count"
    for rule in job["podFailurePolicy"]["rules"]:
        codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions", [])
        if codes and codes["containerName"] == "skyjax" and (code in codes["values"]) == (codes["operator"] == "In"):
            action = rule["action"]
            break
        if disrupted and {"type": "DisruptionTarget", "status": "True"} in conditions:
            action = rule["action"]
            break
    if action == "Ignore":
        return "a new pod"
    assert job["backoffLimit"] == 0  # so that the first counted failure fails the Job
    reason = {"FailJob": "PodFailurePolicy", "Count": "BackoffLimitExceeded"}[action]
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        if reason in rule["onJobFailureReasons"]:
            return {"FailJobSet": "the end"}[rule["action"]]
    return "all again, counted"


@pytest.mark.parametrize(
    ("code", "disrupted", "want"),
    [
        (75, False, "a new pod"),  # preempted, everything saved
        (75, True, "a new pod"),
        (143, True, "a new pod"),  # evicted before it could save
        (137, True, "a new pod"),
        (2, False, "the end"),  # the user's mistake
        (1, False, "all again, counted"),
        (124, False, "all again, counted"),  # hung
        (134, False, "all again, counted"),  # lost a peer
        (137, False, "all again, counted"),  # out of memory
    ],
)
def test_what_happens_at_each_end(code, disrupted, want):
    jobset, _, _, pod, _ = parts("--slices=2", "--max-restarts=7")
    assert fate(jobset, code, disrupted) == want
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 7
    assert pod["restartPolicy"] == "Never"  # without which Kubernetes takes no podFailurePolicy


def test_restarts_by_default():
    assert parts()[0]["spec"]["failurePolicy"]["maxRestarts"] == 20
    assert parts("--spot")[0]["spec"]["failurePolicy"]["maxRestarts"] == 200


def test_sigterm_reaches_skyjax_and_there_is_time_to_save():
    _, _, _, pod, container = parts("--grace=900")
    assert container["command"][:4] == ["tini", "--", "skyjax", "train"]
    assert "args" not in container
    assert pod["terminationGracePeriodSeconds"] == 900
    assert 'ENTRYPOINT ["tini", "--"]' in (ROOT / "Containerfile").read_text()


def test_the_command_is_one_that_skyjax_takes(capsys, monkeypatch):
    """With odd values, and from the folder that the image has."""
    monkeypatch.chdir(ROOT)
    command = parts("--config.steps=12", "--config.data.sources=(('gs://data/it''s',1.0),)")[-1]["command"]
    assert cli.main([*command[3:], "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert '"steps": 12' in out
    assert '"/gcs/data/its"' in out


def test_buckets_are_mounted():
    """The workdir's for writing, without memory of what was there; the data's for reading."""
    _, _, _, pod, container = parts("--config.data.sources=(('gs://data/a',1.0),('gs://data/b',1.0))")
    assert "--workdir=/gcs/runs-bucket/first" in container["command"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"shared-memory": "/dev/shm", "bucket-0": "/gcs/runs-bucket", "bucket-1": "/gcs/data"}
    volumes = {volume["name"]: volume.get("csi") for volume in pod["volumes"]}
    assert set(volumes) == set(mounts)
    runs, data = volumes["bucket-0"], volumes["bucket-1"]
    assert (runs["readOnly"], data["readOnly"]) == (False, True)
    assert runs["volumeAttributes"]["bucketName"] == "runs-bucket"
    options = runs["volumeAttributes"]["mountOptions"].split(",")
    assert {"metadata-cache:ttl-secs:0", "metadata-cache:negative-ttl-secs:0", "implicit-dirs"} <= set(options)


def test_several_slices_talk_on_the_hosts_network():
    for slices, want in ((1, None), (2, True)):
        _, _, _, pod, _ = parts(f"--slices={slices}")
        attributes = pod["volumes"][1]["csi"]["volumeAttributes"]
        assert pod.get("hostNetwork") == want
        assert pod.get("dnsPolicy") == (want and "ClusterFirstWithHostNet")
        assert ("hostNetworkPodKSA" in attributes) == bool(want)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--workdir=runs/first"], "gs://BUCKET/PATH"),
        (["--workdir=gs://bucket"], "gs://BUCKET/PATH"),
        (["--config=configs/none.py"], "there is no file"),
        (["--config.stepps=3"], 'nearest: "steps"'),
        (["--topology=v5p:4x4x7"], 'no slice "4x4x7"'),
        (["--slices=0"], "1 or more"),
        (["--max-restarts=-1"], "0 or more"),
        (["--grace=0"], "no second"),
        (["--name=My_Run"], "small letters"),
        (["--env=A"], "NAME=VALUE"),
        (["--imgae=x"], 'did you mean "--image"?'),
    ],
)
def test_mistakes_of_the_user(words, sentence):
    with pytest.raises(UserError) as error:
        text(*words)
    assert sentence in str(error.value)
