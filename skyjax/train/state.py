"""What training carries from step to step: a plain nested dict of arrays.

    {"step": int32, "params": {"encoder", "heads"}, "teacher": {"encoder", "heads"}, "optimizer": optax state,
     "counters": {"skipped": int32, "nonfinite_in_a_row": int32}}

and, where the model has geo-prototypes, "prototypes": (regions, k, d) float32; where it reads and writes, "text" and
"decoder" beside the encoder. `step` counts the batches consumed,
those included whose update was skipped.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh
from jaxtyping import Array, Key

from skyjax.errors import UserError
from skyjax.models import lora, skysense
from skyjax.objectives import image_text
from skyjax.objectives.heads import init_heads, widths_of
from skyjax.parallel.sharding import state_shardings
from skyjax.train import reading
from skyjax.train.optimizer import make_optimizer

State = dict[str, Any]

# Set their draws apart from that of the encoder and the heads.
_TABLE, _TEXT, _LORA = 0x6E0, 0x7E87, 0x10A


def init(config: ml_collections.ConfigDict, key: Key[Array, ""]) -> State:
    """The state before the first step; the teacher starts as a copy of the student.

    Raises:
      UserError: a parameter does not match exactly one rule of the optimizer's multipliers.
    """
    params = init_params(config, key)
    table = skysense.init_prototypes(config.model, jax.random.fold_in(key, _TABLE))
    # Without prototypes there is no such key: checkpoints from before there were any can still be read.
    prototypes = {} if table is None else {"prototypes": table}
    return prototypes | {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        # Buffers of its own: the state is donated, and a buffer can be given away once.
        "teacher": jax.tree.map(jnp.copy, params),
        "optimizer": make_optimizer(config, params).init(params),
        "counters": {"skipped": jnp.zeros((), jnp.int32), "nonfinite_in_a_row": jnp.zeros((), jnp.int32)},
    }


def init_params(config: ml_collections.ConfigDict, key: Key[Array, ""]) -> dict[str, Any]:
    """Fresh parameters of encoder and heads, and of text tower and decoder where the model has them; float32.

    With `config.lora` ({"targets", "rank", "scale"}; models/lora.py) there are adapters among them.
    """
    encoder_key, heads_key = jax.random.split(key)
    heads = init_heads(config.objective, config.model, heads_key)
    if config.model.get("text"):
        text_key = jax.random.fold_in(key, _TEXT)
        head = image_text.init_head(config.objective, widths_of(config.model), config.model.text, text_key)
        heads |= {"image_text": head} if head else {}
    params = {
        "encoder": skysense.init(config.model, encoder_key),
        "heads": heads,
        **reading.init_params(config.model, jax.random.fold_in(key, _TEXT + 1)),
    }
    if config.get("lora"):
        return lora.add(params, config.lora.targets, rank=config.lora.rank, key=jax.random.fold_in(key, _LORA))
    return params


def merged(config: ml_collections.ConfigDict, params: dict[str, Any]) -> dict[str, Any]:
    """Parameters as models take them: without adapters, which are in the kernels that they move."""
    return lora.merge(params, config.lora.scale) if config.get("lora") else params


def abstract_params(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Shapes and types of `init_params`; nothing is allocated."""
    params: dict[str, Any] = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    return params


def abstract(config: ml_collections.ConfigDict) -> State:
    """Shapes and types of the state; nothing is allocated.

    Raises:
      UserError: as in `init`, or values of the model's config contradict each other.
    """
    try:
        return jax.eval_shape(lambda key: init(config, key), jax.random.key(config.seed))
    except UserError:
        raise
    except Exception as error:  # models know nothing of configs, and JAX refuses sizes in many ways
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"config: {reason[:300]}") from error


def create(config: ml_collections.ConfigDict, mesh: Mesh) -> State:
    """The state born sharded: no device ever holds an array that it will not keep."""
    shardings = state_shardings(abstract(config), mesh)
    # On the CPU, optimising the draws takes longer than drawing: it runs once. The numbers are the same.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    # The key is an argument, not a constant, or the compiler would draw every weight while compiling.
    draw = jax.jit(lambda key: init(config, key), out_shardings=shardings, compiler_options=options)
    return draw(jax.random.key(config.seed))
