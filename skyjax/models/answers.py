"""Answers from a closed set: what an image and a question have in common, and a small network on it.

Both are projected to one width and multiplied (RSVQA, Lobry et al. 2020, section IV), with a norm before, since image
features have any length. The set of answers belongs to whoever calls: position k of the logits is its k-th answer.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from skyjax.models.layers import LayerNorm, Linear, Place, as_they_lie, gelu
from skyjax.models.plain import Config, Params, bind, fresh

EPSILON = 1e-6


def init(model_config: Config, key: jax.Array) -> Params:
    """Fresh float32 parameters of `model.answers`."""
    return fresh(AnswerHead, model_config, key)


def apply(
    model_config: Config, params: Params, pooled: Float[Array, "b c"], question: Float[Array, "b d"]
) -> Float[Array, "b k"]:
    """Logits of each answer, float32.

    Args:
      model_config: `config.model`, with `text` and `answers`: {"count": answers, "width": of the common space}.
      params: as `init` gives them.
      pooled: the image's "pooled" features.
      question: the text tower's "pooled" features of the question.
    """
    return bind(AnswerHead, model_config, params)(pooled, question)


class AnswerHead(nnx.Module):
    """As the module's docstring says."""

    def __init__(self, config: Config, rngs: nnx.Rngs, place: Place = as_they_lie):
        dtype, width = jnp.dtype(config.dtype), config.answers.width
        image_width = config.spatial_width if config.fusion is None else config.fusion.width
        self.image_norm = LayerNorm(image_width, EPSILON, rngs)
        self.image = Linear(image_width, width, dtype, rngs)
        self.question_norm = LayerNorm(config.text.width, EPSILON, rngs)
        self.question = Linear(config.text.width, width, dtype, rngs)
        self.hidden = Linear(width, width, dtype, rngs)
        self.out = Linear(width, config.answers.count, dtype, rngs)

    def __call__(self, pooled: Float[Array, "b c"], question: Float[Array, "b d"]) -> Float[Array, "b k"]:
        """As `apply`."""
        common = jnp.tanh(self.image(self.image_norm(pooled))) * jnp.tanh(self.question(self.question_norm(question)))
        return self.out(gelu(self.hidden(common))).astype(jnp.float32)
