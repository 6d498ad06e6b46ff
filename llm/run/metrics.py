"""metrics.jsonl: one JSON object a line, each step once, however often the run was stopped.

    {"kind":"train","step","tokens","loss","grad_norm","learning_rate","tokens_per_second",
     "step_seconds","mfu"}
    {"kind":"eval","step","split","loss","bits_per_byte","tokens"}

Losses are nats per token. A number that is not finite is null, and its row has "finite": false.
"""

import collections
import errno
import itertools
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from llm.errors import CheckpointError
from llm.faults import fault_point
from llm.files import write_atomic
from llm.run.directory import explained

# The newest rows of steps stay in memory, for llm/measure/training.py, which reads 200. Not all of
# them stay, because a row is half a kilobyte, and runs have millions of steps.
NEWEST_ROWS = 1000


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The row of every whole line, in order; a line that a crash cut off is left out.

    Raises:
      CheckpointError: naming a line that is JSON, and not a row.
    """
    rows = []
    try:
        content = path.read_text(errors="replace")
    except FileNotFoundError:
        return []
    for number, line in enumerate(content.split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        kinds = {"kind": str, "step": int, "loss": object}
        if not isinstance(row, dict) or not all(
            name in row and isinstance(row[name], kind) for name, kind in kinds.items()
        ):
            raise CheckpointError(
                f"{path}, line {number}: expected an object with kind, step and loss, found "
                f"{line[:80]}; remove the line, or restore the file"
            )
        rows.append(row)
    return rows


class MetricsFile:
    """Appends rows. A row that cannot be written is counted, with one warning: training goes on.

    Args:
      writes: False in all processes of a run but one, which only remember their rows.
    Attributes:
      skipped: how many updates in a row, up to the step that training resumes from, were refused.
      lost: how many rows could not be written.
    """

    def __init__(self, path: Path, writes: bool = True):
        self._path, self._writes = path, writes
        self._file: IO[bytes] | None = None
        self._evaluated: list[dict[str, Any]] = []
        self._trained: collections.deque[dict[str, Any]] = collections.deque(maxlen=NEWEST_ROWS)
        self.skipped = self.lost = 0

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Every evaluation, then the newest steps."""
        return [*self._evaluated, *self._trained]

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Keep the rows up to the step that training resumes from; returns the other rows."""
        rows = read_metrics(self._path)
        kept: dict[tuple[str, int], dict[str, Any]] = {}
        for row in rows:
            if row["step"] <= step:
                kept.setdefault((row["kind"], row["step"]), row)
        self.remember(kept.values(), step)
        text = "".join(_line(row) for row in kept.values())
        if self._path.exists() and text != self._path.read_text(errors="replace"):
            with explained(self._path):
                write_atomic(self._path, text.encode())
        return [row for row in rows if row["step"] > step]

    def remember(self, rows: Iterable[dict[str, Any]], step: int) -> None:
        """Go on at a step from these rows: those of `rewind`, or another process's `memory`."""
        rows = list(rows)
        trained = [row for row in rows if row["kind"] == "train"]
        self._evaluated = [row for row in rows if row["kind"] == "eval"]
        # A refused step always has a row, an applied one only each logging.every steps, so that
        # neighbours in the file need not be neighbours in the run.
        refused = {row["step"] for row in trained if {"finite", "spike"} & set(row)}
        self.skipped = next(n for n in itertools.count() if step - n not in refused)
        self._trained = collections.deque(trained, maxlen=max(NEWEST_ROWS, self.skipped + 1))

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row and hand it to the operating system."""
        row = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }
        (self._trained if row["kind"] == "train" else self._evaluated).append(row)
        if not self._writes:
            return
        try:
            action = fault_point("metrics.write", row["step"])
            self._append(_line(row).encode(), action)
        except OSError as error:
            if not self.lost:
                print(
                    f"warning: {self._path} cannot be written ({error.strerror}); training goes "
                    "on, and the lines that are lost are counted",
                    file=sys.stderr,
                )
            self.lost += 1

    def _append(self, line: bytes, action: str | None) -> None:
        """Append the whole line or, if the disk is full, nothing."""
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

    def memory(self) -> list[dict[str, Any]]:
        """The rows that decide how training goes on, for processes that do not read the file."""
        return self._evaluated + list(self._trained)[-1 - self.skipped :]

    def best_evaluation(self) -> tuple[int, float] | None:
        """(step, loss) of the lowest validation loss."""
        evaluated = [
            (row["loss"], row["step"])
            for row in self._evaluated
            if row["split"] == "validation" and row["loss"] is not None
        ]
        return min(evaluated)[::-1] if evaluated else None

    def has_evaluation(self, step: int) -> bool:
        return any(row["step"] == step for row in self._evaluated)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
