"""The convolutional stem against a plain float64 loop; missing bands; sizes that are no whole number of patches."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose
from scipy.special import erf

from skyjax.models.stem import Convolution, ConvStem, make_stem


def gelu(x):
    return x * (1 + erf(x / np.sqrt(2))) / 2


def convolve(image, layer, stride, padding):
    """A convolution in float64, one output at a time; zero outside."""
    kernel, bias = (np.asarray(part[...], np.float64) for part in (layer.kernel, layer.bias))
    padded = np.pad(image.astype(np.float64), ((padding, padding), (padding, padding), (0, 0)))
    size = len(kernel)
    rows, columns = ((side - size) // stride + 1 for side in padded.shape[:2])
    out = np.zeros((rows, columns, kernel.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            window = padded[stride * i : stride * i + size, stride * j : stride * j + size]
            out[i, j] = np.tensordot(window, kernel, 3) + bias
    return out


def residual_stage(x, stage):
    branch = convolve(gelu(convolve(x, stage.convolution0, 2, 1)), stage.convolution1, 1, 1)
    return gelu(convolve(x, stage.shortcut, 2, 0) + branch)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(2, 16, 32, 3)).astype(np.float32)


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_equals_the_loop(images, stride):
    layer = Convolution(3, 5, stride, 1.0, jnp.float32, nnx.Rngs(0))
    for image, features in zip(images, layer(jnp.asarray(images)), strict=True):
        assert_allclose(features, convolve(image, layer, stride, 1), atol=1e-5)


@pytest.mark.parametrize(("patch_size", "first", "stages"), [(2, 1, 1), (4, 2, 1), (16, 4, 2)])
def test_stem_equals_the_loop(images, patch_size, first, stages):
    stem = ConvStem(patch_size, 3, 8, jnp.float32, nnx.Rngs(0))
    x = gelu(convolve(images[0], stem.patches, first, 0))
    for i in range(stages):
        x = residual_stage(x, getattr(stem, f"stage{i}"))
    assert x.shape == (16 // patch_size, 32 // patch_size, 8)
    assert_allclose(stem(jnp.asarray(images[:1]))[0], x, atol=1e-5)


def test_a_missing_band_scales_up_the_others(images):
    stem = ConvStem(4, 3, 8, jnp.float32, nnx.Rngs(0))
    seen = images[:1] * np.array([1, 1, 0], np.float32)
    got = stem(jnp.asarray(seen), jnp.array([[True, True, False]]))
    stem.patches.kernel[...] = stem.patches.kernel[...] * 1.5
    assert_allclose(got, stem(jnp.asarray(seen)), atol=1e-5)


def test_any_size_is_padded_to_whole_patches(images):
    stem = ConvStem(4, 3, 8, jnp.float32, nnx.Rngs(0))
    cut = images[:, :7, :9]
    padded = np.pad(cut, ((0, 0), (0, 1), (0, 3), (0, 0)))
    assert_allclose(stem(jnp.asarray(cut)), stem(jnp.asarray(padded)), atol=1e-6)


def test_variance_neither_dies_nor_grows():
    images = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
    features = ConvStem(16, 3, 128, jnp.float32, nnx.Rngs(0))(jnp.asarray(images))
    assert 0.3 < float(features.std()) < 3


@pytest.mark.parametrize(
    ("kind", "patch_size", "width", "said"),
    [
        ("conv", 6, 8, "patch_size 6: a convolutional stem takes a power of two"),
        ("conv", 16, 6, "width 6: a convolutional stem of patch_size 16 halves it 2 times"),
        ("convolution", 4, 8, 'stem "convolution" is not known; it is one of patch, conv'),
    ],
)
def test_what_cannot_be_is_told(kind, patch_size, width, said):
    with pytest.raises(ValueError, match=said):
        make_stem(kind, patch_size, 3, width, jnp.float32, nnx.Rngs(0))
