"""The report over HTTP, growing while a run trains: GET / is the page, GET /data.json its numbers.

It answers only if it is called by a name of this machine, so that no web page can reach it through
a name of its own (DNS rebinding), unless it listens on other addresses on purpose.
"""

import ipaddress
import json
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from llm.console import say
from llm.errors import UsageError
from llm.pages.report import Report, gather, is_training, report_page
from llm.pages.report_data import GrowingRows
from llm.run.directory import RunDirectory


class ReportServer(ThreadingHTTPServer):
    """Serves the report of some runs."""

    daemon_threads = True

    def __init__(self, runs: Sequence[RunDirectory], host: str, port: int):
        self.runs, self._lock = runs, threading.Lock()
        self._seen: Any = None
        self._rows: list[GrowingRows] = []
        self._report: Report = {}
        self.host = host
        super().__init__((host, port), _Handler)
        self.url = f"http://{host}:{self.server_address[1]}"

    def handle_error(self, *_: Any) -> None:
        """Nothing: a browser that leaves in the middle of an answer is no error of the run."""

    def content(self, path: str) -> bytes:
        """The page or its numbers, which are read again if the runs have changed."""
        files = [file for run in self.runs for file in (run.metrics, run.probes, run.provenance)]
        with self._lock:
            seen = [file.exists() and file.stat().st_mtime_ns for file in files]
            seen += [is_training(run) for run in self.runs]  # a kill changes no file
            if seen != self._seen:
                self._rows = self._rows or [GrowingRows(run) for run in self.runs]
                for rows in self._rows:
                    rows.read()
                self._report, self._seen = gather(self.runs, read=self._rows), seen
            if path == "/":
                return report_page(self._report, live=True).encode()
            return json.dumps(self._report, allow_nan=False).encode()


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if not self._is_called_by_its_name():
            return self._answer(403, b"this server answers to localhost alone", "text/plain")
        if path not in ("/", "/data.json"):
            return self._answer(404, b"there is / and /data.json", "text/plain")
        try:
            content = self.server.content(path)
        except Exception as error:  # whatever is wrong with a page, it never ends a run
            return self._answer(503, f"{error}".encode(errors="replace"), "text/plain")
        self._answer(200, content, "text/html" if path == "/" else "application/json")

    def _is_called_by_its_name(self) -> bool:
        try:
            name = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
        except ValueError:
            return False
        return not is_loopback(self.server.host) or is_loopback(name)

    def _answer(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Nothing: requests come every two seconds."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def start_server(runs: Sequence[RunDirectory], host: str, port: int) -> ReportServer:
    """A server that answers in threads of its own.

    Raises:
      UsageError: the port is taken, or the host is not one of this machine.
    """
    try:
        server = ReportServer(runs, host, port)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}, port {port}: {error.strerror}; stop what listens there, or "
            "choose another port or address of this machine"
        ) from None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def serve(runs: Sequence[RunDirectory], host: str, port: int) -> None:
    """Serve until Ctrl-C."""
    gather(runs)  # what is wrong with the runs is said now
    server = start_server(runs, host, port)
    say(f"the report is at {server.url}; Ctrl-C ends this")
    threading.Event().wait()
