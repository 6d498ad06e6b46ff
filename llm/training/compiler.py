"""The options of the step's compiler, by device. Flags set in the environment take precedence.

TPUs ($LIBTPU_INIT_ARGS). Memory of a core (VMEM): libtpu lets one operation use 16 MiB of it by
default. With more, a matrix product reads its operands less often. The values are what MaxText's
recipes set for v6e and Levanter's notes for v5e and v5p.

Windows: XLA may cut a product whose operand is still to be gathered into one part for each share,
and compute a part while the next share travels. Weights that fsdp gathers can travel during the
layer before instead, and their products stay whole.

GPUs ($XLA_FLAGS). Products that multiply the same array stay apart: if XLA joins them, it copies
their results out of the joint one and the gradients into it. The three products of attention are
apart on purpose (gpt.py:Attention).

Several GPUs. The scheduler that hides latency starts a transfer early and computes until it is
there; it is the one flag that NVIDIA's JAX images set.

The options only change how fast a program is. benchmarks/README.md has what the compilers' cost
models say of them; no device has been measured here.
"""

import os

from jax.sharding import Mesh

SCOPED_VMEM = "xla_tpu_scoped_vmem_limit_kib"
WINDOWS_FROM = "xla_jf_spmd_threshold_for_windowed_einsum_mib"
# device_kind -> KiB
_VMEM_KIB = {
    "TPU v5 lite": 50000,
    "TPU v5e": 50000,
    "TPU v5": 50000,
    "TPU v5p": 50000,
    "TPU v6 lite": 98304,
    "TPU v6e": 98304,
}
_NO_WINDOWS_MIB = 1_000_000
JOIN_UP_TO = "xla_gpu_dot_merger_threshold_mb"
HIDE_LATENCY = "xla_gpu_enable_latency_hiding_scheduler"


def compiler_options(mesh: Mesh) -> dict[str, str | bool]:
    """For jax.jit: nothing that the environment sets, and nothing for devices not listed here."""
    kind, options = mesh.devices.flat[0].device_kind, dict[str, str | bool]()
    if kind in _VMEM_KIB:
        options[SCOPED_VMEM] = str(_VMEM_KIB[kind])
        if mesh.shape["tensor"] == 1:
            options[WINDOWS_FROM] = str(_NO_WINDOWS_MIB)
    elif kind.startswith("NVIDIA "):
        options[JOIN_UP_TO] = "0"
        if mesh.devices.size > 1:
            options[HIDE_LATENCY] = True
    said = os.environ.get("LIBTPU_INIT_ARGS", "") + os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in options.items() if name not in said}
