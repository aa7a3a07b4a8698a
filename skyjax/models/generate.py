"""Text from images: greedy, by beams, or drawn from the nucleus, batched, in one compiled loop of static shapes.

A row starts from its prompt, which is bos alone or a question (input/tokenizer.py, `encode_pairs`), and prompts may
differ in length. Position by position each row takes its prompt's token, else the chosen one; behind eos stands
padding. The loop ends when all rows have.
"""

import dataclasses
import functools
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from skyjax.models.decoder import Decoder, Memory
from skyjax.models.plain import Config, Params, bind

METHODS = ("greedy", "beam", "nucleus")


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How text is made.

    Attributes:
      bos, eos, pad: ids of the tokenizer.
      size: its number of ids; the table's rows beyond are never chosen. Nor are `pad` and `bos`.
      length: tokens a row, prompt, bos and eos included.
      method: "greedy", the likeliest token each time; "beam", the likeliest text among those that `beams` rows find;
        "nucleus", drawn from the likeliest tokens that together have the probability `p` (Holtzman et al. 2020).
      beams: rows an image.
      length_penalty: a text of m tokens, eos included, is ranked by log p / m ** length_penalty (method "beam").
      p, temperature: of the nucleus; the temperature divides the scores first.
    """

    bos: int
    eos: int
    pad: int
    size: int
    length: int
    method: str = "greedy"
    beams: int = 4
    length_penalty: float = 1.0
    p: float = 0.9
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f'decoding method is "{self.method}"; it is one of {", ".join(METHODS)}')
        if self.length < 2 or self.beams < 1 or self.p < 0 or not self.temperature > 0:
            raise ValueError(
                f"decoding has length {self.length}, beams {self.beams}, p {self.p}, temperature {self.temperature};"
                " they start at 2, 1, 0 and above 0"
            )


class Generated(NamedTuple):
    """Texts with their prompts.

    Attributes:
      tokens: ids, padding behind eos.
      written: which of them were chosen, eos included; the tokenizer decodes these.
      score: log probability of these.
    """

    tokens: Int32[Array, "b n"]
    written: Bool[Array, "b n"]
    score: Float[Array, " b"]


def generate(
    model_config: Config,
    params: Params,
    images: Float[Array, "b m c"],
    images_valid: Bool[Array, "b m"],
    decoding: Decoding,
    *,
    prompt: Int32[Array, "b l"] | None = None,
    prompt_valid: Bool[Array, "b l"] | None = None,
    key: PRNGKeyArray | None = None,
    numbers: Int32[Array, " b"] | None = None,
) -> Generated:
    """One text an image. Compiled once for each shape, config and `decoding`.

    Args:
      model_config: `config.model`, with `decoder`.
      params: the decoder's.
      images, images_valid: as `decoder.features` takes them.
      decoding: how.
      prompt, prompt_valid: first tokens of each row, the valid ones first, bos among them; None: bos.
      key: of the draws of the method "nucleus".
      numbers: of each image, by default its row. What is drawn for an image depends on key and number alone, not on
        what else is in the batch.

    Raises:
      ValueError: `decoding.length` is larger than `decoder.length` or smaller than the prompt, or the key is missing.
    """
    b = len(images)
    if prompt is None or prompt_valid is None:
        prompt, prompt_valid = jnp.full((b, 1), decoding.bos, jnp.int32), jnp.ones((b, 1), bool)
    longest = model_config.decoder.length
    if decoding.length > longest or prompt.shape[1] > decoding.length:
        raise ValueError(
            f"prompts of {prompt.shape[1]} tokens in texts of {decoding.length}; model.decoder.length is {longest}"
        )
    if key is None and decoding.method == "nucleus":
        raise ValueError("the method nucleus draws: give it a key")
    key = jax.random.key(0) if key is None else key
    numbers = jnp.arange(b) if numbers is None else numbers
    config_json = json.dumps(model_config.to_dict(), sort_keys=True)
    return _generate(params, images, images_valid, prompt, prompt_valid, key, numbers, config_json, decoding)


@functools.partial(jax.jit, static_argnames=("config_json", "decoding"))
def _generate(
    params: Params,
    images: Array,
    images_valid: Array,
    prompt: Array,
    prompt_valid: Array,
    key: PRNGKeyArray,
    numbers: Array,
    config_json: str,
    decoding: Decoding,
) -> Generated:
    model = bind(Decoder, ml_collections.FrozenConfigDict(json.loads(config_json)), params)
    rows = decoding.beams if decoding.method == "beam" else 1
    memory = model.remember(images, images_valid, rows, decoding.length)
    extra = ((0, 0), (0, decoding.length - prompt.shape[1]))
    there = jnp.pad(prompt_valid, extra)
    tokens = jnp.where(there, jnp.pad(prompt, extra), decoding.pad).astype(jnp.int32)
    choose = _beam_choice(decoding) if decoding.method == "beam" else _row_choice(decoding, key, numbers)

    def go_on(state: _State) -> Array:
        return (state.position < decoding.length - 1) & ~state.finished.all()

    def advance(state: _State) -> _State:
        position = state.position
        features, memory = model.step(state.memory, state.tokens[:, :, position], position)
        scores = _allowed(model.scores(features), decoding)
        given = there[:, position + 1]
        parent, token, score = choose(jax.nn.log_softmax(scores), state, position)
        # Where the prompt goes on, rows stay as they are and take its token.
        parent = jnp.where(given[:, None], jnp.arange(rows), parent)
        token = jnp.where(given[:, None], tokens[:, position + 1, None], token)
        finished = _of(state.finished, parent) | (~given[:, None] & (token == decoding.eos))
        if rows > 1:
            memory = memory._replace(key=_of_memory(memory.key, parent), value=_of_memory(memory.value, parent))
        written = _of(state.tokens, parent).at[:, :, position + 1].set(token)
        return _State(position + 1, written, jnp.where(given[:, None], state.score, score), finished, memory)

    first = jnp.where(jnp.arange(rows) == 0, 0.0, -jnp.inf)  # rows of an image start alike: one of them counts
    start = _State(
        jnp.int32(0),
        jnp.broadcast_to(tokens[:, None], (len(tokens), rows, decoding.length)),
        jnp.broadcast_to(first, (len(tokens), rows)),
        jnp.zeros((len(tokens), rows), bool),
        memory,
    )
    end = jax.lax.while_loop(go_on, advance, start)
    written = (end.tokens != decoding.pad) & ~there[:, None]
    size = jnp.maximum(written.sum(-1), 1)
    best = jnp.argmax(end.score / size**decoding.length_penalty, axis=1)[:, None]
    return Generated(*(_of(x, best)[:, 0] for x in (end.tokens, written, end.score)))


class _State(NamedTuple):
    """What the loop carries, r rows an image: tokens up to `position` are there."""

    position: Int32[Array, ""]
    tokens: Int32[Array, "b r n"]
    score: Float[Array, "b r"]
    finished: Bool[Array, "b r"]
    memory: Memory


def _allowed(scores: Float[Array, "b r k"], decoding: Decoding) -> Float[Array, "b r k"]:
    number = jnp.arange(scores.shape[-1])
    banned = (number == decoding.pad) | (number == decoding.bos) | (number >= decoding.size)
    return jnp.where(banned, -jnp.inf, scores)


def _row_choice(decoding: Decoding, key: PRNGKeyArray, numbers: Int32[Array, " b"]) -> Any:
    """(log probabilities, state, position) -> parents, tokens and scores where each row goes its own way."""
    keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)

    def choose(log_p: Float[Array, "b 1 k"], state: _State, position: Array) -> tuple[Array, Array, Array]:
        if decoding.method == "greedy":
            token = jnp.argmax(log_p, axis=-1)
        else:
            kept = _nucleus(log_p[:, 0] / decoding.temperature, decoding.p)
            drawn = jax.vmap(lambda key, kept: jax.random.categorical(jax.random.fold_in(key, position), kept))
            token = drawn(keys, kept)[:, None]
        told = jnp.take_along_axis(log_p, token[..., None], axis=-1)[..., 0]
        token = jnp.where(state.finished, decoding.pad, token)
        return jnp.zeros_like(token), token, state.score + jnp.where(state.finished, 0, told)

    return choose


def _nucleus(scores: Float[Array, "b k"], p: float) -> Float[Array, "b k"]:
    """Scores of the fewest likeliest tokens whose probabilities reach `p`, one at least; -inf for the others."""
    order = jnp.argsort(scores, axis=-1, descending=True, stable=True)
    probability = jax.nn.softmax(jnp.take_along_axis(scores, order, axis=-1))
    before = jnp.cumsum(probability, axis=-1) - probability
    kept = (before < p).at[:, 0].set(True)
    kept = jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(kept, scores, -jnp.inf)


def _beam_choice(decoding: Decoding) -> Any:
    """As `_row_choice`, where the best continuations of all rows of an image become its rows."""

    def choose(log_p: Float[Array, "b r k"], state: _State, position: Array) -> tuple[Array, Array, Array]:
        k = log_p.shape[-1]
        # A finished text goes on with padding alone, at no cost, and so competes with those that are being written.
        rest = jnp.where(jnp.arange(k) == decoding.pad, 0.0, -jnp.inf)
        log_p = jnp.where(state.finished[..., None], rest, log_p)
        score, chosen = jax.lax.top_k((state.score[..., None] + log_p).reshape(len(log_p), -1), decoding.beams)
        return chosen // k, chosen % k, score

    return choose


def _of(x: Array, parent: Int32[Array, "b r"]) -> Array:
    """`x` (b, r, ...) with each row replaced by its parent's."""
    return jnp.take_along_axis(x, parent.reshape(*parent.shape, *(1,) * (x.ndim - 2)), axis=1)


def _of_memory(x: Float[Array, "l b r n a e"], parent: Int32[Array, "b r"]) -> Array:
    return jnp.take_along_axis(x, parent[None, :, :, None, None, None], axis=2)
