"""What one run of a compiled program costs: FLOPs, bytes of memory, and the compiler's own cycles.

XLA has a cost analysis of its own (`Compiled.cost_analysis()`), which counts a loop's body once, so
that of a scan over 32 layers one is seen. Here every instruction counts as often as it runs.

What it is not: a measurement. Operations that are no matrix products have no FLOPs here; against a
device's matrix units they are small. Of kernels (Pallas, cuDNN) splash counts what kernel_cost.py
says, others what they declare, or nothing.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from llm.planning.hlo import (
    Computations,
    Instruction,
    arrays,
    called,
    computations,
    read_instruction,
    runs,
)
from llm.planning.kernel_cost import splash_flops

# What moves nothing: names for what is there already, and loops, whose bodies are counted.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "copy-done", "async-start", "async-update", "async-done", "after-all", "iota",
    "partition-id", "replica-id", "opt-barrier",
}  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")
# TPU compilers' word for "not known".
_NO_CYCLES = 2**62


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one device and one run of the program.

    flops: of matrix products and kernels, recomputation included.
    bytes: read from and written to the device's memory; what TPUs keep on the chip is left out.
    cycles: the sum of the compiler's estimates of each instruction; None where it gives none. They
      leave out collectives and kernels.
    kernel_flops: the kernels' among the flops.
    """

    flops: float
    bytes: float
    cycles: float | None
    kernel_flops: float = 0.0


def read_cost(hlo: str) -> Cost:
    """The cost of a program from its text.

    Raises:
      ValueError: a loop whose number of turns is not in the text.
    """
    program = computations(hlo)
    times = runs(program)
    inside = _fused(program)
    flops = bytes_ = cycles = kernels = 0.0
    for name, lines in program.items():
        if not times[name]:
            continue
        body = _Body(lines)
        for instruction in body.instructions:
            flops += times[name] * _flops(instruction, body)
            kernels += times[name] * _kernel_flops(instruction, body)
            cycles += times[name] * _cycles(instruction)
            if name not in inside:
                bytes_ += times[name] * _bytes(instruction, body, program)
    return Cost(flops + kernels, bytes_, cycles or None, kernels)


class _Body:
    """A computation's instructions, and the type of each by its name."""

    def __init__(self, lines: Iterable[str]):
        self.instructions = [one for one in map(read_instruction, lines) if one]
        self.by_name = {one.name: one for one in self.instructions}

    def shape(self, name: str) -> str:
        return self.by_name[name].shape if name in self.by_name else ""

    def sizes(self, name: str) -> tuple[int, ...]:
        found = arrays(self.shape(name))
        return found[0][1] if found else ()


def _fused(program: Computations) -> set[str]:
    """Computations whose values never reach memory one by one: those of fusions and reductions."""
    names: set[str] = set()
    for lines in program.values():
        for line in lines:
            # Only these run their computations as steps of a program.
            if not re.search(r" (while|conditional|call|async-start)\(", line):
                names |= set(called(line))
    return names


def _cycles(instruction: Instruction) -> int:
    found = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
    cycles = int(found[1]) if found else 0
    return cycles if cycles < _NO_CYCLES else 0


def _flops(instruction: Instruction, body: _Body) -> float:
    if instruction.operation == "dot":
        return _dot_flops(instruction, body)
    if instruction.operation == "convolution":
        return _convolution_flops(instruction, body)
    return 0.0


def _kernel_flops(instruction: Instruction, body: _Body) -> float:
    if instruction.operation != "custom-call":
        return 0.0
    declared = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', instruction.attributes)
    if declared:
        return float(declared[1])
    return splash_flops(instruction, [body.shape(name) for name in instruction.operands])


def _dot_flops(instruction: Instruction, body: _Body) -> float:
    """2 x numbers of the result x length of the sums."""
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    left = body.sizes(instruction.operands[0])
    axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
    return 2.0 * _numbers(instruction.shape) * math.prod(left[axis] for axis in axes)


def _convolution_flops(instruction: Instruction, body: _Body) -> float:
    """As XLA counts: products with padding or with the holes of a dilation are none.

    TPU compilers write every matrix product so; batch dimensions become windows of which one place
    each is no hole.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        return 0.0
    image, kernel, result = labels.groups()
    image_sizes = body.sizes(instruction.operands[0])
    kernel_sizes = body.sizes(instruction.operands[1])
    result_sizes = arrays(instruction.shape)[0][1]
    window = _window(instruction.attributes)
    products = 2.0 * kernel_sizes[kernel.index("i")]
    products *= result_sizes[result.index("b")] * result_sizes[result.index("f")]
    for place in range(len(image) - 2):
        digit = str(place)
        products *= _window_products(
            image_sizes[image.index(digit)],
            kernel_sizes[kernel.index(digit)],
            result_sizes[result.index(digit)],
            {key: values[place] for key, values in window.items() if place < len(values)},
        )
    return products


def _window(attributes: str) -> dict[str, list[str]]:
    """window={size=1x8 pad=0_0x7_7 lhs_dilate=1x8}: key -> a word for each dimension."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    words = (word.partition("=") for word in found[1].split()) if found else ()
    return {key: values.split("x") for key, _, values in words}


