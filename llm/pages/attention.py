"""Where each head of a model looks in a given text: the attention weights of one pass over it.

    weights[l, n, t, s] = softmax_s(q_t k_s / sqrt(H)),  s <= t;   rows sum to one, zero for s > t

The model itself keeps no weights while it predicts (llm/model/attention.py). attention_view.py
makes a page of them.

    L layers  N heads  T query position  S key position
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from llm.errors import NonFiniteError, UsageError
from llm.files import readable_bytes
from llm.inference.distribution import NOT_FINITE
from llm.model.attention import attention_scores, visible
from llm.model.gpt import GPT, ModelSpec, Params, bind, normalised
from llm.text.tokenizer import Ids

# All layers are held at once, on the device and again on the host. The limit lets GPT-2 XL show its
# whole context.
LARGEST_BYTES = 5 * 2**30
# Texts are padded to a multiple of this many tokens, so that few programs are compiled.
_LENGTH_MULTIPLE = 64


def check_attention(spec: ModelSpec, ids: Sequence[int] | Ids, name: str = "the text") -> None:
    """Raise a UsageError for a text that is longer than the context, or has too many weights."""
    config, length = spec.config, len(ids)
    pair_bytes = 4 * config.n_layer * config.n_head
    size = pair_bytes * length**2
    if length > config.context_length:
        raise UsageError(
            f"{name} has {length:,} tokens, the model's context holds {config.context_length:,}: a "
            "head never looks further back than that, so there are no weights between its ends; "
            f"shorten it by {length - config.context_length:,} tokens"
        )
    if size > LARGEST_BYTES:
        fitting = int((LARGEST_BYTES / pair_bytes) ** 0.5)
        raise UsageError(
            f"the attention weights of {name} would take {readable_bytes(size)} ({config.n_layer} "
            f"layers x {config.n_head} heads x {length:,} x {length:,} tokens); expected at most "
            f"{readable_bytes(LARGEST_BYTES)}, which is {fitting:,} tokens"
        )


def attention_of(
    spec: ModelSpec, params: Params, ids: Sequence[int] | Ids
) -> npt.NDArray[np.float32]:
    """The weights of one text, float32 [L, N, T, T]; ids in [0, vocab_size).

    Raises:
      UsageError: see `check_attention`.
      NonFiniteError: the model overflows, or its parameters are not finite.
    """
    check_attention(spec, ids)
    length = len(ids)
    # The padding changes nothing: it stands behind the text, and a causal head looks only back.
    padded = min(spec.config.context_length, -(-length // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE)
    tokens_1T = np.zeros((1, max(padded, 1)), np.int32)
    tokens_1T[0, :length] = ids
    weights = np.asarray(_weights(spec, params, tokens_1T))[:, :, :length, :length]
    if not np.isfinite(weights).all():
        raise NonFiniteError(NOT_FINITE)
    return np.ascontiguousarray(weights)


@functools.partial(jax.jit, static_argnums=0)
def _weights(spec: ModelSpec, params: Params, tokens_1T: jax.Array) -> jax.Array:
    return attention_weights(bind(spec, params), tokens_1T)[:, 0]


def attention_weights(model: GPT, tokens_BT: jax.Array) -> jax.Array:
    """Where each head looks: float32 [L, B, N, T, T].

    weights[l, b, n, t, s] is how much head n of layer l takes from position s when it computes
    its output at t; each row sums to one and is zero for s > t. All L layers are held at once.
    """
    x_BTD, places = model.embedded(tokens_BT)
    layers = []
    for block in model.blocks:
        read_BTD, attention = normalised(block.attention_norm, x_BTD), block.attention
        query_BTNH, key_BTKH, _ = attention.project(read_BTD, places.positions_BT)
        visible_BTS = visible(places, places, attention.window)
        cap = model.spec.config.attention_soft_cap
        scores_BKGTS = attention_scores(query_BTNH, key_BTKH, visible_BTS, cap)
        layers.append(jax.lax.collapse(jax.nn.softmax(scores_BKGTS, axis=-1), 1, 3))
        x_BTD, _, _ = block(x_BTD, places)
    return jnp.stack(layers)
