"""A TPU slice as Google Cloud names it. In: "v5p:4x4x8", as `skyjax compile` takes it. Out: hosts, labels, types."""

import dataclasses
import math
import pathlib
import tomllib

from skyjax.errors import UserError, nearest
from skyjax.parallel import topology

TABLE = pathlib.Path(__file__).with_name("accelerators.toml")


@dataclasses.dataclass(frozen=True)
class Slice:
    """One slice of a TPU pod.

    Attributes:
      generation: "v5p"; shape: "4x4x8"; chips and hosts: of the whole slice; chips_per_host: what a pod asks for.
      accelerator_type, runtime_version: of Cloud TPU VMs; None where there are none of this generation.
      gke_accelerator: the nodes' label; machine_type: of the node pool.
    """

    generation: str
    shape: str
    chips: int
    hosts: int
    chips_per_host: int
    gke_accelerator: str
    machine_type: str
    accelerator_type: str | None
    runtime_version: str | None


def find(name: str) -> Slice:
    """The slice of a topology's name.

    Raises:
      UserError: the name is not well written, or Google Cloud offers no such slice.
    """
    generation, axes = topology.parse(name)
    table = tomllib.loads(TABLE.read_text())
    if generation not in table:
        raise UserError(f"topology: {generation} can no longer be rented; there are {', '.join(table)}")
    row = table[generation]
    shape, chips = "x".join(map(str, axes)), math.prod(axes)
    regular = len(axes) == 3 and list(axes) == sorted(axes) and all(size % 4 == 0 for size in axes)
    if shape not in row["shapes"] and not (regular and chips <= row["max_chips"]):
        beyond = f", or A <= B <= C, multiples of 4, up to {row['max_chips']} chips" if len(axes) == 3 else ""
        raise UserError(
            f'topology: there is no slice "{shape}" of {generation}{nearest(shape, row["shapes"])}; there are'
            f" {', '.join(row['shapes'])}{beyond}"
        )
    kind = row.get("accelerator_type")
    return Slice(
        generation,
        shape,
        chips,
        hosts=chips // row["chips_per_host"],
        chips_per_host=row["chips_per_host"],
        gke_accelerator=row["gke_accelerator"],
        machine_type=row["machine_type"],
        accelerator_type=kind and kind.format(chips=chips, cores=chips * row["cores_per_chip"]),
        runtime_version=row.get("runtime_version"),
    )
