"""Continue texts: requests in, tokens with their probabilities out, as they are drawn.

    decoder = Decoder.create(spec, params, tokenizer)
    for new in decoder.generate([Request(ids, sampling, max_new_tokens=100)]):
        print("".join(token.text for token in new.tokens), end="")

Requests of one call share the batch and nothing else: each has its own prompt length, settings,
seed, stop rules and listed alternatives, and gets the tokens that it would get alone, up to the
rounding of matrix products, which may depend on the batch's size. The host reads one chunk of
tokens while the device computes the next. Every size is rounded up to a power of two, so that few
programs are compiled.

A sample ends, in this order, by
    stop          a stop string is complete (found on the host, see transcript.py)
    end_of_text   the tokenizer's end of text was drawn; that token has its record and no text
    stop          a token of stop_ids was drawn
    length        max_new_tokens are drawn
    context       prompt and drawn tokens fill context_length

What it is not: a server. It runs one batch from beginning to end; engine.py lets rows join and
leave, with the same programs and the same Row.

    B rows, rounded up  T prompt position  W watched ids  E ids that end a row
"""

import dataclasses
import functools
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm.errors import NonFiniteError, UsageError
from llm.inference.distribution import NOT_FINITE, Described, to_host
from llm.inference.filters import RowSettings, Steering
from llm.inference.programs import (
    CHUNK,
    DecodeState,
    Drawn,
    commit,
    decode_chunk,
    empty,
    for_decoding,
    grow,
    prefill_piece,
)
from llm.inference.records import NO_NUMBERS, Numbers, Sampling, Spellings, TokenRecord
from llm.inference.transcript import StopStrings, Transcript
from llm.model.gpt import ModelSpec, Params
from llm.text.tokenizer import Ids, Tokenizer

# Positions of the longest piece of a prompt: its attention scores are B N 256 S numbers.
PIECE = 256
# A chunk grows while it takes less than this, so that text streams at a steady pace whatever the
# speed of the model, and little is wasted when the host finds a stop string.
CHUNK_SECONDS = 0.1
# Ids that end a row, as many as the device knows; others are found on the host like stop strings.
ENDS = 8

TokenIds = Sequence[int] | Ids

_PLAIN = Sampling()


@dataclass(frozen=True)
class Request:
    """One text to continue.

    Attributes:
      prompt: token ids, at least one and at most context_length.
      index: the i of "sample i is a function of seed and i".
      stop: strings that end the sample; they are cut from its text. The first `min_tokens` of the
        sampling are not searched.
      stop_ids: ids that end the sample; the token has its record and no text.
      keep_stop: the stop string, or the text of the token in stop_ids, is part of the text.
      ignore_end: an end of text does not end the sample.
      top: how many alternatives each record lists; None: no probabilities, which is faster.
      watch: ids that each record lists whatever their rank.
      sample: the number that its records carry.
    """

    prompt: TokenIds
    sampling: Sampling = _PLAIN
    index: int = 0
    max_new_tokens: int = 200
    stop: Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    keep_stop: bool = False
    ignore_end: bool = False
    top: int | None = None
    watch: Sequence[int] = ()
    sample: int = 0


@dataclass(frozen=True)
class NewTokens:
    """Tokens of one row that are final now. The first ones of a row hold its whole prompt; the last
    ones have a `finish`: "stop", "end_of_text", "length" or "context".

    Attributes:
      stop: what stopped it: one of the request's `stop` or `stop_ids`.
    """

    row: int
    tokens: list[TokenRecord]
    finish: str | None
    stop: str | int | None = None


class RequestArrays(NamedTuple):
    """A batch of requests as arrays, its sizes rounded up.

    tokens_BU: the prompts, zeros on the right. U = T + 1, and T is a multiple of the piece. Of a
      prompt that is one token longer than the context, the last is predicted and not read.
    lengths_B: how many tokens of each are read.
    """

    tokens_BU: np.ndarray
    lengths_B: np.ndarray
    left_B: np.ndarray
    settings: RowSettings
    watch_BW: np.ndarray
    ends_BE: np.ndarray
    steering: Steering | None
    top: int | None


Prefill = Generator[None, None, tuple[DecodeState, Described | None]]


