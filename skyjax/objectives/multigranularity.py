"""Pixel-, object- and image-level self-distillation between two views of a sample.

In: feature maps of student and teacher with the maps that their views were cut by (input/views.py).
Out: for each level the sum of its losses and how many there are. Formulas: docs/fidelity.md, "Multi-granularity".

Every level turns pairs of views into rows: a student's feature, the teacher's feature for the same thing, a weight.
All pairs and dates of a sample lie on one axis `r`, global and local, so that a level has one head call and one
balancing (distillation.py).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from skyjax.models.assignment import sinkhorn
from skyjax.objectives import geometry
from skyjax.objectives.distillation import Rows, join
from skyjax.objectives.heads import unit


class Maps(NamedTuple):
    """Feature maps of one modality, or of the fused features as a sequence of one date, for `v` views of a sample.

    Attributes:
      features: one map a view and date.
      places: which tokens were measured.
      days: the true days, without jitter.
      valid: the dates that are there, before any were dropped.
      seen: the dates that this network saw.
      asked: where the student has to answer: everywhere on a date that it saw; in the fused map, which knows no
        neighbours, at the places where it saw anything.
      to_view: from the sample's unit square to the view's.
    """

    features: Float[Array, "b v t h w d"]
    places: Bool[Array, "b v t h w"]
    days: Int[Array, "b v t"]
    valid: Bool[Array, "b v t"]
    seen: Bool[Array, "b v t"]
    asked: Bool[Array, "b v t h w"]
    to_view: Float[Array, "b v 2 3"]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.features.shape[3], self.features.shape[4]


class Pairs(NamedTuple):
    """The teacher's counterpart of each student view, date and token.

    Attributes:
      student_view: static view numbers.
      teacher_view: static view numbers.
      teacher_map: the teacher's map (view x dates + slot) of the same day.
      dated: the date stands in both views. (Whether the student saw it, its `asked` and `seen` say.)
      corners: the four teacher tokens around each student token.
      weight: their bilinear weights.
      inside: the student's token lies in the teacher's view.
    """

    student_view: tuple[int, ...]
    teacher_view: tuple[int, ...]
    teacher_map: Int[Array, "b p t"]
    dated: Bool[Array, "b p t"]
    corners: Int[Array, "b p n 4"]
    weight: Float[Array, "b p n 4"]
    inside: Bool[Array, "b p n"]


def levels(
    students: Sequence[Maps], teacher: Maps, *, config: ml_collections.ConfigDict, noise: Float[Array, "b l"]
) -> dict[str, Rows]:
    """The rows of every level that has a weight.

    Args:
      students: the student's maps of its global views and, where there are any, of its local ones.
      teacher: the teacher's maps of the global views.
      config: `objective`.
      noise: uniform random numbers of each sample, at least `num_draws`, for the places of the pixel level.
    """
    pairs = [pair_views(maps, teacher, same_views=i == 0) for i, maps in enumerate(students)]
    rows = {}
    if config.weights.pixel:
        parts, first = [], 0
        for maps, x in zip(students, pairs, strict=True):
            last = first + math.prod(x.dated.shape[1:]) * x.inside.shape[2]
            parts.append(pixel_rows(maps, teacher, x, tokens=config.pixel.tokens, noise=noise[:, first:last]))
            first = last
        rows["pixel"] = join(parts)
    if config.weights.object:
        rows["object"] = object_rows(students, teacher, pairs, config=config)
    if config.weights.image:
        rows["image"] = join([image_rows(maps, teacher, x) for maps, x in zip(students, pairs, strict=True)])
    return rows


def num_draws(students: Sequence[Maps], teacher: Maps) -> int:
    """Random numbers that `levels` needs a sample: one for each token of each date and pair of views."""
    return sum(
        len(view_pairs(maps, teacher, same_views=i == 0)) * math.prod(maps.features.shape[2:5])
        for i, maps in enumerate(students)
    )


def view_pairs(student: Maps, teacher: Maps, *, same_views: bool) -> list[tuple[int, int]]:
    """All (student view, teacher view); where both networks have the same views, those of two different ones."""
    students, teachers = student.features.shape[1], teacher.features.shape[1]
    return [(i, j) for i in range(students) for j in range(teachers) if not (same_views and i == j)]


def pair_views(student: Maps, teacher: Maps, *, same_views: bool) -> Pairs:
    """The teacher's counterpart of every date and token, for all `view_pairs`."""
    mine, other = np.array(view_pairs(student, teacher, same_views=same_views)).T
    slot, dated = geometry.match_days(
        student.days[:, mine], student.valid[:, mine], teacher.days[:, other], teacher.seen[:, other]
    )
    local, inside = geometry.carry(
        geometry.token_centres(student.grid), student.to_view[:, mine], teacher.to_view[:, other]
    )
    corners, weight = geometry.neighbours(local, teacher.grid)
    return Pairs(
        tuple(mine.tolist()),
        tuple(other.tolist()),
        teacher_map=other[:, None] * teacher.features.shape[2] + slot,
        dated=dated,
        corners=corners,
        weight=weight,
        inside=inside,
    )


