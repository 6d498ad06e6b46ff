"""The least time that links need for a program's collectives: one of three bounds of a step.

    compute   FLOPs / the device's peak
    memory    bytes / the bandwidth of its memory
    links     for each collective, the bytes that a device has to send / the bandwidth of its links

The longest of the three is the least time of a step. A real step takes longer: arithmetic, memory
and links never all work at once and at their full rates. Arithmetic.roofline (estimate.py) gives
all three. Source: Williams et al. 2009, "Roofline".
"""

from collections.abc import Sequence

import jax

from llm.planning.collectives import Collective
from llm.planning.devices import Sheet


def link_seconds(one: Collective, sheet: Sheet, devices: Sequence[jax.Device]) -> float:
    """Seconds of all runs of one collective over n devices, for b bytes of the whole array:

        all-gather, reduce-scatter, all-to-all   b (n - 1) / n
        all-reduce                               2 b (n - 1) / n
        collective-permute                       b

    over the bandwidth out of one device: the least that any algorithm sends (Thakur et al. 2005).

    Args:
      devices: in the order of the mesh.
    """
    share = (one.group - 1) / one.group
    sent = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(one.kind, share) * one.bytes
    return one.count * sent / bandwidth(one.members, sheet, devices)


def bandwidth(members: Sequence[int], sheet: Sheet, devices: Sequence[jax.Device]) -> float:
    """Bytes/s that each device of a group sends to the others.

    GPUs: its links if the group lies within one domain. Otherwise the group's devices in one domain
    share the work of crossing the network.
    TPUs: two links along each dimension of the torus over which the group extends, or one if it is
    two devices long there.
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
