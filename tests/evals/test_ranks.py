import itertools
import math

import numpy as np
import pytest

from skyjax.evals import ranks


def by_all_orders(scores, right, k):
    """The share of the orders that the scores allow in which a right item is among the first k."""
    fitting = [
        order
        for order in itertools.permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    return np.mean([any(right[i] for i in order[:k]) for order in fitting])


def test_ties_are_the_mean_over_all_orders():
    rng = np.random.default_rng(0)
    scores, right = rng.integers(0, 3, (40, 6)).astype(np.float32), rng.random((40, 6)) < 0.4
    right[:, 0] |= ~right.any(1)
    got = ranks.hits(scores, right, (1, 2, 5))
    want = [[by_all_orders(s, r, k) for k in (1, 2, 5)] for s, r in zip(scores, right, strict=True)]
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_without_ties_it_is_the_recall_of_a_sorted_list():
    rng = np.random.default_rng(1)
    scores, owner = rng.normal(size=(30, 90)), np.repeat(np.arange(30), 3)
    got = ranks.search(lambda block: scores[block], np.arange(30), owner)
    for query in range(30):
        best = min(list(np.argsort(-scores[query])).index(i) for i in range(3 * query, 3 * query + 3))
        np.testing.assert_array_equal(got[query], [best < k for k in ranks.AT])


@pytest.mark.parametrize(("captions", "k"), [(1, 1), (1, 5), (5, 1), (5, 10)])
def test_a_model_to_which_all_is_alike_gets_chance(captions, k):
    """Also where the right items come first in memory, as they do in a list of pairs."""
    images, owner = np.arange(20), np.repeat(np.arange(20), captions)
    alike = np.ones((20 * captions, 4), np.float32) / 2
    found = ranks.search(ranks.cosines(alike[:20], alike), images, owner, (k,))
    wrong, every = 19 * captions, 20 * captions
    np.testing.assert_allclose(found, 1 - math.comb(wrong, k) / math.comb(every, k))


def test_blocks_do_not_matter(monkeypatch):
    rng = np.random.default_rng(2)
    images, captions, owner = rng.normal(size=(17, 4)), rng.normal(size=(40, 4)), rng.integers(0, 17, 40)
    score = ranks.cosines(captions, images)
    whole = ranks.search(score, owner, np.arange(17))
    monkeypatch.setattr(ranks, "_BLOCK", 17 * 7)
    np.testing.assert_array_equal(ranks.search(score, owner, np.arange(17)), whole)


def test_equal_items_score_the_same_to_the_bit():
    """A product of many columns is made in blocks, whose sums may round differently."""
    rng = np.random.default_rng(3)
    items = rng.normal(size=(5, 384)).astype(np.float32)[rng.integers(0, 5, 1003)]
    scores = ranks.cosines(rng.normal(size=(3, 384)).astype(np.float32), items)(slice(0, 3))
    assert all(len(np.unique(row)) == 5 for row in scores)
