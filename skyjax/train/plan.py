"""What a training step takes on TPUs that are not here: the whole step compiled ahead of time, and read.

In: a config and the name of a topology. Out: a `Plan`: whether it fits, what it computes, moves and sends, and the
least time that a step can take by the chips' published peaks. Nothing is allocated and nothing runs.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from skyjax.parallel import chips, flops, hlo, roofline, topology
from skyjax.parallel.ahead import compile_ahead
from skyjax.parallel.mesh import make_mesh
from skyjax.parallel.sharding import batch_sharding, check_batch_size, state_shardings, with_shardings
from skyjax.sample import Batch
from skyjax.train import loop
from skyjax.train import state as states

GIB = 2**30
# The type that a batch holds: the widest of its sources (sample.py), here that of the sensors in sensors.toml.
STORED = {"optical": jnp.uint8, "multispectral": jnp.uint16, "sar": jnp.float32}

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a device's HBM.

    Attributes:
      arguments: state and batch.
      temporaries: all else that the program reserves.
      code: machine code; None where it was not compiled.
      live: XLA's `peak_memory_in_bytes`: what lives at the busiest moment, VMEM included; None likewise.
      limit: what XLA gives to programs.
    """

    arguments: int
    temporaries: int
    code: int | None
    live: int | None
    limit: int

    @property
    def peak(self) -> int:
        """All that has to be there."""
        return self.arguments + self.temporaries + (self.code or 0)

    @property
    def share(self) -> float:
        """What the peak takes of the limit."""
        return self.peak / self.limit

    @property
    def shortfall(self) -> int:
        """By how much it does not fit; 0 where it does."""
        return max(0, self.peak - self.limit)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A compiled step.

    Attributes:
      topology, slices: what it was compiled for.
      chips, devices: how many; a chip may be two devices.
      mesh: axis -> devices along it.
      batch_size: samples of a step, over all devices.
      parameters: of the student.
      memory: of each device.
      model_flops: part -> FLOPs of a step on all devices, without recomputation (parallel/flops.py).
      program: what one device computes, moves and sends in a step.
      bounds: the least times of a step.
      mfu_ceiling: the share of the chips' peak that the model's FLOPs can reach at these bounds.
      compile_seconds, compile_bytes: wall time, and the compiler's memory at its highest.
    """

    topology: str
    slices: int
    chips: int
    devices: int
    mesh: dict[str, int]
    batch_size: int
    parameters: int
    memory: Memory
    model_flops: dict[str, int]
    program: hlo.Program
    bounds: roofline.Bounds
    mfu_ceiling: float
    compile_seconds: float
    compile_bytes: int


def abstract_batch(config: ml_collections.ConfigDict, samples: int) -> Batch:
    """Shapes and types of a batch (sample.py), as the loader makes it of sources stored as in STORED."""

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((samples, *shape), dtype)

    def images(m: str, views: int, size: flops.Images) -> dict[str, Any]:
        maps, pixels, bands = (views, size.dates), size[1:], len(config.model.modalities[m].bands)
        return {
            "values": array(STORED[m], *maps, *pixels, bands),
            "clear": array(bool, *maps, *pixels),
            **{name: array(jnp.int32, *maps) for name in ("days", "student_days")},
            **{name: array(bool, *maps) for name in ("valid", "student_valid")},
            "sensor": array(jnp.int32),
            "bands": array(bool, bands),
        }

    groups = {
        group: {"to_view": array(jnp.float32, views, 2, 3), **{m: images(m, views, size) for m, size in sizes.items()}}
        for group, (views, sizes) in flops.view_images(config).items()
    }
    words = {"text": _abstract_text(config, array)} if config.model.get("text") else {}
    return {"index": array(jnp.uint32), "lonlat": array(jnp.float32, 2), "bad": array(bool), **groups, **words}


def _abstract_text(config: ml_collections.ConfigDict, array: Callable[..., Any]) -> dict[str, Any]:
    """As input/texts.py makes it."""
    rows, length = config.data.text.captions, config.data.text.length
    text = {
        "tokens": array(jnp.int32, rows, length),
        "valid": array(bool, rows, length),
        "words": array(jnp.int32, rows),
    }
    if config.model.get("decoder"):
        text["written"] = {"tokens": array(jnp.int32, length)} | {
            name: array(bool, length) for name in ("valid", "counted")
        }
    return text


def arguments(config: ml_collections.ConfigDict, mesh: Mesh) -> tuple[states.State, Batch]:
    """State and batch of a step as they lie on the mesh, abstract."""
    state = states.abstract(config)
    batch = abstract_batch(config, config.batch_size)
    everywhere = jax.tree.map(lambda _: batch_sharding(mesh), batch)
    return with_shardings(state, state_shardings(state, mesh)), with_shardings(batch, everywhere)


def trace(config: ml_collections.ConfigDict, mesh: Mesh) -> Any:
    """The step as the loop compiles it, traced for the devices of `mesh`.

    Raises:
      UserError: the mesh and the batch, or the parameters and the mesh, do not fit each other.
    """
    check_batch_size(config.batch_size, config.micro_batches, mesh)
    state, batch = arguments(config, mesh)
    with jax.set_mesh(mesh):
        step: Any = loop.jit_step(config, loop.statistics_table(config.model), state, mesh)
        return step.trace(state, batch)


def lower(config: ml_collections.ConfigDict, name: str, slices: int) -> Any:
    """The step lowered for a topology. Errors as in `trace` and `topology.describe`."""
    return trace(config, make_mesh(config.mesh, topology.describe(name, slices))).lower()


def compile_step(
    config: ml_collections.ConfigDict, name: str, slices: int = 1, *, code: bool = False, say: Say = print
) -> Plan:
    """Compiles the whole training step for a topology.

    Args:
      config: the experiment, the topology's mesh rules applied.
      name: of the topology, "v5p:4x4x8".
      slices: equal ones, with the data centre's network between them.
      code: also the machine code; takes much longer (parallel/ahead.py).
      say: is told what goes on.

    Raises:
      UserError: config or topology are not usable.
      CompilerError: XLA gave up.
    """
    start = time.monotonic()
    devices = topology.describe(name, slices)
    chip = chips.chip(topology.parse(name)[0])
    mesh = make_mesh(config.mesh, devices)
    check_batch_size(config.batch_size, config.micro_batches, mesh)
    params = states.abstract(config)["params"]
    compiled = compile_ahead(lower, (config, name, slices), code=code, say=say)
    program = hlo.analyse(compiled.text, [topology.slice_of(device) for device in mesh.devices.flat])
    model = {part: config.batch_size * count for part, count in flops.model_parts(config).items()}
    chip_count = len(devices) // chip.devices_a_chip
    bounds = roofline.bounds(program, chip)
    return Plan(
        topology=name,
        slices=slices,
        chips=chip_count,
        devices=len(devices),
        mesh={axis: int(size) for axis, size in mesh.shape.items()},
        batch_size=config.batch_size,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        memory=Memory(
            compiled.argument_bytes,
            compiled.temporary_bytes,
            compiled.code_bytes,
            compiled.live_bytes,
            chip.hbm_limit,
        ),
        model_flops=model,
        program=program,
        bounds=bounds,
        mfu_ceiling=roofline.mfu_ceiling(sum(model.values()), chip_count, chip, bounds),
        compile_seconds=time.monotonic() - start,
        compile_bytes=compiled.process_bytes,
    )
