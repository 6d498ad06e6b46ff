"""HTTP: OpenAI's /v1/completions and /v1/models, /health, and the live page at /.

    app = make_app(served, engine, limits, site)
    run(Server(app, grace, ready), engine, listen(host, port))     until SIGTERM or Ctrl-C

Every answer that is not what was asked for is OpenAI's error object. A client that goes away frees
its rows at the next chunk, whether it streams or waits. There is no CORS: pages of other sites get
no answer, and neither do names that a page made point to this machine (DNS rebinding), because
Host and Origin are checked.

What it is not: what requests mean (completions_api.py), or decoding (llm/serving/engine.py). The
one file that imports starlette and uvicorn.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import threading
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from llm.errors import LLMError, UsageError
from llm.inference.decode import Progress
from llm.inference.records import RecordBuilder
from llm.serving.completions_api import (
    Answer,
    APIError,
    CompletionRequest,
    RequestLimits,
    parse,
    prompt_ids,
    samples,
)
from llm.serving.engine import ClosedError, Delivery, Engine, Job, QueueFullError

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.datastructures import Headers
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, Response
    from starlette.routing import Route
    from starlette.types import ASGIApp, Receive, Scope, Send
except ImportError as error:
    raise UsageError(
        f"`serve` needs starlette and uvicorn, and {error.name} is not installed; install both "
        "with `pip install 'glassbox-gpt[serve]'`"
    ) from None

# A body of one megabyte comes in so many seconds even over a slow line; a client that sends
# nothing does not hold a connection for ever.
BODY_SECONDS = 60.0
# Bytes too many that are read all the same: a connection that is closed while the client still
# sends loses the answer that says why.
DISCARDED = 2**26
# A stop waits so long for what the device computes.
STOP_SECONDS = 10.0
# After the grace time so long for the device's chunk to end and for clients to be told.
TELL_SECONDS = 5.0
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Served:
    """What is served.

    Attributes:
      name: the id of the model in the API.
      checkpoint, numerics: as in run records.
      created: seconds since 1970, when the server started.
      page: the HTML at /.
    """

    name: str
    builder: RecordBuilder
    checkpoint: dict[str, Any]
    numerics: dict[str, Any]
    created: int
    page: str


@dataclass(frozen=True)
class Site:
    """Whose requests are answered; names without port, in lower case.

    Attributes:
      names: what requests may call this server; None: anything.
      guests: whose pages may send requests, beside this server's own; None: everybody's.
    """

    names: tuple[str, ...] | None
    guests: tuple[str, ...] | None


def make_app(served: Served, engine: Engine, limits: RequestLimits, site: Site) -> ASGIApp:
    """The application."""
    api = Api(served, engine, limits)
    app = Starlette(
        routes=[
            Route("/", api.page),
            Route("/health", api.health),
            Route("/v1/models", api.models),
            Route("/v1/models/{name:path}", api.model),
            Route("/v1/completions", api.completions, methods=["POST"]),
        ],
        exception_handlers={
            APIError: _answer_error,
            HTTPException: _answer_http_error,
            # Nobody reads it; the number is nginx's.
            ClientDisconnect: lambda request, error: Response(status_code=499),
            Exception: lambda request, error: _answer_error(request, as_api_error(error)),
        },
    )
    return SameSite(app, site)


class Api:
    """What the routes answer."""

    def __init__(self, served: Served, engine: Engine, limits: RequestLimits):
        self.served, self.engine, self.limits = served, engine, limits

    async def page(self, request: Request) -> Response:
        return HTMLResponse(self.served.page)

    async def health(self, request: Request) -> Response:
        checkpoint = self.served.checkpoint
        return _json(
            {
                "status": "ok",
                "model": self.served.name,
                "step": checkpoint["step"],
                "params_sha256": checkpoint["params_sha256"],
                "active": self.engine.active,
                "queued": self.engine.queued,
            }
        )

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return _json(self._model())

    async def completions(self, request: Request) -> Response:
        body = await read_body(request, self.limits.max_body)
        answer, requests = await run_in_threadpool(self._prepare, body)
        deliveries = Deliveries(asyncio.get_running_loop())
        jobs = [
            Job(wanted, deliveries.of(index), describe_prompt=answer.request.echo)
            for index, wanted in enumerate(requests)
        ]
        self._submit(jobs)
        exchange = Exchange(answer, jobs, deliveries)
        if answer.request.stream:
            return EventStream(exchange)
        return await exchange.whole(request)

    def _prepare(self, body: bytes) -> tuple[Answer, list[Any]]:
        """Away from the event loop: a long prompt takes a while to encode."""
        request = parse(body, self.limits)
        self._check_model(request.model)
        decoder = self.engine.decoder
        prompts = prompt_ids(request, decoder.tokenizer, decoder.spec.config.context_length)
        requests = samples(request, prompts)
        return self._answer(request, requests), requests

    def _answer(self, request: CompletionRequest, requests: Sequence[Any]) -> Answer:
        served = self.served

        def run_record(sampling: Any, top: int) -> dict[str, Any]:
            return served.builder.run(served.checkpoint, sampling, served.numerics, top)

        return Answer(request, requests, served.name, served.builder, run_record)

    def _submit(self, jobs: Sequence[Job]) -> None:
        most = self.engine.limits.max_queue
        if len(jobs) > most:
            raise APIError(
                400,
                f"prompts x n are {len(jobs)} samples: expected at most {most} (the server's "
                "--max-queue)",
                param="n",
            )
        try:
            self.engine.submit(jobs)
        except QueueFullError as error:
            raise APIError(429, f"{error}; try again later", code="queue_full") from None
        except ClosedError:
            raise APIError(503, "the server is shutting down", code="shutting_down") from None
        except UsageError as error:
            raise APIError(400, str(error)) from None

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.served.name):
            raise APIError(
                404,
                f"there is no model {name!a} here; this server has {self.served.name!r}",
                param="model",
                code="model_not_found",
            )

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.served.name,
            "object": "model",
            "created": self.served.created,
            "owned_by": "glassbox-gpt",
        }


class Deliveries:
    """What the engine's thread hands to the event loop: (choice, Progress or exception)."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._queue: asyncio.Queue[tuple[int, Delivery]] = asyncio.Queue()

    def of(self, index: int) -> Callable[[Delivery], None]:
        """Where the engine puts what one job gets."""

        def deliver(delivery: Delivery) -> None:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, delivery))

        return deliver

    def put(self, error: Exception) -> None:
        """From the event loop itself."""
        self._queue.put_nowait((0, error))

    async def next(self) -> tuple[int, Progress]:
        """Raises what went wrong."""
        index, delivery = await self._queue.get()
        if isinstance(delivery, Exception):
            raise delivery
        return index, delivery


