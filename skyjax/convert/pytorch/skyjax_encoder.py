# Part of skyjax. SPDX-License-Identifier: Apache-2.0
"""A skyjax export in PyTorch. This one file needs PyTorch and safetensors; texts need sentencepiece besides.

    from skyjax_encoder import SkyjaxEncoder

    model = SkyjaxEncoder.from_folder("FOLDER")                      # holds config.json and model.safetensors
    out = model({"multispectral": {"values": values, "days": days}})
    out["fused"]                                                     # (b, H, W, d): one feature a place
    out["pooled"]                                                    # (b, d): one feature a site

and of a model that was trained with texts

    words = SkyjaxWords.from_folder("FOLDER")                        # words.safetensors and tokenizer.model besides
    words.images(out) @ words.encode(["a forest", "a town"]).T       # (b, 2): how alike

In: the images of `b` sites, one sequence a modality ("optical", "multispectral", "sar"; `model.modalities` says which).
Out: features of every date and modality, and of all of them together. Letters in shapes: `b` sites, `t` dates, `h w`
pixels, `c` bands, `H W` cells of the common grid, `s` and `d` widths, `n` images, `i j` cells of one image.

Anything may be missing: a modality, dates, bands, pixels. What is missing is masked and never read.
"""

import collections
import json
import math
import pathlib
import unicodedata

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

MODALITIES = ("optical", "multispectral", "sar")
GRID_FROM = ("multispectral", "optical", "sar")  # whose cells are the common grid: the first that is given
HALF = 0.5 - 1e-4  # less the rounding of interpolation weights, so that a cell which is exactly half covered counts


