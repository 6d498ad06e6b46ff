"""What a process sets before JAX starts: memory allocation and the compilation cache.

This is the one place for settings of the machine below the program. A command calls
`prepare_process` first.
"""

import contextlib
import ctypes
import functools
import os
import sys
from pathlib import Path

# glibc's <malloc.h>
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8
_NEVER = -1

# For GPUs; the CPU and TPU backends repeat bit for bit without flags. The first flag turns off the
# search for the fastest kernel of each product. Without that search XLA finds no kernel for the
# products that it would write in Triton, so the second flag leaves all products to cuBLAS.
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
    with contextlib.suppress(RuntimeError):  # no home: compiled programs are not kept
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_dir() / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    # Cached programs for the CPU log a harmless difference between two lists of CPU features.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def keep_freed_memory() -> None:
    """Let glibc keep every buffer that XLA frees after a step on CPU, whatever its size.

    By default glibc returns freed buffers to the kernel, and the next step faults every page in
    again, which took up to a third of a small training step.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none
        libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
        libc.mallopt(_M_MMAP_MAX, 0)
        # Only the first arena can hold a large buffer; any other arena would map it after all.
        libc.mallopt(_M_ARENA_MAX, 1)


@functools.cache
def has_bfloat16_units() -> bool:
    """Whether this CPU has AVX512_BF16 or AMX_BF16; False where Linux does not say."""
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and bool({"avx512_bf16", "amx_bf16"} & set(cpu.read_text().split()))


def cache_dir(configured: str = "") -> Path:
    """The folder of shards, downloads and compiled programs: the setting, $LLM_CACHE_DIR, or
    ~/.cache/llm.

    Raises:
      RuntimeError: it begins with ~, and there is no such user or no home.
    """
    chosen = configured or os.environ.get("LLM_CACHE_DIR") or "~/.cache/llm"
    return Path(chosen).expanduser()
