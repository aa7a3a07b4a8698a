import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from skyjax.objectives import distillation, heads, spread
from skyjax.objectives.distillation import Rows

B, WIDTH, HIDDEN = 64, 16, 32


@pytest.mark.parametrize("guarded", [False, True])
def test_features_collapse_without_balancing_and_spread_and_stay_apart_with_them(guarded):
    """A network of two layers on noisy views of random points, weight decay on, teacher by moving average."""
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
    optimizer = optax.adamw(0.03, weight_decay=0.3)
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
        rank = spread.effective_rank(encode(teacher, points), everything)
        gradient = jax.grad(loss)(params, teacher, points + noise[0], points + noise[1])
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        teacher = jax.tree.map(lambda t, p: 0.9 * t + 0.1 * p, teacher, params)
        return (params, teacher, state), rank

    start = (params, params, optimizer.init(params))
    _, ranks = jax.jit(lambda: jax.lax.scan(step, start, jax.random.split(run, 200)))()
    before, after = np.mean(ranks[:5]), np.mean(ranks[-5:])
    assert after > before if guarded else after < 0.8 * before, (before, after)
