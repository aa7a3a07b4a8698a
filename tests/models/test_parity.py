"""Agreement with the published modules, on the cases of tests/models/cases (its README says where they are from)."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quick import quick_jit

from skyjax.convert import skysense as released
from skyjax.models.fusion import Fusion
from skyjax.models.layers import Compute
from skyjax.models.swin_v2 import SwinV2
from skyjax.models.up_head import UpHead
from skyjax.models.vit import ViT

CASES = pathlib.Path(__file__).parent / "cases"
COMPUTE = Compute()


def load(part):
    weights = {}
    for path in CASES.glob(f"{part}.weights*.npz"):
        weights |= np.load(path)
    return weights, dict(np.load(CASES / f"{part}.npz"))


def fill(make, params):
    """A module with these parameters; every one must be there, in its shape."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    expected = nnx.to_pure_dict(state)
    nnx.replace_by_pure_dict(state, params)
    assert shapes(params) == shapes(expected)
    return nnx.merge(graph, state)


def shapes(tree):
    return {name: shapes(value) for name, value in tree.items()} if isinstance(tree, dict) else tuple(tree.shape)


def channels_last(x):
    return jnp.asarray(np.moveaxis(x, 1, -1))


def assert_agrees(got, want, tolerance=1e-5):
    got = np.asarray(got, np.float64)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


# The random weights saturate the cosine attention (logit scales at the limit of 100), so that rounding grows from stage
# to stage. In float64 what is left is the rounding of the published module's own float32 run: 4e-5 of the largest value
# for the square images, 6e-5 for the larger; our float32 run adds its own. Hence 1e-4 here, and 1e-5 everywhere else.
@pytest.mark.parametrize(("case", "dtype"), [("square", "float32"), ("larger", "float64")])
def test_swin_v2(case, dtype):
    weights, arrays = load("optical_swin_v2")
    depths, every = (2, 2, 6, 2), 3
    with jax.enable_x64(dtype == "float64"):
        model = fill(
            lambda rngs: SwinV2(
                channels=3, patch_size=4, width=16, depths=depths, heads=(1, 2, 4, 8), window=4,
                extra_norm_every=every, compute=Compute(jnp.dtype(dtype)), rngs=rngs,
            ),
            released.to_params(released.swin_v2(depths, every), weights),
        )  # fmt: skip
        stages = [np.asarray(x, np.float64) for x in quick_jit(model.stages)(channels_last(arrays[f"inputs.{case}"]))]
        final = model.norm(jnp.asarray(stages[-1], dtype))
    for i, x in enumerate(stages):
        want = np.moveaxis(arrays[f"outputs.{case}.{i}"], 1, -1)
        assert_agrees(norm(x, weights[f"norm{i}.weight"], weights[f"norm{i}.bias"]), want, 1e-4)
    assert_agrees(final, want, 1e-4)


def norm(x, scale, bias):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + bias


@pytest.mark.parametrize(
    ("part", "bands", "case"),
    [("multispectral_vit", 10, "native"), ("multispectral_vit", 10, "resized"), ("sar_vit", 2, "native")],
)
def test_vit(part, bands, case):
    weights, arrays = load(part)
    model = fill(
        lambda rngs: ViT(
            channels=bands, patch_size=4, image_size=64, width=32, depth=2, heads=4, compute=COMPUTE, rngs=rngs
        ),
        released.to_params(released.vit(2), weights),
    )
    got = model(channels_last(arrays[f"inputs.{case}"]))
    assert_agrees(got, np.moveaxis(arrays[f"outputs.{case}.0"], 1, -1))


def test_up_head():
    weights, arrays = load("up_head")
    model = fill(lambda rngs: UpHead(32, 128, 4, jnp.float32, rngs), released.to_params(released.up_head(4), weights))
    assert_agrees(model(channels_last(arrays["inputs.native"])), np.moveaxis(arrays["outputs.native.0"], 1, -1))


def test_fusion():
    weights, arrays = load("fusion")
    params = released.to_params(released.fusion(2), weights) | {"dates": np.zeros((366, 128), np.float32)}
    model = fill(lambda rngs: Fusion(spatial_width=128, width=32, depth=2, heads=4, compute=COMPUTE, rngs=rngs), params)
    tokens = jnp.asarray(arrays["inputs.native"])  # (places, dates, width)
    features = tokens.transpose(1, 0, 2)[None, :, None]  # one site of one row
    got = model(features, jnp.zeros((1, 7), jnp.int32), jnp.ones((1, 7, 1, 5), bool))
    assert_agrees(got[0, 0], arrays["outputs.native.0"])
