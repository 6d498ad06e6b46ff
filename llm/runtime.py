"""What a process sets once, before JAX starts: memory allocation and the compilation cache.

The one place for settings of the machine below the program. Commands call `prepare_process` first.
"""

import ctypes
import os
import sys
from pathlib import Path

# glibc's <malloc.h>
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8
_NEVER = -1

# GPUs only; the CPU and TPU backends repeat bit for bit as they are. The first turns off the search
# for the fastest kernel of each product, without which XLA has none for those that it would write
# in Triton ("No supported config found", jax 0.11): the second leaves them all to cuBLAS.
_DETERMINISTIC = ("--xla_gpu_deterministic_ops=true", "--xla_gpu_enable_triton_gemm=false")


def prepare_process(deterministic: bool = False) -> None:
    """Set up this process for JAX; call before JAX is imported.

    Args:
      deterministic: ask the backend for bitwise repetition, at some cost of speed.
    """
    keep_freed_memory()
    if deterministic:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = " ".join([flags, *_DETERMINISTIC]).strip()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_dir() / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    # Programs compiled ahead of time for the CPU log a harmless difference of feature lists.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def keep_freed_memory() -> None:
    """Let glibc keep every buffer that XLA frees after a step on CPU, whatever its size.

    By default it returns them to the kernel, and the next step faults every page in again: a
    training step of 4 layers x 128 took 45.8 ms so and 32.5 ms with this, one of 6 x 384, whose
    temporaries are a single buffer of 1.2 GiB, 2190 ms and 1870 ms (2-core EPYC, jax 0.12,
    2026-11).
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none
        libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
        libc.mallopt(_M_MMAP_MAX, 0)
        # Other arenas than the first cannot hold a large buffer: they would map it after all.
        libc.mallopt(_M_ARENA_MAX, 1)


def cache_dir(configured: str = "") -> Path:
    """Where shards, downloads and compiled programs are kept: the setting, $LLM_CACHE_DIR, or
    ~/.cache/llm."""
    chosen = configured or os.environ.get("LLM_CACHE_DIR") or "~/.cache/llm"
    return Path(chosen).expanduser()
