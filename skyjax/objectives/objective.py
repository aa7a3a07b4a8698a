"""The whole objective: every level of every modality and of the fused features, alignment and spread.

In: the outputs of student and teacher (models/skysense.py) on the views of a batch (sample.py), and the heads.
Out: one scalar and its terms. A term is a sum and a count, and the loss adds weight x sum / count: with the counts of
all micro-batches in hand, the gradients of the micro-batches add up to the big batch's for every term that is per
sample. Terms that compare samples (balancing, InfoNCE, alignment, spread) see one micro-batch.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float, Int

from skyjax.objectives import alignment, heads, image_text, multigranularity, spread
from skyjax.objectives.distillation import distil
from skyjax.objectives.multigranularity import Maps, masked_mean
from skyjax.sample import Batch

Terms = dict[str, dict[str, Float[Array, ""]]]
Outputs = dict[str, Any]


def objective(
    config: ml_collections.ConfigDict,
    student: Outputs,
    teacher: Outputs,
    views: Batch,
    student_heads: heads.Params,
    teacher_heads: heads.Params,
    *,
    index: Int[Array, "b"],
    seed: int,
    teacher_temperature: Float[Array, ""] | float,
    counts: dict[str, Float[Array, ""]] | None = None,
    streams: Sequence[str] | None = None,
    read: image_text.Read | None = None,
) -> tuple[Float[Array, ""], Terms]:
    """The loss and its terms.

    Args:
      config: the experiment's `objective`.
      student: {"global": Output, "local": Output} with leading (b, v); "local" may be absent.
      teacher: {"global": Output}; no gradient reaches it.
      views: {"global": views, "local": views} as in sample.py: dates and maps are read from here, not from the outputs,
        whose days are jittered.
      student_heads: `init_heads`.
      teacher_heads: their average; no gradient reaches them.
      index: the samples' positions in the global order; what is drawn depends on these and the seed alone.
      seed: of the run.
      teacher_temperature: `teacher_temperature(config, step, steps)`.
      counts: what to divide the sums by, in place of this batch's own counts.
      streams: what is compared (`heads.streams_of`); None: every modality of the outputs, and "fused".
      read: what the models make of the captions; None where there is no text.

    Returns:
      The loss, and {"sums": .., "counts": .., "metrics": ..}. Names of terms: "pixel/optical", "object/fused",
      "image/sar", "alignment/optical-sar", "spread/fused", "text/fused", "words", "caption"; of metrics: "rank/fused",
      "spread/fused". Counts depend on masks, maps and dates, never on features.
    """
    teacher, teacher_heads = jax.lax.stop_gradient((teacher, teacher_heads))
    sums: dict[str, Array] = {}
    own: dict[str, Array] = {}
    sets = [name for name in ("global", "local") if student.get(name) is not None]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(jax.random.key(seed), _STREAM), index)
    modalities = heads.modalities_of(student["global"]["spatial"])

    maps = {
        stream: (
            [_maps(student[name], views[name], stream, student=True) for name in sets],
            _maps(teacher["global"], views["global"], stream, student=False),
        )
        for stream in (streams or (*modalities, "fused"))
    }
    # One draw serves all streams: a generator for each would take longer to compile than what it draws for.
    draws = max(multigranularity.num_draws(*pair) for pair in maps.values())
    noise = jax.vmap(lambda key: jax.random.uniform(key, (draws,)))(keys)
    for stream, (students, teachers) in maps.items():
        for level, rows in multigranularity.levels(students, teachers, config=config, noise=noise).items():
            sums[f"{level}/{stream}"] = distil(
                rows,
                student_heads[stream][level],
                teacher_heads[stream][level],
                config=config,
                teacher_temperature=teacher_temperature,
                keys=keys,
            )
            own[f"{level}/{stream}"] = rows.counted

    pooled = {stream: _pool(students[0]) for stream, (students, _) in maps.items()}
    if config.weights.alignment and len(modalities) > 1:
        features, present = ({m: pooled[m][i] for m in modalities} for i in (0, 1))
        pair_sums, pair_counts = alignment.align(
            features, present, student_heads["alignment"], config.alignment.get("bounds", heads.TEMPERATURES)
        )
        sums |= {f"alignment/{pair}": value for pair, value in pair_sums.items()}
        own |= {f"alignment/{pair}": value for pair, value in pair_counts.items()}
    if read is not None:
        of_modalities = {stream: side for stream, side in pooled.items() if stream != "fused"}
        text_sums, text_counts = image_text.terms(
            config, student["global"], of_modalities, read, student_heads.get("image_text", {})
        )
        sums, own = sums | text_sums, own | text_counts
    if config.weights.spread:
        floor = config.get("spread", {}).get("floor", spread.FLOOR)
        for stream, (feature, there) in pooled.items():
            # A view at a time: two views of one site shall agree, not flee each other.
            view_sums, view_counts = jax.vmap(spread.koleo, in_axes=(1, 1, None))(feature, there, floor)
            sums[f"spread/{stream}"], own[f"spread/{stream}"] = view_sums.sum(), view_counts.sum()

    divide_by = own if counts is None else counts
    loss = jnp.zeros(())
    for name, total in sums.items():
        loss += config.weights[name.split("/")[0]] * total / jnp.maximum(divide_by[name], 1)
    return loss, {"sums": sums, "counts": own, "metrics": _metrics(teacher["global"])}


def teacher_temperature(config: ml_collections.ConfigDict, step: Int[Array, ""] | int, steps: int) -> Float[Array, ""]:
    """Temperature of the teacher's scores: half a cosine between the two values of `objective.teacher_temperature`."""
    start, end = config.teacher_temperature
    share = jnp.clip(jnp.asarray(step, jnp.float32) / max(steps, 1), 0, 1)
    return end + (start - end) * (1 + jnp.cos(jnp.pi * share)) / 2


