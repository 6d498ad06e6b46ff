"""What a process sets before JAX starts, and where it keeps what it prepares."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.commands import run_command
from llm.errors import UsageError
from llm.runtime import _DETERMINISTIC, cache_dir, keep_freed_memory, prepare_process
from llm.text.cache import cache_root

VARIABLES = (
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
    "TF_CPP_MIN_LOG_LEVEL",
    "XLA_FLAGS",
)


@pytest.fixture
def environment(monkeypatch):
    """The variables unset, and put back afterwards."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "to be put back")
        monkeypatch.delenv(name)
    return monkeypatch


def test_the_cache_is_the_setting_then_the_variable_then_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LLM_CACHE_DIR", raising=False)
    assert cache_dir() == tmp_path / "home" / ".cache" / "llm"
    monkeypatch.setenv("LLM_CACHE_DIR", "~/elsewhere")
    assert cache_dir() == tmp_path / "home" / "elsewhere"
    assert cache_dir(str(tmp_path)) == tmp_path


def test_compiled_programs_are_kept_in_the_cache(environment, tmp_path):
    environment.setenv("LLM_CACHE_DIR", str(tmp_path))
    prepare_process()
    assert Path(os.environ["JAX_COMPILATION_CACHE_DIR"]) == tmp_path / "xla"
    assert float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]) < 1.0


def test_without_a_home_compiled_programs_are_not_kept_and_a_cache_has_to_be_named(
    environment,
):
    """A container's user that no file of users knows."""
    environment.delenv("LLM_CACHE_DIR", raising=False)
    environment.delenv("HOME")
    environment.setattr(os, "getuid", lambda: 4_000_000)
    prepare_process()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    with pytest.raises(UsageError, match=r"home directory .* not known.*set data.cache_dir"):
        cache_root("")
    environment.setenv("LLM_CACHE_DIR", "~nobodyknown/x")
    with pytest.raises(UsageError, match=r"set data.cache_dir"):
        cache_root("")


def test_what_the_user_set_stays(environment):
    for name in VARIABLES[:3]:
        environment.setenv(name, "7")
    prepare_process()
    assert [os.environ[name] for name in VARIABLES[:3]] == ["7"] * 3


def test_deterministic_adds_to_the_users_flags(environment):
    prepare_process()
    assert "XLA_FLAGS" not in os.environ
    environment.setenv("XLA_FLAGS", "--xla_users_own=1")
    prepare_process(deterministic=True)
    assert os.environ["XLA_FLAGS"].split() == [
        "--xla_users_own=1",
        "--xla_gpu_deterministic_ops=true",
        "--xla_gpu_enable_triton_gemm=false",
    ]


def test_the_compiler_knows_what_deterministic_asks_for():
    flags = [flag.removeprefix("--").split("=") for flag in _DETERMINISTIC]
    options = {name: value == "true" for name, value in flags}
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2


def test_preparing_imports_no_jax():
    program = "import sys; from llm.runtime import prepare_process; prepare_process(); "
    program += "sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept():
    """A buffer of 1.2 GiB, freed and allocated again, touches its pages for the first time once.

    In a thread, as XLA does it: a thread has an arena of its own, which holds no large buffers.
    """
    program = """
import ctypes, resource, sys, threading
from llm.runtime import keep_freed_memory
libc = ctypes.CDLL(None)
if not hasattr(libc, "mallopt"):
    sys.exit(0)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
size = 1200 << 20
faults = []
def use_a_buffer():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffer = libc.malloc(size)
    ctypes.memset(buffer, 1, size)
    libc.free(buffer)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
keep_freed_memory()
for _ in range(2):
    thread = threading.Thread(target=use_a_buffer)
    thread.start()
    thread.join()
sys.exit(f"faults: {faults}" if faults[1] > 100 else 0)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_keeping_memory_is_linux_only(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("llm.runtime.ctypes.CDLL", lambda *_: pytest.fail("touched the C library"))
    keep_freed_memory()


@pytest.mark.parametrize(
    "take",
    [lambda: jnp.ones(2**46).block_until_ready(), lambda: np.ones(2**46)],
    ids=["of the device", "of the machine"],
)
def test_too_little_memory_is_answered_with_what_needs_less(take, capsys):
    assert run_command(lambda _: take(), []) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: out of memory (") and message.count("\n") == 1
    assert "training.micro_batch_size" in message
