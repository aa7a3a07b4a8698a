"""Programs that another process lowers (test_ahead.py)."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from skyjax.errors import UserError
from skyjax.parallel import topology
from skyjax.parallel.mesh import make_mesh

ROWS, WIDTH = 512, 1024


def sized(scale: int):
    """Two products of a sharded batch with split weights; `scale` times as many rows."""
    mesh = make_mesh({"data": -1, "fsdp": 2, "tensor": 1}, topology.describe("v5e:2x2"))

    def abstract(shape, *axes):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    def step(weights, x):
        gradient = jax.grad(lambda w: jnp.sum(jnp.square(jnp.tanh(x @ w) @ w.T)))(weights)
        return weights - gradient

    weights, x = abstract((WIDTH, WIDTH), "fsdp"), abstract((scale * ROWS, WIDTH), ("data", "fsdp"))
    return jax.jit(step, donate_argnums=0, out_shardings=weights.sharding).lower(weights, x)


def refused():
    raise UserError("this cannot be lowered")


def killed():
    import os

    os._exit(3)
