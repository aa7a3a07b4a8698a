"""One step over eight devices is the step of one."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_allclose

from skyjax.config import to_json

STEP = """
import json, sys
import skyjax, jax
from skyjax.config import read_config
from skyjax.input.loader import Loader, device_batches
from skyjax.parallel.mesh import make_mesh
from skyjax.parallel.sharding import batch_sharding
from skyjax.train import loop, state
config = read_config(sys.argv[1])
mesh = make_mesh(config.mesh)
first = state.create(config, mesh)
batches = device_batches(Loader(config), batch_sharding(mesh))
position, batch = next(batches)
with jax.set_mesh(mesh):
    after, metrics = loop.jit_step(config, loop.statistics_table(config.model), first, mesh)(first, batch)
print(json.dumps({
    "metrics": {name: float(value) for name, value in metrics.items()},
    "devices": len(batch["index"].sharding.device_set),
    "rows": batch["index"].addressable_shards[0].data.shape[0],
    "kernel": float(jax.numpy.abs(after["params"]["encoder"]["fusion"]["projection"]["kernel"]).sum()),
}))
batches.close()
"""


@pytest.fixture(scope="module")
def spread(config, compile_cache, tmp_path_factory):
    """What eight virtual devices print."""
    path = tmp_path_factory.mktemp("eight") / "config.json"
    path.write_text(to_json(config))
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", STEP, str(path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_device_has_its_share_of_the_batch(spread, config):
    assert spread["devices"] == 8
    assert spread["rows"] == config.batch_size // 8


def test_losses_and_parameters_equal_those_of_one_device(spread, first, step, batch):
    after, metrics = step(jax.tree.map(jnp.copy, first), batch)
    for name, value in metrics.items():
        # The rank is an eigenvalue problem of nearly equal features, and the norm is dominated by their differences.
        loose = name in ("rank/fused", "spread/fused", "gradient_norm")
        assert_allclose(spread["metrics"][name], float(value), rtol=2e-3 if loose else 1e-5, atol=1e-6, err_msg=name)
    kernel = float(jnp.abs(after["params"]["encoder"]["fusion"]["projection"]["kernel"]).sum())
    assert_allclose(spread["kernel"], kernel, rtol=1e-4)
