import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from skyjax.input.resample import Axis, cut


def images(dtype, t=3, h=20, w=30, c=3, seed=0):
    values = np.random.default_rng(seed).integers(0, 200, (t, h, w, c)).astype(dtype)
    return values, np.ones((t, h, w), bool)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_whole_pixels_are_sliced_bit_for_bit(dtype):
    values, clear = images(dtype)
    clear[2, 5, 7] = False
    if dtype == "float32":
        values[0, 6, 8, 1] = np.nan
    got, got_clear = cut(values, clear, np.array([0, 2]), Axis(4.0000001, 8, 8), Axis(6, 9, 9))
    assert got.dtype == values.dtype
    np.testing.assert_array_equal(got, values[[0, 2], 4:12, 6:15])
    want_clear = clear[[0, 2], 4:12, 6:15].copy()
    if dtype == "float32":
        want_clear[0, 2, 2] = False  # NaN in one band: not measured
    np.testing.assert_array_equal(got_clear, want_clear)


def test_a_slice_reads_only_the_chosen_dates():
    """146 dates a site: converting all of them would cost more than the rest of the pipeline."""

    class Watched(np.ndarray):
        largest = 0

        def __array_finalize__(self, parent):
            Watched.largest = max(Watched.largest, self.size if parent is not None else 0)

    values, clear = images("uint8", t=50)
    watched = values.view(Watched)
    Watched.largest = 0
    cut(watched, clear, np.array([3, 9]), Axis(1.5, 8, 4), Axis(2.5, 8, 4))
    assert 0 < Watched.largest <= 2 * 20 * 30 * 3


@settings(max_examples=60, deadline=None)
@given(
    length=st.tuples(st.floats(1.0, 20.0), st.floats(1.0, 30.0)),
    place=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    size=st.tuples(st.integers(1, 24), st.integers(1, 24)),
)
def test_resampling_agrees_with_pillow(length, place, size):
    values, clear = images("float32", t=2, c=2)
    rows, columns = (
        Axis(p * (n - extent), extent, s) for p, n, extent, s in zip(place, (20, 30), length, size, strict=True)
    )
    got, got_clear = cut(values, clear, np.array([1]), rows, columns)
    if rows.is_slice and columns.is_slice:
        return
    box = (columns.start, rows.start, columns.start + columns.length, rows.start + rows.length)
    for band in range(2):
        picture = Image.fromarray(values[1, :, :, band])
        want = picture.resize((columns.size, rows.size), Image.Resampling.BILINEAR, box=box)
        np.testing.assert_allclose(got[0, :, :, band], np.asarray(want), atol=2e-3)
    assert got_clear.all()


def test_a_large_product_takes_the_sparse_way_to_the_same_numbers():
    values, clear = images("float32", t=4, h=90, w=90, c=8)
    rows, columns = Axis(3.3, 80.0, 32), Axis(1.7, 85.0, 32)
    together, _ = cut(values, clear, np.arange(4), rows, columns)
    alone = [cut(values[..., c : c + 1], clear, np.array([t]), rows, columns)[0] for t in range(4) for c in range(8)]
    np.testing.assert_allclose(together, np.stack(alone).reshape(4, 8, 32, 32).transpose(0, 2, 3, 1), rtol=1e-5)


def masked_mean_by_loop(values, usable, rows, columns):
    """Plain float64: the triangle's weight of each source pixel, then the mean of the usable ones."""

    def triangle(axis, i, j):
        scale = axis.length / axis.size
        return max(0.0, 1 - abs(j + 0.5 - (axis.start + (i + 0.5) * scale)) / max(scale, 1.0))

    h, w, c = values.shape
    mean, share = np.zeros((rows.size, columns.size, c)), np.zeros((rows.size, columns.size))
    for i in range(rows.size):
        for j in range(columns.size):
            total = used = 0.0
            for y in range(h):
                for x in range(w):
                    weight = triangle(rows, i, y) * triangle(columns, j, x)
                    total += weight
                    if usable[y, x]:
                        used += weight
                        mean[i, j] += weight * values[y, x].astype(float)
            share[i, j] = used / total
            mean[i, j] /= max(used, 1e-12)
    return mean, share


@pytest.mark.parametrize(("length", "size"), [(6.0, 4), (5.2, 9)])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_clouds_and_nan_stay_out_of_the_mean(dtype, length, size):
    values, clear = images(dtype, t=1, h=8, w=8, c=2)
    clear[0, np.random.default_rng(1).random((8, 8)) < 0.4] = False
    values[0, ~clear[0]] = 250  # a cloud is brighter than all ground
    usable = clear[0].copy()
    if dtype == "float32":
        values[0, 2, 2, 0], values[0, 5, 3, 1] = np.nan, np.inf
        usable[2, 2] = usable[5, 3] = False
    rows, columns = Axis(0.7, length, size), Axis(1.1, length, size)
    got, got_clear = cut(values, clear, np.array([0]), rows, columns)
    want, share = masked_mean_by_loop(values[0], usable, rows, columns)
    seen = share > 0.01
    assert seen.any()
    atol = 1e-3 if dtype == "float32" else 0.5 + 1e-3  # rounded back to whole numbers
    np.testing.assert_allclose(got[0][seen].astype(float), want[seen], atol=atol)
    np.testing.assert_array_equal(got_clear[0][np.abs(share - 0.5) > 1e-4], (share >= 0.5)[np.abs(share - 0.5) > 1e-4])
    assert 0 < got_clear.sum() < got_clear.size
    assert np.isfinite(got).all()


def test_half_of_the_weight_is_clear_enough():
    values, clear = np.full((1, 2, 2, 1), 7, np.uint8), np.array([[[True, True], [False, False]]])
    for lost, want in ((0, True), (1, False)):
        clear[0, 0, :lost] = False
        _, got = cut(values, clear, np.array([0]), Axis(0, 2, 1), Axis(0, 2, 1))
        assert bool(got[0, 0, 0]) is want


def test_nothing_clear_gives_finite_values_that_are_not_clear():
    values, clear = images("float32")
    values[:] = np.nan
    got, got_clear = cut(values, clear, np.array([1]), Axis(0.5, 7.5, 4), Axis(0.5, 7.5, 4))
    assert not got_clear.any()
    assert np.isfinite(got).all()


def test_integers_are_rounded_not_cut_off():
    values = np.array([0, 1], np.uint16).reshape(1, 1, 2, 1)
    got, _ = cut(values, np.ones((1, 1, 2), bool), np.array([0]), Axis(0, 1, 1), Axis(0, 2, 4))
    assert got.dtype == np.uint16
    np.testing.assert_array_equal(got[0, 0, :, 0], [0, 0, 1, 1])  # of 0, 0.25, 0.75, 1
