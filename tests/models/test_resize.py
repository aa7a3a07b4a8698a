import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from skyjax.models.resize import mask_to_grid, resize_positions, to_grid, valid_cells

SIZE = st.integers(1, 40)


@settings(max_examples=40, deadline=None)
@given(side=SIZE, rows=SIZE, columns=SIZE)
@example(side=16, rows=4, columns=4)  # the released ViTs on 16 pixels
@example(side=16, rows=64, columns=33)
@example(side=7, rows=7, columns=1)
def test_positions_are_resized_as_pytorch_does(side, rows, columns):
    positions = np.random.default_rng(side).normal(size=(side**2, 3)).astype(np.float32)
    # In float64: PyTorch's float32 is itself 1e-5 off, because it rounds the places that it interpolates at.
    image = torch.from_numpy(positions.astype(float).reshape(1, side, side, 3).transpose(0, 3, 1, 2))
    want = torch.nn.functional.interpolate(image, size=(rows, columns), mode="bicubic", align_corners=False)
    got = resize_positions(positions, (rows, columns))
    assert_allclose(got, want[0].permute(1, 2, 0), atol=2e-6)


def test_positions_of_the_same_grid_are_untouched():
    positions = np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32)
    assert_array_equal(resize_positions(positions, (3, 3)), positions.reshape(3, 3, 2))


@pytest.mark.parametrize(
    ("shape", "extent", "grid"),
    [
        ((4, 4), (4, 4), (8, 8)),
        ((19, 19), (19, 19), (6, 6)),
        ((10, 10), (9.5, 9.5), (6, 6)),
        ((5, 3), (5, 3), (2, 7)),
    ],
)
def test_to_grid_agrees_with_pillow(shape, extent, grid):
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    box = (0, 0, extent[1], extent[0])
    want = np.asarray(Image.fromarray(image).resize(grid[::-1], Image.Resampling.BILINEAR, box=box))
    got = to_grid(jnp.asarray(image)[None, ..., None], extent, grid)
    assert_allclose(got[0, ..., 0], want, atol=2e-5)


def test_nothing_is_resampled_where_sizes_agree():
    x = jnp.ones((1, 4, 4, 2))
    assert to_grid(x, (3.5, 3.5), (4, 4)) is x
    mask = jnp.ones((1, 4, 4), bool)
    assert mask_to_grid(mask, (3.5, 3.5), (4, 4)) is mask


def test_a_mask_keeps_cells_that_are_half_valid():
    mask = jnp.asarray([[[True, True, True, False], [True, True, False, False]]])
    # Bilinear halving of rows and columns weighs 3/8 3/8 1/8 or 1/8 3/8 3/8 a column, all rows equally here.
    want = [[(5 + 0.5) / 6 >= 0.5, (1 + 1.5) / 7 >= 0.5]]
    assert_array_equal(mask_to_grid(mask, (2, 4), (1, 2))[0], want)
    upper_half = jnp.asarray([[[True, True], [False, False]]])
    assert_array_equal(mask_to_grid(upper_half, (2, 2), (1, 1)), [[[True]]])  # exactly half


def test_cells_are_valid_from_half_their_pixels_on():
    clear = np.random.default_rng(0).random((3, 7, 10)) < 0.5
    got = valid_cells(jnp.asarray(clear), 4)
    assert got.shape == (3, 2, 3)
    for n, i, j in np.ndindex(3, 2, 3):
        assert got[n, i, j] == (clear[n, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].mean() >= 0.5)
    assert_array_equal(valid_cells(jnp.asarray(clear), 1), clear)
