"""Contrastive losses against loops in float64, and the ring against the dense form over 1, 2 and 8 devices."""

import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import ring_devices
from numpy.testing import assert_allclose, assert_array_equal
from ring_devices import BIAS, FORMS, KINDS, TEMPERATURE

from skyjax.objectives import contrastive

NAMES = ("sites", "captions", "temperature", "bias")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What ring_devices.py writes."""
    path = tmp_path_factory.mktemp("ring") / "found.npz"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    command = [sys.executable, str(pathlib.Path(ring_devices.__file__)), str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(path))


@pytest.fixture(scope="module")
def arrays():
    return {name: x if x.dtype != np.float32 else np.float64(x) for name, x in ring_devices.inputs().items()}


def loop(kind, sites, captions, valid, words, temperature, bias):
    """A loss a site; each pair by itself."""
    there = [i for i in range(len(sites)) if valid[i].any()]
    losses = np.zeros(len(sites))
    for i in there:
        own_words = {words[i, k] for k in range(valid.shape[1]) if valid[i, k]}
        wrong_captions = [
            captions[j, m]
            for j in there
            for m in range(valid.shape[1])
            if j != i and valid[j, m] and words[j, m] not in own_words
        ]
        own = []
        for k in np.flatnonzero(valid[i]):
            wrong_sites = [
                sites[j]
                for j in there
                if j != i and words[i, k] not in {words[j, m] for m in range(valid.shape[1]) if valid[j, m]}
            ]
            right = sites[i] @ captions[i, k] / temperature
            if kind == "softmax":
                for_site = sum(math.exp(sites[i] @ caption / temperature) for caption in wrong_captions)
                for_caption = sum(math.exp(site @ captions[i, k] / temperature) for site in wrong_sites)
                own.append(sum(math.log(math.exp(right) + rest) - right for rest in (for_site, for_caption)) / 2)
            else:
                wrong = [site @ captions[i, k] / temperature + bias for site in wrong_sites]
                own.append(math.log1p(math.exp(-right - bias)) + sum(math.log1p(math.exp(x)) for x in wrong))
        losses[i] = np.mean(own)
    return losses


def total(kind, arrays, **changes):
    given = {"temperature": TEMPERATURE, "bias": BIAS, **arrays, **changes}
    weight = given.pop("weight")
    return float(np.sum(loop(kind, **given) * weight))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_equal_a_loop_over_pairs(found, arrays, kind, form):
    given = {name: x for name, x in arrays.items() if name != "weight"}
    want = loop(kind, **given, temperature=TEMPERATURE, bias=BIAS)
    assert 0 < np.sum(want == 0) < len(want) / 2  # sites without a caption
    assert_allclose(found[f"{kind}/{form}/8/loss"], want, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_differences_of_the_loop(found, arrays, kind, form, name):
    value = arrays.get(name, np.float64({"temperature": TEMPERATURE, "bias": BIAS}.get(name)))
    direction = np.random.default_rng(1).normal(size=value.shape)
    ends = [total(kind, arrays, **{name: value + step * direction}) for step in (1e-6, -1e-6)]
    gradient = found[f"{kind}/{form}/8/{name}"]
    assert_allclose(np.sum(gradient * direction), (ends[0] - ends[1]) / 2e-6, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("devices", ring_devices.DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_ring_equals_the_dense_form(found, kind, devices):
    for name in ("loss", *NAMES, "views"):
        want = found[f"{kind}/dense/1/{name}"]
        for form in FORMS:
            got = found[f"{kind}/{form}/{devices}/{name}"]
            assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max(), err_msg=f"{form}, {name}")


def test_the_ring_holds_no_matrix_of_all_scores(found):
    shards = 4  # of eight devices two and two share rows
    scores = 4 * ring_devices.BIG**2 // shards
    assert found["memory/dense"] > scores
    assert found["memory/ring"] < scores / 20


def test_captions_of_a_site_weigh_as_much_as_the_only_one_of_another(arrays):
    """Twice the same caption is as once, but for its being a negative of others twice."""
    sites, captions = np.float32(arrays["sites"]), np.float32(arrays["captions"])
    once = np.zeros(captions.shape[:2], bool)
    once[:, 0] = True
    twice = captions.copy()
    twice[:, 1] = twice[:, 0]
    both = once.copy()
    both[:, 1] = True
    one, two = (contrastive.sigmoid(sites, x, v, 0.1, -1.0) for x, v in ((captions, once), (twice, both)))
    assert_allclose(one, two, rtol=1e-5)


def test_without_captions_or_alone_it_is_zero(arrays):
    sites, captions = np.float32(arrays["sites"]), np.float32(arrays["captions"])
    nobody = np.zeros(captions.shape[:2], bool)
    alone = nobody.copy()
    alone[3] = True
    assert_array_equal(contrastive.softmax(sites, captions, nobody, 0.1), 0)
    assert_array_equal(contrastive.sigmoid(sites, captions, nobody, 0.1, 0.0), 0)
    assert_array_equal(contrastive.softmax(sites, captions, alone, 0.1), 0)


def test_the_form_follows_the_size():
    assert contrastive.form_of(256, 256, 256) == "dense"
    assert contrastive.form_of(32_768, 32_768, 1) == "ring"
    assert contrastive.form_of(131_072, 131_072, 256) == "ring"
