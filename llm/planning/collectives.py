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

import numpy as np

from llm.planning.hlo import byte_size, computations, fused, runs

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation of a program.

    kind: one of KINDS. bytes: of the whole arrays, as one device has them before or after: what an
    all-gather gives, a reduce-scatter and an all-reduce take. count: how often it runs each time
    that the program does. group: how many devices take part. source: the JAX operation it is for.
    members: the devices of the first group, as places in the mesh; empty where not written.
    """

    kind: str
    bytes: int
    count: int
    group: int
    source: str
    members: tuple[int, ...] = dataclasses.field(default=(), compare=False, repr=False)


def read_collectives(hlo: str) -> list[Collective]:
    """Every collective between more than one device, in the order of the text.

    Raises:
      ValueError: a loop whose number of turns is not in the text.
    """
    program = computations(hlo)
    times, inside_fusions = runs(program), fused(program)
    found: dict[tuple[str, str, int], Collective] = {}
    for name, lines in program.items():
        for number, line in enumerate(lines):
            collective = _read(line, name, times[name])
            if collective is None or collective.group == 1 or not collective.count:
                continue
            # Pieces of one operation lie in fusions and have its channel. Others may have the same
            # number: all that come from shard_map do.
            channel = re.search(r"channel_id=(\d+)", line) if name in inside_fusions else None
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


def _read(line: str, computation: str, count: int) -> Collective | None:
    operation = _OPERATION.search(line)
    if operation is None:
        return None
    shape, kind, start = operation.groups()
    if start and kind != "all-reduce":
        shape = _top_level(shape)[1]  # (operands, results, ...)
    members, size = _first_group(line), byte_size(shape)
    group = len(members)
    if kind == "reduce-scatter":
        size *= group
    if computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    source = re.search(r'op_name="([^"]*)"', line)
    return Collective(kind, size, count, group, source[1] if source else "", members)


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


def _first_group(line: str) -> tuple[int, ...]:
    """The devices of one group, in each of the ways that HLO writes groups."""
    if groups := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return tuple(int(member) for member in groups[1].split(",") if member)
    if groups := re.search(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        sizes = [int(size) for size in groups[2].split(",")]
        order = [int(axis) for axis in groups[3].split(",")] if groups[3] else range(len(sizes))
        devices = np.arange(math.prod(sizes)).reshape(sizes).transpose(order)
        return tuple(devices.reshape(-1)[: int(groups[1])].tolist())
    if groups := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        return _along_axes(
            {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", groups[1])},
            re.findall(r"'([^']+)'", groups[2]),
        )
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    return tuple(sorted({int(one) for one in re.findall(r"\d+", pairs[1])})) if pairs else ()


def _along_axes(sizes: dict[str, int], axes: list[str]) -> tuple[int, ...]:
    """The devices whose places on all other axes of a mesh are the first."""
    devices = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
    chosen = tuple(slice(None) if axis in axes else 0 for axis in sizes)
    return tuple(devices[chosen].reshape(-1).tolist())
