"""Continuous batching: requests join and leave a running batch between its chunks of tokens.

    engine = Engine(decoder, Limits(max_batch=16, max_queue=256))
    engine.start()
    engine.submit([Job(Request(ids, max_new_tokens=50), deliver=print)])

One thread owns the device. It goes round: admit waiting jobs, compute a piece of their prompts,
start the next chunk of all running rows, read the chunk before. So a long prompt holds running
rows up by one piece at a time, and the host reads while the device computes, as in decode.py,
whose programs and whose Row these are.

A prompt is prefilled in a cache of its own and then placed into a free row of the batch: running
rows notice nothing. The batch has the next power of two of rows, so a lone user does not pay for
sixteen, and capacity in powers of four, so that few programs are compiled. It grows when a job
needs it, and shrinks when a quarter of it would do.

What a row gets does not depend on its company beyond rounding. What goes wrong in one row (NaN
logits, a bug in its bookkeeping, a `deliver` that raises) ends that row; what goes wrong on the
device ends the rows that it held, and the engine goes on.

What it is not: HTTP; it takes token ids and gives Tokens. Nothing is read from its thread but what
`deliver` is called with.

    B rows of the batch  S cache capacity  T prompt position
"""

import contextlib
import dataclasses
import itertools
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np

from llm.errors import LLMError
from llm.inference.decode import (
    CHUNK_SECONDS,
    PIECE,
    Batch,
    Decoder,
    Prefill,
    Progress,
    Request,
    Row,
    exhaust,
    of_row,
    read_drawn,
    round_up,
)
from llm.inference.distribution import Described
from llm.inference.programs import CHUNK, DecodeState, Drawn, empty, place_rows

# Every batch describes its tokens with as many rivals as this, whether asked or not, so that one
# program serves all: a second one would cost seconds of compilation in the middle of a stream.
LEAST_TOP = 16
# Prompts computed together, if as many wait that are alike; else one alone. No other numbers, so
# that nothing is padded and few programs are compiled: a CPU gains nothing from more at once (one
# prompt of 64 took 5.5 ms, four 20 ms, with 1.9 million parameters on a 2-core EPYC, jax 0.12).
GROUP = 4
# The smallest capacity of the running batch's cache, and of a prompt's own.
LEAST_CAPACITY = 256
LEAST_PREFILL = 256

Delivery = Progress | Exception


class QueueFullError(LLMError):
    """More rows wait than the queue holds."""


class ClosedError(LLMError):
    """The engine takes no more jobs."""


@dataclass(frozen=True)
class Limits:
    """max_batch: rows that are computed at once, rounded up to a power of two; max_queue: rows that
    may wait for a place."""

    max_batch: int = 16
    max_queue: int = 256


@dataclass(eq=False)
class Job:
    """One request and where its tokens go.

    Attributes:
      deliver: called in the engine's thread with each Progress (its `row` means nothing), or once
        with an exception, after which nothing follows; it must be quick.
      describe_prompt: whether the prompt's tokens have predictions too, where request.top asks.
    """

    request: Request
    deliver: Callable[[Delivery], None]
    describe_prompt: bool = True
    row: Row | None = field(default=None, init=False)
    ended: bool = field(default=False, init=False)

    def cancel(self) -> None:
        """Nobody waits for it any more: its row is free from the next chunk on. From any thread."""
        self.ended = True

    @property
    def top(self) -> int | None:
        """How many rivals its prompt's tokens list; None where they are not described."""
        return self.request.top if self.describe_prompt else None

    @property
    def size(self) -> int:
        """Positions that it may fill, if the context has them."""
        return len(self.request.prompt) + self.request.max_new_tokens


class Group(NamedTuple):
    """Jobs whose prompts are being computed together."""

    jobs: list[Job]
    prefill: Prefill


class Flight(NamedTuple):
    """A chunk that the device computes, and whose each row of it is."""

    drawn: Drawn
    done: jax.Array
    steps: int
    jobs: list[Job | None]


