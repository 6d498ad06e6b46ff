"""metrics.jsonl: one JSON object a line, each step once, however often the run was stopped.

    {"kind":"train","step","tokens","loss","grad_norm","learning_rate","tokens_per_second",
     "step_seconds","memory_bytes","mfu"}
    {"kind":"eval","step","split","loss","bits_per_byte","tokens"}

In a run on a mixture, a row {"kind":"eval","source",...} for each source stands before that of the
whole.
Losses are nats per token. A number that is not finite is null, and its row has "finite": false.
"""

import collections
import contextlib
import errno
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Annotated, Any, Required, TypedDict

import msgspec

from llm.console import say
from llm.errors import CheckpointError
from llm.faults import fault_point
from llm.files import open_regular, why
from llm.run.directory import explained

# The newest rows of steps stay in memory, for llm/measure/training.py, which reads 200. Not all of
# them stay, because a row is half a kilobyte, and runs have millions of steps.
NEWEST_ROWS = 1000

_BLOCK = 1 << 16
_LONGEST_LINE = 1 << 23  # a sample of 100,000 tokens


class _Row(TypedDict, total=False):
    """What is read of a row."""

    kind: Required[str]
    step: Required[Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]]
    loss: Required[float | None]
    tokens: int
    step_seconds: float
    split: str
    source: str
    finite: bool
    spike: bool


_NEEDED = {"train": {"tokens", "step_seconds"}, "eval": {"split"}}
_decode = msgspec.json.Decoder(_Row).decode


def newest_rows(path: Path) -> Iterator[Any]:
    """Every row, the newest first. Rows are read from the end of the file as they are asked for.

    What a crash left of a line is passed over. No file means no rows.

    Raises:
      CheckpointError: the file cannot be read, or it names a line that is JSON and not a row.
    """
    for place, line in _newest_lines(path):
        if (row := _parsed(path, place, line)) is not None:
            yield row


