"""The text of a compiled program: its computations, and how often each one runs.

The text is HLO after optimisation, as `jax.stages.Compiled.as_text()` gives it or XLA dumps it. A
loop's body appears in it once, and XLA's own cost analysis counts it once. `runs` says how often
the body is executed.

This is no parser of all of HLO. It reads what collectives.py and plan.py ask for.
"""

import math
import re
from collections import defaultdict
from typing import NamedTuple

Computations = dict[str, list[str]]

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
# The computations that an instruction runs, except a loop's condition: one, or a list in braces.
_CALLS = re.compile(
    r"(?:calls|to_apply|body|(?:true|false)_computation|(?:branch|called)_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")
# Layouts have parentheses too: the arguments end where an attribute follows or nothing does.
_INSTRUCTION = re.compile(
    r"^\s*(ROOT )?%?([\w.\-]+) = .*? ([a-z][\w\-]*)\((.*?)\)((?:, [a-z_]+=.*)?)\s*$"
)
# TPU compilers write more than this many cycles if they do not know the number.
_UNKNOWN_CYCLES = 2**62


class Instruction(NamedTuple):
    """One line of a computation.

    root: "ROOT " if it is the computation's result, else None. arguments: the text between the
    parentheses. attributes: the text after them.
    """

    root: str | None
    name: str
    operation: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)


Instructions = dict[str, Instruction]


def computations(hlo: str) -> Computations:
    """name -> lines of the computation. The program itself has the name ""."""
    found: Computations = {}
    lines: list[str] = []
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            lines = found["" if header[1] else header[2]] = []
        elif " = " in line:
            lines.append(line)
    return found


def runs(program: Computations) -> dict[str, int]:
    """name -> how often the computation is executed in one run of the program.

    Raises:
      ValueError: the text does not say how often a loop runs.
    """
    counts: dict[str, int] = defaultdict(int)

    def visit(name: str, times: int) -> None:
        counts[name] += times
        for line in program[name]:
            # The end of an asynchronous operation repeats the name of what its start runs.
            if re.search(r" async-(done|update)\(", line):
                continue
            turns = _turns(line, program[name], program) if " while(" in line else 1
            for callee in _called(line):
                visit(callee, times * turns)

    visit("", 1)
    return counts


def fused(program: Computations) -> set[str]:
    """Names of the computations that are the insides of fusions."""
    lines = (line for lines in program.values() for line in lines if " fusion(" in line)
    return {name for line in lines for name in _called(line)}


def cycles(hlo: str) -> int:
    """Sum of the cycles that the compiler estimates for each instruction, each as often as it runs.

    0 if the compiler gives no estimates. Collectives and kernels have none.
    """
    program = computations(hlo)
    times, total = runs(program), 0
    for name, lines in program.items():
        estimates = map(int, re.findall(r'"estimated_cycles":"(\d+)"', "\n".join(lines)))
        total += times[name] * sum(one for one in estimates if one < _UNKNOWN_CYCLES)
    return total


def byte_size(shape: str) -> int:
    """Bytes of an array's or a tuple's type: "f32[2,3]{1,0}" has 24."""
    total = 0
    for letters, bits, sizes in _ARRAY.findall(shape):
        count = math.prod(int(size) for size in sizes.split(",") if size)
        total += -(-(8 if letters == "pred" else int(bits or 0)) * count // 8)
    return total


def _called(line: str) -> list[str]:
    return re.findall(r"[\w.\-]+", " ".join(_CALLS.findall(line)))


def _turns(line: str, around: list[str], program: Computations) -> int:
    """How often a loop runs: the compiler's note, or else what its condition compares.

    TPU compilers write no note, and unroll loops by adding more than one to the counter.
    """
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    test = program[condition[1]] if condition else []
    limits = re.findall(r"constant\((\d+)\)", "\n".join(test))
    if len(limits) != 1 or not any("direction=LT" in one for one in test):
        raise ValueError(f"how often this loop runs is not in the text: {line.strip()[:200]}")
    start, step = _counter(line, around, test, program)
    return max(0, -(-(int(limits[0]) - start) // step))


def _counter(
    line: str, around: list[str], test: list[str], program: Computations
) -> tuple[int, int]:
    """Where a loop's counter starts and what each turn adds; 0 and 1 if the text does not say."""
    names = _by_name(test)
    compared = next((one for one in names.values() if one.operation == "compare"), None)
    counter = names.get(compared.operands[0]) if compared else None
    place = re.search(r"index=(\d+)", counter.attributes) if counter else None
    loop = re.search(r"while\(.*?%([\w.\-]+)\).*body=%?([\w.\-]+)", line)
    if place is None or loop is None:
        return 0, 1
    inside, index = _by_name(program[loop[2]]), int(place[1])
    result = next((one.name for one in inside.values() if one.root), "")
    start, step = _linear(loop[1], index, _by_name(around)), _linear(result, index, inside)
    first = start[1] if start and start[0] == 0 else 0
    return first, step[1] if step and step[0] == 1 and step[1] else 1


def _linear(name: str, index: int, names: Instructions) -> tuple[int, int] | None:
    """(a, b) if a number, or a tuple's member `index`, is a times the loop's member `index` plus b;
    None if it is not."""
    one = names.get(name) or Instruction(None, name, "", "", "")
    match one.operation:
        case "tuple":
            return _linear(one.operands[index], index, names)
        case "constant" if one.arguments.isdigit():
            return 0, int(one.arguments)
        case "get-tuple-element" if re.search(rf"index={index}\b", one.attributes):
            return 1, 0
        case "copy":
            return _linear(one.operands[0], index, names)
        case "add":
            left, right = (_linear(operand, index, names) for operand in one.operands)
            return (left[0] + right[0], left[1] + right[1]) if left and right else None
    return None


def _by_name(lines: list[str]) -> Instructions:
    matches = filter(None, map(_INSTRUCTION.match, lines))
    return {match[2]: Instruction(*match.groups()) for match in matches}
