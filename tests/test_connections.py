"""HTTP connections: malformed requests, clients that take too long, and too many of them. The
client is a socket, and the application a few lines of ASGI."""

import asyncio
import contextlib
import json
import logging
import socket
import threading
import types

import pytest
from runs import until

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from llm.serving import connections
from llm.serving.connections import PATIENCE, Server, listen, run
from llm.serving.requests import APIError
from llm.serving.server import error_response

HEAD = b"Host: localhost\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


async def app(scope, receive, send):
    """Answers at once at /quick, with 128 MB at /endless, else with the length of the body."""
    if "crowded" in scope["state"]:
        return await error_response(APIError(503, "too many"))(scope, receive, send)
    body, more = b"", scope["path"] == "/"
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body, more = body + message["body"], message["more_body"]
    await send({"type": "http.response.start", "status": 200})
    for _ in range(2000 if scope["path"] == "/endless" else 0):
        await send({"type": "http.response.body", "body": b"x" * 2**16, "more_body": True})
    await send({"type": "http.response.body", "body": b"%d bytes" % len(body)})
    return None


class Client:
    """A server in a thread, and sockets that are connected to it."""

    def __init__(self, server, port):
        self.server, self.port, self.said = server, port, []

    def connect(self, data=b""):
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30.0)
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        return connection

    def ask(self, data):
        """All that comes back until the server closes."""
        with self.connect(data) as connection, connection.makefile("rb") as file:
            return file.read()

    def status(self, path=b"/"):
        request = b"GET " + path + b" HTTP/1.1\r\nConnection: close\r\n" + HEAD + b"\r\n"
        return int(self.ask(request).split()[1])


@pytest.fixture
def client(monkeypatch):
    said = []
    monkeypatch.setattr(
        connections.LOG, "warning", lambda *words: said.append(words[0] % words[1:])
    )
    logged = []  # by uvicorn and asyncio
    monkeypatch.setattr(
        logging.Logger, "callHandlers", lambda _, record: logged.append(record.getMessage())
    )
    # uvicorn looks after its connections once a second, and ends a tenth after it is told to.
    honest = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: honest(seconds / 20))
    listener, ready = listen("127.0.0.1", 0), threading.Event()
    engine = types.SimpleNamespace(stop=lambda timeout: True)
    server = Server(app, engine, grace=0.1, ready=ready.set)
    client = Client(server, listener.getsockname()[1])
    client.said, client.logged = said, logged
    thread = threading.Thread(target=run, args=(server, listener))
    thread.start()
    assert ready.wait(60.0)
    yield client
    server.should_exit = True
    thread.join(60.0)
    assert not thread.is_alive()


MALFORMED = {
    "no HTTP": (b"\x16\x03\x01\xff\r\n\r\n", 400),
    "HTTP/0.9": (b"GET /\r\n\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    "header": (b"GET / HTTP/1.1\r\n" + HEAD + b"a b: c\r\n\r\n", 400),
    "target": ("GET /\u00e9 HTTP/1.1\r\n".encode() + HEAD + b"\r\n", 400),
    "large head": (b"GET / HTTP/1.1\r\n" + HEAD + b"a: " + b"b" * 300_000, 431),
    "length": (b"POST / HTTP/1.1\r\n" + HEAD + b"Content-Length: -1\r\n\r\n", 400),
    "two lengths": (
        b"POST / HTTP/1.1\r\n" + HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400
    ),
    "coding": (b"POST / HTTP/1.1\r\n" + HEAD + b"Transfer-Encoding: gzip\r\n\r\n", 501),
    "chunk": (CHUNKED + b"zz\r\n", 400),
    "second chunk": (CHUNKED + b"2\r\n{}\r\n-1\r\n", 400),
    "end of a chunk": (CHUNKED + b"2\r\n{}{}0\r\n\r\n", 400),
    "trailer": (CHUNKED + b"0\r\na b\r\n\r\n", 400),
    "chunk to nobody": (CHUNKED.replace(b"POST / ", b"GET /quick "), 200),
    "second request": (b"GET /quick HTTP/1.1\r\n" + HEAD + b"\r\n\x00\r\n\r\n", 200),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_not_http_is_answered_in_json_and_without_a_traceback(client, name):
    sent, status = MALFORMED[name]
    if name == "chunk to nobody":  # its answer has begun when the chunk comes
        with client.connect(sent) as connection, connection.makefile("rb") as file:
            answer = file.readline()
            connection.sendall(b"zz\r\n")
            file.read()
    else:
        answer = client.ask(sent)
    assert int(answer.split()[1]) == status
    if status == 200:
        assert client.status() == 200 and client.logged == []
        return
    head, _, body = answer.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert b"content-type: application/json" in head and b"connection: close" in head
    assert "HTTP/1.1" in error["message"] and "bytearray" not in error["message"]
    assert error["type"] == ("server_error" if status == 501 else "invalid_request_error")
    until(lambda: client.said)
    assert "not HTTP" in client.said[0] and client.logged == []


@pytest.mark.parametrize("path", [b"/quick", b"/"])
def test_a_malformed_body_of_a_head_request_gets_a_head_alone(client, path):
    answer = client.ask(CHUNKED.replace(b"POST / ", b"HEAD " + path + b" ") + b"zz\r\n")
    assert answer.startswith(b"HTTP/1.1 400") and answer.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("sent", [b"\r\n\x00\r\n\r\n", b"GET /quick HTTP/1.1\r\n" + HEAD + b"\r\n"])
def test_no_answer_can_be_framed_or_its_type_guessed(client, sent):
    with client.connect(sent) as connection:
        head = connection.recv(10_000).lower()
    assert b"x-frame-options: deny" in head and b"frame-ancestors 'none'" in head
    assert b"x-content-type-options: nosniff" in head


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: loc",
        b"GET /quick HTTP/1.1\r\n" + HEAD + b"\r\nGET ",
        b"G",
    ],
)
def test_half_a_head_is_told_so_and_closed(client, monkeypatch, sent):
    monkeypatch.setitem(PATIENCE, "head", 0.0)
    answer = client.ask(sent)
    assert json.loads(answer.rpartition(b"\r\n\r\n")[2])["error"]["message"].startswith("the head")
    assert b"HTTP/1.1 408" in answer
    until(lambda: client.said)
    assert "for head" in client.said[0]


