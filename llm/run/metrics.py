"""metrics.jsonl: one JSON object a line, each step once, however often the run was stopped.

    {"kind":"train","step","tokens","loss","grad_norm","learning_rate","tokens_per_second",
     "step_seconds","mfu"}
    {"kind":"eval","step","split","loss","bits_per_byte","tokens"}

Losses are nats per token. A number that is not finite is null, with "finite": false beside it.
"""

import errno
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from llm.faults import fault_point
from llm.files import write_atomic
from llm.run.directory import explained


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line, in order; a last line that a crash cut off is left out."""
    rows = []
    try:
        content = path.read_text(errors="replace")
    except FileNotFoundError:
        return []
    for line in content.split("\n")[:-1]:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


class Metrics:
    """Appends rows. What cannot be written is counted and warned of once: training goes on.

    Args:
      writes: False in all processes of a run but one: they only remember.
    """

    def __init__(self, path: Path, writes: bool = True):
        self._path, self._writes = path, writes
        self._file: IO[bytes] | None = None
        self.rows: list[dict[str, Any]] = []
        self.lost = 0

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Keep the rows up to a step, the one that training resumes from; returns the others."""
        rows = read_metrics(self._path)
        kept: dict[tuple[str, int], dict[str, Any]] = {}
        for row in rows:
            if row["step"] <= step:
                kept.setdefault((row["kind"], row["step"]), row)
        self.rows = list(kept.values())
        text = "".join(_line(row) for row in self.rows)
        if self._path.exists() and text != self._path.read_text(errors="replace"):
            with explained(self._path):
                write_atomic(self._path, text.encode())
        return [row for row in rows if row["step"] > step]

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row and hand it to the operating system."""
        row = {name: _finite(value) for name, value in row.items()}
        self.rows.append(row)
        if not self._writes:
            return
        try:
            action = fault_point("metrics.write", row["step"])
            self._append(_line(row).encode(), action)
        except OSError as error:
            self._warn(error)

    def _append(self, line: bytes, action: str | None) -> None:
        """The whole line or, on a full disk, none of it."""
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

    def skipped(self) -> int:
        """How many of the newest updates, in a row, were not applied."""
        rows = [row for row in self.rows if row["kind"] == "train"]
        count = 0
        while count < len(rows) and {"finite", "spike"} & set(rows[-1 - count]):
            count += 1
        return count

    def memory(self) -> list[dict[str, Any]]:
        """The rows that decide how training goes on: what a process that reads no file is told."""
        trained = [row for row in self.rows if row["kind"] == "train"]
        evaluated = [row for row in self.rows if row["kind"] == "eval"]
        return evaluated + trained[-1 - self.skipped() :]

    def best_evaluation(self) -> tuple[int, float] | None:
        """(step, loss) of the lowest validation loss."""
        evaluated = [
            (row["loss"], row["step"])
            for row in self.rows
            if row["kind"] == "eval" and row["split"] == "validation" and row["loss"] is not None
        ]
        return min(evaluated)[::-1] if evaluated else None

    def has_evaluation(self, step: int) -> bool:
        return any(row["kind"] == "eval" and row["step"] == step for row in self.rows)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _warn(self, error: OSError) -> None:
        self.lost += 1
        if self.lost == 1:
            print(
                f"warning: {self._path} cannot be written ({error.strerror}); training goes on, "
                "and the lines that are lost are counted",
                file=sys.stderr,
            )


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
