"""What one run of a compiled program takes of a chip, counted from its text: FLOPs, HBM bytes, bytes over the network.

In: `compiled.as_text()` of a TPU program (optimised, scheduled, one chip's part). Out: a `Program`. XLA's own cost
analysis counts the body of a loop once and a chain of fused collectives several times; here a body counts as often as
it runs (`hlo_text.trip_count`), and a collective once. Of a conditional, the branch with the most FLOPs counts.

FLOPs: 2 for each multiply-add of a `dot` or `convolution`, in fusions too, without the products with padding; and what
  Pallas kernels declare (`cost_estimate`). Work an element is not counted.
HBM bytes: what the instructions of the schedule read and write there, each fusion its operands and results once. A
  slice is read at its own size and written in place, also inside a fusion. Arrays in other memories (VMEM) are free;
  sizes are those of the values, without the padding of tiles. What a Pallas kernel declares goes before its operands.
Collectives: bytes that a chip sends, by the formulas of rings over g chips: all-gather and reduce-scatter
  whole x (g-1)/g, all-reduce twice that, all-to-all own x (g-1)/g, collective-permute its operand.

Between slices: a group of s slices with g/s chips in each counts the formula within a slice over ICI, and over DCN the
formula over s slices of a chip's share, 1/(g/s) of the whole. libtpu does the same itself: a program for several slices
is one slice's, and its exchanges with the others are `send`s that name their kind ("_xla_megascale_transfer_type"). Of
a large sum every chip sends its share, scattered before and gathered after over ICI; of a small one it sends the whole.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence

from skyjax.parallel.hlo_memory import (
    FREE_CALLS,
    Buffer,
    OutOfMemory,
    declared_cost,
    elements,
    hbm_bytes,
    is_continued,
    largest_buffers,
    parse_out_of_memory,
)
from skyjax.parallel.hlo_text import (
    COLLECTIVES,
    Array,
    Computation,
    Instruction,
    Module,
    leaves,
    parse,
    replica_groups,
    trip_count,
)

__all__ = ["Buffer", "Collective", "OutOfMemory", "Program", "Traffic", "analyse", "parse_out_of_memory"]

LARGEST = 20  # collectives that are listed
# Of one transfer between slices, per byte sent: (all-reduce's two rounds, and what an all-gather receives).
MEGASCALE = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of one kind: how many run, and the bytes that a chip sends over ICI and DCN."""

    count: int = 0
    ici_bytes: int = 0
    dcn_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective with all its runs; `op_name`: where in the traced program it comes from."""

    name: str
    kind: str
    op_name: str
    traffic: Traffic


@dataclasses.dataclass(frozen=True)
class Program:
    """What one run takes of each chip.

    Attributes:
      flops: of matrix products and declared kernels.
      hbm_bytes: read and written.
      collectives: kind -> traffic, of the kinds that occur.
      unknown: what could not be counted, or not to its end, by name: loops of unknown length (counted once), kernels
        without a declared cost, collectives of a form that is not known.
      largest_collectives: by bytes sent, over all runs.
      largest_buffers: by size.
    """

    flops: int
    hbm_bytes: int
    collectives: Mapping[str, Traffic]
    unknown: tuple[str, ...]
    largest_collectives: tuple[Collective, ...]
    largest_buffers: tuple[Buffer, ...]

    @property
    def ici_bytes(self) -> int:
        """Sent by a chip over the slice's own network."""
        return sum(traffic.ici_bytes for traffic in self.collectives.values())

    @property
    def dcn_bytes(self) -> int:
        """Sent by a chip to other slices."""
        return sum(traffic.dcn_bytes for traffic in self.collectives.values())