class Exchange:
    """One request being answered: its jobs, and what has come of them."""

    def __init__(self, answer: Answer, jobs: Sequence[Job], deliveries: Deliveries):
        self.answer, self._jobs, self._deliveries = answer, jobs, deliveries

    async def whole(self, request: Request) -> Response:
        """The answer that is not a stream."""
        async with self._watched(request.receive):
            while not self.answer.finished:
                try:
                    self.answer.add(*await self._deliveries.next())
                except ClientDisconnect:
                    raise
                except Exception as error:
                    raise as_api_error(error) from None
            # In a thread: thousands of tokens with their alternatives take a while to write.
            return await run_in_threadpool(lambda: _json(self.answer.completion()))

    async def events(self, receive: Receive) -> AsyncGenerator[bytes, None]:
        """Server-sent events. The head of the answer is gone by now: errors are events too."""
        async with self._watched(receive):
            try:
                while not self.answer.finished:
                    index, progress = await self._deliveries.next()
                    yield await run_in_threadpool(self._event, index, progress)
                yield _event(self.answer.last_event())
            except ClientDisconnect:
                return
            except Exception as error:
                yield _event(as_api_error(error).body())
            yield b"data: [DONE]\n\n"

    def _event(self, index: int, progress: Progress) -> bytes:
        return _event(self.answer.add(index, progress))

    @contextlib.asynccontextmanager
    async def _watched(self, receive: Receive) -> AsyncIterator[None]:
        """In here a client that goes away is a delivery; in the end no job is left running."""

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self._deliveries.put(ClientDisconnect())

        watcher = asyncio.create_task(watch())
        try:
            yield
        finally:
            watcher.cancel()
            for job in self._jobs:
                job.cancel()


class EventStream(Response):
    """A stream of server-sent events, as they come."""

    def __init__(self, exchange: Exchange):
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with contextlib.aclosing(self._exchange.events(receive)) as events:
            await send(head)
            async for event in events:
                if event:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class SameSite:
    """Refuses requests that a page of another site may have sent.

    A page can make its own name point to 127.0.0.1 (DNS rebinding); its requests then carry that
    name as Host. A page can post here without reading the answer; its requests then carry Origin.
    """

    def __init__(self, app: ASGIApp, site: Site):
        self._app, self._site = app, site

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            host = headers.get("host", "")
            problem = self._of_host(host) or self._of_origin(headers.get("origin"), host)
            if problem is not None:
                response = _answer_error(None, APIError(403, problem, code="forbidden_host"))
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _of_host(self, host: str) -> str | None:
        name, names = _hostname(f"//{host}"), self._site.names
        if names is None or name in names:
            return None
        return (
            f"this server was called {host!a}; it answers to {', '.join(names)}. If that name is "
            f"yours, start it with --allow-host {name or 'NAME'}"
        )

    def _of_origin(self, origin: str | None, host: str) -> str | None:
        own = (None, f"http://{host}", f"https://{host}")
        guests = self._site.guests
        if origin in own or guests is None or _hostname(origin or "") in guests:
            return None
        return (
            f"the request comes from a page of {origin!a}, not of this server, {host!a}; to let "
            f"such pages in, start it with --allow-host {_hostname(origin or '') or 'NAME'}"
        )


