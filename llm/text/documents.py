"""Reading origins: from the bytes of a file to documents. To add a kind of file, add it to `KINDS`.

A document is a name and its text in pieces. A document may be larger than memory, so its text comes
in pieces, which end only at places that no token can span. Newlines stay as they are in the file.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llm.errors import DataError

PIECE_BYTES = 2**18

# Every pattern of tiktoken, and ours in bpe.py, ends a pre-token between a letter or digit and
# white space or full-width CJK punctuation (comma, full stop, enumeration comma, ; : ! ?), so
# cutting a text there changes no token. All patterns begin a pre-token with at most one non-letter.
# The pattern is greedy, so it is matched from the end of a text: it finds the last such place.
_SAFE_CUT = re.compile("(?s).*[^\\W_](?=[\\s\uff0c\u3002\u3001\uff1b\uff1a\uff01\uff1f])")

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_EXPECTED_JSON = "expected one JSON object a line, or a list of them"
# Control characters inside of texts are let through.
_JSON = json.JSONDecoder(strict=False)

Row = dict[str, Any]


@dataclass(frozen=True)
class Origin:
    """One file, or one hub data set, and the identity of its content.

    Attributes:
      name: for people; does not depend on where the corpus lies on this machine.
      kind: a key of `KINDS`, which says how the content becomes documents.
      location: path of the file, or NAME[:CONFIG[:SPLIT]] on the hub.
      bytes: size of the file; 0 for the hub, which does not tell the size.
      sha256: hash of the file's bytes; for the hub, the revision.
    """

    name: str
    kind: str
    location: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Document:
    """A text and where it is from.

    Attributes:
      name: the file, or FILE#ROW.
      sha256: of its text; for a file of its bytes. Equal texts have equal hashes.
      pieces: the text, to be read once.
    """

    name: str
    sha256: str
    pieces: Iterable[str]


class Reader:
    """Reads origins as documents.

    Args:
      errors: what to do with bytes that are not UTF-8: raise, or replace and count them.
      text_field: name of the field that holds the text of a row.
    Attributes:
      replaced: how many replacement characters were inserted so far.
    """

    def __init__(self, errors: Literal["strict", "replace"], text_field: str):
        self.errors, self.text_field = errors, text_field
        self.replaced = 0

    def documents(self, origins: Iterable[Origin]) -> Iterator[Document]:
        """Every document that is not empty, in order.

        Raises:
          DataError: bytes that are not UTF-8, with their offset; a row without text; a file that
            changed since it was hashed.
        """
        for origin in origins:
            kind = KINDS[origin.kind]
            found = kind.read(self, origin)
            yield from self._row_documents(origin, found) if kind.has_rows else found

    def text(self, origin: Origin) -> Iterator[Document]:
        """The whole file is one document."""
        if origin.bytes:
            yield Document(origin.name, origin.sha256, pieces(self._blocks(origin)))

    def json_rows(self, origin: Origin) -> Iterator[Row]:
        """Rows of JSON lines, or of one list of rows, which has to fit into memory.

        `datasets` does not read them, because it infers types: a text that looks like a date would
        become a date, and its spelling would be lost.
        """
        lines = enumerate(_lines(self._blocks(origin)), 1)
        for number, line in lines:
            text = line.removeprefix("\ufeff") if number == 1 else line
            if not text.strip():
                continue
            if text.lstrip().startswith("["):
                text = "\n".join([text, *(rest for _, rest in lines)])
            try:
                value = _JSON.decode(text)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{origin.name}, line {number}, is not JSON: {error}; {_EXPECTED_JSON}"
                ) from None
            for row in value if isinstance(value, list) else [value]:
                # A bare text is a row of one column, as in `datasets`.
                row = {"text": row} if isinstance(row, str) else row
                if not isinstance(row, dict):
                    found = type(row).__name__
                    raise DataError(f"{origin.name} has a row that is {found}; {_EXPECTED_JSON}")
                yield row

    def parquet_rows(self, origin: Origin) -> Iterator[Row]:
        """The rows of a parquet file."""
        if origin.bytes:
            yield from _streamed(origin, "parquet", "train", data_files=[origin.location])

    def hub_rows(self, origin: Origin) -> Iterator[Row]:
        """The rows of a data set of the Hugging Face hub, at the origin's revision."""
        name, config, split = [*origin.location.split(":"), "", ""][:3]
        yield from _streamed(
            origin, name, split or "train", name=config or None, revision=origin.sha256
        )

    def _row_documents(self, origin: Origin, rows: Iterable[Row]) -> Iterator[Document]:
        """Each row with text as a document, named FILE#ROW."""
        for number, row in enumerate(rows):
            if self.text_field not in row:
                raise DataError(
                    f"{origin.name}, row {number} has no field {self.text_field!r}; its fields are "
                    f"{', '.join(row)}: set data.text_field to one of them"
                )
            text, name = row[self.text_field], f"{origin.name}#{number}"
            if not isinstance(text, str):
                raise DataError(
                    f"{origin.name}, row {number}: the field {self.text_field!r} is "
                    f"{type(text).__name__}; expected text"
                )
            try:
                sha256 = hashlib.sha256(text.encode()).hexdigest()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{name} has half of a surrogate pair, {text[error.start]!a}, at character "
                    f"{error.start}; expected text that can be UTF-8: mend or remove the row"
                ) from None
            if text:
                yield Document(name, sha256, pieces(_slices(text)))

    def _blocks(self, origin: Origin) -> Iterator[str]:
        """The decoded file, block by block. At its end, its hash is compared with the origin's."""
        decoder = codecs.getincrementaldecoder("utf-8")(self.errors)
        digest, offset, tail, more = hashlib.sha256(), 0, b"", True
        with open(origin.location, "rb") as file:
            while more:
                block = file.read(PIECE_BYTES)
                more = bool(block)
                digest.update(block)
                waiting = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(block, final=not more)
                except UnicodeDecodeError as error:
                    place, found = offset - waiting + error.start, error.object[error.start]
                    utf16 = place == 0 and error.object.startswith(_UTF16)
                    raise DataError(
                        f"{origin.location} is not UTF-8: byte 0x{found:02x} at offset {place}"
                        f"{' (it begins like UTF-16)' if utf16 else ''}; convert the file, or set "
                        "data.errors = 'replace'"
                    ) from None
                if self.errors == "replace":
                    # Do not count replacement characters that are in the file itself.
                    genuine = (tail + block).count("\ufffd".encode())
                    self.replaced += text.count("\ufffd") - genuine
                    tail = (tail + block)[-2:]
                offset += len(block)
                yield text
        if digest.hexdigest() != origin.sha256:
            raise DataError(
                f"{origin.location} changed while it was read: expected sha256 {origin.sha256}, "
                f"found {digest.hexdigest()}; run the same command again when nothing writes to it"
            )


