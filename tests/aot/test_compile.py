"""`skyjax compile` on a small experiment, against what can be counted without a compiler; more: tests/golden."""

import dataclasses
import json
import math

import jax
import pytest

from skyjax.parallel import chips, flops, topology
from skyjax.parallel.mesh import make_mesh
from skyjax.train import plan, plan_text

pytest.importorskip("libtpu")
TOPOLOGY = "v5e:2x2"


@pytest.fixture(scope="module")
def config(tiny_config):
    """Multispectral sequences, global and local views, every loss but those between modalities."""
    return tiny_config(modalities=("multispectral",), batch_size=8, mesh__fsdp=2)


@pytest.fixture(scope="module")
def planned(config):
    return plan.compile_step(config, TOPOLOGY, say=lambda _: None)


def shard_bytes(leaf):
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def test_a_step_is_planned_with_what_it_takes(planned, config):
    devices = topology.describe(planned.topology)
    chip = chips.chip(planned.topology.split(":")[0])
    assert (planned.chips, planned.devices, planned.batch_size) == (4, 4, 8)
    assert planned.mesh == {"data": 2, "fsdp": 2, "tensor": 1}

    # Arguments: every shard of state and batch; small ones are padded to tiles of 8 x 128 numbers.
    shards = [shard_bytes(leaf) for leaf in jax.tree.leaves(plan.arguments(config, make_mesh(config.mesh, devices)))]
    assert sum(shards) <= planned.memory.arguments <= 1.5 * sum(shards) + 4096 * len(shards)
    assert planned.memory.limit == chip.hbm_limit
    assert planned.memory.shortfall == 0

    model = flops.model_flops(config) * config.batch_size
    assert sum(planned.model_flops.values()) == model
    # What is computed is more than the model's own: losses, balancing, gathers as products; but of that order.
    assert model < planned.program.flops * planned.devices < 3 * model
    assert planned.bounds.step_s == max(
        planned.program.flops / chip.bf16_flops,
        planned.program.hbm_bytes / chip.hbm_bandwidth,
        planned.program.ici_bytes / chip.ici_bandwidth,
    )
    assert planned.mfu_ceiling == pytest.approx(model / (4 * chip.bf16_flops * planned.bounds.step_s))
    assert not [name for name in planned.program.unknown if "loop" in name]


def test_the_plan_is_told_in_words_and_numbers(planned):
    text = plan_text.show(planned)
    assert f"4, {planned.topology}" in text
    assert f"bound by {planned.bounds.bound_by}" in text
    written = json.loads(json.dumps(plan_text.to_json(planned)))
    assert written["fits"] is True
    assert written["hbm_bytes"]["peak"] == planned.memory.arguments + planned.memory.temporaries
    assert written["collectives"].keys() == dict(planned.program.collectives).keys()


def test_what_does_not_fit_is_told_with_the_largest_arrays_and_what_would_help(planned):
    tight = dataclasses.replace(planned, memory=dataclasses.replace(planned.memory, limit=1 << 20))
    text = plan_text.shortfall(tight)
    assert f"{(tight.memory.peak - tight.memory.limit) / 2**30:.2f} GiB too much" in text
    assert planned.program.largest_buffers[0].name in text
    assert "What would help: " in text
