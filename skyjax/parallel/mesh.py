"""The mesh of devices. In: `config.mesh`, sizes of the axes. Out: a `jax.sharding.Mesh` with axes data, fsdp, tensor.

The batch is split over `data` and `fsdp`, parameters over `fsdp`, widths over `tensor`.
"""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh

from skyjax.errors import UserError

AXES = ("data", "fsdp", "tensor")


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices, or over those given.

    Args:
      sizes: devices along each of AXES; at most one is -1 and takes what is left.
      devices: jax.devices() where None.

    Raises:
      UserError: an axis is missing, unknown or below 1, two are -1, or the product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(sizes, len(devices))
    # Explicit axes are make_mesh's default; with them every operation of the model would have to name its sharding.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def mesh_shape(sizes: Mapping[str, int], device_count: int) -> tuple[int, ...]:
    """The sizes of AXES in order, with -1 filled in. Errors as in `make_mesh`."""
    if set(sizes) != set(AXES):
        raise UserError(f"config: mesh has the axes {', '.join(sizes)}; it needs {', '.join(AXES)}")
    shape = [int(sizes[axis]) for axis in AXES]
    written = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
    if shape.count(-1) > 1:
        raise UserError(f"config: mesh {written}: only one axis may be -1; give the others a size")
    if any(size < 1 and size != -1 for size in shape):
        raise UserError(f"config: mesh {written}: a size is at least 1, or -1 for what is left")
    known = math.prod(size for size in shape if size != -1)
    if -1 in shape and device_count % known == 0:
        shape[shape.index(-1)] = device_count // known
    if math.prod(shape) != device_count:
        plural = "device" if device_count == 1 else "devices"
        raise UserError(f"config: mesh {written} does not fit {device_count} {plural}; set one axis to -1")
    return tuple(shape)
