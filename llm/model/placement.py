"""Which device stands where in the mesh: neighbours in the mesh are neighbours in the network.

    between   slices of TPUs, or machines of GPUs: a slow network, for data, then fsdp
    within    one slice or machine: fast links, for all other axes

The axes' sizes are settings; `plan --search` compares them. JAX arranges the devices of one slice
(`create_device_mesh`) and of several (`create_hybrid_device_mesh`). An axis that fits no side of a
slice's torus is split over several sides.
"""

import itertools
import math
import operator
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

from llm.errors import UsageError


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
    # Data over as many groups as it can, then fsdp.
    data = math.gcd(sizes["data"], len(groups))
    outer = {"data": data, "fsdp": len(groups) // data}
    if sizes["fsdp"] % outer["fsdp"]:
        product = sizes["data"] * sizes["fsdp"]
        raise UsageError(
            f"mesh.{' x mesh.'.join(outer)} = {sizes['data']} x {sizes['fsdp']} = {product} cannot "
            f"be divided over the {len(groups)} slices or machines of this run ({by}), and only "
            "these two go over the slow network between them; nearest that can: "
            f"{nearest_multiples(product, len(groups))}"
        )
    return mesh_utils.create_hybrid_device_mesh(
        [size // outer.get(axis, 1) for axis, size in sizes.items()],
        [outer.get(axis, 1) for axis in sizes],
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
    number = operator.attrgetter(by)
    in_order = itertools.groupby(sorted(devices, key=number), number)
    return by, [list(group) for _, group in in_order]


def nearest_multiples(size: int, parts: int) -> str:
    """The multiples of `parts` next to a size, for a message: "6 or 9", or "3" if none is below."""
    below, above = size // parts * parts, -(-size // parts) * parts
    return f"{below} or {above}" if below else f"{above}"
