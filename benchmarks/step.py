"""Training steps a second beside a plain PyTorch step of the same model and loss; on a GPU also the share of its peak.

PYTHONPATH=. python benchmarks/step.py [--parts=peer,mfu] [--size=mini] [--batch=4] [--rounds=15] [--dtype=float32]
    [--compiled] [--threads=2] [--clock=wall|cpu] [--large=large] [--large-batch=16] [--set=KEY=VALUE ...] [--json=FILE]

peer  The whole step, forward and backward of all views, teacher, losses, AdamW and moving average, as `skyjax train`
      compiles it, beside benchmarks/torch_step.py, run eagerly and with --compiled also by `torch.compile`. First both
      take the same steps from the same weights on the same batch: loss, every term, gradients and the teacher's move
      have to agree, or the script ends with 1. Then they take turns. Both go without geo-prototypes, augmentation of
      pixels and stochastic depth, which the peer does not have or would draw otherwise.
mfu   On a GPU by default: skyjax alone, configs/skysense.py of the size --large as it is shipped, in bf16. FLOPs are
      the model's (skyjax/parallel/flops.py), without recomputation; peaks stand in skyjax/parallel/chips.toml. The
      batch is halved until the compiler's plan fits. On a device whose peak is not known the rate stands by itself.

"mini" is configs/skysense.py with three modalities, sequences, local views and every part of the model, but narrow and
flat: 43 GFLOPs a sample, so that a step takes seconds on a CPU, half of them in fusion as in the config's own sizes
(55 % in tiny, 72 % in huge). Batches lie on the device already: reading files is not measured here. On a busy machine
take --threads=1 --clock=cpu: processor time of one thread is what the clock on the wall would show with nothing else
running. A ratio below 1: skyjax is faster.
"""

import argparse
import json
import logging
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs a share of the GPU's memory
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax
import ml_collections
import numpy as np
from measure import in_turns, keep_memory, random_batch

from skyjax.config import load_config
from skyjax.convert import pytorch
from skyjax.convert.pytorch.skyjax_encoder import SkyjaxEncoder
from skyjax.objectives import objective
from skyjax.parallel import chips, flops
from skyjax.parallel.mesh import make_mesh
from skyjax.parallel.sharding import batch_sharding
from skyjax.sample import MODALITIES, Batch
from skyjax.train import loop, plan
from skyjax.train import state as states
from skyjax.train.pretrained import Pretrained

try:
    import torch
    from torch_step import Network, Step
