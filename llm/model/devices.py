"""What a device can do at most: arithmetic, memory, links. From the makers' data sheets.

A device that is not here has no peak, and what follows from one (MFU, a planned time) is null: a
wrong number would be worse.

Sources: NVIDIA's data sheets of each product; Google's pages of each TPU version
(https://cloud.google.com/tpu/docs/system-architecture-tpu-vm). The rate of one TPU link: Austin
et al. 2025, "How to Scale Your Model" (https://jax-ml.github.io/scaling-book), chapter 2; for v2
and v3 Jouppi et al. 2020, "A Domain-Specific Supercomputer".
"""

import dataclasses
import difflib
import re

import jax

from llm.errors import UsageError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Sheet:
    """One device, as JAX counts devices: of a TPU v2, v3 or 7x half a chip.

    bfloat16_flops: dense FLOP/s with float32 accumulation, without sparsity.
    memory: bytes. memory_bandwidth: bytes/s.
    link: bytes/s that go out of a device. On GPUs to all others of its domain together; on TPUs
      over one link, of which a chip has two along each dimension of the torus.
    domain: GPUs that are joined by these links; of TPUs 0, a whole slice is.
    network: bytes/s out of a device to other domains.
    clock: Hz, where compilers count cycles: bfloat16_flops / (2 x multipliers of its matrix units).
    """

    bfloat16_flops: float
    memory: int
    memory_bandwidth: float
    link: float
    domain: int = 0
    network: float = 0.0
    clock: float | None = None


# A machine of one HGX board: 8 GPUs, a 400 Gbit/s network card for each (NVIDIA DGX H100, B200); of
# A100s 200 Gbit/s. NVLink is stated for both directions; here it is half of that.
def _hgx(flops: float, gib: int, bandwidth: float, nvlink: float, network: float = 50e9) -> Sheet:
    return Sheet(flops, gib * GIB, bandwidth, nvlink / 2, domain=8, network=network)


# On PCIe, x16, generation 4 (32 GB/s) or 5 (64 GB/s) each way; bridges between pairs not counted.
def _pcie(flops: float, gib: int, bandwidth: float, link: float = 32e9) -> Sheet:
    return Sheet(flops, gib * GIB, bandwidth, link, domain=8, network=12.5e9)


# A name covers what begins with it and goes on with a new word, and the longest wins: "NVIDIA H100
# 80GB HBM3" is an H100, "NVIDIA L40" is no L4.
SHEETS = {
    "NVIDIA A100": _hgx(312e12, 80, 2.039e12, 600e9, 25e9),
    "NVIDIA A100-SXM4-40GB": _hgx(312e12, 40, 1.555e12, 600e9, 25e9),
    "NVIDIA A100-PCIE-40GB": _pcie(312e12, 40, 1.555e12),
    "NVIDIA H100 PCIe": _pcie(756e12, 80, 2.0e12, 64e9),
    "NVIDIA H100 NVL": _pcie(835e12, 94, 3.9e12, 64e9),
    "NVIDIA H100": _hgx(989e12, 80, 3.35e12, 900e9),
    "NVIDIA H200 NVL": _pcie(835e12, 141, 4.8e12, 64e9),
    "NVIDIA H200": _hgx(989e12, 141, 4.8e12, 900e9),
    "NVIDIA GH200": Sheet(989e12, 96 * GIB, 4.0e12, 50e9, domain=1, network=50e9),
    "NVIDIA B200": _hgx(2250e12, 180, 7.7e12, 1800e9),
    "NVIDIA L40S": _pcie(362e12, 48, 0.864e12),
    "NVIDIA L40": _pcie(181e12, 48, 0.864e12),
    "NVIDIA L4": _pcie(121e12, 24, 0.300e12),
    "NVIDIA A10G": _pcie(70e12, 24, 0.600e12),
    "NVIDIA GeForce RTX 4090": _pcie(165e12, 24, 1.008e12),
    "NVIDIA GeForce RTX 3090 Ti": _pcie(80e12, 24, 1.008e12),
    "NVIDIA GeForce RTX 3090": _pcie(71e12, 24, 0.936e12),
    "TPU v2": Sheet(22.5e12, 8 * GIB, 0.35e12, 31e9, clock=0.7e9),
    "TPU v3": Sheet(61.5e12, 16 * GIB, 0.45e12, 41e9, clock=0.94e9),
    "TPU v4": Sheet(275e12, 32 * GIB, 1.2e12, 45e9, clock=1.05e9),
    "TPU v5 lite": Sheet(197e12, 16 * GIB, 0.81e12, 45e9, clock=1.5e9),
    "TPU v5e": Sheet(197e12, 16 * GIB, 0.81e12, 45e9, clock=1.5e9),
    "TPU v5p": Sheet(459e12, 95 * GIB, 2.765e12, 90e9, clock=1.75e9),
    "TPU v5": Sheet(459e12, 95 * GIB, 2.765e12, 90e9, clock=1.75e9),
    "TPU v6 lite": Sheet(918e12, 32 * GIB, 1.6e12, 90e9, clock=1.75e9),
    "TPU v6e": Sheet(918e12, 32 * GIB, 1.6e12, 90e9, clock=1.75e9),
    "TPU7x": Sheet(1153.5e12, 96 * GIB, 3.69e12, 50e9),
}

# Words in a device's name that mean less than the whole chip of that name, by an amount not listed.
_PARTIAL = ("MIG", "Laptop", "Max-Q", "D")


def sheet_of(kind: str) -> Sheet | None:
    """The data sheet of a device by the name that JAX gives its kind; None where there is none."""
    names = [name for name in SHEETS if re.match(rf"{re.escape(name)}(?![\w.])", kind)]
    if not names or any(word in _PARTIAL for word in kind.split()):
        return None
    return SHEETS[max(names, key=len)]


def peak_flops(device: jax.Device) -> float | None:
    """Dense bfloat16 FLOP/s of one device, or None when unknown."""
    sheet = sheet_of(device.device_kind)
    return sheet.bfloat16_flops if sheet else None


# CUDA's compute capability, which kernels ask for (https://developer.nvidia.com/cuda-gpus).
_CAPABILITIES = {
    "8.0": ("A100",),
    "8.6": ("A10G", "RTX 3090"),
    "8.9": ("L4", "L40", "L40S", "RTX 4090"),
    "9.0": ("H100", "H200", "GH200"),
    "10.0": ("B200",),
}


def compute_capability(kind: str) -> str:
    """Of an NVIDIA GPU that has a data sheet; "" of any other device."""
    name = kind.removeprefix("NVIDIA ").removeprefix("GeForce ")
    for capability, names in _CAPABILITIES.items():
        if any(re.match(rf"{one}(?![\w.])", name) for one in names):
            return capability
    return ""


def find_kind(name: str) -> str:
    """The full name of a device that a person wrote short: "h100" is "NVIDIA H100".

    Raises:
      UsageError: no such device, with the nearest names.
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
