"""Generation equals searches written as plain loops over the teacher-forced decoder."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from test_decoder import IMAGE, IMAGES, IMAGES_VALID, LENGTH, config_of, random_params

from skyjax.models import decoder
from skyjax.models.generate import Decoding, generate

PAD, BOS, EOS, SIZE = 0, 1, 2, 6  # of a table of 11 rows
CONFIG = config_of()
PARAMS = random_params(CONFIG, scale=0.5, seed=6)  # of these, some texts end early
GREEDY = Decoding(bos=BOS, eos=EOS, pad=PAD, size=SIZE, length=LENGTH)
IMAGES = np.concatenate([IMAGES, np.random.default_rng(5).normal(0, 2, (5, 4, IMAGE)).astype(np.float32)])
IMAGES_VALID = np.concatenate([IMAGES_VALID, np.ones((5, 4), bool)])


@jax.jit
def _logits(tokens, image, valid):
    features = decoder.features(CONFIG, PARAMS, tokens, tokens >= 0, image, valid)
    return decoder.logits(CONFIG, PARAMS, features)


def log_p(row, number):
    """float64 log probabilities of what follows the tokens `row` of one image; the forbidden have none."""
    tokens = np.full((1, LENGTH), -1, np.int32)
    tokens[0, : len(row)] = row
    scores = np.asarray(_logits(tokens, IMAGES[None, number], IMAGES_VALID[None, number]), np.float64)[0, len(row) - 1]
    scores[[PAD, BOS, *range(SIZE, len(scores))]] = -np.inf
    return scores - np.log(np.exp(scores).sum())


def greedy_by_hand(number, prompt=(BOS,)):
    row, total = list(prompt), 0.0
    while len(row) < LENGTH and (len(row) == len(prompt) or row[-1] != EOS):
        found = log_p(row, number)
        row.append(int(found.argmax()))
        total += found.max()
    return row, total


def rows_of(found):
    return [[int(i) for i in row if i != PAD] for row in found.tokens]


def test_greedy_takes_the_likeliest_each_time():
    found = generate(CONFIG, PARAMS, IMAGES, IMAGES_VALID, GREEDY)
    want = [greedy_by_hand(number) for number in range(len(IMAGES))]
    assert rows_of(found) == [row for row, _ in want]
    assert_allclose(found.score, [score for _, score in want], rtol=1e-4)
    lengths = np.array([len(row) for row, _ in want])
    assert lengths.min() < LENGTH  # one at least ends early, and stays so
    assert_array_equal(found.written, (np.arange(LENGTH) >= 1) & (np.arange(LENGTH) < lengths[:, None]))
    assert_array_equal(found.tokens[~found.written & (np.arange(LENGTH) > 0)], PAD)


def test_prompts_of_any_length_are_kept():
    prompts = [[BOS], [BOS, 3, EOS], [BOS, 4], [BOS, 5, 3, EOS]] * 2
    tokens = np.full((8, 4), 9, np.int32)
    valid = np.zeros((8, 4), bool)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)], valid[i, : len(prompt)] = prompt, True
    for method in ("greedy", "beam"):
        decoding = dataclasses.replace(GREEDY, method=method, beams=1)
        found = generate(CONFIG, PARAMS, IMAGES, IMAGES_VALID, decoding, prompt=tokens, prompt_valid=valid)
        want = [greedy_by_hand(number, prompt)[0] for number, prompt in enumerate(prompts)]
        assert rows_of(found) == want
        assert [int(row.argmax()) for row in found.written] == [len(prompt) for prompt in prompts]


def test_one_beam_is_greedy():
    want = generate(CONFIG, PARAMS, IMAGES, IMAGES_VALID, GREEDY)
    got = generate(CONFIG, PARAMS, IMAGES, IMAGES_VALID, dataclasses.replace(GREEDY, method="beam", beams=1))
    assert_array_equal(got.tokens, want.tokens)
    assert_array_equal(got.written, want.written)
    assert_allclose(got.score, want.score, rtol=1e-5)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_enough_beams_find_the_best_of_all_texts(penalty):
    length, words = 4, list(range(3, SIZE))
    decoding = dataclasses.replace(GREEDY, method="beam", beams=48, length=length, length_penalty=penalty)
    found = generate(CONFIG, PARAMS, IMAGES[:3], IMAGES_VALID[:3], decoding)
    texts = [[*row, EOS] for n in range(length - 1) for row in itertools.product(words, repeat=n)]
    texts += list(map(list, itertools.product(words, repeat=length - 1)))
    for number in range(3):
        known = {}

        def total(text, number=number, known=known):
            row, score = [BOS], 0.0
            for token in text:
                if tuple(row) not in known:
                    known[tuple(row)] = log_p(row, number)
                score += known[tuple(row)][token]
                row.append(token)
            return score

        best = max(texts, key=lambda text: total(text) / len(text) ** penalty)
        assert rows_of(found)[number] == [BOS, *best]
        assert_allclose(found.score[number], total(best), rtol=1e-4)


def test_more_beams_find_no_less_likely_texts():
    greedy = generate(CONFIG, PARAMS, IMAGES, IMAGES_VALID, GREEDY)
    beams = dataclasses.replace(GREEDY, method="beam", beams=64, length_penalty=0.0)
    found = generate(CONFIG, PARAMS, IMAGES, IMAGES_VALID, beams)
    assert (np.asarray(found.score) >= np.asarray(greedy.score) - 1e-5).all()
    assert (found.score > greedy.score + 1e-3).any()


def test_a_small_nucleus_is_greedy():
    want = generate(CONFIG, PARAMS, IMAGES, IMAGES_VALID, GREEDY)
    nucleus = dataclasses.replace(GREEDY, method="nucleus", p=0.0)
    got = generate(CONFIG, PARAMS, IMAGES, IMAGES_VALID, nucleus, key=jax.random.key(1))
    assert_array_equal(got.tokens, want.tokens)


def test_draws_come_from_the_nucleus_with_its_probabilities():
    p, temperature, number = 0.75, 1.5, 3
    nucleus = Decoding(bos=BOS, eos=EOS, pad=PAD, size=SIZE, length=2, method="nucleus", p=p, temperature=temperature)
    many = 4000
    images, valid = (
        np.repeat(IMAGES[number : number + 1], many, 0),
        np.repeat(IMAGES_VALID[number : number + 1], many, 0),
    )
    found = np.asarray(generate(CONFIG, PARAMS, images, valid, nucleus, key=jax.random.key(0)).tokens[:, 1])
    weights = np.exp(log_p([BOS], number) / temperature)
    weights /= weights.sum()
    order = np.argsort(-weights)
    size = int(np.searchsorted(np.cumsum(weights[order]), p)) + 1
    assert 1 < size < 4  # of the four that may follow
    want = np.zeros_like(weights)
    want[order[:size]] = weights[order[:size]] / weights[order[:size]].sum()
    shares = np.bincount(found, minlength=len(want)) / many
    assert (shares[want == 0] == 0).all()
    assert_allclose(shares, want, atol=4 * 0.5 / many**0.5)


def test_what_is_drawn_hangs_on_key_and_number_alone():
    nucleus = dataclasses.replace(GREEDY, method="nucleus", p=1.0, temperature=3.0)

    def draw(seed, rows, numbers=None):
        chosen = IMAGES[rows], IMAGES_VALID[rows]
        found = generate(CONFIG, PARAMS, *chosen, nucleus, key=jax.random.key(seed), numbers=numbers)
        return np.asarray(found.tokens)

    every = np.arange(8)
    want = draw(0, every)
    assert_array_equal(draw(0, every), want)
    assert (draw(1, every) != want).any()
    assert_array_equal(draw(0, every[::-1], jnp.array(every[::-1])), want[::-1])


def test_mistakes_are_named():
    with pytest.raises(ValueError, match='decoding method is "best"'):
        dataclasses.replace(GREEDY, method="best")
    with pytest.raises(ValueError, match="start at 2, 1, 0 and above 0"):
        dataclasses.replace(GREEDY, beams=0)
    with pytest.raises(ValueError, match="give it a key"):
        generate(CONFIG, PARAMS, IMAGES, IMAGES_VALID, dataclasses.replace(GREEDY, method="nucleus"))
    with pytest.raises(ValueError, match=r"model.decoder.length is 6"):
        generate(CONFIG, PARAMS, IMAGES, IMAGES_VALID, dataclasses.replace(GREEDY, length=7))
