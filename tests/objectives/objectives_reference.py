"""What the objectives should be, in plain float64 Python loops and numpy; shares no code with skyjax."""

import math
from typing import Any

import numpy as np


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def project(head: dict[str, Any], x: np.ndarray, normed: np.ndarray | None = None) -> np.ndarray:
    """Unit vectors; with `normed`, a mask of rows, each feature is normed by these before both layers."""

    def norm(y: np.ndarray) -> np.ndarray:
        return y if normed is None else (y - y[normed].mean(0)) / np.sqrt(y[normed].var(0) + 1e-5)

    hidden = gelu(norm(norm(x) @ np.float64(head["hidden"]["kernel"]) + np.float64(head["hidden"]["bias"])))
    return unit(hidden @ np.float64(head["bottleneck"]["kernel"]) + np.float64(head["bottleneck"]["bias"]))


def balance(scores: np.ndarray, epsilon: float, iterations: int) -> np.ndarray:
    """Sinkhorn-Knopp on a matrix of exponentials: rows to one, columns to n / k, and rows to one at the end."""
    q = np.exp(scores / epsilon)
    for _ in range(iterations):
        q = q / q.sum(1, keepdims=True)
        q = q / q.sum(0, keepdims=True) * len(q) / q.shape[1]
    return q / q.sum(1, keepdims=True)


def dino(student, teacher, weight, student_head, teacher_head, *, temperature, epsilon, iterations) -> float:
    """Weighted sum over rows (n, c) of the cross-entropy against the balanced targets."""
    rows = [i for i in range(len(weight)) if weight[i] > 0]
    scores = project(teacher_head, teacher[rows]) @ unit(np.float64(teacher_head["classes"])).T
    targets = balance(scores, epsilon, iterations)
    total = 0.0
    for target, i in zip(targets, rows, strict=True):
        logits = project(student_head, student[i]) @ unit(np.float64(student_head["classes"])).T / temperature
        log_sum = math.log(sum(math.exp(v) for v in logits))
        total += weight[i] * -sum(q * (v - log_sum) for q, v in zip(target, logits, strict=True))
    return total


def infonce(student, teacher, weight, temperature: float) -> float:
    """Weighted sum over rows (b, r, d) of unit vectors; negatives are all rows there of the other samples."""
    b, r = weight.shape
    total = 0.0
    for i in range(b):
        for j in range(r):
            if weight[i, j] <= 0:
                continue
            for anchor, other in ((student, teacher), (teacher, student)):
                positive = anchor[i, j] @ other[i, j] / temperature
                negatives = [
                    anchor[i, j] @ other[c, m] / temperature
                    for c in range(b)
                    for m in range(r)
                    if c != i and weight[c, m] > 0
                ]
                log_sum = math.log(sum(math.exp(v) for v in [positive, *negatives]))
                total += weight[i, j] * (log_sum - positive) / 2
    return total


def symmetric_infonce(first: np.ndarray, second: np.ndarray, temperature: float) -> float:
    """Sum over the rows of two matrices of unit vectors."""
    total = 0.0
    for i in range(len(first)):
        for a, c in ((first, second), (second, first)):
            scores = [a[i] @ c[j] / temperature for j in range(len(first))]
            total += (math.log(sum(math.exp(v) for v in scores)) - scores[i]) / 2
    return total


def koleo(features: np.ndarray, floor: float) -> float:
    points = unit(features)
    total = 0.0
    for i in range(len(points)):
        nearest = min(np.linalg.norm(points[i] - points[j]) for j in range(len(points)) if j != i)
        total -= 0.5 * math.log(nearest**2 + floor**2)
    return total


def match_days(days, valid, other_days, other_valid) -> list[int | None]:
    """Slot of the same day for each slot; the n-th occurrence goes with the n-th."""
    taken: set[int] = set()
    slots: list[int | None] = []
    for day, there in zip(days, valid, strict=True):
        free = [u for u in range(len(other_days)) if other_valid[u] and other_days[u] == day and u not in taken]
        slots.append(free[0] if there and free else None)
        if slots[-1] is not None:
            taken.add(slots[-1])
    return slots
