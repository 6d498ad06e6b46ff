"""Reading origins: bytes to documents. A document is a name and its text in pieces.

A document may be larger than memory, so its text comes in pieces, which end only at places that no
token can span. Newlines stay as they are in the file.
"""

import codecs
import hashlib
import io
import json
import re
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llm.errors import DataError
from llm.text.sources import Origin

PIECE_BYTES = 2**18

# Every pattern of tiktoken, and ours in bpe.py, ends a pre-token between a letter or digit and
# white space or full-width CJK punctuation (comma, full stop, enumeration comma, ; : ! ?), so
# cutting a text there changes no token. All patterns begin a pre-token with at most one non-letter.
_SAFE_CUT = re.compile("[^\\W_](?=[\\s\uff0c\u3002\u3001\uff1b\uff1a\uff01\uff1f])")
# The last place is searched for in the end of a text, then in a longer end.
_CUT_SEARCH_CHARACTERS = (256, 4096)

_UTF8_REPLACEMENT = "\ufffd".encode()


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


@dataclass
class ReadingReport:
    """What reading replaced (characters) and skipped (names of files)."""

    replaced: int = 0
    skipped: list[str] = field(default_factory=list)


def read_documents(
    origins: Sequence[Origin],
    *,
    errors: Literal["strict", "replace"],
    text_field: str,
    report: ReadingReport,
) -> Iterator[Document]:
    """Every document that is not empty, in order.

    Args:
      errors: what to do with bytes that are not UTF-8: raise, or replace and count them.
      text_field: name of the field that holds the text of a row.
      report: counts up while the documents are read.
    Raises:
      DataError: bytes that are not UTF-8, with their offset; a row without text; a file that
        changed since it was hashed.
    """
    for origin in origins:
        match origin.kind:
            case "text":
                if origin.bytes:
                    blocks = _blocks(origin, errors, report)
                    yield Document(origin.name, origin.sha256, pieces(blocks))
            case "python":
                yield from _python_source(origin, report)
            case "json":
                yield from _row_documents(origin, text_field, _json_rows(origin, errors, report))
            case "parquet" | "hub":
                yield from _row_documents(origin, text_field, _dataset_rows(origin))


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
    for characters in (*_CUT_SEARCH_CHARACTERS, len(text)):
        start = max(0, len(text) - characters)
        ends = [match.end() for match in _SAFE_CUT.finditer(text, start)]
        if ends:
            return ends[-1]
    return 0


def _slices(text: str) -> Iterator[str]:
    for start in range(0, len(text), PIECE_BYTES):
        yield text[start : start + PIECE_BYTES]


