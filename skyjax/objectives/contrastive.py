"""Contrastive losses between two sets of vectors over the global batch, softmax and sigmoid, dense or around a ring.

In: one vector a site on one side (an image), one or several on the other (its captions). Out: one loss a site.
A caption finds its site among all sites, and a site its caption among those of all other sites; another caption of the
same site, or one of the same words elsewhere, is neither positive nor negative. Formulas: docs/fidelity.md, "Image and
text": CLIP (Radford et al. 2021, section 2.3) and SigLIP (Zhai et al. 2023, section 3.2).

Every pair is scored, sites x captions. While a device's share of these scores is small they are computed at once.
Beyond RING_BYTES captions travel: each device holds its sites, the captions pass from one device to the next, and what
was scored is forgotten and scored again for the gradient. Memory is then a block of scores, whatever the batch.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from skyjax.parallel.sharding import ROWS, row_shards

Kind = Literal["softmax", "sigmoid"]
Form = Literal["dense", "ring"]

RING_BYTES = 32 * 2**20  # of float32 scores a device
BLOCK = 1024  # sites that a device scores at once against the captions that are with it
_EMPTY = -1e30  # the logarithm of no sum; an infinity would make nan of its gradient

Sums = tuple[Float[Array, "b"], Float[Array, "n"]]


def softmax(
    sites: Float[Array, "b d"],
    captions: Float[Array, "b k d"],
    valid: Bool[Array, "b k"],
    temperature: Float[Array, ""] | float,
    words: Int[Array, "b k"] | None = None,
    form: Form | None = None,
) -> Float[Array, "b"]:
    """Symmetric InfoNCE of each site, the mean over its captions; zero for a site that has none.

    Args:
      sites: unit vectors, rows over data and fsdp where a mesh is set.
      captions: unit vectors.
      valid: captions that are there. A site without one is no negative either.
      temperature: what cosines are divided by.
      words: a number of 0 or more that is equal for captions of equal words; None: all differ.
      form: of the computation; None: by size.
    """
    rest, to_captions = _negatives("softmax", form, sites, captions, valid, 1 / temperature, 0.0, words)
    own = _own(sites, captions) / temperature
    # -log(exp(own) / (exp(own) + rest)) of either direction
    loss = (jax.nn.softplus(rest[:, None] - own) + jax.nn.softplus(to_captions - own)) / 2
    return _mean(loss, valid)


def sigmoid(
    sites: Float[Array, "b d"],
    captions: Float[Array, "b k d"],
    valid: Bool[Array, "b k"],
    temperature: Float[Array, ""] | float,
    bias: Float[Array, ""] | float,
    words: Int[Array, "b k"] | None = None,
    form: Form | None = None,
) -> Float[Array, "b"]:
    """Each pair on its own: right or wrong. Summed over all sites, the mean over a site's captions; else as `softmax`.

    Args:
      sites: unit vectors.
      captions: unit vectors.
      valid: captions that are there.
      temperature: what cosines are divided by.
      bias: added to every score.
      words: as in `softmax`.
      form: as in `softmax`.
    """
    _, to_captions = _negatives("sigmoid", form, sites, captions, valid, 1 / temperature, bias, words)
    own = _own(sites, captions) / temperature + bias
    return _mean(jax.nn.softplus(-own) + to_captions, valid)


def form_of(sites: int, captions: int, shards: int) -> Form:
    """ "ring" where a device's share of the scores is over RING_BYTES.

    Below, a ring's many short messages cost more than one gather of the captions.
    """
    return "ring" if sites // shards * captions * 4 > RING_BYTES else "dense"


def _own(sites: Float[Array, "b d"], captions: Float[Array, "b k d"]) -> Float[Array, "b k"]:
    return jnp.einsum("bd,bkd->bk", sites, captions, precision="highest")


def _mean(loss: Float[Array, "b k"], valid: Bool[Array, "b k"]) -> Float[Array, "b"]:
    return jnp.sum(jnp.where(valid, loss, 0), axis=1) / jnp.maximum(valid.sum(1), 1)


def _negatives(
    kind: Kind,
    form: Form | None,
    sites: Float[Array, "b d"],
    captions: Float[Array, "b k d"],
    valid: Bool[Array, "b k"],
    scale: Float[Array, ""] | float,
    bias: Float[Array, ""] | float,
    words: Int[Array, "b k"] | None,
) -> tuple[Float[Array, "b"], Float[Array, "b k"]]:
    """For each site and each caption the sum over all that do not belong to it.

    "softmax" sums exp(score), and gives the logarithm; "sigmoid" sums log(1 + exp(score)).
    """
    b, k, d = captions.shape
    number = jnp.arange(b, dtype=jnp.int32)
    words = jnp.arange(b * k, dtype=jnp.int32).reshape(b, k) if words is None else words.astype(jnp.int32)
    # The words of a caption that is not there exclude nothing.
    about_sites = {"site": number, "valid": valid.any(1), "words": jnp.where(valid, words, -1)}
    about_captions = {"site": jnp.repeat(number, k), "valid": valid.reshape(-1), "words": words.reshape(-1)}
    sums = _dense if (form or form_of(b, b * k, row_shards())) == "dense" else _ring
    rows, columns = sums(
        kind,
        jnp.float32(sites),
        jnp.float32(captions).reshape(b * k, d),
        jnp.float32(scale),
        jnp.float32(bias),
        about_sites,
        about_captions,
    )
    return rows, columns.reshape(b, k)


def _scores(
    sites: Array, captions: Array, scale: Array, bias: Array, about_sites: Any, about_captions: Any
) -> tuple[Float[Array, "b n"], Bool[Array, "b n"]]:
    """Scores, and which of them are negatives."""
    cosines = jnp.einsum("bd,nd->bn", sites, captions, precision="highest")
    same = jnp.any(about_sites["words"][:, :, None] == about_captions["words"], axis=1)
    other = about_sites["site"][:, None] != about_captions["site"]
    there = about_sites["valid"][:, None] & about_captions["valid"]
    return scale * cosines + bias, there & other & ~same


def _sum(kind: Kind, scores: Array, negative: Array, axis: int) -> Array:
    if kind == "softmax":
        return jax.nn.logsumexp(jnp.where(negative, scores, _EMPTY), axis=axis)
    return jnp.sum(jnp.where(negative, jax.nn.softplus(scores), 0), axis=axis)


def _dense(kind: Kind, sites: Array, captions: Array, scale: Array, bias: Array, *about: Any) -> Sums:
    scores, negative = _scores(sites, captions, scale, bias, *about)
    return _sum(kind, scores, negative, 1), _sum(kind, scores, negative, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(
    kind: Kind, sites: Array, captions: Array, scale: Array, bias: Array, about_sites: Any, about_captions: Any
) -> Sums:
    """As `_dense`: sums of the rows (sites) and of the columns (captions)."""

    def local(sites: Array, captions: Array, scale: Array, bias: Array, about_sites: Any, about_captions: Any) -> Sums:
        def turn(rows: Any, fixed: Any, passing: Any) -> tuple[Any, Any]:
            def block(columns: Array, part: Any) -> tuple[Array, Array]:
                (sites, about_sites), rows = part
                scores, negative = _scores(sites, passing["captions"], scale, bias, about_sites, passing["about"])
                columns = _add(kind, columns, _sum(kind, scores, negative, 0))
                return columns, _add(kind, rows, _sum(kind, scores, negative, 1))

            columns, rows = jax.lax.scan(block, passing["columns"], (fixed, rows))
            return rows, {**passing, "columns": columns}

        empty = _EMPTY if kind == "softmax" else 0.0
        fixed = _blocks((sites, about_sites), BLOCK)
        rows = jnp.full(fixed[0].shape[:2], empty)
        passing = {"captions": captions, "about": about_captions, "columns": jnp.full(len(captions), empty)}
        rows, passing = _around(turn, rows, fixed, passing)
        return rows.reshape(-1)[: len(sites)], passing["columns"]

    return _on_shards(local, "rrssrr", "rr")(sites, captions, scale, bias, about_sites, about_captions)


def _ring_forward(kind: Kind, *arguments: Any) -> tuple[Sums, Any]:
    sums = _ring(kind, *arguments)
    return sums, (arguments, sums)


def _ring_backward(kind: Kind, kept: Any, gradients: Sums) -> tuple[Any, ...]:
    (sites, captions, scale, bias, about_sites, about_captions), sums = kept

    def local(
        sites: Array,
        captions: Array,
        scale: Array,
        bias: Array,
        about_sites: Any,
        about_captions: Any,
        sums: Sums,
        gradients: Sums,
    ) -> tuple[Array, ...]:
        def turn(to_sites: Any, fixed: Any, passing: Any) -> tuple[Any, Any]:
            def block(carry: Any, part: Any) -> tuple[Any, Array]:
                (sites, about_sites, row, to_row), to_sites = part
                to_captions, to_scale, to_bias = carry
                scores, negative = _scores(sites, passing["captions"], scale, bias, about_sites, passing["about"])
                by_row, by_column = to_row[:, None], passing["to_column"][None]
                if kind == "softmax":
                    # A masked score may lie above the sum that it is no part of.
                    masked = jnp.where(negative, scores, _EMPTY)
                    to_scores = by_row * jnp.exp(masked - row[:, None]) + by_column * jnp.exp(
                        masked - passing["column"]
                    )
                else:
                    to_scores = (by_row + by_column) * jax.nn.sigmoid(scores)
                to_scores = jnp.where(negative, to_scores, 0)
                to_captions += scale * jnp.einsum("bn,bd->nd", to_scores, sites, precision="highest")
                to_sites += scale * jnp.einsum("bn,nd->bd", to_scores, passing["captions"], precision="highest")
                to_scale += jnp.sum(to_scores * (scores - bias)) / scale
                return (to_captions, to_scale, to_bias + jnp.sum(to_scores)), to_sites

            to_sites, (to_scale, to_bias) = to_sites
            carry = (passing["to_captions"], to_scale, to_bias)
            (to_captions, to_scale, to_bias), to_sites = jax.lax.scan(block, carry, (fixed, to_sites))
            return (to_sites, (to_scale, to_bias)), {**passing, "to_captions": to_captions}

        fixed = _blocks((sites, about_sites, sums[0], gradients[0]), BLOCK)
        passing = {
            "captions": captions,
            "about": about_captions,
            "column": sums[1],
            "to_column": gradients[1],
            "to_captions": jnp.zeros_like(captions),
        }
        nothing = (jnp.zeros_like(fixed[0]), (jnp.zeros(()), jnp.zeros(())))
        (to_sites, (to_scale, to_bias)), passing = _around(turn, nothing, fixed, passing)
        if not jax.sharding.get_abstract_mesh().empty:
            to_scale, to_bias = jax.lax.psum((to_scale, to_bias), ROWS)
        return to_sites.reshape(-1, sites.shape[1])[: len(sites)], passing["to_captions"], to_scale, to_bias

    arguments = (sites, captions, scale, bias, about_sites, about_captions, sums, gradients)
    return *_on_shards(local, "rrssrrrr", "rrss")(*arguments), None, None


_ring.defvjp(_ring_forward, _ring_backward)


def _add(kind: Kind, total: Array, part: Array) -> Array:
    return jnp.logaddexp(total, part) if kind == "softmax" else total + part


def _blocks(tree: Any, size: int) -> Any:
    """(b, ...) -> (blocks, size, ...); rows of zeros fill the last block, and False says that they are not valid."""

    def split(x: Array) -> Array:
        rows = min(size, max(len(x), 1))
        fill = -len(x) % rows
        return jnp.pad(x, ((0, fill), *((0, 0),) * (x.ndim - 1))).reshape(-1, rows, *x.shape[1:])

    return jax.tree.map(split, tree)


def _around(turn: Any, own: Any, fixed: Any, passing: Any) -> tuple[Any, Any]:
    """`turn` on every device with what passes by; after a full circle that is with its owner again."""
    if jax.sharding.get_abstract_mesh().empty:
        return turn(own, fixed, passing)
    shards = jax.lax.axis_size(ROWS)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        own, passing = turn(carry[0], fixed, carry[1])
        circle = [(i, (i + 1) % shards) for i in range(shards)]
        return (own, jax.lax.ppermute(passing, ROWS, circle)), None

    return jax.lax.scan(step, (own, passing), length=shards)[0]


def _on_shards(function: Any, inputs: str, outputs: str) -> Any:
    """`function` on each device's rows ("r") and on scalars ("s") that all share; as it is where no mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    specs = {"r": PartitionSpec(ROWS), "s": PartitionSpec()}
    in_specs, out_specs = (tuple(specs[letter] for letter in letters) for letters in (inputs, outputs))
    # Every device of `tensor` computes the same. Varying axes are not tracked: the gradient is written out above.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)
