"""Sequences on several devices: where their parts lie, what attention over them gives and sends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.config import MeshConfig, ModelConfig
from llm.model.context import from_zigzag, to_zigzag, zigzag_positions
from llm.model.gpt import ModelSpec, abstract_params, bind
from llm.model.kernels import causal_attention
from llm.model.sharding import is_divided, make_mesh
from llm.planning.collectives import read_collectives, total_bytes

ROWS, HEAD = 2, 16

ring = functools.partial(causal_attention, "plain")


def example(heads, kv_heads, length):
    """Queries, keys, values, and weights of the outputs in the sum that is differentiated."""
    random = np.random.default_rng(0)
    shapes = [(ROWS, length, n, HEAD) for n in (heads, kv_heads, kv_heads, heads)]
    return [jnp.float32(random.normal(size=shape)) for shape in shapes]


def mesh_of(axes):
    sizes = MeshConfig(**{"data": 1, **axes})
    count = sizes.data * sizes.fsdp * sizes.tensor * sizes.context
    return make_mesh(sizes, jax.devices()[:count])


def reordered(exchange, array):
    """Heads are no part of what `to_zigzag` takes."""
    return exchange(array.reshape(*array.shape[:2], -1)).reshape(array.shape)


def compiled(attention, arrays, axes):
    """(arrays) -> ((sum, output), gradients), all in the natural order, over a mesh."""

    def weighted(query, key, value, weights):
        if not is_divided("sequence"):
            mixed = attention(query, key, value)
        else:
            parts = [reordered(to_zigzag, array) for array in (query, key, value)]
            mixed = reordered(from_zigzag, attention(*parts, zigzag=True))
        return jnp.sum(weights * mixed), mixed

    graded = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))
    with jax.set_mesh(mesh_of(axes)):
        return graded.lower(*arrays).compile()


def outcomes(attention, arrays, **axes):
    """[output, gradients for queries, keys and values], by it on the mesh, by plain on a device."""
    found = []
    for way, mesh in ((attention, axes), (ring, {})):
        (_, mixed), gradients = compiled(way, arrays, mesh)(*arrays)
        found.append([np.asarray(array) for array in (mixed, *gradients)])
    return found


def random_params(spec):
    """Of a spread that lets every part of the model matter."""
    random = np.random.default_rng(0)
    leaves = abstract_params(spec).items()
    return {name: jnp.float32(random.normal(size=leaf.shape, scale=0.3)) for name, leaf in leaves}


@pytest.mark.parametrize(
    ("heads", "kv_heads", "axes"),
    [(4, 2, {"tensor": 2, "context": 4}), (2, 1, {"data": 2, "context": 2})],
    ids=["grouped, four parts", "multi-query, two parts"],
)
def test_keys_that_go_round_give_plain_attention_and_its_gradients(heads, kv_heads, axes):
    arrays = example(heads, kv_heads, 32)
    found, expected = outcomes(ring, arrays, **axes)
    assert np.std(expected[0]) > 0.1
    for array, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(array, wanted, atol=5e-6)


def test_no_device_holds_the_keys_of_all_others():
    """Once round forward; again backward, with their gradients, which also come home."""
    parts, length, heads = 4, 32, 2
    arrays = example(heads, heads, length)
    program = compiled(ring, arrays, {"context": parts})
    sent = total_bytes(read_collectives(program.as_text()))
    one = 4 * ROWS * length // parts * heads * HEAD
    rounds = 2 * one * (2 * (parts - 1) + parts)
    # Queries, keys, values, output and the gradients of all four change their order.
    most = rounds + 8 * one
    assert sent.keys() == {"collective-permute", "all-reduce"} and sent["all-reduce"] == 4
    # The first step of both passes sends the same, and may be sent once.
    assert most - 2 * one <= sent["collective-permute"] <= most


def test_the_zig_zag_order_is_undone_by_its_inverse():
    with jax.set_mesh(mesh_of({"context": 4})):
        x = jnp.broadcast_to(jnp.arange(16.0)[None, :, None], (1, 16, 2))
        there = jax.jit(to_zigzag)(x)
        back = jax.jit(from_zigzag)(there)
    chunks = [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]
    assert zigzag_positions(16, 4).tolist() == chunks
    assert np.asarray(there)[0, :, 0].tolist() == chunks
    np.testing.assert_array_equal(back, x)


def test_dropout_over_a_divided_sequence_draws_what_one_device_draws():
    config = ModelConfig(n_layer=1, n_head=2, d_model=16, context_length=16, dropout=0.5)
    spec = ModelSpec(config, 70)
    params = random_params(spec)
    tokens = np.random.default_rng(0).integers(0, 70, (2, 16), dtype=np.int32)
    found = []
    for axes in ({}, {"context": 4}):
        with jax.set_mesh(mesh_of(axes)):
            hidden = jax.jit(
                lambda params: bind(spec, params).hidden(tokens, dropout_key=jax.random.key(1))
            )(params)
        found.append(np.asarray(hidden))
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)