class SkyjaxEncoder(nn.Module):
    """A spatial encoder a modality, up-heads to one width and grid, and the fusion of all dates and modalities.

    Attributes:
      modalities: what the model takes.
      statistics: modality -> "sensors", "bands" (the order of `c`), "mean" and "std" (a row a sensor, a column a band).
    """

    def __init__(self, config):
        """`config`: what config.json holds; parameters are fresh."""
        super().__init__()
        model = config["model"]
        parts = {name: model["modalities"][name] for name in MODALITIES if name in model["modalities"]}
        self.modalities = tuple(parts)
        # Lists, not buffers: `model.to(torch.bfloat16)` must not round what images are normalised by.
        self.statistics = config["statistics"]
        self.token_size = {}  # pixels
        self.up_factor = {}  # cells a token
        self.up_heads = nn.ModuleDict()
        for name, part in parts.items():
            swin = part["kind"] == "swin_v2"
            self.add_module(name, (SwinV2 if swin else ViT)(part, model["drop_path"]))
            self.token_size[name] = part["patch_size"] * (2 ** (len(part["depths"]) - 1) if swin else 1)
            factor = None if swin else part["up_factor"]
            self.up_factor[name] = factor or 1
            if factor is not None:
                self.up_heads[name] = UpHead(part["width"], model["spatial_width"], factor)
        width = model["spatial_width"]
        self.fusion = None
        if model["fusion"]:
            # What else a config has there says how training starts and computes.
            sizes = {name: model["fusion"][name] for name in ("width", "depth", "heads")}
            self.fusion = Fusion(width, model["drop_path"], **sizes)
            width = model["fusion"]["width"]
        self.prototypes = Prototypes(width, model["prototypes"]) if model.get("prototypes") else None

    @classmethod
    def from_folder(cls, folder):
        """The model of an export, in evaluation mode."""
        folder = pathlib.Path(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        with torch.device("meta"):  # no memory and no random numbers for what is loaded next
            model = cls(config)
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=True, assign=True)
        return model.eval()

    def forward(self, images, lonlat=None, grid=None):
        """Features of the sequences of `b` sites.

        Args:
          images: modality -> a dict of tensors or arrays. Only "values" and "days" are required.
            "values" (b, t, h, w, c): as the sensor stores them, in its unit, bands in the order of `statistics`;
            "days" (b, t): days since 1970-01-01;
            "valid" (b, t): dates that are there; all, if not given. The others fill up shorter sequences;
            "clear" (b, t, h, w): pixels that were measured and show the ground; all, if not given;
            "sensor" (b,): the row of `statistics`; 0, if not given;
            "bands" (b, c): the bands that the source has; all, if not given.
          lonlat: (b, 2) degrees east and north, NaN where unknown; for "context" alone.
          grid: rows and columns of the common grid (H, W); by default the cells of the multispectral images, else of
            the optical, else of the SAR images.

        Returns:
          "encoder" {m: (b, t, i, j, d_m)} and "encoder_valid" {m: (b, t, i, j)}: before the up-head;
          "spatial" {m: (b, t, H, W, s)} and "spatial_valid" {m: (b, t, H, W)}: after it, on the common grid;
          "fused" (b, H, W, d) and "fused_valid" (b, H, W): all dates and modalities together;
          "context" (b, H, W, d): "fused" with what the prototypes of the region tell; None, if the model has none;
          "pooled" (b, d) float32: the mean of "fused" over valid places, 0 where there are none;
          "days" {m: (b, t)}. Features that are not valid are finite and mean nothing.
        """
        device = next(self.parameters()).device
        images = {m: complete(m, images[m], self.statistics[m], device) for m in self.modalities if m in images}
        if not images:
            raise ValueError(f"images has none of the model's modalities, {', '.join(self.modalities)}")
        parts = {m: self.encode_dates(m, sequence) for m, sequence in images.items()}
        if grid is None:
            grid = parts[next(m for m in GRID_FROM if m in parts)]["spatial"].shape[2:4]
        output = {name: {m: part[name] for m, part in parts.items()} for name in ("encoder", "encoder_valid")}
        output["spatial"] = {m: to_grid(part["spatial"], part["extent"], grid) for m, part in parts.items()}
        output["spatial_valid"] = {m: mask_to_grid(p["spatial_valid"], p["extent"], grid) for m, p in parts.items()}
        output["days"] = {m: sequence["days"] for m, sequence in images.items()}

        features, valid, days = (
            torch.cat([output[name][m] for m in images], dim=1) for name in ("spatial", "spatial_valid", "days")
        )
        seen = valid.any(dim=1)
        if self.fusion is None:
            total = torch.where(valid[..., None], features.float(), 0).sum(dim=1)
            fused = (total / valid.sum(dim=1).clamp(min=1)[..., None]).to(features.dtype)
        else:
            fused = self.fusion(features, days, valid)
        pooled = torch.einsum("bhwd,bhw->bd", fused.float(), seen.float()) / seen.sum((1, 2)).clamp(min=1)[:, None]
        context = None if self.prototypes is None else self.prototypes(fused, lonlat)
        return output | {"fused": fused, "fused_valid": seen, "context": context, "pooled": pooled}

    def encode_dates(self, name, images):
        """Features and masks of every image of one modality, on that modality's own cells."""
        b, t, h, w, c = images["values"].shape
        x = normalize(images, self.statistics[name])
        x = getattr(self, name)(x.reshape(b * t, h, w, c), images["bands"].repeat_interleave(t, dim=0))
        x = x.unflatten(0, (b, t))
        seen = images["clear"] & (images["valid"] & images["bands"].any(-1, keepdim=True))[..., None, None]
        factor = self.up_factor[name]
        cell = self.token_size[name] // factor
        rows, columns = -(-h // cell), -(-w // cell)
        encoder_valid = spatial_valid = valid_cells(seen, self.token_size[name])
        spatial = x
        if name in self.up_heads:
            # Cells of the padding, which made whole patches, are cut off.
            spatial = self.up_heads[name](x)[:, :, :rows, :columns]
            of_token = encoder_valid.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
            spatial_valid = of_token[:, :, :rows, :columns] & valid_cells(seen, cell)
        return {
            "encoder": x,
            "encoder_valid": encoder_valid,
            "spatial": spatial,
            "spatial_valid": spatial_valid,
            "extent": (h / cell, w / cell),  # cells that the ground covers
        }


# What goes in: defaults, normalisation, masks.


def complete(modality, images, statistics, device):
    """One modality's images as tensors, with all that was not given: everything is there, of the first sensor."""
    images = {name: torch.as_tensor(value, device=device) for name, value in images.items()}
    shape, bands = tuple(images["values"].shape), statistics["bands"]
    if len(shape) != 5 or shape[-1] != len(bands):
        raise ValueError(
            f"{modality}: values have the shape {shape}; the model takes (sites, dates, rows, columns, {len(bands)}),"
            f" the bands being {', '.join(bands)}"
        )
    b, t, h, w, c = shape
    shapes = {"valid": (b, t), "clear": (b, t, h, w), "bands": (b, c)}
    for name, shape in shapes.items():
        images[name] = images[name].bool() if name in images else torch.ones(shape, dtype=torch.bool, device=device)
    images["days"] = images["days"].long()
    images["sensor"] = images.get("sensor", torch.zeros(b, device=device)).long()
    return images


def normalize(images, statistics):
    """(values - mean) / std of each site's sensor, in float32; 0, the mean, where nothing was measured."""
    values = images["values"].float()
    tables = (torch.tensor(statistics[name], dtype=torch.float32, device=values.device) for name in ("mean", "std"))
    mean, std = (table[images["sensor"]] for table in tables)
    there = (images["clear"] & images["valid"][..., None, None])[..., None] & images["bands"][:, None, None, None]
    spread = (slice(None), None, None, None)
    return torch.where(there & values.isfinite(), (values - mean[spread]) / std[spread], 0)


def valid_cells(clear, cell):
    """(b, t, h, w) pixels -> (b, t, i, j) cells of `cell` x `cell` pixels: whether at least half of each are clear.

    Cells that reach over the bottom or right edge count the pixels that lie inside.
    """
    h, w = clear.shape[-2:]

    def count(mask):
        padded = F.pad(mask.int(), (0, -w % cell, 0, -h % cell))
        return padded.unflatten(-1, (-1, cell)).unflatten(-3, (-1, cell)).sum((-3, -1))

    return 2 * count(clear) >= count(torch.ones_like(clear[:1, :1]))


# From one grid to another.


def to_grid(features, extent, grid):
    """(b, t, h, w, d) features on another grid of the same ground; as they are, where the grids are equal.

    Bilinear, widened to an antialiased triangle where the map shrinks. `extent` is how many rows and columns of cells
    the ground covers; less than (h, w) where the last are padding.
    """
    if tuple(features.shape[2:4]) == tuple(grid):
        return features
    rows, columns = (
        triangle_weights(features.shape[2 + axis], grid[axis], grid[axis] / extent[axis], features) for axis in range(2)
    )
    return torch.einsum("ih,jw,bthwd->btijd", rows, columns, features)


def mask_to_grid(mask, extent, grid):
    """A mask on another grid, by the rule of `to_grid`; a cell is valid from half its weight on."""
    if tuple(mask.shape[2:4]) == tuple(grid):
        return mask
    return to_grid(mask[..., None].float(), extent, grid)[..., 0] >= HALF


def triangle_weights(source, target, scale, like):
    """(target, source) weights of linear interpolation; `scale` is target cells for each source cell."""
    centre = (torch.arange(target, device=like.device) + 0.5) / scale - 0.5
    distance = (centre[:, None] - torch.arange(source, device=like.device)).abs()
    weights = (1 - distance / max(1, 1 / scale)).clamp(min=0)
    return (weights / weights.sum(dim=1, keepdim=True)).to(like.dtype)


# What the encoders share.


class PatchEmbed(nn.Conv2d):
    """A convolution over channels-last images; the bottom and right are padded with zeros to whole patches."""

    def __init__(self, channels, width, size, stride=None, padding=0, bias=True):
        super().__init__(channels, width, size, stride=stride or size, padding=padding, bias=bias)

    def forward(self, x, bands=None):
        """(n, h, w, c) images and (n, c) the bands that are there -> (n, i, j, d).

        A missing band adds nothing. What the present ones add is scaled by their share, so that the size of a token
        tells not how many there are.
        """
        stride = self.stride[0]
        x = F.pad(x.to(self.weight.dtype), (0, 0, 0, -x.shape[2] % stride, 0, -x.shape[1] % stride))
        x = F.conv2d(x.permute(0, 3, 1, 2), self.weight, None, self.stride, self.padding).permute(0, 2, 3, 1)
        if bands is not None:
            share = bands.float().mean(dim=1).clamp(min=1 / bands.shape[1])
            x = x * (1 / share).to(x.dtype)[:, None, None, None]
        return x if self.bias is None else x + self.bias


class Projections(nn.Module):
    """Query, key and value of each head, and the projection of what attention gathers."""

    def __init__(self, width, heads, key_bias=True):
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=key_bias)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.heads = heads

    def split(self, x, queries=None):
        """(..., n, d) -> query, key and value as (..., heads, n, d / heads); queries of the first tokens only."""
        parts = self.query(x[..., :queries, :]), self.key(x), self.value(x)
        return [part.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for part in parts]

    def join(self, x):
        """(..., heads, n, d / heads) -> (..., n, d), projected."""
        return self.out(x.transpose(-3, -2).flatten(-2))


