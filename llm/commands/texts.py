"""What `sample` and `score` share: texts come in, records and pages go out."""

import argparse
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from llm.errors import UsageError
from llm.inference.samples import DEFAULT_TOP

if TYPE_CHECKING:
    from llm.inference.records import Record
    from llm.text.tokenizer import Tokenizer


def add_record_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say what is recorded and where it goes."""
    add = parser.add_argument
    add("--step", type=int, metavar="N", help="checkpoint to use; by default the newest")
    add("--probs", metavar="FILE", help="write the record of every token, JSON lines; - for stdout")
    add("--html", metavar="FILE", help="write the records as a page")
    add("--color", action="store_true", help="paint tokens by probability, on a terminal")
    add(
        "--top",
        type=int,
        metavar="N",
        default=DEFAULT_TOP,
        help=f"alternatives in each record ({DEFAULT_TOP})",
    )
    add(
        "--watch",
        type=int,
        metavar="ID",
        nargs="+",
        action="extend",
        default=[],
        help="token ids that each record lists whatever their rank",
    )


def check_record_flags(options: argparse.Namespace) -> None:
    """Raise a UsageError for flags that cannot be used, before a model is loaded."""
    if options.top < 0:
        raise UsageError(f"--top {options.top}: expected 0 or more alternatives")
    for path in (options.probs, options.html):
        check_writable(path)


def paints(options: argparse.Namespace) -> bool:
    """Colour is for a terminal: elsewhere --color changes nothing."""
    return bool(options.color and options.probs != "-" and sys.stdout.isatty())


def paint(records: "Iterable[Record]") -> None:
    """The records in colour on the terminal, as they come."""
    from llm.inference.paint import paint_stream

    for part in paint_stream(records):
        sys.stdout.write(part)
        sys.stdout.flush()


def written(
    records: "Iterable[Record]", file: TextIO | None, kept: "list[Record] | None"
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


def check_writable(path: str | None) -> None:
    """Say now, not after the model is loaded, that a file cannot be written."""
    if path is None or path == "-":
        return
    folder = Path(path).parent
    if not folder.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {folder}")
    if Path(path).is_dir():
        raise UsageError(f"cannot write {path}: it is a folder; expected the name of a file")


def open_records(path: str | None, stack: ExitStack) -> TextIO | None:
    """The file that records go to; closed with the stack."""
    if path is None:
        return None
    if path == "-":
        return sys.stdout
    try:
        return stack.enter_context(open(path, "w", encoding="ascii", newline="\n"))
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None


def with_dashes(word: str) -> str:
    """--top_k=5 as --top-k=5; what is not a flag as it is."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value
