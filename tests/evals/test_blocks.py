import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import binom
from sklearn.metrics import accuracy_score, f1_score, jaccard_score

from skyjax.evals import blocks


def sites():
    rng = np.random.default_rng(0)
    charts = [rng.integers(-1, 3, (19, 24)), rng.integers(-1, 2, (1, 1)), rng.integers(-1, 3, (8, 8))]
    charts[1][:] = 2
    return charts


def test_every_labelled_pixel_is_there_once_in_the_block_it_lies_in():
    charts = sites()
    pixels = blocks.labelled_pixels(charts, block=8)
    seen = [set() for _ in charts]
    places = {}
    for site, (row, column), block, label in zip(pixels.site, pixels.place, pixels.block, pixels.label, strict=True):
        assert charts[site][row, column] == label >= 0
        seen[site].add((row, column))
        places.setdefault(block, set()).add((site, row // 8, column // 8))
    assert [len(found) for found in seen] == [int((chart >= 0).sum()) for chart in charts]
    assert all(len(found) == 1 for found in places.values())
    assert sorted(places) == list(range(pixels.blocks)) == list(range(9 + 1 + 1))


def test_folds_are_of_equal_size_and_share_the_classes():
    charts = [np.repeat(np.repeat(np.arange(4).reshape(2, 2), 16, 0), 16, 1)]  # four blocks of each class
    pixels = blocks.labelled_pixels(charts, block=8)
    fold = blocks.deal(pixels, 4, seed=0)
    assert_array_equal(np.bincount(fold), [4] * 4)
    for number in range(4):
        assert set(pixels.label[fold[pixels.block] == number]) == {0, 1, 2, 3}
    assert_array_equal(fold, blocks.deal(pixels, 4, seed=0))
    assert (fold != blocks.deal(pixels, 4, seed=1)).any()


@pytest.mark.parametrize("gap", [0, 3, 8])
def test_near_is_what_a_loop_over_pairs_of_pixels_says(gap):
    charts = sites()
    charts[0][:] = 0  # a block's every pixel is there, so that the distance to it is that to its pixels
    pixels = blocks.labelled_pixels(charts, block=8)
    meant = np.zeros(pixels.blocks, bool)
    meant[[0, 5, 9]] = True
    got = blocks.near(pixels, meant, side=8, gap=gap)
    inside = meant[pixels.block]
    for i in range(len(got)):
        same = inside & (pixels.site == pixels.site[i])
        distance = np.abs(pixels.place[same] - pixels.place[i]).max(1) if same.any() else np.array([1000])
        assert got[i] == (distance.min() <= gap)


def test_metrics_are_sklearns():
    rng = np.random.default_rng(1)
    charts = [rng.integers(0, 4, (16, 16))]
    pixels = blocks.labelled_pixels(charts, block=4)
    said = np.where(rng.random(256) < 0.6, pixels.label, rng.integers(0, 4, 256))
    total = blocks.confusions(pixels, said, 4).sum(0)
    truth = pixels.label
    assert blocks.METRICS["pixel accuracy"](total) == pytest.approx(accuracy_score(truth, said))
    assert blocks.METRICS["macro-F1"](total) == pytest.approx(f1_score(truth, said, average="macro"))
    assert blocks.METRICS["mean IoU"](total) == pytest.approx(jaccard_score(truth, said, average="macro"))


def test_a_class_that_does_not_occur_has_no_say():
    """A drawn test set may lack a class; the mean is then over the others."""
    confusion = np.array([[3.0, 1.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    assert blocks.mean_iou(confusion) == pytest.approx((3 / 4 + 4 / 5) / 2)


def test_the_bootstrap_draws_whole_blocks():
    """All pixels of a block are right or wrong together: the share right is a binomial of blocks, not of pixels."""
    charts = [np.zeros((40, 40), int)]
    charts[0][0, 0] = 1  # two classes; one pixel does not matter
    pixels = blocks.labelled_pixels(charts, block=4)
    said = np.where(pixels.block % 4 == 0, 1 - pixels.label, pixels.label)
    draws = blocks.redraw(blocks.confusions(pixels, said, 2), resamples=20_000)
    got = np.percentile(blocks.pixel_accuracy(draws), [2.5, 97.5])
    assert_allclose(got, binom(100, 0.75).ppf([0.025, 0.975]) / 100, atol=0.011)
    assert_allclose(draws.sum((1, 2)), 1600)
