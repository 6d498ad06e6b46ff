"""The loss over a whole validation split: the same tokens each time, weighted by tokens."""

import dataclasses
import math
from collections.abc import Callable, Iterable

import jax
import numpy as np
from jax.sharding import Mesh

from llm.model.gpt import ModelSpec, Params, bind
from llm.model.loss import next_token_loss
from llm.model.sharding import shard_batch
from llm.text.batches import Batch
from llm.text.splits import TokenSplit
from llm.training.step import BATCH_AXES, split_batch

# The total negative log-likelihood of a batch's targets, nats, each times its weight.
EvaluationStep = Callable[[Params, Batch], jax.Array]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """loss_nats: mean negative log-likelihood per token. tokens: how many were predicted."""

    loss_nats: float
    bits_per_byte: float | None
    tokens: int


def make_evaluation_step(spec: ModelSpec, mesh: Mesh) -> EvaluationStep:
    """The compiled evaluation of a batch that has weights."""

    def evaluation_step(params: Params, batch: Batch) -> jax.Array:
        model = bind(spec, params)
        inputs_BT, targets_BT, segments_BT = split_batch(batch)
        hidden_BTD = model.hidden(inputs_BT, segments_BT)
        return next_token_loss(model, hidden_BTD, targets_BT, batch.weights).nll

    compiled = jax.jit(evaluation_step)

    def run(params: Params, batch: Batch) -> jax.Array:
        with jax.set_mesh(mesh):
            return compiled(params, shard_batch(mesh, batch, BATCH_AXES))

    return run


def evaluate(
    step: EvaluationStep,
    params: Params,
    batches: Iterable[Batch],
    byte_lengths: np.ndarray,
    split: TokenSplit | None = None,
) -> Evaluation:
    """Mean nats per token, and bits per byte = total nats / (total bytes ln 2).

    Args:
      batches: cover the split once; a target counts if its weight is 1 and not if it is 0.
      byte_lengths: int32 [V], bytes of text in each token; 0 for end of text.
      split: counted instead of the batches, if these are only this process's rows.
    """
    nats, tokens, text_bytes = [], 0, 0
    for batch in batches:
        nats.append(step(params, batch))
        # One batch ahead of the device, no more: what was sent to it cannot be called back when
        # the run is told to stop, and all batches of a large split would lie in its memory.
        jax.block_until_ready(nats[-2:-1])
        if split is None:
            predicted = batch.tokens[:, 1:][np.asarray(batch.weights, dtype=bool)]
            tokens += predicted.size
            text_bytes += int(byte_lengths[predicted].sum())
    if split is not None:
        tokens, text_bytes = _count(split, byte_lengths)
    # Summed in float64 on the host: thousands of float32 batch sums would lose digits.
    total = math.fsum(float(batch) for batch in jax.device_get(nats))
    return Evaluation(
        loss_nats=total / tokens,
        bits_per_byte=total / (text_bytes * math.log(2)) if text_bytes else None,
        tokens=tokens,
    )


def _count(split: TokenSplit, byte_lengths: np.ndarray, at_once: int = 2**20) -> tuple[int, int]:
    """Predicted tokens of a split (all but the first), and their bytes."""
    text_bytes = 0
    for start in range(1, len(split), at_once):
        text_bytes += int(byte_lengths[split.read(start, min(at_once, len(split) - start))].sum())
    return len(split) - 1, text_bytes
