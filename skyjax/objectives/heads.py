"""Heads between features and losses, as plain functions over a plain nested dict of float32 arrays.

    {modality or "fused": {"pixel" | "object" | "image": {"hidden": dense, "bottleneck": dense, "classes": (k, d)}},
     "alignment": {modality: {"kernel": (c, d)}, "temperature": ()}}                  dense = {"kernel", "bias"}

A head is a multilayer perceptron of one hidden layer, an L2 normalisation and, in the DINO kind, unit-norm class
vectors (DINO, Caron et al. 2021, section 3.1 and appendix C, has two hidden layers and the same end).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Bool, Float

from skyjax.sample import MODALITIES

Params = dict[str, Any]

LEVELS = ("pixel", "object", "image")
STREAMS = (*MODALITIES, "fused")
KINDS = ("dino", "infonce")
NORMS = ("none", "batch")
# The default of `objective.alignment.bounds`. CLIP's (Radford et al. 2021, section 2.5): logits are scaled by at most
# 100.
TEMPERATURES = (0.01, 1.0)


def init_heads(config: ml_collections.ConfigDict, model: ml_collections.ConfigDict, key: Array) -> Params:
    """Parameters of every head that the objective uses; a level of weight 0 has none.

    Args:
      config: the experiment's `objective`.
      model: the experiment's `model`: its modalities, `spatial_width` and `fusion.width` (or None).
      key: a name's parameters depend on the key and the name alone, not on which other modalities are there.

    Raises:
      ValueError: `kind` or `head_norm` is not known.
    """
    if config.kind not in KINDS:
        raise ValueError(f'objective.kind is "{config.kind}"; it is one of {", ".join(KINDS)}')
    if config.get("head_norm", "none") not in NORMS:
        raise ValueError(f'objective.head_norm is "{config.head_norm}"; it is one of {", ".join(NORMS)}')
    modalities = modalities_of(model)
    heads: Params = {
        stream: {
            level: _init_head(config, width, jax.random.fold_in(key, STREAMS.index(stream) * len(LEVELS) + i))
            for i, level in enumerate(LEVELS)
            if config.weights[level]
        }
        for stream, width in widths_of(model).items()
        if stream in streams_of(model)
    }
    if config.weights.alignment and len(modalities) > 1:
        keys = dict(zip(MODALITIES, jax.random.split(jax.random.fold_in(key, 1000), len(MODALITIES)), strict=True))
        heads["alignment"] = {
            **{m: {"kernel": kernel(keys[m], model.spatial_width, config.head_bottleneck)} for m in modalities},
            "temperature": jnp.log(jnp.float32(config.alignment.temperature)),
        }
    return {name: head for name, head in heads.items() if head}


def widths_of(model: ml_collections.ConfigDict) -> dict[str, int]:
    """Stream -> width of its features."""
    fused = model.spatial_width if model.fusion is None else model.fusion.width
    return {**dict.fromkeys(modalities_of(model), model.spatial_width), "fused": fused}


def modalities_of(names: Any) -> list[str]:
    """The modalities of a model's config, or among any names, in the order of the house."""
    names = names.modalities if isinstance(names, ml_collections.ConfigDict) else names
    return [m for m in MODALITIES if m in names]


def streams_of(model: ml_collections.ConfigDict) -> list[str]:
    """What the levels compare: each modality, and the fused features where they are more than the only modality's."""
    alone = model.fusion is None and not model.get("prototypes")
    return modalities_of(model) + ([] if alone else ["fused"])


def project(
    head: Params, features: Float[Array, "*n c"], valid: Bool[Array, "*n"] | None = None
) -> Float[Array, "*n d"]:
    """Unit vectors of the head's bottleneck, in float32.

    Args:
      head: one level's.
      features: of that level.
      valid: rows whose mean and variance, a feature at a time, norm the head's input and its hidden features (batch
        norm without scale and shift; Ioffe and Szegedy 2015). Over the global batch, and without running statistics:
        a head is dropped after training. None: no norm.
    """
    normed = (lambda x: x) if valid is None else (lambda x: batch_norm(x, valid))
    hidden = jax.nn.gelu(normed(_dense(head["hidden"], normed(features.astype(jnp.float32)))))
    return unit(_dense(head["bottleneck"], hidden))


def batch_norm(x: Float[Array, "*n c"], valid: Bool[Array, "*n"]) -> Float[Array, "*n c"]:
    """Each feature with mean 0 and variance 1 over the valid rows; the others move with them and count for nothing."""
    rows, weight = x.reshape(-1, x.shape[-1]), valid.reshape(-1, 1).astype(x.dtype)
    count = jnp.maximum(weight.sum(), 1)
    rows = rows - jnp.sum(weight * rows, axis=0) / count
    variance = jnp.sum(weight * jnp.square(rows), axis=0) / count
    return (rows * jax.lax.rsqrt(variance + 1e-5)).reshape(x.shape)


def class_scores(head: Params, projected: Float[Array, "*n d"]) -> Float[Array, "*n k"]:
    """Cosine of each projected feature with each class vector."""
    return jnp.einsum("...d,kd->...k", projected, unit(head["classes"]))


def alignment_temperature(head: Params, bounds: Sequence[float] = TEMPERATURES) -> Float[Array, ""]:
    """The learned temperature; it is stored as its logarithm and clamped to `bounds`.

    The clamp passes the gradient on: with a zero gradient beyond the bound the temperature could never come back.
    """
    return bounded_temperature(head["temperature"], bounds)


def bounded_temperature(stored: Float[Array, ""], bounds: Sequence[float] = TEMPERATURES) -> Float[Array, ""]:
    """exp(stored) clamped to `bounds`, with the gradient passed on."""
    clamped = jnp.clip(stored, *(jnp.log(bound) for bound in bounds))
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
    return {"kernel": kernel(key, width, out), "bias": jnp.zeros(out)}


def kernel(key: Array, width: int, out: int) -> Float[Array, "c d"]:
    """A fresh matrix of a linear layer."""
    # The variance of the input is kept: DINO's 0.02 would leave a narrow head of a small model almost linear.
    return jax.random.normal(key, (width, out)) / jnp.sqrt(width)


def _dense(params: Params, x: Float[Array, "*n c"]) -> Float[Array, "*n d"]:
    return jnp.einsum("...c,cd->...d", x, params["kernel"]) + params["bias"]
