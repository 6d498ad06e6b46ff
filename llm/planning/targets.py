"""What a step is planned for: devices that are here, a slice of TPUs, GPUs that are not here.

TPUs need not be present: their compiler, libtpu, works anywhere (`jax.experimental.topologies`).
That of GPUs, in JAX's CUDA plugin, is not asked: for GPUs that are not here the step is compiled
for as many CPU devices, which gives what does not depend on the compiler.
"""

import dataclasses
import difflib
import importlib.util
import os
import re
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np

from llm.errors import UsageError

# version -> dimensions of its torus, as libtpu 0.0.52 names them
TPU_VERSIONS = {"v2": 2, "v3": 2, "v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}

# libtpu asks the cloud's metadata for the machine it is on, and lets one process a machine have it.
# A compiler needs neither. Its programs cannot be read back from JAX's cache without a TPU.
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

    name: as the person named them. kind: as JAX names one. stands_in: they are CPU devices in the
    place of others, and memory and time are not theirs.
    """

    name: str
    kind: str
    devices: tuple[Any, ...]
    stands_in: bool = False

    @property
    def is_accelerator(self) -> bool:
        return self.kind != "cpu"

    def outline(self, sizes: Mapping[str, int]) -> "Outline":
        """A mesh of the devices that are meant, whatever stands in for them."""
        from llm.model.devices import compute_capability

        meant = Absent(self.kind, compute_capability(self.kind)) if self.stands_in else None
        return Outline(np.array([meant or self.devices[0]], dtype=object), sizes)


@dataclasses.dataclass(frozen=True)
class Absent:
    """A GPU that is not here."""

    device_kind: str
    compute_capability: str
    platform: str = "gpu"


@dataclasses.dataclass(frozen=True)
class Outline:
    """As much of a mesh as the choice of a kernel takes (kernels.py:choose_attention)."""

    devices: np.ndarray
    shape: Mapping[str, int]


def prepare_environment(
    topology: str | None, count: int | None, environment: MutableMapping[str, str] = os.environ
) -> None:
    """What has to be set before JAX starts, in the process that plans.

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


def present() -> Target:
    """The devices that JAX finds."""
    import jax

    devices = tuple(jax.devices())
    kind = devices[0].device_kind
    return Target(f"{len(devices)} x {kind}", kind, devices)


def simulated(kind: str, count: int) -> Target:
    """`count` CPU devices in the place of others.

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
    import jax
    from jax.experimental import topologies

    version = _check_topology(name)
    # One device a chip, as JAX has them on the machines; without it two halves.
    options = {"chip_config_name": "megacore"} if version == "v4" else {}
    try:
        described = topologies.get_topology_desc(name, platform="tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        raise UsageError(
            f"--topology {name}: the TPU compiler does not know it ({_first_line(error)}); slices "
            "of more than one chip are made of hosts of 2x2 chips, as v5p:4x4x4 or v5e:16x16"
        ) from None
    devices: tuple[Any, ...] = tuple(described.devices)
    return Target(name, devices[0].device_kind, devices)


def _check_topology(name: str) -> str:
    """The version that the name begins with."""
    version, colon, shape = name.partition(":")
    if version not in TPU_VERSIONS:
        near = difflib.get_close_matches(version, TPU_VERSIONS, 2, 0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UsageError(
            f"--topology {name}: there is no TPU {version!r}; {hint}expected one of "
            f"{', '.join(TPU_VERSIONS)} and its shape in chips, such as v5p:4x4x4 or v5e:16x16"
        )
    if not colon or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        example = "x".join(["4"] * TPU_VERSIONS[version])
        raise UsageError(
            f"--topology {name}: {shape!r} is no shape; expected the chips along each side, such "
            f"as {version}:{example}"
        )
    return version


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0][:200]
