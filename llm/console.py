r"""Standard output and standard error of a command: what fails there, and what may be shown there.

    say         text for a person, on stderr. Nothing depends on it: it may be lost without a word
    say_result  a command's result for a person, on stderr. If it is lost, the command fails
    stdout      data. If it is lost, the command fails: silently if the reader of a pipe has left

Control characters drive a terminal, and invisible or direction-changing ones make a text look like
something else (Boucher and Anderson 2021, "Trojan Source"). So names, messages and text of others
are spelled for people as Python spells them: \x1b, \u202e.
"""

import errno
import io
import os
import select
import signal
import sys
import traceback
import unicodedata
from typing import Any

from llm.errors import UsageError
from llm.files import is_disk_full

# They join or part letters and emoji, and change nothing else.
JOINERS = "\u200c\u200d"
_UNSAFE_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")
# What a command exits with that SIGPIPE would have ended, as shells spell it.
_READER_LEFT = 128 + signal.SIGPIPE
# How long progress waits for a reader that has stopped; a terminal that is busy takes less.
PATIENCE_SECONDS = 1.0


def is_unsafe(character: str) -> bool:
    """Whether a character must be spelled out; line breaks and tabs are among these."""
    if character.isprintable() or character in JOINERS:
        return False
    return unicodedata.category(character) in _UNSAFE_CATEGORIES


def escape_character(character: str) -> str:
    r"""\xNN, \uNNNN or \UNNNNNNNN, with \n, \r and \t by their letters."""
    return character.encode("unicode_escape").decode("ascii")


def escaped(text: str, keep: str = "") -> str:
    r"""A text that does nothing but be read: \n, \x1b, \u202e; characters of `keep` stay."""
    return "".join(escape_character(c) if is_unsafe(c) and c not in keep else c for c in text)


def for_terminal(text: str) -> str:
    """A text of lines, as it may be shown in a terminal."""
    return text if text.isascii() and text.isprintable() else escaped(text, keep="\n\t")


class _Stream(io.FileIO):
    """Descriptor 1 or 2. What stderr does not take is left out; stdout fails once, and for good.

    Attributes:
      error: the newest failure.
      stalled: whether text was left out because the reader had stopped reading.
      patience: how long to wait for the reader, in seconds; None: for ever.
    """

    error: OSError | None = None
    stalled = False
    patience: float | None = None

    def write(self, data: Any) -> int:
        """As io.RawIOBase.write. Also on a descriptor that another process made non-blocking."""
        while self.fileno() == 2 or self.error is None:
            try:
                if not select.select([], [self], [], self.patience)[1]:
                    self.stalled, self.patience = True, 0.0  # wait no more until it reads again
                    break
                # What fits into a pipe that can be written to at all.
                count = super().write(data[: select.PIPE_BUF])
            except OSError as error:
                self.error = error
                if self.fileno() == 1:
                    raise _lost_output(error) from None
                break
            else:
                self.patience = self.patience if self.patience is None else PATIENCE_SECONDS
                if count is not None:
                    return count
        return len(data)


def _lost_output(error: OSError) -> BaseException:
    if error.errno == errno.EPIPE:
        return SystemExit(_READER_LEFT)
    if is_disk_full(error):
        return UsageError(f"no room to write ({error.strerror}); free some space")
    return UsageError(f"cannot write standard output: {error.strerror}")


_stderr: _Stream | None = None


def open_streams() -> None:
    """Set up the standard streams of this process. Replaced ones, as in a test, are left alone.

    A descriptor below 3 that is closed gets one that cannot be used either. Otherwise the next file
    that is opened would take its number, and whatever C code says would be written into it.

    Source: the module stdopen of gnulib.
    """
    global _stderr
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if descriptor else os.O_WRONLY)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text_of(_Stream(1, "w", closefd=False), sys.stdout)
    if sys.stderr is sys.__stderr__:
        _stderr = _Stream(2, "w", closefd=False)
        sys.stderr = _text_of(_stderr, sys.stderr)
        sys.excepthook = lambda *error: say("".join(traceback.format_exception(*error)).rstrip())


def _text_of(stream: _Stream, before: Any) -> io.TextIOWrapper:
    """A stream of text that escapes what its encoding does not have; `before` is None if it was
    closed."""
    return io.TextIOWrapper(
        io.BufferedWriter(stream),
        encoding=getattr(before, "encoding", None),
        errors="backslashreplace",
        line_buffering=getattr(before, "line_buffering", False),
        write_through=getattr(before, "write_through", False),
    )


def say(text: str) -> None:
    """Show a line, or several, to the person who runs the command."""
    print(for_terminal(text), file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Write text of others to stdout: escaped in a terminal, elsewhere as it is."""
    print(for_terminal(text) if sys.stdout.isatty() else text, end="", flush=True)


def say_result(text: str) -> None:
    """Show a person what a command has found.

    Raises:
      UsageError, SystemExit: it cannot be shown. Closing stderr on purpose is no error.
    """
    say(text)
    error = _stderr.error if _stderr else None
    if error is not None and error.errno != errno.EBADF:
        raise _lost_output(error)


def never_wait() -> None:
    """From now on leave out what stderr's reader does not read: training waits for nobody."""
    if _stderr is not None:
        _stderr.patience = PATIENCE_SECONDS


def lost() -> str:
    """Why something was not shown on stderr; "" if everything was."""
    if _stderr is None:
        return ""
    return _stderr.error.strerror or "" if _stderr.error else "it was not read" * _stderr.stalled


def write_stderr(text: str) -> None:
    """Write a line past whatever Python holds in its buffers; for signals and other threads."""
    try:
        if select.select([], [2], [], PATIENCE_SECONDS)[1]:  # whoever must end does not wait
            os.write(2, f"{for_terminal(text)}\n".encode())
    except OSError:
        pass  # the terminal may be gone
