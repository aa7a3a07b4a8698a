"""One step of training as a plain function: (state, batch) -> (state, metrics).

The student sees all views with what was dropped and jittered, the teacher the global views with every valid date.
Randomness is a function of (seed, step, global index): augmentation and sampled places by index, drop path by step.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Float, Int, Key

from skyjax.input.device import prepare
from skyjax.models import prototypes, skysense
from skyjax.objectives import heads
from skyjax.objectives.objective import Terms, objective, teacher_temperature
from skyjax.parallel.sharding import place_rows
from skyjax.sample import MODALITIES, Batch
from skyjax.train import reading
from skyjax.train.optimizer import descend, learning_rate, make_optimizer, teacher_momentum
from skyjax.train.state import State, merged

Metrics = dict[str, Float[Array, ""]]
Params = dict[str, Any]
Statistics = Mapping[str, tuple[Any, Any]]


def make_step(
    config: ml_collections.ConfigDict, statistics: Statistics
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The step of an experiment, to be jitted with the state donated.

    Args:
      config: the experiment.
      statistics: modality -> mean and std, each (sensors, bands), by which images are normalised.

    Returns:
      A function of a state and a batch on the device. Metrics are float32 scalars: "loss", "loss/TERM" for every term
      (NaN where the batch has nothing of it), "rank/..." and "spread/..." of the features, "gradient_norm" before
      clipping, "learning_rate", "teacher_momentum", "teacher_temperature", "skipped" so far, "nonfinite_in_a_row". A
      step whose loss or gradient is not finite changes nothing but `step` and the counters.
    """

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        params, now = state["params"], state["step"]
        loss, terms, gradients = loss_and_gradients(
            config, statistics, params, state["teacher"], batch, now, state.get("prototypes")
        )
        norm = optax.tree.norm(gradients)
        direction, optimizer = make_optimizer(config, params).update(gradients, state["optimizer"], params)
        rate, momentum = learning_rate(config, now), teacher_momentum(config, now)
        params = descend(params, direction, rate)
        moved = {"params": params, "teacher": average(state["teacher"], params, momentum), "optimizer": optimizer}
        if "centres" in terms:
            moved["prototypes"] = prototypes.update(
                state["prototypes"], **terms["centres"], momentum=config.model.prototypes.momentum
            )

        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, {name: state[name] for name in moved})
        counters = {
            "skipped": state["counters"]["skipped"] + ~finite,
            "nonfinite_in_a_row": jnp.where(finite, 0, state["counters"]["nonfinite_in_a_row"] + 1),
        }
        metrics = {
            "loss": loss,
            # A term that no sample of the batch has is unknown, not zero: zero would look perfect.
            **{f"loss/{name}": total / _or_nan(terms["counts"][name]) for name, total in terms["sums"].items()},
            **terms["metrics"],
            "gradient_norm": norm,
            "learning_rate": rate,
            "teacher_momentum": momentum,
            "teacher_temperature": teacher_temperature(config.objective, now, config.steps),
            **counters,
        }
        return {**state, "step": now + 1, **kept, "counters": counters}, jax.tree.map(jnp.float32, metrics)

    return step


def _or_nan(count: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.where(count > 0, jnp.maximum(count, 1), jnp.nan)


def loss_and_gradients(
    config: ml_collections.ConfigDict,
    statistics: Statistics,
    params: Params,
    teacher: Params,
    batch: Batch,
    step: Int[Array, ""],
    table: Float[Array, "r k p"] | None = None,
) -> tuple[Float[Array, ""], Terms, Params]:
    """Loss, its terms, and its gradient to `params`, over `config.micro_batches` equal parts one after another.

    Terms that are a mean over samples, tokens or dates come out as if the batch were whole: each part's sum is divided
    by the count of the whole batch, which a first pass takes from the masks alone. Terms that compare samples with
    each other (alignment, spread, balanced teacher scores) see one part at a time.

    Where `table`, the geo-prototypes, is to move, terms have "centres" too, of all samples (`compare`).
    """

    def loss_of(params: Params, part: Batch, number: Int[Array, ""] | int, counts: Any) -> tuple[Any, Terms]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), step), number)
        return compare(config, statistics, params, teacher, part, step, key, counts, table)

    with_gradient = jax.value_and_grad(loss_of, has_aux=True)
    if config.micro_batches == 1:
        (loss, terms), gradients = with_gradient(params, batch, 0, None)
        return loss, terms, gradients

    numbered = split(batch, config.micro_batches), jnp.arange(config.micro_batches)
    # The counts depend on masks alone; the features that this pass would compute, the compiler removes.
    own = jax.lax.map(lambda part: loss_of(params, part[0], part[1], None)[1]["counts"], numbered)
    counts = jax.tree.map(lambda count: count.sum(0), own)

    def run(part: tuple[Batch, Int[Array, ""]]) -> tuple[Any, Terms]:
        """What adds up over the parts, and what belongs to each sample."""
        (loss, terms), gradients = with_gradient(params, *part, counts)
        own = {name: terms.pop(name) for name in ("centres",) if name in terms}
        return ((loss, terms), gradients), own

    def add(total: Any, part: tuple[Batch, Int[Array, ""]]) -> tuple[Any, Terms]:
        summed, own = run(part)
        return jax.tree.map(jnp.add, total, summed), own

    one = jax.tree.map(lambda x: x[0], numbered)
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), jax.eval_shape(run, one)[0])
    ((loss, terms), gradients), own_of_samples = jax.lax.scan(add, zero, numbered)
    # What describes the features is no sum: its mean over the parts.
    metrics = {name: value / config.micro_batches for name, value in terms["metrics"].items()}
    return loss, {**terms, "metrics": metrics, **jax.tree.map(_join, own_of_samples)}, gradients


