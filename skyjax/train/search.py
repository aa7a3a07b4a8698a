"""Which batch, remat and mesh make a step fastest on a topology: ranked by estimate, then compiled, a few of them.

The estimate knows the products and the weights that must be gathered. What a plan takes of HBM is only known once it is
compiled: from then on the same remat's temporaries are taken to grow with the samples a device.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from skyjax.errors import UserError
from skyjax.models.layers import REMAT
from skyjax.parallel import chips, flops, topology
from skyjax.train import state as states
from skyjax.train.plan import Plan

MOST_COMPILES = 8
SPARE = 0.1  # of HBM
FSDP = (1, 2, 4, 8, 16, 32, 64)  # above, XLA sums whole gradients in place of scattering them
BFLOAT16 = 2  # bytes


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What is chosen: samples a device, `model.remat`, and `mesh.fsdp`; `data` takes the other devices."""

    samples: int
    remat: str
    fsdp: int

    def apply(self, config: ml_collections.ConfigDict, devices: int) -> ml_collections.ConfigDict:
        """A copy of the config that says so."""
        config = config.copy_and_resolve_references()
        with config.unlocked():
            config.batch_size = self.samples * devices
            config.micro_batches = 1
            config.model.remat = self.remat
            config.mesh.data, config.mesh.fsdp, config.mesh.tensor = -1, self.fsdp, 1
        return config

    def overrides(self, devices: int) -> str:
        """As they are written on the command line."""
        values = {"batch_size": self.samples * devices, "model.remat": self.remat, "mesh.fsdp": self.fsdp}
        return " ".join(f"--config.{key}={value}" for key, value in values.items())


@dataclasses.dataclass(frozen=True)
class Tried:
    """A candidate that was compiled."""

    candidate: Candidate
    plan: Plan

    @property
    def fits(self) -> bool:
        """With SPARE left over."""
        return self.plan.memory.share <= 1 - SPARE

    @property
    def samples_a_second(self) -> float:
        """At the least time of a step."""
        return self.plan.batch_size / self.plan.bounds.step_s


def search(
    config: ml_collections.ConfigDict,
    name: str,
    slices: int,
    compile_step: Callable[[ml_collections.ConfigDict], Plan],
    say: Callable[[str], None],
) -> list[Tried]:
    """The candidates that were compiled, the fastest that fits first, those that do not fit last.

    Args:
      config: the experiment; its batch size is the least that is tried.
      name, slices: the topology.
      compile_step: compiles a config for it.
      say: is told what goes on.

    Raises:
      UserError: no candidate's state fits.
    """
    devices = topology.describe(name, slices)
    chip = chips.chip(topology.parse(name)[0])
    least = max(1, math.ceil(config.batch_size / len(devices)))
    abstract = states.abstract(config)
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract["params"]))
    room = (1 - SPARE) * chip.hbm_limit
    in_slice = len(devices) // slices
    meshes = [fsdp for fsdp in FSDP if in_slice % fsdp == 0 and state / fsdp < room]
    if not meshes:
        raise UserError(f"search: the state alone, {state / 2**30:.0f} GiB, does not fit on {name} however it is split")
    ranked = sorted(
        (Candidate(least, remat, fsdp) for remat, fsdp in itertools.product(REMAT, meshes)),
        key=lambda candidate: (estimate(config, parameters, candidate, chip), state / candidate.fsdp),
    )
    tried: list[Tried] = []
    temporaries: dict[str, float] = {}  # remat -> bytes of a sample, the most that was seen

    def attempt(candidate: Candidate) -> Tried:
        number = len(tried) + 1
        say(
            f"candidate {number} of at most {MOST_COMPILES}: {candidate.samples} samples a device, remat"
            f" {candidate.remat}, fsdp {candidate.fsdp}"
        )
        found = Tried(candidate, compile_step(candidate.apply(config, len(devices))))
        tried.append(found)
        a_sample = found.plan.memory.temporaries / candidate.samples
        temporaries[candidate.remat] = max(temporaries.get(candidate.remat, 0), a_sample)
        say(
            f"  {found.plan.memory.share:.0%} of HBM, {found.samples_a_second:,.0f} samples a second at most,"
            f" MFU at most {found.plan.mfu_ceiling:.0%}"
        )
        return found

    def expected(candidate: Candidate) -> float:
        return state / candidate.fsdp + temporaries.get(candidate.remat, 0) * candidate.samples

    for candidate in ranked:
        if len(tried) >= MOST_COMPILES:
            break
        if expected(candidate) > room:
            continue
        larger = _larger(attempt(candidate), room, state)
        if larger is not None and len(tried) < MOST_COMPILES:
            attempt(larger)
    return sorted(tried, key=lambda one: (not one.fits, -one.samples_a_second))


def _larger(found: Tried, room: float, state: int) -> Candidate | None:
    """With the batch that fills the room, as far as temporaries grow with it; None where there is no room for more."""
    candidate, memory = found.candidate, found.plan.memory
    if not found.fits:
        return None
    most = int((room - state / candidate.fsdp) // max(memory.temporaries / candidate.samples, 1))
    samples = 2 ** int(math.log2(most)) if most >= 1 else 0
    return dataclasses.replace(candidate, samples=samples) if samples > candidate.samples else None


def estimate(config: ml_collections.ConfigDict, parameters: int, candidate: Candidate, chip: chips.Chip) -> float:
    """Seconds a sample on one device at the chip's peaks: the longer of its products and its share of the weights' way.

    Weights are gathered in bfloat16 for each pass over them (student forward for two groups of views, again where
    blocks are recomputed, backward, and the teacher's), gradients are scattered once.
    """
    passes = flops.training(config)
    student, teacher = (sum(passes[name].values()) for name in ("student", "teacher"))
    recomputed = student if candidate.remat == "full" else 0
    products = (3 * student + teacher + recomputed) * chip.devices_a_chip / chip.bf16_flops
    groups = len(flops.view_images(config))
    rounds = groups * (2 + (candidate.remat == "full")) + 1 + groups
    sent = rounds * BFLOAT16 * parameters * (candidate.fsdp - 1) / candidate.fsdp
    return max(products, sent * chip.devices_a_chip / chip.ici_bandwidth / candidate.samples)


def show(tried: list[Tried], devices: int) -> str:
    """A row a candidate, and the overrides of the best."""
    lines = [
        f"{'samples a device':>16s} {'remat':>6s} {'fsdp':>5s} {'HBM':>5s} {'samples/s':>10s} {'MFU':>5s}  bound by"
    ]
    for one in tried:
        candidate, plan = one.candidate, one.plan
        lines.append(
            f"{candidate.samples:16d} {candidate.remat:>6s} {candidate.fsdp:5d} {plan.memory.share:5.0%}"
            f" {one.samples_a_second:10,.0f} {plan.mfu_ceiling:5.0%}  {plan.bounds.bound_by}"
            + ("" if one.fits else "; does not fit")
        )
    if not tried or not tried[0].fits:
        return "\n".join([*lines, "None fits. More chips, chips with more memory, or smaller views would help."])
    return "\n".join([*lines, f"The fastest that fits: {tried[0].candidate.overrides(devices)}"])


def to_json(tried: list[Tried]) -> list[dict[str, Any]]:
    """A row a candidate, in the order of `search`."""
    return [
        dataclasses.asdict(one.candidate)
        | {
            "fits": one.fits,
            "hbm_share": one.plan.memory.share,
            "samples_a_second": one.samples_a_second,
            "mfu_ceiling": one.plan.mfu_ceiling,
            "bound_by": one.plan.bounds.bound_by,
        }
        for one in tried
    ]
