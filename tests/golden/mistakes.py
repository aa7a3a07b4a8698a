"""Mistakes that the goldens must show: a step lowered with each, in a process of its own."""

import functools
from typing import Any

import jax
import ml_collections
from jax.sharding import PartitionSpec

from skyjax.objectives import objective
from skyjax.parallel.sharding import RULES, state_shardings
from skyjax.train import loop, plan


def on_every_chip(config: ml_collections.ConfigDict, name: str, slices: int) -> Any:
    """The matrices that widen are whole on every chip."""
    rules = ((r".*/up/kernel", ()), *RULES)
    for module in (loop, plan):
        module.state_shardings = functools.partial(state_shardings, rules=rules)
    return plan.lower(config, name, slices)


def gathering_loss(config: ml_collections.ConfigDict, name: str, slices: int) -> Any:
    """Every chip computes the losses of all samples."""
    distil = objective.distil

    def gather(rows: Any, *heads: Any, **settings: Any) -> Any:
        whole = (jax.lax.with_sharding_constraint(x, PartitionSpec()) for x in rows)
        return distil(type(rows)(*whole), *heads, **settings)

    objective.distil = gather
    return plan.lower(config, name, slices)
