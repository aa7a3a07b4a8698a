"""What the losses take of a training step: of its FLOPs and peak memory at paper scale, of its time at tiny scale.

PYTHONPATH=. python benchmarks/objectives.py [--parts=flops,alone,memory,time] [--size=huge] [--topology=v5p:2x2x4]
    [--samples=1] [--rounds=10] [--json=FILE]

The peer is the same step with the losses taken out: in their place stands the mean square of every feature map that
they compare, so that both encoders still run and the student's gradient still flows through all of its parts. What the
losses take is the difference of the two steps; its share is of the step as it is trained.

flops   configs/skysense.py, traced at the config's own batch: the matrix products, those included that a checkpoint
        computes again (skyjax/parallel/flops.py, `products`).
alone   configs/skysense.py, the losses without the encoder: its maps and the heads are given and get their gradients.
        Temporaries as below; takes three minutes of processor time and 5 GB.
memory  configs/skysense.py, the whole step compiled for a TPU that is not there, by libtpu (pip install "jax[tpu]"):
        per chip, as the compiler plans it. Peak: arguments and temporaries at their highest together. At huge the
        compiler took more than ten minutes of processor time and 13 GB without being done with the step without losses.
time    configs/pretrain_sample.py on this machine, on random pixels: processor time, the shortest of all rounds, in
        which the two steps take turns.
"""

import argparse
import concurrent.futures
import json
import math
import multiprocessing
import os
import pathlib
import resource
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

# libtpu reads them when it is loaded: there is no TPU to ask, and other processes may compile too.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from skyjax.config import load_config
from skyjax.parallel import flops
from skyjax.parallel.mesh import make_mesh
from skyjax.parallel.sharding import batch_sharding, state_shardings, with_shardings
from skyjax.sample import Batch
from skyjax.train import loop, state
from skyjax.train import step as training

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
PARTS = ("flops", "alone", "memory", "time")
STEPS = {"whole step": True, "without losses": False}  # title -> with the losses
STORED = {"optical": jnp.uint8, "multispectral": jnp.uint16, "sar": jnp.float32}
GIB = 2**30


def trace(config: ml_collections.ConfigDict, mesh: Mesh, samples: int, losses: bool) -> Any:
    """The step as the loop compiles it, traced with its losses or without."""
    first, batch = abstract(config, mesh, samples)
    objective = training.objective if losses else mean_square
    with jax.set_mesh(mesh), mock.patch.object(training, "objective", objective):
        step: Any = loop.jit_step(config, loop.statistics_table(config.model), first, mesh)
        return step.trace(first, batch)


def trace_losses(config: ml_collections.ConfigDict, mesh: Mesh, samples: int) -> Any:
    """The losses without the encoder: from its maps and the heads to the gradients of both."""
    first, batch = abstract(config, mesh, samples)
    params, here = first["params"], batch_sharding(mesh)
    statistics = {m: (np.array(t["mean"]), np.array(t["std"])) for m, t in loop.statistics_table(config.model).items()}
    key, outputs = jax.random.key(0), []

    def record(*arguments: Any, **keywords: Any) -> Any:
        outputs.append(encode(*arguments, **keywords))
        return outputs[-1]

    def compare(params: Any, teacher: Any, batch: Batch, step: jax.Array, table: Any) -> jax.Array:
        return training.compare(config, statistics, params, teacher, batch, step, key, None, table)[0]

    def loss(maps: Any, heads: Any, masks: Any, taught: Any, teacher: Any, batch: Batch, step: jax.Array) -> jax.Array:
        seen = [{**mask, **part} for mask, part in zip(masks, maps, strict=True)]
        with mock.patch.object(training, "encode", side_effect=[*seen, taught]):
            return compare({"encoder": {}, "heads": heads}, teacher, batch, step, None)

    encode = training.encode
    with jax.set_mesh(mesh), mock.patch.object(training, "encode", record):
        jax.eval_shape(compare, params, first["teacher"], batch, first["step"], first["prototypes"])
    *outputs, taught = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), outputs)
    maps = [{name: output.pop(name) for name in ("spatial", "fused", "context")} for output in outputs]
    kept = jax.tree.map(lambda x: x.sharding, (maps, params["heads"]))
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), out_shardings=(None, kept))
        return step.trace(maps, params["heads"], outputs, taught, first["teacher"], batch, first["step"])


def mean_square(_: Any, student: Any, teacher: Any, *__: Any, **___: Any) -> tuple[jax.Array, dict[str, Any]]:
    """In place of the objective: every map that it compares is read, and its gradient depends on its values."""
    loss = jnp.float32(0)
    for output in (*student.values(), jax.lax.stop_gradient(teacher["global"])):
        for maps in (*output["spatial"].values(), output["fused"] if output["context"] is None else output["context"]):
            loss += jnp.mean(jnp.square(maps.astype(jnp.float32)))
    return loss, {"sums": {}, "counts": {}, "metrics": {}}


def abstract(config: ml_collections.ConfigDict, mesh: Mesh, samples: int) -> tuple[state.State, Batch]:
    """State and batch as they lie on the mesh."""
    first = state.abstract(config)
    first = with_shardings(first, state_shardings(first, mesh))
    here = batch_sharding(mesh)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract_batch(config, samples)
    )
    return first, batch


