"""Files as SkySense releases them, with random weights: names and shapes written down from its published modules.

Not made from the code under test; tests/convert/test_released_names.py holds them to the stored cases of the real
modules.
"""

import numpy as np


class Maker:
    """Fills in random numbers; `dtype` of the weights."""

    def __init__(self, seed=0, dtype=np.float32):
        self.rng, self.dtype = np.random.default_rng(seed), np.dtype(dtype)

    def __call__(self, *shape):
        return self.rng.normal(size=shape).astype(self.dtype)

    def linear(self, name, inputs, outputs):
        return {f"{name}.weight": self(outputs, inputs), f"{name}.bias": self(outputs)}

    def norm(self, name, width):
        return {f"{name}.weight": self(width), f"{name}.bias": self(width)}

    def embed(self, channels, width, patch):
        name = "patch_embed.projection"
        return {f"{name}.weight": self(width, channels, patch, patch), f"{name}.bias": self(width)}

    def feed_forward(self, name, width):
        return self.linear(f"{name}.ffn.layers.0.0", width, 4 * width) | self.linear(
            f"{name}.ffn.layers.1", 4 * width, width
        )

    def swin(self, *, channels=3, width=8, depths=(2, 2), heads=(1, 2), every=0, patch=4, window=None, all_norms=False):
        """`window` given: with the buffers of it."""
        found = self.embed(channels, width, patch) | self.norm("patch_embed.norm", width)
        for i, depth in enumerate(depths):
            wide = width * 2**i
            if i:
                found[f"stages.{i}.downsample.reduction.weight"] = self(wide, 2 * wide)
                found |= self.norm(f"stages.{i}.downsample.norm", wide)
            for b in range(depth):
                block = f"stages.{i}.blocks.{b}"
                own = f"{block}.attn.w_msa"
                found[f"{own}.logit_scale"] = self(heads[i], 1, 1)
                found[f"{own}.q_bias"] = self(wide)
                found[f"{own}.v_bias"] = self(wide)
                if window:
                    found |= {f"{own}.{name}": value for name, value in buffers(window).items()}
                found |= self.linear(f"{own}.cpb_mlp.0", 2, 512)
                found[f"{own}.cpb_mlp.2.weight"] = self(heads[i], 512)
                found[f"{own}.qkv.weight"] = self(3 * wide, wide)
                found |= self.linear(f"{own}.proj", wide, wide) | self.norm(f"{block}.norm1", wide)
                found |= self.feed_forward(block, wide) | self.norm(f"{block}.norm2", wide)
                if every and (b + 1) % every == 0:
                    found |= self.norm(f"{block}.norm3", wide)
        for i in range(0 if all_norms else len(depths) - 1, len(depths)):
            found |= self.norm(f"norm{i}", width * 2**i)
        return found

    def transformer(self, width, depth):
        found = {}
        for i in range(depth):
            layer = f"layers.{i}"
            found |= self.norm(f"{layer}.ln1", width)
            found[f"{layer}.attn.attn.in_proj_weight"] = self(3 * width, width)
            found[f"{layer}.attn.attn.in_proj_bias"] = self(3 * width)
            found |= self.linear(f"{layer}.attn.attn.out_proj", width, width)
            found |= self.norm(f"{layer}.ln2", width) | self.feed_forward(layer, width)
        return found

    def vit(self, *, channels=10, width=8, depth=2, patch=4, side=4):
        tokens = {"cls_token": self(1, 1, width), "pos_embed": self(1, 1 + side**2, width)}
        return tokens | self.embed(channels, width, patch) | self.transformer(width, depth)

    def fusion(self, *, spatial=16, width=8, depth=2):
        return (
            {"cls_token": self(1, 1, width)}
            | self.linear("porj_linear", spatial, width)
            | self.transformer(width, depth)
        )

    def up_head(self, *, width=8, spatial=16, factor=4):
        rows = factor**2 * spatial
        return {"decoder.0.weight": self(rows, width, 1, 1), "decoder.0.bias": self(rows)}

    def whole(
        self,
        *,
        optical=None,
        multispectral=None,
        sar=None,
        fusion=None,
        factor=4,
        rows=365,
        mask_token=True,
        prefix="backbone_gep.",
    ):
        """A whole checkpoint; parts are settings of theirs, False leaves a part out; `rows` 0: without ctpe."""
        found = {}
        width = (optical or {}).get("width", 8) * 2 ** (len((optical or {}).get("depths", (2, 2))) - 1)
        if optical is not False:
            found |= under(prefix, self.swin(**(optical or {})))
            if mask_token:
                found[f"{prefix}mask_token"] = self(1, 1, (optical or {}).get("width", 8))
        for name, settings, channels in (("s2", multispectral, 10), ("s1", sar, 2)):
            if settings is False:
                continue
            settings = {"channels": channels, **(settings or {})}
            found |= under(f"backbone_{name}.", self.vit(**settings))
            head = self.up_head(width=settings.get("width", 8), spatial=width, factor=factor)
            found |= under(f"head_{name}.", head)
        if fusion is not False:
            found |= under("fusion.", self.fusion(spatial=width, **(fusion or {})))
        if rows:
            found["ctpe"] = self(1, rows, width)
        return found


def under(prefix, tensors):
    return {prefix + name: value for name, value in tensors.items()}


def buffers(window):
    """As the published modules compute them, in torch's float32."""
    import torch

    steps = torch.arange(1 - window, window, dtype=torch.float32)
    table = torch.stack(torch.meshgrid([steps, steps], indexing="ij")).permute(1, 2, 0).contiguous().unsqueeze(0)
    table /= window - 1
    table *= 8
    table = torch.sign(table) * torch.log2(torch.abs(table) + 1.0) / np.log2(8)
    places = torch.stack(torch.meshgrid([torch.arange(window)] * 2, indexing="ij")).flatten(1)
    offsets = (places[:, :, None] - places[:, None, :]).permute(1, 2, 0) + window - 1
    index = offsets[..., 0] * (2 * window - 1) + offsets[..., 1]
    return {"relative_coords_table": table.numpy(), "relative_position_index": index.numpy()}


def save(path, tensors, container="model", **beside):
    """As .pth, in a container or flat, or as .safetensors."""
    if path.suffix == ".safetensors":
        import safetensors.numpy

        safetensors.numpy.save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)
        return path
    import torch

    content = {name: to_torch(value) for name, value in tensors.items()}
    torch.save({container: content, **beside} if container else content, path)
    return path


def to_torch(value):
    import torch

    value = np.array(value)
    if value.dtype.name == "bfloat16":
        return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(value)


def bits(path):
    """Name -> shape, type and bytes of what a file holds, in its order; read by the libraries of PyTorch users."""
    import safetensors.torch
    import torch

    if path.suffix == ".safetensors":
        content = safetensors.torch.load_file(path)
    else:
        content = torch.load(path, weights_only=True)
        content = content.get("model", content.get("state_dict", content))
    return {
        name: (tuple(x.shape), str(x.dtype), x.contiguous().view(torch.uint8).numpy().tobytes() if x.ndim else b"")
        for name, x in content.items()
    }
