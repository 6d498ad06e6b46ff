"""One file per command: what the shell calls. Commands join the parts; nothing calls them."""

import sys
from collections.abc import Callable, Sequence

from llm.errors import LLMError, StoppedError


def run_command(command: Callable[[list[str]], int], arguments: Sequence[str] | None = None) -> int:
    """Run a command; answer an error that is meant for people with its message and exit code."""
    try:
        return command(list(sys.argv[1:] if arguments is None else arguments))
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


def _prefix(error: LLMError) -> str:
    return "" if isinstance(error, StoppedError) else "error: "