class Engine:
    """Runs jobs on one model until it is stopped. `start` it once, `submit` from any thread."""

    def __init__(self, decoder: Decoder, limits: Limits = Limits()):
        self.decoder = decoder
        self.limits = dataclasses.replace(limits, max_batch=round_up(limits.max_batch))
        self._changed = threading.Condition()
        # A job that has not ended is in _waiting, in _group or in _rows, or in two while it moves:
        # whatever fails, _drop_everything finds it and tells it.
        self._waiting: deque[Job] = deque()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._group: Group | None = None
        self._rows: list[Job | None] = []
        self._batch: Batch | None = None  # None: to be made anew from _rows
        self._state: DecodeState | None = None
        self._flights: deque[Flight] = deque()
        self._pace = Pace()

    def start(self) -> None:
        """Begin to take jobs."""
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all these jobs or none.

        Raises:
          UsageError: a request that cannot be served, see Decoder.check.
          QueueFullError: no room for them all now.
          ClosedError: `stop` was called.
        """
        for job in jobs:
            self.decoder.check(job.request)
        with self._changed:
            if self._stopping:
                raise ClosedError("the engine has stopped")
            waiting = sum(not job.ended for job in self._waiting)
            if waiting + len(jobs) > self.limits.max_queue:
                raise QueueFullError(
                    f"{waiting} samples wait already and {len(jobs)} more were asked for; the "
                    f"queue holds {self.limits.max_queue}"
                )
            self._waiting.extend(jobs)
            self._changed.notify()

    def warm_up(self, every_size: bool = False) -> None:
        """Compile what a lone user's short texts need, so that the first request is quick.

        Call it before `start`.

        Args:
          every_size: also what any number of users with short texts need.
        """
        sizes = [1]
        while every_size and sizes[-1] < self.limits.max_batch:
            sizes.append(2 * sizes[-1])
        capacity, context = self._capacity([]), self.decoder.spec.config.context_length
        states = {rows: self._empty(rows, capacity) for rows in sizes}
        for rows, length, top in itertools.product(
            (1, GROUP) if every_size else (1,), (1, 17), (None, 1)
        ):
            request = Request([0] * min(length, context), max_new_tokens=0, top=top)
            source, _ = exhaust(self._prefill([Job(request, print) for _ in range(rows)]))
            for size in sizes:
                states[size] = place_rows(states[size], source, np.full(rows, size, np.int32))
        for size in sizes:
            batch = self._running_batch([_NOTHING] * size)
            states[size] = self.decoder.chunk(batch, states[size], np.zeros(size, bool), 1)[0]
            for other in sizes:
                if other != size:
                    target = self._empty(other, capacity)
                    place_rows(target, states[size], np.full(size, other, np.int32))
        jax.block_until_ready(states)

    def stop(self, timeout: float | None = None) -> bool:
        """Drop all jobs and end the thread; whether it has ended within so many seconds."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def active(self) -> int:
        """Rows that are being computed, prompts included."""
        group = self._group
        jobs = {*self._rows, *(group.jobs if group else [])}
        return sum(job is not None and not job.ended for job in jobs)

    @property
    def queued(self) -> int:
        """Rows that wait for a place."""
        with self._changed:
            return sum(not job.ended for job in self._waiting)

    def _run(self) -> None:
        while self._wait_for_work():
            try:
                self._round()
            except Exception as error:
                # Of the device or of ours; its rows are lost, and those to come shall not be.
                self._drop_everything(error)
        self._drop_everything(ClosedError("the server was stopped before this was finished"))

    def _wait_for_work(self) -> bool:
        """False when it is time to end."""
        with self._changed:
            while not (self._stopping or self._busy() or self._waiting):
                self._changed.wait()
            return not self._stopping

    def _busy(self) -> bool:
        return bool(self._group or self._flights or any(self._rows))

    def _round(self) -> None:
        for place, job in enumerate(self._rows):
            if job is not None and job.ended:
                self._rows[place] = self._batch = None
        if self._group is not None and all(job.ended for job in self._group.jobs):
            self._group = None
        if self._group is None:
            self._group = self._next_group()
        if self._group is not None:
            self._compute_piece(self._group)
        if any(self._rows):
            self._start_chunk()
        if len(self._flights) > 1 or (self._flights and not any(self._rows)):
            self._read_chunk()

    def _next_group(self) -> Group | None:
        """Waiting jobs that there are places for: the first, and others whose prompts are alike."""
        places = self.limits.max_batch - sum(job is not None for job in self._rows)
        jobs: list[Job] = []
        with self._changed:
            waiting = [job for job in self._waiting if not job.ended]
            if waiting and places:
                kind = _kind(waiting[0])
                alike = [job for job in waiting if _kind(job) == kind]
                jobs = alike[: GROUP if min(places, len(alike)) >= GROUP else 1]
            self._waiting = deque(job for job in waiting if job not in jobs)
        return Group(jobs, self._prefill(jobs)) if jobs else None

    def _prefill(self, jobs: Sequence[Job]) -> Prefill:
        batch = self._stack([job.request for job in jobs])
        tops = [job.top for job in jobs if job.top is not None]
        batch = batch._replace(top=self._top(max(tops)) if tops else None)
        piece = _piece(len(jobs[0].request.prompt))
        context = round_up(self.decoder.spec.config.context_length, at_least=64)
        return (yield from self.decoder.prefill(batch, min(LEAST_PREFILL, context), piece))

    def _compute_piece(self, group: Group) -> None:
        try:
            next(group.prefill)
            return
        except StopIteration as end:
            state, described = end.value
        except Exception as error:
            for job in group.jobs:
                _fail(job, error)
            self._group = None
            return
        for row, job in enumerate(group.jobs):
            if not job.ended:
                self._begin(job, of_row(described, row))
        going_on = [(row, job) for row, job in enumerate(group.jobs) if not job.ended]
        if going_on:
            self._join(state, going_on)
        self._group = None

    def _begin(self, job: Job, described: Described | None) -> None:
        with guard(job):
            job.row = Row(job.request, self.decoder.tokenizer, self.decoder.spec)
            tokens = job.row.begin(described)
            _deliver(job, Progress(0, tokens, job.row.finish))

    def _join(self, state: DecodeState, jobs: Sequence[tuple[int, Job]]) -> None:
        """Rows of a prefilled state into free rows of the batch."""
        self._resize(joining=[job for _, job in jobs])
        assert self._state is not None
        free = [place for place, job in enumerate(self._rows) if job is None]
        places_B = np.full(len(state.left_B), len(self._rows), np.int32)
        for (row, job), place in zip(jobs, free, strict=False):
            places_B[row] = place
            self._rows[place] = job
        self._state = place_rows(self._state, state, places_B)
        self._batch = None

    def _resize(self, joining: Sequence[Job]) -> None:
        """Give the batch the size that its rows and those that join need, if it has not."""
        staying = [job for job in self._rows if job is not None]
        needed = round_up(len(staying) + len(joining))
        capacity = self._capacity([*staying, *joining])
        if self._state is not None and staying:
            B, S = len(self._rows), self._state.cache.capacity
            B = needed if needed > B or 4 * needed <= B else B
            if (B, max(S, capacity)) == (len(self._rows), S):
                return
            needed, capacity = B, max(S, capacity)
        before, rows = self._state, self._rows
        self._state = None if not staying else self._state
        state = self._empty(needed, capacity)
        if before is not None and staying:
            places_B = np.full(len(rows), needed, np.int32)
            places_B[[job is not None for job in rows]] = np.arange(len(staying))
            state = place_rows(state, before, places_B)
        self._state, self._batch = state, None
        self._rows = [*staying, *[None] * (needed - len(staying))]

    def _start_chunk(self) -> None:
        alive = [job is not None and not job.ended for job in self._rows]
        if not any(alive):
            return
        if 4 * round_up(sum(job is not None for job in self._rows)) <= len(self._rows):
            self._resize(joining=[])
            alive = [job is not None and not job.ended for job in self._rows]
        assert self._state is not None
        if self._batch is None:
            requests = [_NOTHING if job is None else job.request for job in self._rows]
            self._batch = self._running_batch(requests)
        steps = self._pace.steps
        self._state, drawn, done = self.decoder.chunk(
            self._batch, self._state, np.array(alive), steps
        )
        self._flights.append(Flight(drawn, done, steps, list(self._rows)))

    def _read_chunk(self) -> None:
        flight = self._flights.popleft()
        drawn = read_drawn(flight.drawn, flight.done)
        self._pace.note(steps=flight.steps, goes_on=bool(self._flights))
        for place, job in enumerate(flight.jobs):
            if job is None or job.ended or job.row is None:
                continue
            with guard(job):
                progress = job.row.read(place, drawn)
                if progress is not None:
                    _deliver(job, progress)

    def _running_batch(self, requests: Sequence[Request]) -> Batch:
        batch = self._stack(requests)
        return batch._replace(top=self._top(batch.top))

    def _empty(self, rows: int, capacity: int) -> DecodeState:
        return empty(self.decoder.spec, self.decoder.params, rows, capacity)

    def _stack(self, requests: Sequence[Request]) -> Batch:
        longest = max(len(request.prompt) for request in requests)
        return self.decoder.batch(requests, at_least=_piece(longest))

    def _capacity(self, jobs: Sequence[Job]) -> int:
        context = self.decoder.spec.config.context_length
        needed = min(context, max((job.size for job in jobs), default=0))
        capacity = LEAST_CAPACITY
        while capacity < needed:
            capacity *= 4
        return min(capacity, round_up(context, at_least=64))

    def _top(self, asked: int | None) -> int:
        return min(self.decoder.spec.vocab_size, round_up(max(asked or 0, LEAST_TOP)))

    def _drop_everything(self, error: Exception) -> None:
        with self._changed:
            waiting, self._waiting = list(self._waiting), deque()
        group = self._group.jobs if self._group else []
        for job in [*self._rows, *group, *waiting]:
            if job is not None and not job.ended:
                _fail(job, error)
        self._group = self._batch = self._state = None
        self._rows, self._pace = [], Pace()
        self._flights.clear()


