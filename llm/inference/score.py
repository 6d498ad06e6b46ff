"""Teacher-forced log-probabilities of given texts: log P(x_t | x_<t) for every token but the first.

    total nats = - sum_t log P(x_t | x_<t)        (the training loss on these tokens, not divided)

A text longer than the context is read through windows. The first window predicts all its tokens;
each later one moves on by `stride` tokens and predicts those only, so every token is predicted
once, from at least context_length - stride + 1 tokens before it, or all there are. A small stride
gives more context and takes context_length / stride times the work. With context 4 and stride 2:

    window 1   reads a b c d      and predicts   b c d e
    window 2   reads     c d e f  and predicts         f g

What it is not: sampling; nothing is drawn. Numbers differ from cached decoding by rounding only.

Source of the strided evaluation: Baevski & Auli 2019, "Adaptive Input Representations for Neural
Language Modeling".

    B windows of a batch  T inputs of a window  K predicted positions, the last of T  V vocabulary
    W watched ids
"""

import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from llm.errors import NonFiniteError, UsageError
from llm.inference.decode import round_up
from llm.inference.distribution import (
    NOT_FINITE,
    Described,
    chunk_length,
    describe_positions,
    log_probabilities,
    to_host,
)
from llm.inference.records import NO_NUMBERS, Numbers, Spellings, TokenRecord
from llm.inference.transcript import Transcript
from llm.model.gpt import ModelSpec, Params, bind
from llm.model.loss import scan_positions
from llm.model.sharding import gathered
from llm.text.tokenizer import Ids, Tokenizer

# Tokens read by one call: enough for large matrix products on any device.
BATCH_TOKENS = 8192
# Windows collected before the first is computed, so that windows of one size share a batch.
GROUP_WINDOWS = 256

TokenIds = Sequence[int] | Ids
Scored = tuple[Ids, list[Numbers]]


@dataclass(frozen=True)
class Window:
    """Part of a text that is read at once.

    tokens: the inputs and, behind them, the token that follows.
    first: index in the text of the first token that this window predicts.
    predicted: how many it predicts, the last ones of `tokens`.
    T, K: sizes of the batch that it is part of.
    """

    tokens: Ids
    first: int
    predicted: int
    T: int
    K: int


