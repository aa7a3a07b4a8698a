import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal
from quick import quick_jit

from skyjax.models.layers import Compute, take_layers
from skyjax.models.swin_v2 import Block, PatchMerging, Stage, SwinV2, WindowAttention

WINDOW = 4


@pytest.fixture(scope="module")
def attention():
    rngs = nnx.Rngs(0)
    module = WindowAttention(8, 2, WINDOW, jnp.float32, rngs)
    for bias in (module.projections.query.bias, module.projections.value.bias, module.bias_up.bias):
        bias[...] = jax.random.normal(rngs.params(), bias.shape)
    module.bias_down.kernel[...] = module.bias_down.kernel[...] * 10
    module.logit_scale[...] = jnp.log(jnp.asarray([4.0, 1000.0]))  # the second is over the limit of 100
    return module


def attention_by_loop(module, x, shift):
    """Every place of `x` looks at the places of its own window; 100 is taken from scores across the roll's seam."""
    kernel = {name: np.asarray(getattr(module.projections, name).kernel[...], np.float64) for name in ("query", "key")}
    value_kernel, out_kernel = (np.asarray(getattr(module.projections, n).kernel[...]) for n in ("value", "out"))
    query = x @ kernel["query"] + np.asarray(module.projections.query.bias[...])
    key = x @ kernel["key"]
    value = x @ value_kernel + np.asarray(module.projections.value.bias[...])
    h, w, d = x.shape
    padded = [-(-size // WINDOW) * WINDOW for size in (h, w)]

    def rolled(place):
        return np.asarray([(p - shift) % size for p, size in zip(place, padded, strict=True)])

    def window(place):
        return tuple(rolled(place) // WINDOW)

    def side(place):
        return [p < shift for p in place]

    def position_bias(offset, head):
        logs = [np.sign(o) * np.log(abs(o) / (WINDOW - 1) * 8 + 1) / np.log(8) for o in offset]
        hidden = np.maximum(np.asarray(logs) @ module.bias_up.kernel[...] + module.bias_up.bias[...], 0)
        return 16 / (1 + np.exp(-hidden @ module.bias_down.kernel[...][:, head]))

    places = list(np.ndindex(h, w))
    gathered = np.zeros((h, w, d))
    for head, scale in enumerate((4.0, 100.0)):
        own = slice(head * d // 2, (head + 1) * d // 2)
        offsets = range(1 - WINDOW, WINDOW)
        biases = {(i, j): position_bias((i, j), head) for i in offsets for j in offsets}
        for place in places:
            seen = [other for other in places if window(other) == window(place)]
            q = query[place][own]
            scores = []
            for other in seen:
                k = key[other][own]
                cosine = q @ k / np.linalg.norm(q) / max(np.linalg.norm(k), 1e-12)
                seam = 0 if side(other) == side(place) else -100
                scores.append(cosine * scale + biases[tuple(rolled(place) - rolled(other))] + seam)
            weights = np.exp(np.asarray(scores) - max(scores))
            weights /= weights.sum()
            gathered[place][own] = sum(weight * value[other][own] for weight, other in zip(weights, seen, strict=True))
    return gathered @ out_kernel + np.asarray(module.projections.out.bias[...])


@pytest.mark.parametrize(
    ("grid", "shift"), [((8, 8), 0), ((8, 8), 2), ((5, 7), 0), ((5, 7), 2), ((3, 2), 0), ((9, 3), 0)]
)
def test_window_attention_on_any_grid(attention, grid, shift):
    x = np.random.default_rng(0).normal(size=(*grid, 8))
    got = quick_jit(lambda x: attention(x, shift))(jnp.asarray(x[None], jnp.float32))
    assert_allclose(got[0], attention_by_loop(attention, x, shift), atol=2e-5)


@pytest.mark.parametrize(("grid", "shift"), [((5, 7), 0), ((5, 7), 2), ((4, 6), 0)])
def test_unmasked_padding_is_zeros_that_are_attended_to(attention, grid, shift):
    graph, state = nnx.split(WindowAttention(8, 2, WINDOW, jnp.float32, nnx.Rngs(0), mask_padding=False))
    nnx.replace_by_pure_dict(state, nnx.to_pure_dict(nnx.state(attention)))
    x = np.random.default_rng(0).normal(size=(*grid, 8))
    got = quick_jit(lambda x: nnx.merge(graph, state)(x, shift))(jnp.asarray(x[None], jnp.float32))
    padded = np.pad(x, [(0, -size % WINDOW) for size in grid] + [(0, 0)])
    assert_allclose(got[0], attention_by_loop(attention, padded, shift)[: grid[0], : grid[1]], atol=2e-5)


def test_a_zero_query_has_finite_gradients(attention):
    graph, state = nnx.split(attention)
    state.projections.query.bias[...] = jnp.zeros(8)
    gradient = jax.grad(lambda x: nnx.merge(graph, state)(x, 0).sum())(jnp.zeros((1, 4, 4, 8)))
    assert np.isfinite(gradient).all()


def test_merging_projects_each_two_by_two_patch_and_pads_odd_grids():
    merging = PatchMerging(6, jnp.float32, nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(1, 3, 4, 3)).astype(np.float32)
    kernel = np.asarray(merging.reduction.kernel[...])
    padded = np.zeros((4, 4, 3))
    padded[:3] = x[0]
    got = merging(jnp.asarray(x))
    assert got.shape == (1, 2, 2, 6)
    for i, j in np.ndindex(2, 2):
        y = sum(padded[2 * i + p, 2 * j + q] @ kernel[p, q] for p, q in np.ndindex(2, 2))
        assert_allclose(got[0, i, j], (y - y.mean()) / np.sqrt(y.var() + 1e-5), atol=1e-4)


def test_stochastic_depth_takes_both_branches_of_a_block():
    block = Block(8, 2, WINDOW, jnp.float32, nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (4, 4, 4, 8))
    assert_array_equal(quick_jit(lambda x: block(x, 0, 1 - 1e-6, jax.random.key(1)))(x), x)


GRID = jax.random.normal(jax.random.key(1), (2, 5, 6, 8))


def run_stage(length, every, **compute):
    """A stage with stochastic depth, as a function of its state."""
    stage = Stage(8, length, 2, WINDOW, every, Compute(drop_path=0.2, **compute), nnx.Rngs(0))
    graph, state = nnx.split(stage)
    keys = jax.random.split(jax.random.key(2), length)
    rates = np.linspace(0, 0.2, length, dtype=np.float32)
    return state, lambda state: nnx.merge(graph, state)(GRID, rates, keys)


@pytest.mark.parametrize(
    ("length", "every"), [(8, 4), (7, 3), (4, 0)]
)  # blocks over; norms inside pairs; no extra norm
def test_scanned_stages_equal_the_loop(length, every):
    state, scanned = run_stage(length, every)
    _, unrolled = run_stage(length, every, scan=False)
    assert_allclose(quick_jit(scanned)(state), quick_jit(unrolled)(state), atol=1e-5)


@pytest.mark.parametrize(("length", "every"), [(1, 0), (3, 2), (5, 3), (3, 1)])
def test_stages_are_their_blocks_in_a_row(length, every):
    stage = Stage(8, length, 2, WINDOW, every, Compute(), nnx.Rngs(0))
    want = GRID
    for i in range(length):
        block = take_layers(stage.pairs["shifted" if i % 2 else "unshifted"], i // 2)
        want = block(want, WINDOW // 2 * (i % 2), 0.0, None)
        if every and (i + 1) % every == 0:
            want = take_layers(stage.extra_norms, i // every)(want)
    assert_allclose(quick_jit(lambda x: stage(x, np.zeros(length, np.float32), None))(GRID), want, atol=2e-4)


def test_scan_and_remat_keep_gradients():
    def gradient(**compute):
        state, run = run_stage(4, 2, **compute)
        weights = jnp.cos(jnp.arange(GRID.size)).reshape(GRID.shape)
        return nnx.to_pure_dict(quick_jit(jax.grad(lambda state: jnp.sum(run(state) * weights)))(state))

    want = gradient(scan=False)
    for other in ({}, {"remat": "full"}):
        jax.tree.map(
            lambda a, b: assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max() + 1e-6), gradient(**other), want
        )


@pytest.mark.parametrize("every", [2, 3])
def test_extra_norms_stand_behind_every_nth_block(every):
    stage = Stage(8, 6, 2, WINDOW, every, Compute(), nnx.Rngs(0))
    count = 6 // every
    scale = jnp.ones((count, 8)).at[-1].set(0)  # the last norm forgets its input, and it stands at the end
    stage.extra_norms.scale[...] = scale
    stage.extra_norms.bias[...] = jnp.arange(8.0 * count).reshape(count, 8)
    want = np.arange(8.0 * count)[-8:]
    got = quick_jit(lambda x: stage(x, np.zeros(6, np.float32), None))(GRID)
    assert_allclose(got, np.broadcast_to(want, GRID.shape))


def test_contradicting_sizes_are_named():
    settings = {"channels": 3, "patch_size": 2, "width": 8, "window": 4, "extra_norm_every": 0}
    with pytest.raises(ValueError, match=r"depths \(2, 0\): a stage has one block or more"):
        SwinV2(**settings, depths=(2, 0), heads=(1, 2), compute=Compute(), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"depths \(2, 2\) and heads \(1,\)"):
        SwinV2(**settings, depths=(2, 2), heads=(1,), compute=Compute(), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="window 1 is too small"):
        SwinV2(**settings | {"window": 1}, depths=(2,), heads=(1,), compute=Compute(), rngs=nnx.Rngs(0))
