"""Heads between features and losses, as plain functions over a plain nested dict of float32 arrays.

    {modality or "fused": {"pixel" | "object" | "image": {"hidden": dense, "bottleneck": dense, "classes": (k, d)}},
     "alignment": {modality: {"kernel": (c, d)}, "temperature": ()}}                  dense = {"kernel", "bias"}

A head is a multilayer perceptron of one hidden layer, an L2 normalisation and, in the DINO kind, unit-norm class
vectors (DINO, Caron et al. 2021, section 3.1 and appendix C, has two hidden layers and the same end).
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float

from skyjax.sample import MODALITIES

Params = dict[str, Any]

LEVELS = ("pixel", "object", "image")
STREAMS = (*MODALITIES, "fused")
# CLIP's bound (Radford et al. 2021, section 2.5): logits are scaled by at most 100.
SMALLEST_TEMPERATURE, LARGEST_TEMPERATURE = 0.01, 1.0


def init_heads(config: ml_collections.ConfigDict, model: ml_collections.ConfigDict, key: Array) -> Params:
    """Parameters of every head that the objective uses; a level of weight 0 has none.

    Args:
      config: the experiment's `objective`.
      model: the experiment's `model`: its modalities, `spatial_width` and `fusion.width` (or None).
      key: a name's parameters depend on the key and the name alone, not on which other modalities are there.
    """
    modalities = modalities_of(model)
    fused = model.spatial_width if model.fusion is None else model.fusion.width
    widths = {**dict.fromkeys(modalities, model.spatial_width), "fused": fused}
    heads: Params = {
        stream: {
            level: _init_head(config, width, jax.random.fold_in(key, STREAMS.index(stream) * len(LEVELS) + i))
            for i, level in enumerate(LEVELS)
            if config.weights[level]
        }
        for stream, width in widths.items()
    }
    if config.weights.alignment and len(modalities) > 1:
        keys = dict(zip(MODALITIES, jax.random.split(jax.random.fold_in(key, 1000), len(MODALITIES)), strict=True))
        heads["alignment"] = {
            **{m: {"kernel": _kernel(keys[m], model.spatial_width, config.head_bottleneck)} for m in modalities},
            "temperature": jnp.log(jnp.float32(config.alignment.temperature)),
        }
    return {name: head for name, head in heads.items() if head}


def modalities_of(names: Any) -> list[str]:
    """The modalities of a model's config, or among any names, in the order of the house."""
    names = names.modalities if isinstance(names, ml_collections.ConfigDict) else names
    return [m for m in MODALITIES if m in names]


def project(head: Params, features: Float[Array, "*n c"]) -> Float[Array, "*n d"]:
    """Unit vectors of the head's bottleneck, in float32."""
    hidden = jax.nn.gelu(_dense(head["hidden"], features.astype(jnp.float32)))
    return unit(_dense(head["bottleneck"], hidden))


def class_scores(head: Params, projected: Float[Array, "*n d"]) -> Float[Array, "*n k"]:
    """Cosine of each projected feature with each class vector."""
    return jnp.einsum("...d,kd->...k", projected, unit(head["classes"]))


def alignment_temperature(head: Params) -> Float[Array, ""]:
    """The learned temperature; it is stored as its logarithm and clamped.

    The clamp passes the gradient on: with a zero gradient beyond the bound the temperature could never come back.
    """
    stored = head["temperature"]
    clamped = jnp.clip(stored, jnp.log(SMALLEST_TEMPERATURE), jnp.log(LARGEST_TEMPERATURE))
    return jnp.exp(stored + jax.lax.stop_gradient(clamped - stored))


def unit(vectors: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """Vectors at length one; a zero vector stays zero and its gradient finite."""
    return vectors * jax.lax.rsqrt(jnp.sum(jnp.square(vectors), axis=-1, keepdims=True) + 1e-8)


def _init_head(config: ml_collections.ConfigDict, width: int, key: Array) -> Params:
    hidden, bottleneck, classes = jax.random.split(key, 3)
    head: Params = {
        "hidden": _init_dense(hidden, width, config.head_hidden),
        "bottleneck": _init_dense(bottleneck, config.head_hidden, config.head_bottleneck),
    }
    if config.kind == "dino":
        head["classes"] = unit(jax.random.normal(classes, (config.classes, config.head_bottleneck)))
    return head


def _init_dense(key: Array, width: int, out: int) -> Params:
    return {"kernel": _kernel(key, width, out), "bias": jnp.zeros(out)}


def _kernel(key: Array, width: int, out: int) -> Float[Array, "c d"]:
    # The variance of the input is kept: DINO's 0.02 would leave a narrow head of a small model almost linear.
    return jax.random.normal(key, (width, out)) / jnp.sqrt(width)


def _dense(params: Params, x: Float[Array, "*n c"]) -> Float[Array, "*n d"]:
    return jnp.einsum("...c,cd->...d", x, params["kernel"]) + params["bias"]
