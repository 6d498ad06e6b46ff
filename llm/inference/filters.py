"""log-probabilities -> the distribution that is drawn from, and a draw from it.

    q_v  =  p_v^(1/temperature) / sum over the kept      where v is kept, 0 elsewhere

Tokens stand in one total order: likelier first, ties by lower id. Each filter keeps a prefix of
it, so the kept set is exact and "kept" is the same as rank <= kept_tokens. The filters, in the
order and with the definitions of Hugging Face `transformers` (generation/logits_process.py):

    temperature  divides the logits; 0 is greedy: the likeliest token alone
    top_k        the first k
    top_p        the fewest of what top_k left whose share of its mass reaches p; at least one
    min_p        those at least min_p times as likely as the likeliest (both after temperature)

Before all of them stands the steering: what a request adds to the logits of single tokens
(logit_bias), and tokens that cannot be drawn yet (min_tokens).

Every number is an array over rows: requests with different settings share one compiled program.

What it is not: it never touches the log-probabilities that are reported.

Sources: Fan et al. 2018 (top-k); Holtzman et al. 2020, "The Curious Case of Neural Text
Degeneration" (top-p); Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling" (min-p).

    R rows  V vocabulary  C candidates  M blocks of the vocabulary  K steered tokens
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm.inference.records import Sampling

# How many of the likeliest tokens are sorted for every row. XLA's CPU backend sorts a whole
# vocabulary far slower than it finds the top 256, and slower than the bisection that finds what the
# candidates do not settle (benchmarks/README.md has the times).
CANDIDATES = 256
# A draw picks a block of this many tokens, then a token in it, which takes V / 256 + 256 noise
# values instead of V.
BLOCK = 256
_TINY = float(np.finfo(np.float32).tiny)


class Steering(NamedTuple):
    """What is added to the log-probabilities of single tokens before the filters: all [R, K].

    ids_RK: int32; any beyond the vocabulary stands for no token.
    values_RK: float32 nats; -inf: the token cannot be drawn.
    floors_RK: int32; it counts while more than so many tokens may still be drawn.
    """

    ids_RK: np.ndarray
    values_RK: np.ndarray
    floors_RK: np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSettings:
    """The settings of each row. Greedy rows hold temperature 1 and top_k 1, which is the same.

    key_R2: uint32 data of the threefry key fold_in(key(seed), sample index).
    """

    temperature_R: jax.Array
    top_k_R: jax.Array
    top_p_R: jax.Array
    min_p_R: jax.Array
    key_R2: jax.Array

    @classmethod
    def stack(cls, rows: Sequence[Sampling], indices: Sequence[int]) -> "RowSettings":
        """One row for each Sampling; `indices` are the i of "sample i is a function of seed, i"."""
        # Below the smallest normal float32 the device would divide by zero.
        greedy = np.array([row.temperature < _TINY for row in rows])
        temperatures = np.array([min(row.temperature, 1e38) for row in rows], np.float32)
        top_ks = np.array([min(row.top_k, 2**31 - 1) for row in rows], np.int32)
        seeds = np.array([_split_seed(row.seed) for row in rows], np.uint32)
        return cls(
            temperature_R=jnp.asarray(np.where(greedy, np.float32(1), temperatures)),
            top_k_R=jnp.asarray(np.where(greedy, np.int32(1), top_ks)),
            top_p_R=jnp.asarray([row.top_p for row in rows], jnp.float32),
            min_p_R=jnp.asarray([row.min_p for row in rows], jnp.float32),
            key_R2=_fold_in(seeds, np.array(indices, np.uint32)),
        )

    def repeat(self, times: int) -> "RowSettings":
        """Each row `times` times in a row: [R] -> [R * times]."""
        return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), self)


class Candidates(NamedTuple):
    """The likeliest tokens of each row in rank order: float32 and int32 [R, C]."""

    logprobs_RC: jax.Array
    ids_RC: jax.Array

    @classmethod
    def of(cls, logprobs_RV: jax.Array, count: int = CANDIDATES) -> "Candidates":
        """The first `count` in rank order, or all there are.

        Behind a barrier: XLA's CPU backend knows top_k by the one slice that it takes of a sort.
        Joined with a slice of its result, such as the likeliest alone, it is a sort of V. A barrier
        each: of a pair that comes straight from top_k the compiler of JAX 0.10 dies.
        """
        likeliest = jax.lax.top_k(logprobs_RV, min(count, logprobs_RV.shape[-1]))
        return cls(*(jax.lax.optimization_barrier(part) for part in likeliest))


class Filtered(NamedTuple):
    """The distribution drawn from, before it is divided by its sum.

    weights_RV: (p_v / p_likeliest)^(1/temperature), 0 if v is cut; the likeliest has 1.
    total_R: their sum.
    log_weights_RV: their logarithms, of the cut ones too.
    kept_RV: which are kept: the first in rank order, as the steering left it.
    kept_tokens_R: int32, how many they are.
    kept_mass_R: what the model itself, untempered, gives to the kept tokens together.
    """

    weights_RV: jax.Array
    total_R: jax.Array
    log_weights_RV: jax.Array
    kept_RV: jax.Array
    kept_tokens_R: jax.Array
    kept_mass_R: jax.Array

    def logprob(self, ids_R: jax.Array) -> jax.Array:
        """log q of one kept token in each row; 0 when it is the only one."""
        chosen_R = jnp.take_along_axis(self.log_weights_RV, ids_R[:, None], axis=-1)[:, 0]
        return chosen_R - jnp.log(self.total_R)


def steer(
    logprobs_RV: jax.Array, candidates: Candidates, steering: Steering, left_R: jax.Array
) -> tuple[jax.Array, Candidates]:
    """The log-probabilities that rows draw from, and their candidates.

    Rows without steering keep theirs to the bit. If no row has any, nothing is computed.

    Args:
      candidates: Candidates.of(logprobs_RV).
      left_R: int32, how many tokens each row may still draw.
    """
    R, V = logprobs_RV.shape
    counts_RK = (left_R[:, None] > steering.floors_RK) & (steering.ids_RK < V)

    def steered() -> tuple[jax.Array, Candidates]:
        places = jnp.arange(R)[:, None], steering.ids_RK
        values_RK = jnp.where(counts_RK, steering.values_RK, 0.0)
        scores_RV = logprobs_RV.at[places].add(values_RK, mode="drop")
        scores_RV = jax.nn.log_softmax(scores_RV, axis=-1)
        scores_RV = jnp.where(counts_RK.any(-1, keepdims=True), scores_RV, logprobs_RV)
        return scores_RV, Candidates.of(scores_RV, candidates.ids_RC.shape[-1])

    return jax.lax.cond(jnp.any(counts_RK), steered, lambda: (logprobs_RV, candidates))


def apply_filters(
    logprobs_RV: jax.Array,
    candidates: Candidates,
    settings: RowSettings,
    reported_RV: jax.Array | None = None,
) -> Filtered:
    """The distribution that each row draws from.

    Args:
      logprobs_RV: float32 log-softmax of the raw logits or of steered ones; -inf is never kept.
      candidates: Candidates.of(logprobs_RV), of any count but 0.
      reported_RV: that of the raw logits, if it is another.
    """
    reported_RV = logprobs_RV if reported_RV is None else reported_RV
    # How far v is below the likeliest: >= 0, and 0 for the likeliest and its ties at any
    # temperature. Rounding can give two neighbouring log-probabilities the same gap, so ranks are
    # taken from the log-probabilities themselves.
    gap_RV = candidates.logprobs_RC[:, :1] - logprobs_RV
    log_weights_RV = 0.0 - gap_RV / settings.temperature_R[:, None]
    weights_RV = jnp.exp(log_weights_RV)
    kept_RV = _within_top_k_and_top_p(logprobs_RV, weights_RV, candidates, settings)
    kept_RV &= (weights_RV >= settings.min_p_R[:, None]) & (logprobs_RV > -jnp.inf)
    kept_weights_RV = jnp.where(kept_RV, weights_RV, 0.0)
    kept_tokens_R = jnp.sum(kept_RV, axis=-1, dtype=jnp.int32)
    kept_mass_R = jnp.sum(jnp.where(kept_RV, jnp.exp(reported_RV), 0.0), axis=-1)
    everything_R = kept_tokens_R == logprobs_RV.shape[-1]
    return Filtered(
        weights_RV=kept_weights_RV,
        total_R=jnp.sum(kept_weights_RV, axis=-1),
        log_weights_RV=log_weights_RV,
        kept_RV=kept_RV,
        kept_tokens_R=kept_tokens_R,
        # The sum of all is 1 up to rounding, and part of it may be rounded to 1 + 1e-7.
        kept_mass_R=jnp.where(everything_R, 1.0, jnp.minimum(kept_mass_R, 1.0)),
    )


def draw(filtered: Filtered, settings: RowSettings, positions_R: jax.Array) -> jax.Array:
    """One token id from each row's distribution: int32 [R].

    P(v) = P(block of v) P(v | block), each by the Gumbel-max trick. The noise depends only on the
    row's key and the token's position in its text, not on the row's place in the batch or on the
    other rows.
    """
    R, V = filtered.weights_RV.shape
    blocks = -(-V // BLOCK)
    padded_RV = jnp.pad(filtered.weights_RV, ((0, 0), (0, blocks * BLOCK - V)))
    weights_RMV = padded_RV.reshape(R, blocks, BLOCK)
    block_logs_RM = jnp.log(jnp.sum(weights_RMV, axis=-1))

    def draw_row(key_2, position, block_logs_M, weights_MV):
        key = jax.random.fold_in(jax.random.wrap_key_data(key_2, impl="threefry2x32"), position)
        block_key, token_key = jax.random.split(key)
        # "high": 64 bits of noise; with 32, tokens less likely than 1e-7 would never be drawn.
        block = jax.random.categorical(block_key, block_logs_M, mode="high")
        token = jax.random.categorical(token_key, jnp.log(weights_MV[block]), mode="high")
        return block * BLOCK + token

    drawn = jax.vmap(draw_row)(settings.key_R2, positions_R, block_logs_RM, weights_RMV)
    return drawn.astype(jnp.int32)


def _within_top_k_and_top_p(
    logprobs_RV: jax.Array, weights_RV: jax.Array, candidates: Candidates, settings: RowSettings
) -> jax.Array:
    """bool [R, V]: top_k, then top_p on what it left.

    Settled by the candidates for most settings and rows; bisection runs only when some row needs
    it, and changes only those rows, so that no row depends on its companions.
    """
    count_R, settled_R = _prefix_among_candidates(weights_RV, candidates, settings)
    last_R1 = jnp.maximum(count_R, 1)[:, None] - 1
    last_logprob_R1 = jnp.take_along_axis(candidates.logprobs_RC, last_R1, axis=-1)
    last_id_R1 = jnp.take_along_axis(candidates.ids_RC, last_R1, axis=-1)
    everything_R = (count_R == 0)[:, None]
    kept_RV = everything_R | _up_to(logprobs_RV, last_logprob_R1, last_id_R1)
    return jax.lax.cond(
        jnp.all(settled_R),
        lambda: kept_RV,
        lambda: jnp.where(
            settled_R[:, None], kept_RV, _by_bisection(logprobs_RV, weights_RV, settings)
        ),
    )


def _prefix_among_candidates(
    weights_RV: jax.Array, candidates: Candidates, settings: RowSettings
) -> tuple[jax.Array, jax.Array]:
    """How many tokens top_k and top_p keep (0: all of them), and whether that is certain.

    It is not certain if the last kept token is not among the candidates, or if top_p takes its
    share of a mass that top_k cuts beyond them.
    """
    C, V = candidates.logprobs_RC.shape[-1], weights_RV.shape[-1]
    ids_RC = candidates.ids_RC
    sums_RC = jnp.cumsum(jnp.take_along_axis(weights_RV, ids_RC, axis=-1), axis=-1)
    top_k_R = jnp.where(settings.top_k_R == 0, V, jnp.minimum(settings.top_k_R, V))
    last_R1 = jnp.minimum(top_k_R, C)[:, None] - 1
    mass_R = jnp.where(
        top_k_R == V,
        jnp.sum(weights_RV, axis=-1),
        jnp.take_along_axis(sums_RC, last_R1, axis=-1)[:, 0],
    )
    # The last sum may miss a mass that was added in another order: that is "all", not "beyond".
    short_RC = sums_RC < (settings.top_p_R * mass_R)[:, None]
    top_p_R = jnp.where(settings.top_p_R < 1.0, 1 + jnp.sum(short_RC, axis=-1), V)
    top_p_R = jnp.minimum(top_p_R, V)
    count_R = jnp.minimum(top_k_R, top_p_R)
    mass_known_R = (top_k_R == V) | (top_k_R <= C)
    settled_R = (count_R == V) | (count_R <= C)
    settled_R &= mass_known_R | (settings.top_p_R >= 1.0)
    return jnp.where(settled_R & (count_R < V), count_R, 0), settled_R


def _by_bisection(
    logprobs_RV: jax.Array, weights_RV: jax.Array, settings: RowSettings
) -> jax.Array:
    """bool [R, V] as `_within_top_k_and_top_p`, for any settings."""
    V = logprobs_RV.shape[-1]
    surprisal_RV = 0.0 - logprobs_RV
    top_k_R = jnp.where(settings.top_k_R == 0, V, settings.top_k_R).astype(jnp.float32)
    first_k_RV = _shortest_prefix(surprisal_RV, jnp.ones_like(weights_RV), top_k_R)
    left_RV = jnp.where(first_k_RV, weights_RV, 0.0)
    target_R = settings.top_p_R * jnp.sum(left_RV, axis=-1)
    nucleus_RV = _shortest_prefix(surprisal_RV, left_RV, target_R)
    return first_k_RV & (nucleus_RV | (settings.top_p_R >= 1.0)[:, None])


def _shortest_prefix(
    surprisal_RV: jax.Array, masses_RV: jax.Array, target_R: jax.Array
) -> jax.Array:
    """bool [R, V]: the fewest tokens in rank order whose masses reach the target; else all.

    First the surprisal of the last of them, then, among its ties, the id. The bits of floats >= 0
    are in the order of the floats, so bisecting integers finds a float exactly in 31 halvings.
    """
    bits_RV = jax.lax.bitcast_convert_type(surprisal_RV, jnp.int32)
    ids_1V = jnp.arange(surprisal_RV.shape[-1], dtype=jnp.int32)[None, :]

    def mass(chosen_RV):
        return jnp.sum(jnp.where(chosen_RV, masses_RV, 0.0), axis=-1)

    lowest_R = jnp.zeros_like(bits_RV[:, 0])
    bits_R = _least(
        lambda bits_R: mass(bits_RV <= bits_R[:, None]) >= target_R,
        lowest_R,
        jnp.max(bits_RV, axis=-1),
    )
    tied_RV = bits_RV == bits_R[:, None]
    below_R = mass(bits_RV < bits_R[:, None])
    id_R = _least(
        lambda id_R: below_R + mass(tied_RV & (ids_1V <= id_R[:, None])) >= target_R,
        jnp.argmax(tied_RV, axis=-1).astype(jnp.int32),
        jnp.full_like(lowest_R, surprisal_RV.shape[-1] - 1),
    )
    return (bits_RV < bits_R[:, None]) | (tied_RV & (ids_1V <= id_R[:, None]))


def _least(holds, low_R: jax.Array, high_R: jax.Array) -> jax.Array:
    """The least integer in [low, high] for which a rising predicate holds; high when none does.

    `low` itself is tried first: if nothing is tied, there is nothing to search.
    """
    high_R = jnp.where(holds(low_R), low_R, high_R)

    def halve(bounds):
        low_R, high_R = bounds
        middle_R = low_R + (high_R - low_R) // 2
        found_R = holds(middle_R)
        return jnp.where(found_R, low_R, middle_R + 1), jnp.where(found_R, middle_R, high_R)

    return jax.lax.while_loop(lambda b: jnp.any(b[0] < b[1]), halve, (low_R, high_R))[1]


def _up_to(logprobs_RV: jax.Array, last_logprob_R1: jax.Array, last_id_R1: jax.Array) -> jax.Array:
    """bool [R, V]: what stands no later in rank order than (log-probability, id)."""
    ids_1V = jnp.arange(logprobs_RV.shape[-1], dtype=jnp.int32)[None, :]
    tied_RV = (logprobs_RV == last_logprob_R1) & (ids_1V <= last_id_R1)
    return (logprobs_RV > last_logprob_R1) | tied_RV


@jax.jit
def _fold_in(seeds_R2: jax.typing.ArrayLike, indices_R: jax.typing.ArrayLike) -> jax.Array:
    def fold(seed_2, index):
        key = jax.random.wrap_key_data(seed_2, impl="threefry2x32")
        return jax.random.key_data(jax.random.fold_in(key, index))

    return jax.vmap(fold)(seeds_R2, indices_R)


def _split_seed(seed: int) -> tuple[int, int]:
    """The two halves of 64 bits, which is the data of jax.random.key(seed) for any int."""
    return (seed >> 32) & 0xFFFFFFFF, seed & 0xFFFFFFFF
