import pytest

from skyjax.errors import UserError
from skyjax.parallel import chips, topology


def test_every_chip_says_where_its_figures_stand():
    for chip in chips.chips().values():
        assert len(chip.source) > 20
        assert chip.bf16_flops > 1e14
        assert 1e11 < chip.ici_bandwidth < chip.hbm_bandwidth < chip.bf16_flops
        assert chip.dcn_bandwidth < chip.ici_bandwidth
        assert chip.hbm_limit * chip.devices_a_chip < 1.01 * chip.hbm_bytes


def test_published_figures():
    v5e, tpu7x, h100 = (chips.chip(name) for name in ("v5e", "tpu7x", "h100"))
    assert (v5e.bf16_flops, v5e.hbm_bandwidth, v5e.ici_bandwidth, v5e.dcn_bandwidth) == (197e12, 819e9, 200e9, 3.125e9)
    assert (v5e.hbm_bytes, v5e.hbm_limit) == (16 * 2**30, 15.75 * 2**30)
    assert (tpu7x.devices_a_chip, tpu7x.bf16_flops, tpu7x.hbm_limit) == (2, 2307e12, 94.75 * 2**30)
    assert h100.bf16_flops == 989e12


def test_names_are_those_of_topologies_and_of_jax():
    axes = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}
    assert {name: chip.axes for name, chip in chips.chips().items() if chip.axes} == axes
    kinds = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}
    assert {kind: chips.of_kind(kind).name for kind in kinds} == kinds
    assert chips.of_kind("NVIDIA H100 80GB HBM3") is chips.chip("h100")
    assert chips.of_kind("cpu") is None


def test_which_axes_are_rings():
    v5e, v5p, h100 = (chips.chip(name) for name in ("v5e", "v5p", "h100"))
    assert [v5e.is_ring(side) for side in (4, 8, 16)] == [False, False, True]
    assert [v5p.is_ring(side) for side in (2, 4, 8)] == [False, True, True]
    assert not h100.is_ring(8)


def test_an_unknown_chip_is_named_with_its_nearest():
    with pytest.raises(UserError, match='"v5f" is not known; did you mean "v5'):
        chips.chip("v5f")


def test_limits_are_what_the_compiler_says():
    pytest.importorskip("libtpu")
    import jax
    import jax.numpy as jnp

    from skyjax.parallel import hlo

    for name in ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"):
        chip = chips.chip(topology.parse(name)[0])
        devices = topology.describe(name)
        assert len(devices) == 4 * chip.devices_a_chip
        assert chips.of_kind(devices[0].device_kind) is chip
        sharding = jax.sharding.SingleDeviceSharding(devices[0])
        big = jax.ShapeDtypeStruct((2**20, 2**16), jnp.float32, sharding=sharding)
        with pytest.raises(jax.errors.JaxRuntimeError) as raised:
            jax.jit(lambda x: jnp.tanh(x) + 1).lower(big).compile()
        assert hlo.parse_out_of_memory(str(raised.value)).limit_bytes == pytest.approx(chip.hbm_limit, rel=1e-6)
