"""Stacked <-> listed: every layer under its own name, and not a bit changed."""

import jax
import numpy as np
import pytest

from skyjax.models.listed import from_listed, to_listed


def numbers(*shape, seed):
    """Bits of every kind: NaN with payload, infinity, denormals, both zeros."""
    bits = np.random.default_rng(seed).integers(0, 2**32, shape, np.uint32)
    bits.flat[:4] = (0x7FC00123, 0xFF800000, 0x00000001, 0x80000000)
    return bits.view(np.float32)


def block(count, seed):
    attention = {
        "projections": {"query": {"kernel": numbers(count, 4, 4, seed=seed), "bias": numbers(count, 4, seed=seed + 1)}},
        "logit_scale": numbers(count, 4, seed=seed + 2),
    }
    return {"attention": attention, "norm1": {"scale": numbers(count, 4, seed=seed + 3)}}


def tree(unshifted, shifted, norms):
    stage = {"pairs": {"unshifted": block(unshifted, 0)}}
    if shifted:
        stage["pairs"]["shifted"] = block(shifted, 10)
    if norms:
        stage["extra_norms"] = {"scale": numbers(norms, 4, seed=20)}
    return {
        "optical": {"stage2": stage, "norm": {"scale": numbers(4, seed=21)}},
        "fusion": {"dates": numbers(6, 4, seed=22), "layers": {"attention": {"query": numbers(3, 4, seed=23)}}},
        "up_heads": {"sar": {"cells": {"bias": numbers(2, 2, 4, seed=24)}}},
    }


def same_bits(got, want):
    got, want = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (got, want))
    assert got.keys() == want.keys()
    for path in got:
        assert np.asarray(got[path]).dtype == want[path].dtype
        assert np.asarray(got[path]).tobytes() == want[path].tobytes(), path


@pytest.mark.parametrize(("unshifted", "shifted", "norms"), [(3, 3, 2), (3, 2, 1), (1, 0, 0), (2, 1, 3)])
def test_lossless_for_even_and_odd_depths(unshifted, shifted, norms):
    params = tree(unshifted, shifted, norms)
    listed = to_listed(params)
    same_bits(from_listed(listed), params)
    same_bits(to_listed(from_listed(listed)), listed)


def test_names_and_places():
    params = tree(3, 2, 1)
    listed = to_listed(params)
    pairs = params["optical"]["stage2"]["pairs"]
    wanted = {
        f"optical.stage2.blocks.{i}.{name}": pick(pairs[("unshifted", "shifted")[i % 2]])[i // 2]
        for i in range(5)
        for name, pick in {
            "attention.query.kernel": lambda b: b["attention"]["projections"]["query"]["kernel"],
            "attention.query.bias": lambda b: b["attention"]["projections"]["query"]["bias"],
            "attention.logit_scale": lambda b: b["attention"]["logit_scale"],
            "norm1.scale": lambda b: b["norm1"]["scale"],
        }.items()
    }
    wanted |= {
        "optical.stage2.extra_norms.0.scale": params["optical"]["stage2"]["extra_norms"]["scale"][0],
        "optical.norm.scale": params["optical"]["norm"]["scale"],
        "fusion.dates": params["fusion"]["dates"],
        "fusion.layers.2.attention.query": params["fusion"]["layers"]["attention"]["query"][2],
        "up_heads.sar.cells.bias": params["up_heads"]["sar"]["cells"]["bias"],
    }
    assert wanted.keys() < listed.keys()
    assert listed.keys() - wanted.keys() == {f"fusion.layers.{i}.attention.query" for i in range(2)}
    same_bits({name: listed[name] for name in wanted}, wanted)


def test_order_of_names_does_not_matter_and_ten_comes_after_nine():
    params = {"layers": {"scale": numbers(12, 4, seed=0)}}
    listed = to_listed(params)
    same_bits(from_listed(dict(sorted(listed.items()))), params)
    assert list(listed)[9:11] == ["layers.9.scale", "layers.10.scale"]


def test_jax_arrays_stay_so_and_work_when_traced():
    params = jax.tree.map(lambda x: jax.numpy.asarray(np.nan_to_num(x)), tree(2, 1, 1))
    back = jax.jit(lambda p: from_listed(to_listed(p)))(params)
    same_bits(back, jax.tree.map(np.asarray, params))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x: x.pop("fusion.layers.1.attention.query"), '"fusion.layers.1" is missing'),
        (lambda x: x.update({"fusion.layers.1.extra": np.zeros(1)}), "hold different parameters"),
        (lambda x: x.update({"fusion.layers.1.attention.query": np.zeros(1)}), "have different shapes"),
        (lambda x: x.update({"fusion.dates.row": np.zeros(1)}), "which is an array"),
    ],
)
def test_what_is_no_stack_is_named(change, sentence):
    listed = to_listed(tree(2, 2, 1))
    change(listed)
    with pytest.raises(ValueError, match=sentence):
        from_listed(listed)
