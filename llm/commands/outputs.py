"""The files that a command line names: none that it writes is read too, or written twice."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from llm.errors import UsageError
from llm.run.directory import RunDirectory

# A shell may have put files in their places.
_STREAMS = [(f"/dev/fd/{n}", f"standard {of}") for n, of in enumerate(("input", "output", "error"))]


def check_outputs(outputs: Mapping[str, str], inputs: Mapping[str, Sequence[str]]) -> None:
    """Refuse a file that cannot be written now, not after a model has run, and a file that has
    another use in the same command.

    Args:
      outputs: flag -> path.
      inputs: flag or argument -> paths of files and of runs; other words do no harm.
    Raises:
      UsageError: the message names both flags.
    """
    read = (use for name, paths in inputs.items() for path in paths for use in _read(name, path))
    taken = [*_STREAMS, *read] if outputs else []
    for name, path in outputs.items():
        folder = os.path.dirname(path) or "."
        if not os.path.isdir(folder):
            raise UsageError(f"cannot write {path}: there is no folder {folder}")
        if os.path.isdir(path or folder):
            raise UsageError(f"cannot write {path}: it is a folder; expected a file's name")
        for file, use in taken:
            if same_file(file, path):
                raise UsageError(f"{use} and {name} both name {path}; give each a file of its own")
        taken.append((path, name))


def _read(name: str, path: str) -> Iterator[tuple[str, str]]:
    """The files that an argument names, each with a name; for a run everything that it holds."""
    yield path, name
    if os.path.isdir(path):
        run = RunDirectory(Path(path))
        for part in (run.config, run.provenance, run.metrics, run.tokenizer, run.checkpoints):
            yield from ((str(file), f"the run {path}") for file in (part, *part.rglob("*")))


def same_file(one: str, other: str) -> bool:
    """Whether two names are one file, or would be when it is written.

    Links of both kinds, other ways to a folder, and folders that do not tell capitals from small
    letters give a file several names. Pipes and devices are no files that could be lost.
    """
    if os.path.exists(one) and os.path.exists(other):
        return os.path.samefile(one, other) and os.path.isfile(one)
    one, other = os.path.realpath(one), os.path.realpath(other)
    if one == other or os.path.exists(one) or os.path.exists(other):
        return one == other
    if os.path.basename(one).casefold() == os.path.basename(other).casefold():
        # Only their folder knows whether the two names will be one file.
        with contextlib.suppress(OSError), open(one, "x"):
            found = os.path.exists(other)
            os.unlink(one)
            return found
    return False
