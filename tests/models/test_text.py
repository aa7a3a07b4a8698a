"""The text tower equals PyTorch's transformer in float64, and padding, order and masks do what they say."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from quick import quick_jit

from skyjax.errors import UserError
from skyjax.models import text

VOCABULARY, LENGTH, WIDTH, HEADS, DEPTH, EMBED = 20, 7, 8, 2, 2, 5
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, VOCABULARY, (4, LENGTH)).astype(np.int32)
VALID = np.arange(LENGTH) < np.array([7, 4, 1, 5])[:, None]


def config_of(**changes):
    part = text.preset("clip-b", VOCABULARY, width=WIDTH, heads=HEADS, depth=DEPTH, embed_dim=EMBED, length=LENGTH)
    model = {"dtype": "float32", "scan": True, "remat": "none"}
    model |= {key: changes.pop(key) for key in list(changes) if key in model}
    return ml_collections.ConfigDict(model | {"text": part | changes})


def random_params(config, seed=1):
    """Every parameter away from 0 and 1, biases and norms too."""
    rng = np.random.default_rng(seed)
    params = text.init(config, jax.random.key(0))
    return jax.tree.map(lambda leaf: (leaf + rng.normal(0, 0.3, leaf.shape)).astype(np.float32), params)


def run(config, params, tokens=TOKENS, valid=VALID, **more):
    return quick_jit(lambda params: text.apply(config, params, jnp.asarray(tokens), jnp.asarray(valid), **more))(params)


def double(x):
    return torch.tensor(np.asarray(x, np.float64))


def linear_of(dense):
    """PyTorch's weight and bias."""
    return double(dense["kernel"]).T, double(dense["bias"])


def fill_attention(module, attention):
    """PyTorch's MultiheadAttention from query, key, value and out."""
    parts = [linear_of(attention[name]) for name in ("query", "key", "value")]
    module.in_proj_weight.data = torch.cat([weight for weight, _ in parts])
    module.in_proj_bias.data = torch.cat([bias for _, bias in parts])
    module.out_proj.weight.data, module.out_proj.bias.data = linear_of(attention["out"])


def fill_norm(module, norm):
    module.weight.data, module.bias.data = double(norm["scale"]), double(norm["bias"])


def torch_features(params, causal):
    """What `text.apply` calls "tokens", by torch.nn.TransformerEncoder."""
    layer = torch.nn.TransformerEncoderLayer(
        WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", text.EPSILON, batch_first=True, norm_first=True, dtype=torch.float64
    )
    encoder = torch.nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False).train()  # eval has a fast path
    for i, block in enumerate(encoder.layers):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        fill_attention(block.self_attn, own["attention"])
        fill_norm(block.norm1, own["norm1"])
        fill_norm(block.norm2, own["norm2"])
        for module, name in ((block.linear1, "up"), (block.linear2, "down")):
            module.weight.data, module.bias.data = linear_of(own["feed_forward"][name])
    x = double(params["tokens"]["table"])[torch.tensor(TOKENS).long()] + double(params["positions"])
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1) if causal else None
    x = encoder(x, mask=hidden, src_key_padding_mask=torch.tensor(~VALID))
    norm = params["norm"]
    return torch.nn.functional.layer_norm(x, (WIDTH,), double(norm["scale"]), double(norm["bias"]), text.EPSILON)


def torch_pool(params, x, pool):
    if pool == "last":
        return torch.stack([row[valid.sum() - 1] for row, valid in zip(x, VALID, strict=True)])
    if pool == "mean":
        return torch.stack([row[:count].mean(0) for row, count in zip(x, VALID.sum(1).tolist(), strict=True)])
    own = params["pool"]
    attention = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64)
    fill_attention(attention, own["attention"])
    query = double(own["extra_token"]).expand(len(x), 1, WIDTH)
    gathered = attention(query, x, x, key_padding_mask=torch.tensor(~VALID))[0][:, 0]
    norm = own["norm"]
    (up, up_bias), (down, down_bias) = (linear_of(own["feed_forward"][name]) for name in ("up", "down"))
    y = torch.nn.functional.layer_norm(gathered, (WIDTH,), double(norm["scale"]), double(norm["bias"]), text.EPSILON)
    return gathered + torch.nn.functional.gelu(y @ up.T + up_bias) @ down.T + down_bias


