"""A module as functions of a plain nested dict of arrays: its parameters go out, and come back in when it is called.

The module is built from a config without arrays, once a process: whoever traces it many times pays for that once.
"""

import functools
import json
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import ml_collections
from flax import nnx

from skyjax.models.layers import Place, as_they_lie

Config: TypeAlias = ml_collections.ConfigDict | ml_collections.FrozenConfigDict
Params = dict[str, Any]
Build: TypeAlias = Callable[..., nnx.Module]  # (config.model, rngs, place) -> the module


def fresh(build: Build, config: Config, key: jax.Array) -> Params:
    """Parameters of a new module; can be traced by `jax.jit` and `jax.eval_shape`."""
    return nnx.to_pure_dict(nnx.state(build(config, nnx.Rngs(key)), nnx.Param))


def bind(build: Build, config: Config, params: Params, place: Place = as_they_lie) -> Any:
    """The module with these parameters, to be called.

    Args:
      build: what makes it.
      config: `config.model`.
      params: as `fresh` gives them.
      place: see models/layers.py, `Compute`.
    """
    graph, abstract = _structure(build, json.dumps(config.to_dict(), sort_keys=True), place)
    state = jax.tree.map(lambda leaf: leaf, abstract)  # a copy: the cached one must not be filled with tracers
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


@functools.lru_cache(maxsize=64)
def _structure(build: Build, config_json: str, place: Place) -> tuple[Any, Any]:
    config = ml_collections.FrozenConfigDict(json.loads(config_json))
    return nnx.split(nnx.eval_shape(lambda: build(config, nnx.Rngs(0), place)))
