"""A run directory: where its files lie, and how the settings and run.json are read and written.

    config.toml           all settings, resolved; written last, so that it marks a whole beginning
    run.json              provenance: what was trained on, and every start
    tokenizer/            everything to encode and decode offline
    metrics.jsonl         llm/run/metrics.py
    probes.jsonl          llm/run/probes.py
    report.html           llm/pages/report.py
    checkpoints/STEP/     llm/run/checkpoint.py
    run.lock              held while a process trains

Nothing depends on where the directory lies: it may be moved or copied, and its path may be relative
or a link.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, FiniteFloat, PositiveInt, Strict, ValidationError

from llm.config import Config, read_toml, to_toml, validate
from llm.errors import CheckpointError, UsageError
from llm.files import check_regular, free_bytes, is_disk_full, read_json, why, write_atomic


def saved_steps(root: Path) -> list[int]:
    """Complete steps, ascending. They are not verified: see llm/run/checkpoint.py:verify_files."""
    return sorted(map(int, folders(root, "0|[1-9][0-9]{0,17}")))


def holds_steps(root: Path) -> bool:
    """Whether anything is there that was trained, damaged or not."""
    return bool(folders(root, r"[0-9]+(\.deleting|\.damaged.*)?"))


def folders(root: Path, pattern: str) -> list[str]:
    """The names of the folders that are ours; nothing else is looked at."""
    return [p.name for p in root.glob("*") if re.fullmatch(pattern, p.name) and p.is_dir()]


class RunDirectory:
    """The files of a run."""

    def __init__(self, path: Path):
        self.path = path
        # A name whose bytes are not UTF-8 could not be written into records.
        name = os.fsencode(os.path.basename(os.path.realpath(path)))
        self.name = name.decode("utf-8", "backslashreplace")
        self.config = path / "config.toml"
        self.provenance = path / "run.json"
        self.tokenizer = path / "tokenizer"
        self.metrics = path / "metrics.jsonl"
        self.probes = path / "probes.jsonl"
        self.report = path / "report.html"
        self.checkpoints = path / "checkpoints"
        self.lock = path / "run.lock"

    def exists(self) -> bool:
        """Whether a run began here: config.toml is the last file that the beginning writes.

        Raises:
          UsageError: nobody can tell, because the folder cannot be entered or named.
        """
        try:
            os.lstat(self.config)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise UsageError(
                f"{self.path} cannot be used as a run directory: {error.strerror}"
            ) from None
        return True

    def read_config(self) -> Config:
        """The settings of the run as they were resolved.

        A size that the version which wrote them did not have yet is resolved now.
        """
        if not self.exists():
            parent = self.path.parent if self.path.parent.is_dir() else Path()
            runs = sorted(str(folder.parent) for folder in parent.glob("*/config.toml"))[:5]
            near = f"; there is {', '.join(runs)}" if runs else ""
            raise UsageError(f"{self.path} is not a run directory: it has no config.toml{near}")
        try:
            check_regular(self.config)
        except OSError as error:
            raise UsageError(f"{self.config} cannot be read: {error.strerror}") from None
        return validate(read_toml(self.config), where=str(self.config)).resolved()

    def write_config(self, config: Config) -> None:
        """Raises: see `explained`."""
        with explained(self.config):
            write_atomic(self.config, to_toml(config).encode())

    def read_provenance(self) -> dict[str, Any]:
        """run.json as it was written."""
        try:
            record = read_json(self.provenance)
            _Provenance.model_validate(record)
            return record
        except ValidationError as error:
            wrong = error.errors()[0]
            place = ".".join(map(str, wrong["loc"])) or "the whole"
            problem = (
                "is not what a run writes: expected an object with "
                f"{', '.join(_Provenance.model_fields)}; {place}: {wrong['msg']}"
            )
        except (OSError, ValueError) as error:
            problem = f"cannot be read ({why(error)})"
        raise CheckpointError(
            f"{self.provenance} {problem}; restore it from a copy, or begin a new run with another "
            "run.dir"
        )

    def write_provenance(self, record: Mapping[str, Any]) -> None:
        """Raises: see `explained`."""
        with explained(self.provenance):
            write_atomic(self.provenance, json.dumps(record, indent=1).encode() + b"\n")


class _Model(BaseModel, strict=True):
    compute_dtype: str
    parameters: int = 0
    flops_per_token: FiniteFloat = 0
    vocab_size: int = 0


class _Origin(BaseModel):
    name: str
    bytes: int | None
    sha256: str


class _Data(BaseModel, strict=True):
    fingerprint: str
    train_tokens: int = 0
    validation_tokens: int = 0
    origins: list[_Origin]


_Count = Annotated[PositiveInt, Strict()]


class _Changed(BaseModel):
    """A batch size decides which windows a step had; the other changes are for people."""

    batch_size: tuple[_Count, _Count] = Field((1, 1), alias="training.batch_size")


class _Start(BaseModel, strict=True):
    from_step: int
    time: str = ""
    command: list[str] = []
    redone_seconds: FiniteFloat = 0
    seconds: dict[str, FiniteFloat] = {}
    ended: str = ""
    code_sha256: str
    versions: dict[str, Any]
    devices: dict[str, Any]
    mesh: dict[str, Any]
    changed: _Changed


class _Imported(BaseModel):
    source: str = Field(alias="from")


class _Ancestor(BaseModel):
    source: str = Field(alias="from")
    name: str
    created: str
    step: int
    params_sha256: str
    step_0_sha256: str
    ancestor: "_Ancestor | None" = None


class _Provenance(BaseModel, strict=True):
    """The fields of run.json that are read; provenance.py writes more."""

    model: _Model
    data: _Data
    starts: list[_Start]
    imported: _Imported | None = None
    ancestor: _Ancestor | None = None


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
