"""Linear probes on frozen features, by the field's two protocols. Each is chosen on validation and tested once.

AdamW (OlmoEarth, Galileo): batch normalisation without gain or bias, a linear layer, 50 epochs, 10 % warm-up, cosine
to 1e-5, eight learning rates trained at once. The normalisation uses mean and variance of the whole training part,
which is what the running statistics of batch normalisation tend to on frozen features. The weights that did best on
validation are tested; they have not seen the validation part.

L-BFGS (torchgeo-bench): multinomial logistic regression for 40 values of C; the best C on validation is fitted again on
training and validation together. Here the features are standardised first. torchgeo-bench does not do so, but then one
grid of C cannot serve raw image statistics and a network's features alike, and a baseline that is spoilt by its scale
keeps nobody honest.

With several labels an example, both fit one logistic regression a class (micro-F1 instead of accuracy).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from skyjax.evals.bootstrap import score
from skyjax.evals.lbfgs import minimise

LEARNING_RATES = (1e-4, 5e-4, 1e-3, 5e-3, 1e-2, 5e-2, 1e-1, 5e-1)
INVERSE_PENALTIES = tuple(np.logspace(-6, 4, 40).tolist())
EPOCHS = 50
BATCH_SIZE = 128
FINAL_LEARNING_RATE = 1e-5
WEIGHT_DECAY = 0.01
LBFGS_STEPS = 300  # evaluations at most; only penalties too weak to matter need more
LBFGS_TOLERANCE = 5e-5  # largest entry of the gradient of the mean loss, in units of its curvature


@dataclasses.dataclass(frozen=True)
class Part:
    """Frozen features of a part of a labelled set, with class numbers (n,) or flags (n, classes)."""

    features: Float[np.ndarray, "n d"]
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Fit:
    """A probe's answer on the test part.

    Attributes:
      predicted: class numbers or flags of the test part.
      chosen: the learning rate or the C.
      validation: the score of every value tried, in order.
    """

    predicted: np.ndarray
    chosen: float
    validation: tuple[float, ...]


def fit_adamw(train: Part, validation: Part, test: Float[np.ndarray, "n d"], *, num_classes: int, seed: int = 0) -> Fit:
    """Batch normalisation and a linear layer by AdamW, the learning rate chosen on validation."""
    normalise = standardiser(train.features)
    weights = train_adamw(normalise(train.features), train.labels, num_classes=num_classes, seed=seed)
    scores = [_score(validation, normalise(validation.features), each) for each in weights]
    best = int(np.argmax(scores))  # the smaller one of equals
    predicted = _predict(normalise(test), weights[best], validation.labels.ndim)
    return Fit(predicted, LEARNING_RATES[best], tuple(scores))


def train_adamw(
    features: Float[np.ndarray, "n d"], labels: np.ndarray, *, num_classes: int, seed: int
) -> Float[np.ndarray, "rates d+1 k"]:
    """Weights (the last row is the bias) after training with each of LEARNING_RATES; all start at zero."""
    n, batch = len(features), min(BATCH_SIZE, len(features))
    per_epoch = n // batch
    rng = np.random.default_rng(seed)
    order = np.stack([rng.permutation(n)[: per_epoch * batch].reshape(per_epoch, batch) for _ in range(EPOCHS)])
    targets = np.eye(num_classes, dtype=np.float32)[labels] if labels.ndim == 1 else labels.astype(np.float32)
    weights = _train_all(
        jnp.asarray(_with_one(features)),
        jnp.asarray(targets),
        jnp.asarray(order.reshape(-1, batch).astype(np.int32)),
        jnp.asarray(LEARNING_RATES),
        one_label=labels.ndim == 1,
    )
    return np.asarray(weights)


@functools.partial(jax.jit, static_argnames="one_label")
def _train_all(
    features: jax.Array, targets: jax.Array, order: jax.Array, rates: jax.Array, *, one_label: bool
) -> jax.Array:
    steps = len(order)
    optimizer = optax.inject_hyperparams(optax.adamw, static_args=("weight_decay",))(1.0, weight_decay=WEIGHT_DECAY)

    def loss(weights: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = x @ weights
        each = optax.softmax_cross_entropy(logits, y) if one_label else optax.sigmoid_binary_cross_entropy(logits, y)
        return each.mean()

    def train(rate: jax.Array) -> jax.Array:
        schedule = _warmup_cosine(rate, steps)

        def step(carry: tuple, i: jax.Array) -> tuple[tuple, None]:
            weights, state = carry
            gradient = jax.grad(loss)(weights, features[order[i]], targets[order[i]])
            state.hyperparams["learning_rate"] = schedule(i)
            update, state = optimizer.update(gradient, state, weights)
            return (weights + update, state), None

        start = jnp.zeros((features.shape[1], targets.shape[1]))
        (weights, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), jnp.arange(steps))
        return weights

    return jax.vmap(train)(rates)


def _warmup_cosine(peak: jax.Array, steps: int) -> Callable[[jax.Array], jax.Array]:
    """10 % linear warm-up to the peak, then cosine to FINAL_LEARNING_RATE at the last step."""
    warmup = max(1, steps // 10)

    def rate(step: jax.Array) -> jax.Array:
        progress = jnp.clip((step - warmup) / max(1, steps - 1 - warmup), 0, 1)
        cosine = FINAL_LEARNING_RATE + (peak - FINAL_LEARNING_RATE) * (1 + jnp.cos(jnp.pi * progress)) / 2
        return jnp.where(step < warmup, peak * (step + 1) / warmup, cosine)

    return rate


def fit_lbfgs(
    train: Part,
    validation: Part,
    test: Float[np.ndarray, "n d"],
    *,
    num_classes: int,
    again: Part | None = None,
    penalties: Sequence[float] = INVERSE_PENALTIES,
) -> Fit:
    """Logistic regression by L-BFGS, C chosen on validation, fitted again on training and validation, or on `again`.

    `again` is for parts that a gap keeps apart: once C is chosen, what lies in the gap may train too.
    """
    normalise = standardiser(train.features)
    path = logistic_path(normalise(train.features), train.labels, penalties, num_classes=num_classes)
    held_out = normalise(validation.features)
    scores = [_score(validation, held_out, each) for each in path]
    best = int(np.argmax(scores))  # the stronger penalty of equals
    both = again or Part(
        np.concatenate([train.features, validation.features]), np.concatenate([train.labels, validation.labels])
    )
    chosen = penalties[best]
    (weights,) = logistic_path(
        normalise(both.features), both.labels, [chosen], num_classes=num_classes, start=path[best]
    )
    return Fit(_predict(normalise(test), weights, both.labels.ndim), chosen, tuple(scores))


def logistic_path(
    features: Float[np.ndarray, "n d"],
    labels: np.ndarray,
    penalties: Sequence[float],
    *,
    num_classes: int,
    start: Float[np.ndarray, "d+1 k"] | None = None,
) -> Float[np.ndarray, "p d+1 k"]:
    """Minimises |W|^2 / 2 + C * sum of the log losses, the bias unpenalised, for every C at once.

    All C go through the same matrix products, which is several times faster than one after another. The features are
    turned to their principal axes, which leaves the penalty as it is, and each axis is measured in units of its
    expected curvature; L-BFGS then needs tens of steps where it would need thousands.

    Args:
      features: standardised.
      labels: class numbers (n,), or flags (n, classes).
      penalties: values of C.
      num_classes: classes there are.
      start: weights near the solutions; without them the search starts where every class is said with its share.

    Returns:
      For each C the weights; the last row is the bias.
    """
    one_label = labels.ndim == 1
    targets = np.eye(num_classes, dtype=np.float32)[labels] if one_label else labels.astype(np.float32)
    centre = features.mean(0)
    centred = (features - centre).astype(np.float64)
    variance, axes = _principal_axes(centred)
    rotated = _with_one((centred @ axes).astype(np.float32))

    share = targets.mean(0).clip(1e-3, 1 - 1e-3)
    curvature = float(np.mean(share * (1 - share)))  # of the log loss where every class is said with its share
    inverse = 1 / (np.asarray(penalties)[:, None] * len(features))
    decay = np.append(np.ones_like(variance), 0)  # the bias has none
    scale = 1 / np.sqrt(curvature * np.append(variance, 1) + inverse * decay)

    def mean_loss(solution: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Objective / (C n) of the problems `which`, (p,), and its gradient, (p, d+1, k), in the scaled variables."""
        weights = solution * scale[which, :, None]
        logits = (rotated @ _side_by_side(weights)).reshape(len(rotated), len(which), -1)
        loss, residual = _log_loss(logits, targets[:, None], one_label)
        gradient = rotated.T @ residual.reshape(len(rotated), -1) / len(rotated)
        gradient = gradient.reshape(-1, len(which), num_classes).swapaxes(0, 1)
        decayed = inverse[which, :, None] * decay[:, None] * weights
        value = loss.mean(0, dtype=np.float64) + (decayed * weights).sum((1, 2)) / 2
        return value, ((gradient + decayed) * scale[which, :, None]).astype(np.float32)

    first = np.zeros((len(variance) + 1, num_classes))
    if start is None:
        first[-1] = np.log(share) if one_label else np.log(share / (1 - share))
    else:
        first[:-1], first[-1] = axes.T @ start[:-1], start[-1] + centre @ start[:-1]
    weights = scale[:, :, None] * minimise(
        mean_loss, first / scale[:, :, None], tolerance=LBFGS_TOLERANCE, steps=LBFGS_STEPS
    )
    unrotated = np.einsum("da,pak->pdk", axes, weights[:, :-1])
    bias = weights[:, -1] - np.einsum("d,pdk->pk", centre, unrotated)
    return np.concatenate([unrotated, bias[:, None]], axis=1, dtype=np.float32)


