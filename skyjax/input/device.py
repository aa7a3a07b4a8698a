"""What happens to a batch on the device, inside the jitted step: normalisation by sensor, then pixel augmentation.

In: a `Batch` in stored types (sample.py). Out: the same dict with float32 values. Randomness is a function of (seed,
position in the global order, view, modality): neither the place in the batch nor the sharding changes a pixel.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Bool, Float

from skyjax.input import augment as pixels
from skyjax.sample import MODALITIES, Batch, Images

Statistics = Mapping[str, tuple[Any, Any]]


def prepare(batch: Batch, *, statistics: Statistics, augment: ml_collections.ConfigDict | None, seed: int) -> Batch:
    """The batch with normalised and augmented float32 values; everything else as it was.

    Args:
      batch: as the loader yields it.
      statistics: modality -> mean and std (s, c) in the sensors' units, from `skyjax.sensors.statistics`.
      augment: the config's `data.augment`; None normalises only.
      seed: of the run.
    """
    keys = jax.vmap(lambda index: jax.random.fold_in(jax.random.key(seed), index))(batch["index"])
    prepared, first = dict(batch), 0
    for group in ("global", "local"):
        if group not in batch:
            continue
        views = dict(batch[group])
        for modality in MODALITIES:
            if modality in views:
                views[modality] = _prepare_images(modality, views[modality], statistics[modality], augment, keys, first)
        prepared[group] = views
        first += views["to_view"].shape[1]
    return prepared


def _prepare_images(
    modality: str,
    images: Images,
    statistics: tuple[Any, Any],
    augment: ml_collections.ConfigDict | None,
    keys: Array,
    first: int,
) -> Images:
    """`keys` (b,) belong to the samples; `first` is the number of the first of these views among all of a sample."""
    mean, std = (jnp.asarray(table, jnp.float32) for table in statistics)
    values = normalize(images, mean, std)
    if augment is not None:
        mask = jnp.broadcast_to(measured(images), values.shape)

        def one_view(key: Array, view: Array, values: Array, mask: Array, mean: Array, std: Array) -> Array:
            key = jax.random.fold_in(key, view * len(MODALITIES) + MODALITIES.index(modality))
            return pixels.augment(modality, key, values, mask, mean, std, augment)

        per_sample = jax.vmap(one_view, in_axes=(None, 0, 0, 0, None, None))
        numbers = first + jnp.arange(values.shape[1], dtype=jnp.uint32)
        row = images["sensor"]
        values = jax.vmap(per_sample, in_axes=(0, None, 0, 0, 0, 0))(keys, numbers, values, mask, mean[row], std[row])
    return {**images, "values": values}


def normalize(images: Images, mean: Float[Array, "s c"], std: Float[Array, "s c"]) -> Float[Array, "b *v t h w c"]:
    """(values - mean) / std of each sample's sensor, in float32; 0 where `measured` says no.

    Works on a batch of views (b, v, t, h, w, c) and on plain sequences (b, t, h, w, c).
    """
    values = jnp.asarray(images["values"], jnp.float32)
    mean, std, row = jnp.asarray(mean), jnp.asarray(std), images["sensor"]
    spread = (row.shape[0],) + (1,) * (values.ndim - 2) + (-1,)
    normalized = (values - mean[row].reshape(spread)) / std[row].reshape(spread)
    return jnp.where(measured(images), normalized, 0)


def measured(images: Images) -> Bool[Array, "b *v t h w c"]:
    """Whether a value is one: a clear pixel of a valid date in a band that the source has, and finite."""
    values, bands = images["values"], images["bands"]
    there = images["clear"] & images["valid"][..., None, None]
    bands = bands.reshape(bands.shape[0], *(1,) * (values.ndim - 2), -1)
    return there[..., None] & bands & jnp.isfinite(values.astype(jnp.float32))
