"""Errors meant for people, each with the exit code that a shell sees.

Raise one of these as soon as wrong input enters the program. The message says what was found, what
was expected and what to do; `llm.commands.run_command` prints it without a traceback. Any other
exception is a bug, and keeps its traceback (exit 1).
"""

import contextlib
from collections.abc import Iterator


class LLMError(Exception):
    """The base of every error that ends a command with one message and an exit code."""

    exit_code = 1


class UsageError(LLMError):
    """A setting, a flag or a combination of them cannot be used."""

    exit_code = 2


class DataError(LLMError):
    """The corpus or its token shards cannot be used."""

    exit_code = 3


class CheckpointError(LLMError):
    """No checkpoint can be trusted, or a checkpoint is not what its manifest says."""

    exit_code = 4


class NonFiniteError(LLMError):
    """The loss or a gradient became NaN or infinite."""

    exit_code = 5


class RunLockedError(LLMError):
    """Another process is training in this run directory."""

    exit_code = 6


class LostProcessError(LLMError):
    """A process of the run died or hangs; the same command resumes the run."""

    exit_code = 7


class StoppedError(LLMError):
    """Stopped on request (see llm/run/stop.py) with everything saved; the same command resumes."""

    exit_code = 75


class SaidElsewhereError(Exception):
    """Not for people: another process of the run printed what went wrong; end with its code."""

    def __init__(self, exit_code: int):
        super().__init__(f"another process of the run ended with exit code {exit_code}")
        self.exit_code = exit_code


@contextlib.contextmanager
def needing(what: str, to_install: str) -> Iterator[None]:
    """Import packages that not everybody has installed.

        with needing("to_pandas", "pandas"):
            import pandas

    Raises:
      UsageError: one of them is not installed; the message has the words of pip install.
    """
    try:
        yield
    except ImportError as error:
        raise UsageError(
            f"{what} needs the package {error.name}, which is not installed: "
            f"pip install {to_install}"
        ) from None
