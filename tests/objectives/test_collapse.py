"""A toy that collapses when nothing holds it apart, and the loop's own alarm on it, with the sample config's limits."""

import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from skyjax.config import load_config
from skyjax.objectives import distillation, heads, spread
from skyjax.objectives.distillation import Rows
from skyjax.train.metrics import Journal

B, WIDTH, HIDDEN = 64, 16, 32
STEPS = 200
SAMPLE_CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "pretrain_sample.py"


def train(*, guarded: bool):
    """Ranks and spreads of the teacher's features a step.

    A network of two layers on noisy views of random points, teacher by moving average. Rate and weight decay are so
    strong that without balancing and spread all features become one within half of the steps.
    """
    config = ml_collections.ConfigDict(
        {
            "kind": "dino",
            "classes": 32,
            "head_hidden": 32,
            "head_bottleneck": 16,
            "student_temperature": 0.1,
            "sinkhorn_iterations": 3 if guarded else 0,
            "chunk": 1024,
            "weights": {"pixel": 0.0, "object": 0.0, "image": 1.0, "alignment": 0.0, "spread": 0.1 * guarded},
        }
    )
    model = ml_collections.ConfigDict({"modalities": {}, "spatial_width": WIDTH, "fusion": {"width": WIDTH}})
    first, second, head, run = jax.random.split(jax.random.key(0), 4)
    params = {
        "first": {"kernel": jax.random.normal(first, (WIDTH, HIDDEN)) / 4, "bias": jnp.zeros(HIDDEN)},
        "second": {"kernel": jax.random.normal(second, (HIDDEN, WIDTH)) / 6, "bias": jnp.zeros(WIDTH)},
        "head": heads.init_heads(config, model, head)["fused"]["image"],
    }
    optimizer = optax.adamw(0.1, weight_decay=1.0)
    everything = jnp.ones(B, bool)

    def encode(params, x):
        x = jax.nn.gelu(x @ params["first"]["kernel"] + params["first"]["bias"])
        return x @ params["second"]["kernel"] + params["second"]["bias"]

    def loss(params, teacher, mine, other):
        features = encode(params, mine)
        rows = Rows(features[:, None], encode(teacher, other)[:, None], jnp.ones((B, 1)), jnp.float32(B))
        keys = jax.random.split(run, B)
        total = distillation.distil(
            rows, params["head"], teacher["head"], config=config, teacher_temperature=0.05, keys=keys
        )
        apart, count = spread.koleo(features, everything)
        return total / rows.counted + config.weights.spread * apart / count

    def step(carry, key):
        params, teacher, state = carry
        points, *noise = jax.random.normal(key, (3, B, WIDTH))
        features = encode(teacher, points)
        watched = spread.effective_rank(features, everything), spread.spread(features, everything)
        gradient = jax.grad(loss)(params, teacher, points + noise[0], points + noise[1])
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        teacher = jax.tree.map(lambda t, p: 0.9 * t + 0.1 * p, teacher, params)
        return (params, teacher, state), watched

    start = (params, params, optimizer.init(params))
    _, watched = jax.jit(lambda: jax.lax.scan(step, start, jax.random.split(run, STEPS)))()
    return [np.asarray(x) for x in watched]


@pytest.mark.parametrize("guarded", [False, True])
def test_the_alarm_goes_off_without_balancing_and_spread_and_is_silent_with_them(guarded, tmp_path, capfd):
    ranks, spreads = train(guarded=guarded)

    def alarms(*overrides):
        config = load_config(SAMPLE_CONFIG, [f"steps={STEPS}", *overrides])
        with Journal(config, tmp_path, 0, 0.0) as journal:
            for i in range(STEPS):
                values = {"loss": 1.0, "skipped": 0, "nonfinite_in_a_row": 0}
                journal.log(i + 1, values | {"bad_samples": 0, "rank/fused": ranks[i], "spread/fused": spreads[i]})
            journal.finish()
        return " ".join(capfd.readouterr().err.split()).count("features collapse")

    assert alarms() == (not guarded)
    assert alarms("objective.spread_alarm=1e-12") == (not guarded)
    # Not by a hair: either all features are one, or they fill more of the space than they did at the start.
    assert ranks[-5:].mean() > ranks[:5].mean() if guarded else ranks[-5:].max() < 1.1, (ranks[:5], ranks[-5:])