class Kind(NamedTuple):
    """How origins of one kind become documents.

    Attributes:
      read: an origin's documents; its rows, if it has rows.
      suffixes: of the names of such files, in lower case.
      has_rows: each row that has a text is a document.
      is_text: the size of the file is the size of its text.
    """

    read: Callable[[Reader, Origin], Iterator[Any]]
    suffixes: tuple[str, ...] = ()
    has_rows: bool = False
    is_text: bool = True


KINDS = {
    "text": Kind(Reader.text),
    # The standard library's source code, which is UTF-8 throughout (PEP 8).
    "python": Kind(Reader.text),
    "json": Kind(Reader.json_rows, (".json", ".jsonl", ".ndjson"), has_rows=True),
    "parquet": Kind(Reader.parquet_rows, (".parquet",), has_rows=True, is_text=False),
    "hub": Kind(Reader.hub_rows, has_rows=True, is_text=False),
}


def kind_of_file(path: Path) -> str:
    """The kind of a file by the suffix of its name."""
    suffix = path.suffix.lower()
    return next((name for name, kind in KINDS.items() if suffix in kind.suffixes), "text")


def pieces(blocks: Iterable[str]) -> Iterator[str]:
    """The same text in pieces that end at places that no token spans.

    A block without such a place is cut at its end. Tokens of the word, number or run of signs that
    is cut there may differ from those of the whole text.
    """
    held = ""
    for block in filter(None, blocks):
        cut = _last_safe_cut(held) or len(held)
        if cut:
            yield held[:cut]
        held = held[cut:] + block
    if held:
        yield held


def _last_safe_cut(text: str) -> int:
    match = _SAFE_CUT.match(text)
    return match.end() if match else 0


def _slices(text: str) -> Iterator[str]:
    for start in range(0, len(text), PIECE_BYTES):
        yield text[start : start + PIECE_BYTES]


def _lines(blocks: Iterable[str]) -> Iterator[str]:
    """Lines that end with a newline; other line separators may occur inside a JSON text."""
    parts: list[str] = []
    for block in blocks:
        end, *rest = block.split("\n")
        parts.append(end)
        if rest:
            yield "".join(parts)
            yield from rest[:-1]
            parts = [rest[-1]]
    yield "".join(parts)


def _streamed(origin: Origin, path: str, split: str, **options: Any) -> Iterator[Row]:
    """The rows that `datasets.load_dataset` streams."""
    import datasets

    # `datasets` logs every error that it raises; the error is answered below.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield from datasets.load_dataset(path, split=split, streaming=True, **options)
    except Exception as error:
        # Its readers raise errors of pyarrow, pandas, fsspec and of HTTP libraries.
        reason = str(error).split("\n")[0][:300] or type(error).__name__
        raise DataError(f"{origin.name} cannot be read by `datasets`: {reason}") from error
