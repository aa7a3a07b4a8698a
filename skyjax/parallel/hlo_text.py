"""The text of a compiled XLA program as computations of instructions: what hlo.py counts.

In: `compiled.as_text()`. Out: a `Module`. Only what counting needs is read: names, shapes, operands, and the attributes
as text, to be searched. Each line is passed over once, so the time grows with the length of the text.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([^\]]*)\](?:\{([^}]*)\})?")
_SHAPE_TOKEN = re.compile(r"\(|\)|" + _ARRAY.pattern)
_HEADER = re.compile(r"(ENTRY )?%?([^ (]+) .*\{$")
_INSTRUCTION = re.compile(r"  (ROOT )?%?([^ ]+) = ")
# After optimisation names have a %, before it none; comments stand between them.
_OPERAND = re.compile(r"%([^\s,(){}]+)")
_BARE_OPERAND = re.compile(r"(?:/\*.*?\*/)?\s*([^\s,(){}]+)")
_BRACKET = re.compile(r"[()]")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array's shape. `space`: the memory that its layout names; 0 is HBM, 1 is VMEM."""

    kind: str
    dims: tuple[int, ...]
    space: int = 0

    @functools.cached_property
    def elements(self) -> int:
        """How many values."""
        return int(np.prod(self.dims, dtype=object))

    @functools.cached_property
    def bytes(self) -> int:
        """The size as the values alone need it, without the padding of tiles."""
        return (self.elements * _bits(self.kind) + 7) // 8


Shape = Array | tuple["Shape", ...]


@dataclasses.dataclass(slots=True)
class Instruction:
    """One line: `name = shape opcode(operands), attributes`; of a constant, `attributes` begin with its value."""

    name: str
    shape: Shape
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def attribute(self, key: str) -> str | None:
        """The value of `key=...`, to the next comma outside brackets or quotes, without a leading %; None if absent."""
        found = re.search(rf"(?:^|[ ,]){key}=", self.attributes)
        if found is None:
            return None
        depth, quoted = 0, False
        for i in range(found.end(), len(self.attributes)):
            letter = self.attributes[i]
            if letter == '"' and self.attributes[i - 1] != "\\":
                quoted = not quoted
            elif not quoted:
                depth += (letter in "{[(") - (letter in "}])")
                if depth < 0 or (letter == "," and depth == 0):
                    break
        else:
            i = len(self.attributes)
        return self.attributes[found.end() : i].removeprefix("%")

    @property
    def groups(self) -> str:
        """The groups of a collective, as `replica_groups` reads them."""
        found = re.search(r"replica_groups=(mesh.*?\{[^}]*\})", self.attributes)
        return found[1] if found else self.attribute("replica_groups") or "{}"

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from; empty where the compiler does not say."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


class Computation:
    """Instructions by name, in the order of the text: every operand stands above its users."""

    def __init__(self, name: str):
        self.name = name
        self.instructions: dict[str, Instruction] = {}
        self.root: Instruction | None = None

    def add(self, instruction: Instruction) -> None:
        """The next line."""
        self.instructions[instruction.name] = instruction
        if instruction.is_root:
            self.root = instruction

    def operand(self, instruction: Instruction, number: int) -> Instruction:
        """The instruction that gives an operand."""
        return self.instructions[instruction.operands[number]]

    def shapes(self, instruction: Instruction) -> list[Shape]:
        """The shapes of the operands."""
        return [self.instructions[name].shape for name in instruction.operands]


