"""What one device can do at most: products of matrices, and reading of memory.

The bench compares a training step and a decoded token with these measured limits. A data sheet
promises more than a device ever reaches, and says nothing about a shared CPU.
"""

import functools
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

# Sides of the square matrices, and FLOPs of one call, on a CPU and on an accelerator: enough FLOPs
# to make the cost of the call negligible.
_CPU_SIDES, _CPU_FLOPS = (512, 1024, 2048), 2**34
_SIDES, _FLOPS = (2048, 4096, 8192), 2**42
_TURNS = 5


def measure_machine(mesh: Mesh, dtype: str) -> dict[str, Any]:
    """The devices of a mesh, and the limits of its first device.

    Returns:
      matmul_flops: see `matmul_peak`.
      read_bytes_per_second: see `read_bandwidth`.
    """
    device = mesh.devices.flat[0]
    return {
        "device": device.device_kind,
        "devices": mesh.size,
        "mesh": {name: size for name, size in mesh.shape.items() if size > 1},
        "platform": device.platform,
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "compute_dtype": dtype,
        "jax": jax.__version__,
        "matmul_flops": matmul_peak(dtype),
        "read_bytes_per_second": read_bandwidth(),
    }


def time_turns(turn: Callable[[], object], turns: int, warm_up: int = 1) -> list[float]:
    """The seconds of each of `turns` calls, after `warm_up` calls that do not count.

    Args:
      turn: returns when its work is done; a turn that gives work to a device waits for it.
    """
    seconds = []
    for _ in range(warm_up + turns):
        start = time.perf_counter()
        turn()
        seconds.append(time.perf_counter() - start)
    return seconds[warm_up:]


def matmul_peak(dtype: str) -> float:
    """FLOP/s of the best square matrix product, 2 n^3 FLOPs each, on the first device."""
    on_cpu = jax.default_backend() == "cpu"
    sides, flops = (_CPU_SIDES, _CPU_FLOPS) if on_cpu else (_SIDES, _FLOPS)
    return max(_matmul_rate(side, dtype, flops) for side in sides)


def read_bandwidth() -> float:
    """Bytes/s at which the first device reads memory: the fastest of three readers.

    The readers sum a matrix, and multiply it with a vector from either side, as decoding a token
    does. Each reads the matrix once, which is larger than any cache, and writes next to nothing.
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
    return min(time_turns(lambda: computation().block_until_ready(), _TURNS))


def _matmul_rate(side: int, dtype: str, flops: int) -> float:
    keys = jax.random.split(jax.random.key(0))
    # Random numbers, because a GPU multiplies zeros faster: zeros draw less power. The scale puts
    # the eigenvalues within the unit circle, so that a long product neither grows nor vanishes.
    x, weight = (jax.random.normal(key, (side, side), dtype) for key in keys)
    weight = weight * side**-0.5
    count = max(1, flops // (2 * side**3))

    @jax.jit
    def products(x, weight):
        # With a float32 result, which a CPU's units give; one in bfloat16 is half as fast.
        product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
        return jax.lax.fori_loop(0, count, lambda _, y: product(y, weight).astype(dtype), x)

    return 2.0 * side**3 * count / _seconds(lambda: products(x, weight))