# Sets the draws of the objective apart from those of other parts that start from the same seed and index.
_STREAM = 0x0B1EC7


def _maps(output: Outputs, views: Batch, stream: str, *, student: bool) -> Maps:
    """One modality's maps, or the fused map as a sequence whose one date stands on the same day everywhere."""
    if stream == "fused":
        # With geo-context, that is what is compared: its projections learn from nothing else.
        fused = output["fused"] if output.get("context") is None else output["context"]
        features, places = fused[:, :, None], output["fused_valid"][:, :, None]
        there = jnp.ones(features.shape[:3], bool)
        days = jnp.zeros(features.shape[:3], jnp.int32)
        return Maps(features, places, days, there, jnp.any(places, axis=(-2, -1)), places, views["to_view"])
    images, features = views[stream], output["spatial"][stream]
    seen = images["student_valid"] if student else images["valid"]
    asked = jnp.broadcast_to(seen[..., None, None], features.shape[:-1])
    return Maps(
        features, output["spatial_valid"][stream], images["days"], images["valid"], seen, asked, views["to_view"]
    )


def _pool(maps: Maps) -> tuple[Float[Array, "b v d"], Array]:
    """Mean over all measured places of all dates that were seen."""
    b, v, t, h, w, d = maps.features.shape
    places = maps.places & maps.seen[..., None, None]
    return masked_mean(maps.features.reshape(b, v, t * h, w, d), places.reshape(b, v, t * h, w))


def _metrics(teacher: Outputs) -> dict[str, Float[Array, ""]]:
    """Effective rank and spread of the teacher's pooled fused features, all global views of all samples.

    Without geo-context: it tells regions apart even where all features have become one.
    """
    places = teacher["fused_valid"]
    feature, there = masked_mean(teacher["fused"], places)
    feature, there = feature.reshape(-1, feature.shape[-1]), there.reshape(-1)
    return {"rank/fused": spread.effective_rank(feature, there), "spread/fused": spread.spread(feature, there)}
