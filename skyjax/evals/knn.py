"""k nearest neighbours by cosine on frozen features: exact, nothing to choose.

A neighbour at cosine s votes exp(s / 0.07); k = 20 is the field's usual number and k = 5 stands beside it. With several
labels an example, each class is its own yes-or-no vote.
"""

import numpy as np
from jaxtyping import Float, Int

TEMPERATURE = 0.07
NEIGHBOURS = (20, 5)
_BLOCK = 1024  # queries compared with the whole bank at a time


def neighbours(
    bank: Float[np.ndarray, "n d"], queries: Float[np.ndarray, "q d"], k: int
) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
    """Cosine and index of each query's k nearest in the bank, nearest first; all of the bank where it has fewer.

    A feature of length zero is at cosine 0 from everything.
    """
    k = min(k, len(bank))
    bank, queries = _unit(bank), _unit(queries)
    cosines, indices = [], []
    for start in range(0, len(queries), _BLOCK):
        cosine = queries[start : start + _BLOCK] @ bank.T
        index = np.argpartition(-cosine, k - 1, axis=1)[:, :k]
        cosine = np.take_along_axis(cosine, index, axis=1)
        order = np.argsort(-cosine, axis=1, kind="stable")
        cosines.append(np.take_along_axis(cosine, order, axis=1))
        indices.append(np.take_along_axis(index, order, axis=1))
    return np.concatenate(cosines), np.concatenate(indices)


def predict(
    cosine: Float[np.ndarray, "q n"],
    index: Int[np.ndarray, "q n"],
    labels: np.ndarray,
    *,
    k: int,
    num_classes: int,
    temperature: float = TEMPERATURE,
) -> np.ndarray:
    """The class number (q,) with most votes, or where `labels` are flags (n, classes) the flags (q, classes) voted for.

    Args:
      cosine: as `neighbours` returns it, for k or more neighbours; the k nearest vote.
      index: of the neighbours in the bank.
      labels: of the bank: class numbers (n,), or flags (n, classes).
      k: how many neighbours vote.
      num_classes: classes there are.
      temperature: of the vote exp(cosine / temperature).
    """
    # The nearest neighbour's vote is 1: only ratios matter, and exp(1 / 0.01) would not fit float32.
    votes = np.exp((cosine[:, :k] - cosine[:, :1]) / temperature)
    one_hot = np.eye(num_classes, dtype=votes.dtype)[labels] if labels.ndim == 1 else labels.astype(votes.dtype)
    scores = np.einsum("qn,qnk->qk", votes, one_hot[index[:, :k]])
    return scores.argmax(1) if labels.ndim == 1 else scores > votes.sum(1, keepdims=True) / 2


def _unit(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    features = np.asarray(features, np.float32)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
