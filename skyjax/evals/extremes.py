"""The best and the worst queries of a search, for the report."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

SHOWN = 4  # best and worst queries each way
FOUND = 3  # first answers of each
_NONE = -2.0  # less than any cosine


def extremes(
    score: Callable[[slice], np.ndarray],
    queries: Int[np.ndarray, "q"],
    items: Int[np.ndarray, "n"],
    texts: Sequence[str],
    by_text: bool,
) -> list[dict[str, Any]]:
    """The best and the worst queries, by how far the best right item scores above the best wrong one.

    Args:
      score: a slice of the queries -> cosines with all items.
      queries: image number of each query.
      items: image number of each item.
      texts: the queries where `by_text`, else the items.
      by_text: whether texts look for images.

    Returns:
      Each has "kind" ("best" or "worst"), "query", "rank" of the best right item, "own", the best right item,
      and "found", the first items; these are texts or image numbers. "images" are the numbers of all images named.
      Texts of the same words are shown once, and are right where one of them is.
    """
    margins = []
    for start in range(0, len(queries), 1024):
        block = slice(start, min(start + 1024, len(queries)))
        scores, right = score(block), queries[block, None] == items
        margins.append(np.where(right, scores, _NONE).max(1) - np.where(right, _NONE, scores).max(1))
    order = np.argsort(-np.concatenate(margins), kind="stable").tolist()
    # One query a site, so that five captions of one image do not fill the page; and none twice.
    taken: set[int] = set()
    best, worst = (_different(each, queries, texts if by_text else None, taken) for each in (order, order[::-1]))
    found = []
    for kind, chosen in (("best", best), ("worst", worst)):
        for i in chosen:
            scores, right = score(slice(i, i + 1))[0], items == queries[i]
            own = int(np.where(right, scores, _NONE).argmax())
            first = _first(np.argsort(-scores, kind="stable"), None if by_text else texts)
            shown = [int(items[each]) for each in (own, *first)] if by_text else [int(queries[i])]
            found.append(
                {
                    "kind": kind,
                    "query": texts[i] if by_text else int(queries[i]),
                    "rank": 1 + int(((scores > scores[own]) & ~right).sum()),
                    "own": int(items[own]) if by_text else texts[own],
                    "found": [
                        {
                            "item": int(items[each]) if by_text else texts[each],
                            "score": float(scores[each]),
                            "right": bool(right[each] if by_text else right[[t == texts[each] for t in texts]].any()),
                        }
                        for each in first
                    ],
                    "images": sorted(set(shown)),
                }
            )
    return found


def _different(
    order: Sequence[int], queries: Int[np.ndarray, "q"], texts: Sequence[str] | None, taken: set[int]
) -> list[int]:
    """The first queries of different words whose sites were not taken yet; then they are."""
    chosen: list[int] = []
    said: set[str] = set()
    for i in order:
        if len(chosen) == SHOWN:
            break
        words = texts[i] if texts is not None else str(i)
        if int(queries[i]) not in taken and words not in said:
            chosen.append(i)
            taken.add(int(queries[i]))
            said.add(words)
    return chosen


def _first(order: Int[np.ndarray, "n"], texts: Sequence[str] | None) -> list[int]:
    """The first items, of those with the same words one."""
    if texts is None:
        return order[:FOUND].tolist()
    first: dict[str, int] = {}
    for each in order.tolist():
        first.setdefault(texts[each], each)
        if len(first) == FOUND:
            break
    return list(first.values())