def pixel_rows(student: Maps, teacher: Maps, pairs: Pairs, *, tokens: int, noise: Float[Array, "b l"]) -> Rows:
    """At most `tokens` student tokens a pair and date with the teacher's feature at the same place and day.

    A place counts when the student saw the date and at least half of the teacher's bilinear weight there is measured.
    The places are drawn among those that count.

    Args:
      student: maps of the student's views.
      teacher: maps of the teacher's views.
      pairs: of these views.
      tokens: places scored a pair and date.
      noise: uniform random numbers, one for each pair, date and token; the places with the largest are drawn.
    """
    b, p, t = pairs.dated.shape
    n, cells = pairs.inside.shape[2], _cells(teacher)
    index = (pairs.teacher_map * cells)[..., None, None] + pairs.corners[:, :, None]  # b p t n 4
    weight = jnp.broadcast_to(pairs.weight[:, :, None], index.shape)
    share = geometry.measured_share(teacher.places.reshape(b, -1), index, weight)
    counts = pairs.dated[..., None] & pairs.inside[:, :, None] & _asked(student, pairs) & _is_half(share)

    k = min(tokens, n)
    order, chosen = jax.lax.top_k(jnp.where(counts, noise.reshape(b, p, t, n), -1), k)
    drawn = order >= 0
    index, weight = (jnp.take_along_axis(x, chosen[..., None], axis=3) for x in (index, weight))
    first = jnp.asarray(pairs.student_view)[:, None] * t + jnp.arange(t)  # the student's map of each pair and date
    return _rows(
        geometry.take(_tokens(student), first[:, :, None] * n + chosen),
        geometry.interpolate(_tokens(teacher), teacher.places.reshape(b, -1), index, weight),
        drawn,
        jnp.sum(drawn),
    )


def object_rows(
    students: Sequence[Maps], teacher: Maps, pairs: Sequence[Pairs], *, config: ml_collections.ConfigDict
) -> Rows:
    """Centres of clusters that the teacher finds in the overlap, each as the teacher and as the student sees it.

    The teacher's tokens that lie in the student's view are clustered, a pair and date at a time. The soft assignment is
    interpolated at the student's tokens, and a centre is the assignment-weighted mean in each view. A cluster weighs
    its share of the student's overlap, so that the weights of a pair and date sum to one: the count is known from
    masks, and a cluster without overlap weighs nothing.

    Args:
      students: maps of the student's global views and, where there are any, of its local ones.
      teacher: maps of the teacher's views.
      pairs: one for each of `students`.
      config: `objective`; reads `object.clusters`, `object.iterations`, `object.epsilon`, `sinkhorn_iterations`.
    """
    cells = _cells(teacher)
    clustered = jnp.concatenate([_overlap(s, teacher, x) for s, x in zip(students, pairs, strict=True)], axis=1)
    maps = jnp.concatenate([x.teacher_map.reshape(len(x.dated), -1) for x in pairs], axis=1)  # b r
    b = len(maps)
    tokens = geometry.take(teacher.features.reshape(b, -1, cells, teacher.features.shape[-1]), maps)
    assignment = jax.vmap(jax.vmap(lambda x, valid: cluster(x, valid, config=config)))(tokens, clustered)
    teacher_centres, _ = _centres(tokens, assignment)

    student_centres, shares, counted = [], [], []
    first = 0
    for student, x in zip(students, pairs, strict=True):
        _, p, t = x.dated.shape
        here = slice(first, first + p * t)
        first += p * t
        carried, covered = _carry_assignment(assignment[:, here], clustered[:, here], student, x)
        own = student.features[:, np.array(x.student_view)].reshape(b, p * t, -1, student.features.shape[-1])
        centres, mass = _centres(own, carried)
        student_centres.append(centres)
        shares.append(mass / jnp.maximum(mass.sum(-1, keepdims=True), 1e-6))
        counted.append(jnp.any(covered, axis=-1))
    return _rows(
        jnp.concatenate(student_centres, axis=1),
        teacher_centres,
        jnp.concatenate(shares, axis=1),
        jnp.sum(jnp.concatenate(counted, axis=1)),
    )