@dataclasses.dataclass
class Module:
    """A program. `devices`: how many run it together: partitions x replicas. In a TPU program, those of one slice."""

    entry: Computation
    computations: dict[str, Computation]
    devices: int


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`.

    Raises:
      ValueError: a line is not understood, no computation is the entry, or the text is cut off.
    """
    computations: dict[str, Computation] = {}
    entry = current = None
    header = text[: text.find("\n")]
    for line in text.split("\n"):
        if line.startswith("  ") and current is not None:
            current.add(_instruction(line))
        elif line.endswith("{") and (found := _HEADER.match(line)) and not line.startswith("HloModule"):
            current = computations[found[2]] = Computation(found[2])
            entry = current if found[1] else entry
        elif line.startswith("}"):
            current = None
    if current is not None:
        raise ValueError(f"HLO: the text ends inside {current.name}: it is cut off, and counts would be too low")
    if entry is None:
        raise ValueError("HLO: no ENTRY computation; this is not the text of a compiled program")
    counts = (re.search(rf"{key}=(\d+)", header) for key in ("num_partitions", "replica_count"))
    devices = int(np.prod([int(found[1]) if found else 1 for found in counts]))
    return Module(entry, computations, devices)


def leaves(shape: Shape) -> list[Array]:
    """The arrays of a shape, in order."""
    return [shape] if isinstance(shape, Array) else [leaf for part in shape for leaf in leaves(part)]


@functools.lru_cache(maxsize=100_000)
def parse_shape(text: str) -> Shape:
    """`f32[8,128]{1,0:T(8,128)S(1)}` as Array("f32", (8, 128), 1); a tuple of shapes as a tuple."""
    stack: list[list[Any]] = [[]]
    for token in _SHAPE_TOKEN.finditer(text):
        if token[0] == "(":
            stack.append([])
        elif token[0] == ")":
            done = tuple(stack.pop())
            stack[-1].append(done)
        else:
            dims = tuple(int(size.removeprefix("<=")) for size in token[2].split(",") if size)
            space = re.search(r"S\((\d+)\)", token[3] or "")
            stack[-1].append(Array(token[1], dims, int(space[1]) if space else 0))
    if len(stack) != 1 or len(stack[0]) != 1:
        raise ValueError(f'HLO: the shape "{text[:200]}" is not understood')
    shape: Shape = stack[0][0]
    return shape


def replica_groups(text: str, devices: int) -> list[list[int]]:
    """The groups of a collective, as lists of devices.

    Args:
      text: the attribute: `{{0,1},{2,3}}`; `[4,2]<=[2,4]T(1,0)`, an iota reshaped, transposed and cut into rows; or
        `mesh['a'=4,'b'=2] {'b'}`, a mesh and the axes that a group runs along. `{}` is all devices.
      devices: of the program.

    Raises:
      ValueError: it is written in another way.
    """
    if text.startswith("{"):
        groups = [[int(i) for i in row.split(",") if i.strip()] for row in re.findall(r"\{([\d, ]*)\}", text[1:])]
        return [group for group in groups if group] or [list(range(devices))]
    if found := re.fullmatch(r"\[([\d,]+)\](<=\S*)", text):
        rows = _iota(found[2]).reshape(_ints(found[1]))
        return rows.reshape(rows.shape[0], -1).tolist()
    if found := re.fullmatch(r"mesh\[([^\]]*)\](?:, ?device_ids=\(?(\S+?)\)?)?,? ?\{([^}]*)\}", text):
        return _mesh_groups(found[1], found[2], found[3])
    raise ValueError(f'HLO: the groups "{text[:200]}" are not understood')


def trip_count(
    module: Module, loop: Instruction, parent: Computation, known: Mapping[int, int]
) -> tuple[int | None, dict[int, int]]:
    """How often a loop's body runs, and the constants that it is given.

    As the compiler states it, else from a counter with a constant start and step that the condition compares with a
    constant, as TPU programs leave it.

    Args:
      module: the program.
      loop: a `while`.
      parent: the computation that it stands in.
      known: constants among the elements of the parent's parameter, where that is a loop's body too.

    Returns:
      The count, None where it cannot be told before it runs; and element of the body's parameter -> its value, of
      those that no turn changes.
    """
    body = module.computations[loop.attribute("body") or ""]
    condition = module.computations[loop.attribute("condition") or ""]
    given = _value(module, parent, loop.operands[0], {0: {i: Linear(0, value) for i, value in known.items()}})
    assert body.root is not None
    start: dict[int, int] = {}
    if isinstance(given, dict) and body.root.opcode == "tuple":
        start = {i: value.constant for i, value in given.items() if value.factor == 0}
    after = {i: _value(module, body, body.root.operands[i], {0: {i: Linear(1, 0)}}) for i in start}
    constant = {i: value for i, value in start.items() if after[i] == Linear(1, 0)}
    if found := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes):
        return int(found[1]), constant
    fixed = {i: Linear(0, value) for i, value in constant.items()}
    for i in start.keys() - constant.keys():
        values: Values = {0: fixed | {i: Linear(1, 0)}}
        step, test = _value(module, body, body.root.operands[i], values), _comparison(module, condition, values)
        if isinstance(step, Linear) and step.factor == 1 and test is not None:
            left, right, direction = test
            if (left.factor, right.factor) == (0, 1):
                left, right, direction = right, left, direction.translate(str.maketrans("LG", "GL"))
            if (left.factor, right.factor) == (1, 0):
                return _turns(start[i] + left.constant, right.constant, step.constant, direction), constant
    return None, constant


@dataclasses.dataclass(frozen=True)
class Linear:
    """factor * counter + constant."""

    factor: int
    constant: int


Values = Mapping[int, "Linear | dict[int, Linear] | None"]


def _value(
    module: Module, computation: Computation, name: str, parameters: Values, seen: "dict[str, Any] | None" = None
) -> "Linear | dict[int, Linear] | None":
    """An integer, or the known elements of a tuple, given those of the parameters; None where it is not known.

    `seen`: values of this computation that are known already: an operand of many is looked at once.
    """
    seen = {} if seen is None else seen
    if name not in seen:
        seen[name] = _fresh_value(module, computation, name, parameters, seen)
    return seen[name]


def _fresh_value(
    module: Module, computation: Computation, name: str, parameters: Values, seen: dict[str, Any]
) -> "Linear | dict[int, Linear] | None":
    at = computation.instructions[name]
    inner = functools.partial(_value, module, computation, parameters=parameters, seen=seen)
    if at.opcode == "parameter":
        return parameters.get(int(at.attributes.partition(")")[0]))
    if at.opcode == "tuple":
        parts = {
            i: inner(part)
            for i, part in enumerate(at.operands)
            if isinstance(shape := computation.instructions[part].shape, Array) and _is_integer(shape)
        }
        return {i: part for i, part in parts.items() if isinstance(part, Linear)}
    if at.opcode == "get-tuple-element":
        whole = inner(at.operands[0])
        return whole.get(int(at.attribute("index") or 0)) if isinstance(whole, dict) else None
    if at.opcode == "opt-barrier":
        return inner(at.operands[0])
    if at.opcode not in ("copy-start", "fusion") and not (isinstance(at.shape, Array) and _is_integer(at.shape)):
        return None
    if at.opcode == "constant":
        found = re.match(r"-?\d+", at.attributes)
        return Linear(0, int(found[0])) if found else None
    if at.opcode in ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done"):
        return inner(at.operands[0])
    if at.opcode in ("add", "subtract"):
        left, right = map(inner, at.operands)
        sign = 1 if at.opcode == "add" else -1
        if isinstance(left, Linear) and isinstance(right, Linear):
            return Linear(left.factor + sign * right.factor, left.constant + sign * right.constant)
    if at.opcode == "fusion":
        fused = module.computations[at.attribute("calls") or ""]
        assert fused.root is not None
        return _value(module, fused, fused.root.name, {i: inner(part) for i, part in enumerate(at.operands)})
    return None


def _comparison(module: Module, computation: Computation, parameters: Values) -> tuple[Linear, Linear, str] | None:
    """Both sides of the comparison that a condition ends with, and its direction; None where it is another."""
    root = computation.root
    assert root is not None
    sides = [_value(module, computation, part, parameters) for part in root.operands]
    if root.opcode == "fusion":
        return _comparison(module, module.computations[root.attribute("calls") or ""], dict(enumerate(sides)))
    if root.opcode != "compare" or not isinstance(sides[0], Linear) or not isinstance(sides[1], Linear):
        return None
    return sides[0], sides[1], root.attribute("direction") or ""


def _turns(first: int, bound: int, step: int, direction: str) -> int | None:
    """How often a counter from `first` by `step` holds its comparison with `bound`; None where it never ends."""
    if direction in ("GT", "GE"):
        first, bound, step, direction = -first, -bound, -step, direction.replace("G", "L")
    if direction not in ("LT", "LE", "NE") or step <= 0:
        return None
    if direction == "NE" and (bound - first) % step:
        return None
    return max(0, -(-(bound + (direction == "LE") - first) // step))


def _is_integer(shape: Array) -> bool:
    return not shape.dims and re.fullmatch(r"[su]\d+", shape.kind) is not None


def _instruction(line: str) -> Instruction:
    """One line of a computation."""
    start = _INSTRUCTION.match(line)
    if start is None:
        raise ValueError(f'HLO: the line "{line.strip()[:200]}" is not understood')
    at = start.end()
    # A shape ends with its outer bracket or, of an array, with a space; layouts have brackets too, in pairs.
    end = _closing(line, at) if line[at] == "(" else line.index(" ", at)
    opened = line.index("(", end)
    opcode = line[end:opened].strip()
    if opcode in ("constant", "parameter"):
        return Instruction(start[2], parse_shape(line[at:end]), opcode, (), line[opened + 1 :], bool(start[1]))
    closed = _closing(line, opened)
    names = _OPERAND if line[start.start(2) - 1] == "%" else _BARE_OPERAND
    operands = tuple(names.findall(line, opened + 1, closed - 1))
    attributes = line[closed:].removeprefix(", ")
    return Instruction(start[2], parse_shape(line[at:end]), opcode, operands, attributes, bool(start[1]))


def _closing(line: str, opened: int) -> int:
    """The place behind the bracket that closes the one at `opened`."""
    depth = 0
    for bracket in _BRACKET.finditer(line, opened):
        depth += 1 if bracket[0] == "(" else -1
        if depth == 0:
            return bracket.end()
    raise ValueError(f'HLO: a bracket of "{line.strip()[:200]}" is not closed')


def _mesh_groups(axes: str, order: str | None, along: str) -> list[list[int]]:
    """Groups along some axes of a mesh; of an axis `'a':(2)4`, the part of size 4 inside the first 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", axes)}
    parts = re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", along)
    shape: list[int] = []
    chosen: dict[str, list[tuple[int, int, int]]] = {name: [] for name in sizes}
    for i, (name, before, size) in enumerate(parts):
        chosen[name].append((int(before or 1), int(size or sizes[name]), i))
    grouped: dict[int, int] = {}  # its place in `along` -> its axis of `shape`
    for name, whole in sizes.items():
        used = 1
        for before, size, i in sorted(chosen[name]):
            shape.append(before // used)
            grouped[i] = len(shape)
            shape.append(size)
            used = before * size
        shape.append(whole // used)
    count = int(np.prod(list(sizes.values())))
    devices = _iota(f"<={order}") if order and order.startswith("[") else np.array(_ints(order or ""))
    if not order:
        devices = np.arange(count)
    inside = [grouped[i] for i in range(len(parts))]
    outside = [i for i in range(len(shape)) if i not in inside]
    width = int(np.prod([shape[i] for i in inside]))
    groups: list[list[int]] = devices.reshape(shape).transpose(outside + inside).reshape(-1, width).tolist()
    return groups


def _iota(text: str) -> np.ndarray[Any, Any]:
    """`<=[4,2]T(1,0)`: 0, 1, 2... in that shape, transposed, flat."""
    found = re.fullmatch(r"<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if found is None:
        raise ValueError(f'HLO: the devices "{text[:200]}" are not understood')
    shape = _ints(found[1])
    whole = np.arange(int(np.prod(shape))).reshape(shape)
    return (whole.transpose(_ints(found[2])) if found[2] else whole).reshape(-1)


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _bits(kind: str) -> int:
    """Of one value; 0 for tokens."""
    if kind == "pred":
        return 8
    found = re.match(r"[a-z]+(\d+)", kind)
    return int(found[1]) if found else 0