def _blocks(origin: Origin, errors: str, report: ReadingReport) -> Iterator[str]:
    """The decoded file, block by block. At its end, its hash is compared with the origin's."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    digest, offset, tail = hashlib.sha256(), 0, b""
    with open(origin.location, "rb") as file:
        while block := file.read(PIECE_BYTES):
            digest.update(block)
            text = _decode(decoder, block, offset, origin)
            offset += len(block)
            if errors == "replace":
                # Do not count replacement characters that are in the file itself.
                report.replaced += text.count("\ufffd") - (tail + block).count(_UTF8_REPLACEMENT)
                tail = (tail + block)[-2:]
            yield text
    rest = _decode(decoder, b"", offset, origin, final=True)
    report.replaced += len(rest)
    _check_unchanged(origin, digest.hexdigest())
    yield rest


def _check_unchanged(origin: Origin, sha256: str) -> None:
    if sha256 != origin.sha256:
        raise DataError(
            f"{origin.location} changed while it was read: expected sha256 {origin.sha256}, found "
            f"{sha256}; run the same command again when nothing writes to it"
        )


def _decode(
    decoder: codecs.IncrementalDecoder,
    block: bytes,
    offset: int,
    origin: Origin,
    final: bool = False,
) -> str:
    waiting = len(decoder.getstate()[0])
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        place = offset - waiting + error.start
        byte = error.object[error.start]
        raise DataError(
            f"{origin.location} is not UTF-8: byte 0x{byte:02x} at offset {place}"
            f"{_guess_encoding(error.object, place)}; convert the file, or set data.errors = "
            "'replace'"
        ) from None


def _guess_encoding(start: bytes, place: int) -> str:
    utf16 = place == 0 and start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return " (it begins like UTF-16)" if utf16 else ""


def _python_source(origin: Origin, report: ReadingReport) -> Iterator[Document]:
    """A file of Python source, in the encoding that it declares (PEP 263)."""
    content = Path(origin.location).read_bytes()
    _check_unchanged(origin, hashlib.sha256(content).hexdigest())
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        text = content.decode(encoding)
    except (SyntaxError, UnicodeDecodeError):
        # Some installations hold test files that are invalid on purpose.
        report.skipped.append(origin.name)
        return
    if text:
        yield Document(origin.name, origin.sha256, pieces(_slices(text)))


def _sha256_of_text(text: str, name: str) -> str:
    try:
        return hashlib.sha256(text.encode()).hexdigest()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name} has half of a surrogate pair, {text[error.start]!a}, at character "
            f"{error.start}; expected text that can be UTF-8: mend or remove the row"
        ) from None


def _row_documents(
    origin: Origin, text_field: str, rows: Iterable[dict[str, Any]]
) -> Iterator[Document]:
    """Each row with text as a document, named FILE#ROW."""
    for number, row in enumerate(rows):
        if text_field not in row:
            raise DataError(
                f"{origin.name}, row {number} has no field {text_field!r}; its fields are "
                f"{', '.join(row)}: set data.text_field to one of them"
            )
        text = row[text_field]
        if not isinstance(text, str):
            raise DataError(
                f"{origin.name}, row {number}: the field {text_field!r} is "
                f"{type(text).__name__}; expected text"
            )
        if text:
            name = f"{origin.name}#{number}"
            yield Document(name, _sha256_of_text(text, name), pieces(_slices(text)))


def _json_rows(origin: Origin, errors: str, report: ReadingReport) -> Iterator[dict[str, Any]]:
    """Rows of JSON lines, or of one list of rows.

    `datasets` does not read them, because it infers types: a text that looks like a date would
    become a date, and its spelling would be lost.
    """
    for row in _json_values(origin, errors, report):
        # A bare text is a row of one column, as in `datasets`.
        row = {"text": row} if isinstance(row, str) else row
        if not isinstance(row, dict):
            raise DataError(
                f"{origin.name} has a row that is {type(row).__name__}; {_EXPECTED_JSON}"
            )
        yield row


def _json_values(origin: Origin, errors: str, report: ReadingReport) -> Iterator[Any]:
    """The value of each line, or the elements of a list, which has to fit into memory."""
    lines = enumerate(_lines(_blocks(origin, errors, report)), 1)
    for number, line in lines:
        text = line.removeprefix("\ufeff") if number == 1 else line
        if text.lstrip().startswith("["):
            rest = [line for _, line in lines]
            yield from _parsed("\n".join([text, *rest]), origin, number)
        elif text.strip():
            yield _parsed(text, origin, number)


_EXPECTED_JSON = "expected one JSON object a line, or a list of them"
# Control characters inside of texts are let through.
_JSON = json.JSONDecoder(strict=False)


def _parsed(text: str, origin: Origin, line: int) -> Any:
    try:
        return _JSON.decode(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{origin.name}, line {line}, is not JSON: {error}; {_EXPECTED_JSON}"
        ) from None


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


def _dataset_rows(origin: Origin) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file or of a hub data set, streamed by `datasets`."""
    import datasets

    # `datasets` logs every error that it raises; the error is answered below.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if origin.kind == "hub":
        name, config, split = [*origin.location.split(":"), "", ""][:3]
        options: dict[str, Any] = {"name": config or None, "revision": origin.sha256}
        path, split = name, split or "train"
    elif not origin.bytes:
        return
    else:
        path, split = "parquet", "train"
        options = {"data_files": [origin.location]}
    try:
        yield from datasets.load_dataset(path, split=split, streaming=True, **options)
    except Exception as error:
        # Its readers raise errors of pyarrow, pandas, fsspec and of HTTP libraries.
        reason = str(error).split("\n")[0][:300] or type(error).__name__
        raise DataError(f"{origin.name} cannot be read by `datasets`: {reason}") from error
