"""Kernels for attention against the plain path, and which of them is used where.

Splash runs here interpreted, on CPU devices; what it becomes for a TPU is looked at in the program
that JAX hands to the TPU's compiler, which needs neither. cuDNN's kernel cannot run without a GPU.
"""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.config import MeshConfig, ModelConfig, OptimizerConfig, TrainingConfig
from llm.errors import UsageError
from llm.model import kernels
from llm.model.gpt import ModelSpec, bind, initialise
from llm.model.kernels import LANES, block_of, causal_attention, choose_attention, splash_attention
from llm.model.sharding import make_mesh
from llm.training.optimizer import make_optimizer
from llm.training.state import abstract_state
from llm.training.step import make_train_step

B, T, N, H = 4, 256, 4, 16

interpreted = functools.partial(splash_attention, interpret=True)
plain = functools.partial(causal_attention, "plain")


def outcome(attention, kv_heads, **axes):
    """Output, and gradients for queries, keys and values of a random sum of the outputs."""
    random = np.random.default_rng(0)
    query, weights = (jnp.float32(random.normal(size=(B, T, N, H))) for _ in range(2))
    key, value = (jnp.float32(random.normal(size=(B, T, kv_heads, H))) for _ in range(2))

    def weighted(*arrays):
        mixed = attention(*arrays)
        return jnp.sum(weights * mixed), mixed

    graded = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))
    with jax.set_mesh(make_mesh(MeshConfig(**axes), None if axes else jax.devices()[:1])):
        (_, mixed), gradients = graded(query, key, value)
    return [np.asarray(array) for array in (mixed, *gradients)]


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks a text, some of which are hidden, without a long text."""
    monkeypatch.setattr(kernels, "LARGEST_BLOCK", LANES)


@pytest.mark.parametrize(
    ("kv_heads", "axes"),
    [(4, {}), (1, {"data": 4, "context": 2}), (2, {"data": 2, "tensor": 2, "context": 2})],
    ids=["multi-head", "multi-query, in a mesh", "grouped, in a mesh"],
)
def test_splash_and_its_gradients_are_those_of_plain_attention(kv_heads, axes, small_blocks):
    expected = outcome(plain, kv_heads)
    assert np.std(expected[0]) > 0.1
    for found, wanted in zip(outcome(interpreted, kv_heads, **axes), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


MODEL = ModelConfig(
    n_layer=2, n_head=4, n_kv_head=2, d_model=64, context_length=LANES, positions="rotary"
)


def test_a_model_with_splash_computes_what_it_does_without(monkeypatch):
    monkeypatch.setattr(kernels, "splash_attention", interpreted)
    params = initialise(ModelSpec(MODEL, 70), jax.random.key(0), stacked=True)
    tokens = np.random.default_rng(0).integers(0, 70, (2, LANES), dtype=np.int32)
    found = []
    for kernel in ("plain", "splash"):
        spec = ModelSpec(MODEL, 70, attention=kernel)
        hidden = jax.jit(lambda params, spec=spec: bind(spec, params).hidden(tokens))
        with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])):
            found.append(np.asarray(hidden(params)))
    assert np.std(found[0]) > 0.1
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)


@pytest.mark.parametrize(("remat", "forward"), [("dots", 1), ("block", 2)])
def test_the_forward_kernel_runs_again_only_where_a_block_keeps_its_input_alone(remat, forward):
    """Counted in the whole step as it is handed to the TPU's compiler, where a loop stands once."""
    spec = ModelSpec(MODEL, 70, "bfloat16", "splash")
    mesh = make_mesh(MeshConfig(data=2, context=1, tensor=2), jax.devices()[:4])
    training = TrainingConfig(batch_size=4, remat=remat, scan_layers=True)
    optimizer = OptimizerConfig()
    state = abstract_state(spec, make_optimizer(optimizer), mesh, stacked=True)
    step = make_train_step(spec, optimizer, training, mesh)
    with jax.set_mesh(mesh):
        traced = step.jitted.trace(state, jax.ShapeDtypeStruct((4, LANES + 1), jnp.int32))
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    called = re.findall(r'kernel_name = "splash_mha_(fwd|dq|dkv)', text)
    assert sorted(called) == ["dkv", "dq"] + ["fwd"] * forward


