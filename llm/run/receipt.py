"""The receipt of a checkpoint: what its parameters predict for a few fixed tokens.

The log-probabilities are computed when a checkpoint is saved, from the parameters in the device's
memory, and again when it is opened, from the parameters that were read. They differ if the arrays,
the tokenizer or a setting of the model differ. They are always computed in float32, at the highest
precision of the matrix units, so that any machine can recompute what another one saved.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from llm.errors import CheckpointError, NonFiniteError
from llm.model.gpt import ModelSpec, Params, bind
from llm.model.loss import token_log_likelihood
from llm.model.sharding import gathered

ROWS, LENGTH = 2, 64

# Two backends' float32 sums of a few thousand terms differ by less; another model by far more.
TOLERANCE_NATS = 1e-3


def receipt_tokens(split: Any, context_length: int) -> np.ndarray:
    """int32 [ROWS, T + 1], T <= LENGTH: the first and the middle window of a split of tokens."""
    length = min(LENGTH, context_length, len(split) - 1) + 1
    middle = (len(split) - length) // 2
    return np.stack([split.read(start, length) for start in (0, middle)])


def receipt_logprobs(spec: ModelSpec, params: Params, tokens_BT: np.ndarray) -> jax.Array:
    """log P(x_t | x_<t), float32 [B, T], dispatched and not waited for."""
    exact = ModelSpec(spec.config, spec.vocab_size, "float32")
    return gathered(_compute(exact, params, np.asarray(tokens_BT)), params)


@functools.partial(jax.jit, static_argnums=0)
def _compute(spec: ModelSpec, params: Params, tokens_BT: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return token_log_likelihood(bind(spec, params)(tokens_BT[:, :-1]), tokens_BT[:, 1:])


def make_receipt(
    tokens_BT: np.ndarray, logprobs_BT: jax.Array | np.ndarray, tokenizer_sha256: str
) -> dict[str, Any]:
    """The receipt as JSON; waits for the log-probabilities.

    Raises:
      NonFiniteError: the model gives none; its weights can be finite all the same.
    """
    if not np.isfinite(logprobs_BT).all():
        raise NonFiniteError(
            "the weights are finite, but the model's log-probabilities are not: it has diverged, "
            "and was not saved. Lower optimizer.learning_rate (with --run.allow-change): the same "
            "command then goes on from the last checkpoint"
        )
    return {
        "tokenizer_sha256": tokenizer_sha256,
        "tokens": tokens_BT.tolist(),
        "logprobs": np.asarray(logprobs_BT, np.float64).tolist(),
    }


def check_receipt(
    spec: ModelSpec, params: Params, receipt: Mapping[str, Any], tokenizer_sha256: str, where: str
) -> float:
    """Largest |recomputed - saved| log-probability, nats.

    Raises:
      CheckpointError: the difference is too large, or the model was trained with another tokenizer.
    """
    if receipt["tokenizer_sha256"] != tokenizer_sha256:
        raise CheckpointError(
            f"{where} was trained with the tokenizer {receipt['tokenizer_sha256']}; the run "
            f"directory holds {tokenizer_sha256}: tokenizer/ and the checkpoint are not of one run"
        )
    try:
        tokens_BT = np.array(receipt["tokens"], np.int32)
        saved = np.array(receipt["logprobs"], float)
        rows, length = tokens_BT.shape
        whole = rows == ROWS and 1 < length <= 1 + min(LENGTH, spec.config.context_length)
        whole = whole and saved.shape == (rows, length - 1) and tokens_BT.min() >= 0
    except (TypeError, ValueError, OverflowError):  # unequal rows, words, a number of many digits
        whole = False
    if not whole:
        raise CheckpointError(
            f"{where} has a receipt that is damaged: expected {ROWS} rows of at most {LENGTH + 1} "
            "tokens, and the log-probability of each but the first; restore it from a copy"
        )
    found = np.full_like(saved, np.nan)  # if the model does not have the receipt's tokens
    if tokens_BT.max() < spec.vocab_size:
        found = np.asarray(receipt_logprobs(spec, params, tokens_BT), np.float64)
    difference = float(np.abs(found - saved).max())
    if not difference <= TOLERANCE_NATS:
        raise CheckpointError(
            f"{where} is not the model that was saved: it gives its receipt's tokens a mean "
            f"log-probability of {found.mean():.6f} nats, expected {saved.mean():.6f} (largest "
            f"difference {difference:.3g}, tolerated {TOLERANCE_NATS}); config.toml or the "
            "checkpoint was changed: restore it from a copy"
        )
    return difference