@dataclass(frozen=True)
class Decoder:
    """A model ready to continue texts."""

    spec: ModelSpec
    params: Params
    tokenizer: Tokenizer

    @classmethod
    def create(cls, spec: ModelSpec, params: Params, tokenizer: Tokenizer) -> "Decoder":
        """Prepare the parameters once, for any number of `generate` calls."""
        return cls(*for_decoding(spec, params), tokenizer)

    @functools.cached_property
    def spellings(self) -> Spellings:
        """Of the tokens met so far."""
        return Spellings(self.tokenizer)

    def check(self, request: Request, longest: int = 0) -> None:
        """Raise a UsageError for a request that cannot be served.

        Args:
          longest: tokens of a prompt at the most; 0: the context.
        """
        length, limit = len(request.prompt), longest or self.spec.config.context_length
        if not length:
            raise UsageError("a prompt needs at least one token")
        if length > limit:
            raise UsageError(
                f"the prompt has {length} tokens, the model's context holds {limit}; shorten the "
                f"prompt by {length - limit} {'token' if length == limit + 1 else 'tokens'}"
            )
        if "" in request.stop:
            raise UsageError("a stop string is empty: it would stop before the first token")
        bias = request.sampling.logit_bias or {}
        for name, ids in (
            ("prompt", request.prompt),
            ("watch", request.watch),
            ("stop_ids", request.stop_ids),
            ("logit_bias", bias),
        ):
            outside = [int(id_) for id_ in ids if not 0 <= id_ < self.spec.vocab_size]
            if outside:
                raise UsageError(
                    f"{name} has the token id {outside[0]}; ids go from 0 to "
                    f"{self.spec.vocab_size - 1}"
                )
        if request.sampling.min_tokens and len(self.ends(request)) >= self.spec.vocab_size:
            raise UsageError("min_tokens forbids every token: each of them ends the sample")

    def ends(self, request: Request) -> tuple[int, ...]:
        """The ids that end a request's sample, each once."""
        ends = () if request.ignore_end else self.tokenizer.ends_of_text
        return tuple(dict.fromkeys((*ends, *request.stop_ids)))

    def generate(self, requests: Sequence[Request]) -> Iterator[NewTokens]:
        """Continue all requests together; each row's tokens come in order as they are final.

        Raises:
          UsageError: see `check`.
          NonFiniteError: the model's logits are NaN or infinite.
        """
        for request in requests:
            self.check(request)
        rows = [Row(request, self) for request in requests]
        batch = self.batch(requests)
        longest = min(self.spec.config.context_length, int((batch.lengths_B + batch.left_B).max()))
        state, described = exhaust(self.prefill(batch, round_up(longest, at_least=64)))
        for index, row in enumerate(rows):
            tokens = row.begin(of_row(described, index))
            yield NewTokens(index, tokens, row.finish)
        for drawn in self._chunks(batch, state, rows):
            for index, row in enumerate(rows):
                new = row.read(index, drawn)
                if new is not None:
                    yield new

    def batch(
        self, requests: Sequence[Request], at_least: int = 16, listed: int = 0
    ) -> RequestArrays:
        """The requests as arrays.

        Args:
          at_least: positions of the narrowest array of prompts, a power of two.
          listed: columns of alternatives, of watched and of steered ids at the least, so that
            requests with fewer of them share a program; 0: as many as these requests need.
        """
        B = round_up(len(requests))
        padding = [Request([0], max_new_tokens=0)] * (B - len(requests))
        rows = [*requests, *padding]
        context = self.spec.config.context_length
        lengths_B = np.array([min(len(row.prompt), context) for row in rows], np.int32)
        width = round_up(int(lengths_B.max()), at_least)
        watched = max(listed, round_up(max(len(row.watch) for row in rows), at_least=4))
        left_B = np.array([min(row.max_new_tokens, context) for row in rows], np.int32)
        tops = [row.top for row in requests if row.top is not None]
        return RequestArrays(
            tokens_BU=_padded([row.prompt for row in rows], width + 1, np.int32(0)),
            lengths_B=lengths_B,
            left_B=left_B,
            settings=RowSettings.stack([row.sampling for row in rows], [row.index for row in rows]),
            watch_BW=_padded([row.watch for row in rows], watched, np.int32(-1)),
            ends_BE=_padded([self.ends(row)[:ENDS] for row in rows], ENDS, np.int32(-1)),
            steering=self._steering(rows, left_B, 2 * listed),
            top=self.columns(max(tops), listed) if tops else None,
        )

    def columns(self, top: int, listed: int) -> int:
        """How many alternatives a program computes if `top` are asked for."""
        return min(self.spec.vocab_size, round_up(top, at_least=max(16, listed)))

    def _steering(
        self, rows: Sequence[Request], left_B: np.ndarray, at_least: int
    ) -> Steering | None:
        """What steers each row; None if nothing does and no columns are asked for."""
        entries: list[list[tuple[int, float, int]]] = []
        for row, left in zip(rows, left_B.tolist(), strict=True):
            bias, least = row.sampling.logit_bias or {}, row.sampling.min_tokens or 0
            entries.append([(id_, value, -1) for id_, value in bias.items()])
            entries[-1] += [(id_, -np.inf, left - least) for id_ in self.ends(row) if least]
        K = max(at_least, *map(len, entries))
        nothing = np.int32(2**31 - 1), np.float32(0), np.int32(0)
        columns = ([[entry[part] for entry in row] for row in entries] for part in range(3))
        arrays = (_padded(column, K, fill) for column, fill in zip(columns, nothing, strict=True))
        return Steering(*arrays) if K else None

    def prefill(self, batch: RequestArrays, capacity: int, piece: int = 0) -> Prefill:
        """Run all prompts into a new cache, piece by piece; yields while the device computes each.

        A piece looks at the whole cache, which therefore doubles as long prompts fill it.

        Args:
          capacity: positions of the cache at the end, or as many as the prompts need.
          piece: positions of a piece; 0: PIECE, or the whole prompts if they are shorter.
        Returns:
          the state after the prompts, and what the model says of their tokens: [B, T, ...].
        """
        B, T = len(batch.tokens_BU), batch.tokens_BU.shape[1] - 1
        piece = piece or min(T, PIECE)
        state = empty(self.spec, self.params, B, max(piece, min(PIECE, capacity)))
        cache, hidden_BD = state.cache, state.hidden_BD
        described = []
        for start in range(0, int(batch.lengths_B.max()), piece):
            if start + piece > cache.capacity:
                cache = grow(cache, round_up(start + piece))
            inputs_BP = batch.tokens_BU[:, start : start + piece]
            targets_BP = batch.tokens_BU[:, start + 1 : start + piece + 1]
            cache, hidden_BD, part = prefill_piece(
                self.spec,
                self.params,
                cache,
                hidden_BD,
                inputs_BP,
                targets_BP,
                batch.lengths_B,
                batch.settings,
                batch.watch_BW,
                top=batch.top,
            )
            yield
            described.append(jax.device_get(part))
        active_B = (batch.left_B > 0) & (batch.lengths_B < self.spec.config.context_length)
        cache = dataclasses.replace(cache, length_B=jnp.asarray(batch.lengths_B))
        if capacity > cache.capacity:
            cache = grow(cache, capacity)
        state = DecodeState(cache, hidden_BD, jnp.asarray(active_B), jnp.asarray(batch.left_B))
        state = commit(state, self.params)
        if batch.top is None:
            return state, None
        return state, jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *described)

    def chunk(
        self, batch: RequestArrays, state: DecodeState, alive_B: np.ndarray, steps: int
    ) -> tuple[DecodeState, Drawn, jax.Array]:
        """Start `decode_chunk` for these rows, and return while the device computes."""
        return decode_chunk(
            self.spec,
            self.params,
            state,
            batch.settings,
            batch.watch_BW,
            alive_B,
            steps,
            batch.ends_BE,
            batch.steering,
            top=batch.top,
        )

    def _chunks(
        self, batch: RequestArrays, state: DecodeState, rows: Sequence["Row"]
    ) -> Iterator[Drawn]:
        """Drawn numpy arrays [steps, B, ...] until every row has ended.

        The device is one chunk ahead: it computes the next one while the caller reads.
        """
        alive_B = np.zeros(len(batch.lengths_B), bool)
        steps = 1
        waiting: tuple[Drawn, jax.Array] | None = None
        while any(row.finish is None for row in rows):
            alive_B = alive_B.copy()  # the device may still be reading the last one
            alive_B[: len(rows)] = [row.finish is None for row in rows]
            started = time.perf_counter()
            state, drawn, done = self.chunk(batch, state, alive_B, steps)
            if waiting is not None:
                yield read_drawn(*waiting)
            if time.perf_counter() - started < CHUNK_SECONDS:
                steps = min(2 * steps, CHUNK)
            waiting = drawn, done


