"""Which device stands where in the mesh: neighbours in the mesh are neighbours in the network.

    between   slices of TPUs, or machines of GPUs: a slow network, for data, then fsdp
    within    one slice or machine: fast links, for all other axes

What it is not: a choice of the axes' sizes. The sizes are settings, and `plan --search` compares
them. JAX arranges the devices of one slice (`jax.make_mesh`) and of several
(`create_hybrid_device_mesh`).
"""

import collections
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

from llm.errors import UsageError

# From the slowest network to the fastest.
BETWEEN = ("data", "fsdp")


def place(sizes: Mapping[str, int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices as an array with one axis for each axis of the mesh.

    Args:
      sizes: mesh axis -> devices along it; they multiply to the number of devices.
    Raises:
      UsageError: slices or machines of different sizes, or data x fsdp no multiple of their number.
    """
    by, groups = network_groups(devices)
    shape = list(sizes.values())
    if len(groups) == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if len({len(group) for group in groups}) > 1:
        counts = ", ".join(str(len(group)) for group in groups)
        raise UsageError(
            f"the {len(groups)} slices or machines of this run ({by}) are not of one size: found "
            f"{counts} devices; start it on the same number of devices of each"
        )
    if len(groups[0]) == 1:
        # No two devices are near each other.
        return np.array(devices, dtype=object).reshape(shape)
    outer = _between(sizes, len(groups), by)
    inner = [size // outside for size, outside in zip(shape, outer, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(
        inner,
        outer,
        devices,
        process_is_granule=by == "process_index",
        allow_split_physical_axes=True,
    )


def network_groups(devices: Sequence[jax.Device]) -> tuple[str, list[list[jax.Device]]]:
    """The attribute that numbers the groups, and the devices of each TPU slice or GPU machine.

    JAX numbers slices and machines by slice_index. GPUs without one are grouped by their processes;
    other devices without one are one group.
    """
    by = "slice_index"
    if any(getattr(device, by, None) is None for device in devices):
        if any(device.platform != "gpu" for device in devices):
            return "", [list(devices)]
        by = "process_index"
    found: dict[int, list[jax.Device]] = collections.defaultdict(list)
    for device in devices:
        found[getattr(device, by)].append(device)
    return by, [found[number] for number in sorted(found)]


def _between(sizes: Mapping[str, int], groups: int, by: str) -> list[int]:
    """How many groups each axis is divided over: data over as many as it can, then fsdp."""
    data = math.gcd(sizes["data"], groups)
    if sizes["fsdp"] * data % groups:
        product = sizes["data"] * sizes["fsdp"]
        raise UsageError(
            f"mesh.{' x mesh.'.join(BETWEEN)} = {sizes['data']} x {sizes['fsdp']} = {product} "
            f"cannot be divided over the {groups} slices or machines of this run ({by}), and only "
            f"these two go over the slow network between them; nearest that can: "
            f"{nearest_multiples(product, groups)}"
        )
    outer = {"data": data, "fsdp": groups // data}
    return [outer.get(axis, 1) for axis in sizes]


def nearest_multiples(size: int, parts: int) -> str:
    """The multiples of `parts` around a size, for a message: "6 or 9"; the first has no other."""
    below, above = size // parts * parts, -(-size // parts) * parts
    return f"{below} or {above}" if below else f"{above}"