def analyse(text: str, slice_of: Sequence[int] | None = None) -> Program:
    """Counts what one run of a compiled program takes of each chip.

    Args:
      text: of `compiled.as_text()`.
      slice_of: of each device in the order of the program's device assignment, its slice; all in one where None. A
        TPU program for several slices is one slice's already: its length is then that of all slices, and its groups
        stay in one.

    Raises:
      ValueError: the text is not understood, or `slice_of` is of another number of devices.
    """
    module = parse(text)
    if slice_of is not None and len(slice_of) % module.devices:
        raise ValueError(f"HLO: a program of {module.devices} devices, and the slices of {len(slice_of)}")
    if slice_of is None or len(slice_of) != module.devices:
        slice_of = (0,) * module.devices
    tally = _Count(module, slice_of).of(module.entry, {})
    kinds: dict[str, Traffic] = {}
    for collective in tally.collectives:
        kinds[collective.kind] = _sum((kinds.get(collective.kind, Traffic()), collective.traffic))
    largest = sorted(tally.collectives, key=lambda c: (-c.traffic.dcn_bytes, -c.traffic.ici_bytes, c.name))
    return Program(
        flops=tally.flops,
        hbm_bytes=tally.hbm_bytes,
        collectives=dict(sorted(kinds.items())),
        unknown=tuple(dict.fromkeys(tally.unknown)),
        largest_collectives=tuple(largest[:LARGEST]),
        largest_buffers=largest_buffers(module),
    )


@dataclasses.dataclass
class _Tally:
    """What some part of a program takes."""

    flops: int = 0
    hbm_bytes: int = 0
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    unknown: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: "_Tally", times: int = 1) -> None:
        self.flops += times * other.flops
        self.hbm_bytes += times * other.hbm_bytes
        self.unknown += other.unknown
        if times:
            self.collectives += [
                dataclasses.replace(collective, traffic=_times(collective.traffic, times))
                for collective in other.collectives
            ]


