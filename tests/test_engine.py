"""The engine against a static batch: what a row gets does not depend on who joins, leaves or fails
beside it."""

import dataclasses
import functools
import queue
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import until

from llm.errors import NonFiniteError, UsageError
from llm.inference.decode import Decoder, Request
from llm.inference.records import Sampling, as_json
from llm.inference.score import Scorer
from llm.model.gpt import ModelSpec, initialise
from llm.model_config import ModelConfig
from llm.serving.engine import (
    CHUNK_SECONDS,
    ClosedError,
    Engine,
    Pace,
    QueueFullError,
    Ticket,
)
from llm.serving.limits import Limits
from llm.text.tokenizer import ByteTokenizer

CONTEXT, VOCAB = 96, 257
POISON = 255
MODEL = ModelConfig(
    n_layer=1, n_head=2, d_model=32, context_length=CONTEXT, positions="rotary",
    tie_embeddings=False,
)  # fmt: skip
# Few shapes for the whole file: what takes the time is compilation.
TOP = 3
LONG = Request([72, 101], Sampling(0.8, seed=3), max_new_tokens=90, top=TOP)
SHORT = Request([5, 6, 7], Sampling(0.9, seed=1), max_new_tokens=20)


@pytest.fixture(scope="module", autouse=True)
def few_shapes():
    """Prompts come in pieces of 16, the longest in six, into a cache of one size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm.inference.decode.PIECE", 16)
        patch.setattr("llm.serving.engine._piece", lambda length: 16)
        patch.setattr("llm.serving.engine.LEAST_PREFILL", 128)
        yield


@pytest.fixture(scope="module")
def model():
    """A random model far from flat, whose token POISON makes all that follows it NaN."""
    spec = ModelSpec(MODEL, VOCAB)
    params = jax.jit(initialise, static_argnums=0)(spec, jax.random.key(0))
    params = {name: 6.0 * w if w.ndim > 1 else w for name, w in params.items()}
    params["embed.weight"] = params["embed.weight"].at[POISON].set(jnp.nan)
    return spec, params, Decoder.create(spec, params, ByteTokenizer())


@pytest.fixture
def engine(model):
    engine = Engine(model[2], Limits(max_batch=4, max_queue=64))
    engine.start()
    yield engine
    assert engine.stop(timeout=60.0)


class Listener:
    """What a ticket delivers; `hook` is called with the Listener, in the engine's thread."""

    def __init__(self, engine, request, hook=lambda listener: None, **options):
        self.tokens, self.finish, self.error, self.deliveries = [], None, None, 0
        self.over, self.hook = threading.Event(), hook
        self.ticket = Ticket(request, self._deliver, **options)
        engine.submit([self.ticket])

    def _deliver(self, delivery):
        assert not self.over.is_set(), "something came after the end"
        self.deliveries += 1
        if isinstance(delivery, Exception):
            self.error = delivery
        else:
            self.tokens += delivery.tokens
            self.finish = delivery.finish
        self.hook(self)
        if self.error or self.finish:
            self.over.set()

    def wait(self):
        assert self.over.wait(120.0)
        return self


@pytest.fixture(scope="module")
def expected(model):
    """(tokens, finish) of Decoder.generate for a list of requests, all in one batch."""

    def generate(requests):
        longest = Request([1] * CONTEXT, max_new_tokens=0, top=TOP)
        padded = [*requests, *[longest] * (16 - len(requests))]
        tokens, finish = [[] for _ in padded], [None] * len(padded)
        for progress in model[2].generate(padded):
            tokens[progress.row] += progress.tokens
            finish[progress.row] = progress.finish
        return list(zip(tokens, finish, strict=True))[: len(requests)]

    return generate


def without_numbers(token):
    record = as_json(token)
    return [record[name] for name in ("phase", "position", "id", "text", "byte_offset", "utf8")]


def assert_same(listener, expected):
    tokens, finish = expected
    assert listener.error is None and listener.finish == finish
    assert list(map(without_numbers, listener.tokens)) == list(map(without_numbers, tokens))
    for got, token in zip(listener.tokens, tokens, strict=True):
        assert (got.logprob is None) == (token.logprob is None)
        if token.logprob is not None:
            assert abs(got.logprob - token.logprob) < 1e-4
            assert got.rank == token.rank
            assert len(got.top) == len(token.top)


