"""HTTP connections: how many there are, how long a client may take, and what is not HTTP.

    run(Server(app, engine, grace, ready), listen(host, port))     until SIGTERM or Ctrl-C

uvicorn gives a client all the time that it wants for the head of a request or for reading an
answer, takes any number of connections, and answers what is not HTTP in plain text. Here there are
limits, and errors are OpenAI's. The log says what happened, at most one line a kind in LOG_SECONDS.

What it is not: requests and answers (server.py). This is the only file that imports uvicorn.

Sources: RFC 9112; Apache's mod_reqtimeout; nginx's send_timeout, lingering_close and reuse of
connections that wait.
"""

import asyncio
import contextlib
import http
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from llm.console import write_stderr
from llm.errors import UsageError
from llm.serving.engine import Engine
from llm.serving.requests import APIError
from llm.serving.server import BODY_SECONDS, error_response

LOG = logging.getLogger(__name__)
# A flood of bad clients must not fill the disk.
LOG_SECONDS = 10.0
# Seconds that a client may take, by what is waited for.
PATIENCE = {
    # The head of a request, as in Apache: even over a slow line it is one packet.
    "head": 20.0,
    # A body. If an answer needs it, read_body is a little earlier, and says so.
    "body": BODY_SECONDS + 5.0,
    # That it reads a byte of its answer, as in nginx.
    "reading": 60.0,
    # That it closes, after it was refused. What it still sends is read: if a connection is closed
    # over unread bytes, the answer that says why may be lost.
    "closing": 2.0,
}
# Connections at once; requests that wait or are computed are fewer (--max-queue, --max-batch).
MOST = 1024
# Connections above that number that are told so; others are closed.
TOLD = 16
# Connections that one turn of the event loop takes from the BACKLOG that the system keeps.
ACCEPTED = 16
BACKLOG = 2048
# How long a stop waits for the device.
STOP_SECONDS = 10.0
# How long the device's chunk may take after the grace time, and telling the clients.
TELL_SECONDS = 5.0
# How long the clients may take to read it.
TOLD_SECONDS = 1.0
# Of every answer: no page of another site may frame it, and no browser guesses its type.
HEADERS = [
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Content-Security-Policy", "frame-ancestors 'none'"),
]
# Of uvicorn, asyncio and this package: lines on stderr with the time.
LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "loggers": {
        name: {"handlers": ["stderr"], "propagate": False}
        for name in ("uvicorn", "asyncio", "llm.serving")
    },
}


