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
from llm.text.windows import Batch
from llm.training.step import BATCH_AXES, split_batch

# The total negative log-likelihood of a batch's targets, nats, each times its weight.
EvaluationStep = Callable[[Params, Batch], jax.Array]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The negative log-likelihood of some tokens; the sum of two evaluations is that of both.

    Attributes:
      nats: over all tokens.
      tokens: how many were predicted.
      text_bytes: how many bytes of text are in them.
    """

    nats: float
    tokens: int
    text_bytes: int

    @property
    def loss_nats(self) -> float:
        """Mean per token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float | None:
        """Total nats / (total bytes ln 2); None if the tokens have no text."""
        return self.nats / (self.text_bytes * math.log(2)) if self.text_bytes else None

    def __add__(self, other: "Evaluation") -> "Evaluation":
        return Evaluation(
            self.nats + other.nats, self.tokens + other.tokens, self.text_bytes + other.text_bytes
        )


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
    whole: Iterable[Batch] | None = None,
) -> Evaluation:
    """The negative log-likelihood of a split's targets.

    Args:
      batches: cover the split once; a target counts if its weight is 1 and not if it is 0.
      byte_lengths: int32 [V], bytes of text in each token; 0 for end of text.
      whole: counted instead of the batches, if these are only this process's rows.
    """
    nats, counted = [], []
    for batch in batches:
        nats.append(step(params, batch))
        # One batch ahead of the device, no more: what was sent to it cannot be called back when
        # the run is told to stop, and all batches of a large split would lie in its memory.
        jax.block_until_ready(nats[-2:-1])
        if whole is None:
            counted.append(_counted(batch, byte_lengths))
    if whole is not None:
        counted = [_counted(batch, byte_lengths) for batch in whole]
    tokens, text_bytes = (sum(numbers) for numbers in zip((0, 0), *counted, strict=True))
    # Summed in float64 on the host: thousands of float32 batch sums would lose digits.
    total = math.fsum(float(batch) for batch in jax.device_get(nats))
    return Evaluation(total, tokens, text_bytes)


def _counted(batch: Batch, byte_lengths: np.ndarray) -> tuple[int, int]:
    """The tokens that a batch predicts, and their bytes."""
    predicted = batch.tokens[:, 1:][np.asarray(batch.weights, dtype=bool)]
    return predicted.size, int(byte_lengths[predicted].sum())
