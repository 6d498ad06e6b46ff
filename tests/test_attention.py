"""Attention and its parts against float64 numpy and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.model.attention import (
    CAUSAL,
    Places,
    RopeScaling,
    attend,
    attention_scores,
    drop,
    in_view,
    rotate,
    rotation,
    segment_positions,
    visible,
)
from llm.model.products import rounded

B, T, S, N, H = 2, 5, 7, 4, 6

compiled_attend = jax.jit(attend)


def example(kv_heads, seed=0, scale=1.0):
    """Queries, keys, values, and a mask that lets every query see at least one key."""
    random = np.random.default_rng(seed)
    query = scale * random.normal(size=(B, T, N, H))
    key = random.normal(size=(B, S, kv_heads, H))
    value = random.normal(size=(B, S, kv_heads, H))
    visible = random.random((B, T, S)) < 0.5
    visible[:, :, 0] = True
    return query, key, value, visible


def reference_weights(query, key, visible):
    """softmax(Q K^T / sqrt(H) + M) head by head, in float64: [B, N, T, S]."""
    heads = []
    for n in range(N):
        k = key[:, :, n // (N // key.shape[2])]
        scores = query[:, :, n] @ k.swapaxes(1, 2) / np.sqrt(H)
        scores = np.where(visible, scores, -np.inf)
        exponentials = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(exponentials / exponentials.sum(-1, keepdims=True))
    return np.stack(heads, axis=1)


def reference_attention(query, key, value, visible):
    values = np.repeat(value, N // value.shape[2], axis=2)
    return np.einsum("bnts,bsnh->btnh", reference_weights(query, key, visible), values)


def as_float32(*arrays):
    return tuple(
        jnp.asarray(array, jnp.float32 if array.dtype != bool else bool) for array in arrays
    )


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["multi-head", "grouped", "multi-query"])
def test_attention_equals_float64_numpy(kv_heads):
    arrays = example(kv_heads)
    np.testing.assert_allclose(
        compiled_attend(*as_float32(*arrays)), reference_attention(*arrays), atol=2e-6
    )


def test_scores_of_thousands_neither_overflow_nor_vanish():
    arrays = example(2, scale=3000.0)
    result = compiled_attend(*as_float32(*arrays))
    np.testing.assert_allclose(result, reference_attention(*arrays), atol=2e-3)


@pytest.mark.parametrize("position", range(3), ids=["query", "key", "value"])
def test_gradient_equals_central_differences_in_float64(position):
    *arrays, visible = example(2)
    random = np.random.default_rng(1)
    weights = random.normal(size=(B, T, N, H))
    gradient = _gradients(*as_float32(*arrays, visible), jnp.float32(weights))[position]
    direction = random.normal(size=gradient.shape)
    ends = []
    for step in (1e-5, -1e-5):
        moved = list(arrays)
        moved[position] = arrays[position] + step * direction
        ends.append((weights * reference_attention(*moved, visible)).sum())
    slope = (ends[0] - ends[1]) / 2e-5
    np.testing.assert_allclose((np.asarray(gradient, float) * direction).sum(), slope, rtol=1e-4)


@jax.jit
def _gradients(query, key, value, visible, weights):
    return jax.grad(lambda *arrays: jnp.sum(weights * attend(*arrays, visible)), argnums=(0, 1, 2))(
        query, key, value
    )


def test_weights_equal_float64_numpy_and_are_those_that_attend_mixes_with():
    arrays = example(2)
    query, key, value, visible = as_float32(*arrays)
    weights_BKGTS = jax.nn.softmax(attention_scores(query, key, visible), axis=-1)
    weights = weights_BKGTS.reshape(B, N, T, S)
    np.testing.assert_allclose(weights, reference_weights(*arrays[:2], arrays[3]), atol=1e-6)
    mixed = jnp.einsum("bkgts,bskh->btkgh", weights_BKGTS, value).reshape(B, T, N, H)
    np.testing.assert_allclose(compiled_attend(query, key, value, visible), mixed, atol=1e-6)
    assert np.all(np.asarray(weights)[np.broadcast_to(~arrays[3][:, None], weights.shape)] == 0.0)


def test_multi_query_is_multi_head_with_one_key_repeated():
    query, key, value, visible = as_float32(*example(1))
    repeated = compiled_attend(
        query, jnp.repeat(key, N, axis=2), jnp.repeat(value, N, axis=2), visible
    )
    np.testing.assert_allclose(compiled_attend(query, key, value, visible), repeated, atol=1e-6)


def test_bfloat16_rounds_inputs_weights_and_output_but_not_scores():
    """Scores near 90 that differ by about 1: bfloat16 would hold them to 0.25.

    What is left are roundings of 2^-9 relative: of each weight, and of the output.
    """
    query, key, value, visible = example(2)
    rounded = [jnp.asarray(array, jnp.bfloat16) for array in (query + 6.0, key + 6.0, value)]
    result = compiled_attend(*rounded, jnp.asarray(visible))
    assert result.dtype == jnp.bfloat16
    as_read = [np.asarray(array, np.float64) for array in rounded]
    expected = reference_attention(*as_read, visible)
    error = np.abs(np.asarray(result, np.float64) - expected).max()
    assert error < 2 * 2**-9 * np.abs(as_read[2]).max()
    assert attention_scores(*rounded[:2], jnp.asarray(visible)).dtype == jnp.float32


def test_a_position_sees_itself_and_what_is_before_it():
    positions = np.arange(6)[None]
    seen = np.asarray(visible(Places(positions), Places(positions)))
    assert seen.shape == (1, 6, 6)
    assert all(seen[0, t, s] == (s <= t) for t in range(6) for s in range(6))


def test_a_window_is_so_many_tokens_with_the_last_among_them():
    positions = np.arange(6)[None]
    seen = np.asarray(visible(Places(positions), Places(positions), window=3))
    assert all(seen[0, t, s] == (t - 3 < s <= t) for t in range(6) for s in range(6))


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_scaling_divides_low_frequencies_and_leaves_what_turns_often(kind):
    """Pairs that turn less than once in the original length become a factor slower."""
    theta, length = 10000.0, 4096
    frequencies = theta ** (-jnp.arange(64) / 64)
    turns = np.asarray(length * frequencies / (2 * np.pi))
    scaled = RopeScaling(kind, 8.0, length).apply(frequencies, theta)
    kept = np.asarray(scaled / frequencies)
    np.testing.assert_allclose(kept[turns < 0.8], 1 / 8, rtol=1e-5)
    np.testing.assert_allclose(kept[turns > 40], 1 / 8 if kind == "linear" else 1, rtol=1e-5)
    assert np.all(np.diff(kept) <= 1e-6)


def test_cudnns_own_mask_is_the_rule_as_long_as_causal_says_so():
    places = np.arange(300)
    rule = in_view(places[:, None], places[None, :])
    assert np.array_equal(rule, np.tril(np.ones((300, 300), bool))) == CAUSAL


def test_who_sees_whom_does_not_depend_on_the_order_that_positions_stand_in():
    queries, keys = np.array([[4, 1]]), np.array([[3, 0, 1, 4, 2]])
    seen = visible(Places(queries), Places(keys))
    assert seen[0].tolist() == [[True] * 5, [False, True, True, False, False]]


def test_a_position_sees_its_own_segment_alone_in_which_positions_begin_anew():
    segments = np.array([[7, 7, 2, 2, 2, 3], [0, 0, 0, 0, 0, 0]], np.int32)
    positions = segment_positions(segments)
    assert positions.tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]
    places = Places(positions, segments)
    seen = np.asarray(visible(places, places))
    for b, t, s in np.ndindex(seen.shape):
        assert seen[b, t, s] == (s <= t and segments[b, s] == segments[b, t])


def turned(x, positions, theta):
    """Rotation as multiplication of complex numbers, in float64."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-2.0 * np.arange(half) / x.shape[-1])
    phase = np.exp(1j * positions[:, :, None, None] * frequencies)
    z = (x[..., :half] + 1j * x[..., half:]) * phase
    return np.concatenate([z.real, z.imag], axis=-1)


