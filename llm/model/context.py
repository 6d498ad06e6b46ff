"""Sequences that lie on several devices: the mesh's context axis, of C devices.

    chunks         0 1 2 3 4 5 6 7        of T / 2C positions, here for C = 4
    natural        0 0 1 1 2 2 3 3        which device holds each chunk
    zig-zag        0 1 2 3 3 2 1 0

In the natural order the last device has the most to look back at, and the others wait for it. In
the zig-zag order (Zhu 2024, "Ring Flash Attention"; Llama team 2024, section 3.3.2) all have the
same. A whole pass through the blocks is in that order, so that only its ends are moved.

`ring_attention` never holds more keys than one device's: they go round (Liu et al. 2023, "Ring
Attention with Blockwise Transformers"), and each device adds up what it saw by the online softmax
(Milakov & Gimelshein 2018).

    B batch  T query position  S key position  K key/value heads  G query heads per key/value head
    H head size
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from llm.model.attention import causal_mask
from llm.model.sharding import partition_of, per_device, shares

AXIS = "context"
# The name, for jax.checkpoint, of what attention keeps for its backward pass beside its inputs: its
# output, and the logarithm of the sum of each softmax's exponentials.
RESIDUAL = "attention_residual"


def zigzag_order(parts: int) -> list[int]:
    """The chunks as they lie, device after device."""
    return [chunk for device in range(parts) for chunk in (device, 2 * parts - 1 - device)]


def zigzag_positions(length: int, parts: int) -> np.ndarray:
    """int32 [T]: which position stands in each place of the zig-zag order."""
    chunks = np.arange(length, dtype=np.int32).reshape(2 * parts, -1)
    return chunks[zigzag_order(parts)].reshape(-1)


def to_zigzag(x_BTD: jax.Array) -> jax.Array:
    """[B, T, D] from the natural to the zig-zag order; each device sends its two chunks."""
    parts = shares("sequence")

    def exchange(x_BTD):
        even, odd = (
            jax.lax.ppermute(chunk, AXIS, [(d, _holder(2 * d + i, parts)) for d in range(parts)])
            for i, chunk in enumerate(jnp.split(x_BTD, 2, axis=1))
        )
        return _earlier_first(even, odd)

    return per_device(exchange, ACTIVATIONS, ACTIVATIONS)(x_BTD)


def from_zigzag(x_BTD: jax.Array) -> jax.Array:
    """The inverse of `to_zigzag`."""
    parts = shares("sequence")

    def exchange(x_BTD):
        even_and_odd = jnp.split(_earlier_first(*jnp.split(x_BTD, 2, axis=1)), 2, axis=1)
        back = [
            jax.lax.ppermute(chunk, AXIS, [(_holder(2 * d + i, parts), d) for d in range(parts)])
            for i, chunk in enumerate(even_and_odd)
        ]
        return jnp.concatenate(back, axis=1)

    return per_device(exchange, ACTIVATIONS, ACTIVATIONS)(x_BTD)


ACTIVATIONS = partition_of(("batch", "sequence", "width"))


def _holder(chunk: int, parts: int) -> int:
    """The device that a chunk lies on in the zig-zag order."""
    return min(chunk, 2 * parts - 1 - chunk)


def _earlier_first(even: jax.Array, odd: jax.Array) -> jax.Array:
    """A device's two chunks in their order: of device d, chunk d is the earlier one.

    Applied to chunks in that order, it gives the even one first.
    """
    is_odd = jax.lax.axis_index(AXIS) % 2 == 1
    return jnp.concatenate([jnp.where(is_odd, odd, even), jnp.where(is_odd, even, odd)], axis=1)


class Mixture(NamedTuple):
    """Values mixed by some of the keys: exponentials of scores less `largest`, not yet divided by
    their `sums`. float32: mixed [B, K, G, T, H]; largest and sums [B, K, G, T]."""

    mixed: jax.Array
    largest: jax.Array
    sums: jax.Array


def gathered(x_BSKH: jax.Array, *, zigzag: bool) -> jax.Array:
    """Keys or values of all positions in the natural order, inside shard_map."""
    whole_BSKH = jax.lax.all_gather(x_BSKH, AXIS, axis=1, tiled=True)
    if not zigzag:
        return whole_BSKH
    parts = shares("sequence")
    chunks = jnp.split(whole_BSKH, 2 * parts, axis=1)
    return jnp.concatenate([chunks[i] for i in np.argsort(zigzag_order(parts))], axis=1)


def ring_attention(query_BTNH: jax.Array, key_BSKH: jax.Array, value_BSKH: jax.Array) -> jax.Array:
    """Causal attention on each device's parts in the zig-zag order, inside shard_map: [B, T, N, H].

    Each step costs every device the same: all its queries see the earlier half of another device's
    keys, or the later half of its queries sees all of them.
    """
    B, T, N, H = query_BTNH.shape
    query_BTKGH = query_BTNH.reshape(B, T, key_BSKH.shape[2], -1, H)
    return _ring(query_BTKGH, key_BSKH, value_BSKH).reshape(B, T, N, H)


@jax.custom_vjp
def _ring(query_BTKGH: jax.Array, key_BSKH: jax.Array, value_BSKH: jax.Array) -> jax.Array:
    return _forward(query_BTKGH, key_BSKH, value_BSKH)[0]


def _forward(query_BTKGH: jax.Array, key_BSKH: jax.Array, value_BSKH: jax.Array) -> Any:
    visible = causal_mask(query_BTKGH.shape[1])[0]
    own = _mix(query_BTKGH, key_BSKH, value_BSKH, visible)

    def visit(distance, key_and_value, mixture: Mixture) -> Mixture:
        key_BSKH, value_BSKH = key_and_value

        def earlier():
            return _mix(query_BTKGH, _early(key_BSKH), _early(value_BSKH))

        def later():
            late = _mix(_late(query_BTKGH), key_BSKH, value_BSKH)
            return Mixture(
                _before(late.mixed, 0.0, 3),
                _before(late.largest, -jnp.inf, 3),
                _before(late.sums, 0.0, 3),
            )

        return _joined(mixture, jax.lax.cond(_is_earlier(distance), earlier, later))

    total = _around((key_BSKH, value_BSKH), own, visit)
    mixed_BTKGH = jnp.moveaxis(total.mixed / total.sums[..., None], 3, 1).astype(value_BSKH.dtype)
    log_sums_BKGT = total.largest + jnp.log(total.sums)
    output = checkpoint_name(mixed_BTKGH, RESIDUAL)
    return output, (
        query_BTKGH,
        key_BSKH,
        value_BSKH,
        output,
        checkpoint_name(log_sums_BKGT, RESIDUAL),
    )


def _backward(residuals: Any, gradient_BTKGH: jax.Array) -> tuple[jax.Array, ...]:
    """Gradients for queries, keys and values; those of keys and values go round with them."""
    query_BTKGH, key_BSKH, value_BSKH, output_BTKGH, log_sums_BKGT = residuals
    product_BTKGH = gradient_BTKGH.astype(jnp.float32) * output_BTKGH.astype(jnp.float32)
    seen = Seen(
        query_BTKGH, gradient_BTKGH, log_sums_BKGT, jnp.einsum("BTKGH->BKGT", product_BTKGH)
    )
    visible = causal_mask(query_BTKGH.shape[1])[0]
    query_gradient, *others = _gradients(seen, key_BSKH, value_BSKH, visible)

    def visit(distance, key_and_value, gradients):
        key_BSKH, value_BSKH = key_and_value

        def earlier():
            query, key, value = _gradients(seen, _early(key_BSKH), _early(value_BSKH))
            return query, _after(key, 0.0, 1), _after(value, 0.0, 1)

        def later():
            late = Seen(
                _late(seen.query_BTKGH),
                _late(seen.gradient_BTKGH),
                _late(seen.log_sums_BKGT, 3),
                _late(seen.products_BKGT, 3),
            )
            query, key, value = _gradients(late, key_BSKH, value_BSKH)
            return _before(query, 0.0, 1), key, value

        query, key, value = jax.lax.cond(_is_earlier(distance), earlier, later)
        query_gradient, others = gradients
        key_gradient, value_gradient = _passed_on(others)
        return query_gradient + query, (key_gradient + key, value_gradient + value)

    query_gradient, others = _around((key_BSKH, value_BSKH), (query_gradient, tuple(others)), visit)
    gradients = (query_gradient, *_passed_on(others))
    return tuple(x.astype(query_BTKGH.dtype) for x in gradients)


_ring.defvjp(_forward, _backward)


class Seen(NamedTuple):
    """What the gradient of one pair of query and key needs of the query's side.

    log_sums: of the exponentials of all scores of a query. products: of output and its gradient,
    summed over H, which is the softmax's own term (Dao et al. 2022, appendix B.4).
    """

    query_BTKGH: jax.Array
    gradient_BTKGH: jax.Array
    log_sums_BKGT: jax.Array
    products_BKGT: jax.Array


def _mix(query_BTKGH, key_BSKH, value_BSKH, visible_TS=None) -> Mixture:
    scores_BKGTS = _scores(query_BTKGH, key_BSKH, visible_TS)
    largest_BKGT = scores_BKGTS.max(axis=-1)
    exponentials_BKGTS = jnp.exp(scores_BKGTS - largest_BKGT[..., None])
    mixed_BKGTH = jnp.einsum(
        "BKGTS,BSKH->BKGTH",
        exponentials_BKGTS.astype(value_BSKH.dtype),
        value_BSKH,
        preferred_element_type=jnp.float32,
    )
    return Mixture(mixed_BKGTH, largest_BKGT, exponentials_BKGTS.sum(axis=-1))


def _scores(query_BTKGH, key_BSKH, visible_TS=None) -> jax.Array:
    """Q K^T / sqrt(H) + M, float32, as attention.py:attention_scores."""
    products_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS", query_BTKGH, key_BSKH, preferred_element_type=jnp.float32
    )
    scores_BKGTS = products_BKGTS * query_BTKGH.shape[-1] ** -0.5
    if visible_TS is None:
        return scores_BKGTS
    return jnp.where(visible_TS[None, None, None], scores_BKGTS, -jnp.inf)


def _joined(one: Mixture, other: Mixture) -> Mixture:
    """What both sets of keys give together."""
    largest = jnp.maximum(one.largest, other.largest)
    scales = [jnp.exp(part.largest - largest) for part in (one, other)]
    mixed = one.mixed * scales[0][..., None] + other.mixed * scales[1][..., None]
    return Mixture(mixed, largest, one.sums * scales[0] + other.sums * scales[1])


def _gradients(seen: Seen, key_BSKH, value_BSKH, visible_TS=None) -> tuple[jax.Array, ...]:
    """Of these keys' part in the output, for queries, keys and values; float32."""
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    dtype = key_BSKH.dtype
    scores_BKGTS = _scores(seen.query_BTKGH, key_BSKH, visible_TS)
    weights_BKGTS = jnp.exp(scores_BKGTS - seen.log_sums_BKGT[..., None])
    value = product("BKGTS,BTKGH->BSKH", weights_BKGTS.astype(dtype), seen.gradient_BTKGH)
    weight_gradients_BKGTS = product("BTKGH,BSKH->BKGTS", seen.gradient_BTKGH, value_BSKH)
    score_gradients_BKGTS = weights_BKGTS * (weight_gradients_BKGTS - seen.products_BKGT[..., None])
    # By sqrt(H) as the scores are.
    scaled_BKGTS = (score_gradients_BKGTS * key_BSKH.shape[-1] ** -0.5).astype(dtype)
    query = product("BKGTS,BSKH->BTKGH", scaled_BKGTS, key_BSKH)
    key = product("BKGTS,BTKGH->BSKH", scaled_BKGTS, seen.query_BTKGH)
    return query, key, value


