"""A run directory: where things lie, who holds it, and what happened in it.

    config.toml           all settings, resolved; written last, so that it marks a whole beginning
    run.json              provenance: what was trained on, and every start
    tokenizer/            everything to encode and decode offline
    metrics.jsonl         llm/run/metrics.py
    checkpoints/STEP/     llm/run/checkpoint.py
    run.lock              held while a process trains

Nothing depends on where the directory lies: it may be moved or copied, and its path may be relative
or a link.
"""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ValidationError

from llm.config import Config, differences, read_toml, to_toml, validate
from llm.errors import CheckpointError, RunLockedError, UsageError
from llm.files import free_bytes, is_disk_full, now, write_atomic


class RunDirectory:
    """The files of a run."""

    def __init__(self, path: Path):
        self.path, self.name = path, path.resolve().name
        self.config = path / "config.toml"
        self.provenance = path / "run.json"
        self.tokenizer = path / "tokenizer"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.lock = path / "run.lock"

    def exists(self) -> bool:
        """Whether a run began here: config.toml is the last file that the beginning writes."""
        return self.config.is_file()

    def read_config(self) -> Config:
        """The settings of the run as they were resolved."""
        if not self.exists():
            parent = self.path.parent if self.path.parent.is_dir() else Path()
            runs = sorted(str(folder.parent) for folder in parent.glob("*/config.toml"))[:5]
            near = f"; there is {', '.join(runs)}" if runs else ""
            raise UsageError(f"{self.path} is not a run directory: it has no config.toml{near}")
        return validate(read_toml(self.config), where=str(self.config))

    def write_config(self, config: Config) -> None:
        """Raises: see `explained`."""
        with explained(self.config):
            write_atomic(self.config, to_toml(config).encode())

    def read_provenance(self) -> dict[str, Any]:
        """run.json as it was written."""
        try:
            record = json.loads(self.provenance.read_bytes())
            _Provenance.model_validate(record)
            return record
        except ValidationError:
            problem = (
                "is not what a run writes: expected an object with data "
                f"({', '.join(_Data.model_fields)}) and starts (each with "
                f"{', '.join(_Start.model_fields)})"
            )
        except (OSError, ValueError) as error:
            problem = f"cannot be read ({error})"
        raise CheckpointError(
            f"{self.provenance} {problem}; restore it from a copy, or begin a new run with another "
            "run.dir"
        )

    def write_provenance(self, record: Mapping[str, Any]) -> None:
        """Raises: see `explained`."""
        with explained(self.provenance):
            write_atomic(self.provenance, json.dumps(record, indent=1).encode() + b"\n")


class _Data(BaseModel):
    fingerprint: str
    origins: list[Any]


class _Start(BaseModel):
    from_step: int
    code_sha256: str
    versions: dict[str, Any]
    devices: dict[str, Any]
    mesh: dict[str, Any]
    changed: dict[str, Any]


class _Provenance(BaseModel):
    """The fields of run.json that are read; provenance.py writes more."""

    data: _Data
    starts: list[_Start]


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the system's errors while a file of a run is written into errors for people.

    Raises:
      CheckpointError: there is no room.
      UsageError: the file cannot be written for another reason.
    """
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise CheckpointError(
                f"no room for {path} ({error.strerror}); {free_bytes(path.parent)} bytes are free. "
                "What was saved is whole: free some space and run the same command again"
            ) from None
        raise UsageError(
            f"{path} cannot be written: {error.strerror}; set run.dir to a folder that can be"
        ) from None


def locked(run: RunDirectory) -> IO[str]:
    """Keep every other process out of a run directory until the file that is returned is closed.

    The kernel releases the lock when its holder dies, so the lock of a dead process is simply taken
    over. The file's content only tells a person who holds it.

    Raises:
      RunLockedError: another process trains here; the message names it.
      UsageError, CheckpointError: see `explained`.
    """
    with explained(run.path):
        run.path.mkdir(parents=True, exist_ok=True)
        file = open(run.lock, "a+")  # noqa: SIM115 (held until the caller closes it)
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise RunLockedError(
            f"{run.path} is in use by {holder}; wait for it, stop it, or set another run.dir"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now()}\n")
    file.flush()
    return file


def check_is_ours(run: RunDirectory) -> None:
    """Refuse a folder that holds other things than a run, before anything is written into it.

    Raises:
      UsageError: naming what was found.
    """
    for path in (run.path, run.checkpoints):
        if path.exists() and not path.is_dir():
            raise UsageError(
                f"{path} is a file; expected a folder: move it away, or set another run.dir"
            )
    if run.exists() or not run.path.is_dir():
        return
    ours = {"run.lock", "run.json", "tokenizer", "metrics.jsonl"}
    foreign = [
        name for name in sorted(os.listdir(run.path)) if name not in ours and ".tmp" not in name
    ]
    if foreign:
        raise UsageError(
            f"{run.path} is not empty and is not a run (no config.toml): found "
            f"{', '.join(foreign[:5])}; set run.dir to a new folder"
        )


# Settings that may differ when a run is resumed. Everything else decides which model results.
FREE_SECTIONS = ("logging", "checkpoint", "sample", "mesh", "distributed")
FREE_SETTINGS = (
    "run.dir",
    "run.allow_change",
    "run.deterministic",
    "data.source",  # the content must be the same: its fingerprint is compared
    "data.cache_dir",
    "data.workers",
    "training.steps",
    "training.eval_every",
    "training.eval_batch_size",
    "training.attention",
    "training.scan_layers",
    "training.remat",
    "training.on_nonfinite",
    "training.spike_zscore",
    "training.max_skipped",
)
# Settings that change the result, perhaps on purpose: taken with run.allow_change, and recorded.
ALLOWED_SECTIONS = ("optimizer", "training")
NEVER = ("optimizer.kind", "training.compute_dtype")


def changes_on_resume(before: Config, now_: Config) -> dict[str, tuple[Any, Any]]:
    """Settings that differ from the run's and are taken: name -> (before, now).

    Raises:
      UsageError: a setting differs that may not; the message lists each of them.
    """
    changed = differences(before, now_)
    refused = {
        name
        for name in changed
        if name.split(".")[0] not in FREE_SECTIONS and name not in FREE_SETTINGS
    }
    if "auto" in changed.get("training.compute_dtype", ()):
        # What "auto" stands for is compared once the devices are known: provenance.py.
        refused.discard("training.compute_dtype")
    may_be_allowed = {
        name for name in refused if name.split(".")[0] in ALLOWED_SECTIONS and name not in NEVER
    }
    if now_.run.allow_change:
        refused -= may_be_allowed
    if refused:
        remedy = "set run.dir to another folder for another experiment, or restore these settings"
        if refused <= may_be_allowed:
            remedy += ", or add --run.allow-change to take them from here on (it is recorded)"
        lines = [
            f"  {name}: the run has {changed[name][0]!r}, this command has {changed[name][1]!r}"
            for name in sorted(refused)
        ]
        holder = f"{before.run.dir or 'the run directory'} holds a run with other settings:"
        raise UsageError("\n".join([holder, *lines, f"  {remedy}"]))
    return {
        name: values
        for name, values in changed.items()
        if name not in ("run.dir", "run.allow_change")
    }
