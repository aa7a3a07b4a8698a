"""A lookup of geo-prototypes moves the banks of a batch and never the table."""

import json
import os
import subprocess
import sys

import prototype_traffic
import pytest
from prototype_traffic import BANK_BYTES, TABLE_BYTES, traffic

from skyjax.parallel import topology

# There and back, for the lookup, the update and the sums over samples of a region.
LIMIT = 8 * BANK_BYTES


def test_the_limit_tells_banks_from_the_table():
    assert LIMIT < TABLE_BYTES // 7


def test_banks_move_between_virtual_devices():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, prototype_traffic.__file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for found, gathered in json.loads(done.stdout.splitlines()[-1]):
        assert 0 < found <= LIMIT < TABLE_BYTES // 2 < gathered


@pytest.mark.parametrize("sizes", [(1, 16, 1), (2, 8, 1)])
def test_banks_move_between_chips(sizes):
    pytest.importorskip("libtpu")
    chips = topology.describe("v5e:4x4")
    sizes = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    assert 0 < traffic(sizes, chips) <= LIMIT
    assert traffic(sizes, chips, gather=True) > TABLE_BYTES // 2
