"""What a compiled program sends between devices: its collectives, read from its HLO text.

The text is `jax.stages.Compiled.as_text()`. A loop's body stands in it once and is counted as often
as it runs. TPU compilers write a reduce-scatter as a fusion named "all-reduce-scatter", and an
operation that goes on beside others as several pieces with one channel; both are counted as what
they are. The CPU's has no reduce-scatter: an all-reduce of the whole and a slice stand for it.

What it is not: a time. That needs the bandwidth of the links and what runs beside them.
"""

import dataclasses
import math
import re
from collections import defaultdict

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation of a program.

    kind: one of KINDS. bytes: of the whole arrays, as one device has them before or after: what an
    all-gather gives, a reduce-scatter and an all-reduce take. count: how often it runs each time
    that the program does. group: how many devices take part. source: the JAX operation it is for.
    """

    kind: str
    bytes: int
    count: int
    group: int
    source: str


def read_collectives(hlo: str) -> list[Collective]:
    """Every collective between more than one device, in the order of the text.

    Raises:
      ValueError: a loop whose number of turns is not in the text.
    """
    computations = _computations(hlo)
    runs, fused = _runs(computations), _fused(computations)
    found: dict[tuple[str, str, int], Collective] = {}
    for name, lines in computations.items():
        for number, line in enumerate(lines):
            collective = _read(line, name, runs[name])
            if collective is None or collective.group == 1 or not collective.count:
                continue
            # Pieces of one operation lie in fusions and have its channel. Others may have the same
            # number: all that come from shard_map do.
            channel = re.search(r"channel_id=(\d+)", line) if name in fused else None
            key = channel[1] if channel else f"{name} {number}"
            found.setdefault((key, collective.kind, collective.bytes), collective)
    return list(found.values())


def total_bytes(collectives: list[Collective]) -> dict[str, int]:
    """kind -> bytes of all of that kind in one run of the program, each times its count."""
    totals: dict[str, int] = defaultdict(int)
    for one in collectives:
        totals[one.kind] += one.bytes * one.count
    return dict(totals)


_OPERATION = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CALL = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_CALLS = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")


def _computations(hlo: str) -> dict[str, list[str]]:
    """name -> its instructions; that of the program itself under ""."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            lines = computations["" if header[1] else header[2]] = []
        elif " = " in line:
            lines.append(line)
    return computations


def _runs(computations: dict[str, list[str]]) -> dict[str, int]:
    """name -> how often a computation runs each time that the program does."""
    runs: dict[str, int] = defaultdict(int)

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for line in computations[name]:
            # The end of an asynchronous operation names again what its beginning runs.
            if re.search(r" async-(done|update)\(", line):
                continue
            called = _CALL.findall(line)
            for group in _CALLS.findall(line):
                called += re.findall(r"[\w.\-]+", group)
            turns = _turns(line, computations) if " while(" in line else 1
            for callee in called:
                visit(callee, times * turns)

    visit("", 1)
    return runs


def _fused(computations: dict[str, list[str]]) -> set[str]:
    """Names of the computations that are fusions' insides."""
    lines = (line for lines in computations.values() for line in lines if " fusion(" in line)
    return {name for line in lines for name in _CALL.findall(line)}


def _turns(line: str, computations: dict[str, list[str]]) -> int:
    """How often a loop runs: as the compiler noted, or the constant that its condition compares."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    text = "\n".join(computations[condition[1]]) if condition else ""
    constants = re.findall(r"constant\((\d+)\)", text)
    if len(constants) != 1 or "direction=LT" not in text:
        raise ValueError(f"how often this loop runs is not in the text: {line.strip()[:200]}")
    return int(constants[0])


def _read(line: str, computation: str, count: int) -> Collective | None:
    operation = _OPERATION.search(line)
    if operation is None:
        return None
    shape, kind, start = operation.groups()
    if start and kind != "all-reduce":
        shape = _top_level(shape)[1]  # (operands, results, ...)
    group, size = _group_size(line), _bytes(shape)
    if kind == "reduce-scatter":
        size *= group
    if computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    source = re.search(r'op_name="([^"]*)"', line)
    return Collective(kind, size, count, group, source[1] if source else "")


def _top_level(shape: str) -> list[str]:
    """The members of a tuple's type."""
    members, depth = [""], 0
    for character in shape[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            members.append("")
        else:
            members[-1] += character
    return members


def _bytes(shape: str) -> int:
    """Of an array's or a tuple's type: "f32[2,3]{1,0}" has 24."""
    total = 0
    for letters, bits, sizes in _ARRAY.findall(shape):
        width = 8 if letters == "pred" else int(bits or 0)
        total += -(-width * math.prod(int(size) for size in sizes.split(",") if size) // 8)
    return total


def _group_size(line: str) -> int:
    """Devices of one group, in each of the ways that HLO writes groups."""
    if groups := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return groups[1].count(",") + 1
    if groups := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(groups[1])
    if groups := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", groups[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", groups[2]))
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    return len(set(re.findall(r"\d+", pairs[1]))) if pairs else 0
