"""Which process reads what, whether all read the same, and who keeps the others waiting."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skyjax.errors import UserError
from skyjax.parallel.mesh import make_mesh
from skyjax.train import hosts


def mesh_of(processes):
    """A stand-in for a mesh over (data, fsdp, tensor): the process that each device belongs to."""
    owners = np.array(processes)
    devices = np.empty(owners.shape, object)
    for place, process in np.ndenumerate(owners):
        devices[place] = types.SimpleNamespace(process_index=int(process))
    return types.SimpleNamespace(
        devices=devices, shape=dict(zip(("data", "fsdp", "tensor"), owners.shape, strict=True))
    )


@pytest.mark.parametrize(
    ("processes", "want"),
    [
        ([[[0], [0]], [[1], [1]]], [(0, 2), (1, 2)]),
        ([[[1], [0]], [[1], [0]]], [(1, 2), (0, 2)]),  # not neighbours in the batch, but each row once
        ([[[0, 1]], [[2, 3]]], [(0, 2), (0, 2), (1, 2), (1, 2)]),  # tensor across processes: the same rows
        ([[[0, 1], [0, 1]]], [(0, 1), (0, 1)]),
        ([[[0, 0]]], [(0, 1)]),
    ],
)
def test_each_row_is_read_for_each_device_that_holds_it(monkeypatch, processes, want):
    for process, share in enumerate(want):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert hosts.share_of_batch(mesh_of(processes)) == share


def test_rows_that_are_shared_in_part_are_refused():
    with pytest.raises(UserError, match=r"partly the same rows of a batch; choose mesh.tensor"):
        hosts.share_of_batch(mesh_of([[[0, 0], [0, 1]], [[1, 1], [1, 1]]]))


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return {
        "index": np.arange(40, 44, dtype=np.uint32),
        "lonlat": rng.normal(size=(4, 2)).astype(np.float32),
        "global": {"sar": {"values": rng.normal(size=(4, 2, 3)).astype(np.float32), "valid": np.ones((4, 3), bool)}},
    }


def test_a_batch_is_told_by_what_is_in_it_and_where(batch):
    told = float(hosts.fingerprint(batch))
    assert told == int(told) < 2**24
    turned = jax.tree.map(lambda x: x[::-1], batch)  # other devices hold other rows
    assert float(hosts.fingerprint(turned)) == told
    exchanged = batch | {"index": batch["index"][::-1]}
    assert float(hosts.fingerprint(exchanged)) != told
    batch["global"]["sar"]["values"][2, 1, 1] *= 1.001
    assert float(hosts.fingerprint(batch)) != told


@pytest.mark.parametrize(
    ("own", "seconds", "slowest"),
    [
        ([0.01, 0.3, 0.02, 0.01], 0.5, 1),
        ([0.30, 0.3, 0.31, 0.30], 0.5, None),  # all alike
        ([0.001, 0.02, 0.001, 0.001], 0.5, None),  # many times the median, and nothing beside the step
        ([0.001, 0.008, 0.001, 0.001], 0.01, None),  # nor to anybody
    ],
)
def test_who_is_slow(own, seconds, slowest):
    watch = hosts.Hosts(make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1]), lambda: False)
    steps = 5
    watch._own, watch._steps, watch._seconds = steps * np.array(own), steps, steps * seconds
    found = watch.slow()
    if slowest is None:
        assert found is None
    else:
        assert (found.process, found.own) == (slowest, pytest.approx(own[slowest]))
        assert found.numbers == {"slow_process": slowest, "slow_process_seconds": pytest.approx(own[slowest])}
    assert watch.slow() is None  # a new window


def test_one_process_alone_stops_when_it_is_asked():
    asked = [False]
    alone = hosts.Hosts(make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1]), lambda: asked[0])
    alone.ready()
    alone.report()
    assert not alone.stop
    assert not alone.ask()
    asked[0] = True
    assert alone.stop
    assert alone.ask()
    assert jnp.shape(alone._own) == (1,)
