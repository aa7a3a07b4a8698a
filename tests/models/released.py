"""From the published parameter names to ours: renamed, transposed, stacked. The weights are numpy arrays."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Weights = Mapping[str, np.ndarray]


def swin_v2(weights: Weights, depths: tuple[int, ...], extra_norm_every: int) -> dict[str, Any]:
    params: dict[str, Any] = {
        "patch_embed": _convolution(weights, "patch_embed.projection"),
        "patch_norm": _norm(weights, "patch_embed.norm"),
        "norm": _norm(weights, f"norm{len(depths) - 1}"),
    }
    for i, depth in enumerate(depths):
        stage: dict[str, Any] = {
            "pairs": {
                "unshifted": _stack(lambda b, i=i: _swin_block(weights, f"stages.{i}.blocks.{b}"), range(0, depth, 2)),
                "shifted": _stack(lambda b, i=i: _swin_block(weights, f"stages.{i}.blocks.{b}"), range(1, depth, 2)),
            }
        }
        extra = range(extra_norm_every - 1, depth, extra_norm_every)
        if extra:
            stage["extra_norms"] = _stack(lambda b, i=i: _norm(weights, f"stages.{i}.blocks.{b}.norm3"), extra)
        if i:
            # Published merging unfolds: the input's channel runs slowest, then the row and column in the 2 x 2 patch.
            reduction = weights[f"stages.{i}.downsample.reduction.weight"]
            kernel = reduction.reshape(len(reduction), -1, 2, 2).transpose(2, 3, 1, 0)
            norm = _norm(weights, f"stages.{i}.downsample.norm")
            stage["downsample"] = {"reduction": {"kernel": kernel}, "norm": norm}
        params[f"stage{i}"] = stage
    return params


def vit(weights: Weights, depth: int) -> dict[str, Any]:
    return {
        "patch_embed": _convolution(weights, "patch_embed.projection"),
        "class_token": weights["cls_token"][0, 0],
        "positions": weights["pos_embed"][0],
        "layers": _stack(lambda i: _transformer_layer(weights, f"layers.{i}"), range(depth)),
    }


def fusion(weights: Weights, depth: int) -> dict[str, Any]:
    """Without the table of dates, which the published module does not hold."""
    return {
        "projection": _linear(weights, "porj_linear"),
        "extra_token": weights["cls_token"][0, 0],
        "layers": _stack(lambda i: _transformer_layer(weights, f"layers.{i}"), range(depth)),
    }


def up_head(weights: Weights, factor: int) -> dict[str, Any]:
    kernel, bias = weights["decoder.0.weight"][:, :, 0, 0], weights["decoder.0.bias"]
    # Pixel shuffle reads the channels as (width, row, column); ours have the width last.
    kernel = kernel.reshape(-1, factor, factor, kernel.shape[1]).transpose(3, 1, 2, 0)
    return {"cells": {"kernel": kernel, "bias": bias.reshape(-1, factor, factor).transpose(1, 2, 0)}}


def _swin_block(weights: Weights, name: str) -> dict[str, Any]:
    attention = f"{name}.attn.w_msa"
    query, key, value = np.split(weights[f"{attention}.qkv.weight"].T, 3, axis=1)
    return {
        "attention": {
            "projections": {
                "query": {"kernel": query, "bias": weights[f"{attention}.q_bias"]},
                "key": {"kernel": key},
                "value": {"kernel": value, "bias": weights[f"{attention}.v_bias"]},
                "out": _linear(weights, f"{attention}.proj"),
            },
            "logit_scale": weights[f"{attention}.logit_scale"].ravel(),
            "bias_up": _linear(weights, f"{attention}.cpb_mlp.0"),
            "bias_down": {"kernel": weights[f"{attention}.cpb_mlp.2.weight"].T},
        },
        "norm1": _norm(weights, f"{name}.norm1"),
        "norm2": _norm(weights, f"{name}.norm2"),
        "feed_forward": _feed_forward(weights, name),
    }


def _transformer_layer(weights: Weights, name: str) -> dict[str, Any]:
    attention = f"{name}.attn.attn"
    kernels = np.split(weights[f"{attention}.in_proj_weight"].T, 3, axis=1)
    biases = np.split(weights[f"{attention}.in_proj_bias"], 3)
    projections = {
        part: {"kernel": kernel, "bias": bias}
        for part, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True)
    }
    return {
        "attention": projections | {"out": _linear(weights, f"{attention}.out_proj")},
        "norm1": _norm(weights, f"{name}.ln1"),
        "norm2": _norm(weights, f"{name}.ln2"),
        "feed_forward": _feed_forward(weights, name),
    }


def _feed_forward(weights: Weights, name: str) -> dict[str, Any]:
    return {"up": _linear(weights, f"{name}.ffn.layers.0.0"), "down": _linear(weights, f"{name}.ffn.layers.1")}


def _linear(weights: Weights, name: str) -> dict[str, np.ndarray]:
    return {"kernel": weights[f"{name}.weight"].T, "bias": weights[f"{name}.bias"]}


def _convolution(weights: Weights, name: str) -> dict[str, np.ndarray]:
    return {"kernel": weights[f"{name}.weight"].transpose(2, 3, 1, 0), "bias": weights[f"{name}.bias"]}


def _norm(weights: Weights, name: str) -> dict[str, np.ndarray]:
    return {"scale": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}


def _stack(one: Callable[[int], dict[str, Any]], indices: range) -> dict[str, Any]:
    trees = [one(i) for i in indices]
    return _zip(trees)


def _zip(trees: list[Any]) -> Any:
    if isinstance(trees[0], dict):
        return {name: _zip([tree[name] for tree in trees]) for name in trees[0]}
    return np.stack(trees)