def test_who_says_nothing_is_closed_without_an_answer(client, monkeypatch):
    monkeypatch.setitem(PATIENCE, "head", 0.0)
    assert client.ask(b"") == b"" and client.said == []


def test_a_body_that_never_ends_is_closed_though_it_was_answered(client, monkeypatch):
    monkeypatch.setitem(PATIENCE, "body", 0.0)
    answer = client.ask(b"POST /quick HTTP/1.1\r\n" + HEAD + b"Content-Length: 9\r\n\r\nx")
    assert answer.startswith(b"HTTP/1.1 200")
    with client.connect(b"POST / HTTP/1.1\r\n" + HEAD + b"Content-Length: 9\r\n\r\nx") as other:
        assert other.recv(100) == b""


def test_who_does_not_read_is_closed(client, monkeypatch):
    monkeypatch.setitem(PATIENCE, "reading", 0.0)
    with client.connect(b"GET /endless HTTP/1.1\r\n" + HEAD + b"\r\n") as connection:
        until(lambda: any("for reading" in line for line in client.said))
        until(lambda: not client.server.server_state.connections)
        with pytest.raises(ConnectionError):
            while connection.recv(2**20):
                pass
            raise ConnectionError
    assert client.status() == 200


def test_a_stop_waits_for_no_client_that_does_not_read(client):
    with client.connect(b"GET /endless HTTP/1.1\r\n" + HEAD + b"\r\n") as connection:
        assert connection.recv(20).startswith(b"HTTP/1.1 200")
        state = client.server.server_state
        until(lambda: any(c.waits_for() == "reading" for c in state.connections))
        client.server.should_exit = True
        until(lambda: not state.connections)
    assert client.logged == []


def test_a_refused_client_that_goes_on_sending_still_reads_why(client):
    with client.connect(b"\x00\r\n\r\n" + b"x" * 3_000_000) as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 400")


def test_half_open_clients_make_room_for_good_ones(client):
    """Three hundred of them, where the process may have twenty."""
    client.server.server_state.most = 20
    halves = [client.connect(b"GET / HTTP/1.1\r\nHost: loc") for _ in range(300)]
    for _ in range(30):
        assert client.status() == 200
    until(lambda: any("to make room" in line for line in client.said))
    assert len(client.server.server_state.connections) <= 20
    for connection in halves:
        connection.close()


def test_when_all_are_at_work_more_are_told_so(client):
    state = client.server.server_state
    state.most = 2
    working = [client.connect(b"GET /endless HTTP/1.1\r\n" + HEAD + b"\r\n") for _ in range(2)]
    assert all(connection.recv(20).startswith(b"HTTP/1.1 200") for connection in working)
    until(lambda: all(c.waits_for() == "reading" for c in state.connections))
    assert [client.status() for _ in range(3)] == [503] * 3
    for connection in working:
        connection.close()
    until(lambda: not state.connections)
    assert client.status() == 200


def test_the_bound_is_below_the_limit_of_files(monkeypatch):
    limits = {"soft": 200}
    monkeypatch.setattr(connections.resource, "getrlimit", lambda _: (limits["soft"], 4096))
    assert connections.Traffic().most == 100
    limits["soft"] = connections.resource.RLIM_INFINITY
    assert connections.Traffic().most == connections.MOST


def test_a_flood_is_one_line_of_the_log(monkeypatch):
    said = []
    monkeypatch.setattr(
        connections.LOG, "warning", lambda *words: said.append(words[0] % words[1:])
    )
    traffic = connections.Traffic()
    for _ in range(1000):
        traffic.note("bad ones")
    traffic.tend()
    traffic.note("bad ones")
    traffic.tend()
    assert said == ["1000 bad ones"]
    monkeypatch.setattr(connections, "LOG_SECONDS", 0.0)
    traffic.tend()
    assert said == ["1000 bad ones", "1 bad ones"]
