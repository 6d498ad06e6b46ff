"""What a compiled program sends between devices: its collectives, read from its HLO text.

The text is `jax.stages.Compiled.as_text()`. A collective in a loop's body counts as often as the
loop runs. TPU compilers write a reduce-scatter as a fusion named "all-reduce-scatter", and they
write an operation that overlaps others as several pieces with one channel. Both are counted as the
one operation that they are. The CPU compiler has no reduce-scatter: it writes an all-reduce of the
whole array and a slice.

Bytes are no time. A time needs the bandwidth of the links (roofline.py).
"""

import dataclasses
import math
import re

import numpy as np

from llm.planning.hlo import byte_size, computations, fused, runs

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation of a program.

    kind: one of KINDS. bytes: size of the whole arrays on one device: what an all-gather returns,
    what a reduce-scatter and an all-reduce take. count: how often it is executed in one run of the
    program. group: how many devices take part. source: the JAX operation that needs it. members:
    the devices of the first group, as places in the mesh; empty if the text does not name them.
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
      ValueError: the text does not say how often a loop runs.
    """
    program = computations(hlo)
    times, inside_fusions = runs(program), fused(program)
    found: dict[tuple[str, str, int], Collective] = {}
    for name, lines in program.items():
        for number, line in enumerate(lines):
            collective = _read(line, name, times[name])
            if collective is None or collective.group == 1 or not collective.count:
                continue
            # The pieces of one operation are in fusions and share its channel. Outside fusions
            # channels are not unique: all collectives that come from shard_map have the same one.
            channel = re.search(r"channel_id=(\d+)", line) if name in inside_fusions else None
            key = channel[1] if channel else f"{name} {number}"
            found.setdefault((key, collective.kind, collective.bytes), collective)
    return list(found.values())


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
    """The devices of the first group, in any of the four ways in which HLO writes groups."""
    if groups := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return tuple(int(member) for member in groups[1].split(",") if member)
    if groups := re.search(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape = [int(size) for size in groups[2].split(",")]
        order = [int(axis) for axis in groups[3].split(",")] if groups[3] else range(len(shape))
        devices = np.arange(math.prod(shape)).reshape(shape).transpose(order)
        return tuple(devices.reshape(-1)[: int(groups[1])].tolist())
    if groups := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", groups[1])}
        devices = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
        # The first group along these axes: the place on every other axis is 0.
        along = re.findall(r"'([^']+)'", groups[2])
        chosen = tuple(slice(None) if axis in along else 0 for axis in sizes)
        return tuple(devices[chosen].reshape(-1).tolist())
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    return tuple(sorted({int(one) for one in re.findall(r"\d+", pairs[1])})) if pairs else ()
