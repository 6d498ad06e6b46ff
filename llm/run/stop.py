"""Ctrl-C and SIGTERM: the first asks the run to stop at its next safe point, a second ends it."""

import os
import signal
import sys
from types import FrameType

from llm.errors import StoppedError


class StopRequest:
    """Installed for as long as a run lasts; `requested` turns true at the first signal."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def check(self, what_is_lost: str) -> None:
        """Raise when a stop was asked for, where there is nothing to save."""
        if self.requested:
            raise StoppedError(f"stopped on request; {what_is_lost}: the same command goes on")

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.requested:
            # At once: no handlers, no flushing. What was saved is whole whatever happens now.
            os.write(2, b"\nstopped at once on a second signal\n")
            os._exit(128 + number)
        self.requested = True
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: finishing this step, then saving; again to stop at once\n".encode())
        sys.stderr.flush()
