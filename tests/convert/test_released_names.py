"""The rules of names and layouts, held to the stored cases of the published modules (tests/models/cases)."""

import pathlib

import numpy as np
import pytest
import released_files
import safetensors.numpy

from skyjax.convert import skysense

CASES = pathlib.Path(__file__).parents[1] / "models" / "cases"
PARTS = {
    "optical_swin_v2": (
        skysense.swin_v2((2, 2, 6, 2), 3),
        {"width": 16, "depths": (2, 2, 6, 2), "heads": (1, 2, 4, 8), "every": 3, "all_norms": True},
        "swin",
    ),
    "multispectral_vit": (skysense.vit(2), {"width": 32, "side": 16}, "vit"),
    "sar_vit": (skysense.vit(2), {"width": 32, "side": 16, "channels": 2}, "vit"),
    "fusion": (skysense.fusion(2), {"width": 32, "spatial": 128}, "fusion"),
    "up_head_s2": (skysense.up_head(4), {"width": 32, "spatial": 128}, "up_head"),
}


@pytest.fixture(scope="module", params=PARTS)
def case(request):
    weights = {}
    for path in (CASES / request.param).glob("weights*.safetensors"):
        weights |= safetensors.numpy.load_file(path)
    return weights, *PARTS[request.param]


def is_weight(name):
    """Not a buffer, and not the norm of a stage that the model does not return."""
    return not name.startswith(("norm0", "norm1", "norm2")) and "relative_" not in name


def test_rules_name_every_weight_of_the_published_module(case):
    weights, rules, _, _ = case
    assert sorted(rule.released for rule in rules) == sorted(filter(is_weight, weights))


def test_what_is_read_and_written_again_has_the_same_bits(case):
    weights, rules, _, _ = case
    back = skysense.from_params(rules, skysense.to_params(rules, weights))
    for name, value in back.items():
        assert (value.shape, value.dtype, value.tobytes()) == (
            weights[name].shape, weights[name].dtype, weights[name].tobytes(),
        ), name  # fmt: skip


def test_the_files_of_these_tests_look_like_the_published_ones(case):
    weights, _, settings, make = case
    made = getattr(released_files.Maker(), make)(**settings)
    shapes = {name: value.shape for name, value in weights.items() if "relative_" not in name}
    assert {name: value.shape for name, value in made.items()} == shapes


def test_only_the_leap_day_is_ours():
    released = np.random.default_rng(0).normal(size=(1, 365, 4)).astype(np.float32)
    rules = skysense.dates()
    ours = skysense.to_params(rules, {"ctpe": released})["dates"]
    assert ours.shape == (366, 4)
    np.testing.assert_array_equal(ours[365], released[0, 364])
    assert skysense.from_params(rules, {"dates": ours})["ctpe"].tobytes() == released.tobytes()


@pytest.mark.parametrize("window", [2, 4, 7, 8, 16])
def test_buffers_are_those_of_the_published_module(window):
    for name, want in released_files.buffers(window).items():
        got = skysense.buffer(name, window)
        assert (got.dtype, got.shape, got.tobytes()) == (want.dtype, want.shape, want.tobytes())