class _Count:
    """Walks the schedule from the entry on."""

    def __init__(self, module: Module, slice_of: Sequence[int]):
        self.module = module
        self.slice_of = slice_of

    def of(self, computation: Computation, known: Mapping[int, int]) -> _Tally:
        """What one run of a scheduled computation takes; `known`: as `trip_count` wants it."""
        tally = _Tally()
        for at in computation.instructions.values():
            if at.opcode == "while":
                turns, constants = trip_count(self.module, at, computation, known)
                if turns is None:
                    tally.unknown.append(f"{at.name}: a loop of unknown length, counted once ({at.op_name})")
                for part in ("condition", "body"):
                    tally.add(self.of(self._called(at, part), constants), 1 if turns is None else turns)
            elif at.opcode == "conditional":
                branches = [self.of(branch, {}) for branch in self._branches(at)]
                tally.add(max(branches, key=lambda branch: (branch.flops, branch.hbm_bytes)))
            elif at.opcode in ("call", "async-start"):
                # An asynchronous wrapper: its update and done do no more work.
                tally.add(self.of(self._called(at, "to_apply" if at.attribute("to_apply") else "calls"), {}))
            else:
                self._work(computation, at, tally)
                tally.hbm_bytes += hbm_bytes(self.module, computation, at)
        return tally

    def _called(self, at: Instruction, key: str) -> Computation:
        return self.module.computations[at.attribute(key) or ""]

    def _branches(self, at: Instruction) -> list[Computation]:
        listed = at.attribute("branch_computations")
        names = re.findall(r"[^\s,{}%]+", listed) if listed else []
        names = names or [at.attribute("true_computation") or "", at.attribute("false_computation") or ""]
        return [self.module.computations[name] for name in names]

    def _work(self, computation: Computation, at: Instruction, tally: _Tally, is_fused: bool = False) -> None:
        """Adds the FLOPs and the collectives of one instruction, and of all that is fused into it."""
        kind = at.opcode.removesuffix("-start")
        if at.opcode == "fusion":
            fused = self._called(at, "calls")
            for part in fused.instructions.values():
                self._work(fused, part, tally, is_fused=True)
        elif at.opcode == "dot":
            tally.flops += _dot_flops(computation, at)
        elif at.opcode == "convolution":
            tally.flops += _convolution_flops(computation, at)
        elif at.opcode == "custom-call":
            self._custom_call(at, tally)
        elif kind in COLLECTIVES:
            if is_continued(at):
                return
            try:
                if kind == "all-reduce" and is_fused and _is_scattered(computation, at):
                    kind = "reduce-scatter"
                collective = self._collective(computation, at, kind)
            except ValueError as error:
                tally.unknown.append(f"{at.name}: {error}")
                return
            tally.collectives.append(collective)
        elif at.opcode == "send":
            self._send(computation, at, tally)

    def _custom_call(self, at: Instruction, tally: _Tally) -> None:
        target = (at.attribute("custom_call_target") or "").strip('"')
        if target in FREE_CALLS or target.startswith("AsyncCollective"):
            return
        declared = declared_cost(at)
        if declared is None:
            tally.unknown.append(f"{at.name}: {target} without a declared cost ({at.op_name})")
        else:
            tally.flops += declared["flops"]

    def _collective(self, computation: Computation, at: Instruction, kind: str) -> Collective:
        shapes = computation.shapes(at)
        size = sum(leaf.bytes for shape in shapes for leaf in leaves(shape))
        if kind == "collective-permute":
            if at.attribute("slice_sizes") is None:  # else operands are a buffer and offsets in it
                size = sum(leaf.bytes for leaf in leaves(shapes[0]))
            return Collective(at.name, kind, at.op_name, self._permute(at, size))
        groups = replica_groups(at.groups, self.module.devices)
        # Chips of unequal groups send unequal amounts: the one that sends most counts.
        sent = [self._sent(kind, size, group) for group in groups]
        traffic = Traffic(1, max(ici for ici, _ in sent), max(dcn for _, dcn in sent))
        return Collective(at.name, kind, at.op_name, traffic)

    def _sent(self, kind: str, size: int, group: Sequence[int]) -> tuple[int, int]:
        """Bytes that a chip of a group sends over (ICI, DCN); `size`: of its operands."""
        chips, slices = len(group), len({self.slice_of[device] for device in group})
        inside = chips // slices
        if kind in ("all-to-all", "ragged-all-to-all"):
            return size * (inside - 1) // chips, size * (chips - inside) // chips
        whole = size * chips if kind == "all-gather" else size
        rounds = 2 if kind == "all-reduce" else 1
        share = whole // inside
        return rounds * whole * (inside - 1) // inside, rounds * share * (slices - 1) // slices

    def _permute(self, at: Instruction, size: int) -> Traffic:
        pairs = re.findall(r"\{(\d+),(\d+)\}", at.attribute("source_target_pairs") or "")
        if not pairs:
            raise ValueError("a permutation without pairs")
        moved = [(int(source), int(target)) for source, target in pairs if source != target]
        crosses = [self.slice_of[source] != self.slice_of[target] for source, target in moved]
        return Traffic(1, size if not all(crosses) else 0, size if any(crosses) else 0)

    def _send(self, computation: Computation, at: Instruction, tally: _Tally) -> None:
        """A transfer to other slices, which libtpu writes as one to the host."""
        found = re.search(r'_xla_megascale_transfer_type="(\w+)"', at.attributes)
        kind = MEGASCALE.get(found[1]) if found else None
        if kind is None:
            tally.unknown.append(f"{at.name}: a transfer to the host or of an unknown kind ({at.op_name})")
            return
        size = sum(leaf.bytes for leaf in leaves(computation.shapes(at)[0]))
        # "{1,2}x{0:3}": slices 1 and 2, chips 0 to 3; or chips one by one, {{100000,200000},{100001,200001}}.
        group = re.search(r"\{([\d,:]+)\}", at.attribute("_xla_megascale_target") or "")
        slices = _count(group[1]) if group else 2
        sent = {
            "all-reduce": 2 * size * (slices - 1) // slices,
            "all-gather": size * (slices - 1),
            "collective-permute": size,
        }.get(kind, size * (slices - 1) // slices)
        tally.collectives.append(Collective(at.name, kind, _origin(computation, at), Traffic(1, 0, sent)))


def _origin(computation: Computation, at: Instruction) -> str:
    """Where a value comes from that has no `op_name` of its own, as the first operand before it says that has one."""
    number = 0
    while not at.op_name and at.operands:
        # Of several sums in one, an element's own.
        element = int(at.attribute("index") or 0) if at.opcode == "get-tuple-element" else 0
        at, number = computation.operand(at, min(number, len(at.operands) - 1)), element
    return at.op_name


def _is_scattered(fused: Computation, at: Instruction) -> bool:
    """Whether only a chip's slice of an all-reduce is used: the compiler runs such a fusion as a reduce-scatter."""
    users = [user for user in fused.instructions.values() if at.name in user.operands]
    views = ("get-tuple-element", "bitcast")
    return bool(users) and all(
        user.opcode == "dynamic-slice" or (user.opcode in views and _is_scattered(fused, user)) for user in users
    )


def _dot_flops(computation: Computation, at: Instruction) -> int:
    left = computation.shapes(at)[0]
    contracted = _numbers(at.attribute("lhs_contracting_dims"))
    assert isinstance(left, Array)
    return 2 * elements(at.shape) * math.prod(left.dims[i] for i in contracted)


def _convolution_flops(computation: Computation, at: Instruction) -> int:
    """As XLA's cost analysis: products with padding and with the gaps of a dilation are none."""
    left, right = computation.shapes(at)
    assert isinstance(left, Array)
    assert isinstance(right, Array)
    assert isinstance(at.shape, Array)
    inputs, kernel, outputs = re.split("_|->", at.attribute("dim_labels") or "")
    features = left.dims[inputs.index("f")] // int(at.attribute("feature_group_count") or 1)
    batch = left.dims[inputs.index("b")] // int(at.attribute("batch_group_count") or 1)
    total = 2 * features * batch * right.dims[kernel.index("o")]
    window = _window(at.attribute("window") or "", len(left.dims) - 2)
    for axis, (size, stride, low, dilated, spread) in enumerate(window):
        label = str(axis)
        rows, places = left.dims[inputs.index(label)], at.shape.dims[outputs.index(label)]
        total *= _products(size, rows, places, stride, low, dilated, spread)
    return total


def _window(text: str, axes: int) -> list[tuple[int, int, int, int, int]]:
    """Of each spatial axis: size, stride, padding before, dilation of the input, dilation of the kernel."""
    fields = dict(part.split("=") for part in text.strip("{}").split())
    size, stride, dilated, spread = (
        [int(n) for n in fields[key].split("x")] if key in fields else [1] * axes
        for key in ("size", "stride", "lhs_dilate", "rhs_dilate")
    )
    low = [int(n.split("_")[0]) for n in fields["pad"].split("x")] if "pad" in fields else [0] * axes
    return list(zip(size, stride, low, dilated, spread, strict=True))


@functools.lru_cache(maxsize=10_000)
def _products(size: int, rows: int, places: int, stride: int, low: int, dilated: int, spread: int) -> int:
    """How many pairs of a kernel's row and a place of the result meet a value of the input, along one axis."""
    extent, total = (rows - 1) * dilated + 1, 0
    for k in range(size):
        offset = k * spread - low
        if dilated == 1:
            first = max(0, -(offset // stride))
            last = min(places - 1, (extent - 1 - offset) // stride)
            total += max(0, last - first + 1)
        else:
            at = (place * stride + offset for place in range(places))
            total += sum(0 <= i < extent and i % dilated == 0 for i in at)
    return total


def _numbers(text: str | None) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text or "")]


def _count(text: str) -> int:
    """How many numbers "1,2,5:7" is."""
    spans = [part.split(":") for part in text.split(",")]
    return sum(int(span[-1]) - int(span[0]) + 1 for span in spans)


def _times(traffic: Traffic, times: int) -> Traffic:
    return Traffic(times * traffic.count, times * traffic.ici_bytes, times * traffic.dcn_bytes)


def _sum(traffic: Iterable[Traffic]) -> Traffic:
    parts = list(traffic)
    return Traffic(*(sum(getattr(part, key) for part in parts) for key in ("count", "ici_bytes", "dcn_bytes")))