def test_blocks_divide_every_length_that_splash_is_chosen_for():
    for length in range(LANES, 40 * LANES, LANES):
        assert length % block_of(length) == block_of(length) % LANES == 0
    assert block_of(8192) == 512 and block_of(640) == 128 and block_of(768) == 384


def mesh_of(platform, kind="Abacus", capability=None, context=1):
    device = types.SimpleNamespace(platform=platform, device_kind=kind)
    if capability:
        device.compute_capability = capability
    return types.SimpleNamespace(devices=np.array([device]), shape={"context": context})


TPU = mesh_of("tpu", "TPU v5p")
H100 = mesh_of("gpu", "NVIDIA H100", "9.0")
A100 = mesh_of("gpu", "NVIDIA A100", "8.0")


@pytest.mark.parametrize(
    ("mesh", "model", "dtype", "expected"),
    [
        (TPU, {}, "bfloat16", "splash"),
        (TPU, {}, "float32", "splash"),
        (TPU, {"context_length": 320}, "bfloat16", "plain"),
        (TPU, {"dropout": 0.1}, "bfloat16", "plain"),
        (mesh_of("tpu", context=4), {"context_length": 512}, "bfloat16", "splash"),
        (mesh_of("tpu", context=4), {"context_length": 256}, "bfloat16", "plain"),
        (H100, {}, "bfloat16", "cudnn"),
        (H100, {"context_length": 320}, "bfloat16", "cudnn"),
        (H100, {}, "float32", "plain"),
        (H100, {"dropout": 0.1}, "bfloat16", "plain"),
        (H100, {"d_model": 1024}, "bfloat16", "cudnn"),
        (A100, {"d_model": 1024}, "bfloat16", "plain"),
        (H100, {"d_model": 4 * 60}, "bfloat16", "plain"),
        (mesh_of("gpu", "V100", "7.0"), {}, "bfloat16", "plain"),
        (mesh_of("gpu", "MI300", "gfx942"), {}, "bfloat16", "plain"),
        (mesh_of("gpu", "H100", "9.0", context=2), {}, "bfloat16", "plain"),
        (mesh_of("cpu"), {}, "float32", "plain"),
    ],
    ids=str,
)
def test_auto_takes_the_kernel_that_devices_and_sizes_allow(mesh, model, dtype, expected):
    config = ModelConfig(**{"n_head": 4, "d_model": 256, "context_length": 256, **model})
    assert choose_attention("auto", config, dtype, mesh) == expected
    assert choose_attention("plain", config, dtype, mesh) == "plain"
    if expected != "plain":
        assert choose_attention(expected, config, dtype, mesh) == expected


@pytest.mark.parametrize(
    ("wanted", "mesh", "model", "dtype", "message"),
    [
        ("splash", H100, {}, "bfloat16", r"for TPUs, .* NVIDIA H100; .* takes 'cudnn'"),
        ("splash", TPU, {"context_length": 320}, "bfloat16", r"= 320 is not a multiple of 128"),
        ("splash", TPU, {"dropout": 0.1}, "bfloat16", r"model.dropout = 0.1; .* takes 'plain'"),
        ("cudnn", TPU, {}, "bfloat16", r"NVIDIA GPUs .* is of TPU v5p; .* takes 'splash'"),
        ("cudnn", H100, {}, "float32", r"in bfloat16, .* gives float32; .* takes 'plain'"),
        ("cudnn", A100, {"d_model": 1024}, "bfloat16", r"at most 128 in multiples of 8, .* = 256"),
        ("cudnn", mesh_of("cpu"), {}, "bfloat16", r"is of Abacus; use 'auto'"),
        ("cudnn", mesh_of("gpu", "H100", "9.0", 2), {}, "bfloat16", r"mesh.context = 2"),
    ],
    ids=str,
)
def test_a_kernel_that_cannot_be_used_is_refused_with_the_reason(
    wanted, mesh, model, dtype, message
):
    config = ModelConfig(**{"n_head": 4, "d_model": 256, "context_length": 256, **model})
    with pytest.raises(UsageError, match=f"training.attention = '{wanted}' .*{message}"):
        choose_attention(wanted, config, dtype, mesh)
