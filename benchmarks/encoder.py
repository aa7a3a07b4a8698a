"""Times each part of the encoder against the same PyTorch module, in one run.

PYTHONPATH=. python benchmarks/encoder.py [--parts=swin_v2,up_head] [--size=base|tiny] [--rounds=20] [--threads=2]
    [--clock=wall|cpu]

A part is the published module at a base width (tests/models/make_cases.py names the packages that it needs) and ours
with the same weights, on the same inputs; both float32 on the CPU with the same number of threads. Where jax and torch
both have a GPU it is bf16 there, ours against autocast, run eagerly and by `torch.compile`. Forward is the features
alone; forward and backward adds the gradients of a weighted sum of them by all weights and inputs.

Other programs disturb timings, so the sides take turns (skyjax, torch, skyjax, torch, ...) and each number is the
shortest of all rounds, after a warm-up that compiles. On a busy machine take --threads=1 --clock=cpu: processor time
of one thread is what the clock on the wall would show with nothing else running. A ratio below 1: skyjax is faster.
"""

import argparse
import dataclasses
import functools
import gc
import logging
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs a share of the GPU's memory

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from measure import in_turns, keep_memory

from skyjax.convert import skysense
from skyjax.models.fusion import DAYS_A_YEAR, Fusion
from skyjax.models.layers import Compute
from skyjax.models.swin_v2 import SwinV2
from skyjax.models.up_head import UpHead
from skyjax.models.vit import ViT

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests" / "models"))
try:
    import torch
    from make_cases import MODULES, fill
except ImportError as error:
    sys.exit(
        f"benchmarks/encoder.py compares with PyTorch's modules, and {error}; install them beside skyjax:\n"
        'pip install torch==2.13.0 "setuptools<81" addict pyyaml yapf==0.40.1 packaging pillow rich einops prettytable'
        " matplotlib termcolor opencv-python-headless\n"
        "pip install --no-deps mmcv-lite==2.1.0 mmengine==0.10.7 mmpretrain==1.2.0 mmsegmentation==1.2.2"
    )

PATCH = 4
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Call = Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Part:
    """What is timed.

    Attributes:
      title: of its row.
      module: of `make_cases.MODULES`.
      config: of the published module.
      shape: of its input: channels first, or (places, dates, width).
    """

    title: str
    module: str
    config: dict[str, Any]
    shape: tuple[int, ...]


def parts(size: str) -> dict[str, Part]:
    """The parts at a size of the family: "base", or "tiny" to see whether it runs."""
    width, depth, heads, swin, depths = {
        "base": (768, 12, 12, 128, (2, 2, 18, 2)),
        "tiny": (64, 2, 2, 16, (2, 2, 6, 2)),
    }[size]
    vit = {"embed_dims": width, "layers": depth, "heads": heads, "img": 64}
    optical = {
        "embed_dims": swin, "depths": depths, "num_heads": tuple(swin * 2**i // 32 or 1 for i in range(4)), "window": 8,
        "img": 256, "chans": 3, "extra": 6, "out_indices": (3,),
    }  # fmt: skip
    cells = {"inp": width, "out": 8 * swin, "scale": 4}
    fusion = {"input_dims": 8 * swin, "embed_dims": width, "layers": depth, "heads": heads}
    return {
        "swin_v2": Part("Swin-V2, 256 x 256 pixels", "swin_v2", optical, (1, 3, 256, 256)),
        "multispectral": Part("ViT multispectral, 64 x 64 pixels", "vit", vit | {"chans": 10}, (1, 10, 64, 64)),
        "sar": Part("ViT SAR, 64 x 64 pixels", "vit", vit | {"chans": 2}, (1, 2, 64, 64)),
        "up_head": Part("up-head, 16 x 16 tokens", "up_head", cells, (1, width, 16, 16)),
        "up_head_4": Part("up-head, 4 times 16 x 16 tokens", "up_head", cells, (4, width, 16, 16)),
        "fusion": Part("fusion, 64 places, 7 dates", "fusion", fusion, (64, 7, 8 * swin)),
    }


def ours(part: Part, weights: dict[str, np.ndarray], dtype: Any) -> tuple[dict[str, Any], Call]:
    """Our parameters and `call(params, x)`, channels last."""
    config, compute = part.config, Compute(dtype)
    besides: dict[str, Any] = {}
    make: Callable[..., Any]
    if part.module == "swin_v2":
        rules = skysense.swin_v2(config["depths"], config["extra"])
        make = functools.partial(
            SwinV2, channels=config["chans"], patch_size=PATCH, width=config["embed_dims"], depths=config["depths"],
            heads=config["num_heads"], window=config["window"], extra_norm_every=config["extra"], mask_padding=False,
            compute=compute,
        )  # fmt: skip
    elif part.module == "vit":
        rules = skysense.vit(config["layers"])
        make = functools.partial(
            ViT, channels=config["chans"], patch_size=PATCH, image_size=config["img"], width=config["embed_dims"],
            depth=config["layers"], heads=config["heads"], compute=compute,
        )  # fmt: skip
    elif part.module == "fusion":
        rules = skysense.fusion(config["layers"])
        besides = {"dates": np.zeros((DAYS_A_YEAR, config["input_dims"]), np.float32)}
        make = functools.partial(
            Fusion, spatial_width=config["input_dims"], width=config["embed_dims"], depth=config["layers"],
            heads=config["heads"], compute=compute,
        )  # fmt: skip
    else:
        rules = skysense.up_head(config["scale"])
        make = functools.partial(UpHead, config["inp"], config["out"], config["scale"], dtype)
    graph, abstract = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))

    def call(params: dict[str, Any], x: jax.Array) -> jax.Array:
        state = jax.tree.map(lambda leaf: leaf, abstract)
        nnx.replace_by_pure_dict(state, params)
        module: Any = nnx.merge(graph, state)
        if part.module != "fusion":
            return module(x)
        _, t, h, w, _ = x.shape
        return module(x, jnp.zeros((1, t), jnp.int32), jnp.ones((1, t, h, w), bool))

    params = skysense.to_params(rules, weights) | besides
    return jax.tree.map(jnp.asarray, params), call


