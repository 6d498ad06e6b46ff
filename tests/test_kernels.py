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
from jax._src.cudnn import fused_attention_stablehlo
from test_context import example, outcomes, plain, random_params, segments_of

from llm.config import MeshConfig, OptimizerConfig, TrainingConfig
from llm.errors import UsageError
from llm.model import kernels
from llm.model.gpt import ModelSpec, bind
from llm.model.kernels import (
    LANES,
    block_of,
    choose_attention,
    cudnn_attention,
    splash_attention,
)
from llm.model.sharding import make_mesh
from llm.model_config import ModelConfig
from llm.text.batches import Batch
from llm.training.optimizer import make_optimizer
from llm.training.state import abstract_state
from llm.training.step import make_train_step

interpreted = functools.partial(splash_attention, interpret=True)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks a text, some of which are hidden, without a long text."""
    monkeypatch.setattr(kernels, "LARGEST_BLOCK", LANES)


@pytest.mark.thorough
@pytest.mark.parametrize("packed", [False, True], ids=["one text", "packed"])
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
    heads, kv_heads, length, axes, packed, small_blocks
):
    arrays = example(heads, kv_heads, length)
    segments = segments_of(length) if packed else None
    found, expected = outcomes(interpreted, arrays, segments, **axes)
    assert np.std(expected[0]) > 0.1
    for array, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(array, wanted, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("rules", "axes"),
    [
        ({"window": 100}, {}),
        ({"soft_cap": 0.5}, {}),
        ({"window": 1, "soft_cap": 2.0}, {"fsdp": 2}),
        ({"window": 200}, {"data": 2, "context": 2}),
    ],
    ids=str,
)
@pytest.mark.parametrize("attention", [interpreted, plain], ids=["splash", "plain"])
def test_a_window_and_a_cap_are_the_same_on_every_mesh(attention, rules, axes, small_blocks):
    arrays = example(2, 1, 512 if "context" in axes else 256)
    found, expected = outcomes(attention, arrays, rules=rules, **axes)
    for array, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(array, wanted, atol=1e-5)
    without, _ = outcomes(plain, arrays)
    assert np.abs(found[0] - without[0]).max() > 0.01


def test_in_the_zig_zag_order_every_device_has_the_same_number_of_visible_blocks(
    small_blocks, monkeypatch
):
    def counted():
        blocks = kernels._splash_kernel(1024, 1, 4, False).fwd_mask_info.block_mask[0]
        return [int(np.count_nonzero(part)) for part in np.split(np.asarray(blocks), 4)]

    assert counted() == [9, 9, 9, 9]
    monkeypatch.setattr(kernels, "positions_on_devices", lambda T, _: np.arange(T, dtype=np.int32))
    assert counted() == [3, 7, 11, 15]


MODEL = ModelConfig(
    n_layer=2, n_head=4, n_kv_head=2, d_model=64, context_length=LANES, positions="rotary"
)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("kernel", "axes"), [("splash", {"data": 2, "tensor": 2}), ("cudnn", {"data": 4})]
)
def test_a_model_with_a_kernel_computes_what_it_does_without(kernel, axes, monkeypatch):
    """cuDNN's, which needs a GPU, is plain attention here: the model multiplies apart for it."""
    monkeypatch.setattr(kernels, "splash_attention", interpreted)
    monkeypatch.setattr(kernels, "cudnn_attention", plain)
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


@pytest.mark.parametrize("packed", [False, True], ids=["one text", "packed"])
@pytest.mark.parametrize(("parts", "window"), [(1, 0), (4, 0), (1, 5)])
def test_cudnn_has_a_mask_only_where_its_own_does_not_do(parts, window, packed, monkeypatch):
    """As JAX hands it to the compiler of a GPU: queries of one device, keys of all, one mask for
    all heads; the gradient too."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)
    shapes = [jax.ShapeDtypeStruct((2, 64, heads, 16), jnp.bfloat16) for heads in (4, 2, 2)]
    segments = jax.ShapeDtypeStruct((2, 64), jnp.int32) if packed else None

    def total(query, key, value, segments):
        mixed = cudnn_attention(query, key, value, segments, window=window)
        return mixed.astype(jnp.float32).sum()

    with jax.set_mesh(make_mesh(MeshConfig(data=1, context=parts), jax.devices()[:parts])):
        traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(*shapes, segments)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    operands = re.findall(r"@__cudnn\$fmha(\w+)\(.* : \((.*)\) ->", text)
    mask = f"tensor<{2 if packed else 1}x1x{64 // parts}x64xbf16>"
    is_masked, kind = packed or parts > 1 or window > 0, "CAUSAL" if parts == 1 else "NO_MASK"
    for (name, shapes_of_call), backward in zip(operands, ("", "Backward"), strict=True):
        assert name == ("ScaleBiasSoftmax" if is_masked else "Softmax") + backward
        assert (mask in shapes_of_call) == is_masked
        assert shapes_of_call.startswith(
            f"tensor<2x{64 // parts}x4x16xbf16>, tensor<2x64x2x16xbf16>, tensor<2x64x2x16xbf16>"
        )
    assert set(re.findall(r"mask_type\W+22: \W+22(\w+?)\W+22", text)) == {kind}


def test_cudnn_refuses_packed_windows_that_it_cannot_mask():
    shapes = [jnp.zeros((1, 9, 2, 16), jnp.bfloat16)] * 3
    with pytest.raises(UsageError, match=r"'cudnn' .* even, found 9; .* or use 'plain'"):
        cudnn_attention(*shapes, jnp.zeros((1, 9), jnp.int32))


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
        windows = Batch(jax.ShapeDtypeStruct((4, LANES + 1), jnp.int32))
        traced = step.jitted.trace(state, windows)
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
        (H100, {"d_model": 4 * 60, "head_size": 64, "window": 100}, "bfloat16", "cudnn"),
        (H100, {"window": 100, "context_length": 255}, "bfloat16", "plain"),
        (H100, {"attention_soft_cap": 50.0}, "bfloat16", "plain"),
        (TPU, {"attention_soft_cap": 50.0, "window": 100}, "bfloat16", "splash"),
        (mesh_of("gpu", "V100", "7.0"), {}, "bfloat16", "plain"),
        (mesh_of("gpu", "MI300", "gfx942"), {}, "bfloat16", "plain"),
        (mesh_of("gpu", "H100", "9.0", context=2), {}, "bfloat16", "cudnn"),
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
        ("cudnn", H100, {"attention_soft_cap": 50.0}, "bfloat16", r"attention_soft_cap = 50\.0"),
        ("cudnn", mesh_of("cpu"), {}, "bfloat16", r"is of Abacus; use 'auto'"),
    ],
    ids=str,
)
def test_a_kernel_that_cannot_be_used_is_refused_with_the_reason(
    wanted, mesh, model, dtype, message
):
    config = ModelConfig(**{"n_head": 4, "d_model": 256, "context_length": 256, **model})
    with pytest.raises(UsageError, match=f"training.attention = '{wanted}' .*{message}"):
        choose_attention(wanted, config, dtype, mesh)
