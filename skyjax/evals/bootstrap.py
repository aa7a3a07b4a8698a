"""How sure a test number is: percentile bootstrap over the test examples.

Accuracy and micro-F1 are both a sum over examples divided by another, so one function serves them.
"""

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