def image_rows(student: Maps, teacher: Maps, pairs: Pairs) -> Rows:
    """Means over the measured places of each date, for every pair whose two means exist."""
    mine, exists = masked_mean(student.features, student.places & student.seen[..., None, None])
    other, other_exists = masked_mean(teacher.features, teacher.places & teacher.seen[..., None, None])
    view = np.array(pairs.student_view)
    b = len(other)
    counts = pairs.dated & exists[:, view] & geometry.take(other_exists.reshape(b, -1), pairs.teacher_map)
    others = geometry.take(other.reshape(b, -1, other.shape[-1]), pairs.teacher_map)
    return _rows(mine[:, view], others, counts, jnp.sum(counts))


def cluster(
    tokens: Float[Array, "n d"], valid: Bool[Array, "n"], *, config: ml_collections.ConfigDict
) -> Float[Array, "n k"]:
    """Soft assignment of the valid tokens to `object.clusters` balanced clusters; rows of other tokens are zero.

    Cosine k-means with Sinkhorn-Knopp in place of the nearest centre, from centres that lie farthest apart. The tokens'
    mean is taken off first: tokens of one site share most of their direction, and uncentred cosines all lie near one.
    """
    tokens = jnp.where(valid[:, None], tokens.astype(jnp.float32), 0)
    mean = tokens.sum(0) / jnp.maximum(valid.sum(), 1)
    tokens = unit(jnp.where(valid[:, None], tokens - mean, 0))

    def assign_and_move(_: int, state: tuple[Array, Array]) -> tuple[Float[Array, "k d"], Float[Array, "n k"]]:
        scores = jnp.einsum("nd,kd->nk", tokens, state[0])
        assignment = sinkhorn(scores, valid, epsilon=config.object.epsilon, iterations=config.sinkhorn_iterations)
        return unit(jnp.einsum("nk,nd->kd", assignment, tokens)), assignment

    start = _farthest(tokens, valid, config.object.clusters), jnp.zeros((len(tokens), config.object.clusters))
    return jax.lax.fori_loop(0, config.object.iterations, assign_and_move, start)[1]


def masked_mean(
    features: Float[Array, "*b h w d"], valid: Bool[Array, "*b h w"]
) -> tuple[Float[Array, "*b d"], Bool[Array, "*b"]]:
    """The mean over the valid places, in float32, and whether there is any; zero where there is none."""
    kept = jnp.where(valid[..., None], features.astype(jnp.float32), 0)
    total = valid.sum((-2, -1))
    return kept.sum((-3, -2)) / jnp.maximum(total, 1)[..., None], total > 0


