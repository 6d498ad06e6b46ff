"""The text of a compiled program, read: computations, instructions, and how often each one runs.

The text is HLO after optimisation, as `jax.stages.Compiled.as_text()` gives it or XLA dumps it. A
loop's body stands in it once; `runs` says how many times it is taken. XLA's own cost analysis does
not: it counts a body once.

What it is not: a parser of all of HLO. It reads what collectives.py and cost.py ask for.
"""

import dataclasses
import math
import re
from collections import defaultdict

Computations = dict[str, list[str]]

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CALL = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_CALLS = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line. shape: its type as text. operands: names. attributes: all after the operands.

    arguments: what is between the parentheses, as text.
    """

    name: str
    shape: str
    operation: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool
    arguments: str


Instructions = dict[str, Instruction]


def computations(hlo: str) -> Computations:
    """name -> its lines; that of the program itself under ""."""
    found: Computations = {}
    lines: list[str] = []
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            lines = found["" if header[1] else header[2]] = []
        elif " = " in line:
            lines.append(line)
    return found


def runs(program: Computations) -> dict[str, int]:
    """name -> how often a computation runs each time that the program does.

    Raises:
      ValueError: a loop whose number of turns is not in the text.
    """
    counts: dict[str, int] = defaultdict(int)

    def visit(name: str, times: int) -> None:
        counts[name] += times
        for line in program[name]:
            # The end of an asynchronous operation names again what its beginning runs.
            if re.search(r" async-(done|update)\(", line):
                continue
            turns = _turns(line, program[name], program) if " while(" in line else 1
            for callee in called(line):
                visit(callee, times * turns)

    visit("", 1)
    return counts


def fused(program: Computations) -> set[str]:
    """Names of the computations that are fusions' insides."""
    lines = (line for lines in program.values() for line in lines if " fusion(" in line)
    return {name for line in lines for name in _CALL.findall(line)}


def called(line: str) -> list[str]:
    """The computations that an instruction runs, but for a loop's condition."""
    names = _CALL.findall(line)
    for group in _CALLS.findall(line):
        names += re.findall(r"[\w.\-]+", group)
    return names


def read_instruction(line: str) -> Instruction | None:
    """None for a line that is no instruction."""
    found = _INSTRUCTION.match(line)
    if found is None:
        return None
    root, name, shape, operation, rest = found.groups()
    end = _closing(rest)
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
    return Instruction(name, shape, operation, operands, rest[end:], bool(root), rest[:end])


def arrays(shape: str) -> list[tuple[int, tuple[int, ...], str]]:
    """(bits of an element, sizes, layout as text) of each array of a type.

    "f32[2,3]{1,0:S(1)}" has [(32, (2, 3), "{1,0:S(1)}")]; a tuple has as many as its members.
    """
    return [
        (
            8 if letters == "pred" else int(bits or 0),
            tuple(int(size) for size in sizes.split(",") if size),
            layout,
        )
        for letters, bits, sizes, layout in _ARRAY.findall(shape)
    ]


def byte_size(shape: str) -> int:
    """Of an array's or a tuple's type: "f32[2,3]{1,0}" has 24."""
    return sum(-(-bits * math.prod(sizes) // 8) for bits, sizes, _ in arrays(shape))


def _turns(line: str, around: list[str], program: Computations) -> int:
    """How often a loop runs: as the compiler noted, or by what its condition compares.

    TPU compilers note nothing, and unroll loops by advancing their counter by more than one.
    """
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    test = program[condition[1]] if condition else []
    constants = re.findall(r"constant\((\d+)\)", "\n".join(test))
    if len(constants) != 1 or not any("direction=LT" in one for one in test):
        raise ValueError(f"how often this loop runs is not in the text: {line.strip()[:200]}")
    start, step = _counter(line, around, test, program)
    return max(0, -(-(int(constants[0]) - start) // step))


def _counter(
    line: str, around: list[str], test: list[str], program: Computations
) -> tuple[int, int]:
    """Where a loop's counter starts and what each turn adds; 0 and 1 where that is not written."""
    index = _compared_index(test)
    body = re.search(r"body=%?([\w.\-]+)", line)
    if index is None or body is None:
        return 0, 1
    outside, inside = _by_name(around), _by_name(program[body[1]])
    begun = read_instruction(line)
    tuples = [outside.get(name) for name in begun.operands] if begun else []
    start = _member_constant(tuples[0] if tuples else None, index, outside)
    root = next((one for one in inside.values() if one.is_root), None)
    step = None
    if root and root.operation == "tuple" and index < len(root.operands):
        step = _added(root.operands[index], index, inside)
    return start or 0, step or 1


def _compared_index(test: list[str]) -> int | None:
    """The place in the loop's tuple of the number that its condition compares."""
    names = _by_name(test)
    for one in names.values():
        if one.operation == "compare":
            counter = names.get(one.operands[0])
            place = re.search(r"index=(\d+)", counter.attributes) if counter else None
            return int(place[1]) if place else None
    return None


def _member_constant(made: Instruction | None, index: int, names: Instructions) -> int | None:
    """The constant that a tuple holds at a place."""
    if made is None or made.operation != "tuple" or index >= len(made.operands):
        return None
    return _constant(made.operands[index], names)


def _added(name: str, index: int, names: Instructions) -> int | None:
    """What a chain of additions adds to the loop's member of that index."""
    one = names.get(name)
    if one is None:
        return None
    if one.operation == "get-tuple-element":
        return 0 if re.search(rf"index={index}\b", one.attributes) else None
    if one.operation == "copy":
        return _added(one.operands[0], index, names)
    if one.operation != "add":
        return None
    for left, right in (one.operands, one.operands[::-1]):
        before, more = _added(left, index, names), _constant(right, names)
        if before is not None and more is not None:
            return before + more
    return None


def _constant(name: str, names: Instructions) -> int | None:
    one = names.get(name)
    while one is not None and one.operation == "copy":
        one = names.get(one.operands[0])
    if one is None or one.operation != "constant" or not one.arguments.isdigit():
        return None
    return int(one.arguments)


def _by_name(lines: list[str]) -> Instructions:
    return {one.name: one for one in map(read_instruction, lines) if one}


def _closing(text: str) -> int:
    """Where the parenthesis that was opened before the text is closed."""
    depth = 1
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return place
    return len(text)
