"""What the step's compiler is told, by the device; the environment's own flags count more.

TPUs ($LIBTPU_INIT_ARGS). Memory of a core (VMEM): libtpu lets one operation use 16 MiB of it by
default. With more, a matrix product reads its operands less often. The values are what MaxText's
recipes set for v6e and Levanter's notes for v5e and v5p.

Windows: a product whose operand is still to be gathered may be cut into as many as there are
shares, each beside the transfer of the next. Weights that fsdp gathers can travel beside the
layer before instead, and their products stay whole.

GPUs ($XLA_FLAGS). Products that multiply the same array stay apart: where two are joined, their
results are copied out of the joint one, and the gradients into it; the three of attention stand
apart on purpose (gpt.py:Attention).

GPUs of a mesh. The scheduler that hides latency starts a transfer early and computes
until it is there; it is the one flag that NVIDIA's JAX images set. Flags for pipelined collectives,
which JAX 0.10 had, are gone in 0.12, where the compiler decides.

All only change how fast a program is. By libtpu 0.0.52's own cost model a step of llama3_8b takes
a sixth less with more memory, and on 8 v5p chips a fifth less without windows. No device has shown
any of it here.
"""

import os

from jax.sharding import Mesh

from llm.model.sharding import device_kind

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
    """For jax.jit; none of what the environment sets, and none for devices not listed here."""
    kind, options = device_kind(mesh), dict[str, str | bool]()
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
