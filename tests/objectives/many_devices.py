"""Terms that compare samples, over 1, 2 and 8 devices: python many_devices.py OUT.npz (with eight virtual devices).

Out: for each number of devices the value of each term and its gradient to features and heads.
"""

import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from skyjax.models.assignment import sinkhorn
from skyjax.objectives import alignment, distillation, heads, spread
from skyjax.parallel.mesh import make_mesh
from skyjax.parallel.sharding import batch_sharding, replicated

DEVICES = {1: {"data": 1, "fsdp": 1}, 2: {"data": 2, "fsdp": 1}, 8: {"data": 2, "fsdp": 4}}
B, R, C, K = 16, 3, 6, 5
EPSILON, ITERATIONS, SHARPNESS = 0.3, 40, 0.06
MODALITIES = ("optical", "sar")
# Name of a term -> kind of the loss and norm of its heads.
LEVELS = {"dino": ("dino", "none"), "infonce": ("infonce", "none"), "normed": ("infonce", "batch")}
MODEL = ml_collections.ConfigDict(
    {"modalities": {m: {} for m in MODALITIES}, "spatial_width": C, "fusion": {"width": C}}
)


def settings(term: str) -> ml_collections.ConfigDict:
    kind, norm = LEVELS[term]
    return ml_collections.ConfigDict(
        {
            "kind": kind,
            "head_norm": norm,
            "classes": K,
            "head_hidden": 8,
            "head_bottleneck": 4,
            "student_temperature": 0.1,
            "sinkhorn_iterations": 3,
            "infonce": {"temperature": 0.2, "negatives": R},
            "chunk": 1024,
            "weights": {"pixel": 0.0, "object": 0.0, "image": 1.0, "alignment": 0.1, "spread": 0.0},
            "alignment": {"temperature": 0.1},
        }
    )


def inputs() -> dict[str, np.ndarray]:
    """Every array has a row a sample. The samples of one of eight devices, 2 and 3, have nothing at all.

    Samples differ in kind as one goes along the batch: a part of it has other columns, neighbours and negatives.
    """
    rng = np.random.default_rng(0)
    drift = np.linspace(-1, 1, B)[:, None]
    weight = np.where(rng.random((B, R)) < 0.7, rng.uniform(0.5, 1, (B, R)), 0)
    there = rng.random((B, len(MODALITIES))) < 0.7
    weight[2:4], there[2:4] = 0, False
    arrays = {
        "scores": rng.normal(size=(B, K)) + drift * np.arange(K),
        "valid": weight[:, 0] > 0,
        "student": rng.normal(size=(B, R, C)) + drift[..., None],
        "teacher": rng.normal(size=(B, R, C)) + drift[..., None],
        "weight": weight,
        "pooled": rng.normal(size=(B, len(MODALITIES), C)) + drift[..., None],
        "there": there,
    }
    return {name: x if x.dtype == bool else np.float32(x) for name, x in arrays.items()}


def make_heads(term: str, seed: int) -> heads.Params:
    return heads.init_heads(settings(term), MODEL, jax.random.key(seed))


def terms(arrays: dict[str, jax.Array], student_heads: Any, teacher_heads: Any) -> dict[str, jax.Array]:
    """The sum of each term."""
    rows = distillation.Rows(arrays["student"], arrays["teacher"], arrays["weight"], jnp.float32(1))
    found = {
        term: distillation.distil(
            rows,
            student_heads[term]["fused"]["image"],
            teacher_heads[term]["fused"]["image"],
            config=settings(term),
            teacher_temperature=SHARPNESS,
            keys=jax.random.split(jax.random.key(3), B),
        )
        for term in LEVELS
    }
    features, present = ({m: arrays[x][:, None, i] for i, m in enumerate(MODALITIES)} for x in ("pooled", "there"))
    (found["alignment"],) = alignment.align(features, present, student_heads["dino"]["alignment"])[0].values()
    found["spread"], _ = spread.koleo(arrays["pooled"][:, 0], arrays["there"][:, 0])
    return found


def everything(arrays: dict[str, jax.Array], student_heads: Any, teacher_heads: Any) -> dict[str, Any]:
    """The balanced matrix, and each term with its gradients."""
    features = {name: arrays[name] for name in ("student", "pooled")}

    def run(features: Any, student_heads: Any) -> dict[str, jax.Array]:
        return terms(arrays | features, student_heads, teacher_heads)

    values, pull = jax.vjp(run, features, student_heads)
    gradients = {name: pull({other: jnp.float32(other == name) for other in values}) for name in values}
    balanced = sinkhorn(arrays["scores"], arrays["valid"], epsilon=EPSILON, iterations=ITERATIONS)
    return {"balanced": balanced, "values": values, "gradients": gradients}


def main(out: pathlib.Path) -> None:
    found = {}
    for count, sizes in DEVICES.items():
        mesh = make_mesh({**sizes, "tensor": 1}, jax.devices()[:count])
        arrays = jax.device_put(inputs(), batch_sharding(mesh))
        assert len(arrays["student"].sharding.device_set) == count
        parameters = [
            jax.device_put({term: make_heads(term, seed) for term in LEVELS}, replicated(mesh)) for seed in (0, 1)
        ]
        with jax.set_mesh(mesh):
            results = jax.jit(everything)(arrays, *parameters)
        for path, leaf in jax.tree_util.tree_leaves_with_path(results):
            found[f"{count}{jax.tree_util.keystr(path)}"] = np.asarray(leaf)
    np.savez(out, **found)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