def make_requests():
    """Of all kinds: short and long prompts, greedy or not, with numbers or not, 0 to 40 tokens."""
    rng = np.random.default_rng(1)
    return [
        Request(
            rng.integers(0, 250, [1, 16, 17, 60, 90, 96][i % 6]).astype(np.int32),
            Sampling(0.0 if i % 5 == 0 else 0.9, top_k=30 * (i % 2), top_p=0.95, seed=i),
            index=i % 3,
            max_new_tokens=[0, 1, 9, 40][i % 4],
            stop=[chr(letter) for letter in range(32, 128, 5)] if i % 6 == 3 else (),
            top=None if i % 2 else TOP,
        )
        for i in range(16)
    ]


@pytest.mark.thorough
def test_a_row_gets_in_company_what_it_gets_alone(engine, expected):
    """16 rows of a static batch, which test_decode holds to be what each would get alone, against
    the same on four places."""
    requests = make_requests()
    answers = expected(requests)
    assert {finish for _, finish in answers} == {"length", "context", "stop"}
    listeners = [Listener(engine, request) for request in requests]
    for listener, answer in zip(listeners, answers, strict=True):
        assert_same(listener.wait(), answer)
    assert (engine.active, engine.queued) == (0, 0)


@pytest.mark.thorough
def test_rows_join_and_leave_beside_a_running_row(engine, expected, monkeypatch):
    """The batch grows in rows and in capacity and shrinks again while one row runs through it."""
    monkeypatch.setattr("llm.serving.engine.LEAST_CAPACITY", 32)
    monkeypatch.setattr("llm.serving.engine.CHUNK", 4)  # 90 tokens: 20 chunks and more
    monkeypatch.setattr(Engine, "_can_join", lambda *_: True)  # no row waits for a compilation
    first = dataclasses.replace(LONG, max_new_tokens=20)
    rest = [dataclasses.replace(SHORT, sampling=Sampling(1.0, seed=i)) for i in range(5)]
    joined, sizes = [], set()

    def another(listener):
        sizes.add((len(engine._rows), engine._state and engine._state.cache.capacity))
        if listener.deliveries == 2:
            joined.append(Listener(engine, LONG))
        if listener.deliveries == 4:
            joined.extend(Listener(engine, request) for request in rest)

    running = Listener(engine, first, hook=another)
    assert_same(running.wait(), *expected([first]))
    for listener, answer in zip(joined, expected([LONG, *rest]), strict=True):
        assert_same(listener.wait(), answer)
    assert {(1, 32), (4, 128)} <= sizes
    assert len(engine._rows) < 4, "it did not shrink when LONG was left alone"


def test_all_free_places_are_filled_before_the_next_chunk(model, expected, monkeypatch):
    """Four prompts of three kinds, which no prefill computes together."""
    monkeypatch.setattr(Engine, "_can_join", lambda *_: True)  # no row waits for a compilation
    running, start_chunk = [], Engine._start_chunk

    def counted(self):
        running.append(sum(ticket is not None for ticket in self._rows))
        start_chunk(self)

    monkeypatch.setattr(Engine, "_start_chunk", counted)
    engine = Engine(model[2], Limits(max_batch=4))
    longer = dataclasses.replace(SHORT, prompt=list(range(20)))
    requests = [LONG, SHORT, longer, SHORT]
    listeners = [Listener(engine, request) for request in requests]
    engine.start()
    for listener, answer in zip(listeners, expected(requests), strict=True):
        assert_same(listener.wait(), answer)
    assert running[0] == 4
    assert engine.stop(timeout=60.0)


def test_rows_go_on_while_what_others_need_is_compiled(model, expected, monkeypatch):
    """The compilation ends only when the running row has."""
    compiling, compiled = threading.Event(), threading.Event()
    rehearse = Engine._rehearse

    def slow(*arguments):
        compiling.set()
        assert compiled.wait(60.0)
        rehearse(*arguments)

    engine = Engine(model[2], Limits(max_batch=4))
    monkeypatch.setattr(engine, "_rehearse", functools.partial(slow, engine))
    engine.start()
    joined = []

    def another(listener):
        if not joined:
            joined.append(Listener(engine, SHORT))
        elif not compiling.is_set():
            assert compiling.wait(60.0)  # it began beside this row

    running = Listener(engine, LONG, hook=another)
    assert_same(running.wait(), *expected([LONG]))
    assert joined[0].deliveries == 0 and engine.queued == 1
    compiled.set()
    assert_same(joined[0].wait(), *expected([SHORT]))
    assert engine.stop(timeout=60.0)


