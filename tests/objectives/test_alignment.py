import jax
import jax.numpy as jnp
import numpy as np
import objectives_reference as reference
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from skyjax.objectives import alignment, heads

B, V, C, D = 5, 2, 6, 4
PRESENT = {
    "optical": np.array([1, 1, 0, 1, 1], bool),
    "multispectral": np.array([1, 1, 1, 1, 0], bool),
    "sar": np.array([0, 0, 1, 0, 0], bool),
}
present = {m: np.repeat(x[:, None], V, 1) for m, x in PRESENT.items()}


@pytest.fixture(scope="module")
def features():
    rng = np.random.default_rng(0)
    return {m: rng.normal(size=(B, V, C)).astype(np.float32) for m in PRESENT}


@pytest.fixture(scope="module")
def head():
    rng = np.random.default_rng(1)
    kernels = {m: {"kernel": jnp.asarray(rng.normal(size=(C, D)), jnp.float32)} for m in PRESENT}
    return {**kernels, "temperature": jnp.log(jnp.float32(0.1))}


@jax.jit
def loss(features, head, present):
    sums, _ = alignment.align(features, present, head)
    return sum(sums.values())


def test_every_pair_equals_a_float64_loop_over_the_samples_that_have_both(features, head):
    sums, counts = alignment.align(features, present, head)
    assert set(sums) == {"optical-multispectral", "optical-sar", "multispectral-sar"}
    for pair in sums:
        a, c = pair.split("-")
        both = PRESENT[a] & PRESENT[c]
        want = sum(
            reference.symmetric_infonce(
                *(reference.unit(np.float64(features[m][both, v]) @ np.float64(head[m]["kernel"])) for m in (a, c)),
                0.1,
            )
            for v in range(V)
        )
        assert_allclose(sums[pair], want, rtol=1e-5, atol=1e-6)
        assert counts[pair] == V * both.sum()


def test_samples_that_lack_one_of_the_two_leave_no_trace(features, head):
    both = PRESENT["optical"] & PRESENT["multispectral"]
    pair = {m: features[m] for m in ("optical", "multispectral")}
    spoilt = {m: np.where(present[m][..., None], x, np.nan) for m, x in pair.items()}
    alone = {m: x[both] for m, x in pair.items()}
    gradient = jax.value_and_grad(loss, (0, 1))
    value, (by_feature, by_head) = gradient(spoilt, head, present)
    want, (by_feature_alone, by_head_alone) = gradient(alone, head, {m: present[m][both] for m in pair})

    assert_allclose(value, want, rtol=1e-6)
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-6), by_head, by_head_alone)
    for m in pair:
        assert_array_equal(by_feature[m][~both], 0)
        assert_allclose(by_feature[m][both], by_feature_alone[m], atol=1e-6)


def test_one_sample_or_none_is_zero_with_finite_gradients(features, head):
    for rows in ([2], []):
        few = {m: np.isin(np.arange(B), rows)[:, None] & np.ones((B, V), bool) for m in PRESENT}
        value, gradients = jax.value_and_grad(loss, (0, 1))(features, head, few)
        assert value == 0
        assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradients))


def test_the_temperature_is_clamped_and_can_come_back(head):
    cold, warm = ({**head, "temperature": jnp.float32(t)} for t in (-20, 5))
    assert_allclose(heads.alignment_temperature(cold), 0.01, rtol=1e-5)
    assert_allclose(heads.alignment_temperature(warm), 1.0, rtol=1e-5)
    assert jax.grad(lambda h: heads.alignment_temperature(h))(cold)["temperature"] > 0
