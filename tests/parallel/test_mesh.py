"""The mesh of devices and the sharding rules."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from skyjax.errors import UserError
from skyjax.parallel import mesh as meshes
from skyjax.parallel import sharding


@pytest.mark.parametrize(
    ("sizes", "devices", "shape"),
    [
        ((-1, 1, 1), 1, (1, 1, 1)),
        ((-1, 2, 2), 8, (2, 2, 2)),
        ((2, -1, 1), 8, (2, 4, 1)),
        ((8, 1, 1), 8, (8, 1, 1)),
    ],
)
def test_one_axis_takes_what_is_left(sizes, devices, shape):
    assert meshes.mesh_shape(dict(zip(meshes.AXES, sizes, strict=True)), devices) == shape


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": -1, "fsdp": -1, "tensor": 1}, "only one axis may be -1"),
        ({"data": -1, "fsdp": 3, "tensor": 1}, "does not fit 8 devices: 3, .* does not divide 8"),
        ({"data": 4, "fsdp": 1, "tensor": 1}, "does not fit 8 devices; set one axis to -1"),
        ({"data": 0, "fsdp": 1, "tensor": 1}, "at least 1"),
        ({"data": 8, "model": 1}, "it needs data, fsdp, tensor"),
    ],
)
def test_a_mesh_that_does_not_fit_is_named(sizes, message):
    with pytest.raises(UserError, match=message):
        meshes.mesh_shape(sizes, 8)


@pytest.fixture(scope="module")
def wide_mesh():
    """2 x 2 x 2, abstract: rules need sizes, not devices."""
    return jax.sharding.AbstractMesh((2, 2, 2), meshes.AXES)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("step", (), P()),
        ("optimizer/2/count", (), P()),
        ("params/encoder/sar/blocks/mlp/up/kernel", (4, 8, 6), P(None, "fsdp", "tensor")),
        ("optimizer/2/mu/encoder/sar/blocks/mlp/down/kernel", (4, 8, 6), P(None, "tensor", "fsdp")),
        ("teacher/encoder/optical/stage1/downsample/reduction/kernel", (2, 2, 4, 8), P(None, None, "fsdp", None)),
        ("teacher/encoder/optical/patch_embed/kernel", (2, 2, 3, 8), P(None, None, None, "fsdp")),
        ("params/encoder/up_heads/sar/cells/kernel", (8, 2, 2, 6), P("fsdp", None, None, None)),
        ("params/heads/fused/pixel/hidden/kernel", (8, 6), P("fsdp", "tensor")),
        ("params/heads/fused/pixel/bottleneck/kernel", (6, 4), P("tensor", "fsdp")),
        ("params/encoder/sar/blocks/mlp/bias", (4, 8), P()),
        ("params/heads/fused/pixel/classes", (8, 3), P("fsdp", None)),
        ("prototypes", (16, 3, 8), P("fsdp", None, None)),
        ("teacher/encoder/prototypes/query/kernel", (6, 8), P("fsdp", "tensor")),
        ("optimizer/2/nu/encoder/prototypes/out/kernel", (14, 6), P("tensor", "fsdp")),
    ],
)
def test_rules_place_the_last_axes(wide_mesh, path, shape, spec):
    assert sharding.partition_spec(path, shape, 4, wide_mesh, small=0) == spec


def test_small_arrays_are_replicated_and_big_ones_not(wide_mesh):
    side = 1024  # 4 MiB in float32
    assert sharding.partition_spec("params/up/kernel", (side, side), 4, wide_mesh) == P("fsdp", "tensor")
    assert sharding.partition_spec("params/up/kernel", (side, side - 2), 4, wide_mesh) == P()


def test_unknown_and_undividable_are_named(wide_mesh):
    with pytest.raises(UserError, match='no rule matches "params/encoder/sar/gamma"'):
        sharding.partition_spec("params/encoder/sar/gamma", (8,), 4, wide_mesh)
    with pytest.raises(UserError, match="fsdp=2 does not divide 7"):
        sharding.partition_spec("params/a/kernel", (7, 8), 4, wide_mesh, small=0)


def test_batch_size_must_divide(wide_mesh):
    sharding.check_batch_size(8, 2, wide_mesh)
    with pytest.raises(UserError, match=r"batch_size=10 .* the nearest that is: 8"):
        sharding.check_batch_size(10, 2, wide_mesh)
    with pytest.raises(UserError, match="micro_batches=0"):
        sharding.check_batch_size(10, 0, wide_mesh)


def test_make_mesh_on_this_machine():
    mesh = meshes.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
    assert mesh.axis_names == meshes.AXES
    x = jax.device_put(jnp.arange(4 * mesh.size), sharding.batch_sharding(mesh))
    assert int(x.sum()) == sum(range(4 * mesh.size))


def run_on_devices(code, count):
    """Runs code in a process with `count` virtual devices; returns what it prints as JSON."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_arrays_land_where_the_rules_say():
    got = run_on_devices(
        """
import json, skyjax, jax, jax.numpy as jnp
from skyjax.parallel import mesh, sharding
m = mesh.make_mesh({"data": 2, "fsdp": 2, "tensor": -1})
state = {"params": {"up": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}}}
placed = jax.jit(lambda: state, out_shardings=sharding.state_shardings(state, m, small=0))()
batch = jax.device_put(jnp.ones((8, 3)), sharding.batch_sharding(m))
kernel, bias = placed["params"]["up"]["kernel"], placed["params"]["up"]["bias"]
print(json.dumps([x.addressable_shards[0].data.shape for x in (kernel, bias, batch)]))
""",
        8,
    )
    assert got == [[2, 3], [6], [2, 3]]
