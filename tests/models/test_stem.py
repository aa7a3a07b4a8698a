"""The convolutional stem against a plain float64 loop; missing bands; sizes that are no whole number of patches."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose
from scipy.special import erf

from skyjax.models.stem import Convolution, ConvStem


def convolve(image, kernel, bias):
    """3 x 3, stride 2, zero outside, one output at a time."""
    padded = np.pad(image.astype(np.float64), ((1, 1), (1, 1), (0, 0)))
    rows, columns = -(-image.shape[0] // 2), -(-image.shape[1] // 2)
    out = np.zeros((rows, columns, kernel.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            window = padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            out[i, j] = np.tensordot(window, kernel.astype(np.float64), 3) + bias
    return out


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)


def test_convolution_equals_the_loop(images):
    layer = Convolution(3, 5, jnp.float32, nnx.Rngs(0))
    got = layer(jnp.asarray(images))
    for image, features in zip(images, got, strict=True):
        assert_allclose(
            features, convolve(image, np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])), atol=1e-5
        )


def test_a_missing_band_scales_up_the_others(images):
    layer = Convolution(3, 5, jnp.float32, nnx.Rngs(0))
    seen = images * np.array([1, 1, 0], np.float32)
    got = layer(jnp.asarray(seen[:1]), jnp.array([[True, True, False]]))[0]
    bias = np.asarray(layer.bias[...])
    assert_allclose(got, (convolve(seen[0], np.asarray(layer.kernel[...]), bias) - bias) * 1.5 + bias, atol=1e-5)


def test_stem_is_two_convolutions_and_a_projection(images):
    stem = ConvStem(4, 3, 8, jnp.float32, nnx.Rngs(0))
    x = images[0]
    for layer in (stem.convolution0, stem.convolution1):
        x = convolve(x, np.asarray(layer.kernel[...]), np.asarray(layer.bias[...]))
        x = x * (1 + erf(x / np.sqrt(2))) / 2
    want = x @ np.asarray(stem.projection.kernel[...], np.float64) + np.asarray(stem.projection.bias[...])
    assert_allclose(stem(jnp.asarray(images[:1]))[0], want, atol=1e-5)


def test_any_size_is_padded_to_whole_patches(images):
    stem = ConvStem(4, 3, 8, jnp.float32, nnx.Rngs(0))
    cut = images[:, :7, :9]
    padded = np.pad(cut, ((0, 0), (0, 1), (0, 3), (0, 0)))
    assert_allclose(stem(jnp.asarray(cut)), stem(jnp.asarray(padded)), atol=1e-6)


def test_patch_size_must_be_a_power_of_two():
    with pytest.raises(ValueError, match="patch_size 6: a convolutional stem takes a power of two"):
        ConvStem(6, 3, 8, jnp.float32, nnx.Rngs(0))
