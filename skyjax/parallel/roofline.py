"""The least time of a step on a chip, from what its program takes (hlo.py) and the published peaks (chips.py).

Three bounds: products at the peak of bf16, HBM traffic at its bandwidth, and the network. Each errs to one side only:
all products are taken as bf16; every byte that a chip sends is spread over all of its links, although a ring along one
axis of the torus has only that axis's two; and traffic over ICI and DCN overlaps, so that the network takes as long as
the slower of them. A step takes at least its largest bound, and longer where the three do not overlap. One exception:
what the two devices of a tpu7x chip send each other counts as sent over ICI, though it stays on the chip.
"""

import dataclasses

from skyjax.parallel.chips import Chip
from skyjax.parallel.hlo import Program


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Least times in seconds; `network_s` is the longer of ICI and DCN."""

    compute_s: float
    memory_s: float
    ici_s: float
    dcn_s: float

    @property
    def network_s(self) -> float:
        """Of all that is sent."""
        return max(self.ici_s, self.dcn_s)

    @property
    def step_s(self) -> float:
        """The largest of the three."""
        return max(self.compute_s, self.memory_s, self.network_s)

    @property
    def bound_by(self) -> str:
        """Which one that is: "compute", "memory", or "network over ICI" or "over DCN"."""
        times = {
            "compute": self.compute_s,
            "memory": self.memory_s,
            "network over ICI": self.ici_s,
            "network over DCN": self.dcn_s,
        }
        return max(times, key=lambda name: times[name])


def bounds(program: Program, chip: Chip) -> Bounds:
    """The least times of one run of a program.

    Args:
      program: of one device. Devices that share a chip share its peaks equally.
      chip: that it runs on.
    """
    share = chip.devices_a_chip
    return Bounds(
        compute_s=program.flops * share / chip.bf16_flops,
        memory_s=program.hbm_bytes * share / chip.hbm_bandwidth,
        ici_s=program.ici_bytes * share / chip.ici_bandwidth,
        dcn_s=program.dcn_bytes * share / chip.dcn_bandwidth,
    )


def mfu_ceiling(model_flops: int, chips: int, chip: Chip, bounds: Bounds) -> float:
    """The share of the chips' peak that a step at its largest bound would spend on the model's own FLOPs, 0 to 1.

    Args:
      model_flops: of one step on all chips, without recomputation (flops.py).
      chips: how many; not devices.
      chip: their kind.
      bounds: of one device's program.
    """
    if bounds.step_s == 0:
        return 0.0
    return model_flops / (chips * chip.bf16_flops * bounds.step_s)
