"""What the instructions of a compiled program move in HBM, and what lies there.

In: a `Module` (hlo_text.py), or the compiler's message that memory ran out. Out: bytes read and written by one
instruction of the schedule, and the largest buffers. What counts and what does not: hlo.py.
"""

import dataclasses
import re

from skyjax.parallel.hlo_text import COLLECTIVES, Array, Computation, Instruction, Module, Shape, leaves

LARGEST = 20  # buffers that are listed
# Names, views of other arrays, marks for the scheduler: nothing moves.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "opt-barrier",
    "partition-id", "replica-id", "domain", "rng-get-and-update-state",
}  # fmt: skip
FREE_CALLS = {
    "AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "GatherScatterIndicesBitpacked",
    "PrepareAsyncCallDone", "PrepareAsyncCallStart", "SliceId", "Sharding", "SPMDFullToShardShape",
    "SPMDShardToFullShape",
}  # fmt: skip
# Every value of their operands is needed, however little of their result is.
WHOLE = {"dot", "convolution", "reduce", "reduce-window", "sort", "custom-call", "select-and-scatter", "fft", "rng"}


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An array in HBM that the schedule makes, or that is given to the program."""

    name: str
    shape: str
    bytes: int
    op_name: str


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
    """Why a program was not compiled. `memory`: which ran out, "hbm" or "vmem"; `buffers`: what the message lists."""

    memory: str
    needed_bytes: int
    limit_bytes: int
    buffers: tuple[Buffer, ...]


def parse_out_of_memory(message: str) -> OutOfMemory | None:
    """What XLA's message says that a program needs and has; None where it is about something else.

    libtpu often finds early that HBM runs out and lists no buffers. The same program compiles with the option
    `xla_tpu_no_crash_on_oom=true`; the largest buffers and the peak can then be read from it.
    """
    if found := re.search(r"required for HLO temporaries \(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)", message):
        return OutOfMemory("hbm", _amount(found[1]), _amount(found[2]), ())
    found = re.search(r"in memory space (\w+)\. Used ([\d.]+\w) of ([\d.]+\w) ", message)
    if found is None:
        return None
    buffers = []
    for entry in re.split(r"\n\s*\d+\. Size: ", message)[1:]:
        label = re.search(r"XLA label: (?:%?(\S+) = )?", entry)
        shape, op_name = re.search(r"Shape: ([^{\s]*)", entry), re.search(r'op_name="([^"]*)"', entry)
        buffers.append(
            Buffer(
                name=(label[1] if label else None) or "unnamed",
                shape=shape[1] if shape else "",
                bytes=_amount(entry.split()[0]),
                op_name=op_name[1] if op_name else "",
            )
        )
    return OutOfMemory(found[1], _amount(found[2]), _amount(found[3]), tuple(buffers))


def hbm_bytes(module: Module, computation: Computation, at: Instruction) -> int:
    """What one scheduled instruction reads and writes in HBM."""
    base = at.opcode.removesuffix("-start")
    if at.opcode in FREE or at.opcode.endswith(("-done", "-update")):
        return 0
    if base == "fusion":
        return _fusion_bytes(module, computation, at)
    operands = [hbm_size(shape) for shape in computation.shapes(at)]
    result = hbm_size(_result(at))
    if base == "custom-call":
        declared = declared_cost(at)
        if (at.attribute("custom_call_target") or "").strip('"') in FREE_CALLS:
            return 0
        return declared["bytes_accessed"] if declared else sum(operands) + result
    if base in ("slice", "dynamic-slice", "gather"):
        # As much as is taken, if the array that it is taken from is in HBM.
        return (_size(_result(at)) if operands[0] else 0) + result + sum(operands[1:])
    if base in ("dynamic-update-slice", "scatter"):
        changed = _size(computation.shapes(at)[-1 if base == "scatter" else 1])
        return (changed * (2 if base == "scatter" else 1) if result else 0) + sum(operands[1:])
    return sum(operands) + result


def _fusion_bytes(module: Module, computation: Computation, at: Instruction) -> int:
    fused = module.computations[at.attribute("calls") or ""]
    assert fused.root is not None
    read, written = _touched(module, fused.name, None)
    total = 0
    for i, shape in enumerate(computation.shapes(at)):
        parts = leaves(shape)
        whole = sum(leaf.elements for leaf in parts)
        total += hbm_size(shape) * min(read.get(i, 0), whole) // whole if whole else 0
    for leaf, elements in zip(leaves(at.shape), written, strict=True):
        total += hbm_size(leaf) * min(elements, leaf.elements) // leaf.elements if leaf.elements else 0
    return total


def _touched(module: Module, name: str, needed: int | None) -> tuple[dict[int, int], list[int]]:
    """What a fused computation reads and writes, in values rather than bytes.

    Only what the results need is computed: the need goes backwards from them, a value for a value, and where it meets
    a slice it is the slice's.

    Args:
      module: the program.
      name: of the computation.
      needed: how many values of its result are used, all where None.

    Returns:
      Number of the parameter -> values of it that are read, and the values written to each array of the result.
    """
    fused = module.computations[name]
    root = fused.root
    assert root is not None
    read: dict[int, int] = {}
    need: dict[str, int] = {}
    in_place: set[str] = set()  # updates whose other values stay where they are
    written: list[int] = []
    for result in root.operands if root.opcode == "tuple" else (root.name,):
        at = fused.instructions[result]
        parts = leaves(at.shape)
        if root.opcode == "tuple" and at.opcode == "parameter":
            written += [0] * len(parts)  # passed on
            continue
        source = _behind_views(fused, at)
        if is_call(source, "AsyncCollectiveStart"):
            # (operand, result, marks): the chain that begins here writes the result.
            written += [leaf.elements if i == 1 else 0 for i, leaf in enumerate(parts)]
        elif is_continued(source) or is_call(source, "AsyncCollectiveDone"):
            written += [0] * len(parts)
        elif source.opcode == "dynamic-update-slice":
            in_place.add(source.name)
            written.append(elements(fused.operand(source, 1).shape))
        elif source.opcode == "fusion":
            written += _touched(module, source.attribute("calls") or "", None)[1]
        else:
            written += [leaf.elements for leaf in parts]
        need[result] = elements(at.shape) if needed is None else needed
    for at in reversed(fused.instructions.values()):
        wanted = min(need.get(at.name, 0), elements(at.shape))
        if at.opcode == "parameter" and wanted:
            read[int(at.attributes.partition(")")[0])] = wanted
        if not wanted or is_continued(at) or is_call(at, "AsyncCollectiveDone"):
            continue
        for i, amount in enumerate(_needs(module, fused, at, wanted, at.name in in_place)):
            need[at.operands[i]] = need.get(at.operands[i], 0) + amount
    return read, written


def _needs(module: Module, fused: Computation, at: Instruction, wanted: int, in_place: bool) -> list[int]:
    """Of each operand, how many values are needed for `wanted` of the result's."""
    whole = [elements(shape) for shape in fused.shapes(at)]
    if at.opcode == "fusion":
        inner, _ = _touched(module, at.attribute("calls") or "", wanted if isinstance(at.shape, Array) else None)
        return [inner.get(i, 0) for i in range(len(whole))]
    if at.opcode == "dynamic-update-slice":
        return [0 if in_place else max(0, wanted - whole[1]), *whole[1:]]
    if at.opcode in ("slice", "dynamic-slice", "gather"):
        return [wanted, *whole[1:]]
    if at.opcode in WHOLE or at.opcode in COLLECTIVES or not isinstance(at.shape, Array):
        return whole
    return [min(wanted, size) for size in whole]


