"""Makes cases of the published modules: random weights, inputs, outputs and, where asked for, gradients.

python tests/models/make_cases.py stored tests/models/cases    # what is ours of the stored cases
python tests/models/make_cases.py wide FOLDER                  # many more, for tests/parity.py
python tests/models/make_cases.py measure FOLDER               # runs a folder's cases again and notes their rounding

Runs in an environment of its own, without skyjax: Python 3.11 with

pip install torch==2.13.0 "setuptools<81" safetensors addict pyyaml yapf==0.40.1 packaging pillow rich einops
    prettytable matplotlib termcolor opencv-python-headless
pip install --no-deps mmcv-lite==2.1.0 mmengine==0.10.7 mmpretrain==1.2.0 mmsegmentation==1.2.2

The modules are mmpretrain's `SwinTransformerV2` and mmsegmentation's `VisionTransformer` and `TransformerEncoderLayer`,
all under Apache-2.0. The up-head is a convolution and a pixel shuffle of torch. A case is computed in float32 as
published; gradients in float64, from the same float32 values.
"""

import argparse
import dataclasses
import importlib.abc
import importlib.machinery
import json
import logging
import math
import pathlib
import sys
import types
import zlib

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

# Packages that the modules import for other models, and that they never use here.
UNUSED = ("torchvision", "pycocotools", "ftfy", "regex", "scipy", "modelindex", "tqdm", "mmcv.ops")