def _farthest(tokens: Float[Array, "n d"], valid: Bool[Array, "n"], clusters: int) -> Float[Array, "k d"]:
    """Tokens that lie far from the mean and from one another; with fewer tokens than clusters some stand twice."""

    def add(nearest: Float[Array, "n"], _: None) -> tuple[Float[Array, "n"], Float[Array, "d"]]:
        centre = tokens[jnp.argmin(jnp.where(valid, nearest, jnp.inf))]
        return jnp.maximum(nearest, tokens @ centre), centre

    # The first has no other to be far from: the one that is least like its fellows.
    start = tokens @ tokens.sum(0)
    first = tokens[jnp.argmin(jnp.where(valid, start, jnp.inf))]
    _, others = jax.lax.scan(add, tokens @ first, None, length=clusters - 1)
    return jnp.concatenate([first[None], others])


def _overlap(student: Maps, teacher: Maps, pairs: Pairs) -> Bool[Array, "b r l"]:
    """The teacher's measured tokens that lie in the student's view, for every pair and date that goes together."""
    _, inside = geometry.carry(
        geometry.token_centres(teacher.grid),
        teacher.to_view[:, np.array(pairs.teacher_view)],
        student.to_view[:, np.array(pairs.student_view)],
    )
    b, p, t = pairs.dated.shape
    places = geometry.take(teacher.places.reshape(b, -1, _cells(teacher)), pairs.teacher_map)
    return (places & inside[:, :, None] & pairs.dated[..., None]).reshape(b, p * t, -1)


def _carry_assignment(
    assignment: Float[Array, "b r l k"], clustered: Bool[Array, "b r l"], student: Maps, pairs: Pairs
) -> tuple[Float[Array, "b r n k"], Bool[Array, "b r n"]]:
    """The teacher's assignment at the student's tokens, and which of these are covered by at least half."""
    b, p, t = pairs.dated.shape
    maps = b * p * t
    index, weight = (
        jnp.broadcast_to(x[:, :, None], (b, p, t, *x.shape[2:])).reshape(maps, -1, 4)
        for x in (pairs.corners, pairs.weight)
    )
    valid = clustered.reshape(maps, -1)
    inside = (pairs.inside[:, :, None] & _asked(student, pairs)).reshape(maps, -1)
    covered = inside & _is_half(geometry.measured_share(valid, index, weight))
    carried = geometry.interpolate(assignment.reshape(*valid.shape, -1), valid, index, weight) * covered[..., None]
    return carried.reshape(b, p * t, *carried.shape[1:]), covered.reshape(b, p * t, -1)


def _centres(
    tokens: Float[Array, "b r n d"], assignment: Float[Array, "b r n k"]
) -> tuple[Float[Array, "b r k d"], Float[Array, "b r k"]]:
    """Assignment-weighted means and the mass of each; a cluster without mass has the centre zero."""
    mass = assignment.sum(2)
    # A weight of zero does not take off what is not finite.
    tokens = jnp.where(jnp.any(assignment > 0, axis=-1)[..., None], tokens.astype(jnp.float32), 0)
    sums = jnp.einsum("brnk,brnd->brkd", assignment, tokens)
    return sums / jnp.maximum(mass, 1e-6)[..., None], mass


def _rows(student: Array, teacher: Array, weight: Array, count: Array) -> Rows:
    """Rows from arrays with any axes between the samples and the features."""
    b = len(weight)
    student, teacher = (x.reshape(b, -1, x.shape[-1]) for x in (student, teacher))
    return Rows(student, teacher, weight.reshape(b, -1).astype(jnp.float32), count.astype(jnp.float32))


def _tokens(maps: Maps) -> Float[Array, "b l d"]:
    """All tokens of all views and dates of a sample in a row."""
    return maps.features.reshape(len(maps.features), -1, maps.features.shape[-1])


def _asked(student: Maps, pairs: Pairs) -> Bool[Array, "b p t n"]:
    """Where the student of each pair has to answer."""
    return student.asked[:, np.array(pairs.student_view)].reshape(*pairs.dated.shape, -1)


def _cells(maps: Maps) -> int:
    return maps.grid[0] * maps.grid[1]


def _is_half(share: Float[Array, "*n"]) -> Bool[Array, "*n"]:
    """A place counts from half its weight on; a rounding below a half is a half."""
    return share >= 0.5 - 1e-5