def _around(key_and_value: Any, carry: Any, visit: Callable[[Any, Any, Any], Any]) -> Any:
    """carry after visit(distance, keys and values, carry) for those of every other device.

    Each device's are those of the device `distance` before it; the next are under way meanwhile.
    """
    parts = shares("sequence")

    def step(state, distance):
        key_and_value, carry = state
        return (_passed_on(key_and_value), visit(distance, key_and_value, carry)), None

    state = (_passed_on(key_and_value), carry)
    (key_and_value, carry), _ = jax.lax.scan(step, state, jnp.arange(1, parts - 1))
    return visit(parts - 1, key_and_value, carry)


def _passed_on(arrays: Any) -> Any:
    """Each device's, from the device before it."""
    parts = shares("sequence")
    return jax.lax.ppermute(arrays, AXIS, [(d, (d + 1) % parts) for d in range(parts)])


def _is_earlier(distance: Any) -> jax.Array:
    """Whether the device `distance` before this one holds an earlier beginning: a smaller d."""
    return jax.lax.axis_index(AXIS) >= distance


def _early(x: jax.Array, axis: int = 1) -> jax.Array:
    return jnp.split(x, 2, axis=axis)[0]


def _late(x: jax.Array, axis: int = 1) -> jax.Array:
    return jnp.split(x, 2, axis=axis)[1]


def _before(late: jax.Array, fill: float, axis: int) -> jax.Array:
    """The late half, with `fill` in the place of the early one."""
    return jnp.concatenate([jnp.full_like(late, fill), late], axis=axis)


def _after(early: jax.Array, fill: float, axis: int) -> jax.Array:
    return jnp.concatenate([early, jnp.full_like(early, fill)], axis=axis)
