"""What one device can do at most, measured: products of matrices, and reading of memory.

These are what a step and a decoded token are held against. A data sheet gives more than a device
ever does, and of a shared CPU it says nothing.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llm.measure.timing import time_turns

# Side of the square matrices, and the FLOPs of one call, so many that the call itself costs nothing
# beside them: on a CPU, and on an accelerator.
_CPU_SIDES, _CPU_FLOPS = (512, 1024, 2048), 2**34
_SIDES, _FLOPS = (2048, 4096, 8192), 2**42
_TURNS = 5


def matmul_peak(dtype: str) -> float:
    """FLOP/s of the best square matrix product, 2 n^3 FLOPs each, on the first device."""
    on_cpu = jax.default_backend() == "cpu"
    sides, flops = (_CPU_SIDES, _CPU_FLOPS) if on_cpu else (_SIDES, _FLOPS)
    return max(_matmul_rate(side, dtype, flops) for side in sides)


def read_bandwidth() -> float:
    """Bytes/s at which the first device reads memory, by the best of what a decoded token does.

    A sum of one array, and a matrix times a vector; both read everything once and write next to
    nothing. The array is larger than any cache.
    """
    on_cpu = jax.default_backend() == "cpu"
    rows, columns = (32_768, 2_048) if on_cpu else (262_144, 2_048)
    matrix = jnp.ones((rows, columns), jnp.float32)
    vector = jnp.ones((columns,), jnp.float32)
    readers = [
        functools.partial(jax.jit(jnp.sum), matrix),
        functools.partial(jax.jit(jnp.matmul), matrix, vector),
        functools.partial(jax.jit(jnp.matmul), jnp.ones((rows,)), matrix),
    ]
    return matrix.nbytes / min(_seconds(read) for read in readers)


def _seconds(computation: Callable[[], jax.Array]) -> float:
    return time_turns(lambda: computation().block_until_ready(), _TURNS).fastest


def _matmul_rate(side: int, dtype: str, flops: int) -> float:
    keys = jax.random.split(jax.random.key(0))
    # Numbers, not a permutation: a GPU multiplies zeros faster, since it draws less power. Scaled
    # so that a product of many neither grows nor vanishes: eigenvalues within the unit circle.
    x, weight = (jax.random.normal(key, (side, side), dtype) for key in keys)
    weight = weight * side**-0.5
    count = max(1, flops // (2 * side**3))

    @jax.jit
    def products(x, weight):
        return jax.lax.fori_loop(0, count, lambda _, y: y @ weight, x)

    return 2.0 * side**3 * count / _seconds(lambda: products(x, weight))
