"""HTTP: OpenAI's /v1/completions and /v1/models, the tokenizer, /health, and the live page at /.

    app = make_app(served, engine, Site(names, guests, key))     an ASGI application

Every answer that is not what the client asked for is OpenAI's error object. When a client goes
away, its rows are free at the next chunk, whether it streams or waits. Host and Origin are checked,
so a page of another site gets no answer, neither from its own name nor by making that name point to
this machine (DNS rebinding). Pages of allowed names are let in by CORS.

What it is not: the meaning of requests (completions.py), decoding (engine.py), or connections
(connections.py). This is the only file that imports starlette.
"""

import asyncio
import base64
import contextlib
import hmac
import json
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from llm.errors import LLMError, UsageError
from llm.inference.decode import NewTokens
from llm.serving.completions import Answer, Served
from llm.serving.engine import ClosedError, Delivery, Engine, QueueFullError, Ticket
from llm.serving.requests import APIError, parse, prompt_ids, read
from llm.serving.tokenization import ASKED, tokenizer_info

LOG = logging.getLogger(__name__)
# Seconds in which a body must arrive: enough for a megabyte over a slow line, and a client that
# sends nothing does not hold a connection for ever.
BODY_SECONDS = 60.0
# Bytes beyond the limit that are read all the same: if the server closes a connection while the
# client still sends, the answer that says why is lost.
DISCARDED = 2**26
# What is answered without a key, for whoever watches whether the server runs.
OPEN_PATH = "/health"
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Site:
    """Whose requests are answered. All names are without port, in lower case.

    Attributes:
      names: the names by which requests may call this server; None: any name.
      guests: hosts whose pages may send requests, beside this server's own; None: all hosts.
      key: what requests must carry, but for those to OPEN_PATH; None: nothing.
    """

    names: tuple[str, ...] | None
    guests: tuple[str, ...] | None
    key: str | None = None

    def check_names(self, request: Request) -> None:
        """Refuse a request that a page of another site may have sent.

        A page can make a name of its own point to 127.0.0.1 (DNS rebinding); its requests then
        carry that name as Host. A page can post here without reading the answer; its requests then
        carry Origin.

        Raises:
          APIError: it may have been.
        """
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        name, page = _hostname(f"//{host}"), _hostname(origin or "")
        own = None, f"http://{host}", f"https://{host}"
        if self.names is not None and name not in self.names:
            problem = (
                f"this server was called {host!a}; it answers to {', '.join(self.names)}. If that "
                f"name is yours, start it with --allow-host {name or 'NAME'}"
            )
        elif not (origin in own or self.guests is None or page in self.guests):
            problem = (
                f"the request comes from a page of {origin!a}, not of this server, {host!a}; to "
                f"let such pages in, start it with --allow-host {page or 'NAME'}"
            )
        else:
            return
        raise APIError(403, problem, code="forbidden_host")

    def check_key(self, request: Request) -> None:
        """Refuse a request without the key.

        Programs send it as `Bearer KEY`. A browser asks its user for a password, any user name
        will do, and then sends it with the requests of the live page too (RFC 7617).

        Raises:
          APIError: the key is missing or wrong, or there are too many connections.
        """
        if "crowded" in request.scope.get("state", {}):
            raise APIError(
                503, "too many connections; try again later", code="too_many_connections"
            )
        if self.key is None or request.scope["path"] == OPEN_PATH:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            try:
                given = base64.b64decode(given if scheme.lower() == "basic" else "").decode()
            except ValueError:
                given = ""
            given = given.partition(":")[2]
        # In constant time, so that nobody can find the key letter by letter.
        if not hmac.compare_digest(given.encode(), self.key.encode()):
            raise APIError(
                401,
                "this server wants its key, and the request has none or another; send the header "
                "Authorization: Bearer KEY, which is api_key of the openai package",
                code="invalid_api_key",
            )


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
    # An allowed page may read errors too, so the check of the key is inside. A preflight request
    # never carries a key.
    return _guarded(Guests(_guarded(app, site.check_key), site), site.check_names)


def _guarded(app: ASGIApp, check: Callable[[Request], None]) -> ASGIApp:
    """The application, for requests whose heads pass a check. The check raises APIError."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            check(request)
        except APIError as error:
            await _discard_body(request)
            await error_response(error)(scope, receive, send)
        else:
            await app(scope, receive, send)

    return guarded


class Guests(CORSMiddleware):
    """Tells browsers that pages of the site's guests may send requests here and read answers."""

    def __init__(self, app: ASGIApp, site: Site):
        super().__init__(
            app,
            allow_origins=["*"] if site.guests is None else [],
            allow_methods=["*"],  # a wrong one gets its 405 from the application
            allow_headers=["*"],
            expose_headers=["Retry-After"],
            allow_private_network=True,  # from a public page to this machine
        )
        self._guests = site.guests or ()

    def is_allowed_origin(self, origin: str) -> bool:
        return self.allow_all_origins or _hostname(origin) in self._guests

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        return error_response(APIError(response.status_code, bytes(response.body).decode()))


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
            asked = read(ASKED[request.scope["path"]], body, self.engine.limits)
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


async def _discard_body(request: Request) -> None:
    """Read a body that nobody asked for: see DISCARDED."""
    with contextlib.suppress(APIError, ClientDisconnect):
        await read_body(request, 0)


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
    LOG.error("a bug while a request was answered", exc_info=error)
    return APIError(500, "a bug in the server; its log has the traceback", code="internal_error")


async def answer_error(request: Request, error: Exception) -> Response:
    """The answer to a request that failed before anything of an answer was sent."""
    if not isinstance(error, HTTPException):
        return error_response(as_api_error(error))
    path = request.scope["path"][:100]
    message = (
        f"{request.method} {path}: {error.detail.lower()}; POST /v1/completions, "
        "GET /v1/models, GET /tokenizer_info, POST /tokenize, POST /detokenize, GET /health and "
        "the page at / are here"
    )
    code = "not_found" if error.status_code == 404 else None
    response = error_response(APIError(error.status_code, message, code=code))
    response.headers.update(error.headers or {})
    await _discard_body(request)
    return response


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


def error_response(error: APIError) -> Response:
    """An error as an answer."""
    response = _json(error.body(), error.status)
    if error.status == 401:
        response.headers.append("www-authenticate", "Bearer")
        response.headers.append("www-authenticate", 'Basic realm="the key as password"')
    if error.status in (429, 503):
        response.headers["retry-after"] = "1"
    if error.status in (408, 413) or error.code == "too_many_connections":
        response.headers["connection"] = "close"  # what else the client sends is not read
    return response