class Row:
    """The host's side of one request: its text, its stop rules and its end."""

    def __init__(self, request: Request, decoder: Decoder):
        self.request = request
        self.finish: str | None = None
        self._spellings = decoder.spellings
        self._transcript = Transcript(decoder.spellings, request.sample)
        self._stops = StopStrings(request.stop, request.keep_stop)
        self._ends = decoder.ends(request)
        self._least = request.sampling.min_tokens or 0
        self._stopped: str | int | None = None
        self._room = decoder.spec.config.context_length - len(request.prompt)
        self._drawn = 0

    def begin(self, described: Described | None) -> list[TokenRecord]:
        """The prompt's tokens; `described` [T, ...] at t is of the token at t + 1."""
        prompt = self.request.prompt
        numbers = [NO_NUMBERS, *self._numbers(described, len(prompt) - 1, None)]
        tokens = [
            self._transcript.add(int(id_), "prompt", said)
            for id_, said in zip(prompt, numbers, strict=True)
        ]
        self.finish = self._end(None)
        if self.finish:
            tokens[-1] = self._transcript.close(tokens[-1])
        return tokens

    def read(self, row: int, drawn: Drawn) -> NewTokens | None:
        """The tokens of a chunk that are final for this row; None if there are none."""
        if self.finish is not None:
            return None
        steps = self._steps_of(np.asarray(drawn.ids)[:, row])
        ids = np.asarray(drawn.ids)[:steps, row]
        logprobs = np.asarray(drawn.sampling_logprobs)[:steps, row]
        described = jax.tree.map(lambda x: x[:, row], drawn.described)
        numbers = self._numbers(described, steps, logprobs)
        if not np.isfinite(logprobs).all():
            raise NonFiniteError(NOT_FINITE)
        tokens: list[TokenRecord] = []
        for id_, said in zip(ids.tolist(), numbers, strict=True):
            tokens += self._add(id_, said)
            if self.finish is not None:
                break
        if not tokens and not self.finish:
            return None
        return NewTokens(row, tokens, self.finish, self._stopped)

    def _steps_of(self, ids: np.ndarray) -> int:
        """How many of a chunk's ids were drawn before this row ended; the rest is noise."""
        steps = min(len(ids), self.request.max_new_tokens - self._drawn, self._room - self._drawn)
        ends = np.flatnonzero(np.isin(ids[:steps], self._ends))
        return int(ends[0]) + 1 if ends.size else steps

    def _add(self, id_: int, numbers: Numbers) -> list[TokenRecord]:
        self._drawn += 1
        self.finish = self._end(id_)
        silent = self.finish == "stop" and not self.request.keep_stop
        token = self._transcript.add(id_, "generated", numbers, silent)
        searched = self._drawn > self._least
        released, stop = self._stops.add(token) if searched else ([token], None)
        if self.finish == "stop":
            self._stopped = id_
        if stop is not None:
            self.finish, self._stopped = "stop", stop
        elif self.finish is not None:
            released += self._stops.release()
            released[-1] = self._transcript.close(released[-1])
        return released

    def _end(self, id_: int | None) -> str | None:
        if id_ in self._ends:
            return "stop" if id_ in self.request.stop_ids else "end_of_text"
        if self._drawn == self.request.max_new_tokens:
            return "length"
        return "context" if self._drawn == self._room else None

    def _numbers(
        self, described: Described | None, count: int, drawn: np.ndarray | None
    ) -> Sequence[Numbers]:
        """Of the first `count` tokens; none if nobody asked.

        Args:
          drawn: their sampling log-probabilities; None for tokens that were given.
        """
        if described is None or self.request.top is None:
            return [NO_NUMBERS] * count
        described = jax.tree.map(lambda x: x[:count], described)
        return to_host(described, drawn, self.request.top, self.request.watch, self._spellings)


