"""Continuous batching: requests join and leave a running batch between its chunks of tokens.

    engine = Engine(decoder, Limits(max_batch=16, max_queue=256))
    engine.start()
    engine.submit([Ticket(Request(ids, max_new_tokens=50), deliver=print)])

One thread owns the device. In each round it admits waiting tickets, computes pieces of their
prompts, up to GROUP * PIECE positions in all, starts the next chunk of all running rows, and reads
the chunk before. So a long prompt holds up running rows by a few pieces at a time, short ones fill
all free places at once, and the host reads while the device computes, as in decode.py, which has
the programs and the class Row.

A prompt is prefilled in a cache of its own and then placed into a free row of the batch, without
any change to running rows. The number of rows is the next power of two, so a lone user does not pay
for sixteen rows; the capacity is a power of four times the least one, so that few programs are
compiled. The batch grows when a ticket needs it, and shrinks when a quarter of its rows would do.

A program that nobody used before takes seconds to compile. While rows run, a ticket that needs one
waits until a helper thread has compiled it (see `_rehearse`), and the rows go on.

The other rows of the batch change what a row gets by rounding error at most. A failure in one row
(NaN logits, a bug in its bookkeeping, a `deliver` that raises) ends that row. A failure of the
device ends the rows that it held, and the engine goes on.

What it is not: HTTP. It takes token ids and gives records. Other threads learn only what `deliver`
is called with.

    B rows of the batch  S cache capacity  T prompt position
"""

import functools
import itertools
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from llm.errors import LLMError
from llm.inference.decode import (
    CHUNK_SECONDS,
    PIECE,
    Decoder,
    NewTokens,
    Prefill,
    Request,
    RequestArrays,
    Row,
    exhaust,
    of_row,
    read_drawn,
    round_up,
)
from llm.inference.distribution import Described
from llm.inference.filters import CANDIDATES
from llm.inference.programs import CHUNK, DecodeState, Drawn, empty, place_rows
from llm.inference.score import Scorer, Window
from llm.serving.limits import Limits

# Prompts computed together, if that many similar ones wait; else one alone. No other numbers, so
# that nothing is padded and few programs are compiled: a CPU gains nothing from a larger group.
GROUP = 4
# The smallest capacity of the running batch's cache, and of a prompt's own cache.
LEAST_CAPACITY = 256
LEAST_PREFILL = 256
# Tokens of a chunk at most while tickets wait, so that they soon get the places of rows that end.
CROWDED = 8

Delivery = NewTokens | Exception
# Rows and capacity of a batch.
Size = tuple[int, int]
LOG = logging.getLogger(__name__)


class QueueFullError(LLMError):
    """More requests wait than the queue holds."""


class ClosedError(LLMError):
    """The engine takes no more requests."""