def compare(
    config: ml_collections.ConfigDict,
    statistics: Statistics,
    params: Params,
    teacher: Params,
    batch: Batch,
    step: Int[Array, ""],
    key: Key[Array, ""],
    counts: dict[str, Float[Array, ""]] | None,
    table: Float[Array, "r k p"] | None = None,
) -> tuple[Float[Array, ""], Terms]:
    """The objective of student and teacher on one batch.

    Args:
      config: the experiment.
      statistics: as in `make_step`.
      params: the student's encoder and heads, and the towers of its words.
      teacher: the teacher's.
      batch: as the loader yields it, on the device.
      step: for the schedules.
      key: of the drop path.
      counts: what each term's sum is divided by; its own count where None.
      table: the geo-prototypes; None where the model has none.

    Returns:
      As `objective`. Where `table` is to move, terms have "centres" too: {"centres": (b, k, p), "regions": (b,)}, what
      the teacher's global views of each sample make of its region's prototypes.
    """
    params, teacher = merged(config, params), merged(config, teacher)
    views = prepare(batch, statistics=statistics, augment=config.data.augment, seed=config.seed)
    views = {group: views[group] for group in ("global", "local") if group in views}
    keys = jax.random.split(key, len(views))
    place = {"lonlat": batch["lonlat"], "table": table}
    student = {
        group: encode(config.model, params["encoder"], images, teacher=False, key=group_key, **place)
        for (group, images), group_key in zip(views.items(), keys, strict=True)
    }
    taught = encode(config.model, teacher["encoder"], views["global"], teacher=True, key=None, **place)
    words = reading.read(config.model, params, batch, student["global"], jax.random.fold_in(key, len(views)))
    loss, terms = objective(
        config.objective,
        student,
        {"global": taught},
        views,
        params["heads"],
        teacher["heads"],
        index=batch["index"],
        seed=config.seed,
        teacher_temperature=teacher_temperature(config.objective, step, config.steps),
        counts=counts,
        streams=heads.streams_of(config.model),
        read=words,
    )
    if table is None or config.model.prototypes.frozen:
        return loss, terms
    fused, valid = (x.reshape(len(x), -1, *x.shape[3:]) for x in (taught["fused"], taught["fused_valid"]))
    centres, regions = skysense.prototype_centres(
        config.model, teacher["encoder"], fused, valid, batch["lonlat"], table
    )
    return loss, {**terms, "centres": {"centres": centres, "regions": regions}}


def encode(
    model: ml_collections.ConfigDict,
    params: Params,
    views: Batch,
    *,
    teacher: bool,
    key: Key[Array, ""] | None,
    lonlat: Float[Array, "b 2"],
    table: Float[Array, "r k p"] | None,
) -> Any:
    """The encoder's output on views, leading axes (b, v). The views of a sample are folded into the batch.

    Args:
      model: the config's `model`.
      params: of the encoder.
      views: prepared views.
      teacher: whether all valid dates are seen, at their true days; else what dropping and jitter left.
      key: of the drop path; None turns it off.
      lonlat: of the samples; the views of a sample are taken to lie in one region.
      table: the geo-prototypes; None where the model has none.
    """
    b, v = views["to_view"].shape[:2]
    days, valid = ("days", "valid") if teacher else ("student_days", "student_valid")

    def fold(x: Array) -> Array:
        return x.reshape(b * v, *x.shape[2:])

    images = {
        m: {
            "values": fold(views[m]["values"]),
            "days": fold(views[m][days]),
            "valid": fold(views[m][valid]),
            "clear": fold(views[m]["clear"]),
            "bands": jnp.repeat(views[m]["bands"], v, axis=0),
        }
        for m in MODALITIES
        if m in views
    }
    lonlat = jnp.repeat(lonlat, v, axis=0)
    output = skysense.apply(model, params, images, key=key, lonlat=lonlat, prototypes=table, place=place_rows)
    return jax.tree.map(lambda x: x.reshape(b, v, *x.shape[1:]), output)


def average(teacher: Params, student: Params, momentum: Float[Array, ""]) -> Params:
    """momentum * teacher + (1 - momentum) * student."""
    return jax.tree.map(lambda t, s: momentum * t + (1 - momentum) * s, teacher, student)


def split(batch: Batch, parts: int) -> Batch:
    """(b, ...) -> (parts, b / parts, ...); part i takes every `parts`-th sample from i on.

    So each device splits its own samples and none changes places.
    """
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)


def _join(parts: Array) -> Array:
    """Undoes `split`: (parts, b / parts, ...) -> (b, ...)."""
    return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])