class Pace:
    """How many tokens the next chunk has: as many as take about CHUNK_SECONDS."""

    def __init__(self) -> None:
        self.steps = 1
        self._last: float | None = None

    def note(self, *, steps: int, goes_on: bool) -> None:
        """A chunk of so many steps was read; what it took is known if one was read before it."""
        now = time.perf_counter()
        if self._last is not None:
            seconds = now - self._last
            if seconds < CHUNK_SECONDS / 2 and steps == self.steps:
                self.steps = min(2 * steps, CHUNK)
            elif seconds > 2 * CHUNK_SECONDS and steps == self.steps:
                self.steps = max(1, steps // 2)
        self._last = now if goes_on else None


_NOTHING = Request([0], max_new_tokens=0)


@contextlib.contextmanager
def guard(job: Job) -> Iterator[None]:
    """What goes wrong in here ends this job and no other."""
    try:
        yield
    except Exception as error:
        _fail(job, error)


def _deliver(job: Job, progress: Progress) -> None:
    job.ended = job.ended or progress.finish is not None
    job.deliver(progress)


def _fail(job: Job, error: Exception) -> None:
    if job.ended:
        return
    job.ended = True
    try:
        job.deliver(error)
    except Exception:
        # Perhaps why it ends; there is nobody else to tell.
        traceback.print_exc(file=sys.stderr)


def _kind(job: Job) -> tuple[int, int, bool]:
    """Jobs of one kind share a prefill: the size and number of their pieces, and whether it
    describes."""
    length = len(job.request.prompt)
    return _piece(length), -(-length // _piece(length)), job.top is not None


def _piece(length: int) -> int:
    """Positions of a prompt's pieces: few sizes, and little padding."""
    if length <= 16:
        return 16
    return 64 if length <= 4 * 64 else PIECE
