"""Whether skyjax's modules compute what the published ones do, on a folder of cases.

python tests/parity.py CASES_FOLDER [--out=FOLDER] [--dtype=float32|bfloat16]

A case is a folder with `weights.safetensors` (or several weights*.safetensors) under the published names, `inputs.npz`
and `outputs.npz`, channels first, and mostly `case.json`, whose "config" holds the constructor's values; what it lacks
is read from the weights. INPUT of inputs.npz gives INPUT.0, INPUT.1, ... of outputs.npz. Which part a case is follows
from the names of its weights, never from the folder's. Prints a line for each output with the error, which is
max |difference| / max |reference|, and writes our outputs to --out as CASE.npz, named and laid out as in outputs.npz.

Exit 0 when each error is within 1e-5 (float32) or 2e-2 (bfloat16), 1 when one is not, 2 when there are no cases to run.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file

from skyjax.convert import skysense
from skyjax.errors import UserError
from skyjax.models.fusion import DAYS_A_YEAR, Fusion
from skyjax.models.layers import Compute, LayerNorm
from skyjax.models.swin_v2 import EPSILON, SwinV2
from skyjax.models.up_head import UpHead
from skyjax.models.vit import ViT

TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}
WINDOW = 8  # of the published Swin, where neither the settings nor a table of offsets tell
# A weight that only one part has.
SIGNS = {
    "swin_v2": "stages.0.blocks.0.attn.w_msa.qkv.weight",
    "vit": "pos_embed",
    "fusion": "porj_linear.weight",
    "up_head": "decoder.0.weight",
}
# In files of weights, but nothing that a module computes with: rebuilt, of the training, or of the date encoding.
BESIDES = ("relative_coords_table", "relative_position_index", "mask_token", "ctpe")
BLOCK = re.compile(r"stages\.(\d+)\.blocks\.(\d+)\.norm1\.weight")

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """One published module and what it gave.

    Attributes:
      name: of its folder.
      part: of `SIGNS`.
      config: of case.json; may lack keys.
      weights: by published names, without a prefix.
      inputs, outputs: channels first; those of the fusion are (places, dates, width) and (places, width).
    """

    name: str
    part: str
    config: Mapping[str, Any]
    weights: Arrays
    inputs: Arrays
    outputs: Arrays


@dataclasses.dataclass(frozen=True)
class Part:
    """Our module in a case's place.

    Attributes:
      params: its parameters.
      call: (params, an input as the case has it) -> the outputs of that input, as the case has them.
      released: parameters, or gradients of their shapes, under the published names.
    """

    params: dict[str, Any]
    call: Callable[[Any, jax.Array], list[jax.Array]]
    released: Callable[[Any], Arrays]


def load_cases(folder: pathlib.Path) -> Iterator[Case]:
    """The cases of a folder, one after the other, by name.

    Raises:
      UserError: there is no case, or one can't be read.
    """
    folders = sorted({path.parent for path in folder.glob("*/weights*.safetensors")})
    if not folders:
        raise UserError(f"{folder}: no case in it; one is a folder with weights.safetensors, inputs.npz, outputs.npz")
    return map(load_case, folders)


def load_case(folder: pathlib.Path) -> Case:
    """The case in a folder.

    Raises:
      UserError: it can't be read; the file and the reason are in it.
    """
    weights: Arrays = {}
    for path in sorted(folder.glob("weights*.safetensors")):
        weights |= _read(path, load_file)
    part, prefix = next(
        ((part, name.removesuffix(sign)) for name in weights for part, sign in SIGNS.items() if name.endswith(sign)),
        (None, ""),
    )
    if part is None:
        raise UserError(f"{folder}: the weights are of no known part; each has one of {', '.join(SIGNS.values())}")
    weights = {name.removeprefix(prefix): np.asarray(value, np.float32) for name, value in weights.items()}
    config = {}
    if (folder / "case.json").exists():
        config = _read(folder / "case.json", lambda path: json.loads(path.read_text())["config"])
    inputs, outputs = (_read(folder / name, lambda path: dict(np.load(path))) for name in ("inputs.npz", "outputs.npz"))
    if not outputs:
        raise UserError(f"{folder / 'outputs.npz'}: no array in it, so nothing to compare with")
    for name in outputs:
        source, _, number = name.rpartition(".")
        if source not in inputs or not number.isdigit():
            raise UserError(f'{folder / "outputs.npz"}: "{name}" is not INPUT.NUMBER; inputs: {", ".join(inputs)}')
    return Case(folder.name, part, config, weights, inputs, outputs)


def run(case: Case, dtype: str = "float32", *, optimise: bool = True) -> Iterator[tuple[str, np.ndarray]]:
    """Our outputs of a case under the names and in the layout of its own, as they come.

    Args:
      case: what to run.
      dtype: of activations; "float64" needs `jax.enable_x64`.
      optimise: compile for speed; without, compiling is quicker.

    Raises:
      UserError: the weights don't make a module.
    """
    part = build(case, dtype)
    call = jax.jit(part.call, compiler_options={} if optimise else {"xla_backend_optimization_level": 0})
    exactly = jax.default_matmul_precision("highest")(call)  # accelerators cut the factors of float32 products short
    for source, x in case.inputs.items():
        names = output_names(case, source)
        for name, got in zip(names, exactly(part.params, jnp.asarray(x)) if names else (), strict=True):
            yield name, np.asarray(got, None if dtype == "float64" else np.float32)


def output_names(case: Case, source: str) -> list[str]:
    """The names of the outputs of one input, in their order."""
    names = [name for name in case.outputs if name.rpartition(".")[0] == source]
    return sorted(names, key=lambda name: int(name.rpartition(".")[2]))


def build(case: Case, dtype: str = "float32") -> Part:
    """Our module with the case's weights.

    Raises:
      UserError: weights are missing, left over, or not of the module's shapes; or the settings make no module.
    """
    make = {"swin_v2": _swin_v2, "vit": _vit, "fusion": _fusion, "up_head": _up_head}[case.part]
    try:
        return make(case, Compute(jnp.dtype(dtype)))
    except (KeyError, ValueError, TypeError) as problem:
        raise UserError(f"{case.name}: no {case.part} with these weights and settings ({problem})") from problem


def error(got: np.ndarray, want: np.ndarray) -> float:
    """max |difference| / max |reference|; infinite where shapes differ or a number is not finite."""
    if got.shape != want.shape or not np.isfinite(got).all():
        return math.inf
    want = want.astype(np.float64)
    return float(np.abs(got - want).max(initial=0.0) / max(np.abs(want).max(initial=0.0), np.finfo(np.float32).tiny))


class Swin(nnx.Module):
    """Our Swin-V2 with a norm behind each stage that the published one norms."""

    def __init__(self, swin: SwinV2, width: int, normed: Sequence[int], rngs: nnx.Rngs):
        self.swin = swin
        self.last = len(swin.depths) - 1
        self.norms = nnx.Dict({f"norm{i}": LayerNorm(width << i, EPSILON, rngs) for i in normed if i != self.last})
        self.normed = tuple(normed)

    def __call__(self, images: jax.Array, wanted: Sequence[int]) -> list[jax.Array]:
        """The outputs of the stages in `wanted`."""
        stages = self.swin.stages(images)
        return [self._norm(i)(stages[i]) if i in self.normed else stages[i] for i in wanted]

    def _norm(self, i: int) -> LayerNorm:
        return self.swin.norm if i == self.last else self.norms[f"norm{i}"]


def _swin_v2(case: Case, compute: Compute) -> Part:
    weights = dict(case.weights)
    blocks = [tuple(map(int, found.groups())) for found in map(BLOCK.fullmatch, weights) if found]
    stages = range(1 + max(stage for stage, _ in blocks))
    depths = [sum(stage == i for stage, _ in blocks) for i in stages]
    first = "stages.{}.blocks.0.attn.w_msa.{}"
    heads = [weights[first.format(i, "logit_scale")].size for i in stages]
    extra = [b + 1 for i, b in blocks if f"stages.{i}.blocks.{b}.norm3.weight" in weights]
    every = min(extra, default=0)
    table = weights.get(first.format(0, "relative_coords_table"))
    window = _setting(case, "window", "window_size") or (WINDOW if table is None else (table.shape[1] + 1) // 2)
    width, channels, patch, _ = weights["patch_embed.projection.weight"].shape
    normed = [i for i in stages if f"norm{i}.weight" in weights]
    others = [f"norm{i}" for i in normed if i != stages[-1]]
    norms = {name: {"scale": weights.pop(f"{name}.weight"), "bias": weights.pop(f"{name}.bias")} for name in others}
    if stages[-1] not in normed:  # our module has a norm there in any case
        weights |= {f"norm{stages[-1]}.{kind}": np.ones(width << stages[-1], np.float32) for kind in ("weight", "bias")}
    rules = skysense.swin_v2(depths, every)
    call, params = _module(
        case,
        {"swin": _params(case, rules, weights)} | ({"norms": norms} if norms else {}),
        lambda rngs: Swin(
            SwinV2(
                channels=channels, patch_size=patch, width=width, depths=depths, heads=heads, window=window,
                extra_norm_every=every, mask_padding=False, compute=compute, rngs=rngs,
            ),
            width, normed, rngs,
        ),
    )  # fmt: skip

    def released(params: Any) -> Arrays:
        tensors = skysense.from_params(rules, params["swin"])
        for name, norm in params.get("norms", {}).items():
            tensors |= {f"{name}.weight": np.asarray(norm["scale"]), f"{name}.bias": np.asarray(norm["bias"])}
        return {name: tensors[name] for name in case.weights if name in tensors}

    wanted = _stages(case, normed or list(stages))
    return Part(params, lambda params, x: list(map(_first, call(params)(_last(x), wanted))), released)


def _stages(case: Case, given: list[int]) -> list[int]:
    """The stages that the outputs stand for: numbered by stage or, where fewer are given, one after the other."""
    source = _first_source(case)
    numbers = [int(name.rpartition(".")[2]) for name in output_names(case, source)]
    return numbers if numbers and max(numbers) >= len(given) else [given[number] for number in numbers]


def _vit(case: Case, compute: Compute) -> Part:
    width, channels, patch, _ = case.weights["patch_embed.projection.weight"].shape
    side = math.isqrt(case.weights["pos_embed"].shape[1] - 1)
    depth, heads = _layers(case), _heads(case, width)
    rules = skysense.vit(depth)
    call, params = _module(
        case, _params(case, rules, case.weights), lambda rngs: ViT(
            channels=channels, patch_size=patch, image_size=side * patch, width=width, depth=depth, heads=heads,
            compute=compute, rngs=rngs,
        ),
    )  # fmt: skip
    return Part(
        params,
        lambda params, x: [_first(call(params)(_last(x)))],
        lambda params: skysense.from_params(rules, params),
    )


def _fusion(case: Case, compute: Compute) -> Part:
    width, spatial_width = case.weights["porj_linear.weight"].shape
    depth, heads = _layers(case), _heads(case, width)
    rules = skysense.fusion(depth)
    # Without a date encoding, which the published module does not add.
    dates = {"dates": np.zeros((DAYS_A_YEAR, spatial_width), np.float32)}
    call, params = _module(
        case,
        _params(case, rules, case.weights) | dates,
        lambda rngs: Fusion(
            spatial_width=spatial_width, width=width, depth=depth, heads=heads, compute=compute, rngs=rngs
        ),
    )

    def tokens(params: Any, x: jax.Array) -> list[jax.Array]:
        features = x.transpose(1, 0, 2)[None, :, None]  # one site, one row of places
        places, count = x.shape[:2]
        fused = call(params)(features, jnp.zeros((1, count), jnp.int32), jnp.ones((1, count, 1, places), bool))
        return [fused[0, 0]]

    def released(params: Any) -> Arrays:
        return skysense.from_params(rules, {name: value for name, value in params.items() if name != "dates"})

    return Part(params, tokens, released)


def _up_head(case: Case, compute: Compute) -> Part:
    channels, width = case.weights["decoder.0.weight"].shape[:2]
    source = _first_source(case)
    factor = case.outputs[output_names(case, source)[0]].shape[2] // case.inputs[source].shape[2]
    rules = skysense.up_head(factor)
    call, params = _module(
        case,
        _params(case, rules, case.weights),
        lambda rngs: UpHead(width, channels // factor**2, factor, compute.dtype, rngs),
    )
    return Part(
        params,
        lambda params, x: [_first(call(params)(_last(x)))],
        lambda params: skysense.from_params(rules, params),
    )


def _params(case: Case, rules: list[skysense.Rule], weights: Arrays) -> dict[str, Any]:
    """Our parameters; each weight is used, and each that is needed is there."""
    names = {rule.released for rule in rules}
    missing = sorted(names - set(weights))
    left = sorted(name for name in set(weights) - names if not name.endswith(BESIDES))
    for what, found in (("lacks", missing), ("has besides", left)):
        if found:
            raise UserError(
                f"{case.name}: the weights of this {case.part} {what} {', '.join(found[:5])} ({len(found)})"
            )
    return skysense.to_params(rules, weights)


def _module(
    case: Case, params: dict[str, Any], make: Callable[[nnx.Rngs], nnx.Module]
) -> tuple[Callable[[Any], Any], dict[str, Any]]:
    """The function that puts parameters into a module, and the case's parameters."""
    graph, abstract = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    if _shapes(nnx.to_pure_dict(abstract)) != _shapes(params):
        raise UserError(f"{case.name}: the weights' shapes are not those of a {case.part} with these settings")

    def fill(params: Any) -> Any:
        state = jax.tree.map(lambda leaf: leaf, abstract)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)

    return fill, params