@dataclass(frozen=True)
class Scorer:
    """A model ready to score texts.

    Attributes:
      top: how many alternatives each record lists.
      watch: ids that each record lists whatever their rank.
      stride: tokens between windows of a long text; 0: half of the context.
    """

    spec: ModelSpec
    params: Params
    tokenizer: Tokenizer
    top: int = 0
    watch: Sequence[int] = ()
    stride: int = 0

    def __post_init__(self) -> None:
        context = self.spec.config.context_length
        if not 0 <= self.stride <= context:
            raise UsageError(
                f"stride = {self.stride}: expected 1 to {context}, the model's context length "
                "(0: half of it)"
            )
        outside = [id_ for id_ in self.watch if not 0 <= id_ < self.spec.vocab_size]
        if outside:
            raise UsageError(
                f"watch has the token id {outside[0]}; ids go from 0 to {self.spec.vocab_size - 1}"
            )

    def score(self, texts: Iterable[TokenIds]) -> Iterator[list[TokenRecord]]:
        """For each text, in order, a record of each of its tokens; the first has no numbers.

        Args:
          texts: token ids in [0, vocab_size). A group of them is held at a time.
        Raises:
          NonFiniteError: the model gives no probabilities.
        """
        for sample, (ids, numbers) in enumerate(self._score(texts)):
            transcript = Transcript(self.spellings, sample)
            tokens = [
                transcript.add(id_, "prompt", said)
                for id_, said in zip(ids.tolist(), numbers, strict=True)
            ]
            if tokens:
                tokens[-1] = transcript.close(tokens[-1])
            yield tokens

    def distributions(self, ids: TokenIds) -> np.ndarray:
        """The whole distribution at every token of one text but the first.

        Returns:
          float32 [len(ids) - 1, V] log-probabilities; row t is of the token at t + 1.
        Raises:
          NonFiniteError: the model gives no probabilities.
        """
        parts = [np.zeros((0, self.spec.vocab_size), np.float32)]
        for window in self.windows(np.asarray(ids, np.int32)):
            inputs_BT, _ = pad([window])
            logprobs_KV = np.asarray(_whole(self.spec, self.params, inputs_BT, window.K))
            parts.append(logprobs_KV[predicted_slice(window)])
            if not np.isfinite(parts[-1]).all():
                raise NonFiniteError(NOT_FINITE)
        return np.concatenate(parts)

    @functools.cached_property
    def spellings(self) -> Spellings:
        """Of the tokens met so far."""
        return Spellings(self.tokenizer)

    def windows(self, ids: Ids) -> Iterator[Window]:
        """How a text is read: every token but the first is predicted by exactly one window."""
        context, last = self.spec.config.context_length, len(ids) - 1
        stride = self.stride or max(1, context // 2)
        end = min(context, last)
        if end > 0:
            T = min(context, round_up(end, at_least=16))
            yield Window(ids[: end + 1], 1, end, T, T)
        while end < last:
            first, end = end + 1, min(end + stride, last)
            yield Window(ids[end - context : end + 1], first, end - first + 1, context, stride)

    def _score(self, texts: Iterable[TokenIds]) -> Iterator[Scored]:
        group: list[tuple[Ids, list[Window]]] = []
        for text in texts:
            ids = np.asarray(text, np.int32)
            group.append((ids, list(self.windows(ids))))
            if sum(len(windows) for _, windows in group) >= GROUP_WINDOWS:
                yield from self._score_group(group)
                group = []
        yield from self._score_group(group)

    def _score_group(self, group: Sequence[tuple[Ids, list[Window]]]) -> Iterator[Scored]:
        scored: list[Scored] = [(ids, [NO_NUMBERS] * len(ids)) for ids, _ in group]
        of_size: dict[tuple[int, int], list[tuple[int, Window]]] = defaultdict(list)
        for text, (_, windows) in enumerate(group):
            for window in windows:
                of_size[window.T, window.K].append((text, window))
        for (T, _), members in of_size.items():
            rows = _rows(T)
            for start in range(0, len(members), rows):
                batch = members[start : start + rows]
                described = jax.device_get(self._describe([window for _, window in batch]))
                for b, (text, window) in enumerate(batch):
                    row = (b, predicted_slice(window))
                    of_window = jax.tree.map(lambda x, row=row: x[row], described)
                    place = slice(window.first, window.first + window.predicted)
                    numbers = to_host(of_window, None, self._top(), self.watch, self.spellings)
                    scored[text][1][place] = numbers
        yield from scored

    def logprobs(self, texts: Sequence[TokenIds]) -> jax.Array:
        """Of the first texts' tokens, float32 [B, T], dispatched and not waited for.

        The program of `score` is used for them. Behind the texts and beyond their ends is noise.

        Args:
          texts: of one length, read in one window; as many count as one batch has.
        """
        windows = [window for ids in texts for window in self.windows(np.asarray(ids, np.int32))]
        return self._describe(windows[: _rows(windows[0].T)]).logprob

    def _describe(self, windows: Sequence[Window]) -> Described:
        """Arrays [B, K, ...] over the predicted positions of windows of one size."""
        inputs_BT, targets_BK = pad(windows)
        watch_BW = np.tile(np.array(self.watch, np.int32), (len(inputs_BT), 1))
        arguments = self.spec, self.params, inputs_BT, targets_BK, watch_BW, self._top()
        return gathered(_describe_batch(*arguments), self.params)

    def _top(self) -> int:
        return min(self.top, self.spec.vocab_size)


def pad(windows: Sequence[Window]) -> tuple[np.ndarray, np.ndarray]:
    """Inputs [B, T] and targets [B, K] of windows of one size, padded with zeros."""
    T, K = windows[0].T, windows[0].K
    tokens_BT = np.zeros((round_up(len(windows)), T + 1), np.int32)
    for b, window in enumerate(windows):
        tokens_BT[b, : len(window.tokens)] = window.tokens
    return tokens_BT[:, :-1], tokens_BT[:, T + 1 - K :]


def _rows(T: int) -> int:
    """How many windows of T inputs a batch has at most, a power of two."""
    return 1 << (max(1, BATCH_TOKENS // T).bit_length() - 1)


def predicted_slice(window: Window) -> slice:
    """Which of the last K positions predict the window's tokens."""
    end = len(window.tokens) - 1 - (window.T - window.K)
    return slice(end - window.predicted, end)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _describe_batch(
    spec: ModelSpec,
    params: Params,
    inputs_BT: jax.Array,
    targets_BK: jax.Array,
    watch_BW: jax.Array,
    top: int,
) -> Described:
    model = bind(spec, params)
    hidden_BKD = model.hidden(inputs_BT)[:, inputs_BT.shape[1] - targets_BK.shape[1] :]
    return describe_positions(model, hidden_BKD, targets_BK, watch_BW, top)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _whole(spec: ModelSpec, params: Params, inputs_1T: jax.Array, K: int) -> jax.Array:
    """float32 [K, V]: every token's log-probability at the last K positions."""
    model = bind(spec, params)
    hidden_1KD = model.hidden(inputs_1T)[:, inputs_1T.shape[1] - K :]
    chunks = K // chunk_length(1, K, spec.vocab_size)

    def on_chunk(_, chunk):
        return None, log_probabilities(model, *chunk)

    return scan_positions(on_chunk, None, chunks, hidden_1KD)[1][0]