def encode_prompt(tokenizer: Tokenizer, text: str) -> Ids:
    """The ids to continue from, at least one: a model predicts a token only from those before it.

    The beginning of text that the model was trained with comes first. An empty text is that alone,
    or an end of text, as between two documents in training: token 0 of the prompt, with its name,
    no bytes and no text. Without an end of text it becomes a newline.

    Raises:
      UsageError: the text is empty and the tokenizer has neither.
    """
    ids = tokenizer.begun(tokenizer.encode(text))
    if len(ids):
        return ids
    if tokenizer.end_of_text is not None:
        return np.array([tokenizer.end_of_text], np.int32)
    try:
        return tokenizer.encode("\n")
    except UsageError:
        raise UsageError(
            f"the prompt is empty, and the tokenizer {tokenizer.name!r} has neither an end of text "
            "nor a newline to start from; give a prompt of at least one character"
        ) from None


def round_up(size: int, at_least: int = 1) -> int:
    """The next power of two, and at least `at_least`; 0 stays 0."""
    return max(at_least, 1 << (size - 1).bit_length()) if size else 0


def _padded(rows: Sequence[Sequence[Any] | Ids], width: int, fill: np.generic) -> np.ndarray:
    """The rows as one array, filled up on the right."""
    array = np.full((len(rows), width), fill)
    for place, row in zip(array, rows, strict=True):
        place[: len(row)] = row
    return array


def of_row(described: Described | None, row: int) -> Described | None:
    """[B, T, ...] -> [T, ...]"""
    return jax.tree.map(lambda x: x[row], described)


def exhaust(prefill: Prefill) -> tuple[DecodeState, Described | None]:
    """Run a prefill to its end, and return its result."""
    while True:
        try:
            next(prefill)
        except StopIteration as end:
            return end.value


def read_drawn(drawn: Drawn, done: jax.Array) -> Drawn:
    """Wait for a chunk, and return what it drew as numpy arrays: [steps, B, ...]."""
    drawn, done = jax.device_get((drawn, done))
    return jax.tree.map(lambda x: x[:done], drawn)
