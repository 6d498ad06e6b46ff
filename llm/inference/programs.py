"""The two compiled programs that continue a batch of texts: prefill and cached decoding.

`prefill_piece` runs a piece of all prompts, padded on the right, through the model and into the
key/value cache. `decode_chunk` draws up to CHUNK tokens of every row in one call, the cache in
place and nothing sent to the host in between, and returns early when all rows have ended.

What it is not: texts, stop strings or requests, which live on the host: decode.py.

    B rows  P positions of a piece  D model width  V vocabulary  W watched ids  E ids that end a row
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from llm.inference.distribution import (
    Described,
    describe,
    describe_positions,
    drawable,
    log_probabilities,
)
from llm.inference.filters import (
    CANDIDATES,
    Candidates,
    RowSettings,
    Steering,
    apply_filters,
    draw,
    steer,
)
from llm.model.gpt import GPT, KVCache, ModelSpec, Params, bind

# Steps of the largest chunk: the size of its buffers on the device.
CHUNK = 32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """What a decode step continues from.

    hidden_BD: what the head reads to score the next token.
    active_B: rows that still draw.
    left_B: int32, tokens that each row may still draw.
    """

    cache: KVCache
    hidden_BD: jax.Array
    active_B: jax.Array
    left_B: jax.Array


class Drawn(NamedTuple):
    """What a step drew.

    ids: int32. sampling_logprobs: in the distribution that was drawn from. described: what the
    model says of the ids; None if no row asked.
    """

    ids: jax.Array
    sampling_logprobs: jax.Array
    described: Described | None


def for_decoding(spec: ModelSpec, params: Params) -> tuple[ModelSpec, Params]:
    """The same model with parameters laid out for reading them once a token.

    A tied head becomes a matrix of its own, because XLA's CPU backend multiplies [1, D] x [V, D]^T
    far slower than [1, D] x [D, V]. Matrices are cast to the compute dtype here instead of at every
    step. Embeddings stay in float32: they are summed before the cast, and a step reads few of their
    rows. Routers stay too, because they compute in float32.
    """
    config = spec.config.model_copy(update={"tie_embeddings": False})
    params = _off_the_mesh(params)
    prepared = {name: _to_compute_dtype(spec, name, weight) for name, weight in params.items()}
    if spec.config.tie_embeddings:
        prepared["head.weight"] = _transposed(params["embed.weight"], spec.compute_dtype)
    return dataclasses.replace(spec, config=config), prepared


def _off_the_mesh(params: Params) -> Params:
    """Weights that lie on one device as arrays of that device alone.

    On a mesh of one device, XLA may name the shardings of its results differently from those of its
    arguments, and a state that goes round would be compiled for twice.
    """
    devices = _devices(params)
    return jax.device_put(params, devices.pop()) if len(devices) == 1 else params


def _devices(params: Params) -> set[jax.Device]:
    return {device for weight in params.values() for device in weight.devices()}


@functools.partial(jax.jit, static_argnums=1)
def _transposed(weight_VD: jax.Array, dtype: str) -> jax.Array:
    return weight_VD.T.astype(dtype)


def _to_compute_dtype(spec: ModelSpec, name: str, weight: jax.Array) -> jax.Array:
    reads_all = weight.ndim > 1 and not name.startswith("embed.") and ".router." not in name
    return weight.astype(spec.compute_dtype) if reads_all else weight


def empty(spec: ModelSpec, params: Params, batch_size: int, capacity: int) -> DecodeState:
    """Rows that hold no text and draw nothing, on the device of the parameters."""
    state = _empty(spec, batch_size, capacity)
    # On a mesh the first program that writes to the cache divides it.
    return commit(state, params) if len(_devices(params)) == 1 else state


def commit(state: DecodeState, params: Params) -> DecodeState:
    """The state with every array committed to the devices of the parameters, whole on each.

    JAX compiles for committed and uncommitted arrays apart, and a program returns committed ones:
    without this the first chunk of a text would need a program of its own.
    """
    sharding = next(iter(params.values())).sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.tree.map(lambda x: x if x.committed else jax.device_put(x, sharding), state)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(spec: ModelSpec, batch_size: int, capacity: int) -> DecodeState:
    return DecodeState(
        cache=KVCache.create(spec, batch_size, capacity),
        hidden_BD=jnp.zeros((batch_size, spec.config.d_model), spec.compute_dtype),
        active_B=jnp.zeros(batch_size, bool),
        left_B=jnp.zeros(batch_size, jnp.int32),
    )


@functools.partial(jax.jit, static_argnums=1)
def grow(cache: KVCache, capacity: int) -> KVCache:
    """The cache with room for `capacity` positions in each row; they are empty."""
    more = (0, 0), (0, 0), (0, capacity - cache.capacity), (0, 0)
    keys, values = jax.tree.map(lambda x: jnp.pad(x, more), (cache.keys, cache.values))
    return KVCache(keys, values, cache.length_B)


@functools.partial(jax.jit, donate_argnums=0)
def place_rows(target: DecodeState, source: DecodeState, places_B: jax.Array) -> DecodeState:
    """`target` with row b of `source` in its row places_B[b], unless that is out of range.

    A whole row of the cache is replaced, with zeros beyond the source's capacity: an earlier row's
    values are masked there, but a NaN times a weight of zero is a NaN. The row is cut at the
    target's capacity; the caller knows that no text of the row lies beyond.
    """

    def place(to, from_):
        if to.ndim > 2:
            S = to.shape[2]
            from_ = from_[:, :, :S]
            from_ = jnp.pad(from_, ((0, 0), (0, 0), (0, S - from_.shape[2]), (0, 0)))
        return to.at[places_B].set(from_, mode="drop")

    return jax.tree.map(place, target, source)


@functools.partial(jax.jit, static_argnums=0, static_argnames="top", donate_argnums=(2, 3))
def prefill_piece(
    spec: ModelSpec,
    params: Params,
    cache: KVCache,
    hidden_BD: jax.Array,
    tokens_BP: jax.Array,
    targets_BP: jax.Array,
    lengths_B: jax.Array,
    settings: RowSettings,
    watch_BW: jax.Array,
    *,
    top: int | None,
) -> tuple[KVCache, jax.Array, Described | None]:
    """One piece of all prompts into the cache.

    Returns:
      the cache; hidden_BD, filled in for rows whose prompt ends in this piece; what the model says
      of targets_BP, the tokens one place further on. Beyond the end of a prompt all is noise.
    """
    model = bind(spec, params)
    P = tokens_BP.shape[1]
    last_B = lengths_B - 1 - cache.length_B
    extended_BPD, cache = model.extend(tokens_BP, cache)
    ends_here_B = (last_B >= 0) & (last_B < P)
    index_B11 = jnp.clip(last_B, 0, P - 1)[:, None, None]
    picked_B1D = jnp.take_along_axis(extended_BPD, index_B11, axis=1)
    hidden_BD = jnp.where(ends_here_B[:, None], picked_B1D[:, 0], hidden_BD)
    if top is None:
        return cache, hidden_BD, None
    described = describe_positions(model, extended_BPD, targets_BP, watch_BW, top, settings)
    return cache, hidden_BD, described


@functools.partial(jax.jit, static_argnums=0, static_argnames="top", donate_argnums=2)
def decode_chunk(
    spec: ModelSpec,
    params: Params,
    state: DecodeState,
    settings: RowSettings,
    watch_BW: jax.Array,
    alive_B: jax.Array,
    steps: jax.Array,
    ends_BE: jax.Array,
    steering: Steering | None = None,
    *,
    top: int | None,
) -> tuple[DecodeState, Drawn, jax.Array]:
    """Draw up to `steps` <= CHUNK tokens of every row; fewer if no row is left.

    The numbers are those of the raw logits, whatever the steering makes of them.

    Returns:
      the state; what was drawn, [CHUNK, B, ...], noise in rows that have ended; the steps done.
    """
    model = bind(spec, params)

    def step(state: DecodeState) -> tuple[DecodeState, Drawn]:
        logprobs_BV = log_probabilities(model, state.hidden_BD)
        ranked_BV = drawable(model, logprobs_BV)
        candidates = Candidates.of(ranked_BV, max(CANDIDATES, top or 0))
        drawn_from = ranked_BV, candidates
        if steering is not None:
            drawn_from = steer(*drawn_from, steering, state.left_B)
        filtered = apply_filters(*drawn_from, settings, logprobs_BV)
        lengths_B = state.cache.length_B
        ids_B = draw(filtered, settings, lengths_B)
        described = None
        if top is not None:
            described = describe(logprobs_BV, ids_B, watch_BW, top, candidates, filtered, ranked_BV)
        return _advance(model, state, ids_B, ends_BE), Drawn(
            ids_B, filtered.logprob(ids_B), described
        )

    def body(carry):
        done, state, drawn = carry
        state, new = step(state)
        return done + 1, state, jax.tree.map(lambda all_, one: all_.at[done].set(one), drawn, new)

    state = dataclasses.replace(state, active_B=state.active_B & alive_B)
    shapes = jax.eval_shape(step, state)[1]
    drawn = jax.tree.map(lambda x: jnp.zeros((CHUNK, *x.shape), x.dtype), shapes)
    done, state, drawn = jax.lax.while_loop(
        lambda carry: (carry[0] < steps) & jnp.any(carry[1].active_B),
        body,
        (jnp.zeros((), jnp.int32), state, drawn),
    )
    return state, drawn, done


def _advance(model: GPT, state: DecodeState, ids_B: jax.Array, ends_BE: jax.Array) -> DecodeState:
    """The state with the drawn ids read; rows that they end are no longer active."""
    lengths_B, left_B = state.cache.length_B, state.left_B - 1
    hidden_B1D, cache = model.extend(ids_B[:, None], state.cache)
    lengths_B = jnp.where(state.active_B, lengths_B + 1, lengths_B)
    has_room_B = (left_B > 0) & (lengths_B < model.spec.config.context_length)
    ended_B = jnp.any(ids_B[:, None] == ends_BE, axis=1)
    return DecodeState(
        cache=dataclasses.replace(cache, length_B=lengths_B),
        hidden_BD=hidden_B1D[:, 0],
        active_B=state.active_B & ~ended_B & has_room_B,
        left_B=left_B,
    )
