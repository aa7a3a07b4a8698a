"""Topologies by name, and meshes over several slices, as libtpu describes them without a TPU."""

import jax
import numpy as np
import pytest

from skyjax.errors import UserError
from skyjax.parallel import topology
from skyjax.parallel.mesh import make_mesh

pytest.importorskip("libtpu")


@pytest.mark.parametrize(
    ("name", "slices", "devices", "written"),
    [
        ("v5e:16x16", 1, 256, "v5e:16x16"),
        ("v5p:4x4x8", 1, 128, "v5p:4x4x8"),
        ("tpu7x:4x4x4", 1, 128, "tpu7x:4x4x4"),
        ("v4:2x2x2", 1, 8, "v4:2x2x2"),
        ("v5e:1x1", 1, 1, "v5e:1x1"),
        ("v5e:16x16", 2, 512, "v5e:16x16*2"),
    ],
)
def test_a_topology_has_its_devices_and_its_name_back(name, slices, devices, written):
    found = topology.describe(name, slices)
    assert len(found) == devices
    assert topology.name_of(found) == written
    assert topology.slice_count(found) == slices


def test_what_is_here_is_named_by_kind_and_number():
    assert topology.name_of(jax.devices()) == f"cpu:{jax.device_count()}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "not written as GENERATION:AxB"),
        ("v9:2x2", '"v9" is not known'),
        ("v5p:4x4", "has 2 axes; a v5p has 3"),
        ("v5e:3x3", 'XLA knows no "v5e:3x3"'),
    ],
)
def test_bad_names_are_told(name, message):
    with pytest.raises(UserError, match=message):
        topology.describe(name)
    with pytest.raises(UserError, match="1 or more"):
        topology.describe("v5e:2x2", 0)


def test_data_runs_over_slices_and_fsdp_stays_inside_one():
    devices = topology.describe("v5e:4x4", 2)
    mesh = make_mesh({"data": -1, "fsdp": 8, "tensor": 1}, devices)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 8, "tensor": 1}
    slices = np.vectorize(topology.slice_of)(mesh.devices)
    assert (slices == slices[:, :1]).all()
    assert sorted(slices[:, 0, 0]) == [0, 0, 1, 1]


def test_fsdp_over_slices_where_the_config_says_so():
    devices = topology.describe("v5e:4x4", 2)
    mesh = make_mesh({"data": 2, "fsdp": 8, "tensor": 1, "dcn": {"data": 1, "fsdp": -1, "tensor": 1}}, devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 16, "tensor": 1}
    with pytest.raises(UserError, match=r"mesh.dcn data=3.* does not fit 2 slices"):
        make_mesh({"data": -1, "fsdp": 8, "tensor": 1, "dcn": {"data": 3, "fsdp": 1, "tensor": 1}}, devices)


def test_any_axis_of_the_torus_may_be_cut():
    for sizes in ({"data": -1, "fsdp": 32, "tensor": 2}, {"data": 2, "fsdp": -1, "tensor": 4}):
        assert make_mesh(sizes, topology.describe("v5p:4x4x8")).size == 128
