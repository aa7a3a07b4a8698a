"""The decoder equals PyTorch's in float64, looks at nothing masked, and one word at a time equals all at once."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from quick import quick_jit
from test_text import double, fill_attention, fill_norm, linear_of

from skyjax.models import decoder
from skyjax.models.plain import bind

VOCABULARY, LENGTH, WIDTH, HEADS, DEPTH, IMAGE = 11, 6, 8, 2, 2, 6
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, VOCABULARY, (3, LENGTH)).astype(np.int32)
VALID = np.arange(LENGTH) < np.array([6, 3, 5])[:, None]
IMAGES = RNG.normal(0, 2, (3, 4, IMAGE)).astype(np.float32)
IMAGES_VALID = np.array([[True, True, False, True], [True] * 4, [False] * 4])


def config_of(tied=True, **model):
    part = {"vocabulary": VOCABULARY, "length": LENGTH, "width": WIDTH, "depth": DEPTH, "heads": HEADS, "tied": tied}
    base = {"dtype": "float32", "scan": True, "remat": "none", "spatial_width": 9, "fusion": {"width": IMAGE}}
    return ml_collections.ConfigDict(base | model | {"decoder": part})


def random_params(config, scale=0.3, seed=1):
    rng = np.random.default_rng(seed)
    params = decoder.init(config, jax.random.key(0))
    return jax.tree.map(lambda leaf: (leaf + rng.normal(0, scale, leaf.shape)).astype(np.float32), params)


def logits(config, params, tokens=TOKENS, valid=VALID, images=IMAGES, images_valid=IMAGES_VALID):
    def run(params):
        return decoder.logits(config, params, decoder.features(config, params, tokens, valid, images, images_valid))

    return np.asarray(quick_jit(run)(params))


def torch_logits(params, tied):
    """By torch.nn.TransformerDecoder."""
    layer = torch.nn.TransformerDecoderLayer(
        WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", decoder.EPSILON, batch_first=True, norm_first=True, dtype=torch.float64
    )
    model = torch.nn.TransformerDecoder(layer, DEPTH)
    for i, block in enumerate(model.layers):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        fill_attention(block.self_attn, own["attention"])
        fill_attention(block.multihead_attn, own["cross"])
        for name in ("norm1", "norm2", "norm3"):
            fill_norm(getattr(block, name), own[name])
        for module, name in ((block.linear1, "up"), (block.linear2, "down")):
            module.weight.data, module.bias.data = linear_of(own["feed_forward"][name])

    def normed(x, norm):
        return torch.nn.functional.layer_norm(
            x, x.shape[-1:], double(norm["scale"]), double(norm["bias"]), decoder.EPSILON
        )

    weight, bias = linear_of(params["memory"])
    images = normed(double(IMAGES), params["memory_norm"]) @ weight.T + bias
    memory = torch.cat([double(params["extra_token"]).expand(3, 1, WIDTH), images], 1)
    hidden = torch.cat([torch.zeros(3, 1, dtype=torch.bool), torch.tensor(~IMAGES_VALID)], 1)
    x = double(params["tokens"]["table"])[torch.tensor(TOKENS).long()] + double(params["positions"])
    ahead = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    with torch.no_grad():
        x = model(x, memory, ahead, tgt_key_padding_mask=torch.tensor(~VALID), memory_key_padding_mask=hidden)
        table = params["tokens" if tied else "words"]["table"]
        return (normed(x, params["norm"]) @ double(table).T).numpy()


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_pytorch(tied):
    config = config_of(tied)
    params = random_params(config)
    got = logits(config, params)
    assert got.dtype == np.float32
    assert_allclose(got[VALID], torch_logits(params, tied)[VALID], atol=5e-5)


def test_nothing_masked_is_looked_at():
    config = config_of()
    params = random_params(config)
    want = logits(config, params)
    tokens = np.where(VALID, TOKENS, 10**6)
    images = np.where(IMAGES_VALID[..., None], IMAGES, np.nan)
    assert_allclose(logits(config, params, tokens, images=images)[VALID], want[VALID], atol=0)
    changed = TOKENS.copy()
    changed[:, 2] = (changed[:, 2] + 1) % VOCABULARY
    difference = np.abs(logits(config, params, changed) - want).max(-1)
    assert (difference[:, :2] == 0).all()
    assert (difference[:, 2] > 1e-4).all()


def test_the_image_matters_and_its_order_does_not():
    config = config_of()
    params = random_params(config)
    want = logits(config, params)
    order = [2, 0, 3, 1]
    turned = logits(config, params, images=IMAGES[:, order], images_valid=IMAGES_VALID[:, order])
    assert_allclose(turned[VALID], want[VALID], atol=1e-5)
    assert np.abs(logits(config, params, images=-IMAGES) - want)[:2].max() > 1e-2
    assert_allclose(logits(config, params, images=-IMAGES)[2], want[2], atol=0)  # an image without a valid place


def test_one_word_at_a_time_equals_all_at_once():
    config = config_of()
    params = random_params(config)
    want = logits(config, params, valid=np.ones_like(VALID))
    other = TOKENS[:, ::-1]
    want_other = logits(config, params, other, np.ones_like(VALID))

    @quick_jit
    def words(params):
        model = bind(decoder.Decoder, config, params)
        memory = model.remember(IMAGES, IMAGES_VALID, 2, LENGTH)
        rows = jnp.stack([TOKENS, other], axis=1)
        found = []
        for i in range(LENGTH):
            features, memory = model.step(memory, rows[:, :, i], jnp.int32(i))
            found.append(model.scores(features))
        return jnp.stack(found, axis=2)

    got = words(params)
    assert_allclose(got[:, 0], want, atol=2e-5)
    assert_allclose(got[:, 1], want_other, atol=2e-5)


def test_scan_and_remat_change_nothing():
    def gradient(**changes):
        config = config_of(**changes)
        params = random_params(config)

        def loss(params, images):
            return jnp.sum(decoder.features(config, params, TOKENS, VALID, images, IMAGES_VALID) ** 2)

        return quick_jit(jax.grad(loss, argnums=(0, 1)))(params, IMAGES)

    want = gradient()
    assert jnp.abs(want[1]).max() > 1e-3
    assert (np.asarray(want[1])[~IMAGES_VALID] == 0).all()
    for changes in ({"scan": False}, {"remat": "full"}):
        jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-3, atol=1e-4), gradient(**changes), want)


def test_a_text_too_long_is_refused():
    config = config_of()
    longer = np.zeros((3, LENGTH + 1), np.int32)
    with pytest.raises(ValueError, match=r"texts of 7 tokens; model.decoder.length is 6"):
        decoder.features(config, random_params(config), longer, longer == 0, IMAGES, IMAGES_VALID)