def _shapes(tree: Any) -> Any:
    return {name: _shapes(value) for name, value in tree.items()} if isinstance(tree, dict) else tuple(tree.shape)


def _layers(case: Case) -> int:
    return sum(re.fullmatch(r"layers\.\d+\.ln1\.weight", name) is not None for name in case.weights)


def _heads(case: Case, width: int) -> int:
    return _setting(case, "heads", "num_heads") or (width // 64 if width >= 256 else 4)


def _first_source(case: Case) -> str:
    return next(iter(case.outputs)).rpartition(".")[0]


def _setting(case: Case, *names: str) -> Any:
    return next((case.config[name] for name in names if name in case.config), None)


def _last(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, 1, -1)


def _first(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, -1, 1)


def _read(path: pathlib.Path, read: Callable[[pathlib.Path], Any]) -> Any:
    try:
        return read(path)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, zipfile.BadZipFile) as problem:
        raise UserError(f"{path}: can't be read ({problem})") from problem


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=pathlib.Path, metavar="CASES_FOLDER")
    parser.add_argument("--out", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--dtype", choices=TOLERANCES, default="float32")
    options = parser.parse_args(arguments)
    try:
        return compare(options.cases, options.out, options.dtype)
    except UserError as mistake:
        print(mistake, file=sys.stderr)
        return 2


def compare(folder: pathlib.Path, out: pathlib.Path | None, dtype: str) -> int:
    """Runs and prints all cases; the exit code."""
    tolerance, errors = TOLERANCES[dtype], []
    for case in load_cases(folder):
        outputs = {}
        for name, got in run(case, dtype):
            outputs[name] = got
            errors.append(error(got, case.outputs[name]))
            verdict = "ok" if errors[-1] <= tolerance else f"above {tolerance:g}"
            print(f"{case.name:32} {name:16} {errors[-1]:.2e}  {verdict}", flush=True)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            np.savez(out / f"{case.name}.npz", **outputs)
    above = sum(found > tolerance for found in errors)
    print(f"{len(errors)} outputs in {dtype}, largest error {max(errors):.2e}, {above} above {tolerance:g}")
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main())