def feed_forward(width):
    """Two projections around a GELU."""
    parts = {"up": nn.Linear(width, 4 * width), "gelu": nn.GELU(), "down": nn.Linear(4 * width, width)}
    return nn.Sequential(collections.OrderedDict(parts))


def drop_path(branch, rate, training):
    """Stochastic depth: in training, drops a row's branch with probability `rate` and scales the others up."""
    if not training or not rate:
        return branch
    keep = torch.rand(len(branch), *[1] * (branch.ndim - 1), device=branch.device) >= rate
    return branch * keep / (1 - rate)


class TransformerLayer(nn.Module):
    """A pre-norm layer; stochastic depth acts on the feed-forward alone."""

    def __init__(self, width, heads, epsilon, rate):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=epsilon)
        self.attention = Projections(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=epsilon)
        self.feed_forward = feed_forward(width)
        self.rate = rate

    def forward(self, x, mask=None, queries=None):
        """(n, tokens, d) and which of them may be looked at -> the first `queries` of them, or all.

        `mask` is (n, tokens), the same for all, or (n, tokens, tokens), for each its own.
        """
        query, key, value = self.attention.split(self.norm1(x), queries)
        visible = None if mask is None else mask[:, None, None] if mask.ndim == 2 else mask[:, None]
        gathered = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        x = x[:, :queries] + self.attention.join(gathered)
        return x + drop_path(self.feed_forward(self.norm2(x)), self.rate, self.training)


