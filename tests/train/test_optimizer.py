"""AdamW, its schedules and its multipliers against a float64 loop."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from numpy.testing import assert_allclose

from skyjax.errors import UserError
from skyjax.train import optimizer

RATES = (("heads/.*", 0.5), ("encoder/sar/.*", 0.0), ("encoder/(?!sar/).*", 1.0))
DECAYS = ((".*/bias", 0.0), (".*/kernel", 2.0))


def make_config(**changes):
    config = ml_collections.ConfigDict({"steps": 30, "optimizer": {}})
    config.optimizer.update(
        learning_rate=0.02, final_learning_rate=0.001, warmup_steps=5, weight_decay=0.1, b1=0.9, b2=0.99, clip=1.5,
        learning_rate_multipliers=RATES, weight_decay_multipliers=DECAYS, teacher_momentum=0.9,
    )  # fmt: skip
    config.optimizer.update(changes)
    return config


def make_params(rng):
    return {
        "encoder": {
            "optical": {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)},
            "sar": {"kernel": rng.normal(size=(2, 2))},
        },
        "heads": {"fused": {"kernel": rng.normal(size=(4, 2))}},
    }


def hand_rate(step, steps=30, warmup=5, peak=0.02, final=0.001):
    if step < warmup:
        return peak * (step + 1) / warmup
    return final + (peak - final) * (1 + np.cos(np.pi * (step - warmup) / (steps - 1 - warmup))) / 2


def hand_adamw(params, all_gradients, b1=0.9, b2=0.99, clip=1.5, decay=0.1, eps=1e-8):
    """Loshchilov and Hutter's algorithm 2, parameter by parameter, in float64."""
    params = {k: np.array(v, np.float64) for k, v in params.items()}
    first, second = ({k: np.zeros_like(v) for k, v in params.items()} for _ in range(2))
    for step, gradients in enumerate(all_gradients):
        trained = {k: g for k, g in gradients.items() if not k.startswith("encoder/sar")}
        norm = np.sqrt(sum((g**2).sum() for g in trained.values()))
        for k, g in trained.items():
            g = g * min(1, clip / norm)
            first[k] = b1 * first[k] + (1 - b1) * g
            second[k] = b2 * second[k] + (1 - b2) * g**2
            update = (first[k] / (1 - b1 ** (step + 1))) / (np.sqrt(second[k] / (1 - b2 ** (step + 1))) + eps)
            rate = hand_rate(step) * (0.5 if k.startswith("heads") else 1)
            params[k] = params[k] - rate * (update + decay * (0 if k.endswith("bias") else 2) * params[k])
    return params


def flat(tree):
    return {optimizer.path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_adamw_equals_the_float64_loop():
    rng = np.random.default_rng(0)
    config, params = make_config(), jax.tree.map(jnp.float32, make_params(rng))
    start, all_gradients = flat(params), [make_params(rng) for _ in range(12)]
    tx = optimizer.make_optimizer(config, params)
    state = tx.init(params)
    for step, gradients in enumerate(all_gradients):
        direction, state = tx.update(jax.tree.map(jnp.float32, gradients), state, params)
        params = optimizer.descend(params, direction, optimizer.learning_rate(config, step))
    want = hand_adamw(start, [flat(g) for g in all_gradients])
    for path, value in flat(params).items():
        assert_allclose(value, want[path], atol=2e-6, err_msg=path)
    assert_allclose(flat(params)["encoder/sar/kernel"], start["encoder/sar/kernel"], atol=0)


def test_schedules_by_hand():
    config = make_config()
    got = [float(optimizer.learning_rate(config, step)) for step in range(30)]
    assert_allclose(got, [hand_rate(step) for step in range(30)], rtol=1e-5)
    assert_allclose(got[-1], 0.001, rtol=1e-6)
    momentum = [float(optimizer.teacher_momentum(config, step)) for step in (0, 15, 30, 99)]
    assert_allclose(momentum, [0.9, 0.95, 1, 1], rtol=1e-6)
    config = make_config(final_teacher_momentum=0.98)
    momentum = [float(optimizer.teacher_momentum(config, step)) for step in (0, 15, 30, 99)]
    assert_allclose(momentum, [0.9, 0.94, 0.98, 0.98], rtol=1e-6)


def test_warm_up_longer_than_the_run_is_cut():
    config = make_config(warmup_steps=100)
    got = [float(optimizer.learning_rate(config, step)) for step in range(30)]
    assert np.all(np.diff(got) > 0)
    assert_allclose(got[-1], 0.02, rtol=1e-6)


@pytest.mark.parametrize(
    ("rules", "found"),
    [
        ((("encoder/.*", 1.0),), "matches none"),
        ((("encoder/.*", 1.0), ("heads/.*", 1.0), (".*fused.*", 2.0)), 'matches "heads/.*" and ".*fused.*"'),
        ((("encoder/.*", 1.0), ("heads/fused", 1.0)), "matches none"),  # the whole path, not its beginning
    ],
)
def test_every_parameter_matches_exactly_one_rule(rules, found):
    config = make_config(learning_rate_multipliers=rules)
    with pytest.raises(UserError, match="heads/fused/kernel") as error:
        optimizer.make_optimizer(config, make_params(np.random.default_rng(0)))
    assert found in str(error.value)
    assert "optimizer.learning_rate_multipliers" in str(error.value)
