"""The devices a step is planned for: those that are here, a slice of TPUs, or absent GPUs.

TPUs need not be present, because their compiler, libtpu, works anywhere
(`jax.experimental.topologies`). For GPUs that are not here the step is compiled for as many CPU
devices, which gives what does not depend on the compiler.
"""

import dataclasses
import difflib
import importlib.util
import os
import re
import sys
from collections.abc import Mapping, MutableMapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from llm.errors import UsageError

# version -> a shape of as many dimensions as its torus has. The names are libtpu's.
_SHAPES = dict.fromkeys(("v4", "v5p", "tpu7x"), "4x4x4")
_SHAPES |= dict.fromkeys(("v2", "v3", "v5e", "v6e"), "4x4")

# libtpu asks the cloud's metadata which machine this is, and lets one process of a machine load it.
# A compiler needs neither. JAX's cache cannot read its programs back without a TPU.
_LIBTPU_ENVIRONMENT = {
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices of a plan.

    name: as the person named them. kind: as JAX names one. stands_in: they are CPU devices in place
    of others, whose memory and time are different.
    """

    name: str
    kind: str
    devices: tuple[Any, ...]
    stands_in: bool = False

    def outline(self, sizes: Mapping[str, int]) -> Any:
        """A mesh of the devices that are meant, as far as the choice of a kernel needs it."""
        from llm.planning.devices import SHEETS

        meant = self.devices[0]
        if self.stands_in:
            meant = SimpleNamespace(device_kind=self.kind, platform="gpu")
            meant.compute_capability = SHEETS[self.kind].capability
            memories = [SimpleNamespace(kind=kind) for kind in ("device", "pinned_host")]
            meant.addressable_memories = lambda: memories
        return SimpleNamespace(devices=np.array([meant], dtype=object), shape=sizes)


def prepare_environment(
    topology: str | None, count: int | None, environment: MutableMapping[str, str] = os.environ
) -> None:
    """Set what JAX reads when it starts, in the process that plans.

    Raises:
      UsageError: libtpu is needed and missing.
    """
    if topology:
        if not importlib.util.find_spec("libtpu"):
            raise UsageError(
                f"--topology {topology} needs the TPU compiler, libtpu, which is not installed: "
                "pip install '.[plan]'"
            )
        for key, value in _LIBTPU_ENVIRONMENT.items():
            environment.setdefault(key, value)
    if topology or count:
        environment["JAX_PLATFORMS"] = "cpu"
    if count and "jax" not in sys.modules:
        flags = environment.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}".strip()


def find_target(topology_: str, device: str, count: int | None) -> Target:
    """A slice of TPUs, `count` devices of a kind, or the devices that JAX finds.

    Raises:
      UsageError: no such device or topology.
    """
    import jax

    from llm.model.sharding import local_devices
    from llm.planning.devices import find_kind

    if topology_:
        return topology(topology_)
    if count is not None:
        return simulated("cpu" if device == "cpu" else find_kind(device), count)
    local_devices()
    devices = tuple(jax.devices())
    kind = devices[0].device_kind
    return Target(f"{len(devices)} x {kind}", kind, devices)


def simulated(kind: str, count: int) -> Target:
    """`count` CPU devices in place of others.

    Args:
      kind: a full name of devices.py, or "cpu".
    Raises:
      UsageError: this process started JAX with fewer.
    """
    import jax

    devices = tuple(jax.devices("cpu"))
    if len(devices) < count:
        raise UsageError(
            f"--devices {count}: this process has {len(devices)} CPU devices to stand for them; "
            f"set XLA_FLAGS=--xla_force_host_platform_device_count={count} before JAX starts"
        )
    return Target(f"{count} x {kind}", kind, devices[:count], stands_in=kind != "cpu")


def topology(name: str) -> Target:
    """A slice of TPUs such as v5p:4x4x4, from their compiler.

    Raises:
      UsageError: no such version or shape.
    """
    version, _, shape = name.partition(":")
    if version not in _SHAPES:
        near = difflib.get_close_matches(version, _SHAPES, 2, 0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UsageError(
            f"--topology {name}: there is no TPU {version!r}; {hint}expected one of "
            f"{', '.join(sorted(_SHAPES))} and its shape in chips, such as v5p:4x4x4 or v5e:16x16"
        )
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        raise UsageError(
            f"--topology {name}: {shape!r} is no shape; expected the chips along each side, such "
            f"as {version}:{_SHAPES[version]}"
        )
    import jax
    from jax.experimental import topologies

    # One device per chip, as JAX has them on the machines; without it a chip is two devices.
    options = {"chip_config_name": "megacore"} if version == "v4" else {}
    try:
        described = topologies.get_topology_desc(name, platform="tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        raise UsageError(
            f"--topology {name}: unknown to the TPU compiler ({str(error).splitlines()[0][:200]}); "
            "slices of more than one chip are made of hosts of 2x2 chips, as v5p:4x4x4 or v5e:16x16"
        ) from None
    devices: tuple[Any, ...] = tuple(described.devices)
    return Target(name, devices[0].device_kind, devices)
