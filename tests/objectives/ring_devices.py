"""Contrastive losses, dense and around the ring, over 1, 2 and 8 devices: python ring_devices.py OUT.npz.

Run with eight virtual devices. Out: "KIND/FORM/DEVICES/NAME" -> losses of all sites, or the gradient to NAME; and
"memory/FORM", bytes of temporary memory a device where the scores of 16,384 sites are too many to hold.
"""

import functools
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from skyjax.objectives import contrastive
from skyjax.parallel.mesh import make_mesh
from skyjax.parallel.sharding import batch_sharding, replicated

DEVICES = {
    1: {"data": 1, "fsdp": 1, "tensor": 1},
    2: {"data": 1, "fsdp": 2, "tensor": 1},
    8: {"data": 2, "fsdp": 2, "tensor": 2},
}
KINDS = ("softmax", "sigmoid")
FORMS = ("dense", "ring")
B, K, D = 24, 3, 8
BIG = 16_384
TEMPERATURE, BIAS = 0.07, -3.0


def inputs() -> dict[str, np.ndarray]:
    """Sites of none to three captions; some captions share their words with those of other sites."""
    rng = np.random.default_rng(0)

    def unit(x: np.ndarray) -> np.ndarray:
        return np.float32(x / np.linalg.norm(x, axis=-1, keepdims=True))

    return {
        "sites": unit(rng.normal(size=(B, D))),
        "captions": unit(rng.normal(size=(B, K, D))),
        "valid": rng.random((B, K)) < 0.6,
        "words": rng.integers(0, 40, (B, K)).astype(np.int32),
        "weight": rng.uniform(0.5, 1.5, B).astype(np.float32),
    }


def losses(kind: str, form: Any, temperature: Any, bias: Any, arrays: dict[str, Any]) -> jax.Array:
    sites, captions, valid, words = (arrays[name] for name in ("sites", "captions", "valid", "words"))
    if kind == "softmax":
        return contrastive.softmax(sites, captions, valid, temperature, words, form)
    return contrastive.sigmoid(sites, captions, valid, temperature, bias, words, form)


def everything(arrays: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for kind in KINDS:
        for form in FORMS:
            wanted = {name: arrays[name] for name in ("sites", "captions")}
            wanted |= {"temperature": jnp.float32(TEMPERATURE), "bias": jnp.float32(BIAS)}

            def total(wanted: Any, kind: str = kind, form: str = form) -> Any:
                temperature, bias = wanted["temperature"], wanted["bias"]
                own = losses(kind, form, temperature, bias, arrays | wanted)
                return jnp.sum(own * arrays["weight"]), own

            gradients, own = jax.grad(total, has_aux=True)(wanted)
            found[f"{kind}/{form}"] = {"loss": own, **gradients}
            found[f"{kind}/{form}"]["views"] = by_view(kind, form, arrays)
    return found


def by_view(kind: str, form: str, arrays: dict[str, Any]) -> jax.Array:
    """Gradient to sites (b, v, d) where each of two views is a batch by itself, as in alignment.py."""
    sites = jnp.stack([arrays["sites"], -arrays["sites"]], axis=1)

    def total(sites: Any) -> Any:
        run = functools.partial(losses, kind, form, TEMPERATURE, BIAS)
        return jax.vmap(lambda one: run(arrays | {"sites": one}), in_axes=1)(sites).sum()

    return jax.grad(total)(sites)


def memory(form: str) -> int:
    """Bytes of temporary memory a device, of value and gradient; nothing is run."""
    rows = jax.sharding.get_abstract_mesh()
    assert not rows.empty
    shapes = {
        "sites": ((BIG, 16), jnp.float32),
        "captions": ((BIG, 1, 16), jnp.float32),
        "valid": ((BIG, 1), bool),
        "words": ((BIG, 1), jnp.int32),
    }
    sharding = batch_sharding(jax.sharding.get_mesh())
    arrays = {name: jax.ShapeDtypeStruct(*shape, sharding=sharding) for name, shape in shapes.items()}

    def loss(vectors: Any, rest: Any) -> Any:
        return losses("sigmoid", form, TEMPERATURE, BIAS, vectors | rest).sum()

    vectors = {name: arrays.pop(name) for name in ("sites", "captions")}
    return jax.jit(jax.grad(loss)).lower(vectors, arrays).compile().memory_analysis().temp_size_in_bytes


def main(out: pathlib.Path) -> None:
    contrastive.BLOCK = 7  # so that blocks of a device do not come out even
    found = {}
    for count, sizes in DEVICES.items():
        mesh = make_mesh(sizes, jax.devices()[:count])
        arrays = jax.device_put(inputs(), batch_sharding(mesh))
        with jax.set_mesh(mesh):
            results = jax.jit(everything, out_shardings=replicated(mesh))(arrays)
            if count == len(jax.devices()):
                found |= {f"memory/{form}": memory(form) for form in FORMS}
        found |= {
            f"{pair}/{count}/{name}": np.asarray(x) for pair, named in results.items() for name, x in named.items()
        }
    np.savez(out, **found)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
