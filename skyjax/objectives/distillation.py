"""The losses of self-distillation on rows: DINO with balanced targets, or InfoNCE.

In: pairs of a student's and the teacher's feature for the same thing, from any level (multigranularity.py).
Out: the weighted sum of their losses. Formulas: docs/fidelity.md, "Multi-granularity".
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Bool, Float

from skyjax.models import assignment
from skyjax.objectives import heads

RowLoss = Callable[[Float[Array, "b s d"], Float[Array, "b s d"]], Float[Array, "b s"]]

# A row that weighs less is no row: a cluster's weight is a sum of soft assignments and seldom an exact zero.
_LEAST_WEIGHT = 1e-6


class Rows(NamedTuple):
    """What a level compares.

    Attributes:
      student: features of the student.
      teacher: the teacher's feature for the same thing.
      weight: of each row; 0 where there is nothing to compare.
      counted: what the sum of the losses is divided by; a function of masks and maps alone, never of features.
    """

    student: Float[Array, "b r c"]
    teacher: Float[Array, "b r c"]
    weight: Float[Array, "b r"]
    counted: Float[Array, ""]


def join(parts: Sequence[Rows]) -> Rows:
    """The rows of several sets of pairs as one."""
    student, teacher, weight = (jnp.concatenate(part, axis=1) for part in list(zip(*parts, strict=True))[:3])
    return Rows(student, teacher, weight, sum((rows.counted for rows in parts), start=jnp.float32(0)))


def distil(
    rows: Rows,
    student_head: heads.Params,
    teacher_head: heads.Params,
    *,
    config: ml_collections.ConfigDict,
    teacher_temperature: Float[Array, ""] | float,
    keys: Array,
) -> Float[Array, ""]:
    """The weighted sum of the rows' losses; rows of weight 0 leave no trace in it, nor in any gradient.

    Args:
      rows: of one level of one modality.
      student_head: parameters of that level's head.
      teacher_head: the teacher's; no gradient reaches them.
      config: `objective`; reads `kind`, `head_norm` ("none" or "batch", see `heads.project`), `student_temperature`,
        `sinkhorn_iterations`, `infonce` and `chunk`.
      teacher_temperature: of the teacher's scores.
      keys: one a sample, for the negatives of InfoNCE.
    """
    valid = rows.weight > _LEAST_WEIGHT
    normed = valid if config.get("head_norm", "none") == "batch" else None
    student = heads.project(student_head, jnp.where(valid[..., None], rows.student, 0), normed)
    teacher = jax.lax.stop_gradient(heads.project(teacher_head, jnp.where(valid[..., None], rows.teacher, 0), normed))
    weight = jnp.where(valid, rows.weight, 0)
    if config.kind == "dino":
        loss = _dino(teacher, valid, student_head, jax.lax.stop_gradient(teacher_head), teacher_temperature, config)
    else:
        loss = _infonce(student, teacher, valid, keys, config)

    def block_sum(student: Array, teacher: Array, weight: Array) -> Float[Array, ""]:
        return jnp.sum(weight * loss(student, teacher))

    blocks = tuple(_blocks(x, config.chunk) for x in (student, teacher, weight))
    if len(blocks[0]) == 1:
        return block_sum(*(x[0] for x in blocks))
    total, _ = jax.lax.scan(
        lambda total, block: (total + jax.checkpoint(block_sum, prevent_cse=False)(*block), None),
        jnp.float32(0),
        blocks,
    )
    return total


def _dino(
    teacher: Float[Array, "b r d"],
    valid: Bool[Array, "b r"],
    student_head: heads.Params,
    teacher_head: heads.Params,
    teacher_temperature: Float[Array, ""] | float,
    config: ml_collections.ConfigDict,
) -> RowLoss:
    """Cross-entropy of the student's class probabilities against the teacher's, balanced over all rows of the batch."""

    def teacher_scores(rows: Float[Array, "b s d"]) -> Float[Array, "b s k"]:
        return heads.class_scores(teacher_head, rows)

    # Over the global batch, not a chip's share: with a few samples a chip the classes collapse.
    offsets = assignment.column_offsets(
        _blocks(teacher, config.chunk),
        _blocks(valid, config.chunk),
        teacher_scores,
        epsilon=teacher_temperature,
        iterations=config.sinkhorn_iterations,
    )

    def loss(student: Float[Array, "b s d"], teacher: Float[Array, "b s d"]) -> Float[Array, "b s"]:
        targets = assignment.assign(teacher_scores(teacher), offsets, epsilon=teacher_temperature)
        scores = heads.class_scores(student_head, student) / config.student_temperature
        return jax.nn.logsumexp(scores, axis=-1) - jnp.sum(targets * scores, axis=-1)

    return loss


def _infonce(
    student: Float[Array, "b r d"],
    teacher: Float[Array, "b r d"],
    valid: Bool[Array, "b r"],
    keys: Array,
    config: ml_collections.ConfigDict,
) -> RowLoss:
    """Symmetric InfoNCE: a row against its counterpart and at most `infonce.negatives` rows of each other sample."""
    b, r = valid.shape
    noise = jax.vmap(lambda key: jax.random.uniform(key, (r,)))(keys)
    order, drawn = jax.lax.top_k(jnp.where(valid, noise, -1), min(config.infonce.negatives, r))
    student_pool, teacher_pool = (jnp.take_along_axis(x, drawn[..., None], axis=1) for x in (student, teacher))
    negative = (order >= 0)[None] & ~jnp.eye(b, dtype=bool)[:, :, None]  # b c m: of another sample, and there

    def one_way(anchor: Array, counterpart: Array, pool: Array) -> Float[Array, "b s"]:
        positive = jnp.einsum("bsd,bsd->bs", anchor, counterpart) / config.infonce.temperature
        scores = jnp.einsum("bsd,cmd->bscm", anchor, pool) / config.infonce.temperature
        scores = jnp.where(negative[:, None], scores, -jnp.inf).reshape(*positive.shape, -1)
        return jax.nn.logsumexp(jnp.concatenate([positive[..., None], scores], -1), axis=-1) - positive

    def loss(student: Float[Array, "b s d"], teacher: Float[Array, "b s d"]) -> Float[Array, "b s"]:
        return (one_way(student, teacher, teacher_pool) + one_way(teacher, student, student_pool)) / 2

    return loss


def _blocks(rows: Array, size: int) -> Array:
    """(b, r, ...) as (blocks, b, s, ...) of at most `size` rows a sample; the last is filled with zeros.

    The cut runs through each sample's rows, so that every block holds all samples and stays spread over the chips.
    """
    b, r = rows.shape[:2]
    count = -(-r // size)
    size = -(-r // count)
    rows = jnp.pad(rows, [(0, 0), (0, count * size - r)] + [(0, 0)] * (rows.ndim - 2))
    return jnp.moveaxis(rows.reshape(b, count, size, *rows.shape[2:]), 1, 0)
