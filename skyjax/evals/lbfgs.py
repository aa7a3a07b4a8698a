"""L-BFGS for many smooth convex problems of one shape at once.

Problems that are done leave the batch, so that the rest goes faster.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

MEMORY = 6
_SUFFICIENT = 1e-4  # share of the predicted decrease that a step must bring (Armijo)
_ROUNDING = 1e-7  # of the value: float32 sums say no more
_HALVINGS = 12

Objective = Callable[
    [Float[np.ndarray, "p ..."], Int[np.ndarray, "p"]], tuple[Float[np.ndarray, "p"], Float[np.ndarray, "p ..."]]
]


def minimise(
    objective: Objective, start: Float[np.ndarray, "p ..."], *, tolerance: float, steps: int
) -> Float[np.ndarray, "p ..."]:
    """Where each problem's gradient has no entry above `tolerance`, or where it is after `steps` evaluations.

    Args:
      objective: (points, numbers of the problems they belong to) -> (values, gradients).
      start: a point for each problem.
      tolerance: largest entry of the gradient at which a problem is done.
      steps: evaluations of the objective at most.
    """
    result = np.array(start, np.float32)
    which = np.arange(len(start))
    shape = start.shape[1:]

    def evaluate(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values, gradients = objective(points.reshape(-1, *shape), which)
        return values, gradients.reshape(len(which), -1)

    point = result.reshape(len(start), -1)
    value, gradient = evaluate(point)
    past: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # (step, change of gradient, 1 / their product)
    direction = -gradient
    length = 1 / np.maximum(1, np.abs(gradient).sum(1))
    halvings = np.zeros(len(which), int)
    for _ in range(steps):
        done = (np.abs(gradient).max(1) <= tolerance) | (halvings > _HALVINGS)
        if done.any():
            result[which[done]] = point[done].reshape(-1, *shape)
            left = ~done
            which, point, value, gradient = which[left], point[left], value[left], gradient[left]
            direction, length, halvings = direction[left], length[left], halvings[left]
            past = [(s[left], y[left], r[left]) for s, y, r in past]
            if not len(which):
                break
        trial = point + length[:, None] * direction
        trial_value, trial_gradient = evaluate(trial)
        slope = np.einsum("pi,pi->p", gradient, direction)
        good = trial_value <= value + _SUFFICIENT * length * slope + _ROUNDING * np.abs(value)
        step = np.where(good[:, None], trial - point, 0)
        change = np.where(good[:, None], trial_gradient - gradient, 0)
        product = np.einsum("pi,pi->p", step, change)
        # A problem that stays where it is this time remembers a pair that changes nothing.
        past = [
            *past[-(MEMORY - 1) :],
            (step, change, np.divide(1, product, out=np.zeros_like(product), where=product > 0)),
        ]
        point, value = point + step, np.where(good, trial_value, value)
        gradient = np.where(good[:, None], trial_gradient, gradient)
        direction = np.where(good[:, None], -_inverse_hessian_times(gradient, past), direction)
        length, halvings = np.where(good, 1, length / 2), np.where(good, 0, halvings + 1)
    result[which] = point.reshape(-1, *shape)
    return result


def _inverse_hessian_times(vector: np.ndarray, past: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> np.ndarray:
    """The two-loop recursion, with the usual first guess: the last pair's length over its change of gradient."""
    weights = []
    vector = vector.copy()
    for step, change, inverse in reversed(past):
        weight = inverse * np.einsum("pi,pi->p", step, vector)
        vector -= weight[:, None] * change
        weights.append(weight)
    vector *= _first_guess(past)[:, None]
    for (step, change, inverse), weight in zip(past, reversed(weights), strict=True):
        vector += (weight - inverse * np.einsum("pi,pi->p", change, vector))[:, None] * step
    return vector


def _first_guess(past: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> np.ndarray:
    guess = np.ones(len(past[-1][2]))
    for _, change, inverse in past:
        size = np.einsum("pi,pi->p", change, change) * inverse
        guess = np.where(size > 0, 1 / np.maximum(size, 1e-30), guess)
    return guess