@functools.cache
def _pairs(image: int, kernel: int, result: int, low: int, steps: tuple[int, int, int]) -> int:
    stride, image_dilation, kernel_dilation = steps
    last = (image - 1) * image_dilation
    return sum(
        0 <= place <= last and place % image_dilation == 0
        for at in range(result)
        for offset in range(kernel)
        for place in (at * stride + offset * kernel_dilation - low,)
    )


def _window_products(image: int, kernel: int, result: int, window: dict[str, str]) -> int:
    """Pairs of a place of the result and one of the kernel that meet a number of the image."""
    low = int(window.get("pad", "0_0").split("_")[0])
    steps = tuple(int(window.get(key, "1")) for key in ("stride", "lhs_dilate", "rhs_dilate"))
    if kernel == 1 and low == 0 and steps == (1, 1, 1):
        return result
    return _pairs(image, kernel, result, low, steps)  # type: ignore[arg-type]


def _bytes(instruction: Instruction, body: _Body, program: Computations) -> float:
    """Operands and results. Of an array that is cut into, the part alone."""
    operation, operands = instruction.operation, instruction.operands
    if operation in _FREE:
        return 0.0
    if operation in _SLICES:
        return 2.0 * _memory(instruction.shape)
    if operation == "dynamic-update-slice":
        return 2.0 * _memory(body.shape(operands[1]))
    if operation == "fusion":
        return _fusion_bytes(instruction, body, program)
    return _memory(instruction.shape) + sum(_memory(body.shape(name)) for name in operands)


def _fusion_bytes(instruction: Instruction, body: _Body, program: Computations) -> float:
    """As the instruction alone, but for operands and results of which a part is touched."""
    total, written = 0.0, _memory(instruction.shape)
    for place, operand in enumerate(instruction.operands):
        shape = body.shape(operand)
        users = _users_in_fusion(instruction, place, program)
        cuts = [use for use in users if use.instruction.operation in _SLICES]
        pastes = [use for use in users if _is_written_into(use.instruction, use.name)]
        if not users or len(cuts) + len(pastes) < len(users):
            total += _memory(shape)
            continue
        total += min(_memory(shape), sum(_in_memory(use.instruction.shape, shape) for use in cuts))
        if pastes:
            sizes = (use.body.shape(use.instruction.operands[1]) for use in pastes)
            parts = sum(_in_memory(size, shape) for size in sizes)
            written = max(0.0, written - _memory(shape)) + parts
    return total + written


class _Use(NamedTuple):
    """An instruction that reads an array; its computation, and the array's name there."""

    instruction: Instruction
    body: _Body
    name: str


def _users_in_fusion(fusion: Instruction, place: int, program: Computations) -> list[_Use]:
    """What reads an operand inside a fusion."""
    names = called(fusion.attributes)
    inner = _Body(program[names[0]]) if names and names[0] in program else _Body(())
    for one in inner.instructions:
        if one.operation == "parameter" and one.arguments == str(place):
            return _users(inner, one.name, program)
    return []


def _users(body: _Body, name: str, program: Computations) -> list[_Use]:
    """What reads an array, under other names (bitcast) and in fusions within this one too."""
    found: list[_Use] = []
    for one in body.instructions:
        for place in (place for place, operand in enumerate(one.operands) if operand == name):
            if one.operation == "bitcast":
                found += _users(body, one.name, program)
            elif one.operation == "fusion":
                found += _users_in_fusion(one, place, program)
            else:
                found.append(_Use(one, body, name))
    return found


def _is_written_into(user: Instruction, name: str) -> bool:
    """Whether an instruction only replaces a part of the array of that name."""
    return user.operation == "dynamic-update-slice" and user.operands.index(name) == 0


def _in_memory(part: str, whole: str) -> float:
    """Bytes of a part of an array that lies in memory; 0 where the whole is kept on the chip."""
    bits = sum(bits * math.prod(sizes) for bits, sizes, _ in arrays(part))
    return bits / 8 if _memory(whole) else 0.0


def _memory(shape: str) -> float:
    """Bytes of a type's arrays but those in another memory, which TPU layouts mark by S(1)."""
    return sum(
        bits * math.prod(sizes) / 8
        for bits, sizes, layout in arrays(shape)
        if not re.search(r"S\([1-9]\d*\)", layout)
    )


def _numbers(shape: str) -> int:
    return sum(math.prod(sizes) for _, sizes, _ in arrays(shape))
