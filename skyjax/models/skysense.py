"""The encoder: spatial encoders a modality, up-heads to one width and grid, temporal fusion, geo-context.

`init` and `apply` are all that the rest of the program sees: plain nested dicts of arrays go in and come out. What the
config's keys mean stands in configs/pretrain_sample.py; what follows the paper, in docs/fidelity.md.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from skyjax.models.fusion import Fusion
from skyjax.models.layers import TOKEN_STDDEV, Compute, Place, as_they_lie
from skyjax.models.plain import Config, Params, bind, fresh
from skyjax.models.prototypes import Prototypes, centres, lookup, region_of
from skyjax.models.resize import mask_to_grid, to_grid, valid_cells
from skyjax.models.swin_v2 import SwinV2
from skyjax.models.up_head import UpHead
from skyjax.models.vit import ViT
from skyjax.sample import MODALITIES

Images = Mapping[str, Array]
Output = dict[str, Any]

GRID_FROM = ("multispectral", "optical", "sar")  # whose cells are the common grid: the first that is given


def init(model_config: Config, key: jax.Array) -> Params:
    """Fresh float32 parameters: {MODALITY: ..., "up_heads": {MODALITY: ...}, "fusion": ..., "prototypes": ...}.

    What the config has none of has no key.

    Can be traced by `jax.jit` and `jax.eval_shape`, so that parameters are born where their shardings say.

    Raises:
      ValueError: values of the config contradict each other; the message names the keys.
    """
    return fresh(SkySense, model_config, key)


def init_prototypes(model_config: Config, key: jax.Array) -> Float[Array, "r k p"] | None:
    """The table of geo-prototypes, drawn with unit variance as queries have it; None where the config has none."""
    shape = _table_shape(model_config)
    return None if shape is None else jax.random.normal(key, shape)


def apply(
    model_config: Config,
    params: Params,
    images: Mapping[str, Images],
    *,
    grid: tuple[int, int] | None = None,
    key: jax.Array | None = None,
    lonlat: Float[Array, "b 2"] | None = None,
    prototypes: Float[Array, "r k p"] | None = None,
    place: Place = as_they_lie,
) -> Output:
    """Features of the sequences of `b` sites.

    Args:
      model_config: `config.model`.
      params: as `init` gives them; "prototypes" may stand there without the config's asking for them.
      images: MODALITY -> "values" (b, t, h, w, c) normalised, "days" (b, t), "valid" (b, t), "clear" (b, t, h, w),
        "bands" (b, c). A modality that the model does not have is passed over; one that is not given is absent.
        Values under a mask are never read.
      grid: rows and columns of the common grid; None: the cells of the multispectral images, else of the optical,
        else of the SAR images.
      key: given in training, where it drives stochastic depth.
      lonlat: positions of the sites in degrees, NaN where unknown; None: all unknown.
      prototypes: the table of geo-prototypes, as `init_prototypes` gives it. Without it there is no context.
      place: see models/layers.py, `Compute`.

    Returns:
      "encoder" {m: (b, t, h', w', d_m)} and "encoder_valid" {m: (b, t, h', w')}: before the up-head;
      "spatial" {m: (b, t, H, W, s)} and "spatial_valid" {m: (b, t, H, W)}: after it, on the common grid (H, W);
      "fused" (b, H, W, d) and "fused_valid" (b, H, W): without a fusion the mean of "spatial" over valid dates, 0 where
      there are none; "context" (b, H, W, d), `fused` with what its region's prototypes tell, or None; "pooled" (b, d)
      float32, the mean of `fused` over valid places, 0 where there are none; "days" {m: (b, t)}. Features that are not
      valid are finite.

    Raises:
      ValueError: none of the model's modalities is given, or the table is not of the config's size.
    """
    return _module(model_config, params, place)(images, grid, key, lonlat, prototypes)


def prototype_centres(
    model_config: Config,
    params: Params,
    fused: Float[Array, "b h w d"],
    valid: Bool[Array, "b h w"],
    lonlat: Float[Array, "b 2"],
    prototypes: Float[Array, "r k p"],
) -> tuple[Float[Array, "b k p"], Int32[Array, "b"]]:
    """What `b` sites tell about the prototypes of their regions (models/prototypes.py, `centres` and `update`).

    Args:
      model_config: `config.model`, with prototypes.
      params: as `init` gives them.
      fused: features of a site; several views of one site stand one below the other.
      valid: the places that count.
      lonlat: as in `apply`.
      prototypes: the table.

    Returns:
      The centres, and the region of each site: -1 where its position is unknown or no place of it is valid.
    """
    config = model_config.prototypes
    regions = jnp.where(valid.any(axis=(1, 2)), region_of(lonlat, config.regions), -1)
    module = _module(model_config, params).prototypes
    assert module is not None, "model.prototypes is None"
    queries = module.queries(fused)
    b = len(queries)
    found = centres(
        queries.reshape(b, -1, queries.shape[-1]),
        valid.reshape(b, -1),
        lookup(prototypes, regions),
        epsilon=config.epsilon,
        iterations=config.iterations,
    )
    return found, regions


def _module(model_config: Config, params: Params, place: Place = as_they_lie) -> "SkySense":
    if model_config.get("prototypes") is None:
        params = {name: part for name, part in params.items() if name != "prototypes"}
    return bind(SkySense, model_config, params, place)


class SkySense(nnx.Module):
    """Encoders, up-heads, fusion and geo-context of one config."""

    def __init__(self, config: Config, rngs: nnx.Rngs, place: Place = as_they_lie):
        compute = Compute(jnp.dtype(config.dtype), config.scan, config.remat, config.drop_path, place)
        self.modalities = tuple(m for m in MODALITIES if m in config.modalities)
        unknown = set(config.modalities) - set(MODALITIES)
        if unknown or not self.modalities:
            raise ValueError(f"model.modalities has {sorted(config.modalities)}; it takes {', '.join(MODALITIES)}")
        up_heads = {}
        cells = {}
        for name in self.modalities:
            part = config.modalities[name]
            if part.kind == "swin_v2":
                setattr(self, name, _swin(name, part, config.spatial_width, compute, rngs))
                cells[name] = (part.patch_size * 2 ** (len(part.depths) - 1), 1)
            elif part.kind == "vit":
                setattr(self, name, _vit(name, part, config.spatial_width, compute, rngs))
                if part.up_factor is not None:
                    up_heads[name] = UpHead(part.width, config.spatial_width, part.up_factor, compute.dtype, rngs)
                cells[name] = (part.patch_size, part.up_factor or 1)
            else:
                raise ValueError(f'model.modalities.{name}.kind is "{part.kind}"; it is "swin_v2" or "vit"')
        self.up_heads = nnx.Dict(up_heads)
        self.cells = tuple(cells.items())
        self.fusion = _fusion(config, compute, rngs)
        self.prototypes = _prototypes(config, compute, rngs)
        self.table_shape = _table_shape(config)

    def __call__(
        self,
        images: Mapping[str, Images],
        grid: tuple[int, int] | None,
        key: jax.Array | None,
        lonlat: Float[Array, "b 2"] | None,
        prototypes: Float[Array, "r k p"] | None,
    ) -> Output:
        """As `apply`."""
        given = [m for m in self.modalities if m in images]
        if not given:
            raise ValueError(
                f"images has {sorted(images)}, none of the model's modalities {', '.join(self.modalities)}"
            )
        parts = {m: self._spatial(m, images[m], _fold(key, i)) for i, m in enumerate(given)}
        if grid is None:
            leading = next(m for m in GRID_FROM if m in parts)
            grid = parts[leading]["spatial"].shape[2:4]
        output: Output = {"encoder": {}, "encoder_valid": {}, "spatial": {}, "spatial_valid": {}, "days": {}}
        for m, part in parts.items():
            output["encoder"][m], output["encoder_valid"][m] = part["encoder"], part["encoder_valid"]
            output["spatial"][m] = to_grid(part["spatial"], part["extent"], grid)
            output["spatial_valid"][m] = mask_to_grid(part["spatial_valid"], part["extent"], grid)
            output["days"][m] = images[m]["days"]

        features, valid, days = (
            jnp.concatenate([output[name][m] for m in given], axis=1) for name in ("spatial", "spatial_valid", "days")
        )
        if self.fusion is None:
            fused = _mean_dates(features, valid)
        else:
            fused = self.fusion(features, days, valid, _fold(key, len(MODALITIES)))
        fused_valid = valid.any(axis=1)
        return output | {
            "fused": fused,
            "fused_valid": fused_valid,
            "context": self._context(fused, lonlat, prototypes),
            "pooled": _mean(fused, fused_valid),
        }

    def _spatial(self, name: str, images: Images, key: jax.Array | None) -> dict[str, Any]:
        """One modality, its dates folded into the batch: features and masks on its own cells, and their extent."""
        values, bands = images["values"], images["bands"]
        b, t, h, w, c = values.shape
        seen = images["clear"] & (images["valid"] & bands.any(-1)[:, None])[..., None, None]
        # The model answers for its own masks: a NaN under one must not reach a token.
        values = jnp.where(seen[..., None] & bands[:, None, None, None, :], values, 0)
        encoder = getattr(self, name)
        x = encoder(values.reshape(b * t, h, w, c), jnp.repeat(bands, t, axis=0), key)
        token_size, up_factor = dict(self.cells)[name]
        cell = token_size // up_factor
        rows, columns = -(-h // cell), -(-w // cell)
        encoder_valid = spatial_valid = valid_cells(seen, token_size)
        spatial = x
        if name in self.up_heads:
            # Cells of the padding, which made whole patches, are cut off.
            spatial = self.up_heads[name](x)[:, :rows, :columns]
            of_token = jnp.repeat(jnp.repeat(encoder_valid, up_factor, axis=2), up_factor, axis=3)
            spatial_valid = of_token[:, :, :rows, :columns] & valid_cells(seen, cell)
        return {
            "encoder": x.reshape(b, t, *x.shape[1:]),
            "encoder_valid": encoder_valid,
            "spatial": spatial.reshape(b, t, *spatial.shape[1:]),
            "spatial_valid": spatial_valid,
            "extent": (h / cell, w / cell),
        }

    def _context(self, fused: Float[Array, "b h w d"], lonlat: Array | None, table: Array | None) -> Array | None:
        """Geo-context of every place, or None where the model or the caller has no prototypes."""
        if self.prototypes is None or table is None:
            return None
        if table.shape != self.table_shape:
            raise ValueError(f"prototypes has the shape {table.shape}; model.prototypes asks for {self.table_shape}")
        lonlat = jnp.full((len(fused), 2), jnp.nan) if lonlat is None else lonlat
        regions = region_of(lonlat, math.isqrt(len(table)))
        return self.prototypes(fused, lookup(table, regions), regions >= 0)


def _swin(name: str, part: Any, spatial_width: int, compute: Compute, rngs: nnx.Rngs) -> SwinV2:
    last = part.width * 2 ** (len(part.depths) - 1)
    if last != spatial_width:
        raise ValueError(
            f"model.modalities.{name}: width {part.width} in {len(part.depths)} stages of depths ends at {last}, but"
            f" model.spatial_width is {spatial_width}; they must be equal"
        )
    return SwinV2(
        channels=len(part.bands),
        patch_size=part.patch_size,
        width=part.width,
        depths=part.depths,
        heads=part.heads,
        window=part.window,
        extra_norm_every=part.extra_norm_every,
        stem=part.get("stem", "patch"),
        mask_padding=part.get("mask_padding", True),
        compute=compute,
        rngs=rngs,
    )


def _vit(name: str, part: Any, spatial_width: int, compute: Compute, rngs: nnx.Rngs) -> ViT:
    if part.up_factor is None and part.width != spatial_width:
        raise ValueError(
            f"model.modalities.{name}: with up_factor None there is no up-head, so width {part.width} must equal"
            f" model.spatial_width, which is {spatial_width}"
        )
    if part.up_factor is not None and part.patch_size % part.up_factor:
        raise ValueError(
            f"model.modalities.{name}: up_factor {part.up_factor} must divide patch_size {part.patch_size}, so that a"
            " cell is a whole number of pixels"
        )
    return ViT(
        channels=len(part.bands),
        patch_size=part.patch_size,
        image_size=part.image_size,
        width=part.width,
        depth=part.depth,
        heads=part.heads,
        compute=compute,
        rngs=rngs,
        stem=part.get("stem", "patch"),
    )


def _fusion(config: Config, compute: Compute, rngs: nnx.Rngs) -> Fusion | None:
    if config.fusion is not None:
        return Fusion(
            spatial_width=config.spatial_width,
            width=config.fusion.width,
            depth=config.fusion.depth,
            heads=config.fusion.heads,
            compute=compute,
            rngs=rngs,
            date_stddev=config.fusion.get("date_stddev", TOKEN_STDDEV),
            parts=config.fusion.get("parts", 1),
        )
    if len(config.modalities) > 1:
        raise ValueError(
            f"model.fusion is None, which goes with one modality only; model.modalities has {sorted(config.modalities)}"
        )
    return None


def _prototypes(config: Config, compute: Compute, rngs: nnx.Rngs) -> Prototypes | None:
    if config.get("prototypes") is None:
        return None
    fused_width = config.spatial_width if config.fusion is None else config.fusion.width
    return Prototypes(fused_width=fused_width, width=config.prototypes.width, dtype=compute.dtype, rngs=rngs)


def _table_shape(config: Config) -> tuple[int, int, int] | None:
    prototypes = config.get("prototypes")
    return None if prototypes is None else (prototypes.regions**2, prototypes.count, prototypes.width)


def _fold(key: jax.Array | None, part: int) -> jax.Array | None:
    return None if key is None else jax.random.fold_in(key, part)


def _mean_dates(features: Float[Array, "b t h w d"], valid: Bool[Array, "b t h w"]) -> Float[Array, "b h w d"]:
    """The mean of each place over its valid dates; 0 where it has none."""
    seen = valid[..., None]
    total = jnp.sum(jnp.where(seen, features.astype(jnp.float32), 0), axis=1)
    return (total / jnp.maximum(seen.sum(axis=1), 1)).astype(features.dtype)


def _mean(fused: Float[Array, "b h w d"], valid: Bool[Array, "b h w"]) -> Float[Array, "b d"]:
    total = jnp.einsum("bhwd,bhw->bd", fused.astype(jnp.float32), valid.astype(jnp.float32))
    return total / jnp.maximum(valid.sum((1, 2)), 1)[:, None]
