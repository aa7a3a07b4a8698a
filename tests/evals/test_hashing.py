import sys

import numpy as np
import pytest

from skyjax.errors import UserError
from skyjax.evals import hashing, ranks


@pytest.fixture(scope="module")
def pairs():
    """Images and captions as a contrastive space has them: pairs near each other, all in few directions, apart."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(300, 12)) @ rng.normal(size=(12, 48)) * np.geomspace(1, 0.05, 48)

    def side(offset):
        vectors = shared + 0.3 * rng.normal(size=shared.shape) * np.geomspace(1, 0.05, 48) + offset
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    return side(np.eye(48)[0] * 3), side(-np.eye(48)[0] * 3)


def bits_of(codes):
    return np.unpackbits(codes, axis=1).astype(int)


def test_distances_are_those_of_counted_bits():
    rng = np.random.default_rng(1)
    queries, items = (rng.integers(0, 256, (n, 8), dtype=np.uint8) for n in (9, 70))
    want = np.abs(bits_of(queries)[:, None] - bits_of(items)).sum(-1)
    np.testing.assert_array_equal(hashing.nearness(queries, items)(slice(2, 9)), -want[2:])


@pytest.mark.parametrize("make", [hashing.random_codes, hashing.learned_codes])
def test_codes_are_signs_along_orthogonal_axes(make, pairs):
    codes = make(*pairs, 32, seed=3)
    np.testing.assert_allclose(codes.axes.T @ codes.axes, np.eye(32), atol=1e-5)
    want = (pairs[0] - pairs[0].mean(0)) @ codes.axes > 0
    np.testing.assert_array_equal(bits_of(codes.of_images(pairs[0])), want)
    np.testing.assert_array_equal(make(*pairs, 32, seed=3).of_texts(pairs[1]), codes.of_texts(pairs[1]))


def test_learned_axes_keep_more_than_random_ones(pairs):
    """More pairs are found, and the signs are nearer to what they stand for: what ITQ minimises."""
    mean_recall, lost = {}, {}
    for make in (hashing.random_codes, hashing.learned_codes):
        codes, number = make(*pairs, 16, seed=0), np.arange(300)
        found = ranks.search(hashing.nearness(codes.of_texts(pairs[1]), codes.of_images(pairs[0])), number, number)
        mean_recall[make] = found.mean()
        along = np.concatenate([side - side.mean(0) for side in pairs]) @ codes.axes
        lost[make] = 1 - np.abs(along).sum() / np.linalg.norm(along) / np.sqrt(along.size)
    assert mean_recall[hashing.learned_codes] > mean_recall[hashing.random_codes] + 0.02
    assert lost[hashing.learned_codes] < lost[hashing.random_codes]


def test_more_bits_than_width_are_further_rotations(pairs):
    codes = hashing.random_codes(*pairs, 128)
    assert codes.of_images(pairs[0]).shape == (300, 16)
    for first in (0, 48):
        part = codes.axes[:, first : first + 48]
        np.testing.assert_allclose(part.T @ part, np.eye(48), atol=1e-5)
    with pytest.raises(ValueError, match="take as many or fewer"):
        hashing.learned_codes(*pairs, 128)


def test_what_cannot_be_is_refused(monkeypatch):
    with pytest.raises(UserError, match="--hash-bits=60 is not a number of whole bytes"):
        hashing.check_bits(60)
    hashing.check_bits(64)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"skyjax\[retrieval\]"):
        hashing.check_bits(64)