def to_ours(part: Part, x: np.ndarray) -> np.ndarray:
    """A published input as we take it."""
    return x.transpose(1, 0, 2)[None, :, None] if part.module == "fusion" else np.moveaxis(x, 1, -1)


def from_ours(part: Part, y: jax.Array) -> np.ndarray:
    """Our output as published."""
    wide = np.asarray(y, np.float32)
    return wide[0, 0] if part.module == "fusion" else np.moveaxis(wide, -1, 1)


def time_part(part: Part, gpu: bool, rounds: int, clock: Callable[[], float]) -> None:
    """Prints a row for forward and one for forward and backward."""
    rng = np.random.default_rng(0)
    module = MODULES[part.module](**part.config)
    module.eval()
    fill(module, "random", rng)
    weights = {name: value.detach().numpy().copy() for name, value in module.named_parameters()}
    params, call = ours(part, weights, jnp.bfloat16 if gpu else jnp.float32)
    image = rng.standard_normal(part.shape).astype(np.float32)
    theirs = torch.from_numpy(image).requires_grad_()
    if gpu:
        module, theirs = module.cuda(), theirs.detach().cuda().requires_grad_()
    x = jnp.asarray(to_ours(part, image))
    sides = {"torch": module} | ({"compiled": torch.compile(module)} if gpu else {})

    forward = jax.jit(call)
    got = from_ours(part, forward(params, x))
    want = run_torch(module, theirs, None, gpu)
    difference = np.abs(got - want.float().cpu().numpy()).max() / want.abs().max().item()
    factors = rng.standard_normal(got.shape).astype(np.float32)
    own_factors = jnp.asarray(
        factors.reshape(1, 1, *factors.shape) if part.module == "fusion" else to_ours(part, factors)
    )
    their_factors = torch.from_numpy(factors).to(theirs.device)
    gradients = jax.jit(jax.grad(lambda params, x, factors: (call(params, x) * factors).sum(), argnums=(0, 1)))

    for name, run, weighting in (
        ("forward", lambda: forward(params, x), None),
        ("forward, backward", lambda: gradients(params, x, own_factors), their_factors),
    ):
        runs: dict[str, Callable[[], Any]] = {"skyjax": functools.partial(run_jax, run)}
        for side, made in sides.items():
            runs[side] = functools.partial(run_torch, made, theirs, weighting, gpu)
        best = {side: min(seconds) for side, seconds in in_turns(runs, rounds, clock).items()}
        ratios = " ".join(f"{best['skyjax'] / best[side]:8.2f}" for side in sides)
        times = " ".join(f"{1000 * best[side]:10.1f}" for side in runs)
        print(f"{part.title:34s} {name:18s} {times} {ratios} {difference:12.1e}", flush=True)


def run_jax(function: Callable[[], Any]) -> None:
    """Calls and waits."""
    jax.block_until_ready(function())


def run_torch(module: Any, x: Any, factors: Any, gpu: bool) -> Any:
    """The features; with `factors`, also the gradients."""
    with torch.set_grad_enabled(factors is not None), torch.autocast("cuda", torch.bfloat16, enabled=gpu):
        y = module(x)[0]
    if factors is not None:
        module.zero_grad()
        x.grad = None
        (y * factors).sum().backward()
    if gpu:
        torch.cuda.synchronize()
    return y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(parts("tiny")))
    parser.add_argument("--size", default="base", choices=("base", "tiny"))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--clock", default="wall", choices=tuple(CLOCKS))
    arguments = parser.parse_args()
    logging.disable()  # the published modules tell how each weight starts
    keep_memory()
    # Both count the processors that they may use; jax when it starts its backend, at the first array.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    torch.set_num_threads(arguments.threads)
    gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else f"CPU, {arguments.threads} threads"
    versions = f"jax {jax.__version__}, torch {torch.__version__}"
    print(f"{device}, {'bf16' if gpu else 'float32'}, {arguments.clock} clock, best of {arguments.rounds}; {versions}")
    sides = ["torch", "compiled"] if gpu else ["torch"]
    times = " ".join(f"{side + ' ms':>10s}" for side in ("skyjax", *sides))
    ratios = " ".join([f"{'ratio':>8s}"] * len(sides))
    print(f"{'part':34s} {'':18s} {times} {ratios} {'difference':>12s}")
    known = parts(arguments.size)
    for name in arguments.parts.split(","):
        if name not in known:
            sys.exit(f'--parts: "{name}" is not one of {", ".join(known)}')
        gc.collect()  # the part before holds gigabytes
        time_part(known[name], gpu, arguments.rounds, CLOCKS[arguments.clock])


if __name__ == "__main__":
    main()