def rates(last, depth):
    """Stochastic depth of each block: from 0 to `last`."""
    return [last * i / max(1, depth - 1) for i in range(depth)]


def token(*shape):
    """A learned token or table."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=0.02))


# The parts: ViT with its up-head, Swin-V2, fusion, prototypes.


class ViT(nn.Module):
    """The encoder of sequences: a class token, learned positions, pre-norm layers, no final norm."""

    def __init__(self, part, last_rate):
        super().__init__()
        width, depth = part["width"], part["depth"]
        self.patch_embed = make_stem(part)
        self.class_token = token(width)
        self.side = part["image_size"] // part["patch_size"]
        self.positions = token(1 + self.side**2, width)  # the class token's first
        self.layers = nn.ModuleList(TransformerLayer(width, part["heads"], 1e-6, r) for r in rates(last_rate, depth))

    def forward(self, images, bands):
        """(n, h, w, c) normalised images and (n, c) bands -> (n, i, j, d), one feature a patch."""
        x = self.patch_embed(images, bands)
        n, rows, columns, _ = x.shape
        first, table = self.positions[0], self.positions[1:].unflatten(0, (self.side, self.side))
        if (rows, columns) != (self.side, self.side):
            table = F.interpolate(table.permute(2, 0, 1)[None].float(), (rows, columns), mode="bicubic")
            table = table[0].permute(1, 2, 0).to(x.dtype)
        x = torch.cat([(self.class_token + first).expand(n, 1, -1), (x + table).flatten(1, 2)], dim=1)
        for layer in self.layers:
            x = layer(x)
        return x[:, 1:].unflatten(1, (rows, columns))


class UpHead(nn.Module):
    """From a coarse token to `factor` x `factor` cells of the common width."""

    def __init__(self, width, spatial_width, factor):
        super().__init__()
        self.cells = nn.Linear(width, factor * factor * spatial_width)
        self.factor = factor

    def forward(self, x):
        """(b, t, i, j, d) -> (b, t, i * factor, j * factor, s)."""
        x = self.cells(x).unflatten(-1, (self.factor, self.factor, -1))
        return x.transpose(3, 4).flatten(4, 5).flatten(2, 3)


class SwinV2(nn.Module):
    """The encoder of high-resolution images: half the rows and columns a stage, twice the width.

    Cosine attention in windows, every second block's shifted; norms after each branch, an extra norm every few blocks.
    """

    def __init__(self, part, last_rate):
        super().__init__()
        width, depths = part["width"], part["depths"]
        self.patch_embed = make_stem(part)
        self.patch_norm = nn.LayerNorm(width)
        every = rates(last_rate, sum(depths))
        for i, depth in enumerate(depths):
            start = sum(depths[:i])
            self.add_module(f"stage{i}", Stage(part, i, width * 2**i, every[start : start + depth]))
        self.stages = len(depths)
        self.norm = nn.LayerNorm(width * 2 ** (len(depths) - 1))

    def forward(self, images, bands):
        """(n, h, w, c) normalised images and (n, c) bands -> (n, i, j, d), one feature a cell."""
        x = self.patch_norm(self.patch_embed(images, bands))
        for i in range(self.stages):
            x = getattr(self, f"stage{i}")(x)
        return self.norm(x)


def make_stem(part):
    """The patch embedding, or the convolutional stem in its place."""
    stem = ConvStem if part.get("stem", "patch") == "conv" else PatchEmbed
    return stem(len(part["bands"]), part["width"], part["patch_size"])


class ConvStem(nn.Module):
    """Patches of 4 x 4 pixels or fewer, then residual stages of half the rows and columns and twice the width."""

    def __init__(self, channels, width, patch_size):
        super().__init__()
        first = min(4, patch_size // 2)
        self.stages = (patch_size // first).bit_length() - 1
        self.patches = PatchEmbed(channels, width >> self.stages, first)
        for i in range(self.stages):
            narrow = width >> (self.stages - i)
            self.add_module(f"stage{i}", ResidualStage(narrow, 2 * narrow))
        self.patch_size = patch_size

    def forward(self, x, bands):
        """As `PatchEmbed`."""
        x = F.pad(x, (0, 0, 0, -x.shape[2] % self.patch_size, 0, -x.shape[1] % self.patch_size))
        x = F.gelu(self.patches(x, bands))
        for i in range(self.stages):
            x = getattr(self, f"stage{i}")(x)
        return x


class ResidualStage(nn.Module):
    """GELU of the sum of two branches: 3 x 3 of stride 2, GELU, 3 x 3; and a projection of each 2 x 2 block."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.convolution0 = PatchEmbed(inputs, outputs, size=3, stride=2, padding=1)
        self.convolution1 = PatchEmbed(outputs, outputs, size=3, stride=1, padding=1)
        self.shortcut = PatchEmbed(inputs, outputs, 2)

    def forward(self, x):
        """(n, h, w, d) -> (n, h / 2, w / 2, 2 d)."""
        return F.gelu(self.shortcut(x) + self.convolution1(F.gelu(self.convolution0(x))))


