"""AdamW with warm-up and cosine, and multipliers by regular expression over parameter paths.

In: gradients and the step. Out: new parameters. Every schedule is a function of `state["step"]`, not of the optimizer's
own count: a skipped step moves the schedules on, and what is logged is what was used.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Float, Int

from skyjax.errors import UserError
from skyjax.parallel.sharding import path_name

Tree = Any


def learning_rate(config: ml_collections.ConfigDict, step: Int[Array, ""] | int) -> Float[Array, ""]:
    """Linear warm-up over `optimizer.warmup_steps`, then cosine to `optimizer.final_learning_rate` at the last step."""
    o = config.optimizer
    warmup = min(o.warmup_steps, config.steps)
    rising = o.learning_rate * (step + 1) / max(warmup, 1)
    falling = cosine(o.learning_rate, o.final_learning_rate, step - warmup, config.steps - 1 - warmup)
    return jnp.where(step < warmup, rising, falling)


def teacher_momentum(config: ml_collections.ConfigDict, step: Int[Array, ""] | int) -> Float[Array, ""]:
    """Share of the old teacher in the new one: cosine from `optimizer.teacher_momentum` to `final_teacher_momentum`.

    BYOL, section 3.3, ends at 1, the default here too. In a short run that leaves the teacher far behind.
    """
    return cosine(
        config.optimizer.teacher_momentum, config.optimizer.get("final_teacher_momentum", 1.0), step, config.steps
    )


def cosine(start: float, end: float, step: Int[Array, ""] | int, steps: int) -> Float[Array, ""]:
    """Half a cosine from `start` at step 0 to `end` at `steps` and after."""
    share = jnp.clip(jnp.asarray(step, jnp.float32) / max(steps, 1), 0, 1)
    return end + (start - end) * (1 + jnp.cos(jnp.pi * share)) / 2


def multipliers(params: Tree, rules: Sequence[tuple[str, float]], name: str) -> Tree:
    """The multiplier of every parameter.

    Args:
      params: nested dict of arrays, concrete or abstract.
      rules: (regular expression over the whole path, multiplier).
      name: config key of the rules, for the error.

    Raises:
      UserError: a parameter matches no rule or more than one.
    """

    def multiplier(path: Sequence[Any], leaf: Any) -> float:
        parameter = path_name(path)
        found = [(pattern, value) for pattern, value in rules if re.fullmatch(pattern, parameter)]
        if len(found) != 1:
            which = " and ".join(f'"{pattern}"' for pattern, _ in found) or "none"
            raise UserError(
                f'config: parameter "{parameter}" must match exactly one rule of {name}; it matches {which}'
                f" of {', '.join(repr(pattern) for pattern, _ in rules)}"
            )
        return float(found[0][1])

    return jax.tree_util.tree_map_with_path(multiplier, params)


def make_optimizer(config: ml_collections.ConfigDict, params: Tree) -> optax.GradientTransformation:
    """AdamW's descent direction without the learning rate; `descend` applies it.

    Gradients of frozen parameters (learning-rate multiplier 0) are zero before the norm is taken, so that they neither
    count for the clipping nor are computed. Loshchilov and Hutter, "Decoupled weight decay", algorithm 2.

    Raises:
      UserError: a parameter matches no rule or more than one.
    """
    o = config.optimizer
    rates = multipliers(params, o.learning_rate_multipliers, "optimizer.learning_rate_multipliers")
    decays = multipliers(params, o.weight_decay_multipliers, "optimizer.weight_decay_multipliers")

    def freeze(gradients: Tree, params: Tree) -> Tree:
        return jax.tree.map(lambda g, rate: g if rate else jnp.zeros_like(g), gradients, rates)

    def decay_and_scale(updates: Tree, params: Tree) -> Tree:
        return jax.tree.map(
            lambda u, p, rate, decay: rate * (u + o.weight_decay * decay * p), updates, params, rates, decays
        )

    return optax.chain(
        optax.stateless(freeze),
        optax.clip_by_global_norm(o.clip),
        optax.scale_by_adam(b1=o.b1, b2=o.b2),
        optax.stateless(decay_and_scale),
    )


def descend(params: Tree, direction: Tree, rate: Float[Array, ""]) -> Tree:
    """params - rate * direction."""
    return jax.tree.map(lambda p, d: p - rate * d, params, direction)