class Unused(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports of `UNUSED` give modules in which every name is an empty class."""

    def find_spec(self, name, path=None, target=None):
        if any(name == package or name.startswith(f"{package}.") for package in UNUSED):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = unused_class
        return module

    def exec_module(self, module):
        pass


def unused_class(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {"__init__": lambda self, *args, **settings: None})


sys.meta_path.insert(0, Unused())

from mmpretrain.models.backbones import SwinTransformerV2  # noqa: E402
from mmseg.models.backbones.vit import TransformerEncoderLayer, VisionTransformer  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Case:
    """One module and its inputs.

    Attributes:
      part: which module.
      config: its settings, by the names of the reference cases.
      inputs: a shape each.
      start: "random" weights, all of them unlike their start; "sharp" with many heads of Swin over the limit of their
        scale, "one over" with one surely; or as the "default" of the module sets them.
      gradients: whether to store them too.
    """

    part: str
    config: dict
    inputs: dict
    start: str = "random"
    gradients: bool = False


class Fusion(nn.Module):
    """Tokens of one place and many dates -> one token."""

    def __init__(self, input_dims, embed_dims, layers, heads):
        super().__init__()
        self.porj_linear = nn.Linear(input_dims, embed_dims)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dims))
        self.layers = nn.ModuleList(TransformerEncoderLayer(embed_dims, heads, 4 * embed_dims) for _ in range(layers))

    def forward(self, x):
        x = self.porj_linear(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for layer in self.layers:
            x = layer(x)
        return (x[:, 0],)


class UpHead(nn.Module):
    """Coarse tokens -> blocks of cells."""

    def __init__(self, inp, out, scale):
        super().__init__()
        self.decoder = nn.Sequential(nn.Conv2d(inp, out * scale**2, 1), nn.PixelShuffle(scale))

    def forward(self, x):
        return (self.decoder(x),)


def swin_v2(embed_dims, depths, num_heads, window, img, chans, extra, patch=4, out_indices=None):
    arch = {"embed_dims": embed_dims, "depths": depths, "num_heads": num_heads, "extra_norm_every_n_blocks": extra}
    return SwinTransformerV2(
        arch=arch, img_size=img, patch_size=patch, window_size=window, in_channels=chans, drop_path_rate=0.0,
        out_indices=tuple(range(len(depths)) if out_indices is None else out_indices),
        pretrained_window_sizes=[0] * len(depths),
    )  # fmt: skip


def vit(chans, embed_dims, layers, heads, img, patch=4):
    return VisionTransformer(
        img_size=img, patch_size=patch, patch_pad="corner", patch_bias=True, in_channels=chans, embed_dims=embed_dims,
        num_layers=layers, num_heads=heads, mlp_ratio=4, norm_cfg={"type": "LN", "eps": 1e-6},
    )  # fmt: skip


MODULES = {"swin_v2": swin_v2, "vit": vit, "fusion": Fusion, "up_head": UpHead}
# A setting that tells the part; the first that a config has.
PART_BY_KEY = {"window": "swin_v2", "input_dims": "fusion", "img": "vit", "scale": "up_head"}
BUFFERS = ("relative_coords_table", "relative_position_index")


def fill(module, start, rng):
    """Sets the weights; nothing of "random" is 0 or 1, so that nothing that is left out goes unseen."""
    if start == "default":
        if isinstance(module, VisionTransformer):  # the others are born with theirs
            module.init_weights()
        return
    for name, weight in module.named_parameters():
        noise = torch.from_numpy(rng.standard_normal(weight.shape).astype(np.float32))
        if name.endswith("logit_scale"):  # the logarithm of a factor that ends at 100
            value = 2 + 2.5 * noise.abs() if start == "sharp" else math.log(10) + noise
        elif weight.ndim > 1 and not name.endswith(("cls_token", "pos_embed")):
            value = noise / math.sqrt(weight[0].numel())
        elif name.endswith("weight"):
            value = 1 + 0.2 * noise
        else:
            value = 0.2 * noise
        weight.data.copy_(value)
    if start == "one over":
        module.stages[1].blocks[0].attn.w_msa.logit_scale.data[-1] = 5


def make(name, case, folder):
    """Writes one case."""
    seed = zlib.crc32(name.encode())
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    module = MODULES[case.part](**case.config)
    module.eval()
    fill(module, case.start, rng)
    inputs = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in case.inputs.items()}
    outputs = compute(module, inputs, torch.float32)
    factors = {key: rng.standard_normal(x.shape).astype(np.float32) for key, x in outputs.items()}
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.detach().contiguous() for key, value in module.named_parameters()}
    save_file(weights, folder / "weights.safetensors")
    np.savez_compressed(folder / "inputs.npz", **inputs)
    np.savez_compressed(folder / "outputs.npz", **outputs)
    description = {
        "config": case.config,
        "parameters": sum(weight.numel() for weight in module.parameters()),
        "inputs": {key: list(x.shape) for key, x in inputs.items()},
        "outputs": {key: list(x.shape) for key, x in outputs.items()},
    } | rounding(module, inputs, outputs)
    (folder / "case.json").write_text(json.dumps(description, indent=1) + "\n")
    if case.gradients:
        np.savez_compressed(folder / "exact.npz", **exact(module, inputs, factors))


def compute(module, inputs, dtype):
    """INPUT.NUMBER -> output, of all inputs, computed in `dtype`."""
    module.to(dtype)
    with torch.no_grad():
        return {
            f"{key}.{i}": output.to(dtype).numpy()
            for key, x in inputs.items()
            for i, output in enumerate(module(torch.tensor(x, dtype=dtype)))
        }


def rounding(module, inputs, outputs):
    """What rounding alone does to the published module: max |difference| / max |reference|, an output.

    "rounding": of `outputs`, which are float32, from a float64 run. "bfloat16": of a run under autocast from `outputs`.
    """
    with torch.autocast("cpu", torch.bfloat16):
        short = compute(module, inputs, torch.float32)
    wide = compute(module, inputs, torch.float64)
    return {
        "rounding": {key: distance(outputs[key], x) for key, x in wide.items()},
        "bfloat16": {key: distance(x, outputs[key]) for key, x in short.items()},
    }


def distance(got, want):
    return float(f"{np.abs(got - want).max() / np.abs(want).max():.1e}")


def exact(module, inputs, factors):
    """Outputs, and the gradients of the sum of outputs times `factors`, computed in float64 and kept as float32.

    Names: `factors.OUTPUT`, `outputs.OUTPUT`, and of the gradients `inputs.INPUT` and `weights.NAME`.
    """
    module.double()
    leaves = {key: torch.tensor(x, dtype=torch.float64, requires_grad=True) for key, x in inputs.items()}
    outputs = {f"{key}.{i}": output for key, x in leaves.items() for i, output in enumerate(module(x))}
    sum((torch.tensor(factors[key]) * output).sum() for key, output in outputs.items()).backward()
    found = {f"outputs.{key}": output.detach() for key, output in outputs.items()}
    found |= {f"inputs.{key}": x.grad for key, x in leaves.items()}
    found |= {f"weights.{key}": weight.grad for key, weight in module.named_parameters()}
    return {f"factors.{key}": x for key, x in factors.items()} | {
        key: x.numpy().astype(np.float32) for key, x in found.items()
    }


def measure(folder):
    """Runs a case that is there again and notes its rounding."""
    description = json.loads((folder / "case.json").read_text())
    config = description["config"]
    part = next(part for key, part in PART_BY_KEY.items() if key in config)
    module = MODULES[part](**config)
    module.eval()
    weights = {}
    for path in folder.glob("weights*.safetensors"):
        weights |= load_file(path)
    left = module.load_state_dict(weights, strict=False)
    assert not left.unexpected_keys, left
    assert not [key for key in left.missing_keys if not key.endswith(BUFFERS)], left
    inputs, outputs = (dict(np.load(folder / name)) for name in ("inputs.npz", "outputs.npz"))
    again = compute(module, inputs, torch.float32)
    print(folder.name, "computed again:", max(np.abs(again[key] - x).max() for key, x in outputs.items()), "off")
    description |= rounding(module, inputs, outputs)
    (folder / "case.json").write_text(json.dumps(description, indent=1) + "\n")


def swin(width, depths, heads, window, extra, chans=3, patch=4, **inputs):
    start, gradients = inputs.pop("start", "random"), inputs.pop("gradients", False)
    config = {
        "embed_dims": width, "depths": depths, "num_heads": heads, "window": window, "img": 128, "chans": chans,
        "extra": extra,
    }  # fmt: skip
    config |= {"patch": patch} if patch != 4 else {}
    shapes = {name: (shape[0], chans, *shape[1:]) for name, shape in inputs.items()}
    return Case("swin_v2", config, shapes, start, gradients)


def plain(chans, width, layers, heads, img, patch=4, **inputs):
    start, gradients = inputs.pop("start", "random"), inputs.pop("gradients", False)
    config = {"chans": chans, "embed_dims": width, "layers": layers, "heads": heads, "img": img}
    config |= {"patch": patch} if patch != 4 else {}
    shapes = {name: (shape[0], chans, *shape[1:]) for name, shape in inputs.items()}
    return Case("vit", config, shapes, start, gradients)


def fused(inputs, width, layers, heads, gradients=False, **shapes):
    config = {"input_dims": inputs, "embed_dims": width, "layers": layers, "heads": heads}
    return Case("fusion", config, {name: (*shape, inputs) for name, shape in shapes.items()}, gradients=gradients)


def up(inputs, outputs, scale, gradients=False, **shapes):
    config = {"inp": inputs, "out": outputs, "scale": scale}
    shapes = {name: (shape[0], inputs, *shape[1:]) for name, shape in shapes.items()}
    return Case("up_head", config, shapes, gradients=gradients)


STORED = {
    # Three stages with a shifted block each, extra norms, windows that padding fills, a grid that is not square.
    "gradients_swin_v2": swin(
        8, (2, 3, 2), (1, 2, 2), 4, 2, chans=4, oblong=(1, 72, 88), start="one over", gradients=True
    ),
    "gradients_multispectral_vit": plain(10, 16, 2, 2, 16, native=(2, 16, 16), wide=(1, 12, 20), gradients=True),
    "gradients_sar_vit": plain(2, 16, 2, 2, 16, native=(2, 16, 16), gradients=True),
    "gradients_up_head": up(16, 12, 4, native=(2, 3, 4), gradients=True),
    "gradients_fusion": fused(24, 16, 2, 2, native=(5, 7), gradients=True),
}

WIDE = {
    "swin_window4_odd_depths": swin(16, (1, 2, 3, 1), (2, 2, 4, 4), 4, 2, chans=4, oblong=(2, 128, 192)),
    "swin_window4_sharp": swin(16, (2, 2, 6, 2), (1, 2, 4, 8), 4, 3, square=(1, 128, 128), start="sharp"),
    "swin_window4_default": swin(16, (2, 2, 6, 2), (1, 2, 4, 8), 4, 3, square=(1, 128, 160), start="default"),
    "swin_window7_padded": swin(24, (2, 1, 5), (3, 3, 6), 7, 3, chans=5, oblong=(1, 128, 160), padded=(2, 132, 124)),
    "swin_window7_default": swin(24, (2, 2, 4), (3, 6, 12), 7, 2, oblong=(1, 112, 200), start="default"),
    "swin_window8_six": swin(24, (2, 2, 6, 2), (3, 6, 12, 24), 8, 6, square=(1, 256, 256), oblong=(1, 288, 256)),
    "swin_window8_default": swin(24, (2, 2, 6, 2), (3, 6, 12, 24), 8, 6, chans=4, wide=(1, 256, 288), start="default"),
    "swin_window8_no_norm": swin(16, (3, 4), (1, 2), 8, 0, padded=(2, 100, 132), least=(1, 61, 190)),
    "swin_window8_sharp": swin(16, (2, 6), (2, 4), 8, 6, padded=(1, 100, 132), start="sharp"),
    "swin_every_norm": swin(12, (2, 3), (3, 6), 4, 1, patch=2, odd=(2, 37, 51)),
    "swin_one_stage": swin(20, (7,), (5,), 7, 3, chans=12, odd=(1, 75, 113)),
    "swin_wide_heads": swin(88, (2, 2), (2, 4), 8, 0, square=(1, 64, 96)),
    # Heads of two features at scales of 100: places across the seam of a shifted window are often the nearest.
    "swin_narrow_heads": swin(16, (2, 2), (8, 16), 4, 0, oblong=(1, 96, 128), start="sharp"),
    "swin_deep": swin(16, (1, 13), (2, 4), 4, 6, chans=2, oblong=(1, 64, 44)),
    "swin_window16": swin(16, (2, 2), (2, 4), 16, 2, oblong=(1, 128, 140)),
    "swin_window2": swin(16, (2, 2), (2, 4), 2, 2, odd=(1, 21, 31)),
    "vit_patch8": plain(12, 64, 3, 8, 96, 8, native=(1, 96, 96), oblong=(2, 64, 136)),
    "vit_patch16": plain(3, 48, 2, 6, 224, 16, native=(1, 224, 224), oblong=(1, 160, 240), padded=(1, 217, 100)),
    "vit_small_image": plain(10, 32, 2, 4, 32, native=(2, 32, 32), up=(1, 64, 80), thin=(1, 4, 60), odd=(3, 31, 50)),
    "vit_one_layer": plain(2, 16, 1, 1, 16, 2, native=(2, 16, 16), up=(1, 40, 22)),
    "vit_default": plain(10, 64, 4, 4, 64, native=(1, 64, 64), resized=(1, 16, 16), start="default"),
    "vit_deep": plain(2, 32, 12, 2, 64, native=(1, 64, 64), oblong=(1, 48, 96)),
    # As many tokens as positions, in another grid: published ViTs then add the positions as they stand, in one row.
    "vit_same_count": plain(4, 32, 1, 4, 32, oblong=(1, 16, 64)),
    "fusion_one_date": fused(96, 48, 3, 6, native=(4, 1)),
    "fusion_many_dates": fused(256, 64, 4, 4, native=(9, 40), few=(2, 3)),
    "fusion_one_layer": fused(24, 16, 1, 1, native=(5, 7)),
    "up_head_2": up(24, 40, 2, native=(2, 3, 5)),
    "up_head_8": up(16, 12, 8, native=(1, 6, 2)),
    "up_head_1": up(16, 12, 1, native=(1, 4, 4)),
}  # fmt: skip

SETS = {"stored": STORED, "wide": WIDE}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=(*SETS, "measure"))
    parser.add_argument("folder", type=pathlib.Path)
    arguments = parser.parse_args()
    logging.disable()  # each weight's start is told otherwise
    torch.set_num_threads(1)  # the same sums in the same order on every machine of a kind
    if arguments.set == "measure":
        for path in sorted(arguments.folder.glob("*/case.json")):
            measure(path.parent)
        return
    for name, case in SETS[arguments.set].items():
        make(name, case, arguments.folder)
        print(name, flush=True)


if __name__ == "__main__":
    main()
