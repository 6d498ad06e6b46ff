"""What the model says about one token among all: log-probability, rank, entropy, alternatives.

    logprob_v = z_v - log sum_u exp(z_u)          entropy = - sum_v p_v log p_v
    rank_v    = 1 + #{u : logprob_u > logprob_v} + #{u < v : logprob_u = logprob_v}

All from the float32 log-softmax of the raw logits over the real vocabulary. Sampling (filters.py)
reads it and cannot change it: a barrier keeps the compiler from computing it in two ways.

Decoding (one position of each row) and scoring (many positions) use the same function, so a number
means the same on every surface.

    R rows (positions of all texts, flattened)  V vocabulary  N listed alternatives  W watched ids
    B batch  T position  D model width
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llm.errors import NonFiniteError
from llm.inference.filters import CANDIDATES, Candidates, Filtered, RowSettings, apply_filters
from llm.inference.records import Alternative, Numbers, Spellings
from llm.model.gpt import GPT
from llm.model.loss import scan_positions

NOT_FINITE = (
    "the model's logits are not finite, so it gives no probabilities: its parameters are NaN or "
    "infinite, or it overflows in this compute dtype; try an earlier checkpoint with --step"
)
# How many logits exist at once when many positions are described: 16 MiB of float32, so that the
# passes over them run in cache or nearly so.
CHUNK_LOGITS = 2**22


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Described:
    """Arrays over tokens, of any leading shape [...]; float32 in nats, or int32.

    kept_mass, kept_tokens: what sampling keeps at this place (1 and V if nothing is drawn).
    top_ids, top_logprobs, top_kept: [..., N], the likeliest in rank order, and whether sampling
      keeps each.
    watch_logprobs, watch_ranks, watch_kept: [..., W], of the ids that the caller asked for.
    """

    logprob: jax.Array
    rank: jax.Array
    entropy: jax.Array
    kept_mass: jax.Array
    kept_tokens: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array
    top_kept: jax.Array
    watch_logprobs: jax.Array
    watch_ranks: jax.Array
    watch_kept: jax.Array


def log_probabilities(model: GPT, hidden: jax.Array) -> jax.Array:
    """float32 log-softmax of the raw logits: [..., D] -> [..., V]."""
    return jax.lax.optimization_barrier(jax.nn.log_softmax(model.logits(hidden), axis=-1))


def drawable(model: GPT, logprobs_RV: jax.Array) -> jax.Array:
    """Log-probabilities, but -inf for ids that no token has: they are never drawn or listed."""
    ids_V = jnp.arange(logprobs_RV.shape[-1])
    for start, stop in model.spec.unassigned:
        logprobs_RV = jnp.where((ids_V >= start) & (ids_V < stop), -jnp.inf, logprobs_RV)
    return logprobs_RV


def describe(
    logprobs_RV: jax.Array,
    ids_R: jax.Array,
    watch_RW: jax.Array,
    top: int,
    candidates: Candidates,
    filtered: Filtered | None = None,
    ranked_RV: jax.Array | None = None,
) -> Described:
    """The numbers of one token in each row.

    Args:
      logprobs_RV: from `log_probabilities`.
      ids_R: the tokens that stand there, in [0, V).
      watch_RW: ids, and behind them -1 in the columns that nobody asked for, which cost nothing.
      top: N, at most the number of candidates.
      filtered: what the row draws from; None if nothing is drawn.
      ranked_RV: the log-probabilities of tokens that count in a rank, if not all do.
    """
    ranked_RV = logprobs_RV if ranked_RV is None else ranked_RV
    V = logprobs_RV.shape[-1]
    if filtered is None:
        kept_mass_R = jnp.ones(ids_R.shape, jnp.float32)
        kept_tokens_R = jnp.full(ids_R.shape, V, jnp.int32)
    else:
        kept_mass_R, kept_tokens_R = filtered.kept_mass_R, filtered.kept_tokens_R

    def kept(ids: jax.Array) -> jax.Array:
        if filtered is None:
            return jnp.ones(ids.shape, bool)
        return jnp.take_along_axis(filtered.kept_RV, ids, axis=-1)

    logprob_R = jnp.take_along_axis(logprobs_RV, ids_R[:, None], axis=-1)[:, 0]
    # exp(-inf) * -inf would be NaN; a logit 1e38 below the others can underflow so far.
    probabilities_RV = jnp.exp(logprobs_RV)
    plogp_RV = jnp.where(probabilities_RV > 0.0, probabilities_RV * logprobs_RV, 0.0)

    def watch(column: jax.Array, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        numbers = _logprob_and_rank(logprobs_RV, ranked_RV, jnp.maximum(watch_RW[:, column], 0))
        return tuple(all_.at[:, column].set(one) for all_, one in zip(found, numbers, strict=True))

    watched = jnp.sum(jnp.any(watch_RW >= 0, axis=0))
    nothing = jnp.zeros(watch_RW.shape), jnp.zeros(watch_RW.shape, jnp.int32)
    found = jax.lax.fori_loop(0, watched, watch, nothing) if watch_RW.size else nothing
    watch_logprobs, watch_ranks = found
    return Described(
        logprob=logprob_R,
        rank=_logprob_and_rank(logprobs_RV, ranked_RV, ids_R)[1],
        entropy=-jnp.sum(plogp_RV, axis=-1),
        kept_mass=kept_mass_R,
        kept_tokens=kept_tokens_R,
        top_ids=candidates.ids_RC[:, :top],
        top_logprobs=candidates.logprobs_RC[:, :top],
        top_kept=kept(candidates.ids_RC[:, :top]),
        watch_logprobs=watch_logprobs,
        watch_ranks=watch_ranks,
        watch_kept=kept(jnp.maximum(watch_RW, 0)),
    )


def _logprob_and_rank(
    logprobs_RV: jax.Array, ranked_RV: jax.Array, ids_R: jax.Array
) -> tuple[jax.Array, jax.Array]:
    logprob_R1 = jnp.take_along_axis(logprobs_RV, ids_R[:, None], axis=-1)
    ids_1V = jnp.arange(logprobs_RV.shape[-1], dtype=jnp.int32)[None, :]
    earlier_RV = (ranked_RV > logprob_R1) | ((ranked_RV == logprob_R1) & (ids_1V < ids_R[:, None]))
    return logprob_R1[:, 0], 1 + jnp.sum(earlier_RV, axis=-1, dtype=jnp.int32)


def describe_positions(
    model: GPT,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    watch_BW: jax.Array,
    top: int,
    settings: RowSettings | None = None,
) -> Described:
    """`describe` at every position: [B, T, ...]. All logits never exist at once.

    Args:
      hidden_BTD: hidden at t scores the token of targets_BT at t.
      settings: of each row b, if kept_mass and kept_tokens should say what they would keep.
    """
    B, T, _ = hidden_BTD.shape
    length = chunk_length(B, T, model.spec.vocab_size)

    def describe_chunk(_, chunk):
        hidden_BtD, targets_Bt = chunk
        logprobs_RV = log_probabilities(model, hidden_BtD.reshape(B * length, -1))
        count = top if settings is None else max(CANDIDATES, top)
        ranked_RV = drawable(model, logprobs_RV)
        candidates, filtered = Candidates.of(ranked_RV, count), None
        if settings is not None:
            filtered = apply_filters(ranked_RV, candidates, settings.repeat(length), logprobs_RV)
        watch_RW = jnp.repeat(watch_BW, length, axis=0)
        described = describe(
            logprobs_RV, targets_Bt.reshape(-1), watch_RW, top, candidates, filtered, ranked_RV
        )
        return None, jax.tree.map(lambda x: x.reshape(B, length, *x.shape[1:]), described)

    return scan_positions(describe_chunk, None, T // length, hidden_BTD, targets_BT)[1]


def chunk_length(batch_size: int, length: int, vocab_size: int) -> int:
    """Positions of one chunk: the largest divisor of `length` whose logits fit in CHUNK_LOGITS."""
    fitting = max(1, CHUNK_LOGITS // (batch_size * vocab_size))
    return next(n for n in range(min(fitting, length), 0, -1) if length % n == 0)


def to_host(
    described: Described,
    sampling_logprobs: np.ndarray | None,
    top: int,
    watch: Sequence[int],
    spellings: Spellings,
) -> list[Numbers]:
    """Described numpy arrays over one text's tokens, [T, ...], as the numbers of each.

    Args:
      sampling_logprobs: [T], or None for tokens that were given.
      top: how many alternatives to list; at most as many as were computed.
      watch: the ids asked for, the first len(watch) of the watched columns.
    Raises:
      NonFiniteError: the model gives no probabilities.
    """
    missing = sum(stop - start for start, stop in spellings.tokenizer.unassigned)
    top = min(top, spellings.tokenizer.vocab_size - missing)
    listed = (described.top_logprobs[:, :top], described.watch_logprobs[:, : len(watch)])
    if not all(np.isfinite(x).all() for x in (described.logprob, described.entropy, *listed)):
        raise NonFiniteError(NOT_FINITE)  # JSON has no infinity
    nothing = [None] * len(described.logprob)
    return list(
        zip(
            described.logprob.tolist(),
            described.rank.tolist(),
            described.entropy.tolist(),
            # Adding zero turns the -0.0 of a certain draw into 0.0.
            nothing if sampling_logprobs is None else (sampling_logprobs + 0.0).tolist(),
            described.kept_mass.tolist(),
            described.kept_tokens.tolist(),
            _alternatives(described, top, watch, spellings),
            strict=True,
        )
    )


def _alternatives(
    described: Described, top: int, watch: Sequence[int], spellings: Spellings
) -> Iterator[tuple[Alternative, ...]]:
    """For each token the likeliest, then the watched ones that are not among them, by rank."""
    of_top = described.top_ids, described.top_logprobs, described.top_kept
    of_watch = described.watch_ranks, described.watch_logprobs, described.watch_kept
    likeliest_T = zip(*(part[:, :top].tolist() for part in of_top), strict=True)
    # Padded columns lie beyond len(watch).
    watched_T = zip(*(part[:, : len(watch)].tolist() for part in of_watch), strict=True)
    for likeliest, watched in zip(likeliest_T, watched_T, strict=True):
        entries = list(zip(itertools.count(1), *likeliest, strict=False))
        if watch:
            ranks, *rest = watched
            ranked = sorted(set(zip(ranks, watch, *rest, strict=True)))
            entries += [entry for entry in ranked if entry[0] > top]
        yield tuple(
            Alternative(id_, *spellings[id_], logprob, kept, rank)
            for rank, id_, logprob, kept in entries
        )
