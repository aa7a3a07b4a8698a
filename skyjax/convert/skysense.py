"""The published parameter names and ours: renamed, transposed, split; in both directions. numpy alone.

Each part of the model is a list of rules, one a published tensor: which of our listed parameters (models/listed.py) it
holds, and how its axes move. A rule reads and writes, so that the two directions cannot drift apart, and it only moves
bits: what is read and written again is the same in every bit.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from skyjax.models.listed import from_listed, to_listed

Weights = Mapping[str, np.ndarray]

DAYS_RELEASED = 365


class Layout(NamedTuple):
    """How one published tensor becomes some of our arrays, and back."""

    read: Callable[[np.ndarray], Sequence[np.ndarray]]
    write: Callable[..., np.ndarray]


class Rule(NamedTuple):
    """One published tensor.

    Attributes:
      released: its name.
      ours: the listed names of what it holds.
      layout: how.
    """

    released: str
    ours: tuple[str, ...]
    layout: Layout


SAME = Layout(lambda x: (x,), lambda x: x)
LINEAR = Layout(lambda x: (x.T,), lambda x: x.T)
CONVOLUTION = Layout(lambda x: (x.transpose(2, 3, 1, 0),), lambda x: x.transpose(3, 2, 0, 1))
TOKEN = Layout(lambda x: (x[0, 0],), lambda x: x[None, None])
TABLE = Layout(lambda x: (x[0],), lambda x: x[None])
HEADS = Layout(lambda x: (x[:, 0, 0],), lambda x: x[:, None, None])
THREE_LINEAR = Layout(
    lambda x: np.split(x.T, 3, axis=1), lambda query, key, value: np.concatenate([query, key, value], axis=1).T
)
THREE = Layout(lambda x: np.split(x, 3), lambda query, key, value: np.concatenate([query, key, value]))
# Published merging unfolds: the input's channel runs slowest, then the row and column in the 2 x 2 patch.
MERGING = Layout(
    lambda x: (x.reshape(len(x), -1, 2, 2).transpose(2, 3, 1, 0),),
    lambda x: x.transpose(3, 2, 0, 1).reshape(x.shape[3], -1),
)


# 31 December of leap years has no released row: it starts as a copy of 31 December of the others.
DATES = Layout(lambda x: (np.concatenate([x[0], x[0, -1:]]),), lambda x: x[None, :DAYS_RELEASED])


def _cells(factor: int) -> tuple[Layout, Layout]:
    """Kernel and bias. Pixel shuffle reads the channels as (width, row, column); ours have the width last."""
    kernel = Layout(
        lambda x: (x.reshape(-1, factor, factor, x.shape[1]).transpose(3, 1, 2, 0),),
        lambda x: x.transpose(3, 1, 2, 0).reshape(-1, x.shape[0], 1, 1),
    )
    bias = Layout(lambda x: (x.reshape(-1, factor, factor).transpose(1, 2, 0),), lambda x: x.transpose(2, 0, 1).ravel())
    return kernel, bias


def swin_v2(depths: Sequence[int], extra_norm_every: int) -> list[Rule]:
    """The rules of a Swin-V2, in the order of the published module.

    Args:
      depths: blocks of each stage.
      extra_norm_every: after how many blocks of a stage an extra norm stands; 0: none.
    """
    rules = [*_convolution("patch_embed.projection", "patch_embed"), *_norm("patch_embed.norm", "patch_norm")]
    for i, depth in enumerate(depths):
        if i:
            merging = f"stages.{i}.downsample"
            rules.append(Rule(f"{merging}.reduction.weight", (f"stage{i}.downsample.reduction.kernel",), MERGING))
            rules += _norm(f"{merging}.norm", f"stage{i}.downsample.norm")
        for b in range(depth):
            rules += _swin_block(f"stages.{i}.blocks.{b}", f"stage{i}.blocks.{b}")
            if extra_norm_every and (b + 1) % extra_norm_every == 0:
                rules += _norm(f"stages.{i}.blocks.{b}.norm3", f"stage{i}.extra_norms.{b // extra_norm_every}")
    return [*rules, *_norm(f"norm{len(depths) - 1}", "norm")]


def vit(depth: int) -> list[Rule]:
    """The rules of a ViT of so many layers."""
    return [
        Rule("cls_token", ("class_token",), TOKEN),
        Rule("pos_embed", ("positions",), TABLE),
        *_convolution("patch_embed.projection", "patch_embed"),
        *_transformer(depth),
    ]


def fusion(depth: int) -> list[Rule]:
    """The rules of a fusion of so many layers, without the table of dates, which its module does not hold."""
    return [
        Rule("cls_token", ("extra_token",), TOKEN),
        *_linear("porj_linear", "projection"),
        *_transformer(depth),
    ]


def dates(rows: int = DAYS_RELEASED) -> list[Rule]:
    """The rule of the table of dates: 366 rows here, 365 as released; one of 366 is read as it is."""
    return [Rule("ctpe", ("dates",), DATES if rows == DAYS_RELEASED else TABLE)]


def up_head(factor: int) -> list[Rule]:
    """The rules of an up-head that makes `factor` x `factor` cells of a token."""
    kernel, bias = _cells(factor)
    return [
        Rule("decoder.0.weight", ("cells.kernel",), kernel),
        Rule("decoder.0.bias", ("cells.bias",), bias),
    ]


def read(rules: Sequence[Rule], weights: Weights, prefix: str = "") -> dict[str, np.ndarray]:
    """Our listed parameters of a part whose published names start with `prefix`: views of the weights, never copies.

    Raises:
      KeyError: a tensor is missing.
    """
    listed: dict[str, np.ndarray] = {}
    for rule in rules:
        parts = rule.layout.read(weights[prefix + rule.released])
        listed |= dict(zip(rule.ours, parts, strict=True))
    return listed


def write(rules: Sequence[Rule], listed: Mapping[str, np.ndarray], prefix: str = "") -> dict[str, np.ndarray]:
    """The published tensors of a part; the reverse of `read`, and views again but for what is joined.

    Raises:
      KeyError: a parameter is missing.
    """
    return {prefix + rule.released: rule.layout.write(*(listed[name] for name in rule.ours)) for rule in rules}


def to_params(rules: Sequence[Rule], weights: Weights) -> dict[str, Any]:
    """A part's published weights as the tree of parameters that its module takes."""
    return from_listed(read(rules, weights))


