"""What several commands share: they open a model, read texts, and send records where flags say."""

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
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


class RunOptions(CommandLine):
    """The run that a command reads, and its checkpoint."""

    run: str = argument("RUN", "run directory")
    step: NonNegativeInt | None = setting(None, "checkpoint to use; by default the newest")


class RecordOptions(RunOptions):
    """What the records list, and where they go."""

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

    @property
    def paints(self) -> bool:
        """Whether tokens are painted. Colour is for a terminal: elsewhere --color does nothing."""
        return self.color and self.probs != "-" and sys.stdout.isatty()

    @property
    def shows_numbers(self) -> bool:
        """Whether anything shows the probabilities, so that they must be computed."""
        return bool(self.probs or self.html or self.paints)


def open_and_say(run: str, step: int | None) -> "OpenedModel":
    """`open_model`, which prints each warning (a step is passed over) as one line on stderr."""
    from llm.run.open import open_model

    def say(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"WARNING: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = say
        return open_model(run, step)


def read_file(path: str) -> tuple[str, bytes]:
    """(name, content) of a file of text."""
    try:
        return path, Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the file {path}: {error.strerror}") from None


def as_text(data: bytes, tokenizer: "Tokenizer", name: str) -> str:
    """Bytes as text. Only the `bytes` tokenizer takes bytes that are not UTF-8, as they are."""
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
    """Say now, not after the model has run, that a file (flag -> path) cannot be written.

    Raises:
      UsageError: the file has no folder, is a folder, or is named by two flags.
    """
    flags: dict[Path, str] = {}
    for flag, path in paths.items():
        if path is None or path == "-":
            continue
        if not Path(path).parent.is_dir():
            raise UsageError(f"cannot write {path}: there is no folder {Path(path).parent}")
        if Path(path).is_dir():
            raise UsageError(f"cannot write {path}: it is a folder; expected the name of a file")
        other = flags.setdefault(Path(path).resolve(), flag)
        if other != flag:
            raise UsageError(f"{other} and {flag} both name {path}; give each a file of its own")


@contextmanager
def writing(path: str) -> Iterator[None]:
    """Turn an error of writing, such as a full disk, into a UsageError that names the file."""
    try:
        yield
    except BrokenPipeError:
        raise  # the reader of standard output has seen enough
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None


@contextmanager
def output(path: str) -> "Iterator[Callable[[str], None]]":
    """A function that writes text to a new file; "-" is standard output.

    Raises:
      UsageError: the file cannot be written; the function raises it too.
    """
    file: TextIO = sys.stdout
    if path != "-":
        with writing(path):
            file = open(path, "w", encoding="ascii", newline="\n")  # noqa: SIM115  (closed below)

    def write(text: str) -> None:
        with writing(path):
            file.write(text)

    try:
        yield write
    finally:
        if path != "-":
            with writing(path):
                file.close()


def emit(
    records: "Iterable[Record]",
    options: RecordOptions,
    title: str,
    *,
    show: "Callable[[Iterable[Record]], Iterable[str]] | None" = None,
    in_one: "Callable[[list[Record]], str] | None" = None,
) -> None:
    """Send records, each as soon as it comes, to the file, the terminal and the page.

    Args:
      title: heading of the page.
      show: makes the text for the terminal, unless it is painted or has the records themselves.
      in_one: makes the content of the file from all records, in place of a line for each.
    """
    from llm.inference.records import to_line
    from llm.pages.paint import paint_stream

    kept: list[Record] = []
    with ExitStack() as stack:
        write = None if options.probs is None else stack.enter_context(output(options.probs))

        def passing() -> "Iterator[Record]":
            for record in records:
                if write is not None and in_one is None:
                    write(to_line(record))
                if options.html is not None or in_one is not None:
                    kept.append(record)
                yield record

        shown = paint_stream if options.paints else show
        if shown is None or options.probs == "-":
            for _ in passing():
                pass
        else:
            if hasattr(sys.stdout, "reconfigure"):
                sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that has only ASCII
            for text in shown(passing()):
                sys.stdout.write(text)
                sys.stdout.flush()
        if write is not None and in_one is not None:
            write(in_one(kept))
    if options.html is not None:
        from llm.pages.view import write_page

        write_page(kept, Path(options.html), title=title)