def test_after_a_warm_up_nobody_waits_for_a_compilation(model, monkeypatch):
    """Short prompts, one or several at once, whatever the batch beside them."""
    engine = Engine(model[2], Limits(max_batch=4))
    engine.warm_up(every_size=True)
    monkeypatch.setattr(engine, "_rehearse", lambda *_: pytest.fail("something was left"))
    engine.start()
    listeners = [Listener(engine, LONG)]
    for request in (SHORT, LONG, SHORT, SHORT, SHORT, LONG):
        listeners.append(Listener(engine, request))
    assert all(listener.wait().error is None for listener in listeners)
    assert engine.stop(timeout=60.0)


def test_what_cannot_be_compiled_is_tried_all_the_same(model, expected, monkeypatch):
    def no_memory(*_):
        raise MemoryError

    engine = Engine(model[2], Limits(max_batch=4))
    engine.start()
    running = Listener(engine, LONG)
    until(lambda: running.tokens)  # it needs an empty batch itself, to begin in
    monkeypatch.setattr(engine, "_empty", no_memory)
    key = (1, Ticket(SHORT, print).kind, (2, 128))
    engine._rehearse([Ticket(SHORT, print)], (1, 128), (2, 128))
    assert {key, ((1, 128), (2, 128))} <= engine._compiled
    monkeypatch.undo()
    assert_same(running.wait(), *expected([LONG]))
    assert engine.stop(timeout=60.0)


def test_scores_equal_the_scorer(model, engine):
    spec, params, _ = model
    ids = np.random.default_rng(2).integers(0, 250, 90).astype(np.int32)
    listener = Listener(engine, Request(ids, max_new_tokens=0, top=TOP)).wait()
    [expected] = Scorer(spec, params, ByteTokenizer()).score([ids])
    assert listener.finish == "length" and len(listener.tokens) == 90
    for token, other in zip(listener.tokens[1:], expected[1:], strict=True):
        assert abs(token.logprob - other.logprob) < 1e-4


def test_a_prompt_is_not_described_where_nobody_asks(engine):
    request = Request([1, 2, 3], max_new_tokens=2, top=TOP)
    listener = Listener(engine, request, describe_prompt=False).wait()
    assert [token.logprob is None for token in listener.tokens] == [True] * 3 + [False] * 2


@pytest.mark.thorough
def test_a_row_that_is_not_finite_ends_alone_and_poisons_no_row_after_it(
    engine, expected, monkeypatch
):
    """While one row runs, three fill the places beside it with NaN, and three others use them
    again, whose own caches are shorter than what the NaN has filled."""
    monkeypatch.setattr("llm.serving.engine.LEAST_PREFILL", 64)
    monkeypatch.setattr("llm.serving.engine.CHUNK", 4)
    monkeypatch.setattr(Engine, "_can_join", lambda *_: True)  # no row waits for a compilation
    poisons, after = [], []

    def go_on(listener):
        if listener.deliveries == 1:
            requests = [Request([9, POISON] * 40, max_new_tokens=9, top=t) for t in (None, TOP, 0)]
            poisons.extend(Listener(engine, request) for request in requests)
        elif not after and all(poison.over.is_set() for poison in poisons):
            after.extend(Listener(engine, SHORT) for _ in range(3))

    running = Listener(engine, LONG, hook=go_on).wait()
    assert all(isinstance(poison.error, NonFiniteError) for poison in poisons)
    answers = expected([LONG, SHORT])
    assert_same(running, answers[0])
    assert len(after) == 3
    for listener in after:
        assert_same(listener.wait(), answers[1])


def test_a_deliver_that_raises_ends_its_own_row_only(engine, expected, monkeypatch):
    said = []
    monkeypatch.setattr("llm.serving.engine.LOG.exception", said.append)

    def broken(_):
        raise RuntimeError("nobody home")

    ticket = Ticket(SHORT, broken)
    engine.submit([ticket])
    assert_same(Listener(engine, SHORT).wait(), *expected([SHORT]))
    assert ticket.ended and said == ["a request failed, and its client cannot be told"]