def abstract_batch(config: ml_collections.ConfigDict, samples: int) -> Batch:
    """Shapes and types of a batch (skyjax/sample.py)."""

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((samples, *shape), dtype)

    def images(m: str, views: int, size: flops.Images) -> dict[str, Any]:
        maps, pixels, bands = (views, size.dates), size[1:], len(config.model.modalities[m].bands)
        return {
            "values": array(STORED[m], *maps, *pixels, bands),
            "clear": array(bool, *maps, *pixels),
            **{name: array(jnp.int32, *maps) for name in ("days", "student_days")},
            **{name: array(bool, *maps) for name in ("valid", "student_valid")},
            "sensor": array(jnp.int32),
            "bands": array(bool, bands),
        }

    groups = {
        group: {"to_view": array(jnp.float32, views, 2, 3), **{m: images(m, views, size) for m, size in sizes.items()}}
        for group, (views, sizes) in flops.view_images(config).items()
    }
    return {"index": array(jnp.uint32), "lonlat": array(jnp.float32, 2), "bad": array(bool), **groups}


def count_flops(size: str) -> dict[str, float]:
    """FLOPs a sample of each step."""
    config = load_config(CONFIGS / "skysense.py", [f"size={size}"])
    config.mesh.fsdp = 1
    mesh = make_mesh(config.mesh)
    return {
        title: flops.products(trace(config, mesh, config.batch_size, losses).jaxpr.jaxpr) / config.batch_size
        for title, losses in STEPS.items()
    }


def plan_memory(size: str, topology: str, samples: int, program: str) -> dict[str, float]:
    """Bytes a chip of one of STEPS or of the losses by themselves, and what the compiler itself took."""
    start = time.process_time()
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    config = load_config(CONFIGS / "skysense.py", [f"size={size}"])
    mesh, samples = make_mesh(config.mesh, devices), samples * len(devices)
    traced = trace(config, mesh, samples, STEPS[program]) if program in STEPS else trace_losses(config, mesh, samples)
    memory = traced.lower().compile().memory_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "compile_seconds": time.process_time() - start,
        "compile_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def time_steps(rounds: int) -> dict[str, float]:
    """Shortest processor time of each step in seconds; they take turns."""
    config = load_config(CONFIGS / "pretrain_sample.py")
    mesh = make_mesh(config.mesh)
    first = state.create(config, mesh)
    batch = jax.device_put(random_batch(abstract_batch(config, config.batch_size)), batch_sharding(mesh))
    steps = {title: trace(config, mesh, config.batch_size, losses).lower().compile() for title, losses in STEPS.items()}
    best = dict.fromkeys(steps, math.inf)
    for i in range(rounds + 1):
        for title, step in steps.items():
            given = jax.block_until_ready(jax.tree.map(jnp.copy, first))  # it is donated
            start = time.process_time()
            jax.block_until_ready(step(given, batch))
            if i:  # the first warms up
                best[title] = min(best[title], time.process_time() - start)
    return best


def random_batch(abstract: Batch) -> Batch:
    """Every date there, on a day of its own; every view the whole site, so that all places have a counterpart."""
    rng = np.random.default_rng(0)

    def fill(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path[-1].key
        if name == "values":
            return rng.integers(0, 250, leaf.shape).astype(leaf.dtype)
        if name in ("days", "student_days"):
            return np.broadcast_to(18_000 + 10 * np.arange(leaf.shape[-1]), leaf.shape).astype(leaf.dtype)
        if name == "to_view":
            return np.broadcast_to(np.eye(2, 3), leaf.shape).astype(leaf.dtype)
        if name == "index":
            return np.arange(*leaf.shape).astype(leaf.dtype)
        return np.full(leaf.shape, leaf.dtype == bool and name != "bad", leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, abstract)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--size", default="huge", help="of configs/skysense.py")
    parser.add_argument("--topology", default="v5p:2x2x4")
    parser.add_argument("--samples", type=int, default=1, help="a chip, when memory is planned")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=pathlib.Path, help="also write the results to this file")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    unknown = set(parts) - set(PARTS)
    if unknown:
        sys.exit(f'--parts: "{min(unknown)}" is not one of {", ".join(PARTS)}')

    print(f"jax {jax.__version__}, CPU, {len(os.sched_getaffinity(0))} cores")
    results: dict[str, Any] = {}
    print(f"{'':44s} {'whole step':>12s} {'no losses':>12s} {'losses take':>12s}")
    if "flops" in parts:
        results["flops"] = counted = count_flops(arguments.size)
        show(f"{arguments.size}, TFLOP a sample, traced", {name: count / 1e12 for name, count in counted.items()})
    where = arguments.size, arguments.topology, arguments.samples
    if "alone" in parts:
        results["alone"] = memory = in_process(plan_memory, *where, "alone")
        print(f"the losses alone, temporaries a chip: {memory['temporaries'] / GIB:.3f} GiB", flush=True)
    if "memory" in parts:
        results["memory"] = planned = {title: in_process(plan_memory, *where, title) for title in STEPS}
        for name in ("peak", "temporaries", "arguments"):
            show(f"GiB a chip, {name}", {title: memory[name] / GIB for title, memory in planned.items()})
    if "time" in parts:
        results["time"] = shortest = time_steps(arguments.rounds)
        show("pretrain_sample, seconds a step", shortest)
    if arguments.json:
        asked = {name: getattr(arguments, name) for name in ("size", "topology", "samples", "rounds")}
        arguments.json.write_text(json.dumps(asked | results, indent=1) + "\n", encoding="utf-8")


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls it in a process of its own, so that the compiler's gigabytes go back to the machine."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def show(title: str, values: dict[str, float]) -> None:
    whole, without = (values[name] for name in STEPS)
    print(f"{title:44s} {whole:12.3f} {without:12.3f} {(whole - without) / whole:12.2%}", flush=True)


if __name__ == "__main__":
    main()
