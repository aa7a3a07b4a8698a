"""TPU topologies by name, "v5p:4x4x8": their devices without a TPU, and the name of the devices that are here.

libtpu (pip install "jax[tpu]") describes chips that are not there, and XLA compiles real TPU programs for them on any
computer.
"""

import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from skyjax.errors import UserError, nearest
from skyjax.parallel.chips import chips, of_kind

# XLA knows them too; their peaks do not stand in chips.toml. Name -> number of axes of the torus.
_WITHOUT_PEAKS = {"v2": 2, "v3": 2}


def parse(name: str) -> tuple[str, tuple[int, ...]]:
    """ "v5p:4x4x8" as ("v5p", (4, 4, 8)): the generation, and chips along each axis of the torus.

    Raises:
      UserError: it is not written so, or the generation is not known or has another number of axes.
    """
    found = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", name)
    if found is None:
        raise UserError(f'topology: "{name}" is not written as GENERATION:AxB or AxBxC, as in v5e:16x16 or v5p:4x4x8')
    generation, shape = found[1], tuple(int(size) for size in found[2].split("x"))
    axes = _axes()
    if generation not in axes:
        raise UserError(
            f'topology: "{generation}" is not known{nearest(generation, axes)}; known are {", ".join(axes)}'
        )
    if len(shape) != axes[generation]:
        raise UserError(f'topology: "{name}" has {len(shape)} axes; a {generation} has {axes[generation]}')
    return generation, shape


def describe(name: str, slices: int = 1) -> Sequence[jax.Device]:
    """The devices of `slices` equal slices of a TPU topology, to build a mesh and to compile for; nothing runs on them.

    A tpu7x has two devices a chip; on every other generation here a device is a chip.

    Raises:
      UserError: no such topology, or libtpu is not installed.
    """
    generation, shape = parse(name)
    if slices < 1:
        raise UserError(f"slices: {slices} is not a number of slices; it is 1 or more")
    # libtpu reads it when it is loaded: other processes may compile too. The rest that it reads: skyjax/__init__.py.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if generation == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device
    if all(size == 1 for size in shape):
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except RuntimeError as error:
        if "not installed" in str(error):
            raise UserError('topology: this needs libtpu; install it with pip install "jax[tpu]"') from error
        reason = str(error).strip().splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise UserError(f'topology: XLA knows no "{name}" ({reason}); as in v5e:16x16, v5p:4x4x8, v6e:16x16') from error


def name_of(devices: Sequence[jax.Device]) -> str:
    """What `describe` calls the topology of these devices, or, of other devices, their kind and number: "cpu:8".

    Several equal slices are written as one, with their number: "v5e:16x16*2".
    """
    kind = devices[0].device_kind
    chip = of_kind(kind)
    generation = chip.name if chip else kind.removeprefix("TPU ")
    if generation not in _axes():
        return f"{kind}:{len(devices)}"
    count = slice_count(devices)
    coordinates = [device.coords for device in devices if slice_of(device) == slice_of(devices[0])]
    extent = [max(axis) - min(axis) + 1 for axis in zip(*coordinates, strict=True)]
    shape = "x".join(str(size) for size in extent[: _axes()[generation]])
    return f"{generation}:{shape}" + (f"*{count}" if count > 1 else "")


def slice_of(device: jax.Device) -> int:
    """The slice that a device belongs to; 0 where all is one."""
    return int(getattr(device, "slice_index", 0) or 0) if device.platform == "tpu" else 0


def slice_count(devices: Sequence[jax.Device]) -> int:
    """Into how many slices the devices fall."""
    return len({slice_of(device) for device in devices})


def _axes() -> dict[str, int]:
    """Generation -> number of axes of its torus."""
    return _WITHOUT_PEAKS | {chip.name: chip.axes for chip in chips().values() if chip.axes}
