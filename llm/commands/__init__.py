"""One file for each command of the shell. Commands join the other parts; nothing imports them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence

from llm.errors import LLMError, SaidElsewhereError, StoppedError, UsageError
from llm.files import is_disk_full


def run_command(command: Callable[[list[str]], int], arguments: Sequence[str] | None = None) -> int:
    """Run a command; an error meant for people is a message and an exit code, not a traceback."""
    try:
        return command(list(sys.argv[1:] if arguments is None else arguments))
    except SaidElsewhereError as error:
        return error.exit_code
    except LLMError as error:
        print(f"{'' if isinstance(error, StoppedError) else 'error: '}{error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe, such as head or less, has seen enough.
        sys.stderr.close()
        return 0
    except OSError as error:
        if not is_disk_full(error):
            raise
        print(f"error: no room to write ({error.strerror}); free some space", file=sys.stderr)
        # At its end Python writes what standard output still holds, which would fail again.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UsageError.exit_code
    except Exception as error:
        # JAX's error is recognised by name, because a command may fail before JAX is imported.
        of_device = type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error)
        if not of_device and not isinstance(error, MemoryError):
            raise
        reason = str(error).split("\n")[0][:200] or "the system gave no more"
        print(f"error: out of memory ({reason}). {_LESS_MEMORY}", file=sys.stderr)
        return UsageError.exit_code


_LESS_MEMORY = (
    "Training needs less with a smaller training.micro_batch_size or training.eval_batch_size, "
    "with training.remat = 'block', or with a smaller model (`python -m llm plan CONFIG` says "
    "what a step needs). Sampling and scoring need less with fewer texts at once"
)