@pytest.mark.parametrize("theta", [10000.0, 37.0])
def test_rotation_equals_multiplication_of_complex_numbers(theta):
    random = np.random.default_rng(0)
    x = random.normal(size=(B, T, N, H))
    positions = random.integers(0, 300, (B, T))
    for on in (False, True):
        with rounded(on):
            turn = rotation(jnp.int32(positions), H, theta)
        rotated = rotate(jnp.float32(x), *turn)
        np.testing.assert_allclose(rotated, turned(x, positions, theta), atol=1e-4)


def test_rotated_products_depend_on_distance_alone():
    random = np.random.default_rng(0)
    query, key = (jnp.float32(random.normal(size=(1, 1, 1, 8))) for _ in range(2))

    def product(query_at, key_at):
        places = ((query, query_at), (key, key_at))
        ends = [rotate(x, *rotation(jnp.array([[at]]), 8, 100.0)) for x, at in places]
        return float(jnp.sum(ends[0] * ends[1]))

    for distance in (0, 3, 11):
        products = [product(start + distance, start) for start in (0, 1, 40)]
        np.testing.assert_allclose(products, products[0], atol=1e-4)
    assert abs(product(3, 0) - product(0, 0)) > 0.1


def test_angles_of_rotation_are_computed_apart_from_the_heads_where_products_are_rounded():
    """A CPU's compiler would compute them again for each head, and again backward."""

    def turned(x):
        with rounded(True):
            return rotate(x, *rotation(jnp.arange(32)[None], 8, 1e4))

    text = jax.jit(turned).lower(jnp.zeros((4, 32, 2, 8))).compile().as_text()
    parts = [part for part in text.split("\n\n") if " cosine(" in part]
    assert parts and not any("f32[4,32,2," in part for part in parts)