class Traffic(ServerState):
    """All connections of a server.

    Attributes:
      most: how many there may be. Half of the files that the process may open: the rest is for
        connections that come and go, and for the program.
    """

    def __init__(self) -> None:
        super().__init__()
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.most = MOST if files == resource.RLIM_INFINITY else min(MOST, files // 2)
        self._events: Counter[str] = Counter()
        self._said: dict[str, float] = {}

    def note(self, event: str) -> None:
        """Count what happened to a connection, for the log."""
        self._events[event] += 1

    def tend(self) -> None:
        """End connections whose clients take too long, and write the log. Once a second."""
        for connection in [*self.connections]:
            assert isinstance(connection, Connection)
            connection.tend()
        now = time.monotonic()
        for event in [*self._events]:
            if now - self._said.get(event, -LOG_SECONDS) >= LOG_SECONDS:
                self._said[event] = now
                LOG.warning("%d %s", self._events.pop(event), event)


class Connection(H11Protocol):
    """A connection whose client must go on."""

    server_state: Traffic
    _refused = False
    _waits: tuple[str | None, object] = None, None
    _since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take it. If there are too many, the one that waits longest for its client must go."""
        super().connection_made(transport)
        connections: Any = self.server_state.connections
        if len(connections) <= self.server_state.most:
            return
        staying = [c for c in connections if c is not self and not c.transport.is_closing()]
        excess = len(staying) + 1 - self.server_state.most
        idle = [c for c in staying if c.waits_for() not in (None, "reading")]
        if excess <= 0:
            return
        if idle:
            min(idle, key=lambda connection: connection._since).drop(
                "connections closed that waited for their clients, to make room for others"
            )
        elif excess <= TOLD:
            self.app_state = {"crowded": True}
            self.server_state.note("connections answered with 503, because there are too many")
        else:
            self.drop("connections closed, because there are too many")

    def data_received(self, data: bytes) -> None:
        if not self._refused:
            super().data_received(data)
        self.waits_for()

    def waits_for(self) -> str | None:
        """What its client has to do, a key of PATIENCE; None if the client waits for the server.

        It notes since when; so it is asked whenever that may have changed.
        """
        unread = self.transport.get_write_buffer_size()
        if unread:
            waits: tuple[str | None, object] = "reading", unread
        elif self._refused:
            waits = "closing", None
        else:
            states = {h11.IDLE: "head", h11.SEND_BODY: "body"}
            waits = states.get(self.conn.their_state), self.cycle
        if waits != self._waits:
            self._waits, self._since = waits, self.loop.time()
        return waits[0]

    def tend(self) -> None:
        """End it if its client has taken too long."""
        waits = self.waits_for()
        if waits is None or self.loop.time() - self._since <= PATIENCE[waits]:
            return
        event = f"clients given up, since they took more than {PATIENCE[waits]:.0f} s for {waits}"
        if waits == "head" and self.conn.trailing_data[0]:
            self.server_state.note(event)
            seconds = f"{PATIENCE[waits]:.0f} seconds"
            self.refuse(APIError(408, f"the head of the request did not come within {seconds}"))
        elif waits in ("head", "closing"):  # browsers connect before they know what to ask
            self.transport.abort()
        else:
            self.drop(event)

    def drop(self, event: str) -> None:
        self.server_state.note(event)
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP. uvicorn calls this while it handles h11's error."""
        error = sys.exception()
        status = getattr(error, "error_status_hint", 400)
        why, _, _ = str(error).partition(": bytearray")  # not what a stranger sent
        self.server_state.note("requests refused that were not HTTP/1.1")
        self.refuse(APIError(status, f"this is not HTTP/1.1: {why}", code="bad_http"))

    def refuse(self, error: APIError) -> None:
        """Answer with an error, unless an answer was begun, and close."""
        if self.cycle is not None:  # its application learns that nobody reads what it answers
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        is_head = self.conn.our_state is h11.SEND_RESPONSE and self.scope["method"] == "HEAD"
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        response = error_response(error)
        response.headers["connection"] = "close"
        headers = [*self.server_state.default_headers, *response.raw_headers]
        reason = http.HTTPStatus(error.status).phrase.encode()
        head = h11.Response(status_code=error.status, headers=headers, reason=reason)
        body = h11.Data(data=b"" if is_head else bytes(response.body))
        for event in (head, body, h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.cycle, self._refused = None, True  # type: ignore[assignment]
        with contextlib.suppress(OSError):  # the client is gone
            self.transport.write_eof()
        self.waits_for()


def listen(host: str, port: int) -> socket.socket:
    """A socket that already listens: clients that come while the model loads wait for it.

    Raises:
      UsageError: the port is taken, or the host is not one of this machine.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        dual = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        return socket.create_server(address, family=family, backlog=BACKLOG, dualstack_ipv6=dual)
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

    def __init__(
        self,
        app: Callable[..., Awaitable[None]],
        engine: Engine,
        grace: float,
        ready: Callable[[], None],
    ):
        config = uvicorn.Config(
            app,
            loop="asyncio",
            http=Connection,
            backlog=ACCEPTED,
            headers=HEADERS,
            log_config=LOGGING,
            log_level="error",
            lifespan="off",
            timeout_graceful_shutdown=grace + TELL_SECONDS + 2 * TOLD_SECONDS,  # type: ignore[arg-type]
            server_header=False,
            ws="none",
        )
        super().__init__(config)
        self.server_state: Traffic = Traffic()
        self.engine, self._grace, self._ready = engine, grace, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        asyncio.get_running_loop().set_exception_handler(self._note_failure)
        for listener in sockets or []:
            listener.listen(BACKLOG)  # asyncio made it ACCEPTED
        self._ready()

    def _note_failure(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Called for what fails beside the requests. asyncio says at length that it cannot accept a
        connection, and again at once."""
        match context:
            case {"exception": OSError(strerror=str(reason))}:
                self.server_state.note(f"connections failed: {reason}")
            case _:
                loop.default_exception_handler(context)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        if counter % 10 == 0:
            self.server_state.tend()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop the engine after the grace time, so that every client gets an answer.

        uvicorn would cancel running requests, and their clients would not be told why.
        """

        async def stop_engine() -> None:
            await asyncio.sleep(self._grace)
            await asyncio.to_thread(self.engine.stop, TELL_SECONDS)
            await asyncio.sleep(TOLD_SECONDS)
            for connection in [*self.server_state.connections]:
                connection.transport.abort()  # its client does not read

        stopping = asyncio.create_task(stop_engine())
        await super().shutdown(sockets)
        stopping.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On SIGINT and SIGTERM. A second signal ends the process at once."""
        if self.should_exit:
            write_stderr("\nstopped at once on a second signal")
            os._exit(128 + sig)
        self.should_exit = True
        name = signal.Signals(sig).name
        write_stderr(f"\n{name}: finishing what runs; again to stop at once")
