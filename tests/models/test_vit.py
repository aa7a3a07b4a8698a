import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose
from quick import quick_jit

from skyjax.models.layers import Compute
from skyjax.models.up_head import UpHead
from skyjax.models.vit import ViT


def make(depth=2, **compute):
    settings = {"channels": 3, "patch_size": 2, "image_size": 8, "width": 8, "heads": 2}
    return ViT(**settings, depth=depth, compute=Compute(drop_path=0.2, **compute), rngs=nnx.Rngs(0))


IMAGES = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))


def test_images_are_padded_at_the_bottom_and_right():
    model = make()
    padded = jnp.pad(IMAGES[:, :5, :7], ((0, 0), (0, 1), (0, 1), (0, 0)))
    assert_allclose(model(IMAGES[:, :5, :7]), model(padded), atol=1e-6)
    assert model(IMAGES[:, :5, :7]).shape == (2, 3, 4, 8)


def test_positions_are_added_to_patches_and_to_the_class_token():
    model = make()
    want = model(IMAGES)
    shift = jnp.arange(8.0)
    model.class_token[...] = model.class_token[...] + shift
    model.positions[...] = model.positions[...].at[0].add(-shift)
    assert_allclose(model(IMAGES), want, atol=1e-5)
    model.patch_embed.bias[...] = model.patch_embed.bias[...] + shift
    model.positions[...] = model.positions[...].at[1:].add(-shift)
    assert_allclose(model(IMAGES), want, atol=1e-5)
    model.class_token[...] = model.class_token[...] + 5 * shift
    assert np.abs(model(IMAGES) - want).max() > 1e-4


def test_scan_and_remat_change_nothing():
    def run(**compute):
        graph, state = nnx.split(make(**compute))
        loss = quick_jit(jax.value_and_grad(lambda state: nnx.merge(graph, state)(IMAGES, key=jax.random.key(3)).var()))
        value, gradient = loss(state)
        return value, nnx.to_pure_dict(gradient)

    want = run()
    for other in ({"scan": False}, {"remat": "full"}):
        jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-6), run(**other), want)


def test_stochastic_depth_needs_a_key():
    model = make(depth=3)
    first, second = (model(IMAGES, key=jax.random.key(i)) for i in (0, 1))
    assert np.abs(first - second).max() > 1e-4
    assert_allclose(model(IMAGES), model(IMAGES), atol=0)


def test_an_image_size_of_broken_patches_is_refused():
    with pytest.raises(ValueError, match="image_size 9 is not a multiple of patch_size 2"):
        ViT(channels=3, patch_size=2, image_size=9, width=8, depth=1, heads=2, compute=Compute(), rngs=nnx.Rngs(0))


def test_up_head_lays_the_cells_of_a_token_side_by_side():
    head = UpHead(4, 5, 3, jnp.float32, nnx.Rngs(0))
    head.cells.bias[...] = jnp.arange(45.0).reshape(3, 3, 5)
    x = np.random.default_rng(0).normal(size=(2, 2, 4, 4)).astype(np.float32)
    got = head(jnp.asarray(x))
    assert got.shape == (2, 6, 12, 5)
    kernel, bias = np.asarray(head.cells.kernel[...]), np.asarray(head.cells.bias[...])
    for i, j in np.ndindex(6, 12):
        want = x[:, i // 3, j // 3] @ kernel[:, i % 3, j % 3] + bias[i % 3, j % 3]
        assert_allclose(got[:, i, j], want, atol=1e-5)
