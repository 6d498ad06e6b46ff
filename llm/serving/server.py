"""HTTP: OpenAI's /v1/completions and /v1/models, the tokenizer, /health, and the live page at /.

    app = make_app(served, engine, site)
    run(Server(app, engine, grace, ready), listen(host, port))     until SIGTERM or Ctrl-C

Every answer that is not what the client asked for is OpenAI's error object. When a client goes
away, its rows are free at the next chunk, whether it streams or waits. There is no CORS: pages of
other sites get no answer. Host and Origin are checked, so a page cannot get an answer either by
making a name of its own point to this machine (DNS rebinding).

What it is not: the meaning of requests (completions.py), or decoding (engine.py). This is the only
file that imports starlette and uvicorn.
"""

import asyncio
import json
import os
import signal
import socket
import traceback
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from llm.errors import LLMError, UsageError
from llm.inference.decode import NewTokens
from llm.serving.completions import Answer, Served
from llm.serving.engine import ClosedError, Delivery, Engine, QueueFullError, Ticket
from llm.serving.requests import APIError, parse, prompt_ids, read
from llm.serving.tokenization import ASKED, tokenizer_info

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.background import BackgroundTask
    from starlette.concurrency import run_in_threadpool
    from starlette.datastructures import Headers
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, Response, StreamingResponse
    from starlette.routing import Route
    from starlette.types import ASGIApp, Receive, Scope, Send
except ImportError as error:
    raise UsageError(
        f"`serve` needs starlette and uvicorn, and {error.name} is not installed; install both "
        "with `pip install 'glassbox-gpt[serve]'`"
    ) from None

# Seconds in which a body must arrive: enough for a megabyte over a slow line, and a client that
# sends nothing does not hold a connection for ever.
BODY_SECONDS = 60.0
# Bytes beyond the limit that are read all the same: if the server closes a connection while the
# client still sends, the answer that says why is lost.
DISCARDED = 2**26
# How long a stop waits for the device.
STOP_SECONDS = 10.0
# How long the device's chunk may take after the grace time, and telling the clients.
TELL_SECONDS = 5.0
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Site:
    """Whose requests are answered. All names are without port, in lower case.

    Attributes:
      names: the names by which requests may call this server; None: any name.
      guests: hosts whose pages may send requests, beside this server's own; None: all hosts.
    """

    names: tuple[str, ...] | None
    guests: tuple[str, ...] | None


def make_app(served: Served, engine: Engine, site: Site) -> ASGIApp:
    """The application."""
    api = Api(served, engine)
    errors = APIError, LLMError, HTTPException, ClientDisconnect, Exception
    app = Starlette(
        routes=[
            Route("/", api.page),
            Route("/health", api.health),
            Route("/v1/models", api.models),
            Route("/v1/models/{name:path}", api.model),
            Route("/v1/completions", api.completions, methods=["POST"]),
            Route("/tokenizer_info", api.tokenizer_info),
            *(Route(path, api.tokens, methods=["POST"]) for path in ASKED),
        ],
        exception_handlers=dict.fromkeys(errors, answer_error),
    )

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        problem = refusal(site, Headers(scope=scope)) if scope["type"] == "http" else None
        error = None if problem is None else APIError(403, problem, code="forbidden_host")
        await (app if error is None else _error(error))(scope, receive, send)

    return checked


