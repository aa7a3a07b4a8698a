"""What compares samples compares those of the global batch: the same value and gradient on 1, 2 and 8 devices."""

import os
import pathlib
import subprocess
import sys

import many_devices
import numpy as np
import objectives_reference as reference
import pytest
from many_devices import EPSILON, ITERATIONS, MODALITIES, SHARPNESS, B, C, K
from numpy.testing import assert_allclose, assert_array_equal

TERMS = (*many_devices.LEVELS, "alignment", "spread")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Devices -> name -> array."""
    path = tmp_path_factory.mktemp("devices") / "found.npz"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, str(pathlib.Path(many_devices.__file__)), str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = {count: {} for count in many_devices.DEVICES}
    for name, array in np.load(path).items():
        count, _, name = name.partition("[")
        results[int(count)]["[" + name] = array
    return results


def loops(arrays):
    """Every term in float64 Python loops over all samples."""
    heads, teacher_heads = (
        {term: many_devices.make_heads(term, seed) for term in many_devices.LEVELS} for seed in (0, 1)
    )
    student, teacher, pooled = (np.float64(arrays[name]) for name in ("student", "teacher", "pooled"))
    both = arrays["there"].all(1)
    kernels = [np.float64(heads["dino"]["alignment"][m]["kernel"]) for m in MODALITIES]
    return {
        "dino": reference.dino(
            student.reshape(-1, C),
            teacher.reshape(-1, C),
            arrays["weight"].ravel(),
            heads["dino"]["fused"]["image"],
            teacher_heads["dino"]["fused"]["image"],
            temperature=0.1,
            epsilon=SHARPNESS,
            iterations=3,
        ),
        **{
            term: reference.infonce(
                reference.project(heads[term]["fused"]["image"], student, normed),
                reference.project(teacher_heads[term]["fused"]["image"], teacher, normed),
                arrays["weight"],
                0.2,
            )
            for term, normed in (("infonce", None), ("normed", arrays["weight"] > 0))
        },
        "alignment": reference.symmetric_infonce(
            *(reference.unit(pooled[both, i] @ kernels[i]) for i in range(len(MODALITIES))), 0.1
        ),
        "spread": reference.koleo(pooled[arrays["there"][:, 0], 0], 0.01),
    }


@pytest.mark.parametrize("devices", many_devices.DEVICES)
def test_sinkhorn_equals_the_loop_and_is_balanced_over_any_devices(found, devices):
    arrays = many_devices.inputs()
    valid = arrays["valid"]
    got = found[devices]["['balanced']"]
    want = reference.balance(np.float64(arrays["scores"][valid]), EPSILON, ITERATIONS)
    assert_allclose(got[valid], want, atol=1e-5)
    assert_array_equal(got[~valid], 0)
    assert_allclose(got[valid].sum(1), 1, rtol=1e-5)
    assert_allclose(got.sum(0), valid.sum() / K, rtol=1e-3)
    # An eighth of the rows balanced by itself is something else, or this would prove nothing.
    eighth = reference.balance(np.float64(arrays["scores"][:2][valid[:2]]), EPSILON, ITERATIONS)
    assert np.abs(eighth - want[: len(eighth)]).max() > 0.1


@pytest.mark.parametrize("devices", many_devices.DEVICES)
@pytest.mark.parametrize("term", TERMS)
def test_value_equals_the_loop_over_all_samples(found, term, devices):
    arrays = many_devices.inputs()
    assert_allclose(found[devices][f"['values']['{term}']"], loops(arrays)[term], rtol=3e-5)
    parts = [loops({name: x[s : s + B // 2] for name, x in arrays.items()})[term] for s in (0, B // 2)]
    assert not np.isclose(sum(parts), loops(arrays)[term], rtol=1e-2)  # halves by themselves are something else


@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("term", TERMS)
def test_gradients_equal_those_of_one_device(found, term, devices):
    names = [name for name in found[1] if name.startswith(f"['gradients']['{term}']")]
    moved, largest = set(), max(np.abs(found[1][name]).max() for name in names)
    for name in names:
        want = found[1][name]
        assert_allclose(found[devices][name], want, rtol=1e-4, atol=1e-5 * largest, err_msg=name)
        moved |= {name} if np.abs(want).max() > 0 else set()
    features = {"alignment": "pooled", "spread": "pooled"}.get(term, "student")
    assert any(name.endswith(f"['{features}']") for name in moved)
    assert term == "spread" or any("bottleneck" in name or "kernel" in name for name in moved)


@pytest.mark.parametrize("term", TERMS)
def test_gradients_equal_differences_of_the_loop(found, term):
    """Along one direction of the features, in float64: the gradient of one device is not wrong as well."""
    arrays = {name: np.float64(x) if x.dtype != bool else x for name, x in many_devices.inputs().items()}
    features = {"alignment": "pooled", "spread": "pooled"}.get(term, "student")
    direction = np.random.default_rng(1).normal(size=arrays[features].shape)
    ends = [loops(arrays | {features: arrays[features] + step * direction})[term] for step in (1e-5, -1e-5)]
    gradient = found[1][f"['gradients']['{term}'][0]['{features}']"]
    assert_allclose(np.sum(gradient * direction), (ends[0] - ends[1]) / 2e-5, rtol=1e-3)
