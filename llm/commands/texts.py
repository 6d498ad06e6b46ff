"""What commands that read a model share: it is opened, texts come in, records and pages go out."""

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

import pydantic
from pydantic import NonNegativeInt

from llm.commands.flags import CommandLine, argument
from llm.config import setting
from llm.errors import UsageError
from llm.inference.samples import DEFAULT_TOP

if TYPE_CHECKING:
    from llm.inference.records import Record
    from llm.run.open import OpenedModel
    from llm.text.tokenizer import Tokenizer


def open_and_say(run: str, step: int | None) -> "OpenedModel":
    """`open_model`; each warning, such as of a step that is passed over, in one line on stderr."""
    from llm.run.open import open_model

    def say(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"WARNING: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = say
        return open_model(run, step)


class RunOptions(CommandLine):
    """The run that a command reads, and its checkpoint."""

    run: str = argument("RUN", "run directory")
    step: NonNegativeInt | None = setting(None, "checkpoint to use; by default the newest")


class RecordOptions(RunOptions):
    """What is recorded, and where it goes."""

    probs: str | None = setting(
        None, "write the record of every token as JSON lines; - for standard output", "FILE"
    )
    html: str | None = setting(None, "write the records as a page", "FILE")
    color: bool = setting(False, "paint tokens by probability, on a terminal")
    top: NonNegativeInt = setting(DEFAULT_TOP, "alternatives in each record")
    watch: tuple[int, ...] = setting((), "token ids that each record lists at any rank", "ID")

    @pydantic.model_validator(mode="after")
    def _check_records(self) -> Self:
        check_outputs({"--probs": self.probs, "--html": self.html})
        return self


def paints(options: RecordOptions) -> bool:
    """Colour is for a terminal: elsewhere --color changes nothing."""
    return bool(options.color and options.probs != "-" and sys.stdout.isatty())


def paint(records: "Iterable[Record]") -> None:
    """The records in colour on the terminal, as they come."""
    from llm.pages.paint import paint_stream

    for part in paint_stream(records):
        sys.stdout.write(part)
        sys.stdout.flush()


def written(
    records: "Iterable[Record]", file: "RecordsFile | None", kept: "list[Record] | None"
) -> "Iterator[Record]":
    """The same records, each also written to a file and kept in a list where these are given."""
    from llm.inference.records import to_line

    for record in records:
        if file is not None:
            file.write(to_line(record))
        if kept is not None:
            kept.append(record)
        yield record


def read_file(path: str) -> tuple[str, bytes]:
    """(name, content) of a prompt file."""
    try:
        return path, Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the file {path}: {error.strerror}") from None


def as_text(data: bytes, tokenizer: "Tokenizer", name: str) -> str:
    """Bytes as text. Those that are not UTF-8 only the `bytes` tokenizer can take, as they are."""
    if tokenizer.name == "bytes":
        return data.decode("utf-8", "surrogateescape")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{name} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; only a "
            f"model of the 'bytes' tokenizer can read it, this one has {tokenizer.name!r}"
        ) from None


def check_outputs(paths: Mapping[str, str | None]) -> None:
    """Raise a UsageError for files (flag -> path) that cannot be written, or not beside another."""
    flags: dict[Path, str] = {}
    for flag, path in paths.items():
        check_writable(path)
        if path is None or path == "-":
            continue
        other = flags.setdefault(Path(path).resolve(), flag)
        if other != flag:
            raise UsageError(f"{other} and {flag} both name {path}; give each a file of its own")


def check_writable(path: str | None) -> None:
    """Say now, not after the model is loaded, that a file cannot be written."""
    if path is None or path == "-":
        return
    folder = Path(path).parent
    if not folder.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {folder}")
    if Path(path).is_dir():
        raise UsageError(f"cannot write {path}: it is a folder; expected the name of a file")


class RecordsFile:
    """The text file that records go to, "-" being standard output; it is closed with the stack.

    Raises:
      UsageError: from each method, where the file cannot be written (a full disk).
    """

    def __init__(self, path: str, stack: ExitStack):
        self._path = path
        self._file: TextIO = sys.stdout
        if path != "-":
            with self._named():
                self._file = open(path, "w", encoding="ascii", newline="\n")  # noqa: SIM115
            stack.callback(self._close)

    def write(self, text: str) -> None:
        with self._named():
            self._file.write(text)

    def _close(self) -> None:
        with self._named():
            self._file.close()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise  # the reader of standard output has seen enough
        except OSError as error:
            raise UsageError(f"cannot write {self._path}: {error.strerror}") from None


def open_records(path: str | None, stack: ExitStack) -> RecordsFile | None:
    """The file that records go to, if they are asked for."""
    return None if path is None else RecordsFile(path, stack)
