"""Sequences that lie on several devices: the mesh's context axis, over C devices.

    chunks         0 1 2 3 4 5 6 7        of T / 2C positions, here for C = 4
    natural        0 0 1 1 2 2 3 3        which device holds each chunk
    zig-zag        0 1 2 3 3 2 1 0

In the natural order the last device has the most to look back at, and the others wait for it. In
the zig-zag order every device has the same work. A whole pass through the blocks is in that order,
so that only its ends are moved. Attention gathers the keys and values of all positions on each
device, whatever kernel computes it, and divides the queries alone (kernels.py).

Sources: Zhu 2024, "Ring Flash Attention" (zig-zag); Llama team 2024, "The Llama 3 Herd of Models",
section 3.3.2 (gathered keys and values).

    B batch  T position  D model width
"""

import jax
import jax.numpy as jnp
import numpy as np

from llm.model.sharding import partition_of, per_device, shares

AXIS = "context"
ACTIVATIONS = partition_of(("batch", "sequence", "width"))


def zigzag_order(parts: int) -> list[int]:
    """The chunks in the order in which they lie, device after device."""
    return [chunk for device in range(parts) for chunk in (device, 2 * parts - 1 - device)]


def positions_on_devices(length: int, parts: int) -> np.ndarray:
    """int32 [T]: the position in each place, device after device; zig-zag over several devices."""
    positions_T = np.arange(length, dtype=np.int32)
    if parts == 1:
        return positions_T
    return positions_T.reshape(2 * parts, -1)[zigzag_order(parts)].reshape(-1)


def to_zigzag(x_BTD: jax.Array) -> jax.Array:
    """[B, T, D] from the natural to the zig-zag order; each device sends its two chunks."""

    def exchange(x_BTD: jax.Array) -> jax.Array:
        return _earlier_first(*_sent(jnp.split(x_BTD, 2, axis=1)))

    return per_device(exchange, ACTIVATIONS, ACTIVATIONS)(x_BTD)


def from_zigzag(x_BTD: jax.Array) -> jax.Array:
    """The inverse of `to_zigzag`."""

    def exchange(x_BTD: jax.Array) -> jax.Array:
        even_and_odd = jnp.split(_earlier_first(*jnp.split(x_BTD, 2, axis=1)), 2, axis=1)
        return jnp.concatenate(_sent(even_and_odd, back=True), axis=1)

    return per_device(exchange, ACTIVATIONS, ACTIVATIONS)(x_BTD)


def gathered(x_BT: jax.Array) -> jax.Array:
    """[B, T, ...] of all positions in the natural order, from zig-zag parts inside shard_map."""
    parts = shares("sequence")
    chunks = jnp.split(jax.lax.all_gather(x_BT, AXIS, axis=1, tiled=True), 2 * parts, axis=1)
    return jnp.concatenate([chunks[i] for i in np.argsort(zigzag_order(parts))], axis=1)


def _sent(even_and_odd: list[jax.Array], *, back: bool = False) -> list[jax.Array]:
    """Chunks 2d and 2d + 1 of each device d, sent to where they lie in zig-zag order; or back."""
    parts, sent = shares("sequence"), []
    for i, chunk in enumerate(even_and_odd):
        moves = [(d, min(2 * d + i, 2 * parts - 1 - 2 * d - i)) for d in range(parts)]
        moves = [(to, d) for d, to in moves] if back else moves
        sent.append(jax.lax.ppermute(chunk, AXIS, moves))
    return sent


def _earlier_first(even: jax.Array, odd: jax.Array) -> jax.Array:
    """A device's two chunks in their order: on device d, chunk d is the earlier one.

    Applied to chunks in that order, it puts the even one first.
    """
    is_odd = jax.lax.axis_index(AXIS) % 2 == 1
    return jnp.concatenate([jnp.where(is_odd, odd, even), jnp.where(is_odd, even, odd)], axis=1)