@pytest.mark.parametrize(("causal", "pool"), [(True, "last"), (False, "query"), (False, "mean")])
def test_features_are_those_of_pytorch(causal, pool):
    config = config_of(causal=causal, pool=pool)
    params = random_params(config)
    got = run(config, params)
    with torch.no_grad():
        want = torch_features(params, causal)
        pooled = torch_pool(params, want, pool)
        embedding = pooled @ double(params["projection"]["kernel"])
    assert_allclose(np.where(VALID[..., None], got["tokens"], 0), np.where(VALID[..., None], want, 0), atol=2e-5)
    assert_allclose(got["pooled"], pooled, atol=2e-5)
    assert_allclose(got["embedding"], embedding, atol=5e-5)
    assert got["embedding"].shape == (4, EMBED)


@pytest.mark.parametrize(("causal", "pool"), [(True, "last"), (False, "query"), (False, "mean")])
def test_padding_changes_nothing(causal, pool):
    config = config_of(causal=causal, pool=pool)
    params = random_params(config)
    want = run(config, params)
    other = np.where(VALID, TOKENS, 10**6)  # not even in the table
    assert_allclose(run(config, params, other)["embedding"], want["embedding"], atol=0)
    short = run(config, params, TOKENS[:, :5], VALID[:, :5])["embedding"]
    assert_allclose(short[1:], want["embedding"][1:], atol=1e-6)
    nothing = run(config, params, TOKENS, np.zeros_like(VALID))
    assert all(np.isfinite(leaf).all() for leaf in nothing.values())


def test_a_causal_token_knows_nothing_of_those_behind_it():
    for causal in (True, False):
        config = config_of(causal=causal)
        params = random_params(config)
        valid = np.ones_like(VALID)
        changed = TOKENS.copy()
        changed[:, 4] = (changed[:, 4] + 1) % VOCABULARY
        difference = np.abs(run(config, params, changed, valid)["tokens"] - run(config, params, valid=valid)["tokens"])
        assert difference[:, 4:].max(axis=(0, 2)).min() > 1e-4
        assert (difference[:, :4].max() == 0) == causal


def test_scan_and_remat_change_nothing():
    def gradient(**changes):
        config = config_of(**changes)
        params = random_params(config)
        return quick_jit(jax.grad(lambda params: jnp.sum(text.apply(config, params, TOKENS, VALID)["embedding"] ** 2)))(
            params
        )

    want = gradient()
    assert max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(want)) > 0.1
    for changes in ({"scan": False}, {"remat": "full"}):
        jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient(**changes), want)


def test_bfloat16_is_near():
    config, half = config_of(), config_of(dtype="bfloat16")
    params = text.init(config, jax.random.key(0))
    got = run(half, params)
    assert got["tokens"].dtype == jnp.bfloat16
    assert got["embedding"].dtype == jnp.float32
    want = run(config, params)["embedding"]
    assert np.abs(got["embedding"] - want).max() < 0.02 * np.abs(want).max()


def test_presets_have_the_published_sizes():
    """CLIP ViT-B/32 has 151,277,313 parameters: 87,849,216 of its image tower, a temperature, and these."""

    def count(name, vocabulary):
        model = config_of()
        model.text = text.preset(name, vocabulary)
        shapes = jax.eval_shape(lambda: text.init(model, jax.random.key(0)))
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    assert count("clip-b", 49_408) == 151_277_313 - 87_849_216 - 1
    layer = 12 * 1024**2 + 13 * 1024
    assert count("siglip-l", 32_000) == 24 * layer + (32_000 + 64 + 2) * 1024 + 1024**2


def test_mistakes_are_named():
    with pytest.raises(UserError, match='text preset "clipb" is not known; did you mean "clip-b"'):
        text.preset("clipb", 10)
    with pytest.raises(ValueError, match=r'model.text.pool is "first"; it is one of last, query, mean'):
        text.init(config_of(pool="first"), jax.random.key(0))
    config = config_of()
    with pytest.raises(ValueError, match=r"texts of 9 tokens; model.text.length is 7"):
        text.apply(config, random_params(config), jnp.zeros((1, 9), jnp.int32), jnp.ones((1, 9), bool))
