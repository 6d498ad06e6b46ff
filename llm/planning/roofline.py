"""The least time that a program can take on given devices: the longest of three.

    compute   FLOPs / the device's peak
    memory    bytes / the bandwidth of its memory
    links     for each collective, bytes that a device has to send / the bandwidth of its links

That arithmetic, memory and links all work at once, and each at its full rate, is never quite true,
so a step takes longer. Source: Williams et al. 2009, "Roofline".
"""

import dataclasses
from collections.abc import Sequence

import jax

from llm.model.devices import Sheet
from llm.planning.collectives import Collective
from llm.planning.cost import Cost


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one run of the program on each device."""

    compute: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.links)

    @property
    def binds(self) -> str:
        """Which of the three is the longest."""
        times = dataclasses.asdict(self)
        return max(times, key=times.__getitem__)


def roofline(
    cost: Cost, collectives: Sequence[Collective], sheet: Sheet, devices: Sequence[jax.Device]
) -> Roofline:
    """Args: devices: in the order of the mesh."""
    return Roofline(
        compute=cost.flops / sheet.bfloat16_flops,
        memory=cost.bytes / sheet.memory_bandwidth,
        links=sum(link_seconds(one, sheet, devices) for one in collectives),
    )


def link_seconds(one: Collective, sheet: Sheet, devices: Sequence[jax.Device]) -> float:
    """All runs of one collective. Of n devices, with b bytes of the whole array:

        all-gather, reduce-scatter, all-to-all   b (n - 1) / n
        all-reduce                               2 b (n - 1) / n
        collective-permute                       b

    over the bandwidth out of one device: the least that any algorithm sends (Thakur et al. 2005).
    """
    share = (one.group - 1) / one.group
    sent = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(one.kind, share) * one.bytes
    return one.count * sent / bandwidth(one.members, sheet, devices)


def bandwidth(members: Sequence[int], sheet: Sheet, devices: Sequence[jax.Device]) -> float:
    """Bytes/s that each device of a group sends to the others.

    GPUs: of a group within one domain, its links. Beyond, the whole of a domain's devices in the
    group share the work of crossing the network.
    TPUs: two links along each dimension of the torus that the group extends over; one where the
    compiler was asked for a line of two.
    """
    if not members:
        return sheet.link
    if sheet.domain:
        together = sum(one // sheet.domain == members[0] // sheet.domain for one in members)
        if together == len(members):
            return sheet.link
        return min(sheet.link, sheet.network * together)
    places = [tuple(getattr(devices[one], "coords", ())) for one in members]
    extents = [len(set(along)) for along in zip(*places, strict=True)]
    return sheet.link * (sum(min(extent - 1, 2) for extent in extents) or 1)
