"""One model on every mesh: the same logits, weights in their shards, errors that give numbers."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from llm.config import MeshConfig
from llm.errors import UsageError
from llm.model.gpt import ModelSpec, abstract_params, bind, initialise, logical_axes
from llm.model.sharding import (
    MESH_AXES,
    check_divisible,
    constrain,
    is_divided,
    make_mesh,
    shard_batch,
    sharding_of,
    tree_shardings,
)
from llm.model_config import ModelConfig

GROUPED = ModelSpec(
    ModelConfig(
        n_layer=1, n_head=8, n_kv_head=4, d_model=32, d_ff=48, context_length=16, vocab_multiple=16,
        positions="rotary", norm="rmsnorm", activation="swiglu", tie_embeddings=False,
    ),
    70,
)  # fmt: skip
MULTI_HEAD = ModelSpec(
    ModelConfig(n_layer=1, n_head=8, d_model=32, context_length=16, vocab_multiple=16), 70
)
MODELS = {"grouped": GROUPED, "multi-head": MULTI_HEAD}
TOKENS = np.random.default_rng(0).integers(0, 70, (8, 16), dtype=np.int32)


@functools.cache
def logits_on(spec, **axes):
    """The weights are born in their shards too, so this also shows that a mesh changes no draw."""
    mesh = make_mesh(MeshConfig(**axes), None if axes else jax.devices()[:1])
    shardings = tree_shardings(mesh, logical_axes(spec))
    params = jax.jit(initialise, static_argnums=0, out_shardings=shardings)(spec, jax.random.key(0))
    tokens = shard_batch(mesh, TOKENS, ("batch", "sequence"))
    with jax.set_mesh(mesh):
        return np.asarray(
            jax.jit(lambda params, tokens: bind(spec, params)(tokens))(params, tokens)
        )


@pytest.mark.thorough(keep=1)
@pytest.mark.parametrize(
    ("model", "axes"),
    [
        ("multi-head", {"data": 1, "tensor": 8}),
        ("multi-head", {"data": 1, "fsdp": 8}),
        ("grouped", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("grouped", {"data": 1, "tensor": 4, "context": 2}),
        ("grouped", {"data": 1, "fsdp": 2, "context": 4}),
    ],
    ids=str,
)
def test_every_mesh_gives_the_same_logits(model, axes):
    spec = MODELS[model]
    expected = logits_on(spec)
    assert np.std(expected) > 0.05
    np.testing.assert_allclose(logits_on(spec, **axes), expected, atol=1e-5)


def test_every_matrix_is_divided():
    """Over fsdp or tensor: with both at 2 a device holds a quarter of every matrix."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = tree_shardings(mesh, logical_axes(GROUPED))
    for name, leaf in abstract_params(GROUPED).items():
        held = np.prod(shardings[name].shard_shape(leaf.shape)) / np.prod(leaf.shape)
        whole = "norm" in name or name.endswith(("out.bias", "down.bias"))
        assert held == (0.25 if len(leaf.shape) == 2 else 1.0 if whole else 0.5), name


def test_a_mesh_takes_the_rest_of_the_devices():
    mesh = make_mesh(MeshConfig(data=-1, tensor=2))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "expert": 1, "tensor": 2, "context": 1}
    assert mesh.axis_names == MESH_AXES


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "make them multiply to 8, or set one to -1"),
        ({"data": 4}, "does not fit 8 devices: the sizes given multiply to 4"),
        ({"data": -1, "tensor": 3}, "multiply to 3; make them divide 8"),
        ({"data": 16}, "multiply to 16"),
    ],
    ids=str,
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused_with_the_numbers(sizes, message):
    with pytest.raises(UsageError, match=message):
        make_mesh(MeshConfig(**sizes))


@pytest.mark.parametrize(
    ("axes", "model", "vocab", "batch", "message"),
    [
        (
            {"data": 8},
            {},
            64,
            12,
            r"batch_size\) = 12 .* 8 devices .* data x fsdp x expert; .* 8 or 16",
        ),
        ({"fsdp": 8}, {"d_model": 36, "n_head": 4}, 64, 8, r"d_model = 36 .* fsdp; .* 32 or 40"),
        ({"tensor": 8}, {"n_head": 6, "d_model": 48}, 64, 8, r"n_head = 6 .* tensor; .* 8"),
        ({"tensor": 8}, {"n_head": 8, "n_kv_head": 2}, 64, 8, r"n_kv_head = 2 .* can: 8"),
        ({"tensor": 8}, {"d_ff": 100}, 64, 8, r"d_ff = 100 .* 96 or 104"),
        ({"tensor": 8}, {}, 65, 8, r"vocab_multiple = 65 .* 64 or 72"),
        ({"context": 8}, {"context_length": 24}, 64, 8, r"= 24 .* 16 chunks .* can: 16 or 32"),
    ],
    ids=str,
)
def test_indivisible_sizes_are_refused_with_the_nearest_that_work(
    axes, model, vocab, batch, message
):
    mesh = make_mesh(MeshConfig(**{"data": 1, **axes}))
    config = ModelConfig(**{"n_head": 8, "d_model": 32, "context_length": 16, **model})
    with pytest.raises(UsageError, match=message):
        check_divisible(mesh, config, vocab, batch)


def test_matrices_that_write_into_the_stream_are_divided_by_their_rows_alone():
    """Over both axes, so that what their gradients are cut into is not narrow."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = tree_shardings(mesh, logical_axes(GROUPED))
    for name in ("attention.out", "mlp.down"):
        spec = shardings[f"blocks.0.{name}.weight"].spec
        assert spec == PartitionSpec(("tensor", "fsdp"), None)
    with pytest.raises(UsageError, match=r"d_ff = 50 .* 4 devices of mesh axis tensor x fsdp"):
        check_divisible(mesh, GROUPED.config.model_copy(update={"d_ff": 50}), 80, 8)


def test_divisible_sizes_pass():
    check_divisible(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), GROUPED.config, 80, 8)


def test_logical_axes_lie_where_the_table_says():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert sharding_of(mesh, ("embed", "mlp")).spec == PartitionSpec("fsdp", "tensor")
    assert sharding_of(mesh, ("batch", None)).spec == PartitionSpec(
        ("data", "fsdp", "expert"), None
    )


def test_without_a_mesh_nothing_is_divided_or_constrained():
    x = np.ones((2, 3))
    assert constrain(x, "batch", "sequence") is x
    assert not is_divided("heads")
    with jax.set_mesh(make_mesh(MeshConfig(data=4, tensor=2))):
        assert is_divided("heads") and is_divided("batch")
        assert not is_divided("sequence") and not is_divided("width")
