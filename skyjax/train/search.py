"""Which batch, remat and mesh make a step fastest on a topology: ranked by estimate, then compiled, a few of them.

The estimate knows the products, the weights that must be gathered and the gradients that are summed; what goes through
HBM and what lies there, it does not know. So the config's own choice is compiled first, and then, one change at a time
from the fastest so far, what may be faster still by all that compiled plans have shown: of the same remat, its traffic
a sample and its temporaries. Where nothing may be, the batch of the fastest is enlarged to what fits, and bisected
where that does not fit or is slower.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections

from skyjax.errors import UserError
from skyjax.models.layers import REMAT
from skyjax.parallel import chips, flops, topology
from skyjax.parallel.ahead import CompilerError
from skyjax.parallel.mesh import AXES, mesh_shape
from skyjax.train import state as states
from skyjax.train.plan import Plan

MOST_COMPILES = 8
FOR_BATCH = 2  # of them are kept for larger batches
SPARE = 0.1  # of HBM
WORTH = 0.99  # of the fastest one's time a sample: what is not expected below is not compiled
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


class Estimate(NamedTuple):
    """Least seconds a sample on one device, of its products and of its share of the weights' way over ICI."""

    compute: float
    ici: float


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
      UserError: no candidate's state fits; or a candidate's, where none could be compiled.
      CompilerError: likewise.
    """
    devices = topology.describe(name, slices)
    chip = chips.chip(topology.parse(name)[0])
    abstract = states.abstract(config)
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract["params"]))
    room = (1 - SPARE) * chip.hbm_limit
    in_slice = len(devices) // slices
    meshes = [fsdp for fsdp in FSDP if in_slice % fsdp == 0 and state / fsdp < room]
    if not meshes:
        raise UserError(f"search: the state alone, {state / 2**30:.0f} GiB, does not fit on {name} however it is split")
    own = _own(config, len(devices), in_slice, meshes)
    left = {dataclasses.replace(own, remat=remat, fsdp=fsdp) for remat in REMAT for fsdp in meshes}
    tried: list[Tried] = []
    errors: list[Exception] = []

    def attempt(candidate: Candidate) -> Tried | None:
        left.discard(candidate)
        number = len(tried) + len(errors) + 1
        say(
            f"candidate {number} of at most {MOST_COMPILES}: {candidate.samples} samples a device, remat"
            f" {candidate.remat}, fsdp {candidate.fsdp}"
        )
        try:
            found = Tried(candidate, compile_step(candidate.apply(config, len(devices))))
        except (UserError, CompilerError) as error:
            # One mesh may not divide some array, or send XLA astray; the others need not.
            errors.append(error)
            say(f"  passed over: {error}")
            return None
        tried.append(found)
        say(
            f"  {found.plan.memory.share:.0%} of HBM, {found.samples_a_second:,.0f} samples a second at most,"
            f" MFU at most {found.plan.mfu_ceiling:.0%}"
        )
        return found

    def budget() -> int:
        return MOST_COMPILES - len(tried) - len(errors)

    def rank(candidate: Candidate) -> tuple[float, float, float]:
        seconds = expected(candidate, tried, lambda one: estimate(config, parameters, one, len(devices), chip))
        return seconds, abs(math.log2(candidate.fsdp / own.fsdp)), -candidate.fsdp

    attempt(own)
    while budget() > FOR_BATCH:
        fastest = _fastest(tried)
        near = [one for one in left if fastest is None or _is_one_change(one, fastest.candidate)]
        candidate = min((one for one in near if _expected_memory(one, tried, state) <= room), key=rank, default=None)
        if candidate is None or (fastest and rank(candidate)[0] > WORTH * _seconds(fastest)):
            break
        attempt(candidate)
    fastest, too_many = _fastest(tried), None
    while fastest and budget() > 0:
        larger = _larger(fastest, too_many, room, state)
        if larger is None:
            break
        found = attempt(larger)
        if found and found.fits and _seconds(found) < _seconds(fastest):
            fastest = found
        else:
            too_many = larger.samples
    if not tried:
        raise errors[0]
    return sorted(tried, key=lambda one: (not one.fits, -one.samples_a_second))


def _own(config: ml_collections.ConfigDict, devices: int, in_slice: int, meshes: Sequence[int]) -> Candidate:
    """What the config says itself, or the nearest to it that is among the meshes."""
    sizes = dict(zip(AXES, mesh_shape({axis: config.mesh[axis] for axis in AXES}, in_slice), strict=True))
    fsdp = min(meshes, key=lambda one: abs(math.log2(one / sizes["fsdp"])))
    return Candidate(max(1, math.ceil(config.batch_size / devices)), config.model.remat, fsdp)


def _is_one_change(one: Candidate, other: Candidate) -> bool:
    """Another remat, or half or twice as many devices that share the state."""
    steps = abs(math.log2(one.fsdp / other.fsdp))
    return (one.remat == other.remat and steps == 1) or (one.remat != other.remat and steps == 0)


def _fastest(tried: Sequence[Tried]) -> Tried | None:
    """Of those that fit."""
    return min((one for one in tried if one.fits), key=_seconds, default=None)


def _seconds(one: Tried) -> float:
    """Of a sample on one device."""
    return one.plan.bounds.step_s / one.candidate.samples


def expected(candidate: Candidate, tried: Sequence[Tried], estimate: Callable[[Candidate], Estimate]) -> float:
    """Seconds a sample, by the estimate and by what the nearest compiled candidate showed.

    Traffic to HBM is that of the same remat, and none where that remat was not compiled yet: it may be the fastest.
    """
    compute, ici = estimate(candidate)
    if not tried:
        return max(compute, ici)

    def distance(one: Tried) -> tuple[bool, float]:
        other = one.candidate
        return other.remat != candidate.remat, abs(math.log2(other.fsdp / candidate.fsdp))

    near = min(tried, key=distance)
    was, bounds = estimate(near.candidate), near.plan.bounds
    compute *= bounds.compute_s / near.candidate.samples / was.compute
    if was.ici:
        ici *= bounds.ici_s / near.candidate.samples / was.ici
    memory = bounds.memory_s / near.candidate.samples if near.candidate.remat == candidate.remat else 0.0
    return max(compute, ici, memory, bounds.dcn_s / candidate.samples)


def _expected_memory(candidate: Candidate, tried: Sequence[Tried], state: int) -> float:
    """Bytes of a device, by the most that a sample of the same remat took; of its state alone where none is known."""
    seen = [one for one in tried if one.candidate.remat == candidate.remat]
    a_sample = max((one.plan.memory.temporaries / one.candidate.samples for one in seen), default=0)
    return state / candidate.fsdp + a_sample * candidate.samples


def _larger(found: Tried, too_many: int | None, room: float, state: int) -> Candidate | None:
    """With a larger batch, None where there is no room for one.

    It is the one that fills the room, as far as temporaries grow with it, in steps of two; where that many samples did
    not fit or were slower, the middle.
    """
    samples = found.candidate.samples
    if too_many is not None:
        more = (samples + too_many) // 2
    else:
        most = (room - state / found.candidate.fsdp) / max(found.plan.memory.temporaries, 1)
        more = samples * 2 ** int(math.log2(most)) if most >= 1 else samples
    return dataclasses.replace(found.candidate, samples=more) if more > samples else None


def estimate(
    config: ml_collections.ConfigDict, parameters: int, candidate: Candidate, devices: int, chip: chips.Chip
) -> Estimate:
    """At the chip's peaks.

    All in bfloat16: weights are gathered for each pass over them (student forward for two groups of views, again where
    blocks are recomputed, backward, and the teacher's); each group's gradients are scattered over `fsdp`, and their
    shares summed over `data`.
    """
    passes = flops.training(config)
    student, teacher = (sum(passes[name].values()) for name in ("student", "teacher"))
    recomputed = student if candidate.remat == "full" else 0
    products = (3 * student + teacher + recomputed) * chip.devices_a_chip / chip.bf16_flops
    groups, weights, data = len(flops.view_images(config)), BFLOAT16 * parameters, devices // candidate.fsdp
    rounds = groups * (2 + (candidate.remat == "full")) + 1 + groups
    sent = rounds * weights * (candidate.fsdp - 1) / candidate.fsdp
    sent += groups * 2 * (weights / candidate.fsdp) * (data - 1) / data
    return Estimate(products, sent * chip.devices_a_chip / chip.ici_bandwidth / candidate.samples)


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
    if not tried[0].fits:
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
            "least_seconds": dataclasses.asdict(one.plan.bounds),
        }
        for one in tried
    ]