@dataclass(eq=False)
class Ticket:
    """One request, and where its tokens go.

    Attributes:
      deliver: called in the engine's thread with each NewTokens (its `row` means nothing), or once
        with an exception, after which nothing follows; it must be quick.
      describe_prompt: whether the prompt's tokens have numbers too, if request.top asks.
      row: from `submit` on.
      unread: the windows of a text longer than the context that are still to be read.
    """

    request: Request
    deliver: Callable[[Delivery], object]
    describe_prompt: bool = True
    row: Row = field(init=False)
    ended: bool = field(default=False, init=False)
    unread: list[Window] = field(default_factory=list, init=False)
    _read: list[Described | None] = field(default_factory=list, init=False)

    def cancel(self) -> None:
        """Stop: its row is free from the next chunk on. From any thread."""
        self.ended = True

    @property
    def describes(self) -> bool:
        """Whether its prompt's tokens have numbers."""
        return self.describe_prompt and self.request.top is not None

    @property
    def prompt(self) -> Request:
        """What the next prefill reads: the request, with a window of a text too long for it."""
        return replace(self.request, prompt=self.unread[0].tokens) if self.unread else self.request

    @property
    def kind(self) -> tuple[int, int, bool]:
        """Tickets of one kind share a prefill: size and number of pieces, and `describes`."""
        length = len(self.prompt.prompt)
        return _piece(length), -(-length // _piece(length)), self.describes

    def begin(self, described: Described | None) -> NewTokens | None:
        """The prompt's tokens, from the numbers of a prefill; None if windows are left."""
        if self.unread:
            window = self.unread.pop(0)
            end = len(window.tokens) - 1
            predicted = slice(end - window.predicted, end)
            self._read.append(jax.tree.map(lambda x: x[predicted], described))
            if self.unread:
                return None
            described = jax.tree.map(lambda *parts: np.concatenate(parts), *self._read)
        return NewTokens(0, self.row.begin(described), self.row.finish)

    def give(self, make: Callable[[], NewTokens | None]) -> None:
        """Deliver what `make` returns, unless it is None. A failure ends this ticket alone."""
        try:
            new = make()
            if new is not None:
                self.ended = self.ended or new.finish is not None
                self.deliver(new)
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """End it with an error, unless it has ended."""
        if self.ended:
            return
        self.ended = True
        try:
            self.deliver(error)
        except Exception:
            # Perhaps `deliver` is what failed; there is nobody else to tell.
            LOG.exception("a request failed, and its client cannot be told")


class Flight(NamedTuple):
    """A chunk that the device computes, and the ticket of each of its rows."""

    drawn: Drawn
    done: jax.Array
    steps: int
    tickets: list[Ticket | None]


class Engine:
    """Runs requests on one model until it is stopped. `start` it once, `submit` from any thread."""

    def __init__(self, decoder: Decoder, limits: Limits):
        self.decoder = decoder
        self.limits = limits.model_copy(update={"max_batch": round_up(limits.max_batch)})
        # Every batch has columns for so many alternatives, watched and steered ids, asked for or
        # not, so that one program serves all: to compile a second one would interrupt streams for
        # seconds. It computes CANDIDATES in any case.
        self._listed = min(round_up(limits.max_top), CANDIDATES)
        self._changed = threading.Condition()
        # A ticket that has not ended is in _waiting, in _group or in _rows, or in two while it
        # moves: whatever fails, _drop_everything finds it and tells it.
        self._waiting: deque[Ticket] = deque()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._group: list[Ticket] = []  # _prefill computes their prompts together
        self._prefill = self._pieces_of(self._group)
        self._rows: list[Ticket | None] = []
        self._batch: RequestArrays | None = None  # None: to be made anew from _rows
        self._state: DecodeState | None = None
        self._flights: deque[Flight] = deque()
        self._pace = Pace()
        self._joined_size: Size = 0, 0  # the batch's, once _group joins it
        # What is compiled: to turn a batch of one size into another, and to prefill so many tickets
        # of a kind and decode them in a batch of this size.
        self._compiled: set[tuple[Size, Size] | tuple[int, Any, Size]] = set()
        self._helper: threading.Thread | None = None

    def start(self) -> None:
        """Begin to take requests."""
        self._thread.start()

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Queue all these tickets or none.

        Raises:
          UsageError: a request that cannot be served, see Decoder.check.
          QueueFullError: there is no room for them all now.
          ClosedError: `stop` was called.
        """
        for ticket in tickets:
            request, decoder = ticket.request, self.decoder
            context = decoder.spec.config.context_length
            longest = context if request.max_new_tokens else max(context, self.limits.max_prompt)
            decoder.check(request, longest)
            ticket.row = Row(request, decoder)
            if len(request.prompt) > context:
                scorer = Scorer(decoder.spec, decoder.params, decoder.tokenizer)
                windows = [*scorer.windows(np.asarray(request.prompt, np.int32))]
                ticket.unread = windows if ticket.describes else windows[:1]
        with self._changed:
            if self._stopping:
                raise ClosedError("the server is shutting down")
            waiting = sum(not ticket.ended for ticket in self._waiting)
            if waiting + len(tickets) > self.limits.max_queue:
                raise QueueFullError(
                    f"{waiting} samples wait already and {len(tickets)} more were asked for; the "
                    f"queue holds {self.limits.max_queue}"
                )
            self._waiting.extend(tickets)
            self._changed.notify()

    def warm_up(self, every_size: bool = False) -> None:
        """Compile what a lone user's short texts need, so that the first request is quick.

        Call it before `start`.

        Args:
          every_size: also what any number of users with short texts need, and those who ask for
            as many alternatives as they may.
        """
        exponents = range(self.limits.max_batch.bit_length() if every_size else 1)
        capacity, context = self._capacity([]), self.decoder.spec.config.context_length
        sizes = [(2**n, capacity) for n in exponents]
        tops = {None, 1, self.limits.max_top if every_size else 1}
        for length, top in itertools.product((1, 17), tops):
            request = Request([0] * min(length, context), max_new_tokens=0, top=top)
            for rows, size in itertools.product((1, GROUP) if every_size else (1,), sizes):
                self._rehearse([Ticket(request, print)] * rows, size, size)
        for old, new in itertools.permutations(sizes, 2):
            self._rehearse([], old, new)

    def stop(self, timeout: float | None = None) -> bool:
        """Drop all tickets and end the thread. Returns whether it ended within the time."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        threads = [thread for thread in (self._thread, self._helper) if thread is not None]
        for thread in threads:
            thread.join(timeout)
        return not any(thread.is_alive() for thread in threads)

    @property
    def active(self) -> int:
        """Rows that are being computed, prompts included."""
        return sum(t is not None and not t.ended for t in {*self._rows, *self._group})

    @property
    def queued(self) -> int:
        """Tickets that wait for a row."""
        with self._changed:
            return sum(not ticket.ended for ticket in self._waiting)

    def _run(self) -> None:
        while self._wait_for_work():
            try:
                self._round()
            except Exception as error:
                # The device failed, or there is a bug; later requests must still be served.
                self._drop_everything(error)
        self._drop_everything(ClosedError("the server was stopped before this was finished"))

    def _wait_for_work(self) -> bool:
        """False when it is time to end."""
        with self._changed:
            while not (
                self._stopping or self._group or self._flights or any(self._rows) or self._waiting
            ):
                self._changed.wait()
            return not self._stopping

    def _round(self) -> None:
        for place, ticket in enumerate(self._rows):
            if ticket is not None and ticket.ended:
                self._rows[place] = self._batch = None
        positions = GROUP * PIECE
        while positions > 0:
            if all(ticket.ended for ticket in self._group):
                self._admit()
            if not self._group:
                break
            positions -= len(self._group) * _piece(len(self._group[0].prompt.prompt))
            self._compute_piece()
        if any(self._rows):
            self._start_chunk()
        if len(self._flights) > 1 or (self._flights and not any(self._rows)):
            self._read_chunk()

    def _admit(self) -> None:
        """The next group is the first of the waiting tickets that fit and whose programs are
        compiled, and others of its kind."""
        places = self.limits.max_batch - sum(ticket is not None for ticket in self._rows)
        with self._changed:
            waiting = [ticket for ticket in self._waiting if not ticket.ended]
        kinds: dict[Any, list[Ticket]] = defaultdict(list)
        for ticket in waiting if places else ():
            kinds[ticket.kind].append(ticket)
        groups = (a[: GROUP if min(places, len(a)) >= GROUP else 1] for a in kinds.values())
        self._group = next(filter(self._can_join, groups), [])
        self._joined_size = self._size(self._group)
        with self._changed:  # more may have come
            waiting = [ticket for ticket in self._waiting if not ticket.ended]
            self._waiting = deque(ticket for ticket in waiting if ticket not in self._group)
            if self._waiting and not (self._group or any(self._rows) or self._flights):
                self._changed.wait(0.1)  # the helper compiles, and there is nothing else to do
        self._prefill = self._pieces_of(self._group)

    def _can_join(self, group: list[Ticket]) -> bool:
        """Whether rows that run need not wait for a compilation if these join them, or if, with an
        empty group, the batch shrinks. If they would have to, the helper compiles.

        On several devices it may not: they could get the helper's programs and those of this thread
        in different orders, and wait for each other.
        """
        old, new = self._own_size, self._size(group)
        needed: set[Any] = {(len(group), group[0].kind, new)} if group else set()
        rows_run = any(self._rows)
        if rows_run and old != new:
            needed.add((old, new))
        devices = next(iter(self.decoder.params.values())).devices()
        if len(devices) > 1 or needed <= self._compiled:
            return True
        if self._helper is not None and self._helper.is_alive():
            return False
        if rows_run:
            self._helper = threading.Thread(target=self._rehearse, args=(group, old, new))
            self._helper.daemon = True
            self._helper.start()
            return False
        self._compiled |= needed  # by this thread, before it does anything else
        return True

    def _rehearse(self, group: Sequence[Ticket], old: Size, new: Size) -> None:
        """Compile what this group needs to join a batch, by running it with nothing in the batch.

        Args:
          old: the batch before, if it has another size than `new`, which is that with the group.
        """
        try:
            batch = self._empty(*new)
            if old != new:
                batch = place_rows(batch, self._empty(*old), np.full(old[0], new[0], np.int32))
            if group:
                source, _ = exhaust(self._pieces_of(group))
                batch = place_rows(batch, source, np.full(len(source.left_B), new[0], np.int32))
            top = group[0].request.top if group else None
            rows = self._stack([replace(_NOTHING, top=top)] * new[0])
            jax.block_until_ready(self.decoder.chunk(rows, batch, np.zeros(new[0], bool), 1))
        except Exception:
            LOG.exception("what a batch of %d rows needs could not be compiled", new[0])
        with self._changed:
            if group:
                self._compiled.add((len(group), group[0].kind, new))
            self._compiled.add((old, new))
            self._changed.notify()

    def _pieces_of(self, group: Sequence[Ticket]) -> Prefill:
        """The generator of a prefill. Whatever fails in it, fails in `_compute_piece`."""
        batch = self._stack([ticket.prompt for ticket in group], group[0].describes)
        piece = _piece(len(group[0].prompt.prompt))
        context = round_up(self.decoder.spec.config.context_length, at_least=64)
        return (yield from self.decoder.prefill(batch, min(LEAST_PREFILL, context), piece))

    def _compute_piece(self) -> None:
        try:
            next(self._prefill)
            return
        except StopIteration as end:
            state, described = end.value
        except Exception as error:
            for ticket in self._group:
                ticket.fail(error)
            return
        for row, ticket in enumerate(self._group):
            if not ticket.ended:
                ticket.give(functools.partial(ticket.begin, of_row(described, row)))
        with self._changed:  # others come first, so that a long text does not hold them up
            self._waiting.extend(t for t in self._group if t.unread and not t.ended)
        self._join(state)
        self._group = []

    def _join(self, state: DecodeState) -> None:
        """Place the rows of the group's prefilled state into free rows of the batch."""
        joining = {row: t for row, t in enumerate(self._group) if not (t.ended or t.unread)}
        if not joining:
            return
        self._resize(self._joined_size)
        assert self._state is not None
        free = [place for place, ticket in enumerate(self._rows) if ticket is None]
        places_B = np.full(len(state.left_B), len(self._rows), np.int32)
        for (row, ticket), place in zip(joining.items(), free, strict=False):
            places_B[row] = place
            self._rows[place] = ticket
        self._state = place_rows(self._state, state, places_B)
        self._batch = None

    @property
    def _own_size(self) -> Size:
        return len(self._rows), self._state.cache.capacity if self._state else 0

    def _size(self, joining: Collection[Ticket] = ()) -> Size:
        """The size that the batch should have for its rows and those that join."""
        staying = [ticket for ticket in self._rows if ticket is not None]
        needed = round_up(len(staying) + len(joining))
        capacity = self._capacity([*staying, *joining])
        if not staying:
            return needed, capacity
        B, own_capacity = self._own_size
        needed = needed if needed > B or 4 * needed <= B else B
        return needed, max(capacity, own_capacity)

    def _resize(self, size: Size) -> None:
        """Give the batch this size, if it has another."""
        staying = [ticket for ticket in self._rows if ticket is not None]
        B, before = len(self._rows), self._state if staying else None
        if before is not None and size == self._own_size:
            return
        self._state = before  # an old state that nobody needs is freed first
        state = self._empty(*size)
        if before is not None:
            places_B = np.full(B, size[0], np.int32)
            places_B[[ticket is not None for ticket in self._rows]] = np.arange(len(staying))
            state = place_rows(state, before, places_B)
        self._state, self._batch = state, None
        self._rows = [*staying, *[None] * (size[0] - len(staying))]

    def _start_chunk(self) -> None:
        if not self._group and self._can_join([]):
            self._resize(self._size())
        alive_B = np.array([ticket is not None and not ticket.ended for ticket in self._rows])
        if not alive_B.any():
            return
        assert self._state is not None
        if self._batch is None:
            self._batch = self._stack([t.request if t else _NOTHING for t in self._rows])
        steps = min(self._pace.steps, CROWDED) if self._waiting else self._pace.steps
        self._state, drawn, done = self.decoder.chunk(self._batch, self._state, alive_B, steps)
        self._flights.append(Flight(drawn, done, steps, list(self._rows)))

    def _read_chunk(self) -> None:
        flight = self._flights.popleft()
        drawn = read_drawn(flight.drawn, flight.done)
        self._pace.record(steps=flight.steps, goes_on=bool(self._flights))
        for place, ticket in enumerate(flight.tickets):
            if ticket is not None and not ticket.ended:
                ticket.give(functools.partial(ticket.row.read, place, drawn))

    def _empty(self, rows: int, capacity: int) -> DecodeState:
        return empty(self.decoder.spec, self.decoder.params, rows, capacity)

    def _stack(self, requests: Sequence[Request], describes: bool = True) -> RequestArrays:
        """The requests as arrays of few shapes."""
        longest = max(len(request.prompt) for request in requests)
        batch = self.decoder.batch(requests, _piece(longest), self._listed)
        few, most = (self.decoder.columns(n, self._listed) for n in (1, self.limits.max_top))
        top = few if (batch.top or 0) <= few else most
        return batch._replace(top=top if describes else None)

    def _capacity(self, tickets: Sequence[Ticket]) -> int:
        """Positions that the longest of these texts may fill, rounded up."""
        context = self.decoder.spec.config.context_length
        sizes = [len(t.request.prompt) + t.request.max_new_tokens for t in tickets]
        needed, capacity = min(context, max(sizes, default=0)), LEAST_CAPACITY
        while capacity < needed:
            capacity *= 4
        return min(capacity, round_up(context, at_least=64))

    def _drop_everything(self, error: Exception) -> None:
        with self._changed:
            waiting, self._waiting = list(self._waiting), deque()
        for ticket in [*self._rows, *self._group, *waiting]:
            if ticket is not None:
                ticket.fail(error)
        self._batch = self._state = None
        self._rows, self._group, self._pace = [], [], Pace()
        self._flights.clear()


class Pace:
    """How many tokens the next chunk has: as many as take about CHUNK_SECONDS."""

    def __init__(self) -> None:
        self.steps = 1
        self._last: float | None = None

    def record(self, *, steps: int, goes_on: bool) -> None:
        """Record that a chunk of `steps` tokens was read.

        Its duration is known only if a chunk was read before it while it was computed.

        Args:
          goes_on: whether the device already computes the next chunk.
        """
        now = time.perf_counter()
        if self._last is not None and steps == self.steps:
            seconds = now - self._last
            if seconds < CHUNK_SECONDS / 2:
                self.steps = min(2 * steps, CHUNK)
            elif seconds > 2 * CHUNK_SECONDS:
                self.steps = max(1, steps // 2)
        self._last = now if goes_on else None


_NOTHING = Request([0], max_new_tokens=0)


def _piece(length: int) -> int:
    """Positions of a prompt's pieces: few sizes, and little padding."""
    if length <= 16:
        return 16
    return 64 if length <= 4 * 64 else PIECE
