"""What crosses chips when geo-prototypes are looked up and moved; python prototype_traffic.py prints it for 8 CPUs."""

import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from skyjax.models import prototypes
from skyjax.parallel import hlo
from skyjax.parallel.mesh import make_mesh
from skyjax.parallel.sharding import batch_sharding, partition_spec

REGIONS, COUNT, WIDTH = 64, 100, 512  # of configs/skysense.py, huge: 839 MB
SAMPLES, PLACES = 64, 16
TABLE_BYTES = REGIONS**2 * COUNT * WIDTH * 4
BANK_BYTES = SAMPLES * COUNT * WIDTH * 4  # of one bank a sample


def look_and_move(table: Any, fused: Any, lonlat: Any) -> Any:
    """What a step does with the table: a lookup, attention with its gradient, and the next table."""
    regions = prototypes.region_of(lonlat, REGIONS)
    banks = prototypes.lookup(table, regions)

    def loss(fused: Any) -> Any:
        scores = jnp.einsum("bnp,bkp->bnk", fused, banks)
        return jnp.sum(jnp.square(jnp.einsum("bnk,bkp->bnp", jax.nn.softmax(scores), banks)))

    valid = jnp.ones(fused.shape[:2], bool)
    found = prototypes.centres(fused, valid, banks, epsilon=0.05, iterations=3)
    return jax.grad(loss)(fused), prototypes.update(table, found, regions, 0.996)


def traffic(sizes: dict[str, int], devices: Sequence[jax.Device] | None = None, *, gather: bool = False) -> int:
    """Bytes that a chip sends; `gather`: with the mistake that each chip wants the whole table."""
    mesh = make_mesh(sizes, devices)
    shape = (REGIONS**2, COUNT, WIDTH)
    place = NamedSharding(mesh, partition_spec("prototypes", shape, 4, mesh))
    rows = batch_sharding(mesh)

    def step(table: Any, fused: Any, lonlat: Any) -> Any:
        seen = jax.lax.with_sharding_constraint(table, PartitionSpec()) if gather else table
        gradient, moved = look_and_move(seen, fused, lonlat)
        return gradient, moved

    arguments = (
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place),
        jax.ShapeDtypeStruct((SAMPLES, PLACES, WIDTH), jnp.float32, sharding=rows),
        jax.ShapeDtypeStruct((SAMPLES, 2), jnp.float32, sharding=rows),
    )
    with jax.set_mesh(mesh):
        compiled = jax.jit(step, donate_argnums=0, out_shardings=(rows, place)).lower(*arguments).compile()
    return hlo.analyse(compiled.as_text()).ici_bytes


if __name__ == "__main__":
    meshes = ({"data": 1, "fsdp": 8, "tensor": 1}, {"data": 2, "fsdp": 4, "tensor": 1})
    print(json.dumps([[traffic(sizes, gather=gather) for gather in (False, True)] for sizes in meshes]))