class Api:
    """What the routes answer."""

    def __init__(self, served: Served, engine: Engine):
        self.served, self.engine = served, engine

    async def page(self, request: Request) -> Response:
        return HTMLResponse(self.served.page)

    async def health(self, request: Request) -> Response:
        health = {
            "status": "ok",
            "model": self.served.name,
            "step": self.served.run.checkpoint.step,
            "params_sha256": self.served.run.checkpoint.params_sha256,
            "active": self.engine.active,
            "queued": self.engine.queued,
        }
        return _json(health)

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._model(None)]})

    async def model(self, request: Request) -> Response:
        return _json(self._model(request.path_params["name"]))

    async def completions(self, request: Request) -> Response:
        body = await read_body(request, self.engine.limits.max_body)
        exchange = Exchange(await run_in_threadpool(self._prepare, body))
        self.engine.submit(exchange.tickets)
        if exchange.answer.request.stream:
            # starlette ends it when the client goes away.
            return StreamingResponse(
                exchange.events(),
                media_type="text/event-stream",
                headers={"cache-control": "no-cache"},
                background=BackgroundTask(exchange.close),
            )
        return await exchange.whole(request)

    async def tokenizer_info(self, request: Request) -> Response:
        decoder = self.engine.decoder
        return _json(tokenizer_info(decoder.tokenizer, decoder.spec.config.context_length))

    async def tokens(self, request: Request) -> Response:
        """/tokenize and /detokenize."""
        body = await read_body(request, self.engine.limits.max_body)
        decoder = self.engine.decoder

        def answer() -> Response:
            asked = read(ASKED[request.url.path], body, self.engine.limits)
            self._model(asked.model)
            return _json(asked.answer(decoder.tokenizer, decoder.spec.config.context_length))

        return await run_in_threadpool(answer)  # a long text takes a while

    def _prepare(self, body: bytes) -> Answer:
        """Runs in a thread, because encoding a long prompt takes a while."""
        limits, decoder = self.engine.limits, self.engine.decoder
        request, context = parse(body, limits), decoder.spec.config.context_length
        self._model(request.model)
        return Answer(request, prompt_ids(request, decoder.tokenizer, context, limits), self.served)

    def _model(self, name: str | None) -> dict[str, Any]:
        """The one model.

        Raises:
          APIError: `name` is another model's.
        """
        if name not in (None, self.served.name):
            raise APIError(
                404,
                f"there is no model {name!a} here; this server has {self.served.name!r}",
                param="model",
                code="model_not_found",
            )
        return {
            "id": self.served.name,
            "object": "model",
            "created": self.served.created,
            "owned_by": "glassbox-gpt",
            "max_model_len": self.engine.decoder.spec.config.context_length,
        }


