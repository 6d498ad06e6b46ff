"""One file for each command of the shell. Commands join the other parts; nothing imports them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence

from llm.console import open_streams, say
from llm.errors import LLMError, SaidElsewhereError, StoppedError, UsageError
from llm.files import is_disk_full


def run_command(command: Callable[[list[str]], int], arguments: Sequence[str] | None = None) -> int:
    """Run a command; an error meant for people is a message and an exit code, not a traceback.

    What the command writes is either whole or the exit code says so (llm/console.py).
    """
    open_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = command(words)
        sys.stdout.flush()
        return code
    except SaidElsewhereError as error:
        return error.exit_code
    except LLMError as error:
        say(f"{'' if isinstance(error, StoppedError) else 'error: '}{_as_given(str(error), words)}")
        return error.exit_code
    except KeyboardInterrupt:
        say("stopped")
        return 130
    except OSError as error:
        if not is_disk_full(error):
            raise
        say(f"error: no room to write ({error.strerror}); free some space")
        return UsageError.exit_code
    except Exception as error:
        # JAX's error is recognised by name, because a command may fail before JAX is imported.
        of_device = type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error)
        if not of_device and not isinstance(error, MemoryError):
            raise
        reason = str(error).split("\n")[0][:200] or "the system gave no more"
        say(f"error: out of memory ({reason}). {_LESS_MEMORY}")
        return UsageError.exit_code
    finally:
        # Otherwise Python writes what is left at its end, and exits with 120 if that fails.
        with contextlib.suppress(UsageError, SystemExit):
            sys.stdout.flush()


def _as_given(message: str, words: Sequence[str]) -> str:
    """A message that begins with the name of a setting or an argument, with the flag in its place
    if a person gave that."""
    name, space, rest = message.partition(" ")
    flag = f"--{name.replace('_', '-')}"
    given = {word.partition("=")[0].replace("_", "-") for word in words}
    return f"{flag}{space}{rest}" if flag in given else message


_LESS_MEMORY = (
    "Training needs less with a smaller training.micro_batch_size or training.eval_batch_size, "
    "with training.remat = 'block', or with a smaller model (`python -m llm plan CONFIG` says "
    "what a step needs). Sampling and scoring need less with fewer texts at once"
)
