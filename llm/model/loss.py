"""The autoregressive log-likelihood: per token, and reduced to the training objective.

    log P(x) = sum_t log P(x_t | x_<t),    log P(x_t = v | x_<t) = z_v - log sum_u exp(z_u)

z are the logits at position t - 1. Losses are negative log-likelihoods in nats.

    B batch  T position  D model width  V vocabulary  C chunks  R rows of one device
    b, s shares of the batch and of the sequence over the mesh
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llm.model.attention import soft_cap
from llm.model.gpt import GPT
from llm.model.products import contract
from llm.model.sharding import constrain, kind_in_context, shares

# Logits that exist at once in the loss: 64 MiB of float32. Fewer would make the head's matrix
# products small for a CPU; more would be the largest buffer of the step. On GPUs 1 GiB, because
# each chunk reads and writes the sum of the head's gradient.
CHUNK_LOGITS = 2**24
GPU_CHUNK_LOGITS = 2**28


class LossTerms(NamedTuple):
    """Sums over tokens, each weighted by its weight.

    objective: what is minimised; nll plus label smoothing and z-loss.
    nll: negative log-likelihood, nats. Equal to the objective when neither option is on.
    """

    objective: jax.Array
    nll: jax.Array


class LossOptions(NamedTuple):
    """Static choices of the loss.

    vocab_size: real vocabulary; head columns from here on are padding.
    logit_soft_cap: c in c tanh(z / c); 0: off.
    label_smoothing: e; the target becomes (1 - e) onehot + e / V (Szegedy et al. 2016).
    z_loss: weight of (log sum exp z)^2 (Chowdhery et al. 2022, PaLM, section 5).
    """

    vocab_size: int
    logit_soft_cap: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0


def token_log_likelihood(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """log P(x_t | x_<t) for every position.

        log p = logits[target] - logsumexp(logits)

    Args:
      logits_BTV: unnormalised scores; computed in float32 whatever they arrive as.
      targets_BT: int32 ids in [0, V).
    Returns:
      float32 [B, T], nats, not reduced.
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return target_BT - jax.nn.logsumexp(logits_BTV, axis=-1)