def test_a_device_that_fails_ends_what_it_held_and_the_engine_goes_on(
    engine, expected, monkeypatch
):
    def fails(*_, **__):
        raise RuntimeError("no memory on the device")

    answers = expected([SHORT])
    for owner, part in ((Decoder, "chunk"), (Decoder, "prefill"), (Engine, "_empty")):
        with monkeypatch.context() as broken:
            broken.setattr(owner, part, fails)
            assert "no memory" in str(Listener(engine, SHORT).wait().error)
    assert_same(Listener(engine, SHORT).wait(), *answers)


def test_a_ticket_that_nobody_waits_for_frees_its_row(engine):
    """Five jobs on four places: the fifth runs when one of the others has left."""
    finished = []

    def leave(listener):
        if listener.deliveries == 2:
            listener.ticket.cancel()

    def note(listener):
        if listener.finish:
            finished.append(listener)

    leaving = Listener(engine, LONG, hook=leave)
    others = [Listener(engine, LONG, hook=note) for _ in range(3)]
    fifth = Listener(engine, dataclasses.replace(SHORT, max_new_tokens=1), hook=note)
    given_up = Listener(engine, LONG)
    given_up.ticket.cancel()
    for listener in [*others, fifth]:
        listener.wait()
    assert leaving.finish is None and leaving.deliveries == 2
    assert given_up.deliveries == 0
    assert finished[0] is fifth, "it had to wait for a row that ran to its end"
    assert (engine.active, engine.queued) == (0, 0)


def test_the_queue_takes_all_tickets_of_a_call_or_none(model):
    engine = Engine(model[2], Limits(max_batch=3, max_queue=3))
    assert engine.limits.max_batch == 4
    tickets = [Ticket(Request([1]), print) for _ in range(5)]
    engine.submit(tickets[:2])
    with pytest.raises(QueueFullError, match="2 samples wait already and 2 more"):
        engine.submit(tickets[2:4])
    assert engine.queued == 2
    tickets[0].cancel()
    engine.submit(tickets[2:4])
    assert engine.queued == 3
    with pytest.raises(UsageError, match="context"):
        engine.submit([Ticket(Request([1] * (CONTEXT + 1)), print)])


def test_stopping_tells_whoever_waits(model):
    engine = Engine(model[2], Limits(max_batch=1))
    begun, go_on = threading.Event(), threading.Event()

    def hold(_):
        begun.set()
        assert go_on.wait(60.0)

    listeners = [Listener(engine, LONG, hook=hold), Listener(engine, LONG)]
    engine.start()
    assert begun.wait(120.0)
    assert not engine.stop(timeout=0.0)
    go_on.set()
    assert engine.stop(timeout=60.0)
    for listener in listeners:
        assert isinstance(listener.wait().error, ClosedError)
    with pytest.raises(ClosedError):
        engine.submit([Ticket(SHORT, print)])


def test_warming_up_leaves_nothing_to_compile_for_a_short_request(model):
    engine = Engine(model[2], Limits(max_batch=1))
    engine.warm_up()
    engine.start()
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    answers = queue.Queue()
    more = Request([1] * 9, max_new_tokens=9, top=100, watch=range(90), stop_ids=range(2, 40))
    steered = Sampling(logit_bias=dict.fromkeys(range(100), -5.0), min_tokens=3)
    for request in (
        Request([1] * 2, max_new_tokens=50),
        Request([1] * 40, max_new_tokens=50, top=10),
        # The first of its kind, too: streams would wait for seconds.
        dataclasses.replace(more, sampling=steered),
    ):
        engine.submit([Ticket(request, answers.put)])
        while answers.get(timeout=60.0).finish is None:
            pass
    assert engine.stop(timeout=60.0)
    assert compiled == []
    jax.jit(lambda x: x + len(compiled))(1.0)
    assert compiled, "the listener hears of compilations"


def test_chunks_grow_while_they_are_quick_and_shrink_when_they_are_slow(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("llm.serving.engine.time.perf_counter", lambda: clock[0])
    pace, seconds_per_step = Pace(), CHUNK_SECONDS / 7
    for _ in range(20):
        clock[0] += pace.steps * seconds_per_step
        pace.record(steps=pace.steps, goes_on=True)
    assert pace.steps * seconds_per_step <= CHUNK_SECONDS < 4 * pace.steps * seconds_per_step
    seconds_per_step *= 8  # more rows came
    for _ in range(20):
        clock[0] += pace.steps * seconds_per_step
        pace.record(steps=pace.steps, goes_on=True)
    assert pace.steps * seconds_per_step <= 2 * CHUNK_SECONDS
    assert pace.steps >= 1
