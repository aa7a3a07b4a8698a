"""The terms of image and text against float64 loops."""

import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from skyjax.objectives import image_text
from skyjax.objectives.image_text import Read, Written

B, K, L, D, E, C = 6, 2, 5, 7, 4, 3
OPTIONS = ml_collections.ConfigDict(
    {
        "kind": "softmax",
        "streams": ("sar", "fused"),
        "temperature": 0.1,
        "bias": -2.0,
        "bounds": (0.01, 1.0),
        "chunk": 2,
        "words": {"scales": (1, 2), "group": 3, "sharpness": 0.2, "temperature": 0.1},
    }
)
CONFIG = ml_collections.ConfigDict({"weights": {"text": 1.0, "words": 1.0, "caption": 1.0}, "text": OPTIONS})
TEXT = ml_collections.ConfigDict({"width": D, "embed_dim": E})


@pytest.fixture(scope="module")
def head():
    return image_text.init_head(CONFIG, {"sar": C, "fused": C}, TEXT, jax.random.key(0))


@pytest.fixture(scope="module")
def read():
    """Captions of 0 to 4 words; that of sample 2 is there twice, that of sample 5 has the words of sample 4's."""
    rng = np.random.default_rng(0)
    length = np.array([[3, 0], [4, 2], [2, 2], [0, 0], [4, 3], [4, 1]])
    words = np.arange(B * K).reshape(B, K)
    words[5, 0] = words[4, 0]
    return Read(
        rng.normal(size=(B, K, E)).astype(np.float32),
        rng.normal(size=(B, K, L, D)).astype(np.float32),
        np.arange(L) < length[..., None],
        words.astype(np.int32),
    )


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_a_grid_holds_the_means_of_its_measured_places():
    rng = np.random.default_rng(1)
    fused = rng.normal(size=(2, 5, 4, C)).astype(np.float32)
    measured = rng.random((2, 5, 4)) < 0.6
    measured[1, :, :2] = False
    fused[~measured] = np.nan
    means, there = image_text.grids(fused, measured, (1, 2))
    assert means.shape == (2, 5, C)
    for b in range(2):
        cells = [(slice(None), slice(None))] + [(r, c) for r in ((0, 1, 2), (3, 4)) for c in ((0, 1), (2, 3))]
        for n, cell in enumerate(cells):
            index = cell if n == 0 else np.ix_(*cell)
            inside = fused[b][index][measured[b][index]]
            assert there[b, n] == (len(inside) > 0)
            assert_allclose(means[b, n], inside.mean(0) if len(inside) else 0, rtol=1e-5, atol=1e-6)


def looking(head, read, fused, measured):
    """The local term, word by word."""
    local, options = head["local"], OPTIONS.words
    regions, there = (np.asarray(x) for x in image_text.grids(fused, measured, options.scales))
    regions = unit(regions @ np.float64(local["places"]["kernel"]) + 1e-30)
    total, count = 0.0, 0
    for start in range(0, B, options.group):
        group = range(start, start + options.group)
        scores = {}
        for i in group:
            for j in group:
                cosines = []
                for n in np.flatnonzero(read.valid[j, 0]):
                    word = unit(np.float64(read.tokens[j, 0, n]) @ np.float64(local["words"]["kernel"]))
                    seen = regions[i][there[i]]
                    if len(seen):
                        weights = np.exp(seen @ word / options.sharpness)
                        found = weights @ seen / weights.sum()
                        cosines.append(word @ found / np.linalg.norm(found))
                if cosines:
                    scores[i, j] = np.mean(cosines) / options.temperature
        both = [i for i in group if (i, i) in scores]
        for i in both:
            others = [j for j in both if j != i and read.words[j, 0] != read.words[i, 0]]
            for rest in ([scores[i, j] for j in others], [scores[j, i] for j in others]):
                right = scores[i, i]
                total += (math.log(math.exp(right) + sum(map(math.exp, rest))) - right) / 2
        count += len(both)
    return total, count


