"""Pixel augmentation on the device: colour, blur and solarisation of optical images, speckle and gain of SAR.

In: one view's normalised pixels of one modality with their mask, a key that belongs to (seed, sample, view, modality).
Out: pixels of the same shape. Every date of a view gets the same draw, but speckle: a site's time series stays one.

It works on normalised values. Contrast, saturation and blur are the same there as in stored units. A share of a
sensor's valid range would mean something for 8-bit images only, since 11- and 16-bit sensors fill a small part of
theirs; the sensor's mean and std fit all. With ImageNet's statistics, mid-grey of 8 bit is 0.07 std above the mean,
so solarisation above the mean is what DINO does with 8-bit images. Brightness is a gain in stored units, as
illumination is.
"""

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from skyjax.errors import UserError

# Pixels, of the Gaussian's standard deviation: from nothing to what still leaves a field boundary.
BLUR = (0.1, 1.5)

_SHARES = ("brightness", "band_gain", "contrast", "saturation", "blur", "solarize")
_DECIBELS = ("speckle", "gain")


def check(config: ml_collections.ConfigDict) -> None:
    """Refuses strengths and probabilities out of range with a UserError; see the config's `data.augment`."""
    for key in _SHARES:
        if not 0 <= config.get(key, 0.0) <= 1:
            raise UserError(f"config: data.augment.{key} is {config[key]}; set it between 0 (off) and 1")
    for key in _DECIBELS:
        if config[key] < 0:
            raise UserError(f"config: data.augment.{key} is {config[key]}; set it to 0 (off) or more dB")


def augment(
    modality: str,
    key: PRNGKeyArray,
    values: Float[Array, "t h w c"],
    mask: Bool[Array, "t h w c"],
    mean: Float[Array, "c"],
    std: Float[Array, "c"],
    config: ml_collections.ConfigDict,
) -> Float[Array, "t h w c"]:
    """One view of one modality; multispectral images keep the reflectance that they were corrected to.

    Args:
      modality: decides what is done.
      key: all draws come from it.
      values: normalised, 0 where `mask` is False.
      mask: what was measured. Elsewhere the result is 0, and nothing of it enters a mean or a blur.
      mean: of the sensor's bands, in its unit.
      std: likewise.
      config: the config's `data.augment`; a strength or probability of 0 leaves the pixels bit for bit.
    """
    if modality == "optical":
        values = _optical(key, values, mask, mean / std, config)
    elif modality == "sar":
        values = _sar(key, values, std, config)
    return jnp.where(mask, values, 0)


def _optical(
    key: PRNGKeyArray,
    values: Float[Array, "t h w c"],
    mask: Bool[Array, "t h w c"],
    zero: Float[Array, "c"],
    config: ml_collections.ConfigDict,
) -> Float[Array, "t h w c"]:
    """Colour, then blur, then solarisation; `zero` is how far below the mean the unit's zero lies, in std."""
    brightness, contrast, saturation, blur, sigma, solarize = jax.random.uniform(key, (6,))
    if config.brightness:
        values = _factor(brightness, config.brightness) * (values + zero) - zero
    if strength := config.get("band_gain"):
        # Haze and calibration: without it two views are told to belong together by their exact hue.
        gain = _factor(jax.random.uniform(jax.random.fold_in(key, 1), zero.shape), strength)
        values = gain * (values + zero) - zero
    if config.contrast:
        centre = _mean(values, mask, axis=(1, 2, 3))
        values = centre + _factor(contrast, config.contrast) * (values - centre)
    if config.saturation:
        grey = _mean(values, mask, axis=3)
        values = grey + _factor(saturation, config.saturation) * (values - grey)
    if config.blur:
        blurred = _blurred(values, mask, BLUR[0] + sigma * (BLUR[1] - BLUR[0]))
        values = jnp.where(blur < config.blur, blurred, values)
    if config.solarize:
        values = jnp.where(solarize < config.solarize, -jnp.abs(values), values)
    return values


def _sar(
    key: PRNGKeyArray, values: Float[Array, "t h w c"], std: Float[Array, "c"], config: ml_collections.ConfigDict
) -> Float[Array, "t h w c"]:
    """Speckle multiplies the power and a calibration error is a factor: both are added in dB."""
    speckle, gain = jax.random.split(key)
    if config.speckle:
        values = values + config.speckle * jax.random.normal(speckle, values.shape) / std
    if config.gain:
        values = values + jax.random.uniform(gain, minval=-config.gain, maxval=config.gain) / std
    return values


def _factor(draw: Float[Array, "*c"], strength: float) -> Float[Array, "*c"]:
    """Draws from [0, 1) as factors from 1 - strength to 1 + strength."""
    return 1 + strength * (2 * draw - 1)


def _mean(values: Float[Array, "t h w c"], mask: Bool[Array, "t h w c"], axis: int | tuple[int, ...]) -> Array:
    count = jnp.maximum(jnp.sum(mask, axis=axis, keepdims=True), 1)
    return jnp.sum(jnp.where(mask, values, 0), axis=axis, keepdims=True) / count


def _blurred(
    values: Float[Array, "t h w c"], mask: Bool[Array, "t h w c"], sigma: Float[Array, ""]
) -> Float[Array, "t h w c"]:
    """A Gaussian mean of what was measured. As matrix products, so that `sigma` may differ between samples."""
    _, h, w, _ = values.shape
    rows, columns = _gaussian(h, sigma), _gaussian(w, sigma)

    def smooth(image: Array) -> Array:
        return jnp.einsum("ih,thwc,jw->tijc", rows, image, columns, precision=jax.lax.Precision.HIGHEST)

    weight = smooth(mask.astype(values.dtype))
    return smooth(jnp.where(mask, values, 0)) / jnp.maximum(weight, 1e-6)


def _gaussian(size: int, sigma: Float[Array, ""]) -> Float[Array, "size size"]:
    distance = jnp.arange(size)[:, None] - jnp.arange(size)
    return jax.nn.softmax(-0.5 * (distance / sigma) ** 2, axis=1)