class Exchange:
    """One request being answered, in the event loop.

    Attributes:
      tickets: what the engine is to do for it; each delivers into this object.
    """

    def __init__(self, answer: Answer):
        self.answer = answer
        self._deliveries: asyncio.Queue[tuple[int, Delivery]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(index: int, delivery: Delivery) -> None:
            """In the engine's thread."""
            loop.call_soon_threadsafe(self._deliveries.put_nowait, (index, delivery))

        self.tickets = [
            Ticket(wanted, partial(deliver, index), answer.request.describes_prompt)
            for index, wanted in enumerate(answer.requests)
        ]

    async def whole(self, request: Request) -> Response:
        """The answer that is not a stream."""

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            self._deliveries.put_nowait((0, ClientDisconnect()))

        watcher = asyncio.create_task(watch())
        try:
            while not self.answer.finished:
                self.answer.add(*await self._next())
            # In a thread: thousands of tokens with their alternatives take a while to write.
            return await run_in_threadpool(lambda: _json(self.answer.completion()))
        finally:
            watcher.cancel()
            self.close()

    async def events(self) -> AsyncIterator[bytes]:
        """The answer that is a stream. Its status was sent before, so errors are events too."""
        try:
            while not self.answer.finished:
                content = await run_in_threadpool(self.answer.event, *await self._next())
                if content is not None:
                    yield _event(content)
            last = self.answer.last_event()
            if last is not None:
                yield _event(last)
        except Exception as error:
            yield _event(as_api_error(error).body())
        yield b"data: [DONE]\n\n"

    async def _next(self) -> tuple[int, NewTokens]:
        """The next tokens of a choice.

        Raises:
          APIError: something went wrong with the request, or the client went away.
        """
        index, delivery = await self._deliveries.get()
        if isinstance(delivery, Exception):
            raise as_api_error(delivery) from None
        return index, delivery

    def close(self) -> None:
        """Leave nothing running. From any thread."""
        for ticket in self.tickets:
            ticket.cancel()


def refusal(site: Site, headers: Headers) -> str | None:
    """Why a request may have been sent by a page of another site; None if it was not.

    A page can make a name of its own point to 127.0.0.1 (DNS rebinding); its requests then carry
    that name as Host. A page can post here without reading the answer; its requests then carry
    Origin.
    """
    host, origin = headers.get("host", ""), headers.get("origin")
    name = _hostname(f"//{host}")
    if site.names is not None and name not in site.names:
        return (
            f"this server was called {host!a}; it answers to {', '.join(site.names)}. If that name "
            f"is yours, start it with --allow-host {name or 'NAME'}"
        )
    own, page = (None, f"http://{host}", f"https://{host}"), _hostname(origin or "")
    if origin in own or site.guests is None or page in site.guests:
        return None
    return (
        f"the request comes from a page of {origin!a}, not of this server, {host!a}; to let such "
        f"pages in, start it with --allow-host {page or 'NAME'}"
    )


async def read_body(request: Request, most: int) -> bytes:
    """The body, if it is no larger than `most` bytes and arrives in time."""
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
    """What the client is told of an error."""
    match error:
        case APIError():
            return error
        case ClientDisconnect():  # nobody reads this answer; the number is nginx's
            return APIError(499, "the client went away")
        case QueueFullError():
            return APIError(429, f"{error}; try again later", code="queue_full")
        case ClosedError():
            return APIError(503, str(error), code="shutting_down")
        case UsageError():
            return APIError(400, str(error), param="prompt")
        case LLMError():
            return APIError(500, str(error), code=type(error).__name__)
    traceback.print_exception(error)
    return APIError(500, "a bug in the server; its log has the traceback", code="internal_error")


def answer_error(request: Request, error: Exception) -> Response:
    """The answer to a request that failed before anything of an answer was sent."""
    if not isinstance(error, HTTPException):
        return _error(as_api_error(error))
    message = (
        f"{request.method} {request.url.path}: {error.detail.lower()}; POST /v1/completions, "
        "GET /v1/models, GET /tokenizer_info, POST /tokenize, POST /detokenize, GET /health and "
        "the page at / are here"
    )
    code = "not_found" if error.status_code == 404 else None
    response = _error(APIError(error.status_code, message, code=code))
    response.headers.update(error.headers or {})
    return response


def listen(host: str, port: int) -> socket.socket:
    """A socket that already listens: clients that come while the model loads wait for it.

    Raises:
      UsageError: the port is taken, or the host is not one of this machine.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        dual = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        return socket.create_server(address, family=family, backlog=2048, dualstack_ipv6=dual)
    except OSError as error:
        raise UsageError(
            f"cannot listen on --host {host} --port {port}: {error.strerror}; stop what listens "
            "there, or choose another --port (0: any free one), or a --host that is a name or "
            "address of this machine, such as 127.0.0.1"
        ) from None


def url_of(listener: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(server: "Server", listener: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish what runs."""
    try:
        server.run(sockets=[listener])
    finally:
        if not server.engine.stop(timeout=STOP_SECONDS):
            # The engine waits for the device, and Python must not be taken down around it.
            os._exit(0)


class Server(uvicorn.Server):
    """uvicorn's server, which tells clients why a stop ends their requests.

    Args:
      engine: what computes the answers.
      grace: seconds that a stop waits for running requests.
      ready: called once requests are answered.
    """

    def __init__(self, app: ASGIApp, engine: Engine, grace: float, ready: Callable[[], None]):
        config = uvicorn.Config(
            app,
            log_level="error",
            lifespan="off",
            timeout_graceful_shutdown=grace + TELL_SECONDS,  # type: ignore[arg-type]
            server_header=False,
            ws="none",
        )
        super().__init__(config)
        self.engine, self._grace, self._ready = engine, grace, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop the engine after the grace time, so that every client gets an answer.

        uvicorn would cancel running requests, and their clients would not be told why.
        """

        async def stop_engine() -> None:
            await asyncio.sleep(self._grace)
            await asyncio.to_thread(self.engine.stop, TELL_SECONDS)

        stopping = asyncio.create_task(stop_engine())
        await super().shutdown(sockets)
        stopping.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On SIGINT and SIGTERM. A second signal ends the process at once."""
        if self.should_exit:
            os.write(2, b"\nstopped at once on a second signal\n")
            os._exit(128 + sig)
        self.should_exit = True
        name = signal.Signals(sig).name
        os.write(2, f"\n{name}: finishing what runs; again to stop at once\n".encode())


def _hostname(url: str) -> str:
    """The host of a URL, in lower case; "" if it has none."""
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return ""


def _json(content: Any, status: int = 200) -> Response:
    """In ASCII and strict: a lone surrogate in a prompt must not end a connection."""
    body = json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")
    return Response(body, status, media_type="application/json")


def _event(content: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + bytes(_json(content).body) + b"\n\n"


def _error(error: APIError) -> Response:
    response = _json(error.body(), error.status)
    if error.status in (429, 503):
        response.headers["retry-after"] = "1"
    if error.status in (408, 413):
        response.headers["connection"] = "close"  # the rest of the body is not read
    return response
