"""Memory, bandwidth, links and clock of each device, from the makers' data sheets.

The peak of arithmetic is in llm/model/flops.py. A device that has no sheet here has no planned
memory and time: a wrong number would be worse.

Sources: NVIDIA's data sheets of each product and CUDA's list of compute capabilities
(https://developer.nvidia.com/cuda-gpus); Google's pages of each TPU version
(https://cloud.google.com/tpu/docs/system-architecture-tpu-vm). The rate of one TPU link: Austin
et al. 2025, "How to Scale Your Model" (https://jax-ml.github.io/scaling-book), chapter 2; for v2
and v3 Jouppi et al. 2020, "A Domain-Specific Supercomputer".
"""

import dataclasses
import difflib
import re

from llm.errors import UsageError
from llm.model.flops import listed_name

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Sheet:
    """One device, as JAX counts devices: half a chip for TPU v2, v3 and 7x.

    memory_gib: its memory. memory_bandwidth: bytes/s.
    link: bytes/s that go out of a device. On GPUs to all others of its domain together; on TPUs
      over one link, and a chip has two along each dimension of the torus.
    domain: number of GPUs that these links join; 0 for TPUs, whose links join a whole slice.
    network: bytes/s out of a device to other domains.
    clock: Hz, for compilers that count cycles: peak FLOP/s / (2 x multipliers of its matrix units).
    capability: of a GPU, CUDA's compute capability, by which kernels are chosen.
    """

    memory_gib: int
    memory_bandwidth: float
    link: float
    domain: int = 0
    network: float = 0.0
    clock: float | None = None
    capability: str = ""


# A machine of one HGX board: 8 GPUs, each with a network card of 400 Gbit/s (NVIDIA DGX H100, B200)
# or 200 Gbit/s (A100). NVLink is stated for both directions; a link here is one direction.
def _hgx(gib: int, rate: float, nvlink: float, capability: str, network: float = 50e9) -> Sheet:
    return Sheet(gib, rate, nvlink / 2, 8, network, capability=capability)


# On PCIe x16 of generation 4 (32 GB/s) or 5 (64 GB/s) each way; bridges between pairs not counted.
def _pcie(gib: int, rate: float, capability: str, link: float = 32e9) -> Sheet:
    return Sheet(gib, rate, link, 8, 12.5e9, capability=capability)


# The name that a device's kind begins with: see listed_name.
SHEETS = {
    "NVIDIA A100": _hgx(80, 2.039e12, 600e9, "8.0", 25e9),
    "NVIDIA A100-SXM4-40GB": _hgx(40, 1.555e12, 600e9, "8.0", 25e9),
    "NVIDIA A100-PCIE-40GB": _pcie(40, 1.555e12, "8.0"),
    "NVIDIA H100 PCIe": _pcie(80, 2.0e12, "9.0", 64e9),
    "NVIDIA H100 NVL": _pcie(94, 3.9e12, "9.0", 64e9),
    "NVIDIA H100": _hgx(80, 3.35e12, 900e9, "9.0"),
    "NVIDIA H200 NVL": _pcie(141, 4.8e12, "9.0", 64e9),
    "NVIDIA H200": _hgx(141, 4.8e12, 900e9, "9.0"),
    "NVIDIA GH200": Sheet(96, 4.0e12, 50e9, 1, 50e9, capability="9.0"),
    "NVIDIA B200": _hgx(180, 7.7e12, 1800e9, "10.0"),
    "NVIDIA L40S": _pcie(48, 0.864e12, "8.9"),
    "NVIDIA L40": _pcie(48, 0.864e12, "8.9"),
    "NVIDIA L4": _pcie(24, 0.300e12, "8.9"),
    "NVIDIA A10G": _pcie(24, 0.600e12, "8.6"),
    "NVIDIA GeForce RTX 4090": _pcie(24, 1.008e12, "8.9"),
    "NVIDIA GeForce RTX 3090 Ti": _pcie(24, 1.008e12, "8.6"),
    "NVIDIA GeForce RTX 3090": _pcie(24, 0.936e12, "8.6"),
    "TPU v2": Sheet(8, 0.35e12, 31e9, clock=0.7e9),
    "TPU v3": Sheet(16, 0.45e12, 41e9, clock=0.94e9),
    "TPU v4": Sheet(32, 1.2e12, 45e9, clock=1.05e9),
    "TPU v5 lite": Sheet(16, 0.81e12, 45e9, clock=1.5e9),
    "TPU v5e": Sheet(16, 0.81e12, 45e9, clock=1.5e9),
    "TPU v5p": Sheet(95, 2.765e12, 90e9, clock=1.75e9),
    "TPU v5": Sheet(95, 2.765e12, 90e9, clock=1.75e9),
    "TPU v6 lite": Sheet(32, 1.6e12, 90e9, clock=1.75e9),
    "TPU v6e": Sheet(32, 1.6e12, 90e9, clock=1.75e9),
    "TPU7x": Sheet(96, 3.69e12, 50e9),
}


def sheet_of(kind: str) -> Sheet | None:
    """The data sheet of a device by the name that JAX gives its kind; None if it is not here."""
    name = listed_name(kind, SHEETS)
    return SHEETS[name] if name else None


def find_kind(name: str) -> str:
    """The full name of a device that a person wrote short: "h100" is "NVIDIA H100".

    Raises:
      UsageError: no such device; names the nearest.
    """
    short = {_short(kind): kind for kind in SHEETS}
    if _short(name) in short:
        return short[_short(name)]
    near = difflib.get_close_matches(_short(name), short, 3, 0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UsageError(
        f"--device {name}: no such device; {hint}expected cpu or one of {', '.join(short)}"
    )


def _short(kind: str) -> str:
    plain = re.sub(r"^(nvidia|tpu)[ -]?", "", kind.lower().strip())
    return re.sub(r"[ _-]+", "-", plain.removeprefix("geforce "))
