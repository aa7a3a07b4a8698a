"""What the losses take of a training step: of its FLOPs and peak memory at paper scale, of its time at tiny scale.

PYTHONPATH=. python benchmarks/objectives.py [--parts=flops,alone,memory,time] [--size=huge] [--topology=v5p:4x4x8]
    [--rounds=10] [--json=FILE]

The peer is the same step with the losses taken out: in their place stands the mean square of every feature map that
they compare, so that both encoders still run and the student's gradient still flows through all of its parts. What the
losses take is the difference of the two steps; its share is of the step as it is trained.

flops   configs/skysense.py, traced at the config's own batch: the matrix products, those included that a checkpoint
        computes again (skyjax/parallel/flops.py, `products`).
memory  configs/skysense.py, the whole step and the step without losses, planned for a TPU that is not there as `skyjax
        compile` does it (needs pip install "jax[tpu]"): HBM per chip. Peak: arguments and all that is reserved.
alone   the same for the losses without the encoder: its maps and the heads are given and get their gradients.
time    configs/pretrain_sample.py on this machine, on random pixels: processor time, the shortest of all rounds, in
        which the two steps take turns.
"""

import argparse
import json
import math
import os
import pathlib
import sys
import time
from typing import Any
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh
from measure import random_batch

from skyjax.config import load_config
from skyjax.parallel import flops, topology
from skyjax.parallel.ahead import compile_ahead
from skyjax.parallel.mesh import make_mesh
from skyjax.parallel.sharding import batch_sharding
from skyjax.sample import Batch
from skyjax.train import loop, plan, state
from skyjax.train import step as training

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
PARTS = ("flops", "alone", "memory", "time")
STEPS = {"whole step": True, "without losses": False}  # title -> with the losses
GIB = 2**30


def trace(config: ml_collections.ConfigDict, mesh: Mesh, losses: bool) -> Any:
    """The step as the loop compiles it, traced with its losses or without."""
    with mock.patch.object(training, "objective", training.objective if losses else mean_square):
        return plan.trace(config, mesh)


def trace_losses(config: ml_collections.ConfigDict, mesh: Mesh) -> Any:
    """The losses without the encoder: from its maps and the heads to the gradients of both."""
    first, batch = plan.arguments(config, mesh)
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


def count_flops(size: str) -> dict[str, float]:
    """FLOPs a sample of each step."""
    config = load_config(CONFIGS / "skysense.py", [f"size={size}"])
    config.mesh.fsdp = 1
    mesh = make_mesh(config.mesh)
    return {
        title: flops.products(trace(config, mesh, losses).jaxpr.jaxpr) / config.batch_size
        for title, losses in STEPS.items()
    }


def lower(size: str, where: str, program: str) -> Any:
    """One of STEPS or the losses by themselves, lowered for a topology."""
    config = load_config(CONFIGS / "skysense.py", [f"size={size}"], where)
    mesh = make_mesh(config.mesh, topology.describe(where))
    traced = trace(config, mesh, STEPS[program]) if program in STEPS else trace_losses(config, mesh)
    return traced.lower()


def plan_memory(size: str, where: str, program: str) -> dict[str, int]:
    """Bytes a device of one of them."""
    found = compile_ahead(lower, (size, where, program), say=lambda words: print(f"  {program}: {words}", flush=True))
    return {
        "arguments": found.argument_bytes,
        "temporaries": found.temporary_bytes,
        "peak": found.argument_bytes + found.temporary_bytes,
    }


def time_steps(rounds: int) -> dict[str, float]:
    """Shortest processor time of each step in seconds; they take turns."""
    config = load_config(CONFIGS / "pretrain_sample.py")
    mesh = make_mesh(config.mesh)
    first = state.create(config, mesh)
    batch = jax.device_put(random_batch(plan.abstract_batch(config, config.batch_size)), batch_sharding(mesh))
    steps = {title: trace(config, mesh, losses).lower().compile() for title, losses in STEPS.items()}
    best = dict.fromkeys(steps, math.inf)
    for i in range(rounds + 1):
        for title, step in steps.items():
            given = jax.block_until_ready(jax.tree.map(jnp.copy, first))  # it is donated
            start = time.process_time()
            jax.block_until_ready(step(given, batch))
            if i:  # the first warms up
                best[title] = min(best[title], time.process_time() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--size", default="huge", help="of configs/skysense.py")
    parser.add_argument("--topology", default="v5p:4x4x8", help="that memory is planned for, with its mesh rules")
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
    where = arguments.size, arguments.topology
    if "alone" in parts:
        results["alone"] = memory = plan_memory(*where, "alone")
        print(f"the losses alone, temporaries a chip: {memory['temporaries'] / GIB:.3f} GiB", flush=True)
    if "memory" in parts:
        results["memory"] = planned = {title: plan_memory(*where, title) for title in STEPS}
        for name in ("peak", "temporaries", "arguments"):
            show(f"GiB a chip, {name}", {title: memory[name] / GIB for title, memory in planned.items()})
    if "time" in parts:
        results["time"] = shortest = time_steps(arguments.rounds)
        show("pretrain_sample, seconds a step", shortest)
    if arguments.json:
        asked = {name: getattr(arguments, name) for name in ("size", "topology", "rounds")}
        arguments.json.write_text(json.dumps(asked | results, indent=1) + "\n", encoding="utf-8")


def show(title: str, values: dict[str, float]) -> None:
    whole, without = (values[name] for name in STEPS)
    print(f"{title:44s} {whole:12.3f} {without:12.3f} {(whole - without) / whole:12.2%}", flush=True)


if __name__ == "__main__":
    main()
