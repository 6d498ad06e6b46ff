"""RUN/report.html while a run trains: written in the background, and served if a port is set.

Training never waits for a page: one is begun in a thread when an evaluation is complete, unless one
is still being written, or the last one took so long that pages would take more than a hundredth of
the time. The last page is written when the run ends, however it does.
"""

import threading
import time

from llm.files import why
from llm.pages.report import write_report
from llm.pages.report_server import start_server
from llm.run.directory import RunDirectory
from llm.run.display import Display

# Pages take at most this share of the time.
SHARE = 0.01


class Page:
    """The page of one run.

    Args:
      writes: False in all processes of a run but one.
      port: of the page that grows; 0: none.
    Raises:
      UsageError: the port is taken.
    """

    def __init__(self, run: RunDirectory, display: Display, writes: bool, port: int = 0):
        self._run, self._display, self._writes = run, display, writes
        self._thread: threading.Thread | None = None
        self._failed, self._next = False, 0.0
        self._server = start_server([run], "127.0.0.1", port) if writes and port else None
        if self._server is not None:
            display.say(f"the page of this run: {self._server.url}")

    def ask(self) -> None:
        """Begin to write the page; returns at once."""
        busy = self._thread is not None and self._thread.is_alive()
        if self._writes and not busy and time.monotonic() >= self._next:
            self._thread = threading.Thread(target=self._write, name="report", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop serving, and write the last page."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        if self._thread is not None:
            self._thread.join()
        if self._writes and self._run.exists():
            self._write(over=True)

    def _write(self, over: bool = False) -> None:
        begun = time.monotonic()
        try:
            write_report(self._run, over)
        except Exception as error:  # whatever is wrong with a page, it never ends a run
            if not self._failed:
                self._display.say(f"warning: {self._run.report} is not written ({why(error)})")
            self._failed = True
        now = time.monotonic()
        self._next = now + (now - begun) / SHARE


def complete(run: RunDirectory, display: Display) -> None:
    """Write the last page of a finished run if what it shows is newer, as after a kill."""
    page, *shown = (
        file.stat().st_mtime_ns if file.exists() else 0
        for file in (run.report, run.provenance, run.metrics)
    )
    if page < max(shown):
        Page(run, display, writes=True).close()