def next_token_loss(
    model: GPT,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_length: int = 0,
) -> LossTerms:
    """`head_loss` with the model's head, in as many chunks as suit the mesh in context.

    Args:
      hidden_BTD: `model.hidden` of the tokens before the targets.
      targets_BT, weights_BT: as `head_loss` takes them.
      label_smoothing, z_loss: as LossOptions has them.
      chunk_length: positions whose logits exist at once; 0: `chunks_for` chooses.
    """
    spec = model.spec
    B, T = targets_BT.shape
    rows_per_device = max(1, B // shares("batch"))
    chunks = chunks_for(rows_per_device, T, spec.padded_vocab_size, chunk_length, kind_in_context())
    options = LossOptions(spec.vocab_size, spec.config.logit_soft_cap, label_smoothing, z_loss)
    return head_loss(hidden_BTD, model.head_weight(), targets_BT, weights_BT, options, chunks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def head_loss(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    options: LossOptions,
    chunks: int,
) -> LossTerms:
    """The loss straight from what the head reads, without ever holding float32 [B, T, V].

        objective = sum_bt w_bt [ (1 - e) nll_bt + e mean_v(-log p_btv) + z (log Z_bt)^2 ]

    The positions are taken in `chunks` parts, one after the other. When a gradient is asked for,
    each part's is computed while its logits are at hand, so they are never computed twice.
    Differentiable in hidden and head, and through `objective` alone: nll and the weights carry no
    gradient.

    Args:
      hidden_BTD: output of GPT.hidden, in the compute dtype.
      head_DV: GPT.head_weight(), padded vocabulary, in the compute dtype.
      targets_BT: int32 ids in [0, vocab_size).
      weights_BT: float32; 0 masks a token out. For a mean over tokens, mask / number of tokens.
      chunks: parts that T is taken in, see `chunks_for`; positions that fill up the last weigh 0.
    """
    # Gathered once; XLA would otherwise gather it in every chunk.
    head_DV = constrain(head_DV, None, "vocab")

    def add_chunk(total: LossTerms, chunk: tuple[jax.Array, ...]) -> tuple[LossTerms, None]:
        hidden_BTD, targets_BT, weights_BT = chunk
        terms = _chunk_loss(_logits(hidden_BTD, head_DV), targets_BT, weights_BT, options)
        return jax.tree.map(jnp.add, total, terms), None

    zero = LossTerms(jnp.zeros(()), jnp.zeros(()))
    return scan_positions(add_chunk, zero, chunks, hidden_BTD, targets_BT, weights_BT)[0]


def _head_loss_forward(hidden_BTD, head_DV, targets_BT, weights_BT, options, chunks):
    """head_loss, and its gradient for an objective of weight one.

    Each device adds up the head's gradient over its own rows, and the devices' sums are added once,
    after the last chunk: a sum over all rows would be all-reduced, [D, V], in every chunk.
    """
    head_DV = constrain(head_DV, None, "vocab")
    B, T = targets_BT.shape
    b, s = math.gcd(shares("batch"), B), math.gcd(shares("sequence"), -(-T // chunks))

    def add_chunk(carry, chunk):
        total, d_head_bsDV = carry
        hidden_BTD, targets_BT, weights_BT = chunk
        objective, pullback, nll = jax.vjp(
            lambda logits_BTV: _chunk_loss(logits_BTV, targets_BT, weights_BT, options),
            _logits(hidden_BTD, head_DV),
            has_aux=True,
        )
        (d_logits_BTV,) = pullback(jnp.ones(()))
        # The two products below are the head's backward pass; in the compute dtype, as its forward.
        d_logits_BTV = d_logits_BTV.astype(hidden_BTD.dtype)
        d_hidden_BTD = contract("BTV,DV->BTD", d_logits_BTV, head_DV, hidden_BTD.dtype)
        d_head_bsDV += contract(
            "bsRD,bsRV->bsDV", _by_device(b, s, hidden_BTD), _by_device(b, s, d_logits_BTV)
        )
        total = LossTerms(total.objective + objective, total.nll + nll)
        return (total, d_head_bsDV), d_hidden_BTD

    zero = LossTerms(jnp.zeros(()), jnp.zeros(()))
    none_bsDV = jnp.zeros((b, s, *head_DV.shape), jnp.float32)
    start = (zero, constrain(none_bsDV, "batch", "sequence", None, "vocab"))
    (terms, d_head_bsDV), d_hidden_BTD = scan_positions(
        add_chunk, start, chunks, hidden_BTD, targets_BT, weights_BT
    )
    d_head_DV = constrain(d_head_bsDV.sum(axis=(0, 1)), "embed", "vocab").astype(head_DV.dtype)
    return terms, (d_hidden_BTD, d_head_DV)


def _head_loss_backward(options, chunks, gradients, cotangent):
    # nll is reported and never minimised, so its cotangent is not used.
    scale = cotangent.objective
    return *((scale * gradient).astype(gradient.dtype) for gradient in gradients), None, None


head_loss.defvjp(_head_loss_forward, _head_loss_backward)


def chunks_for(
    batch_size: int,
    length: int,
    padded_vocab_size: int,
    chunk_length: int = 0,
    device_kind: str = "",
) -> int:
    """Into how many parts `head_loss` should take T positions: about the fewest that fit.

    It is a divisor of T if one is near, so that no part is filled up. The fewest parts would often
    need padding, and a divisor alone would take a prime T one position at a time.

    Args:
      batch_size: sequences on one device.
      length: positions T.
      chunk_length: positions of a part; 0: as many as keep the part's logits within CHUNK_LOGITS,
        and at most half of T, so that [B, T, V] never exists.
      device_kind: the devices that compute it, as JAX names them.
    """
    at_once = GPU_CHUNK_LOGITS if device_kind.startswith("NVIDIA ") else CHUNK_LOGITS
    fitting = at_once // (batch_size * padded_vocab_size)
    longest = chunk_length or max(1, min(fitting, length // 2))
    fewest = -(-length // longest)
    return next((n for n in range(fewest, 2 * fewest) if length % n == 0), fewest)


def _chunk_loss(logits_BTV, targets_BT, weights_BT, options: LossOptions) -> LossTerms:
    """Weighted sums over one chunk, from float32 logits that still carry the padding."""
    logits_BTV = soft_cap(logits_BTV, options.logit_soft_cap)
    real_V = jnp.arange(logits_BTV.shape[-1]) < options.vocab_size
    logits_BTV = jnp.where(real_V[None, None, :], logits_BTV, -jnp.inf)
    log_z_BT = log_sum_exp(logits_BTV)
    # The target's logit is picked by a sum, which shares one pass over V with the other sums. The
    # gradient of an indexed element would be scattered into a separate array. An id without a
    # column gives NaN.
    is_target_BTV = jnp.arange(logits_BTV.shape[-1])[None, None, :] == targets_BT[:, :, None]
    target_BT = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0.0), axis=-1)
    is_id_BT = (targets_BT >= 0) & (targets_BT < logits_BTV.shape[-1])
    target_BT = jnp.where(is_id_BT, target_BT, jnp.nan)
    nll_BT = log_z_BT - target_BT
    objective_BT = nll_BT
    if options.label_smoothing:
        finite_BTV = jnp.where(real_V[None, None, :], logits_BTV, 0.0)
        uniform_BT = log_z_BT - finite_BTV.sum(axis=-1) / options.vocab_size
        objective_BT = nll_BT + options.label_smoothing * (uniform_BT - nll_BT)
    if options.z_loss:
        objective_BT = objective_BT + options.z_loss * jnp.square(log_z_BT)
    return LossTerms(jnp.sum(weights_BT * objective_BT), jnp.sum(weights_BT * nll_BT))


@jax.custom_vjp
def log_sum_exp(logits_BTV: jax.Array) -> jax.Array:
    """log sum_v exp(z_v): [B, T], as jax.nn.logsumexp; on GPUs in one pass over the logits.

    Separate passes for the maximum and the sum would be a third of what the loss reads on a GPU,
    and no array of a step is read more than the logits.
    """
    two_passes = functools.partial(jax.nn.logsumexp, axis=-1)
    return jax.lax.platform_dependent(logits_BTV, cuda=log_sum_exp_in_one_pass, default=two_passes)


def log_sum_exp_in_one_pass(logits_BTV: jax.Array) -> jax.Array:
    """Pairs (m, s) that stand for s exp(m), m the largest so far, added up two by two."""

    def add(one: tuple[jax.Array, ...], other: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        (m, s), (n, t) = one, other
        larger, smaller = jnp.maximum(m, n), jnp.minimum(m, n)
        # -inf - (-inf) is NaN. A factor of 1 does no harm in that case: the sum is multiplied by
        # exp(-inf) at the first finite logit.
        factor = jnp.where(smaller == larger, 1.0, jnp.exp(smaller - larger))
        return larger, jnp.where(m >= n, s + t * factor, t + s * factor)

    pairs = (logits_BTV, jnp.ones_like(logits_BTV))
    nothing = tuple(jnp.asarray(x, logits_BTV.dtype) for x in (-jnp.inf, 0.0))
    largest_BT, sum_BT = jax.lax.reduce(pairs, nothing, add, (logits_BTV.ndim - 1,))
    return largest_BT + jnp.log(sum_BT)


def _log_sum_exp_forward(logits_BTV):
    log_z_BT = log_sum_exp(logits_BTV)
    return log_z_BT, (logits_BTV, log_z_BT)


def _log_sum_exp_backward(kept, d_log_z_BT):
    """d log_z / d z_v is the softmax."""
    logits_BTV, log_z_BT = kept
    return (jnp.exp(logits_BTV - log_z_BT[:, :, None]) * d_log_z_BT[:, :, None],)


log_sum_exp.defvjp(_log_sum_exp_forward, _log_sum_exp_backward)


def _logits(hidden_BTD: jax.Array, head_DV: jax.Array) -> jax.Array:
    logits_BTV = contract("BTD,DV->BTV", hidden_BTD, head_DV)
    return constrain(logits_BTV, "batch", "sequence", "vocab")


def _by_device(b: int, s: int, x_BTF: jax.Array) -> jax.Array:
    """[B, T, F] -> [b, s, R, F]: the positions that one device holds, as rows of one matrix."""
    B, T, F = x_BTF.shape
    x_bsBTF = x_BTF.reshape(b, B // b, s, T // s, F).swapaxes(1, 2)
    return x_bsBTF.reshape(b, s, -1, F)


def scan_positions(
    function: Callable[..., Any], carry: Any, chunks: int, *arrays_BT: jax.Array
) -> tuple[Any, Any]:
    """`jax.lax.scan` over parts of the T positions, so that only one part's logits exist at once.

    A part has every C-th position, because contiguous parts would each lie on a few devices of the
    mesh's context axis, with the others idle.

    Args:
      function: (carry, arrays [B, T/C, ...]) -> (carry, results [B, T/C, ...]).
      chunks: C. If it does not divide T, the last positions of the parts are filled up with zeros.
      arrays_BT: arrays [B, T, ...].
    Returns:
      the last carry, and the results of all positions, [B, T, ...].
    """
    B, T = arrays_BT[0].shape[:2]

    def split(x: jax.Array) -> jax.Array:
        if missing := -T % chunks:
            x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, chunks, *x.shape[2:]), 2, 0)

    def join(x: jax.Array) -> jax.Array:
        length = chunks * x.shape[2]  # spelt out: a result may be empty, as [..., 0]
        return jnp.moveaxis(x, 0, 2).reshape(B, length, *x.shape[3:])[:, :T]

    carry, results = jax.lax.scan(function, carry, tuple(map(split, arrays_BT)))
    return carry, jax.tree.map(join, results)
