"""The mesh of devices. In: `config.mesh`, sizes of the axes. Out: a `jax.sharding.Mesh` with axes data, fsdp, tensor.

The batch is split over `data` and `fsdp`, parameters over `fsdp`, widths over `tensor`. The sizes are of the fast
network inside a slice of a TPU; between slices, `dcn` holds the sizes over the data centre's network, and where it is
not there `data` runs over all slices.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from skyjax.errors import UserError
from skyjax.parallel.topology import slice_count

AXES = ("data", "fsdp", "tensor")
ALL_DATA = {"data": -1, "fsdp": 1, "tensor": 1}


def make_mesh(sizes: Mapping[str, Any], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices, or over those given.

    Args:
      sizes: devices along each of AXES in a slice; at most one is -1 and takes what is left. "dcn", which may be
        absent: slices along each of AXES, likewise.
      devices: jax.devices() where None.

    Raises:
      UserError: an axis is missing, unknown or below 1, two are -1, or the product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    slices = slice_count(devices)
    inside = {axis: size for axis, size in sizes.items() if axis != "dcn"}
    shape = mesh_shape(inside, len(devices) // slices)
    between = mesh_shape(sizes.get("dcn") or ALL_DATA, slices, "mesh.dcn", ("slice", "slices"))
    # Any axis of the torus may be cut: fsdp = 32 on 16 x 16 chips is one of its rows by two of the other axis.
    options: dict[str, Any] = {"devices": devices, "allow_split_physical_axes": True}
    try:
        if slices > 1:
            array = mesh_utils.create_hybrid_device_mesh(shape, between, **options)
        else:
            array = mesh_utils.create_device_mesh(shape, **options)
    except NotImplementedError as error:
        raise UserError(
            f"config: mesh {dict(zip(AXES, shape, strict=True))} cannot be laid on these chips: {error}"
        ) from error
    # With explicit axes every operation of the model would have to name its sharding.
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_shape(
    sizes: Mapping[str, int], count: int, name: str = "mesh", unit: tuple[str, str] = ("device", "devices")
) -> tuple[int, ...]:
    """The sizes of AXES in order, with -1 filled in so that the product is `count`. Errors as in `make_mesh`."""
    if set(sizes) != set(AXES):
        raise UserError(f"config: {name} has the axes {', '.join(sizes)}; it needs {', '.join(AXES)}")
    shape = [int(sizes[axis]) for axis in AXES]
    written = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
    if shape.count(-1) > 1:
        raise UserError(f"config: {name} {written}: only one axis may be -1; give the others a size")
    if any(size < 1 and size != -1 for size in shape):
        raise UserError(f"config: {name} {written}: a size is at least 1, or -1 for what is left")
    known = math.prod(size for size in shape if size != -1)
    if -1 in shape and count % known == 0:
        shape[shape.index(-1)] = count // known
    if -1 in shape:
        raise UserError(
            f"config: {name} {written} does not fit {count} {unit[count != 1]}: {known}, the product of the sizes"
            f" that are given, does not divide {count}; choose sizes that do"
        )
    if math.prod(shape) != count:
        raise UserError(f"config: {name} {written} does not fit {count} {unit[count != 1]}; set one axis to -1")
    return tuple(shape)
