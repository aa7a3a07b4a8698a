import numpy as np
import pytest
import scipy.special
from numpy.testing import assert_allclose
from sklearn.linear_model import LogisticRegression

import skyjax  # noqa: F401  # before jax
from skyjax.evals import linear
from skyjax.evals.lbfgs import minimise
from skyjax.evals.linear import Part, fit_adamw, fit_lbfgs, logistic_path, standardiser, train_adamw

CLASSES = 3


@pytest.fixture(scope="module")
def data():
    """Overlapping classes in correlated features, standardised."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, 300)
    hidden = rng.normal(size=(CLASSES, 4))[labels] + rng.normal(size=(300, 4))
    features = hidden @ rng.normal(size=(4, 10)) + 0.3 * rng.normal(size=(300, 10)) + 5
    return standardiser(features)(features), labels


def test_every_c_reaches_the_optimum_of_sklearn(data):
    features, labels = data
    penalties = (1e-4, 1e-2, 1.0, 100.0)
    path = logistic_path(features, labels, penalties, num_classes=CLASSES)
    for penalty, weights in zip(penalties, path, strict=True):
        peer = LogisticRegression(C=penalty, tol=1e-10, max_iter=10_000).fit(features.astype(float), labels)
        assert_allclose(weights[:-1], peer.coef_.T, atol=5e-3 * (1 + np.abs(peer.coef_).max()))
        bias = weights[-1] - weights[-1].mean()  # only differences between classes count
        assert_allclose(bias, peer.intercept_ - peer.intercept_.mean(), atol=5e-3 * (1 + np.abs(bias).max()))


def test_more_features_than_examples(data):
    features, labels = data
    wide = np.concatenate([features[:20], np.random.default_rng(1).normal(size=(20, 40))], axis=1).astype(np.float32)
    (weights,) = logistic_path(wide, labels[:20], [0.1], num_classes=CLASSES)
    peer = LogisticRegression(C=0.1, tol=1e-10, max_iter=10_000).fit(wide.astype(float), labels[:20])
    assert_allclose(weights[:-1], peer.coef_.T, atol=2e-3)


def test_flags_are_one_regression_a_class(data):
    features, labels = data
    flags = np.stack([labels == 0, labels != 1], axis=1)
    (weights,) = logistic_path(features, flags, [0.5], num_classes=2)
    for k in range(2):
        peer = LogisticRegression(C=0.5, tol=1e-10, max_iter=10_000).fit(features.astype(float), flags[:, k])
        assert_allclose(weights[:-1, k], peer.coef_[0], atol=5e-3)
        assert_allclose(weights[-1, k], peer.intercept_[0], atol=5e-3)


def test_a_start_changes_the_way_but_not_the_end(data):
    features, labels = data
    (cold,) = logistic_path(features, labels, [1.0], num_classes=CLASSES)
    (warm,) = logistic_path(features, labels, [1.0], num_classes=CLASSES, start=cold + 0.3)
    assert_allclose(warm[:-1], cold[:-1], atol=0.01)


def test_lbfgs_is_chosen_on_validation_and_fitted_again(data):
    features, labels = data
    train, validation = Part(features[:150], labels[:150]), Part(features[150:200], labels[150:200])
    fit = fit_lbfgs(train, validation, features[200:], num_classes=CLASSES)
    accuracies = [
        LogisticRegression(C=c, max_iter=2000)
        .fit(features[:150], labels[:150])
        .score(features[150:200], labels[150:200])
        for c in linear.INVERSE_PENALTIES[10:26]
    ]
    assert_allclose(fit.validation[10:26], accuracies, atol=0.021)  # one example of 50
    assert fit.chosen == linear.INVERSE_PENALTIES[int(np.argmax(fit.validation))]
    both = standardiser(features[:150])(features)
    peer = LogisticRegression(C=fit.chosen, tol=1e-8, max_iter=5000).fit(both[:200], labels[:200])
    assert np.mean(fit.predicted == peer.predict(both[200:])) > 0.98


def test_minimise_solves_quadratics_of_very_different_size():
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(3, 6, 6))
    matrices = np.einsum("pij,pkj->pik", factors, factors) + np.eye(6)
    matrices *= np.array([1e-2, 1.0, 1e2])[:, None, None]
    targets = rng.normal(size=(3, 6))

    def objective(x, which):
        away = x - targets[which]
        gradient = np.einsum("pij,pj->pi", matrices[which], away)
        return np.einsum("pi,pi->p", away, gradient) / 2, gradient

    got = minimise(objective, np.zeros((3, 6)), tolerance=1e-5, steps=200)
    assert_allclose(got, targets, atol=2e-3)


def adamw_by_loop(features, labels, rate, order):
    """Decoupled weight decay (Loshchilov & Hutter), float64, one step at a time."""
    x = np.append(features, np.ones((len(features), 1)), axis=1).astype(float)
    y, weights = np.eye(CLASSES)[labels], np.zeros((x.shape[1], CLASSES))
    first, second, steps = np.zeros_like(weights), np.zeros_like(weights), len(order)
    warmup = steps // 10
    for i, batch in enumerate(order):
        logits = x[batch] @ weights
        gradient = x[batch].T @ (scipy.special.softmax(logits, axis=1) - y[batch]) / len(batch)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        if i < warmup:
            now = rate * (i + 1) / warmup
        else:
            now = 1e-5 + (rate - 1e-5) * (1 + np.cos(np.pi * (i - warmup) / (steps - 1 - warmup))) / 2
        update = first / (1 - 0.9 ** (i + 1)) / (np.sqrt(second / (1 - 0.999 ** (i + 1))) + 1e-8)
        weights = weights - now * (update + 0.01 * weights)
    return weights


def test_every_rate_trains_as_a_plain_loop_does(data, monkeypatch):
    monkeypatch.setattr(linear, "EPOCHS", 10)
    features, labels = data
    got = train_adamw(features, labels, num_classes=CLASSES, seed=3)
    rng = np.random.default_rng(3)
    order = np.concatenate([rng.permutation(300)[:256].reshape(2, 128) for _ in range(10)])
    for i in (0, 4, 7):
        want = adamw_by_loop(features, labels, linear.LEARNING_RATES[i], order)
        assert_allclose(got[i], want, atol=2e-4 * max(1, np.abs(want).max()))


def test_adamw_chooses_the_rate_on_validation(data):
    features, labels = data
    train, validation = Part(features[:150], labels[:150]), Part(features[150:200], labels[150:200])
    fit = fit_adamw(train, validation, features[200:], num_classes=CLASSES)
    mean, std = features[:150].mean(0), features[:150].std(0)  # the training part's alone
    standard = np.append((features - mean) / std, np.ones((300, 1)), axis=1)
    all_weights = train_adamw((features[:150] - mean) / std, labels[:150], num_classes=CLASSES, seed=0)
    said = [(standard @ weights).argmax(1) for weights in all_weights]
    scores = [np.mean(each[150:200] == labels[150:200]) for each in said]
    assert_allclose(fit.validation, scores, atol=0.021)  # one example of 50
    best = linear.LEARNING_RATES.index(fit.chosen)
    assert fit.validation[best] == max(fit.validation) > min(fit.validation)
    assert np.mean(fit.predicted == said[best][200:]) > 0.98


def test_adamw_learns_flags(data):
    features, labels = data
    flags = np.stack([labels == 0, labels == 1, labels == 2], axis=1)
    fit = fit_adamw(
        Part(features[:150], flags[:150]), Part(features[150:200], flags[150:200]), features[200:], num_classes=3
    )
    assert fit.predicted.shape == (100, 3)
    assert np.mean(fit.predicted == flags[200:]) > 0.75


def test_a_constant_feature_becomes_zero():
    features = np.stack([np.full(50, 0.1, np.float32) * 3, np.arange(50, dtype=np.float32)], axis=1)
    standard = standardiser(features)(features)
    assert_allclose(standard[:, 0], 0)
    assert_allclose(standard[:, 1].std(), 1, rtol=1e-5)
