"""How sure a test number is: percentile bootstrap over the test examples.

Accuracy and micro-F1 are both a sum over examples divided by another, so one function serves them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

RESAMPLES = 1000
PERCENTILES = (2.5, 97.5)  # the ends of an interval
_BLOCK = 4_000_000  # drawn indices held at a time


def interval(
    numerator: Float[np.ndarray, "n"], denominator: Float[np.ndarray, "n"], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The 2.5 and 97.5 percentile of sum(numerator) / sum(denominator) when the examples are drawn with replacement.

    Args: as `ratios`.
    """
    low, high = np.percentile(ratios(numerator, denominator, resamples=resamples, seed=seed), PERCENTILES)
    return float(low), float(high)


def ratios(
    numerator: Float[np.ndarray, "n"], denominator: Float[np.ndarray, "n"], *, resamples: int = RESAMPLES, seed: int = 0
) -> Float[np.ndarray, "resamples"]:
    """sum(numerator) / sum(denominator) of each draw of examples with replacement; 0 where the second sum is.

    Args:
      numerator: of each test example; for accuracy 1 where it is right.
      denominator: of each test example; for accuracy all ones.
      resamples: how many test sets are drawn.
      seed: the same seed draws the same test sets, so two rows of a table are compared on the same draws.
    """
    rng, n = np.random.default_rng(seed), len(numerator)
    found = []
    step = max(1, _BLOCK // n)
    for start in range(0, resamples, step):
        drawn = rng.integers(0, n, (min(step, resamples - start), n))
        below = denominator[drawn].sum(1)
        found.append(np.divide(numerator[drawn].sum(1), below, out=np.zeros(len(drawn)), where=below > 0))
    return np.concatenate(found)


def score(truth: np.ndarray, predicted: np.ndarray) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """Numerator and denominator of each example: of accuracy for class numbers (n,), of micro-F1 for flags (n, k)."""
    if truth.ndim == 1:
        return (truth == predicted).astype(float), np.ones(len(truth))
    # Micro-F1 = 2 TP / (2 TP + FP + FN), and 2 TP + FP + FN = flags that are true + flags that are said.
    return 2.0 * (truth & predicted).sum(1), (truth.sum(1) + predicted.sum(1)).astype(float)


def with_interval(value: np.ndarray, draws: Float[np.ndarray, "r"], name: str = "accuracy") -> dict[str, float]:
    """A value under its name, and the ends of its interval, "low" and "high"; draws that are NaN don't count."""
    low, high = np.nanpercentile(draws, PERCENTILES)
    return {name: float(value), "low": float(low), "high": float(high)}


def paired(
    tables: Mapping[str, np.ndarray],
    draws: Mapping[str, np.ndarray],
    metrics: Mapping[str, Callable[[np.ndarray], np.ndarray]],
    ours: str,
) -> list[dict[str, Any]]:
    """Of every metric and other row, ours minus that row, with its interval over the same draws.

    Args:
      tables: row -> the confusion of each block, (blocks, k, k).
      draws: row -> confusions of redrawn blocks, (r, k, k), the same draws in every row.
      metrics: name -> the metric of confusions.
      ours: the row that the others are compared with.
    """
    return [
        {
            "baseline": name,
            "metric": metric,
            **with_interval(
                measure(tables[ours].sum(0)) - measure(tables[name].sum(0)),
                measure(draws[ours]) - measure(draws[name]),
                "difference",
            ),
        }
        for metric, measure in metrics.items()
        for name in tables
        if name != ours
    ]


def sentence(each: Mapping[str, Any], ours: str) -> str:
    """A paired difference in words."""
    ends = f"{100 * each['low']:+.1f} to {100 * each['high']:+.1f}"
    verdict = "" if each["low"] * each["high"] > 0 else ": not told apart"
    return (
        f"{ours} minus {each['baseline']}, {each['metric']}: {100 * each['difference']:+.1f} points"
        f" (95 % interval {ends}){verdict}"
    )
