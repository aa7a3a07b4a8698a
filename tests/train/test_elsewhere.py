"""A checkpoint of eight devices on four, two and one: the same state to the bit, and the same samples next."""

import json
import os
import subprocess
import sys

import pytest
from changed import changed

from skyjax.config import to_json

# Each mesh reads what the one before wrote, goes on by a step that only counts, and writes again.
DESCENT = r"""
import hashlib, json, pathlib, sys
import skyjax, jax, numpy as np
from skyjax.config import read_config
from skyjax.input.loader import device_batches
from skyjax.parallel.mesh import make_mesh
from skyjax.parallel.sharding import batch_sharding, state_shardings, with_shardings
from skyjax.train import checkpoint, loop, state
from skyjax.train.hosts import fingerprint
workdir, meshes, found = pathlib.Path(sys.argv[2]), [(2, 4), (1, 4), (2, 1), (1, 1), (4, 2)], []
config = read_config(sys.argv[1])
for data, fsdp in meshes:
    config.mesh.update({"data": data, "fsdp": fsdp})
    mesh = make_mesh(config.mesh, jax.devices()[: data * fsdp])
    now, loader, notes = loop.start(config, workdir, mesh)
    batches = device_batches(loader, batch_sharding(mesh))
    position, batch = next(batches)
    table, rows = now["prototypes"], batch["index"].addressable_shards[0].data.shape
    told = {"devices": len(table.sharding.device_set), "share": table.addressable_shards[0].data.nbytes, "rows": rows}
    told |= {"step": int(now["step"])}
    told |= {"samples": float(fingerprint(batch)), "first": int(np.asarray(batch["index"])[0])}
    told["hash"] = {
        jax.tree_util.keystr(path): hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
        for path, leaf in jax.tree_util.tree_leaves_with_path(now)
        if "step" not in jax.tree_util.keystr(path) and "count" not in jax.tree_util.keystr(path)
    }
    found.append(told)
    optimizer = jax.tree.map(lambda leaf: leaf + 1 if leaf.dtype == "int32" else leaf, now["optimizer"])
    now |= {"step": now["step"] + 1, "optimizer": optimizer}
    now = jax.device_put(now, state_shardings(now, mesh))
    with checkpoint.CheckpointWriter(workdir, config.checkpoint) as writer:
        writer.save(now, notes | {"step": int(now["step"]), "position": position, "evaluated": 0})
    batches.close()
    loader.close()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def config(config):
    """One modality: where arrays lie is in question, not what is computed of them."""
    small = changed(config)
    with small.unlocked():
        del small.model.modalities.sar
    return small


@pytest.fixture(scope="module")
def descent(config, tmp_path_factory):
    """What each mesh found."""
    folder = tmp_path_factory.mktemp("descent")
    (folder / "config.json").write_text(to_json(changed(config, checkpoint__keep=9)))
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", DESCENT, str(folder / "config.json"), str(folder / "run")],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_each_mesh_has_all_its_devices(descent, config):
    assert [found["devices"] for found in descent] == [8, 4, 2, 1, 8]
    assert [found["rows"] for found in descent] == [[1], [2], [4], [8], [1]]
    whole = config.model.prototypes.regions**2 * config.model.prototypes.count * config.model.prototypes.width * 4
    assert [found["share"] for found in descent] == [whole // 4, whole // 4, whole, whole, whole // 2]


def test_the_state_is_the_same_to_the_bit(descent):
    assert [found["step"] for found in descent] == [0, 1, 2, 3, 4]
    assert len(descent[0]["hash"]) > 100
    for found in descent[1:]:
        assert found["hash"] == descent[0]["hash"]


def test_the_samples_go_on_in_order(descent, config):
    """As one process on one device reads them."""
    from skyjax.input.loader import Loader
    from skyjax.train.hosts import fingerprint

    loader = Loader(config)
    want = [float(fingerprint(next(loader))) for _ in descent]
    loader.close()
    assert [found["samples"] for found in descent] == want
    assert len(set(want)) == len(want)
    assert [found["first"] for found in descent] == [step * config.batch_size for step in range(len(descent))]