def _behind_views(fused: Computation, at: Instruction) -> Instruction:
    while at.opcode in ("bitcast", "get-tuple-element"):
        at = fused.operand(at, 0)
    return at


def is_call(at: Instruction, target: str) -> bool:
    """Whether it is a custom call of this target."""
    return at.opcode == "custom-call" and at.attribute("custom_call_target") == f'"{target}"'


def is_continued(at: Instruction) -> bool:
    """Whether it is a later link of a chain of fusions that one asynchronous collective runs through.

    The compiler repeats the collective in each; only the first has no flags to wait for.
    """
    found = re.search(r'"async_collective_fusion_config":\{"flag_start":"(-?\d+)"', at.attributes)
    return found is not None and found[1] != "-1"


def declared_cost(at: Instruction) -> dict[str, int] | None:
    """FLOPs and bytes by a Pallas kernel's cost estimate."""
    found = re.search(r'"cost_estimate":\{([^}]*)\}', at.attributes)
    if found is None:
        return None
    stated = {key: int(value) for key, value in re.findall(r'"(\w+)":"?(\d+)', found[1])}
    return {key: stated.get(key, 0) for key in ("flops", "bytes_accessed")}


def _result(at: Instruction) -> Shape:
    """The shape that an instruction makes, without the operands and marks that asynchronous ones carry along."""
    if at.opcode.endswith("-start") and isinstance(at.shape, tuple):
        if at.opcode == "copy-start":
            return at.shape[0]
        return at.shape if at.opcode == "all-reduce-start" else at.shape[1]
    if at.opcode in ("send", "recv") and isinstance(at.shape, tuple):
        return at.shape[0] if at.opcode == "recv" else ()
    return at.shape


