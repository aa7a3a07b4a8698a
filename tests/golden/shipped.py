"""Every config that is shipped, on every topology that the goldens name."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import golden_state
import jax
import ml_collections
from golden_state import Place
from jax.sharding import AbstractMesh

from skyjax.config import load_config
from skyjax.errors import UserError
from skyjax.parallel.mesh import ALL_DATA, AXES, mesh_shape
from skyjax.parallel.sharding import RULES, Rule, batch_sharding, check_batch_size
from skyjax.train.plan import abstract_batch

ROOT = pathlib.Path(__file__).parents[2]
STATES = pathlib.Path(__file__).parent / "state"
# Config -> its sizes.
SIZES = {"skysense": ("tiny", "small", "base", "large", "huge"), "image_text": ("small", "base")}


class Topology(NamedTuple):
    """Devices of a slice, and slices."""

    devices: int
    slices: int = 1


TOPOLOGIES = {
    "cpu:1": Topology(1),
    "v5e:16x16": Topology(256),
    "v5e:16x16*2": Topology(256, 2),
    "v5p:4x4x8": Topology(128),
    "v6e:16x16": Topology(256),
    "tpu7x:4x4x4": Topology(128),  # two devices a chip
}


def names() -> list[str]:
    """Of all shipped configs, those with sizes once a size: "skysense_huge"."""
    files = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
    return [name for file in files for name in ([f"{file}_{size}" for size in SIZES.get(file, ())] or [file])]


def load(name: str, topology: str | None = None) -> ml_collections.ConfigDict:
    """The config of a name, with the mesh rules of a topology."""
    file, _, size = name.rpartition("_")
    if file not in SIZES:
        file, size = name, ""
    return load_config(ROOT / "configs" / f"{file}.py", [f"size={size}"] if size else [], topology)


def place_on(config: ml_collections.ConfigDict, topology: str) -> Place:
    """Where a config, with the topology's rules, lies on it."""
    devices, slices = TOPOLOGIES[topology]
    try:
        inside = {axis: size for axis, size in config.mesh.items() if axis != "dcn"}
        shape = mesh_shape(inside, devices)
        between = mesh_shape(config.mesh.get("dcn") or ALL_DATA, slices, "mesh.dcn", ("slice", "slices"))
        mesh = AbstractMesh(tuple(a * b for a, b in zip(shape, between, strict=True)), AXES)
    except UserError as error:
        return Place(None, str(error))
    sizes = " x ".join(str(mesh.shape[axis]) for axis in AXES)
    try:
        check_batch_size(config.batch_size, config.micro_batches, mesh)
    except UserError as error:
        return Place(mesh, f"{sizes}; {error}")
    batch = jax.tree.leaves(abstract_batch(config, config.batch_size))
    whole = sum(math.prod(x.shape) * x.dtype.itemsize for x in batch)
    rows = math.prod(mesh.shape[axis] for axis in batch_sharding(mesh).spec[0])
    return Place(mesh, f"{sizes}, {config.batch_size} samples, {whole // rows:,} bytes")


def places(name: str) -> Mapping[str, Place]:
    """Of a config on every topology."""
    return {topology: place_on(load(name, topology), topology) for topology in TOPOLOGIES}


def meshes(name: str) -> Mapping[str, AbstractMesh]:
    """Topology -> mesh, of those that the config has a mesh on."""
    return {topology: place.mesh for topology, place in places(name).items() if place.mesh is not None}


def state_file(name: str) -> pathlib.Path:
    """Where the accepted table of a config lies."""
    return STATES / f"{name}.txt"


def state_table(name: str, state: Any, rules: Sequence[Rule] = RULES) -> str:
    """The table of a config as it is now; `state` is abstract."""
    return golden_state.write(name, state, places(name), rules)
