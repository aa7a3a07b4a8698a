"""One whole step on meshes of virtual devices: python whole_step.py CONFIG.json FOLDER 1x1x1 8x1x1 ...

Out: for each mesh FOLDER/1x1x1.npz with the state as it is born, the metrics, the gradients, and the state after a step
of plain gradient descent whose optimizer keeps AdamW's moments (AdamW's own first update is a sign, which the last bit
of a gradient can turn). The rest is the step that trains. Arrays are split however small they are.
"""

import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from skyjax.config import read_config
from skyjax.input.loader import Loader
from skyjax.parallel.mesh import AXES, make_mesh
from skyjax.parallel.sharding import batch_sharding, path_name, replicated, state_shardings
from skyjax.train import loop, optimizer, state, step

MOVED = 0.2  # of each parameter from its start, where all biases are zero and all norms one
# Of the moves of student and teacher. Where the terms of a sum nearly cancel, float32 leaves 5e-6 to 2e-5 of a leaf's
# largest entry, in other leaves at each point that was tried; here 5e-6.
SEEDS = (10, 11)


def gradient_descent(config: Any, params: Any) -> optax.GradientTransformation:
    """Goes along the gradient, unclipped; keeps the gradient and what AdamW would keep."""
    adam = optimizer.make_optimizer(config, params)

    def init(params: Any) -> Any:
        return {"gradients": jax.tree.map(jnp.zeros_like, params), "adam": adam.init(params)}

    def update(gradients: Any, held: Any, params: Any) -> Any:
        return gradients, {"gradients": gradients, "adam": adam.update(gradients, held["adam"], params)[1]}

    return optax.GradientTransformation(init, update)


def move(params: Any, seed: int) -> Any:
    """Parameters a little way from their start, the same on every mesh."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + MOVED * rng.normal(size=x.shape).astype(np.float32), params)


def run(config: Any, sizes: tuple[int, ...], host_batch: Any, born: Any = None) -> dict[str, Any]:
    """{"born", "after", "metrics"}: the state at birth and after a step, and the step's metrics, on the host.

    Args:
      config: the experiment.
      sizes: of the mesh.
      host_batch: as the loader yields it.
      born: a state at birth; None: it is born on this mesh.
    """
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)), jax.devices()[: int(np.prod(sizes))])
    shardings = state_shardings(state.abstract(config), mesh, small=0)
    batch = jax.device_put(host_batch, batch_sharding(mesh))
    statistics = {
        m: (np.array(table["mean"], np.float32), np.array(table["std"], np.float32))
        for m, table in loop.statistics_table(config.model).items()
    }
    with jax.set_mesh(mesh):
        began = time.process_time()
        if born is None:
            born = jax.jit(lambda key: state.init(config, key), out_shardings=shardings)(jax.random.key(config.seed))
            born = jax.tree.map(np.asarray, born)
        first = born | {"params": move(born["params"], SEEDS[0]), "teacher": move(born["teacher"], SEEDS[1])}
        made = time.process_time()
        whole = jax.jit(
            step.make_step(config, statistics), donate_argnums=0, out_shardings=(shardings, replicated(mesh))
        )
        after, metrics = jax.tree.map(np.asarray, whole(jax.device_put(first, shardings), batch))
    ended = time.process_time()
    print(f"{sizes}: init {made - began:.0f} s, step {ended - made:.0f} s of a core", file=sys.stderr, flush=True)
    return {"born": born, "after": after, "metrics": metrics}


def main(config_path: str, folder: str, *meshes: str) -> None:
    """A state is born on the first mesh and, for a comparison, on the last; the others take over the first's."""
    config = read_config(config_path)
    # Exchanged where the state is made and where it is used; nothing else of the step is touched.
    for module in (state, step):
        setattr(module, "make_optimizer", gradient_descent)  # noqa: B010
    loader = Loader(config)
    batch = next(loader)
    loader.close()
    born = None
    for mesh in meshes:
        found = run(config, tuple(map(int, mesh.split("x"))), batch, None if mesh == meshes[-1] else born)
        born = born or found["born"]
        leaves = jax.tree_util.tree_leaves_with_path(found)
        np.savez(pathlib.Path(folder) / f"{mesh}.npz", **{path_name(path): leaf for path, leaf in leaves})


if __name__ == "__main__":
    main(*sys.argv[1:])