def _amount(text: str) -> int:
    """ "15.75G" in bytes, as far as two places tell."""
    units = {"B": 0, "K": 10, "M": 20, "G": 30, "T": 40}
    return round(float(text[:-1]) * 2 ** units[text[-1]])


def largest_buffers(module: Module) -> tuple[Buffer, ...]:
    """The largest arrays in HBM: arguments, and what scheduled instructions make."""
    found: dict[str, Buffer] = {}
    for computation in _scheduled(module):
        for at in computation.instructions.values():
            is_argument = at.opcode == "parameter" and computation is module.entry
            if (at.opcode in FREE and not is_argument) or at.opcode in ("while", "conditional", "call"):
                continue
            if at.opcode.endswith(("-done", "-update")):
                continue
            for leaf in leaves(_result(at)):
                if hbm_size(leaf) and (at.name not in found or found[at.name].bytes < leaf.bytes):
                    written = f"{leaf.kind}[{','.join(map(str, leaf.dims))}]"
                    found[at.name] = Buffer(at.name, written, leaf.bytes, at.op_name)
    return tuple(sorted(found.values(), key=lambda buffer: (-buffer.bytes, buffer.name))[:LARGEST])


def _scheduled(module: Module) -> list[Computation]:
    """The entry and what it calls, without the insides of fusions and reductions."""
    found, waiting = {module.entry.name: module.entry}, [module.entry]
    while waiting:
        for at in waiting.pop().instructions.values():
            if at.opcode in ("while", "conditional", "call", "async-start"):
                keys = "body|condition|to_apply|calls|true_computation|false_computation|branch_computations"
                for listed in re.findall(rf"(?:{keys})=(\{{[^}}]*\}}|[^\s,{{]+)", at.attributes):
                    for name in re.findall(r"[^\s,{}%]+", listed):
                        if name not in found:
                            found[name] = module.computations[name]
                            waiting.append(found[name])
    return list(found.values())


def hbm_size(shape: Shape) -> int:
    """Bytes of a shape that lie in HBM."""
    return sum(leaf.bytes for leaf in leaves(shape) if leaf.space == 0)


def _size(shape: Shape) -> int:
    return sum(leaf.bytes for leaf in leaves(shape))


def elements(shape: Shape) -> int:
    """How many values all arrays of a shape have together."""
    return sum(leaf.elements for leaf in leaves(shape))
