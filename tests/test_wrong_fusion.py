"""jaxlib 0.10.2 on the CPU can be silently wrong (docs/findings.md): skyjax turns the fusion off for every user.

Each case runs in a process of its own, since XLA reads its flags once.
"""

import os
import subprocess
import sys

import jaxlib
import numpy as np
import pytest

# A dot with a closed-over matrix of one repeated value, fused with a reduction.
CASE = """
import jax, jax.numpy as jnp, numpy as np
x = np.random.default_rng(0).normal(size=(3, 64, 64, 10)).astype("f")
print(jax.jit(lambda x: jnp.square(x @ jnp.ones((10, 4))).sum((1, 2)))(x)[0, 0])
"""


def run(code, flags=""):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    if flags:
        environment["XLA_FLAGS"] = flags
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def right():
    x = np.random.default_rng(0).normal(size=(3, 64, 64, 10)).astype("f").astype(np.float64)
    return np.square(x @ np.ones((10, 4))).sum((1, 2))[0, 0]


def test_skyjax_computes_the_case_right(right):
    got, _ = run("import skyjax\n" + CASE)
    assert float(got) == pytest.approx(right, rel=1e-5)


@pytest.mark.skipif(jaxlib.__version__ != "0.10.2", reason="only this release is known to have the fault")
def test_without_the_flag_it_is_wrong(right):
    """When this fails for a newer jaxlib in the list of skyjax/__init__.py, take that release off the list."""
    got, _ = run(CASE)
    assert abs(float(got) - right) > 0.5 * right


def test_the_users_flags_stay():
    got, _ = run(
        "import skyjax, jax, os; print(jax.device_count(), os.environ['XLA_FLAGS'])",
        "--xla_force_host_platform_device_count=3",
    )
    assert got.split() == ["3", "--xla_force_host_platform_device_count=3", "--xla_cpu_experimental_ynn_fusion_type="]


@pytest.mark.skipif(jaxlib.__version__ != "0.10.2", reason="only this release is known to have the fault")
def test_importing_too_late_warns():
    _, errors = run("import jax; jax.numpy.ones(1).block_until_ready(); import skyjax")
    assert "import skyjax first" in errors