except ImportError as error:
    sys.exit(f"benchmarks/step.py compares with PyTorch, and {error}: pip install {pytorch.TORCH}")

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "skysense.py"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
VIT = {"width": 192, "depth": 4, "heads": 3}
MINI = {
    "model.modalities.optical.width": 48,
    "model.modalities.optical.depths": (2, 2, 2, 2),
    **{f"model.modalities.{m}.{key}": value for m in ("multispectral", "sar") for key, value in VIT.items()},
    "model.spatial_width": 384,
    "model.fusion.depth": 4,
    "objective.classes": 1024,
    "objective.head_hidden": 256,
    "objective.head_bottleneck": 64,
    "data.dates": {"optical": 1, "multispectral": 6, "sar": 3},
    "data.global_views.size": {"optical": 256, "multispectral": 8, "sar": 8},
    "data.local_views.size": {"optical": 128, "multispectral": 4, "sar": 4},
    "data.local_views.dates": {"optical": 1, "multispectral": 2, "sar": 1},
    "data.local_views.count": 2,
}
# What only one side has, or would do by chance, or once more: both sides shall do the same work.
ALIKE = {
    "model.prototypes": None,
    "model.drop_path": 0.0,
    "model.remat": "none",
    "data.augment": None,
    "objective.chunk": 1_000_000,
    "optimizer.warmup_steps": 1,  # the first steps move the weights, so that later losses tell of the update
}
# Largest relative differences in float32. Losses near log(classes) say little, gradients say nearly all of the
# objective. How the teacher moved tells of optimizer and average; there Adam makes much of gradients near nothing.
STEPS = 3
LIMITS = {
    "loss": 1e-4,
    "terms": 1e-4,
    "gradient norm": 1e-3,
    "gradients": 1e-3,
    "later losses": 1e-4,
    "teacher's move": 0.05,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", help='of "peer" and "mfu"; by default the second on a GPU only')
    parser.add_argument("--size", default="mini", help='of part peer: "mini", or one of configs/skysense.py')
    parser.add_argument("--batch", type=int, default=4, help="samples, of part peer")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="by default bfloat16 on a GPU")
    parser.add_argument("--compiled", action="store_true", help="also time the peer by torch.compile")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--clock", default="wall", choices=tuple(CLOCKS), help="of part peer")
    parser.add_argument("--large", default="large", help="size of configs/skysense.py, of part mfu")
    parser.add_argument("--large-batch", type=int, default=16)
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the config, for part mfu")
    parser.add_argument("--json", type=pathlib.Path, help="also write the results to this file")
    arguments = parser.parse_args()
    # Both count the processors that they may use; jax when it starts its backend, at the first array.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    torch.set_num_threads(arguments.threads)
    keep_memory()
    gpu = jax.default_backend() == "gpu"
    if gpu and not torch.cuda.is_available():
        sys.exit("benchmarks/step.py: jax has a GPU and torch has none; install a torch built for CUDA")
    parts = (arguments.parts or ("peer,mfu" if gpu else "peer")).split(",")
    if unknown := set(parts) - {"peer", "mfu"}:
        sys.exit(f'--parts: "{min(unknown)}" is not one of peer, mfu')
    where = jax.devices()[0].device_kind if gpu else f"{arguments.threads} CPU threads"
    print(f"{where}; jax {jax.__version__}, torch {torch.__version__}; load {os.getloadavg()[0]:.1f}")
    results: dict[str, Any] = {"device": where, "jax": jax.__version__, "torch": torch.__version__}
    if "peer" in parts:
        dtype = arguments.dtype or ("bfloat16" if gpu else "float32")
        results["peer"] = beside_peer(arguments, dtype)
    if "mfu" in parts:
        results["mfu"] = share_of_peak(arguments.large, arguments.large_batch, arguments.rounds, arguments.set)
    results["load"] = os.getloadavg()[0]
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def beside_peer(arguments: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Seconds a step of both sides, after they were held to be the same; what is printed, as numbers."""
    size, batch_size, clock = arguments.size, arguments.batch, CLOCKS[arguments.clock]
    config = same_work(size, batch_size)
    batch = varied_batch(config)
    shares = flops.model_parts(config)
    of_fusion = shares["fusion"] / sum(shares.values())
    print(f"{size}, {batch_size} samples, {sum(shares.values()) / 1e9:.1f} GFLOPs a sample, {of_fusion:.0%} in fusion")
    with jax.default_matmul_precision("highest"):
        ours = Ours(config, batch)
    theirs = Theirs(config, ours.state, batch)
    torch.backends.cudnn.allow_tf32 = False
    found = differences(ours, theirs)
    for name, value in found.items():
        print(f"  {name:14s} {value:.1e}, at most {LIMITS[name]:.0e}{'' if value <= LIMITS[name] else '  DIFFERS'}")
    if any(not value <= LIMITS[name] for name, value in found.items()):
        sys.exit("the two steps are not the same model and loss; nothing was timed")
    if dtype != "float32":
        config.model.dtype = dtype
        ours = Ours(config, batch)
        theirs = Theirs(config, ours.state, batch)
    sides: dict[str, Any] = {"skyjax": ours, "torch": theirs}
    if arguments.compiled:
        sides["torch.compile"] = Theirs(config, ours.state, batch, compiled=True)
    first = {name: side.first_s if name == "skyjax" else seconds(side.run) for name, side in sides.items()}
    times = in_turns({name: side.run for name, side in sides.items()}, arguments.rounds, clock)
    median = {name: statistics.median(own) for name, own in times.items()}
    print(f"  {'':14s} {'steps/s':>8s} {'ms':>8s} {'fastest':>8s} {'first step s':>13s} {'skyjax takes':>13s}")
    for name, own in times.items():
        ratio = statistics.median(a / b for a, b in zip(times["skyjax"], own, strict=True))
        row = f"{1 / median[name]:8.3f} {1000 * median[name]:8.1f} {1000 * min(own):8.1f} {first[name]:13.1f}"
        print(f"  {name:14s} {row} {ratio:13.2f}", flush=True)
    asked = {"size": size, "batch_size": batch_size, "dtype": dtype, "flops_a_sample": sum(shares.values())}
    asked["clock"] = arguments.clock
    return asked | {"differences": found, "seconds": times, "median": median, "first": first}


def same_work(size: str, batch_size: int, changes: Mapping[str, Any] | None = None) -> ml_collections.ConfigDict:
    """The config of part peer: float32, without what ALIKE takes out; `changes` come last."""
    config = load_config(CONFIG, [f"size={'tiny' if size == 'mini' else size}"])
    with config.unlocked():
        for key, value in ((MINI if size == "mini" else {}) | ALIKE | dict(changes or {})).items():
            *parents, last = key.split(".")
            node = config
            for name in parents:
                node = node[name]
            node[last] = value
        config.model.dtype = "float32"
        config.batch_size = batch_size
        config.mesh.fsdp = 1
    return config


def varied_batch(config: ml_collections.ConfigDict) -> Batch:
    """Random pixels; views are crops, turned and flipped; dates, pixels and one site's modality are missing."""
    rng = np.random.default_rng(1)
    batch = random_batch(plan.abstract_batch(config, config.batch_size))
    for group in [name for name in ("global", "local") if name in batch]:
        views = batch[group]
        views["to_view"] = np.stack([random_crop(rng) for _ in range(views["to_view"].size // 6)]).reshape(
            views["to_view"].shape
        )
        for m in [name for name in MODALITIES if name in views]:
            images = views[m]
            images["values"] = rng.normal(1000, 300, images["values"].shape).astype(images["values"].dtype)
            images["student_days"] = images["days"] + rng.integers(-5, 6, images["days"].shape, np.int32)
            images["student_valid"] = rng.random(images["valid"].shape) < 0.8
            images["clear"] = rng.random(images["clear"].shape) < 0.9
        absent = batch[group]["sar"]  # one site without
        for name in ("valid", "student_valid", "clear"):
            absent[name] = absent[name].copy()
            absent[name][0] = False
    return batch


def random_crop(rng: np.random.Generator) -> np.ndarray:
    """(2, 3) map from the sample's unit square to that of a crop, with quarter turns and a flip."""
    side = np.sqrt(rng.uniform(0.4, 1))
    top, left = rng.uniform(0, 1 - side, 2)
    affine = np.array([[1 / side, 0, -top / side], [0, 1 / side, -left / side], [0, 0, 1]])
    turn, flip = np.array([[0, -1, 1], [1, 0, 0], [0, 0, 1]]), np.array([[1, 0, 0], [0, -1, 1], [0, 0, 1]])
    for map_ in [turn] * int(rng.integers(4)) + [flip] * int(rng.integers(2)):
        affine = map_ @ affine
    return affine[:2].astype(np.float32)


class Ours:
    """skyjax's step, its state and batch on the device.

    Attributes:
      compile_s: seconds of tracing and compiling.
      first_s: of these and the first step.
      metrics: of the last step.
    """

    def __init__(self, config: ml_collections.ConfigDict, batch: Batch):
        mesh = make_mesh(config.mesh)
        self.config, self.host = config, batch
        self.state = states.create(config, mesh)
        self.batch = jax.device_put(batch, batch_sharding(mesh))
        start = time.perf_counter()
        self.step = plan.trace(config, mesh).lower().compile()
        self.first_s = self.compile_s = time.perf_counter() - start
        self.metrics: dict[str, Any] = {}

    def run(self) -> None:
        """One step."""
        self.state, self.metrics = jax.block_until_ready(self.step(self.state, self.batch))


class Theirs:
    """The peer's step with the weights of `state`."""

    def __init__(self, config: ml_collections.ConfigDict, state: states.State, batch: Batch, compiled: bool = False):
        self.step = Step(config, network(config, state["params"]), compiled)
        self.batch = to_torch(batch)
        self.terms: dict[str, float] = {}
        self.draws = drawn_noise(config, batch)
        self.noise = torch.rand(self.draws.shape)

    def run(self) -> None:
        """One step; reads the loss, as the loop does, and so waits for the device."""
        loss, terms = self.step.run(self.batch, self.noise.to(self.batch["lonlat"].device))
        self.terms = {"loss": float(loss)} | {name: float(value) for name, value in terms.items()}
        self.noise = torch.rand(self.draws.shape)


def network(config: ml_collections.ConfigDict, params: Any) -> Network:
    """The PyTorch model whose parameters are those of a tree like `state["params"]`."""
    tables = loop.statistics_table(config.model)
    exported = pytorch.state_dict(Pretrained(config, params["encoder"], tables, step=0))
    encoder = SkyjaxEncoder({"model": config.model.to_dict(), "statistics": tables})
    encoder.load_state_dict({name: torch.tensor(x) for name, x in exported.items()}, strict=True)
    return Network(encoder, jax.tree.map(np.asarray, params["heads"]))


def to_torch(batch: Batch) -> Batch:
    """The batch as tensors on the peer's device; of types that PyTorch indexes and compares."""

    def convert(x: np.ndarray) -> torch.Tensor:
        wide = {"uint16": np.int32, "uint32": np.int64}
        return torch.tensor(np.asarray(x).astype(wide.get(x.dtype.name, x.dtype)))

    on = "cuda" if torch.cuda.is_available() else "cpu"
    return jax.tree.map(lambda x: convert(x).to(on), batch)


def drawn_noise(config: ml_collections.ConfigDict, batch: Batch) -> np.ndarray:
    """What skyjax draws the pixel level's places by, for the peer to be given the same (objectives/objective.py)."""
    per_date = [
        views * teachers * sizes["multispectral"].rows * sizes["multispectral"].columns
        for (views, sizes), teachers in zip(flops.view_images(config).values(), (1, flops.GLOBAL_VIEWS), strict=False)
    ]
    most = max(config.data.dates.values())
    stream = jax.random.fold_in(jax.random.key(config.seed), objective._STREAM)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(stream, batch["index"])
    # The stream with the most dates has the most draws; a number depends on its place alone, not on how many there are.
    return np.asarray(jax.vmap(lambda key: jax.random.uniform(key, (most * sum(per_date),)))(keys))


def differences(ours: Ours, theirs: Theirs, first: dict[str, float] | None = None) -> dict[str, float]:
    """Relative differences of both sides over STEPS steps from the same weights, by the names of LIMITS.

    Args:
      ours: not yet run.
      theirs: likewise; its draws become those of skyjax.
      first: gets skyjax's loss and terms of the first step.
    """
    losses = []
    start = {name: x.clone() for name, x in theirs.step.teacher.named_parameters()}
    found: dict[str, float] = {}
    for i in range(STEPS):
        theirs.noise = torch.tensor(theirs.draws)
        theirs.run()
        ours.run()
        want = {name.removeprefix("loss/"): float(x) for name, x in ours.metrics.items() if name.startswith("loss")}
        terms = {name: value for name, value in theirs.terms.items() if name != "loss"}
        losses.append(relative(theirs.terms["loss"], want["loss"]))
        if i == 0:
            norm = terms.pop("gradient_norm")
            missing = {name for name in ours.metrics if name.startswith("loss/")} ^ {f"loss/{name}" for name in terms}
            if missing:
                sys.exit(f"only one side has {', '.join(sorted(missing))}")
            found["loss"] = losses[0]
            if first is not None:
                first |= {name: want[name] for name in ("loss", *terms)}
            found["terms"] = max(relative(value, want[name]) for name, value in terms.items())
            found["gradient norm"] = relative(norm, float(ours.metrics["gradient_norm"]))
            found["gradients"] = gradient_difference(ours, theirs)
    want_teacher = dict(network(ours.config, ours.state["teacher"]).named_parameters())
    moves = {
        name: (x.cpu() - start[name].cpu(), want_teacher[name].detach() - start[name].cpu())
        for name, x in theirs.step.teacher.named_parameters()
        if not name.endswith("key.bias")  # changes no score: its gradient is rounding, and skyjax has none
    }
    return found | {"later losses": max(losses[1:]), "teacher's move": vector_difference(moves.values())}


def gradient_difference(ours: Ours, theirs: Theirs) -> float:
    """Of all gradients of the first step, as one vector: Adam's first moment is then their multiple."""
    moment = next(x.mu for x in jax.tree.leaves(ours.state["optimizer"], is_leaf=lambda x: hasattr(x, "mu")) if x)
    want = dict(network(ours.config, moment).named_parameters())
    got = {name: theirs.step.optimizer.state[x]["exp_avg"].cpu() for name, x in theirs.step.student.named_parameters()}
    return vector_difference((x, want[name].detach()) for name, x in got.items())


def vector_difference(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Length of the difference of two vectors, given in parts (got, wanted), over the length of the second."""
    squares = np.zeros(2)
    for got, want in pairs:
        squares += float((got - want).double().square().sum()), float(want.double().square().sum())
    return float(np.sqrt(squares[0] / squares[1]))


def relative(got: float, want: float) -> float:
    return abs(got - want) / abs(want)


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def share_of_peak(size: str, batch_size: int, rounds: int, overrides: list[str]) -> dict[str, Any]:
    """Model FLOPs of a step as shipped over the median time and the card's published peak."""
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    while True:
        config = load_config(CONFIG, [f"size={size}", "mesh.fsdp=1", f"batch_size={batch_size}", *overrides])
        ours = Ours(config, random_batch(plan.abstract_batch(config, batch_size)))
        memory = ours.step.memory_analysis()
        needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        if limit is None or needed <= limit or batch_size == 1:
            break
        print(f"  {batch_size} samples take {needed / 2**30:.1f} of {limit / 2**30:.1f} GiB: half of them", flush=True)
        batch_size //= 2
        del ours
    took = statistics.median(in_turns({"skyjax": ours.run}, rounds, time.perf_counter)["skyjax"])
    rate = flops.model_flops(config) * batch_size / took
    chip = chips.of_kind(device.device_kind)
    mfu = rate / chip.bf16_flops if chip else None
    share = f"{mfu:.1%} of {chip.bf16_flops / 1e12:.0f} TFLOP/s" if chip else "of a peak that is not known"
    print(f"{size}, {batch_size} samples, {config.model.dtype}, remat {config.model.remat}: {needed / 2**30:.1f} GiB")
    print(f"  {took:.3f} s a step, {batch_size / took:.2f} samples/s, {rate / 1e12:.3f} model TFLOP/s, {share}")
    asked = {"size": size, "batch_size": batch_size, "set": overrides, "seconds": took, "compile": ours.compile_s}
    return asked | {"bytes": needed, "model_flops_a_second": rate, "mfu": mfu}


if __name__ == "__main__":
    logging.disable()
    main()