async def read_body(request: Request, most: int) -> bytes:
    """The body, if it is no larger than it may be and comes in time."""
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size <= most:
                    body += part
                elif size > most + DISCARDED:
                    break
    except TimeoutError:
        raise APIError(408, f"the body did not come within {BODY_SECONDS:.0f} seconds") from None
    if size > most:
        raise APIError(
            413,
            f"the body is larger than {most} bytes (the server's --max-body); send a smaller one",
            code="body_too_large",
        )
    return bytes(body)


def as_api_error(error: Exception) -> APIError:
    """What a client is told of an error while its request was computed."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, ClosedError):
        return APIError(503, str(error), code="shutting_down")
    if isinstance(error, LLMError):
        return APIError(500, str(error), code=type(error).__name__)
    traceback.print_exception(error)
    return APIError(500, "a bug in the server; its log has the traceback", code="internal_error")


def listen(host: str, port: int) -> socket.socket:
    """A socket that already listens: clients that come while the model loads wait for it.

    Raises:
      UsageError: the port is taken, or the host is none of this machine's.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise UsageError(
            f"--host {host}: {error.strerror}; expected a name or address of this machine, such as "
            "127.0.0.1"
        ) from None
    listener = socket.socket(family, kind)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise UsageError(
            f"cannot listen on {host} port {port}: {error.strerror}; stop what listens there, or "
            "choose another --port (0: any free one) or --host"
        ) from None
    return listener


def url_of(listener: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(server: "Server", engine: Engine, listener: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish what runs."""
    server.engine = engine
    try:
        server.run(sockets=[listener])
    finally:
        if not engine.stop(timeout=STOP_SECONDS):
            # It waits for the device, and Python must not be taken down around it.
            os._exit(0)


class Server(uvicorn.Server):
    """uvicorn's, with the signals of this program: a second one ends it at once.

    Args:
      grace: seconds that a stop waits for what runs.
      ready: called when requests are answered.

    Attributes:
      engine: what computes; `run` sets it.
    """

    engine: Engine

    def __init__(self, app: ASGIApp, grace: float, ready: Callable[[], None]):
        config = uvicorn.Config(
            app,
            log_level="error",
            lifespan="off",
            timeout_graceful_shutdown=grace + TELL_SECONDS,  # type: ignore[arg-type]
            server_header=False,
            ws="none",
        )
        super().__init__(config)
        self._grace, self._ready = grace, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn would cancel what still runs, and its clients would not be told why."""
        stopping = asyncio.create_task(self._stop_engine())
        await super().shutdown(sockets)
        stopping.cancel()

    async def _stop_engine(self) -> None:
        """After the grace time. Every job gets a ClosedError, and so every client an answer."""
        await asyncio.sleep(self._grace)
        await asyncio.to_thread(self.engine.stop, TELL_SECONDS)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        on_main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if on_main else ()
        before = {number: signal.signal(number, self._receive) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.should_exit:
            os.write(2, b"\nstopped at once on a second signal\n")
            os._exit(128 + number)
        self.should_exit = True
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: finishing what runs; again to stop at once\n".encode())


def _hostname(url: str) -> str:
    """Of a URL, in lower case; "" where there is none."""
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return ""


def _json(content: Any, status: int = 200) -> Response:
    """In ASCII and strict: what was lone in a prompt must not end a connection."""
    body = json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")
    return Response(body, status, media_type="application/json")


def _event(content: Any) -> bytes:
    """One server-sent event; nothing for None."""
    return b"" if content is None else b"data: " + bytes(_json(content).body) + b"\n\n"


def _answer_error(request: Request | None, error: Exception) -> Response:
    assert isinstance(error, APIError)
    response = _json(error.body(), error.status)
    if error.status in (429, 503):
        response.headers["retry-after"] = "1"
    if error.status in (408, 413):
        response.headers["connection"] = "close"  # the rest of the body is not read
    return response


def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    hint = "POST /v1/completions, GET /v1/models, GET /health and the page at / are"
    message = f"{where}: {error.detail.lower()}; {hint} here"
    code = "not_found" if error.status_code == 404 else None
    response = _answer_error(request, APIError(error.status_code, message, code=code))
    response.headers.update(error.headers or {})
    return response
