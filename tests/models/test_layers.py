import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from skyjax.models.layers import Compute, LayerNorm, Linear, PatchEmbed, TransformerLayer, attend, drop_path, gelu


def test_attend_is_the_softmax_of_visible_keys():
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(2, n, 3, 4)) for n in (5, 6, 6))
    bias = rng.normal(size=(3, 5, 6))
    mask = rng.random((2, 6)) < 0.6
    mask[:, 0] = True
    want = np.zeros((2, 5, 3, 4))
    for b, q, a in np.ndindex(2, 5, 3):
        seen = np.flatnonzero(mask[b])
        scores = np.array([query[b, q, a] @ key[b, k, a] * 0.3 + bias[a, q, k] for k in seen])
        weights = np.exp(scores) / np.exp(scores).sum()
        want[b, q, a] = sum(weight * value[b, k, a] for weight, k in zip(weights, seen, strict=True))
    arrays = (jnp.asarray(x, jnp.float32) for x in (query, key, value))
    got = attend(*arrays, scale=0.3, bias=jnp.asarray(bias, jnp.float32), mask=jnp.asarray(mask)[:, None, None])
    assert_allclose(got, want, atol=1e-6)


def test_gradients_of_a_projection_are_those_of_its_formula():
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 3, 2, 5))
    graph, state = nnx.split(Linear(4, (2, 5), jnp.float32, nnx.Rngs(0)))

    def weighted(state, x):
        return jnp.sum(nnx.merge(graph, state)(x) * weights)

    got, got_x = jax.grad(weighted, argnums=(0, 1))(state, jnp.asarray(x, jnp.float32))
    assert_allclose(got.bias[...], weights.sum((0, 1)), rtol=1e-5, atol=1e-6)
    assert_allclose(got.kernel[...], np.einsum("bnd,bnij->dij", x, weights), rtol=1e-4, atol=1e-5)
    assert_allclose(got_x, np.einsum("dij,bnij->bnd", state.kernel[...], weights), rtol=1e-4, atol=1e-5)


def test_a_bias_gathers_its_gradient_in_float32():
    linear = Linear(2, 3, jnp.bfloat16, nnx.Rngs(0))
    graph, state = nnx.split(linear)
    rows = jnp.zeros((1000, 2))
    gradient = jax.grad(lambda state: jnp.sum(nnx.merge(graph, state)(rows).astype(jnp.float32)))(state)
    assert_array_equal(gradient.bias[...], 1000)  # a sum in bfloat16 would stop at 256


def test_patch_embed_is_a_strided_convolution_of_the_padded_image():
    embed = PatchEmbed(4, 3, 5, jnp.float32, nnx.Rngs(0))
    embed.bias[...] = jnp.arange(5.0)
    images = np.random.default_rng(0).normal(size=(2, 6, 9, 3)).astype(np.float32)
    got = embed(jnp.asarray(images))
    kernel = np.asarray(embed.kernel[...])
    padded = np.zeros((2, 8, 12, 3))
    padded[:, :6, :9] = images
    assert got.shape == (2, 2, 3, 5)
    for n, i, j in np.ndindex(2, 2, 3):
        patch = padded[n, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
        want = np.arange(5.0) + sum(patch[p, q] @ kernel[p, q] for p, q in np.ndindex(4, 4))
        assert_allclose(got[n, i, j], want, atol=1e-5)


def test_missing_bands_add_nothing_and_the_rest_is_scaled_up():
    embed = PatchEmbed(2, 4, 6, jnp.float32, nnx.Rngs(0))
    embed.bias[...] = jnp.arange(6.0)
    bands = np.array([[True, False, True, True], [True] * 4, [False] * 4])
    images = np.random.default_rng(0).normal(size=(3, 4, 4, 4)).astype(np.float32) * bands[:, None, None]
    got = embed(jnp.asarray(images), jnp.asarray(bands)) - jnp.arange(6.0)
    plain = embed(jnp.asarray(images)) - jnp.arange(6.0)
    assert_allclose(got[0], plain[0] * 4 / 3, rtol=1e-4, atol=1e-6)
    assert_array_equal(got[1], plain[1])
    assert_array_equal(got[2], 0)


def test_layer_norm_is_computed_in_float32_and_keeps_the_type():
    norm = LayerNorm(64, 1e-5, nnx.Rngs(0))
    x = np.random.default_rng(0).normal(300, 1, (4, 64))  # bfloat16 has steps of 2 here: a mean in it would be lost
    stored = jnp.asarray(x, jnp.bfloat16)
    exact = np.asarray(stored, np.float64)
    want = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-5)
    got = norm(stored)
    assert got.dtype == jnp.bfloat16
    assert_allclose(got.astype(jnp.float32), want, rtol=0.01)


def test_gelu_and_its_derivative_are_those_of_the_formula():
    x = np.linspace(-6, 6, 401)
    value, gradient = jax.jit(jax.vmap(jax.value_and_grad(gelu)))(jnp.asarray(x, jnp.float32))
    assert_allclose(value, x * scipy.stats.norm.cdf(x), atol=1e-6)
    assert_allclose(gradient, scipy.stats.norm.cdf(x) + x * scipy.stats.norm.pdf(x), atol=1e-6)
    half = gelu(jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16


def test_drop_path_drops_whole_rows_and_keeps_the_mean():
    branch = jnp.ones((4000, 2, 3))
    got = np.asarray(drop_path(branch, 0.25, jax.random.key(0)))
    assert set(np.unique(got).round(5)) == {0, np.float32(4 / 3).round(5)}
    assert (got == got[:, :1, :1]).all()
    assert abs(got.mean() - 1) < 4 * np.sqrt(1 / 3 / 4000)
    assert drop_path(branch, 0.25, None) is branch


def test_stochastic_depth_is_linear_and_off_without_a_key():
    compute = Compute(drop_path=0.3)
    assert_allclose(compute.rates(4), [0, 0.1, 0.2, 0.3], rtol=1e-6)
    assert compute.keys(None, 4) is None
    assert Compute(drop_path=0.0).keys(jax.random.key(0), 4) is None


def test_stochastic_depth_of_a_transformer_layer_spares_attention():
    layer = TransformerLayer(8, 2, 1e-5, jnp.float32, nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (6, 5, 8))
    dropped = layer(x, None, 1 - 1e-6, jax.random.key(1))
    whole = layer(x, None, 0.0, None)
    layer.feed_forward.down.kernel[...] = jnp.zeros((32, 8))
    attention_alone = layer(x, None, 0.0, None)
    assert_allclose(dropped, attention_alone, atol=1e-6)
    assert np.abs(whole - attention_alone).max() > 1e-4
    assert np.abs(x - attention_alone).max() > 1e-4


def test_queries_are_the_first_tokens_of_the_whole_result():
    layer = TransformerLayer(8, 2, 1e-5, jnp.float32, nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (3, 5, 8))
    mask = jnp.asarray([[True, True, False, True, False]] * 3)
    assert_allclose(layer(x, mask, 0.0, None, 2), layer(x, mask, 0.0, None)[:, :2], atol=1e-6)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match=r'model.remat is "some"'):
        Compute(remat="some")
    with pytest.raises(ValueError, match="width must be a multiple of heads"):
        TransformerLayer(8, 3, 1e-5, jnp.float32, nnx.Rngs(0))
