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
from test_context import example, outcomes, random_params

from llm.config import Config, MeshConfig, ModelConfig, OptimizerConfig, TrainingConfig
from llm.errors import UsageError
from llm.model import kernels
from llm.model.attention import attend, causal_mask
from llm.model.context import zigzag_positions
from llm.model.gpt import ModelSpec, bind
from llm.model.kernels import LANES, block_of, choose_attention, splash_attention
from llm.model.sharding import make_mesh
from llm.training.optimizer import make_optimizer
from llm.training.state import abstract_state
from llm.training.step import make_train_step

interpreted = functools.partial(splash_attention, interpret=True)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks a text, some of which are hidden, without a long text."""
    monkeypatch.setattr(kernels, "LARGEST_BLOCK", LANES)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "axes"),
    [
        (2, 2, 256, {}),
        (4, 2, 256, {"fsdp": 2, "tensor": 2}),
        (2, 1, 512, {"data": 2, "context": 2}),
    ],
    ids=["multi-head", "grouped, in a mesh", "multi-query, over a divided sequence"],
)
def test_splash_and_its_gradients_are_those_of_plain_attention(
    heads, kv_heads, length, axes, small_blocks
):
    arrays = example(heads, kv_heads, length)
    found, expected = outcomes(interpreted, arrays, **axes)
    assert np.std(expected[0]) > 0.1
    for array, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(array, wanted, atol=1e-5)


def test_in_the_zig_zag_order_every_device_has_the_same_number_of_visible_blocks(small_blocks):
    def counted(positions):
        blocks = kernels._splash_kernel(positions, 1, 4, False).fwd_mask_info.block_mask[0]
        return [int(np.count_nonzero(part)) for part in np.split(np.asarray(blocks), 4)]

    assert counted(np.arange(1024, dtype=np.int32)) == [3, 7, 11, 15]
    assert counted(zigzag_positions(1024, 4)) == [9, 9, 9, 9]


MODEL = ModelConfig(
    n_layer=2, n_head=4, n_kv_head=2, d_model=64, context_length=LANES, positions="rotary"
)


def plain_attention(query, key, value, **unused):
    return attend(query, key, value, causal_mask(query.shape[1]))


@pytest.mark.parametrize(
    ("kernel", "axes"), [("splash", {"data": 2, "tensor": 2}), ("cudnn", {"data": 4})]
)
def test_a_model_with_a_kernel_computes_what_it_does_without(kernel, axes, monkeypatch):
    """cuDNN's, which needs a GPU, is plain attention here: the model multiplies apart for it."""
    monkeypatch.setattr(kernels, "splash_attention", interpreted)
    monkeypatch.setattr(kernels, "cudnn_attention", plain_attention)
    params = random_params(ModelSpec(MODEL, 70))
    tokens = np.random.default_rng(0).integers(0, 70, (4, LANES), dtype=np.int32)
    found = []
    for attention in ("plain", kernel):
        spec = ModelSpec(MODEL, 70, attention=attention)
        hidden = jax.jit(lambda params, spec=spec: bind(spec, params).hidden(tokens))
        with jax.set_mesh(make_mesh(MeshConfig(**axes), jax.devices()[:4])):
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
        (mesh_of("tpu", context=4), {"context_length": 1024}, "bfloat16", "splash"),
        (mesh_of("tpu", context=4), {"context_length": 512}, "bfloat16", "plain"),
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


@pytest.mark.parametrize(("context", "expected"), [(512, "plain"), (1024, "splash")])
def test_the_kernel_must_take_the_windows_that_a_run_begins_with(context, expected):
    config = Config.model_validate(
        {"model": {"context_length": context}, "training": {"window_warmup_steps": 9}}
    )
    assert choose_attention("auto", config.first_model.resolved(), "bfloat16", TPU) == expected
    assert choose_attention("auto", config.model.resolved(), "bfloat16", TPU) == "splash"


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
