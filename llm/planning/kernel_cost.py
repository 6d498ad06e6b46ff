"""FLOPs of attention kernels, which no compiler counts: their insides are not in a program's text.

Each of a kernel's matrix products costs 2 H FLOPs for each pair of a query and a key in the blocks
that the causal mask does not hide whole. What it is not: their time. Exponentials are left out, and
heads narrower than the matrix unit.

Sources: Dao 2023, "FlashAttention-2" (forward 2 products, backward 5); splash's backward pass is
two kernels, each of which computes scores and their gradients again, which makes 7
(jax/experimental/pallas/ops/tpu/splash_attention, JAX 0.10 to 0.12).
"""

import math

from llm.planning.hlo import Instruction, arrays

# products of a pass: (forward, backward)
PRODUCTS = {"plain": (2, 4), "cudnn": (2, 5), "splash": (2, 7)}
# Kernel's name in the program -> its products. The backward pass's kernels are dq and dkv.
_SPLASH = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


def splash_flops(call: Instruction, shapes: list[str]) -> float:
    """Of one run of a splash kernel with kernels.py's operands; 0 for any other call.

    Every device has queries whose keys are half of all, on average: in the natural order as in the
    zig-zag one.

    Args:
      shapes: types of the operands: tables of blocks among them, then queries [N, T, H] or
        [B, N, T, H], keys and values.
    """
    products = next((n for name, n in _SPLASH.items() if call.name.startswith(name)), 0)
    if not products:
        return 0.0
    found = [array for shape in shapes for array in arrays(shape)]
    tables = [sizes for bits, sizes, _ in found if bits <= 8]
    queries, keys = [sizes for bits, sizes, _ in found if bits > 8 and len(sizes) >= 3][:2]
    block = keys[-2] // tables[0][-1]
    pairs = math.prod(queries[:-1]) * (keys[-2] + block) / 2
    return products * 2.0 * queries[-1] * pairs
