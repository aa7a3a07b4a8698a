import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.stats import binom
from sklearn.metrics import f1_score

from skyjax.evals.bootstrap import interval, score


def test_the_interval_of_an_accuracy_is_the_binomials():
    right = np.zeros(400)
    right[:300] = 1
    low, high = interval(right, np.ones(400), resamples=20_000)
    # Drawing examples with replacement makes the number that are right binomial.
    want = binom(400, 0.75).ppf([0.025, 0.975]) / 400
    assert_allclose([low, high], want, atol=1.5 / 400)


def test_the_same_seed_draws_the_same_sets():
    right = np.arange(50) % 3 == 0
    assert interval(right, np.ones(50)) == interval(right, np.ones(50))
    assert interval(right, np.ones(50)) != interval(right, np.ones(50), seed=1)


def test_blocks_make_no_difference_in_kind(monkeypatch):
    monkeypatch.setattr("skyjax.evals.bootstrap._BLOCK", 7 * 400)
    right = np.arange(400) % 4 > 0
    low, high = interval(right, np.ones(400), resamples=1000)
    assert_allclose([low, high], binom(400, 0.75).ppf([0.025, 0.975]) / 400, atol=0.01)


def test_all_right_is_certain():
    assert interval(np.ones(9), np.ones(9)) == (1.0, 1.0)


def test_micro_f1_is_sklearns():
    rng = np.random.default_rng(0)
    truth, said = rng.random((40, 5)) < 0.3, rng.random((40, 5)) < 0.4
    above, below = score(truth, said)
    assert above.sum() / below.sum() == pytest.approx(f1_score(truth, said, average="micro"))
