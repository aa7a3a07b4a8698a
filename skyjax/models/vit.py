"""The ViT of the sequence modalities: pre-norm, learned positions that are resized for other grids, no final norm.

Source: the published SkySense encoders (research notes in docs/fidelity.md): a class token is prepended, positions are
added to it too, and it is dropped from the output.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from skyjax.models.layers import Compute, TransformerLayer, run_transformer, stack, token
from skyjax.models.resize import resize_positions
from skyjax.models.stem import make_stem

EPSILON = 1e-6


class ViT(nnx.Module):
    """Images -> one feature a patch."""

    def __init__(
        self,
        *,
        channels: int,
        patch_size: int,
        image_size: int,
        width: int,
        depth: int,
        heads: int,
        compute: Compute,
        rngs: nnx.Rngs,
        stem: str = "patch",
    ):
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
        self.patch_embed = make_stem(stem, patch_size, channels, width, compute.dtype, rngs)
        self.class_token = token((width,), rngs)
        self.positions = token((1 + (image_size // patch_size) ** 2, width), rngs)
        self.layers = stack(lambda r: TransformerLayer(width, heads, EPSILON, compute.dtype, r), depth, rngs)
        self.compute = compute

    def __call__(
        self, images: Float[Array, "n h w c"], bands: Bool[Array, "n c"] | None = None, key: jax.Array | None = None
    ) -> Float[Array, "n i j d"]:
        """Features of each patch.

        Args:
          images: normalised; what is missing holds 0. Any size: the bottom and right are padded to whole patches.
          bands: the bands that are there; None: all.
          key: turns stochastic depth on.
        """
        patches = self.patch_embed(images, bands)
        n, rows, columns, width = patches.shape
        positions = self.positions[...]
        patches = patches + resize_positions(positions[1:], (rows, columns)).astype(patches.dtype)
        first = (self.class_token[...] + positions[0]).astype(patches.dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (n, 1, width)), patches.reshape(n, rows * columns, width)], axis=1)
        x = run_transformer(self.compute, self.layers, x, None, key)
        return x[:, 1:].reshape(n, rows, columns, width)
