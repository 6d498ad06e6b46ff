"""Sequences on several devices: where their parts lie, what attention over them gives and sends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_collectives import total_bytes

from llm.config import MeshConfig
from llm.model.attention import Places
from llm.model.context import from_zigzag, positions_on_devices, to_zigzag
from llm.model.gpt import ModelSpec, abstract_params, bind
from llm.model.kernels import cudnn_attention, self_attention
from llm.model.sharding import is_divided, make_mesh, shares
from llm.model_config import ModelConfig
from llm.planning.collectives import read_collectives

ROWS, HEAD = 2, 16


def plain(query, key, value, segments=None, **rules):
    """In the order that the mesh in context has."""
    order_T = jnp.asarray(positions_on_devices(query.shape[1], shares("sequence")))
    return self_attention("plain", query, key, value, Places(order_T[None], segments), **rules)


def example(heads, kv_heads, length):
    """Queries, keys, values, and weights of the outputs in the sum that is differentiated."""
    random = np.random.default_rng(0)
    shapes = [(ROWS, length, n, HEAD) for n in (heads, kv_heads, kv_heads, heads)]
    return [jnp.float32(random.normal(size=shape)) for shape in shapes]


def segments_of(length):
    """Of each row three documents, whose ends are on no end of a chunk."""
    ends = np.array([[3, length // 2 + 5], [length // 4 + 1, length - 3]])
    return np.int32((np.arange(length) >= ends[:, :, None]).sum(axis=1))


def mesh_of(axes):
    sizes = MeshConfig(**{"data": 1, **axes})
    count = sizes.data * sizes.fsdp * sizes.tensor * sizes.context
    return make_mesh(sizes, jax.devices()[:count])


def reordered(exchange, array):
    """Heads are no part of what `to_zigzag` takes."""
    return exchange(array.reshape(*array.shape[:2], -1)).reshape(array.shape)


def compiled(attention, arrays, axes, segments=None):
    """(arrays) -> ((sum, output), gradients), all in the natural order, over a mesh."""

    def weighted(query, key, value, weights):
        if not is_divided("sequence"):
            mixed = attention(query, key, value, segments)
        else:
            order_T = positions_on_devices(query.shape[1], shares("sequence"))
            parts = [reordered(to_zigzag, array) for array in (query, key, value)]
            moved = None if segments is None else jnp.asarray(segments[:, order_T])
            mixed = reordered(from_zigzag, attention(*parts, moved))
        return jnp.sum(weights * mixed), mixed

    graded = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))
    with jax.set_mesh(mesh_of(axes)):
        return graded.lower(*arrays).compile()


def outcomes(attention, arrays, segments=None, rules=None, **axes):
    """[output, gradients for queries, keys and values], by it on the mesh, by plain on a device.

    Args:
      rules: a window and a cap for both.
    """
    found = []
    ways = (functools.partial(way, **(rules or {})) for way in (attention, plain))
    for way, mesh in zip(ways, (axes, {}), strict=True):
        (_, mixed), gradients = compiled(way, arrays, mesh, segments)(*arrays)
        found.append([np.asarray(array) for array in (mixed, *gradients)])
    return found


@pytest.fixture
def cudnn_is_xla(monkeypatch):
    """cuDNN's kernel, which needs a GPU, as JAX's own attention: it takes the same arguments."""
    attention = jax.nn.dot_product_attention

    def computed(*arrays, implementation, **settings):
        assert implementation == "cudnn"
        return attention(*arrays, implementation="xla", **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", computed)


def random_params(spec):
    """Of a spread that lets every part of the model matter."""
    random = np.random.default_rng(0)
    leaves = abstract_params(spec).items()
    return {name: jnp.float32(random.normal(size=leaf.shape, scale=0.3)) for name, leaf in leaves}


@pytest.mark.thorough(keep=1)
@pytest.mark.parametrize("packed", [False, True], ids=["one text", "packed"])
@pytest.mark.parametrize("attention", [plain, cudnn_attention], ids=["plain", "cudnn"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "axes"),
    [
        (4, 2, {"tensor": 2, "context": 4}),
        (2, 1, {"data": 2, "context": 2}),
        (2, 2, {"data": 2}),
    ],
    ids=["grouped, four parts", "multi-query, two parts", "one part"],
)
def test_over_a_divided_sequence_attention_and_its_gradients_are_those_of_one_device(
    heads, kv_heads, axes, attention, packed, cudnn_is_xla
):
    arrays = example(heads, kv_heads, 32)
    segments = segments_of(32) if packed else None
    found, expected = outcomes(attention, arrays, segments, **axes)
    assert np.std(expected[0]) > 0.1
    for array, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(array, wanted, atol=5e-6)


def test_each_device_gathers_keys_and_values_once_and_queries_stay(cudnn_is_xla):
    """Forward; backward their gradients are summed and scattered back to where they came from."""
    parts, length, heads = 4, 32, 2
    arrays = example(heads, heads, length)
    program = compiled(cudnn_attention, arrays, {"context": parts})
    sent = total_bytes(read_collectives(program.as_text()))
    one = 4 * ROWS * length // parts * heads * HEAD
    assert sent["all-gather"] == 2 * parts * one
    assert sent["reduce-scatter"] in (2 * one, 2 * parts * one)
    # Queries, keys, values, output and the gradients of all four change their order.
    assert sent["collective-permute"] <= 8 * one
    assert sent.keys() == {"all-gather", "reduce-scatter", "collective-permute", "all-reduce"}
    assert sent["all-reduce"] == 4


def test_the_zig_zag_order_is_undone_by_its_inverse():
    with jax.set_mesh(mesh_of({"context": 4})):
        x = jnp.broadcast_to(jnp.arange(16.0)[None, :, None], (1, 16, 2))
        there = jax.jit(to_zigzag)(x)
        back = jax.jit(from_zigzag)(there)
    chunks = [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]
    assert positions_on_devices(16, 4).tolist() == chunks
    assert positions_on_devices(5, 1).tolist() == [0, 1, 2, 3, 4]
    assert np.asarray(there)[0, :, 0].tolist() == chunks
    np.testing.assert_array_equal(back, x)


@functools.cache
def hidden_of(axes, packed, **settings):
    """`hidden` of a small model on a mesh, of one text a row or of three."""
    config = ModelConfig(n_layer=2, n_head=2, d_model=16, context_length=16, **settings)
    spec = ModelSpec(config, 70)
    tokens = np.random.default_rng(0).integers(0, 70, (2, 16), dtype=np.int32)
    segments = segments_of(16) if packed else None
    key = jax.random.key(1) if config.dropout else None
    with jax.set_mesh(mesh_of(dict(axes))):
        hidden = jax.jit(
            lambda params: bind(spec, params).hidden_and_routing(tokens, segments, dropout_key=key)
        )
        return np.asarray(hidden(random_params(spec))[0])


@pytest.mark.thorough
@pytest.mark.parametrize(
    "settings",
    [{"dropout": 0.5}, {}, {"positions": "rotary", "n_kv_head": 1}],
    ids=["dropout", "learned positions", "rotary"],
)
@pytest.mark.parametrize("packed", [False, True], ids=["one text", "packed"])
def test_a_model_over_a_divided_sequence_computes_and_drops_what_it_does_on_one_device(
    settings, packed
):
    one, four = (hidden_of(axes, packed, **settings) for axes in ((), (("context", 4),)))
    assert np.std(one) > 0.1
    np.testing.assert_allclose(four, one, atol=2e-5)