def test_words_find_their_places_as_a_loop_over_words_has_it(head, read):
    rng = np.random.default_rng(2)
    fused = rng.normal(size=(B, 4, 4, C)).astype(np.float32)
    measured = rng.random((B, 4, 4)) < 0.8
    measured[1, :2] = False
    measured[2] = False
    got = image_text.find_words(fused, measured, read, head["local"], OPTIONS)
    want = looking(head, read, fused, measured)
    assert want[1] == 4  # one has no words, one no place
    assert_allclose(got, want, rtol=1e-4)


def test_what_is_masked_leaves_no_trace_in_any_gradient(head, read):
    rng = np.random.default_rng(3)
    fused = rng.normal(size=(B, 1, 4, 4, C)).astype(np.float32)
    measured = rng.random((B, 1, 4, 4)) < 0.7
    measured[0] = False
    pooled = {"sar": (rng.normal(size=(B, 1, C)).astype(np.float32), np.arange(B)[:, None] != 1)}

    @jax.jit
    def loss(fused, sar, head, embedding, tokens):
        images = {"fused": fused, "fused_valid": measured}
        told = Read(embedding, tokens, read.valid, read.words, WRITTEN)
        sums, _ = image_text.terms(CONFIG, images, {"sar": (sar, pooled["sar"][1])}, told, head)
        return sum(sums.values())

    def spoil(x, there):
        return np.where(np.expand_dims(there, tuple(range(there.ndim, x.ndim))), x, np.nan)

    clean = (fused, pooled["sar"][0], head, read.embedding, read.tokens)
    spoilt = (
        spoil(fused, measured),
        spoil(pooled["sar"][0], pooled["sar"][1]),
        head,
        spoil(read.embedding, read.valid.any(-1)),
        spoil(read.tokens, read.valid),
    )
    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4))
    value, gradients = gradient(*spoilt)
    want, wanted = gradient(*clean)
    assert_allclose(value, want, rtol=1e-6)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-5, atol=1e-7), gradients, wanted)
    assert_array_equal(gradients[0][~measured], 0)


def test_streams_that_a_sample_lacks_and_samples_without_words_do_not_count(head, read):
    features = {"sar": np.ones((B, 2, C), np.float32), "fused": np.ones((B, 2, C), np.float32)}
    present = {"sar": np.zeros((B, 2), bool), "fused": np.ones((B, 2), bool)}
    present["sar"][:3, 0] = True
    sums, counts = image_text.recognise(features, present, read, head, OPTIONS)
    assert set(sums) == {"text/sar", "text/fused"}
    assert counts["text/fused"] == 2 * 5  # sample 3 has no words
    assert counts["text/sar"] == 3


SCORES = np.random.default_rng(4).normal(size=(D, 11)).astype(np.float32)
WRITTEN = Written(
    np.random.default_rng(5).normal(size=(B, L, D)).astype(np.float32),
    np.random.default_rng(6).integers(0, 11, (B, L)).astype(np.int32),
    np.random.default_rng(7).random((B, L)) < 0.6,
    lambda hidden: hidden @ SCORES,
)


@pytest.mark.parametrize("chunk", [1, 2, 4, 100])
def test_captioning_is_the_cross_entropy_of_the_next_word_in_chunks_of_any_size(chunk):
    logits = np.float64(WRITTEN.hidden) @ np.float64(SCORES)
    log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    right = np.take_along_axis(log_probability, WRITTEN.targets[..., None], -1)[..., 0]
    got = image_text.captioning(WRITTEN, chunk)
    assert_allclose(got, (-right[WRITTEN.counted].sum(), WRITTEN.counted.sum()), rtol=1e-5)


def test_what_makes_no_sense_is_refused(read, head):
    bad = CONFIG.copy_and_resolve_references()
    bad.text.kind = "hinge"
    with pytest.raises(ValueError, match="sigmoid, softmax"):
        image_text.init_head(bad, {"sar": C, "fused": C}, TEXT, jax.random.key(0))
    with pytest.raises(ValueError, match="optical"):
        image_text.init_head(CONFIG, {"optical": C}, TEXT, jax.random.key(0))
    images = {"fused": jnp.zeros((B, 1, 2, 2, C)), "fused_valid": jnp.ones((B, 1, 2, 2), bool)}
    with pytest.raises(ValueError, match=r"model\.decoder"):
        image_text.terms(CONFIG, images, {}, read, head)
