"""One file per command: what the shell calls. Commands join the parts; nothing calls them."""

import contextlib
import os
import sys
from collections.abc import Callable, Sequence

from llm.errors import LLMError, SaidElsewhereError, StoppedError, UsageError
from llm.files import is_disk_full


def run_command(command: Callable[[list[str]], int], arguments: Sequence[str] | None = None) -> int:
    """Run a command; answer an error that is meant for people with its message and exit code."""
    try:
        return command(list(sys.argv[1:] if arguments is None else arguments))
    except SaidElsewhereError as error:
        return error.exit_code
    except LLMError as error:
        print(f"{_prefix(error)}{error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe (head, less) has seen enough.
        sys.stderr.close()
        return 0
    except OSError as error:
        if not is_disk_full(error):
            raise
        print(f"error: no room to write ({error.strerror}); free some space", file=sys.stderr)
        _forget_stdout()
        return UsageError.exit_code
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        print(f"error: {_less_memory(error)}", file=sys.stderr)
        return UsageError.exit_code


def _is_out_of_memory(error: Exception) -> bool:
    """Of the device's, or of this machine's. By name: a command may fail before JAX is there."""
    of_device = type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error)
    return of_device or isinstance(error, MemoryError)


def _less_memory(error: Exception) -> str:
    reason = str(error).split("\n")[0][:200] or "no more could be had"
    return (
        f"out of memory ({reason}). Less is needed for training by a smaller "
        "training.micro_batch_size or training.eval_batch_size, by training.remat = 'block' or a "
        "smaller model (`python -m llm plan CONFIG` says what a step needs), and for sampling and "
        "scoring by fewer texts at once"
    )


def _forget_stdout() -> None:
    """What standard output still holds has no room either, and would be written at the end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _prefix(error: LLMError) -> str:
    return "" if isinstance(error, StoppedError) else "error: "
