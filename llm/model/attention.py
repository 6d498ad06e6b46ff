"""Who sees whom, scaled dot-product attention, and rotary positions.

    attention(Q, K, V) = softmax(Q K^T / sqrt(d_k) + M) V,    M = 0 where t may look at s, else -inf

Sources: Vaswani et al. 2017, "Attention Is All You Need", equation 1; Shazeer 2019, "Fast
Transformer Decoding" (multi-query) and Ainslie et al. 2023, "GQA" (grouped-query); Su et al. 2021,
"RoFormer" (rotary positions).

    B batch  T query position  S key position  K key/value heads  G query heads per key/value head
    N = K G query heads  H head size
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llm.model.products import contract, is_rounded, product_of, to_operand

# Queries that `attend_in_blocks` takes at once. With half as many an eighth of the scores of 256
# positions is saved, in twice as many operations, which takes as long (benchmarks/README.md). Each
# block is compiled by itself, so that a long sequence has larger ones.
BLOCK, MOST_BLOCKS = 128, 8


class Places(NamedTuple):
    """Where tokens stand, which decides who sees whom.

    positions_BT: int32, in any order; one row serves the whole batch.
    segments_BT: int32, the document of each token if documents are packed in one window; positions
      begin anew with each. None: each row is one document.
    """

    positions_BT: jax.Array
    segments_BT: jax.Array | None = None


def in_view(query_at: Any, key_at: Any, window: int = 0) -> Any:
    """Whether a query may look at a key, by their positions alone: at itself and what is before.

    With a window, at so many of these, itself among them.

    Elementwise, on NumPy arrays, JAX arrays and inside kernels: `visible` and splash compute it.
    cuDNN has its own causal mask, which is the same rule as long as CAUSAL says so.
    """
    if window:
        return (query_at >= key_at) & (query_at - key_at < window)
    return query_at >= key_at


# Whether `in_view` without a window is the causal rule and nothing else, so that cuDNN's own mask
# will do.
CAUSAL = True


def visible(queries: Places, keys: Places, window: int = 0) -> jax.Array:
    """Who sees whom: bool [B, T, S], True if the query at t may look at the key at s.

    A key has to be `in_view`, and in the query's own segment. Plain attention, the key/value cache
    and the attention maps ask this function; so does cuDNN if its own mask does not say it all.
    """
    seen_BTS = in_view(queries.positions_BT[:, :, None], keys.positions_BT[:, None, :], window)
    if queries.segments_BT is None or keys.segments_BT is None:
        return seen_BTS
    return seen_BTS & (keys.segments_BT[:, None, :] == queries.segments_BT[:, :, None])


def segment_positions(segments_BT: jax.Array) -> jax.Array:
    """int32 [B, T]: the place of each token in its own segment, from 0.

    The tokens of a segment lie side by side: a new segment begins where the number changes.
    """
    places_1T = jnp.arange(segments_BT.shape[1])[None, :]
    changes_BT = jnp.diff(segments_BT, axis=1, prepend=segments_BT[:, :1]) != 0
    return places_1T - jax.lax.cummax(jnp.where(changes_BT, places_1T, 0), axis=1)


def attend(
    query_BTNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    visible_BTS: jax.Array,
    *,
    soft_cap: float = 0.0,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """softmax(Q K^T / sqrt(H) + M) V, each group of N/K query heads sharing one key/value head.

    Args:
      query_BTNH: queries, in the compute dtype. Head n reads key/value head n // (N/K).
      key_BSKH: keys; K = N is multi-head, 1 < K < N grouped-query, K = 1 multi-query attention.
      value_BSKH: values.
      visible_BTS: bool, True where position t may look at position s; broadcasts over B. Every
        row must allow at least one s.
      soft_cap: as `attention_scores` takes it.
      dropout: probability of zeroing an attention weight, if a key is given.
    Returns:
      [B, T, N, H] in the dtype of the values. The softmax is computed in float32.

    The weights are divided by their sum after the values are mixed: H numbers for each query
    instead of S, which saves a quarter of attention's time on a CPU.
    """
    B, T, N, H = query_BTNH.shape
    scores_BKGTS = attention_scores(query_BTNH, key_BSKH, visible_BTS, soft_cap)
    largest_BKGT1 = jax.lax.stop_gradient(scores_BKGTS.max(axis=-1, keepdims=True))
    exponentials_BKGTS = jnp.exp(scores_BKGTS - largest_BKGT1)
    sums_BKGT1 = exponentials_BKGTS.sum(axis=-1, keepdims=True)
    dropped_BKGTS = drop(exponentials_BKGTS, dropout, dropout_key).astype(value_BSKH.dtype)
    # The result has the batched product's own order; another would transpose the cached values.
    mixed_BKGTH = contract("BKGTS,BSKH->BKGTH", dropped_BKGTS, value_BSKH)
    mixed_BTKGH = jnp.moveaxis(mixed_BKGTH / sums_BKGT1, 3, 1)
    return mixed_BTKGH.reshape(B, T, N, H).astype(value_BSKH.dtype)


@jax.custom_vjp
def attend_in_blocks(
    query_BTNH: jax.Array, key_BTKH: jax.Array, value_BTKH: jax.Array, visible_BTS: jax.Array
) -> jax.Array:
    """`attend` of whole rows inside `products.rounded`: what training on a CPU computes.

    Each block of queries reads the keys up to its own end, and `visible_BTS` must hide the rest. So
    scores that the mask would hide are not computed, but for those inside a block. Scores lie as
    [S, T]: products then take and give them row-major, and only queries, keys and values, which are
    smaller, are laid out anew. The gradient keeps the exponentials in bfloat16.
    """
    return _attend_forward(query_BTNH, key_BTKH, value_BTKH, visible_BTS)[0]


def _attend_forward(query_BTNH, key_BTKH, value_BTKH, visible_BTS):
    B, T, N, H = query_BTNH.shape
    K = key_BTKH.shape[2]
    query_BTKGH = to_operand(query_BTNH).reshape(B, T, K, N // K, H)
    key_BSKH, value_BSKH = to_operand(key_BTKH), to_operand(value_BTKH)
    mixed, kept = [], []
    for block, seen in _blocks(T):
        products_BKSGT = product_of("BSKH,BTKGH->BKSGT", key_BSKH[:, seen], query_BTKGH[:, block])
        seen_BST = visible_BTS[:, block, seen].swapaxes(1, 2)
        scores_BKSGT = jnp.where(seen_BST[:, None, :, None], products_BKSGT * H**-0.5, -jnp.inf)
        exponentials_BKSGT = jnp.exp(scores_BKSGT - scores_BKSGT.max(axis=2, keepdims=True))
        sums_BK1GT = exponentials_BKSGT.sum(axis=2, keepdims=True)
        rounded_BKSGT = to_operand(exponentials_BKSGT)
        mixed_BKHGT = product_of("BSKH,BKSGT->BKHGT", value_BSKH[:, seen], rounded_BKSGT)
        mixed.append(mixed_BKHGT / sums_BK1GT)
        kept.append((rounded_BKSGT, sums_BK1GT))
    mixed_BTKGH = jnp.concatenate(mixed, axis=-1).transpose(0, 4, 1, 3, 2)
    return mixed_BTKGH.reshape(B, T, N, H), (query_BTKGH, key_BSKH, value_BSKH, mixed_BTKGH, kept)


def _attend_backward(residuals, d_mixed_BTNH):
    """With weights w = e / z of exponentials e:  dv = w^T do,  ds = w (do v^T - sum(do o)).

    1 / z is multiplied into do, which has H numbers for each query where w has S.
    """
    query_BTKGH, key_BSKH, value_BSKH, mixed_BTKGH, kept = residuals
    B, T, K, G, H = query_BTKGH.shape
    d_mixed_BTKGH = d_mixed_BTNH.reshape(B, T, K, G, H)
    d_query = []
    # In the products' own order; another would lay out each block's share anew, on one core.
    d_key_BKSH, d_value_BKSH = jnp.zeros((2, B, K, T, H))
    blocks = list(zip(_blocks(T), kept, strict=True))
    # The last reads all keys, so that nothing is added to its share but the shares of others.
    for (block, seen), (exponentials_BKSGT, sums_BK1GT) in reversed(blocks):
        d_BTKGH = d_mixed_BTKGH[:, block] / jnp.moveaxis(sums_BK1GT, -1, 1).swapaxes(3, 4)
        inner_BTKG = jnp.sum(d_BTKGH * mixed_BTKGH[:, block], axis=-1)
        d_BTKGH = to_operand(d_BTKGH)
        d_weights_BKSGT = product_of("BSKH,BTKGH->BKSGT", value_BSKH[:, seen], d_BTKGH)
        inner_BK1GT = jnp.moveaxis(inner_BTKG, 1, -1)[:, :, None]
        d_scores_BKSGT = to_operand(
            exponentials_BKSGT.astype(jnp.float32) * (d_weights_BKSGT - inner_BK1GT) * H**-0.5
        )
        d_query.append(product_of("BSKH,BKSGT->BKHGT", key_BSKH[:, seen], d_scores_BKSGT))
        d_key_BKSH = d_key_BKSH.at[:, :, seen].add(
            product_of("BKSGT,BTKGH->BKSH", d_scores_BKSGT, query_BTKGH[:, block])
        )
        d_value_BKSH = d_value_BKSH.at[:, :, seen].add(
            product_of("BKSGT,BTKGH->BKSH", exponentials_BKSGT, d_BTKGH)
        )
    d_query_BTKGH = jnp.concatenate(d_query[::-1], axis=-1).transpose(0, 4, 1, 3, 2)
    d_query_BTNH = d_query_BTKGH.reshape(d_mixed_BTNH.shape)
    return d_query_BTNH, d_key_BKSH.swapaxes(1, 2), d_value_BKSH.swapaxes(1, 2), None


attend_in_blocks.defvjp(_attend_forward, _attend_backward)


def _blocks(T: int) -> list[tuple[slice, slice]]:
    """Blocks of queries, each with the keys up to its end."""
    size = max(BLOCK, -(-T // MOST_BLOCKS))
    starts = range(0, T, size)
    return [(slice(start, min(start + size, T)), slice(min(start + size, T))) for start in starts]


def attention_scores(
    query_BTNH: jax.Array, key_BSKH: jax.Array, visible_BTS: jax.Array, cap: float = 0.0
) -> jax.Array:
    """Q K^T / sqrt(H) + M: float32 [B, K, G, T, S], -inf where not visible.

    With a cap c, the products s = Q K^T / sqrt(H) become c tanh(s / c) before M is added.
    """
    B, T, N, H = query_BTNH.shape
    K = key_BSKH.shape[2]
    query_BTKGH = query_BTNH.reshape(B, T, K, N // K, H)
    products_BKGTS = contract("BTKGH,BSKH->BKGTS", query_BTKGH, key_BSKH)
    # Scaled here, in float32: scaled queries would be rounded once more in bfloat16.
    scores_BKGTS = soft_cap(products_BKGTS * H**-0.5, cap)
    return jnp.where(visible_BTS[:, None, None, :, :], scores_BKGTS, -jnp.inf)


def soft_cap(scores: jax.Array, cap: float) -> jax.Array:
    """c tanh(scores / c), which keeps scores within (-c, c); unchanged for c = 0."""
    return cap * jnp.tanh(scores / cap) if cap else scores


class RopeScaling(NamedTuple):
    """How frequencies are lowered for texts longer than a model was first trained with.

    A feature pair turns r = original_length f / 2 pi times in that length. Its frequency f becomes
    f (k + (1 - k) / factor). The share k that is kept is 0 for linear. It rises from 0 to 1 between
    r = 1 and r = 4 for llama3 (linear in r), and between r = 1 and r = 32 for yarn (linear in the
    pair's number, between whole numbers).

    Sources: Chen et al. 2023, "Position Interpolation" (linear); Llama team 2024, "The Llama 3 Herd
    of Models"; Peng et al. 2023, "YaRN". The bounds are those that their
    models were published with.
    """

    kind: str = "none"
    factor: float = 1.0
    original_length: int = 0

    def apply(self, frequencies: jax.Array, theta: float) -> jax.Array:
        pairs = len(frequencies)
        match self.kind:
            case "none":
                return frequencies
            case "linear":
                kept: Any = 0.0
            case "llama3":
                turns = self.original_length * frequencies / (2 * math.pi)
                kept = jnp.clip((turns - 1) / (4 - 1), 0, 1)
            case "yarn":
                fast, slow = (
                    pairs * math.log(self.original_length / (2 * math.pi * r)) / math.log(theta)
                    for r in (32, 1)
                )
                first, last = max(math.floor(fast), 0), min(math.ceil(slow), 2 * pairs - 1)
                kept = 1 - jnp.clip((jnp.arange(pairs) - first) / max(last - first, 1e-3), 0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


def rotation(
    positions_BT: jax.Array,
    size: int,
    theta: float,
    scaling: RopeScaling = RopeScaling(),  # noqa: B008  (it cannot change)
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the angles by which `rotate` turns `size` features: [B, T, 1, size / 2].

        a = position * theta^(-2i/size),  i in [0, size/2), or a frequency that `scaling` lowered

    Angles are computed in float32: bfloat16 cannot tell neighbouring positions apart beyond 256.
    """
    half = size // 2
    frequencies = scaling.apply(theta ** (-jnp.arange(half, dtype=jnp.float32) / half), theta)
    angles_BT1h = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None]
    if not is_rounded():
        return jnp.cos(angles_BT1h), jnp.sin(angles_BT1h)
    # By a loop, whose results XLA's CPU backend keeps as arrays. It would otherwise compute them
    # again for each element of what is turned, and it removes barriers.
    functions = (jnp.cos, jnp.sin)
    cos, sin = jax.lax.map(lambda n: jax.lax.switch(n, functions, angles_BT1h), jnp.arange(2))
    return cos, sin


def rotate(x_BTNH: jax.Array, cos_BT1h: jax.Array, sin_BT1h: jax.Array) -> jax.Array:
    """Rotary position embedding: turn each pair of features by an angle that grows with position.

        (x_i, x_{i+h}) -> (x_i cos a - x_{i+h} sin a, x_{i+h} cos a + x_i sin a),    i in [0, h)

    The product of a rotated query and key then depends on their distance alone. Features are
    paired half by half, as in GPT-NeoX and Llama. Those from 2 h on stay as they are.
    """
    half = cos_BT1h.shape[-1]
    first, second, rest = jnp.split(x_BTNH, [half, 2 * half], axis=-1)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    turned = (first * cos_BT1h - second * sin_BT1h, second * cos_BT1h + first * sin_BT1h)
    return jnp.concatenate([*(x.astype(x_BTNH.dtype) for x in turned), rest], axis=-1)


def drop(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Dropout (Srivastava et al. 2014): zero with probability `rate`, else divide by 1 - rate.

    Without a key nothing is dropped; evaluation and sampling pass none.
    """
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))
