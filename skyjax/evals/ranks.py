"""Recall of a search in which several items may be right and several scores equal.

An order among equal scores would be luck, so a query's hit is its expectation over all of them: a model to which all is
alike gets chance, whatever comes first in memory.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

AT = (1, 5, 10)
_BLOCK = 2**25  # scores held at a time


def hits(
    scores: Shaped[np.ndarray, "q n"], right: Bool[np.ndarray, "q n"], at: Sequence[int] = AT
) -> Float[np.ndarray, "q a"]:
    """Probability that a right item is among the first k of each query, for each k of `at`.

    With a wrong items that score more than the best right one, and of those that score the same r right and w wrong, it
    is 1 - C(w, k - a) / C(w + r, k - a): one minus the share of orders whose next k - a items are all wrong.

    Args:
      scores: the larger, the more alike.
      right: items that are right; a query has one or more.
      at: as k.
    """
    lowest = np.finfo(scores.dtype).min if scores.dtype.kind == "f" else np.iinfo(scores.dtype).min
    best = np.where(right, scores, lowest).max(1, keepdims=True)
    ahead = ((scores > best) & ~right).sum(1)
    alike = scores == best
    tied_right = (alike & right).sum(1)
    tied_wrong = alike.sum(1) - tied_right
    found = []
    for k in at:
        places = np.maximum(k - ahead, 0)
        missed = np.ones(len(scores))
        for place in range(k):
            # Of what is left of the tied, one more that is wrong.
            share = np.maximum(tied_wrong - place, 0) / np.maximum(tied_wrong + tied_right - place, 1)
            missed *= np.where(place < places, share, 1.0)
        found.append(1 - missed)
    return np.stack(found, axis=1)


def search(
    score: Callable[[slice], Shaped[np.ndarray, "q n"]],
    queries: Int[np.ndarray, "q"],
    items: Int[np.ndarray, "n"],
    at: Sequence[int] = AT,
) -> Float[np.ndarray, "q a"]:
    """`hits` of all queries, a block at a time.

    Args:
      score: a slice of the queries -> their scores with all items.
      queries: site of each query.
      items: site of each item; those of the query's site are right.
      at: as in `hits`.
    """
    step = max(1, _BLOCK // max(len(items), 1))
    blocks = [slice(start, min(start + step, len(queries))) for start in range(0, len(queries), step)]
    return np.concatenate([hits(score(block), queries[block, None] == items, at) for block in blocks])


def cosines(
    queries: Float[np.ndarray, "q e"], items: Float[np.ndarray, "n e"]
) -> Callable[[slice], Float[np.ndarray, "b n"]]:
    """Scores of unit vectors for `search`; equal items get equal scores, wherever a product's blocks put them."""
    unique, which = np.unique(items, axis=0, return_inverse=True)
    return lambda block: (queries[block] @ unique.T)[:, which.reshape(-1)]