class Stage(nn.Module):
    """Half the rows and columns, except in the first stage; then blocks."""

    def __init__(self, part, number, width, rates):
        super().__init__()
        self.downsample = patch_merging(width) if number else nn.Identity()
        window, mask_padding = part["window"], part.get("mask_padding", True)
        heads = part["heads"][number]
        self.blocks = nn.ModuleList(SwinBlock(width, heads, window, mask_padding, rate) for rate in rates)
        self.every = part["extra_norm_every"]  # blocks; 0: no extra norms
        count = len(rates) // self.every if self.every else 0
        self.extra_norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(count))
        self.window = window

    def forward(self, x):
        """(n, h, w, d) -> (n, i, j, e)."""
        x = self.downsample(x)
        # A grid that is a single window has nothing to shift.
        shift = self.window // 2 if min(x.shape[1:3]) > self.window else 0
        for i, block in enumerate(self.blocks):
            x = block(x, shift if i % 2 else 0)
            if self.every and (i + 1) % self.every == 0:
                x = self.extra_norms[i // self.every](x)
        return x


def patch_merging(width):
    """Four neighbours -> one cell of twice the width: (n, h, w, d / 2) -> (n, i, j, d)."""
    parts = {"reduction": PatchEmbed(width // 2, width, 2, bias=False), "norm": nn.LayerNorm(width)}
    return nn.Sequential(collections.OrderedDict(parts))


class SwinBlock(nn.Module):
    """Window attention and a feed-forward, each normed after."""

    def __init__(self, width, heads, window, mask_padding, rate):
        super().__init__()
        self.attention = WindowAttention(width, heads, window, mask_padding)
        self.norm1 = nn.LayerNorm(width)
        self.feed_forward = feed_forward(width)
        self.norm2 = nn.LayerNorm(width)
        self.rate = rate

    def forward(self, x, shift):
        """(n, h, w, d) -> (n, h, w, d), windows moved by `shift` places."""
        x = x + drop_path(self.norm1(self.attention(x, shift)), self.rate, self.training)
        return x + drop_path(self.norm2(self.feed_forward(x)), self.rate, self.training)


class WindowAttention(Projections):
    """Scaled cosine attention inside windows, on a grid of any size."""

    def __init__(self, width, heads, window, mask_padding):
        super().__init__(width, heads, key_bias=False)
        self.logit_scale = nn.Parameter(torch.full((heads,), math.log(10)))
        self.bias_up = nn.Linear(2, 512)
        self.bias_down = nn.Linear(512, heads, bias=False)
        self.window = window
        self.mask_padding = mask_padding

    def forward(self, x, shift):
        """(n, h, w, d) -> (n, h, w, d): what each place gathers in its window, windows moved by `shift` places."""
        h, w = x.shape[1:3]
        rows, columns = min(self.window, h), min(self.window, w)
        x = F.pad(x, (0, 0, 0, -w % columns, 0, -h % rows)).roll((-shift, -shift), (1, 2))
        down, across = x.shape[1] // rows, x.shape[2] // columns
        x = x.unflatten(2, (across, columns)).unflatten(1, (down, rows)).transpose(2, 3)
        x = x.flatten(3, 4).flatten(1, 2)  # (n, windows, places, d)

        query, key, value = self.split(x)
        scale = self.logit_scale.float().clamp(max=math.log(100)).exp()[:, None, None]
        query, key = F.normalize(query.float(), dim=-1) * scale, F.normalize(key.float(), dim=-1)
        query, key = query.to(value.dtype), key.to(value.dtype)
        bias = self.position_bias(rows, columns)
        ground = (h, w) if self.mask_padding else (down * rows, across * columns)
        bias = self.with_barriers(bias, ground, (rows, columns), shift)
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(value.dtype), scale=1.0)

        x = self.join(x).unflatten(2, (rows, columns)).unflatten(1, (down, across)).transpose(2, 3)
        return x.flatten(3, 4).flatten(1, 2).roll((shift, shift), (1, 2))[:, :h, :w]

    def position_bias(self, rows, columns):
        """(heads, q, k) float32 bias of each pair of places in a window of `rows` x `columns`."""
        weight = self.bias_up.weight
        steps = torch.arange(1 - self.window, self.window, device=weight.device) / (self.window - 1) * 8
        offsets = steps.sign() * (steps.abs() + 1).log2() / 3
        table = self.bias_down(self.bias_up(torch.cartesian_prod(offsets, offsets).to(weight.dtype)).relu()).float()
        place = torch.cartesian_prod(*(torch.arange(length, device=weight.device) for length in (rows, columns)))
        offset = place[:, None] - place[None] + self.window - 1
        index = offset[..., 0] * (2 * self.window - 1) + offset[..., 1]
        return 16 * table[index].permute(2, 0, 1).sigmoid()

    @staticmethod
    def with_barriers(bias, ground, window, shift):
        """(heads, q, k) -> (windows, heads, q, k): less 100 across the seam, minus infinity between ground and padding.

        After the roll, the last windows hold pieces from opposite edges, and padding lies wherever it was rolled to.
        """
        if not shift and ground[0] % window[0] == 0 and ground[1] % window[1] == 0:
            return bias
        pieces = []
        for size, length in zip(ground, window, strict=True):
            padded = size + -size % length
            place = torch.arange(padded, device=bias.device)
            pieces.append(((place >= padded - shift).int(), place.roll(-shift) >= size))
        (row, row_padded), (column, column_padded) = pieces
        piece = (2 * row[:, None] + column).masked_fill(row_padded[:, None] | column_padded, -1)
        piece = piece.unflatten(1, (-1, window[1])).unflatten(0, (-1, window[0])).transpose(1, 2)
        piece = piece.flatten(2, 3).flatten(0, 1)[:, None]
        seam = 100.0 * (piece[..., None] != piece[..., None, :])
        padding = piece < 0
        return (bias - seam).masked_fill(padding[..., None] != padding[..., None, :], -math.inf)


class Fusion(nn.Module):
    """All dates of all modalities at one place -> one token: a date encoding, an extra token, pre-norm layers."""

    def __init__(self, spatial_width, last_rate, *, width, depth, heads):
        super().__init__()
        self.dates = token(366, spatial_width)
        self.projection = nn.Linear(spatial_width, width)
        self.extra_token = token(width)
        self.layers = nn.ModuleList(TransformerLayer(width, heads, 1e-5, rate) for rate in rates(last_rate, depth))

    def forward(self, features, days, valid):
        """(b, t, h, w, s) features, (b, t) days since 1970-01-01, (b, t, h, w) valid ones -> (b, h, w, d).

        Neither padding nor the order of dates changes the result. A place without any gives a finite token that means
        nothing: the extra token may always be looked at.
        """
        x = self.projection(features + self.dates[day_of_year(days)][:, :, None, None])
        b, t, h, w, d = x.shape
        x = x.permute(0, 2, 3, 1, 4).reshape(b * h * w, t, d)
        mask = F.pad(valid.permute(0, 2, 3, 1).reshape(b * h * w, t), (1, 0), value=True)
        x = torch.cat([self.extra_token.expand(b * h * w, 1, d), x], dim=1)
        for layer in self.layers[:-1]:
            x = layer(x, mask)
        return self.layers[-1](x, mask, queries=1).reshape(b, h, w, d)  # nobody reads the others


def day_of_year(days):
    """0 on 1 January to 364 or, in leap years, 365 on 31 December, of days since 1970-01-01."""

    def new_year(year):
        before = year - 1
        return 365 * (year - 1970) + before // 4 - before // 100 + before // 400 - 477  # 477 leap days up to 1969

    # The mean year is exact within a day or two, so the true year is this one, the one before or the one after.
    guess = 1970 + days * 400 // 146_097
    year = guess + (days >= new_year(guess + 1)).int() - (days < new_year(guess)).int()
    return days - new_year(year)


class Prototypes(nn.Module):
    """Geo-context: each place looks at a bank of centres of its region of the Earth, cells of equal area."""

    table: torch.Tensor

    def __init__(self, fused_width, config):
        super().__init__()
        self.query = nn.Linear(fused_width, config["width"])
        self.out = nn.Linear(fused_width + config["width"], fused_width)
        self.regions = config["regions"]  # cells an axis
        self.register_buffer("table", torch.randn(self.regions**2, config["count"], config["width"]))

    def forward(self, fused, lonlat=None):
        """(b, h, w, d) features and (b, 2) degrees -> (b, h, w, d); a site of unknown position stands alone."""
        if lonlat is None:
            lonlat = torch.full((len(fused), 2), math.nan)
        longitude, latitude = torch.as_tensor(lonlat, dtype=torch.float32, device=fused.device).unbind(-1)
        known = longitude.isfinite() & (latitude.abs() <= 90)
        column = (longitude + 180) % 360 / 360 * self.regions  # from 180 degrees west
        row = (latitude.deg2rad().sin() + 1) / 2 * self.regions  # from the south pole
        row, column = (torch.where(known, x, 0).long().clamp(0, self.regions - 1) for x in (row, column))
        bank = self.table[row * self.regions + column]

        query = self.query(fused).float()
        query = F.layer_norm(query, query.shape[-1:], eps=1e-5).to(bank.dtype).flatten(1, 2)
        found = F.scaled_dot_product_attention(query, bank, bank).view(*fused.shape[:3], -1)
        found = torch.where(known[:, None, None, None], found, 0).to(fused.dtype)
        return self.out(torch.cat([fused, found], dim=-1))


# Words.


class SkyjaxWords(nn.Module):
    """The text tower, and the projections by which images meet texts: unit vectors of both, compared by their products.

    Attributes:
      streams: the image sides that met words in training: "fused", or modalities.
      kind: "softmax" or "sigmoid". By the first, texts of which one is right have the probabilities
        softmax(product / temperature); by the second a text is right with sigmoid(product / temperature + bias).
      temperature, bias: of these.
    """

    def __init__(self, config):
        """`config`: what config.json holds; parameters are fresh."""
        super().__init__()
        words = config["words"]
        self.text = TextTower(words["text"])
        width = words["text"]["embed_dim"]
        self.streams = nn.ModuleDict({name: nn.Linear(n, width, bias=False) for name, n in words["streams"].items()})
        self.kind, self.temperature, self.bias = words["kind"], words["temperature"], words["bias"]
        self.tokenizer = Tokenizer(words["tokenizer"], words["length"])

    @classmethod
    def from_folder(cls, folder):
        """The words of an export, in evaluation mode."""
        folder = pathlib.Path(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not config.get("words"):
            raise ValueError(f"{folder} holds a model that was trained without texts")
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(load_file(folder / "words.safetensors"), strict=True, assign=True)
        model.tokenizer.path = folder / "tokenizer.model"
        return model.eval()

    def forward(self, tokens, valid):
        """(n, l) ids and which of them are there -> (n, e) unit vectors; 0 for a text without any."""
        device = self.text.positions.device
        tokens, valid = torch.as_tensor(tokens, device=device).long(), torch.as_tensor(valid, device=device)
        return unit(torch.where(valid.any(1, keepdim=True), self.text(tokens, valid)["embedding"].float(), 0))

    def encode(self, texts):
        """A list of strings -> (n, e) unit vectors; 0 for a blank one."""
        return self(*self.tokenizer(texts))

    def images(self, output, stream="fused"):
        """What `SkyjaxEncoder` gives -> (b, e) unit vectors of the sites, as `stream` sees them."""
        if stream not in self.streams:
            raise ValueError(f"{stream} never met words; these did: {', '.join(self.streams)}")
        features = output["pooled"]
        if stream != "fused":
            features, valid = output["spatial"][stream].float(), output["spatial_valid"][stream].float()
            count = valid.sum((1, 2, 3)).clamp(min=1)[:, None]
            features = torch.einsum("bthwd,bthw->bd", features, valid) / count
        return unit(self.streams[stream](features.to(self.text.positions.dtype)).float())


def unit(vectors):
    """Vectors at length one; a zero vector stays zero."""
    return vectors * torch.rsqrt(vectors.square().sum(-1, keepdim=True) + 1e-8)


class TextTower(nn.Module):
    """A pre-norm transformer over learned positions, pooled to one vector a text, and a projection."""

    def __init__(self, part):
        super().__init__()
        width, heads, depth = part["width"], part["heads"], part["depth"]
        self.tokens = nn.Embedding(part["vocabulary"], width)
        self.positions = token(part["length"], width)
        every = rates(part.get("drop_path", 0.0), depth)
        self.layers = nn.ModuleList(TransformerLayer(width, heads, 1e-6, rate) for rate in every)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pool = QueryPool(width, heads) if part["pool"] == "query" else None
        self.projection = nn.Linear(width, part["embed_dim"], bias=False)
        self.mean, self.causal = part["pool"] == "mean", part["causal"]

    def forward(self, tokens, valid):
        """(n, l) ids, the valid ones first, and which are there -> "tokens" (n, l, d), "embedding" (n, e)."""
        length = tokens.shape[1]
        x = self.tokens(torch.where(valid, tokens, 0)) + self.positions[:length]
        every = torch.ones(length, length, dtype=torch.bool, device=valid.device)
        # Each sees itself, so that none sees nothing.
        visible = valid[:, None] & (every.tril() if self.causal else every) | torch.eye(length, device=x.device).bool()
        for layer in self.layers:
            x = layer(x, visible)
        x = self.norm(x)
        return {"tokens": x, "embedding": self.projection(self.pooled(x, valid))}

    def pooled(self, x, valid):
        """By a learned query, the mean, or the last valid token, which is the end of the text."""
        if self.pool is not None:
            return self.pool(x, valid)
        count = valid.sum(1, keepdim=True)
        last = torch.arange(x.shape[1], device=x.device) == count - 1
        weights = (valid if self.mean else last).float()
        total = torch.einsum("nl,nld->nd", weights, x.float())
        return (total / count.clamp(min=1) if self.mean else total).to(x.dtype)


class QueryPool(nn.Module):
    """A learned query gathers the valid tokens, then a feed-forward."""

    def __init__(self, width, heads):
        super().__init__()
        self.extra_token = token(width)
        self.attention = Projections(width, heads)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.feed_forward = feed_forward(width)

    def forward(self, x, valid):
        """(n, l, d) and (n, l) which are there -> (n, d)."""
        first = self.extra_token.expand(len(x), 1, -1)
        key, value = (
            project(x).unflatten(-1, (self.attention.heads, -1)).transpose(1, 2)
            for project in (self.attention.key, self.attention.value)
        )
        query = self.attention.query(first).unflatten(-1, (self.attention.heads, -1)).transpose(1, 2)
        mask = (valid | ~valid.any(1, keepdim=True))[:, None, None]  # a text without a token gives what means nothing
        gathered = self.attention.join(F.scaled_dot_product_attention(query, key, value, attn_mask=mask))[:, 0]
        return gathered + self.feed_forward(self.norm(gathered))


class Tokenizer:
    """Strings -> ids by the export's SentencePiece model, with the rules that stand in config.json.

    Attributes:
      path: of tokenizer.model.
    """

    def __init__(self, rules, length):
        self.rules, self.length = rules, length
        self.path, self.pieces = None, None

    def __call__(self, texts):
        """A list of strings -> (n, l) ids and which of them are there: [bos] pieces [eos], then padding."""
        rows = [self.row(text) for text in texts]
        length = max(map(len, rows), default=0) or 1
        lengths = torch.tensor([len(row) for row in rows]).reshape(-1, 1)
        filled = [row + [self.rules["pad"]] * (length - len(row)) for row in rows]
        return torch.tensor(filled).reshape(-1, length), torch.arange(length) < lengths

    def row(self, text):
        """The ids of one text, cut to the length of training; none of a blank one."""
        if self.pieces is None:
            import sentencepiece

            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        if self.rules["lower_case"]:
            text = text.lower()
        if self.rules["strip_accents"]:
            apart = unicodedata.normalize("NFD", text)
            text = unicodedata.normalize("NFC", "".join(c for c in apart if not unicodedata.combining(c)))
        ids = self.pieces.encode(text)[: self.length - 2]
        return [self.rules["bos"], *ids, self.rules["eos"]] if ids else []
