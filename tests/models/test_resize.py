import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from skyjax.models.resize import bicubic_matrix, mask_to_grid, resize_positions, to_grid, valid_cells


@pytest.mark.parametrize(("source", "target"), [(16, 4), (4, 16), (5, 7), (7, 5), (3, 1), (1, 3)])
def test_bicubic_is_pytorchs(source, target):
    """Against the four-point rule as a loop: align_corners=False, a = -0.75, edges repeated, never antialiased."""
    signal = np.random.default_rng(0).normal(size=source)
    a = -0.75
    want = []
    for i in range(target):
        place = source / target * (i + 0.5) - 0.5
        left = int(np.floor(place))
        t = place - left
        weights = [
            a * (t + 1) ** 3 - 5 * a * (t + 1) ** 2 + 8 * a * (t + 1) - 4 * a,
            (a + 2) * t**3 - (a + 3) * t**2 + 1,
            (a + 2) * (1 - t) ** 3 - (a + 3) * (1 - t) ** 2 + 1,
            a * (2 - t) ** 3 - 5 * a * (2 - t) ** 2 + 8 * a * (2 - t) - 4 * a,
        ]
        want.append(sum(w * signal[min(max(left - 1 + k, 0), source - 1)] for k, w in enumerate(weights)))
    assert_allclose(bicubic_matrix(source, target) @ signal, want, atol=1e-6)


def test_positions_of_the_same_grid_are_untouched():
    positions = jnp.asarray(np.random.default_rng(0).normal(size=(9, 2)), jnp.float32)
    assert_array_equal(resize_positions(positions, (3, 3)), positions.reshape(3, 3, 2))
    rows = resize_positions(positions, (3, 5))
    assert_allclose(rows[1, :, 0], bicubic_matrix(3, 5) @ positions.reshape(3, 3, 2)[1, :, 0], atol=1e-6)


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
