"""What the step's compiler is told about TPUs, beside what $LIBTPU_INIT_ARGS says.

Memory of a core (VMEM): libtpu lets one operation use 16 MiB of it by default. With more, a matrix
product reads its operands less often. The values are what MaxText's recipes set for v6e and
Levanter's notes for v5e and v5p.

Windows: a product whose operand is still to be gathered may be cut into as many as there are
shares, each beside the transfer of the next. Weights that fsdp gathers can travel beside the
layer before instead, and their products stay whole.

Both only change how fast a program is. By libtpu 0.0.52's own cost model a step of llama3_8b takes
a sixth less with the first, and on 8 v5p chips a fifth less with the second. No device has shown it
here.
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


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """For jax.jit; none of what $LIBTPU_INIT_ARGS sets, and none for devices not listed here."""
    kib = _VMEM_KIB.get(mesh.devices.flat[0].device_kind)
    if kib is None:
        return {}
    options = {SCOPED_VMEM: str(kib)}
    if mesh.shape["tensor"] == 1:
        options[WINDOWS_FROM] = str(_NO_WINDOWS_MIB)
    said = os.environ.get("LIBTPU_INIT_ARGS", "")
    return {name: value for name, value in options.items() if name not in said}
