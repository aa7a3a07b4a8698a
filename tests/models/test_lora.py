import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from test_text import TOKENS, VALID, config_of, random_params

from skyjax.errors import UserError
from skyjax.models import lora, text
from skyjax.models.parameters import table

TARGETS = r"text/.*/(query|up)/kernel|text/projection/kernel"
CONFIG = config_of()
PARAMS = {"text": random_params(CONFIG)}


def grown(rank=2, targets=TARGETS):
    return lora.add(PARAMS, targets, rank=rank, key=jax.random.key(0))


@jax.jit
def embedding(params):
    return text.apply(CONFIG, params["text"], TOKENS, VALID)["embedding"]


def test_adapters_stand_beside_the_chosen_kernels_and_change_nothing():
    params = grown()
    new = {row.path: row.shape for row in table(params).rows}
    for row in table(PARAMS).rows:
        assert new.pop(row.path) == row.shape
    assert new == {
        "text/layers/attention/query/lora_a": (2, 8, 2),
        "text/layers/attention/query/lora_b": (2, 2, 8),
        "text/layers/feed_forward/up/lora_a": (2, 8, 2),
        "text/layers/feed_forward/up/lora_b": (2, 2, 32),
        "text/projection/lora_a": (8, 2),
        "text/projection/lora_b": (2, 5),
    }
    jax.tree.map(assert_array_equal, lora.merge(params, 3.0), PARAMS)


def test_merged_equals_the_adapter_as_a_layer_of_its_own():
    params, rng = grown(), np.random.default_rng(0)
    params["text"]["projection"]["lora_b"] = rng.normal(size=(2, 5)).astype(np.float32)
    up = params["text"]["layers"]["feed_forward"]["up"]
    up["lora_b"] = rng.normal(size=(2, 2, 32)).astype(np.float32)
    merged = lora.merge(params, 0.5)
    for i in range(2):
        x = rng.normal(size=(4, 8))
        want = x @ up["kernel"][i] + 0.5 * (x @ up["lora_a"][i]) @ up["lora_b"][i]
        assert_allclose(x @ merged["text"]["layers"]["feed_forward"]["up"]["kernel"][i], want, atol=1e-5)
    without = {"text": merged["text"] | {"projection": PARAMS["text"]["projection"]}}
    pooled = text.apply(CONFIG, without["text"], TOKENS, VALID)["pooled"]
    own = params["text"]["projection"]
    want = pooled @ own["kernel"] + 0.5 * (pooled @ own["lora_a"]) @ own["lora_b"]
    assert_allclose(embedding(merged), want, atol=1e-4)
    assert np.abs(embedding(merged) - embedding(PARAMS)).max() > 0.1


def test_an_up_head_has_several_output_axes():
    kernel = np.ones((6, 3, 3, 4), np.float32)
    params = lora.add({"cells": {"kernel": kernel}}, "cells/kernel", rank=2, key=jax.random.key(0))
    assert params["cells"]["lora_b"].shape == (2, 3, 3, 4)
    params["cells"]["lora_b"] = up = np.random.default_rng(0).normal(size=(2, 3, 3, 4))
    want = 1 + 2 * np.einsum("ir,rabc->iabc", params["cells"]["lora_a"], up)
    assert_allclose(lora.merge(params, 2.0)["cells"]["kernel"], want, atol=1e-5)


def test_gradients_reach_both_factors():
    params = grown(targets="text/projection/kernel")
    gradient = jax.grad(lambda params: jnp.sum(embedding(lora.merge(params, 1.0)) ** 2))(params)["text"]["projection"]
    assert np.abs(gradient["lora_b"]).max() > 1e-3
    assert (gradient["lora_a"] == 0).all()  # as long as lora_b is zero
    params["text"]["projection"]["lora_b"] = jnp.ones((2, 5))
    gradient = jax.grad(lambda params: jnp.sum(embedding(lora.merge(params, 1.0)) ** 2))(params)["text"]["projection"]
    assert np.abs(gradient["lora_a"]).max() > 1e-3


def test_a_draw_hangs_on_key_and_path_alone():
    every, one = grown(), grown(targets="text/projection/kernel")
    assert_array_equal(every["text"]["projection"]["lora_a"], one["text"]["projection"]["lora_a"])
    other = lora.add(PARAMS, TARGETS, rank=2, key=jax.random.key(1))
    assert (other["text"]["projection"]["lora_a"] != one["text"]["projection"]["lora_a"]).all()


@pytest.mark.parametrize(
    ("targets", "rank", "sentence"),
    [
        ("text/projektion/kernel", 2, 'did you mean "text/projection/kernel"'),
        (r"text/norm/.*", 2, r'"text/norm/bias" \(8,\) is no kernel of a linear layer'),
        (r"conv/kernel", 2, r'"conv/kernel" \(3, 3, 2, 4\) is no kernel of a linear layer'),
        (TARGETS, 0, "rank is 0; set it to 1 or more"),
    ],
)
def test_mistakes_are_named(targets, rank, sentence):
    params = PARAMS | {"conv": {"kernel": np.zeros((3, 3, 2, 4))}}
    with pytest.raises(UserError, match=sentence):
        lora.add(params, targets, rank=rank, key=jax.random.key(0))
