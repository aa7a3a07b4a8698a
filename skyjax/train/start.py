"""Parameters from an earlier model: what a second stage, or a new task, starts from.

`config.start` is {"checkpoint": what `skyjax.load` reads, "parameters": regular expression over paths of parameters};
what matches and the earlier model has is taken over, as "encoder/(optical|fusion)/.*" or ".*". Text tower, decoder and
the projections to words ("heads/image_text/...") come with a run's checkpoint. To keep parts as they are, give them a
learning-rate multiplier of 0; so one sensor is aligned to words that others met before.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections

from skyjax.errors import UserError, nearest
from skyjax.models.parameters import leaves
from skyjax.train.pretrained import Pretrained
from skyjax.train.state import State

SHOWN = 5  # names in a message


def take_over(state: State, start: ml_collections.ConfigDict) -> State:
    """The state with earlier parameters, in student and teacher alike.

    Args:
      state: before the first step.
      start: `config.start`.

    Raises:
      UserError: the checkpoint cannot be read, nothing matches, or a parameter has another shape there.
    """
    earlier = dict(leaves(_parts(Pretrained.load(start.checkpoint))))
    paths = [path for path, _ in leaves(state["params"]) if re.fullmatch(start.parameters, path)]
    taken = [path for path in paths if path in earlier]
    if not taken:
        raise UserError(
            f'config: start.parameters "{start.parameters}" matches no parameter that "{start.checkpoint}" has'
            f"{nearest(start.parameters, earlier)}"
        )
    own = dict(leaves(state["params"]))
    other = [f"{p} {own[p].shape} (there {earlier[p].shape})" for p in taken if own[p].shape != earlier[p].shape]
    if other:
        more = f" and {len(other) - SHOWN} more" if len(other) > SHOWN else ""
        raise UserError(
            f'config: "{start.checkpoint}" has other shapes: {", ".join(other[:SHOWN])}{more}; name fewer in'
            " start.parameters, or make model alike"
        )

    def replace(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
        return {
            name: replace(value, f"{path}{name}/")
            if isinstance(value, Mapping)
            else jax.device_put(earlier[path + name], value.sharding, may_alias=False)
            if path + name in taken
            else value
            for name, value in tree.items()
        }

    # Buffers of their own: the state is donated.
    return {**state, "params": replace(state["params"]), "teacher": replace(state["teacher"])}


def _parts(model: Pretrained) -> dict[str, Any]:
    words = model.words
    if words is None:
        return {"encoder": model.params}
    return {"encoder": model.params, **words.params, "heads": {"image_text": words.head}}