def test_rotation_tells_neighbours_apart_in_bfloat16():
    x = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
    rotated = rotate(x, *rotation(jnp.array([[1000, 1001]]), 8, 10000.0))
    assert rotated.dtype == jnp.bfloat16
    assert float(jnp.abs(rotated[0, 0] - rotated[0, 1]).max()) > 0.5


def test_dropout_zeroes_at_its_rate_and_keeps_the_expectation():
    rate, count = 0.3, 100_000
    dropped = np.asarray(drop(jnp.full((count,), 2.0), rate, jax.random.key(0)))
    kept = dropped != 0.0
    np.testing.assert_allclose(dropped[kept], 2.0 / 0.7, rtol=1e-6)
    # Five standard errors of a binomial share.
    assert abs(kept.mean() - 0.7) < 5 * np.sqrt(0.3 * 0.7 / count)


def test_dropout_is_off_without_a_key_and_at_rate_zero():
    x = jnp.arange(6.0)
    assert drop(x, 0.5, None) is x
    assert drop(x, 0.0, jax.random.key(0)) is x


def test_dropout_in_attention_zeroes_weights_and_keeps_their_expectation():
    """With one-hot values the output is the row of weights itself."""
    query, key, _, visible = as_float32(*example(4))
    key, visible = key[:, :H], visible[:, :, :H]
    onehot = jnp.broadcast_to(jnp.eye(H)[None, :, None, :], (B, H, N, H))
    weights_BKGTS = jax.nn.softmax(attention_scores(query, key, visible), axis=-1)
    weights = np.asarray(weights_BKGTS.reshape(B, N, T, H).swapaxes(1, 2))

    @jax.jit
    @jax.vmap
    def draw(dropout_key):
        return attend(query, key, onehot, visible, dropout=0.25, dropout_key=dropout_key)

    draws = np.asarray(draw(jax.random.split(jax.random.key(0), 400)))
    ratio = draws / np.where(weights > 0, weights, 1.0)
    assert np.all((np.abs(ratio - 1 / 0.75) < 1e-4) | (ratio == 0.0))
    # Each mean is of 400 draws with standard deviation w sqrt(p / (1 - p)); six of them.
    bound = 6 * weights * np.sqrt(0.25 / 0.75 / 400) + 1e-6
    assert np.all(np.abs(draws.mean(0) - weights) <= bound)
