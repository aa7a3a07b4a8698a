"""One step over eight devices is the step of one, and the table of geo-prototypes stays where it lies."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_allclose

from skyjax.config import to_json
from skyjax.parallel import sharding

STEP = r"""
import json, re, sys
import skyjax, jax, numpy
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
    step = loop.jit_step(config, loop.statistics_table(config.model), first, mesh).lower(first, batch).compile()
    share = first["prototypes"].addressable_shards[0].data.nbytes
    moves = {"all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"}
    sizes = []
    for line in step.as_text().splitlines():
        found = re.match(r" *(?:ROOT )?%\S+ = (.*?) ([a-z-]+?)(-start)?\(", line)
        if found and found[2] in moves:
            shapes = re.findall(r"\w+\[([\d,]*)\]", found[1])
            sizes += [int(numpy.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]
    after, metrics = step(first, batch)
print(json.dumps({
    "share": share,
    "moves": len(sizes),
    "biggest_move": max(sizes),
    "prototypes": numpy.asarray(after["prototypes"])[:, :, 0].tolist(),
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
    wide = config.copy_and_resolve_references()
    wide.mesh.update({"data": 2, "fsdp": 4})
    path.write_text(to_json(wide))
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
    assert_allclose(spread["prototypes"], after["prototypes"][:, :, 0], atol=1e-4)
    kernel = float(jnp.abs(after["params"]["encoder"]["fusion"]["projection"]["kernel"]).sum())
    assert_allclose(spread["kernel"], kernel, rtol=1e-4)


def test_banks_move_and_the_table_does_not(spread, config):
    """A device holds its quarter of the regions; what crosses devices is no larger than all views' banks."""
    regions, count, width = (
        config.model.prototypes.regions**2,
        config.model.prototypes.count,
        config.model.prototypes.width,
    )
    assert regions * count * width * 4 >= sharding.SMALL
    assert spread["share"] == regions * count * width * 4 // 4
    assert spread["moves"] > 0
    assert spread["biggest_move"] <= 2 * config.batch_size * count * width < regions * count * width // 4
