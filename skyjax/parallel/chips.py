"""Published peaks of accelerators, read from chips.toml: what roofline.py and a run's MFU are measured by.

All figures are a chip's, in bytes, bytes/s and FLOP/s, but `hbm_limit`, a device's: a tpu7x shows two devices a chip.
"""

import dataclasses
import functools
import importlib.resources
import tomllib

from skyjax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator.

    Attributes:
      name: its key in chips.toml; of a TPU, its generation as topologies are named.
      bf16_flops: FLOP/s of dense bf16 products.
      hbm_bytes: published size.
      hbm_limit: bytes of a device that XLA gives to a program; a GPU's whole memory.
      hbm_bandwidth: bytes/s.
      ici_bandwidth: bytes/s sent over all links to other chips together, one direction.
      dcn_bandwidth: bytes/s sent to the data centre's network.
      devices_a_chip: how many JAX shows.
      axes: of the torus; 0 where there is none.
      wraps_at: an axis is a ring where its length is a multiple of this.
      device_kinds: `jax.Device.device_kind` of its devices.
      source: of the figures.
    """

    name: str
    bf16_flops: float
    hbm_bytes: int
    hbm_limit: int
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float
    devices_a_chip: int
    axes: int
    wraps_at: int
    device_kinds: tuple[str, ...]
    source: str

    def is_ring(self, side: int) -> bool:
        """Whether an axis of that many chips leads back around to its beginning."""
        return bool(self.wraps_at) and side % self.wraps_at == 0


@functools.cache
def chips() -> dict[str, Chip]:
    """All chips by name, in the file's order."""
    text = importlib.resources.files("skyjax.parallel").joinpath("chips.toml").read_text()
    found = {}
    for name, entry in tomllib.loads(text).items():
        size = round(entry["hbm_gib"] * 2**30) if "hbm_gib" in entry else round(entry["hbm_gb"] * 10**9)
        found[name] = Chip(
            name=name,
            bf16_flops=entry["bf16_tflops"] * 1e12,
            hbm_bytes=size,
            hbm_limit=round(entry["hbm_limit_gib"] * 2**30) if "hbm_limit_gib" in entry else size,
            hbm_bandwidth=entry["hbm_gbps"] * 1e9,
            ici_bandwidth=entry["ici_gbps"] * 1e9,
            dcn_bandwidth=entry["dcn_gbps"] * 1e9 / 8,
            devices_a_chip=entry["devices"],
            axes=entry.get("axes", 0),
            wraps_at=entry.get("wraps_at", 0),
            device_kinds=tuple(entry["device_kinds"]),
            source=entry["source"].strip(),
        )
    return found


def chip(name: str) -> Chip:
    """The chip of that name: "v5p", "h100".

    Raises:
      UserError: there is none.
    """
    known = chips()
    if name not in known:
        raise UserError(f'chip: "{name}" is not known{nearest(name, known)}; known are {", ".join(known)}')
    return known[name]


def of_kind(device_kind: str) -> Chip | None:
    """The chip that a device of this `device_kind` is, or is part of; None where its figures are not known."""
    return next((chip for chip in chips().values() if device_kind in chip.device_kinds), None)