def _principal_axes(
    centred: Float[np.ndarray, "n d"],
) -> tuple[Float[np.ndarray, "a"], Float[np.ndarray, "d a"]]:
    """Variance along each axis, and the axes, but those that no example moves on: the optimum is zero along them."""
    n, d = centred.shape
    variance, vectors = np.linalg.eigh((centred @ centred.T if n < d else centred.T @ centred) / n)
    kept = variance > variance.max() * 1e-10
    variance, vectors = variance[kept], vectors[:, kept]
    return variance, centred.T @ vectors / np.sqrt(n * variance) if n < d else vectors


def _side_by_side(weights: np.ndarray) -> np.ndarray:
    """(p, d, k) -> (d, p k), float32."""
    return weights.swapaxes(0, 1).reshape(weights.shape[1], -1).astype(np.float32)


def _log_loss(logits: np.ndarray, targets: np.ndarray, one_label: bool) -> tuple[np.ndarray, np.ndarray]:
    """The loss (n, p) of logits (n, p, k), and its derivative by the logits."""
    if one_label:
        logits = logits - logits.max(2, keepdims=True)
        exponentials = np.exp(logits)
        total = exponentials.sum(2, keepdims=True)
        return np.log(total[..., 0]) - (logits * targets).sum(2), exponentials / total - targets
    loss = np.logaddexp(0, logits) - logits * targets
    return loss.sum(2), 1 / (1 + np.exp(-np.clip(logits, -80, 80))) - targets


def _score(part: Part, features: Float[np.ndarray, "n d"], weights: np.ndarray) -> float:
    above, below = score(part.labels, _predict(features, weights, part.labels.ndim))
    return float(above.sum() / max(below.sum(), 1))


def _predict(features: Float[np.ndarray, "n d"], weights: np.ndarray, label_axes: int) -> np.ndarray:
    logits = _with_one(features) @ weights
    return logits.argmax(1) if label_axes == 1 else logits > 0


def _with_one(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d+1"]:
    return np.concatenate([features, np.ones((len(features), 1), features.dtype)], axis=1, dtype=np.float32)


def standardiser(features: Float[np.ndarray, "n d"]) -> Callable[[np.ndarray], Float[np.ndarray, "n d"]]:
    """x -> (x - mean) / std by the statistics of `features`; a feature that never moves becomes 0."""
    mean = features.mean(0, dtype=np.float64)
    std = features.std(0, dtype=np.float64)
    # Rounding alone moves a constant feature by some 1e-7 of its size; dividing by that would make noise of it.
    inverse = np.where(std > 1e-6 * np.abs(mean) + 1e-30, 1 / np.maximum(std, 1e-30), 0)
    return lambda x: ((x - mean) * inverse).astype(np.float32)
