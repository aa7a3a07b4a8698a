import math

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.neighbors import KNeighborsClassifier

import skyjax  # noqa: F401  # before jax
from skyjax.evals.knn import neighbours, predict


@pytest.fixture(scope="module")
def sets():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 12))
    labels, truth = rng.integers(0, 4, 60), rng.integers(0, 4, 2100)  # more than one block of queries
    return centres[labels] + rng.normal(size=(60, 12)), labels, centres[truth] + rng.normal(size=(2100, 12))


def vote_by_loop(bank, labels, query, k, temperature):
    """Float64, one neighbour at a time."""
    cosines = [float(b @ query) / math.sqrt(float(b @ b) * float(query @ query)) for b in bank]
    nearest = sorted(range(len(bank)), key=lambda i: -cosines[i])[:k]
    votes = [0.0] * (max(labels) + 1)
    for i in nearest:
        votes[labels[i]] += math.exp(cosines[i] / temperature)
    return votes.index(max(votes))


@pytest.mark.parametrize("k", [5, 20])
def test_votes_as_a_plain_loop_does(sets, k):
    bank, labels, queries = sets
    cosine, index = neighbours(bank, queries, 20)
    got = predict(cosine, index, labels, k=k, num_classes=4, temperature=0.07)
    for i in range(0, len(queries), 35):
        assert got[i] == vote_by_loop(bank, labels.tolist(), queries[i], k, 0.07)


def test_a_wide_temperature_is_the_unweighted_vote_of_sklearn(sets):
    bank, labels, queries = sets
    cosine, index = neighbours(bank, queries, 5)
    got = predict(cosine, index, labels, k=5, num_classes=4, temperature=1e4)
    peer = KNeighborsClassifier(5, metric="cosine", algorithm="brute").fit(bank, labels)
    shares = np.sort(peer.predict_proba(queries), axis=1)
    clear = shares[:, -1] > shares[:, -2]  # equal votes fall by the exponent here, by class number there
    assert clear.mean() > 0.8
    assert_array_equal(got[clear], peer.predict(queries)[clear])


def test_neighbours_come_nearest_first(sets):
    bank, _, queries = sets
    cosine, index = neighbours(bank, queries, 7)
    distance, want = KNeighborsClassifier(7, metric="cosine").fit(bank, np.zeros(60, int)).kneighbors(queries)
    assert_array_equal(index, want)
    assert_allclose(cosine, 1 - distance, atol=1e-5)


def test_a_bank_smaller_than_k_votes_as_a_whole():
    cosine, index = neighbours(np.eye(3), np.array([[1.0, 0.2, 0.1]]), 20)
    assert_array_equal(index, [[0, 1, 2]])
    assert predict(cosine, index, np.array([2, 0, 0]), k=20, num_classes=3)[0] == 2


def test_a_feature_of_length_zero_stays_finite():
    cosine, _ = neighbours(np.zeros((2, 3)), np.ones((1, 3)), 2)
    assert_array_equal(cosine, [[0, 0]])


def test_each_flag_is_its_own_vote():
    flags = np.array([[1, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], bool)
    bank = np.array([[1, 0], [1, 0.1], [1, -0.1], [-1, 0]], float)
    cosine, index = neighbours(bank, np.array([[1.0, 0.0]]), 3)
    votes = np.exp((cosine[0] - 1) / 0.07)
    want = [(votes * flags[index[0], k]).sum() > votes.sum() / 2 for k in range(3)]
    got = predict(cosine, index, flags, k=3, num_classes=3)
    assert_array_equal(got, [want])
    assert_array_equal(got, [[True, True, False]])
