"""What TPU compilers are told for the step: by the device, and never against the environment."""

import importlib.util
import math
import os
import types

import jax
import numpy as np
import pytest

from llm.config import MeshConfig
from llm.model.sharding import MESH_AXES, make_mesh
from llm.training.compiler import (
    HIDE_LATENCY,
    JOIN_UP_TO,
    SCOPED_VMEM,
    WINDOWS_FROM,
    compiler_options,
)


def mesh_of(kind, **axes):
    device = types.SimpleNamespace(device_kind=kind)
    shape = dict.fromkeys(MESH_AXES, 1) | axes
    devices = np.array([device] * math.prod(shape.values()), dtype=object)
    return types.SimpleNamespace(devices=devices, shape=shape)


@pytest.mark.parametrize(
    ("kind", "kib"), [("TPU v5", "50000"), ("TPU v5 lite", "50000"), ("TPU v6 lite", "98304")]
)
def test_tpus_may_use_more_of_their_cores_memory(kind, kib):
    assert compiler_options(mesh_of(kind, fsdp=4))[SCOPED_VMEM] == kib


def test_products_stay_whole_unless_the_mesh_divides_their_columns():
    assert WINDOWS_FROM in compiler_options(mesh_of("TPU v5", fsdp=8))
    assert WINDOWS_FROM not in compiler_options(mesh_of("TPU v5", fsdp=4, tensor=2))


def test_other_devices_are_told_nothing():
    for kind in ("cpu", "TPU v4", "TPU7x"):
        assert compiler_options(mesh_of(kind)) == {}


def test_several_gpus_hide_the_latency_of_transfers(monkeypatch):
    """By options that this compiler knows: it would refuse another name, on a CPU too."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    kind = "NVIDIA H100 80GB HBM3"
    assert compiler_options(mesh_of(kind)) == {JOIN_UP_TO: "0"}
    options = compiler_options(mesh_of(kind, data=8))
    assert options == {JOIN_UP_TO: "0", HIDE_LATENCY: True}
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2
    monkeypatch.setenv("XLA_FLAGS", f"--{HIDE_LATENCY}=false --{JOIN_UP_TO}=32")
    assert compiler_options(mesh_of(kind, data=8)) == {}


def test_the_environment_counts_more(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{SCOPED_VMEM}=20000")
    assert compiler_options(mesh_of("TPU v5")).keys() == {WINDOWS_FROM}


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu, extra 'plan'")
def test_the_tpu_compiler_knows_these_options(monkeypatch, request):
    from llm.planning import targets

    environment = dict(os.environ)
    targets.prepare_environment("v5e:2x2", None, environment)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    mesh = make_mesh(MeshConfig(data=4), targets.topology("v5e:2x2").devices)
    options = compiler_options(mesh)
    assert len(options) == 2
    shape = jax.ShapeDtypeStruct(
        (8, 128), "float32", sharding=jax.NamedSharding(mesh, jax.P("data"))
    )
    lowered = jax.jit(lambda x: x + 1).lower(shape)
    # Programs for TPUs that are not here cannot be read back from the tests' store.
    jax.config.update("jax_enable_compilation_cache", False)
    request.addfinalizer(lambda: jax.config.update("jax_enable_compilation_cache", True))
    assert lowered.compile(compiler_options=options).memory_analysis() is not None
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        lowered.compile(compiler_options={"xla_tpu_no": "1"})