def from_params(rules: Sequence[Rule], params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A part's parameters, or anything of their shapes such as gradients, under the published names."""
    return write(rules, {name: np.asarray(value) for name, value in to_listed(params).items()})


def buffer(name: str, window: int) -> np.ndarray:
    """A tensor of window attention that is no weight: the published modules build it, and their files may hold it.

    Args:
      name: it ends in "relative_coords_table" (1, 2w-1, 2w-1, 2) float32 or "relative_position_index" (w^2, w^2) int64.
      window: of the stage.
    """
    if name.endswith("relative_coords_table"):
        steps = np.arange(1 - window, window, dtype=np.float32) / np.float32(window - 1) * np.float32(8)
        logs = np.sign(steps) * np.log2(np.abs(steps) + 1) / np.float32(3)
        return np.stack(np.meshgrid(logs, logs, indexing="ij"), -1)[None]
    places = np.stack(np.meshgrid(np.arange(window), np.arange(window), indexing="ij"), -1).reshape(-1, 2)
    offset = places[:, None] - places[None] + window - 1
    return offset[..., 0] * (2 * window - 1) + offset[..., 1]


def _swin_block(theirs: str, ours: str) -> list[Rule]:
    attention, own = f"{theirs}.attn.w_msa", f"{ours}.attention"
    kernels = tuple(f"{own}.{part}.kernel" for part in ("query", "key", "value"))
    return [
        Rule(f"{attention}.logit_scale", (f"{own}.logit_scale",), HEADS),
        Rule(f"{attention}.q_bias", (f"{own}.query.bias",), SAME),
        Rule(f"{attention}.v_bias", (f"{own}.value.bias",), SAME),
        *_linear(f"{attention}.cpb_mlp.0", f"{own}.bias_up"),
        Rule(f"{attention}.cpb_mlp.2.weight", (f"{own}.bias_down.kernel",), LINEAR),
        Rule(f"{attention}.qkv.weight", kernels, THREE_LINEAR),
        *_linear(f"{attention}.proj", f"{own}.out"),
        *_norm(f"{theirs}.norm1", f"{ours}.norm1"),
        *_feed_forward(theirs, ours),
        *_norm(f"{theirs}.norm2", f"{ours}.norm2"),
    ]


def _transformer(depth: int) -> list[Rule]:
    rules: list[Rule] = []
    for i in range(depth):
        name, attention = f"layers.{i}", f"layers.{i}.attn.attn"
        parts = [f"{name}.attention.{part}" for part in ("query", "key", "value")]
        rules += [
            *_norm(f"{name}.ln1", f"{name}.norm1"),
            Rule(f"{attention}.in_proj_weight", tuple(f"{part}.kernel" for part in parts), THREE_LINEAR),
            Rule(f"{attention}.in_proj_bias", tuple(f"{part}.bias" for part in parts), THREE),
            *_linear(f"{attention}.out_proj", f"{name}.attention.out"),
            *_norm(f"{name}.ln2", f"{name}.norm2"),
            *_feed_forward(name, name),
        ]
    return rules


def _feed_forward(theirs: str, ours: str) -> list[Rule]:
    return [
        *_linear(f"{theirs}.ffn.layers.0.0", f"{ours}.feed_forward.up"),
        *_linear(f"{theirs}.ffn.layers.1", f"{ours}.feed_forward.down"),
    ]


def _linear(theirs: str, ours: str) -> list[Rule]:
    return [Rule(f"{theirs}.weight", (f"{ours}.kernel",), LINEAR), Rule(f"{theirs}.bias", (f"{ours}.bias",), SAME)]


def _convolution(theirs: str, ours: str) -> list[Rule]:
    return [Rule(f"{theirs}.weight", (f"{ours}.kernel",), CONVOLUTION), Rule(f"{theirs}.bias", (f"{ours}.bias",), SAME)]


def _norm(theirs: str, ours: str) -> list[Rule]:
    return [Rule(f"{theirs}.weight", (f"{ours}.scale",), SAME), Rule(f"{theirs}.bias", (f"{ours}.bias",), SAME)]
