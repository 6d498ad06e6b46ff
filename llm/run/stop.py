"""Signals that ask a run to stop at its next safe point; a second Ctrl-C or SIGTERM ends it.

Schedulers send SIGUSR1, and SIGHUP comes when a terminal or a connection is gone, before they take
the machine away. Either may come several times, or together with SIGTERM: they never end a run at
once.
"""

import ctypes
import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

from llm.console import write_stderr
from llm.errors import StoppedError

_URGENT = (signal.SIGINT, signal.SIGTERM)
_SIGNALS = (*_URGENT, signal.SIGHUP, signal.SIGUSR1)


_kept_alive: list[Any] = []


def end_on(fatal: signal.Signals, why: Callable[[], str], exit_code: int) -> None:
    """Say why, and end with this exit code, when the C library or the kernel ends this process.

    The handler may run in any thread, in the middle of C code. It calls Python, because that code
    holds no lock of Python's beyond the interpreter's own, which ctypes takes or already has.
    """

    def say_and_end(_number: int) -> None:
        write_stderr(f"error: {why()}")
        os._exit(exit_code)

    _kept_alive.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(say_and_end))
    ctypes.CDLL(None).signal(int(fatal), _kept_alive[-1])


class StopRequest:
    """Handles signals as long as a run lasts; `requested` becomes true at the first signal.

    Python runs a signal's handler between two of its own instructions, and so not while one call
    compiles for minutes or waits for a device that hangs. But it writes each signal to a pipe at
    once. A thread reads the pipe, so that a second signal ends the process even then.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()
        self._descriptor_before = signal.set_wakeup_fd(
            self._writer.fileno(), warn_on_full_buffer=False
        )
        for number in _SIGNALS:
            before = signal.getsignal(number)
            if number in _URGENT or before is not signal.SIG_IGN:  # as nohup wants it
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._descriptor_before)
        self._writer.close()

    def check(self, what_is_lost: str) -> None:
        """Raise if a stop was requested; to be called where there is nothing to save."""
        if self.requested:
            raise StoppedError(f"stopped on request; {what_is_lost}: the same command goes on")

    def _receive(self, _number: int, _frame: object) -> None:
        self.requested = True  # seen at once by whatever the main thread does next

    def _watch(self) -> None:
        """In its own thread: read one byte for each signal, and none when the run is over."""
        received = 0
        with self._reader:
            while data := self._reader.recv(1):
                if data[0] not in _SIGNALS:
                    continue
                urgent = data[0] in _URGENT
                received += urgent
                if urgent and received > 1:
                    # No handlers, no flushing. What was saved is whole whatever happens now.
                    write_stderr("\nstopped at once on a second signal")
                    os._exit(128 + data[0])
                self.requested = True
                name = signal.Signals(data[0]).name
                again = "; again to stop at once" * urgent
                write_stderr(f"\n{name}: finishing this step, then saving{again}")