def _newest_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of everything that ends with a newline, the last one first."""
    with _explained(path), open_regular(path) as file:
        start, rest, is_whole = file.seek(0, os.SEEK_END), b"", False
        while start:
            end, start = start, max(0, start - _BLOCK)
            file.seek(start)
            content = file.read(end - start) + rest
            rest, *lines = content.split(b"\n")
            if len(rest) > _LONGEST_LINE:
                raise OSError(errno.EINVAL, "a line of it is longer than any row")
            place = start + len(content)
            for line in reversed(lines):
                place -= len(line)
                if is_whole:
                    yield place, line
                place, is_whole = place - 1, True  # before the newline that ends another line
        if is_whole:
            yield start, rest


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Raise what the system says of a file that is read as a CheckpointError; no file: no rows."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {why(error)}") from None


def _parsed(path: Path, place: int, line: bytes) -> Any:
    """The row of a line; None if the line is not JSON, as one that a crash cut off."""
    try:
        row = _decode(line)
        missing = _NEEDED.get(row["kind"], set()) - row.keys()
        if not missing:
            return row
        problem = f"no {', '.join(sorted(missing))}"
    except (msgspec.ValidationError, RecursionError) as error:
        problem = str(error)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    with open_regular(path) as file:
        blocks = iter(lambda: file.read(min(_BLOCK, place - file.tell())), b"")
        number = 1 + sum(block.count(b"\n") for block in blocks)
    found = line[:80].decode(errors="replace")
    raise CheckpointError(
        f"{path}, line {number}: expected a row as a run writes it, found {found} ({problem}); "
        "remove the line, or restore the file"
    )


class Rows:
    """The rows of a file of JSON lines, in order; a line that is still being written is none.

    Args:
      row: their type, for msgspec.
    Attributes:
      end: offset behind the last whole line that was read.
      broken: how many lines were no rows.
    """

    def __init__(self, path: Path, row: Any):
        self._path, self._decode = path, msgspec.json.Decoder(row).decode
        self.end, self._last, self.broken = 0, b"", 0

    def appended(self) -> Iterator[tuple[int, Any]]:
        """(offset, row) of each row that was appended since the last call.

        If the file is not as it was read, because a resume has cut it, everything is read anew, and
        (0, None) comes first.

        Raises:
          CheckpointError: the file cannot be read.
        """
        with _explained(self._path), open_regular(self._path) as file:
            file.seek(self.end - len(self._last))
            if file.read(len(self._last)) != self._last:
                file.seek(0)
                self.end, self._last, self.broken = 0, b"", 0
                yield 0, None
            while line := file.readline(_LONGEST_LINE):
                if len(line) == _LONGEST_LINE:
                    raise OSError(errno.EINVAL, "a line of it is longer than any row")
                if not line.endswith(b"\n"):
                    return
                start, self.end, self._last = self.end, self.end + len(line), line
                try:
                    row = self._decode(line)
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                    self.broken += 1
                else:
                    yield start, row

    def at(self, offsets: Iterable[int], row: Any) -> list[Any]:
        """The rows at some offsets, as another type; those that are none of it are left out.

        Raises:
          CheckpointError: the file cannot be read.
        """
        decode, found = msgspec.json.Decoder(row).decode, []
        with _explained(self._path), open_regular(self._path) as file:
            for offset in offsets:
                file.seek(offset)
                with contextlib.suppress(msgspec.DecodeError):
                    found.append(decode(file.readline(_LONGEST_LINE)))
        return found


class LineFile:
    """Appends lines. One that cannot be written is counted, with one warning: training goes on.

    Args:
      writes: False in all processes of a run but one.
    Attributes:
      lost: how many lines could not be written.
    """

    def __init__(self, path: Path, writes: bool = True):
        self._path, self._writes = path, writes
        self._file: IO[bytes] | None = None
        self.lost = 0

    def append(self, line: bytes, step: int | None = None) -> None:
        """Append the whole line or, if the disk is full, nothing, and hand it to the system.

        Args:
          step: of a row of metrics.jsonl, for its fault points.
        """
        if not self._writes:
            return
        try:
            action = None if step is None else fault_point("metrics.write", step)
            if self._file is None:
                self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 (held until close)
            size = self._file.seek(0, os.SEEK_END)
            if action == "torn":
                self._file.write(line[: len(line) // 2])
                fault_point("metrics.torn")
            written = self._file.write(line)
            if written < len(line):
                self._file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if not self.lost:
                say(
                    f"warning: {self._path} cannot be written ({error.strerror}); training goes "
                    "on, and says at the end how many lines are lost"
                )
            self.lost += line.count(b"\n")

    def _cut(self, end: int) -> None:
        """Drop what is behind an offset.

        Raises:
          CheckpointError, UsageError: see `explained`.
        """
        with explained(self._path), contextlib.suppress(FileNotFoundError):
            if os.path.getsize(self._path) != end:
                os.truncate(self._path, end)

    def close(self) -> None:
        if self.lost:
            say(f"warning: {self.lost:,} lines of {self._path} are lost")
        if self._file is not None:
            self._file.close()
            self._file = None


class MetricsFile(LineFile):
    """Appends rows. Processes that do not write remember their rows all the same.

    Attributes:
      skipped: how many updates in a row, up to the step that training resumes from, were refused.
    """

    def __init__(self, path: Path, writes: bool = True):
        super().__init__(path, writes)
        self._evaluated: list[dict[str, Any]] = []
        self._trained: collections.deque[dict[str, Any]] = collections.deque(maxlen=NEWEST_ROWS)
        self.skipped = 0

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Every evaluation, then the newest steps."""
        return [*self._evaluated, *self._trained]

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Keep the rows up to the step that training resumes from; returns the other rows.

        Of the rows that are kept, only the evaluations and the newest steps are parsed.
        """
        redone, end, unread = [], 0, NEWEST_ROWS
        kept: list[Any] = []
        for place, line in _newest_lines(self._path):
            if unread <= 0 and b'"eval"' not in line:
                continue
            row = _parsed(self._path, place, line)
            # A crash may have left the rows of sources without that of the whole.
            if row is not None and (row["step"] > step or ("source" in row and not kept)):
                redone.append(row)
            elif row is not None:
                end = end or place + len(line) + 1
                kept.append(row)
                # All that were refused in a row are read, however many they are.
                unread -= row["kind"] == "train" and not _is_refused(row)
        self.remember(kept[::-1], step)
        self._cut(end)
        return redone[::-1]

    def remember(self, rows: list[dict[str, Any]], step: int) -> None:
        """Go on at a step from these rows: those of `rewind`, or another process's `memory`."""
        trained = [row for row in rows if row["kind"] == "train"]
        self._evaluated = [row for row in rows if row["kind"] == "eval"]
        # A refused step always has a row, an applied one only each logging.every steps, so that
        # neighbours in the file need not be neighbours in the run.
        refused = {row["step"] for row in trained if _is_refused(row)}
        self.skipped = next(n for n in itertools.count() if step - n not in refused)
        self._trained = collections.deque(trained, maxlen=max(NEWEST_ROWS, self.skipped + 1))

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row and hand it to the operating system."""
        row = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }
        (self._trained if row["kind"] == "train" else self._evaluated).append(row)
        self.append(_line(row).encode(), row["step"])

    def memory(self) -> list[dict[str, Any]]:
        """The rows that decide how training goes on, for processes that do not read the file."""
        return self._evaluated + list(self._trained)[-1 - self.skipped :]

    def best_evaluation(self) -> tuple[int, float] | None:
        """(step, loss) of the lowest validation loss."""
        evaluated = [
            (row["step"], row["loss"])
            for row in self._evaluated
            if row["split"] == "validation" and row["loss"] is not None and "source" not in row
        ]
        return min(evaluated, key=lambda one: one[::-1], default=None)

    def has_evaluation(self, step: int) -> bool:
        return any(row["step"] == step and "source" not in row for row in self._evaluated)


def _is_refused(row: Mapping[str, Any]) -> bool:
    """Whether the update of a step was not applied."""
    return "finite" in row or "spike" in row


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
