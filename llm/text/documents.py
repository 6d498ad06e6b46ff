"""Reading origins: from the bytes of a file to documents. To add a kind of file, add it to `KINDS`.

A document is a name and its text in pieces. A document may be larger than memory, so its text comes
in pieces, which end only at places that no token can span. Newlines stay as they are in the file.
"""

import codecs
import collections
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from llm.errors import DataError
from llm.files import why

PIECE_BYTES = 2**18

# Every pattern of tiktoken, and ours in bpe.py, ends a pre-token between a letter or digit and
# white space or full-width CJK punctuation (comma, full stop, enumeration comma, ; : ! ?), so
# cutting a text there changes no token. All patterns begin a pre-token with at most one non-letter.
# The pattern is greedy, so it is matched from the end of a text: it finds the last such place.
_SAFE_CUT = re.compile("(?s).*[^\\W_](?=[\\s\uff0c\u3002\u3001\uff1b\uff1a\uff01\uff1f])")

# If more of a text cannot be read as UTF-8, replacing it would leave noise.
_STRAY_SHARE = 0.2

# Rows of a column file that are in memory at once.
_BATCH_ROWS = 256

_EXPECTED_JSON = "expected one JSON object a line, or a list of them"
# Control characters inside of texts are let through.
_JSON = json.JSONDecoder(strict=False)

# Why a document is left out.
EMPTY, WITHOUT_TEXT = "empty", "row without text"

_SKIP = "or set data.bad_rows = 'skip' to leave out and count such rows"

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


def document_of(name: str, text: str, sha256: str = "") -> Document:
    """A document whose text is in memory, and the hash of the text if it is known."""
    sha256 = sha256 or hashlib.sha256(text.encode()).hexdigest()
    return Document(name, sha256, pieces(_slices(text)))


class Reader:
    """Reads origins as documents.

    Args:
      errors: what to do with bytes that are not UTF-8: raise, or replace and count them.
      text_field: name of the field that holds the text of a row; "a.b" is field b of field a.
      bad_rows: what to do with rows without such a text: raise, or leave out and count them.
    Attributes:
      replaced: how many replacement characters were inserted so far.
      dropped: how many documents were left out so far, by the reason.
      first_bad: which row without text was left out first, and why.
    """

    def __init__(
        self,
        errors: Literal["strict", "replace"],
        text_field: str,
        bad_rows: Literal["error", "skip"] = "error",
    ):
        self.errors, self.text_field, self.bad_rows = errors, text_field, bad_rows
        self.replaced = 0
        self.dropped: collections.Counter[str] = collections.Counter()
        self.first_bad = ""

    def documents(self, origins: Iterable[Origin]) -> Iterator[Document]:
        """Every document that is not empty, in order.

        Raises:
          DataError: bytes that are not UTF-8, with their offset; a row without text; a file that
            changed since it was hashed.
        """
        for origin in origins:
            kind = KINDS[origin.kind]
            assert kind.read is not None
            found = kind.read(self, origin)
            yield from self._row_documents(origin, found) if kind.has_rows else found

    def text(self, origin: Origin) -> Iterator[Document]:
        """The whole file is one document."""
        if origin.bytes:
            yield Document(origin.name, origin.sha256, pieces(self._blocks(origin)))
        else:
            self.dropped[EMPTY] += 1

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
                yield {"text": row} if isinstance(row, str) else row

    def parquet_rows(self, origin: Origin) -> Iterator[Row]:
        """The rows of a parquet file, with no other column than that of the text.

        `datasets` does not read it: it would take a path as a pattern, and decode every column.
        """
        import pyarrow.parquet

        with _opened(origin) as file:
            table = pyarrow.parquet.ParquetFile(file)
            wanted = self._columns(table.schema_arrow.names)
            for batch in table.iter_batches(_BATCH_ROWS, columns=wanted):
                yield from batch.to_pylist()

    def arrow_rows(self, origin: Origin) -> Iterator[Row]:
        """The rows of an Arrow file or stream, which `datasets.save_to_disk` writes."""
        import pyarrow.ipc

        with _opened(origin) as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            if is_file:
                table = pyarrow.ipc.open_file(file)
                batches = (table.get_batch(n) for n in range(table.num_record_batches))
            else:
                batches = table = pyarrow.ipc.open_stream(file)
            wanted = self._columns(table.schema.names)
            for batch in batches:
                for start in range(0, batch.num_rows, _BATCH_ROWS):
                    yield from batch.select(wanted).slice(start, _BATCH_ROWS).to_pylist()

    def hub_rows(self, origin: Origin) -> Iterator[Row]:
        """The rows of a data set of the Hugging Face hub, at the origin's revision."""
        import datasets

        # `datasets` logs every error that it raises; the error is answered below.
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        name, config, split = [*origin.location.split(":"), "", ""][:3]
        with _explained(origin):
            builder = datasets.load_dataset_builder(
                name, name=config or None, revision=origin.sha256
            )
            if hasattr(builder.config, "batch_size"):
                # By default a first part of parquet that has no rows is an error.
                builder.config.batch_size = _BATCH_ROWS
            rows = builder.as_streaming_dataset(split=split or "train")
            if rows.column_names:  # None if no row tells before it is read
                rows = rows.select_columns(self._columns(rows.column_names))
            yield from rows

    def _columns(self, names: list[str]) -> list[str]:
        """The column of the text; all of them if there is none, so that a message can list them."""
        wanted = (self.text_field, self.text_field.partition(".")[0])
        return next(([name] for name in wanted if name in names), names)

    def _row_documents(self, origin: Origin, rows: Iterable[Any]) -> Iterator[Document]:
        """Each row with text as a document, named FILE#ROW."""
        for number, row in enumerate(rows):
            try:
                text = _text_of(row, self.text_field)
            except _BadRow as problem:
                if self.bad_rows == "error":
                    raise DataError(f"{origin.name}, row {number} {problem}, {_SKIP}") from None
                self.first_bad = self.first_bad or f"{origin.name}, row {number} {problem}"
                self.dropped[WITHOUT_TEXT] += 1
                continue
            if text:
                yield document_of(f"{origin.name}#{number}", text)
            else:
                self.dropped[EMPTY] += 1

    def _blocks(self, origin: Origin) -> Iterator[str]:
        """The decoded file, block by block. At its end, its hash is compared with the origin's."""
        decoder = codecs.getincrementaldecoder("utf-8")(self.errors)
        digest, offset, tail, more = hashlib.sha256(), 0, b"", True
        with _explained(origin), open(origin.location, "rb") as file:
            while more:
                block = file.read(PIECE_BYTES)
                more = bool(block)
                digest.update(block)
                waiting = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(block, final=not more)
                except UnicodeDecodeError as error:
                    place, found = offset - waiting + error.start, error.object[error.start]
                    shown = error.object.decode("utf-8", "replace")
                    stray = shown.count("\ufffd") < _STRAY_SHARE * len(shown)
                    replace = ", or set data.errors = 'replace'" if stray else ""
                    raise DataError(
                        f"{origin.location} is not UTF-8: byte 0x{found:02x} at offset {place}; "
                        f"convert the file (iconv -f ITS_ENCODING -t UTF-8){replace}"
                    ) from None
                if self.errors == "replace":
                    # Do not count replacement characters that are in the file itself.
                    genuine = (tail + block).count("\ufffd".encode())
                    self.replaced += text.count("\ufffd") - genuine
                    tail = (tail + block)[-2:]
                offset += len(block)
                yield text
        _check_same(origin, digest.hexdigest())


class Kind(NamedTuple):
    """A kind of files: how it is recognised, and how it becomes documents.

    Attributes:
      read: an origin's documents; its rows, if it has rows; None if such files are not read.
      suffixes: of the names of such files, in lower case.
      begins: a pattern of the first bytes. What a file begins with counts before its name.
      has_rows: each row that has a text is a document.
      is_text: the size of the file is the size of its text.
      what, remedy: if such files are not read: what a file is, and what a person can do.
      holds_text: such files are not read, but text may be in them.
    """

    read: Callable[[Reader, Origin], Iterator[Any]] | None = None
    suffixes: tuple[str, ...] = ()
    begins: bytes = b"(?!)"
    has_rows: bool = False
    is_text: bool = True
    what: str = ""
    remedy: str = ""
    holds_text: bool = False


def _unread(what: str, suffixes: str, begins: bytes, remedy: str, holds_text: bool = True) -> Kind:
    known_by = tuple(suffixes.split()), begins
    return Kind(None, *known_by, is_text=False, what=what, remedy=remedy, holds_text=holds_text)


_DECOMPRESS = "decompress it and name the file that comes out"
_UNPACK = "unpack it and name the files or the folder that come out"
_MADE_FROM = "name the text that it was made from"

KINDS = {
    "text": Kind(Reader.text, (".txt",)),
    # The standard library's source code, which is UTF-8 throughout (PEP 8).
    "python": Kind(Reader.text),
    "json": Kind(Reader.json_rows, (".json", ".jsonl", ".ndjson"), has_rows=True),
    "parquet": Kind(Reader.parquet_rows, (".parquet",), rb"PAR1", has_rows=True, is_text=False),
    "arrow": Kind(
        Reader.arrow_rows, (".arrow",), rb"ARROW1\0|\xff{4}.{3}\0", has_rows=True, is_text=False
    ),
    "hub": Kind(Reader.hub_rows, has_rows=True, is_text=False),
    "lfs": _unread(
        "a pointer of Git LFS", "", rb"version https://git-lfs", "fetch its content: git lfs pull"
    ),
    "gzip": _unread("compressed by gzip", ".gz .tgz", rb"\x1f\x8b", _DECOMPRESS),
    "bzip2": _unread("compressed by bzip2", ".bz2 .tbz2", rb"BZh[1-9]1AY", _DECOMPRESS),
    "xz": _unread("compressed by xz", ".xz .lzma .txz", rb"\xfd7zXZ\0", _DECOMPRESS),
    "zstd": _unread("compressed by zstd", ".zst .zstd", rb"\x28\xb5\x2f\xfd", _DECOMPRESS),
    "lz4": _unread("compressed by lz4", ".lz4", rb"\x04\x22\x4d\x18", _DECOMPRESS),
    "tar": _unread("a tar archive", ".tar", rb".{257}ustar", _UNPACK),
    "zip": _unread("a zip archive", ".zip", rb"PK(?:\x03\x04|\x05\x06)", _UNPACK),
    "archive": _unread("an archive", ".7z .rar", rb"7z\xbc\xaf|Rar!\x1a\x07", _UNPACK),
    "utf16": _unread(
        "UTF-16 or UTF-32", "", rb"\xff\xfe|\xfe\xff", "convert it: iconv -f UTF-16 -t UTF-8"
    ),
    "pdf": _unread("a PDF", ".pdf", rb"%PDF-", "name its text: pdftotext FILE.pdf"),
    "numbers": _unread(
        "arrays, weights or token ids",
        ".npy .npz .safetensors .h5 .hdf5 .pkl .pickle .ckpt .gguf .tfrecord",
        rb"\x93NUMPY|\x80[\x02-\x05]|\x89HDF|GGUF[\x01-\x05]",
        _MADE_FROM,
        holds_text=False,
    ),
    "media": _unread(
        "a picture, sound or film",
        ".png .jpg .jpeg .gif .webp .bmp .tif .tiff .ico .mp3 .wav .flac .ogg .mp4 .mkv .avi .mov",
        rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|RIFF.{4}(?:WAVE|AVI |WEBP)|ID3[\x02-\x04]|fLaC",
        "name text",
        holds_text=False,
    ),
    # Git's rule for a binary file: a NUL among its first 8000 bytes.
    "binary": _unread(
        "not text: it has NUL bytes",
        "",
        rb"[^\0]*\0",
        f"{_MADE_FROM}; if it is text with stray NUL bytes, remove them: tr -d '\\000'",
        holds_text=False,
    ),
}


_BY_SUFFIX = {suffix: name for name, kind in KINDS.items() for suffix in kind.suffixes}
_BY_BEGINNING = re.compile(
    b"|".join(b"(?P<%s>%s)" % (name.encode(), kind.begins) for name, kind in KINDS.items()),
    re.DOTALL,
)


def kind_of_file(path: Path) -> str:
    """The kind of a file: by the bytes that it begins with, else by the suffix of its name."""
    by_name = _BY_SUFFIX.get(path.suffix.lower(), "text")
    with open(path, "rb") as file:
        begins = _BY_BEGINNING.match(file.read(8000))
    by_bytes = begins.lastgroup if begins else None
    # Files of many kinds have NUL bytes; their names tell more.
    tells_more = by_bytes == "binary" and not KINDS[by_name].is_text
    return by_name if by_bytes is None or tells_more else by_bytes


@contextmanager
def _explained(origin: Origin) -> Iterator[None]:
    """Turn what the system and libraries say while an origin is read into a DataError.

    The body may yield: whoever consumes a generator does not raise inside of it.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        # The readers of columns raise errors of pyarrow, `datasets`, fsspec and HTTP libraries.
        reason = why(error).split("\n")[0][:300] or type(error).__name__
        remedy = "" if origin.kind == "hub" else "; put it back whole, or leave it out"
        raise DataError(f"{origin.location} cannot be read: {reason}{remedy}") from error


@contextmanager
def _opened(origin: Origin) -> Iterator[BinaryIO]:
    """The file of an origin for a library that reads it; its hash is compared at the end."""
    with _explained(origin), open(origin.location, "rb") as file:
        yield file
        file.seek(0)
        _check_same(origin, hashlib.file_digest(file, "sha256").hexdigest())


def _check_same(origin: Origin, sha256: str) -> None:
    if sha256 != origin.sha256:
        raise DataError(
            f"{origin.location} changed while it was read: expected sha256 {origin.sha256}, "
            f"found {sha256}; run the same command again when nothing writes to it"
        )


class _BadRow(ValueError):
    """Why a row has no text, as the end of a sentence that begins with the row."""


def _text_of(row: Any, name: str) -> str:
    """The text of a row, which may be nested: "a.b" is field b of field a."""
    if not isinstance(row, dict):
        raise _BadRow(f"is {type(row).__name__}; {_EXPECTED_JSON}: mend or remove the row")
    try:
        text = _field(row, name)
    except (KeyError, TypeError):
        inner = [f"{key}.{k}" for key, v in row.items() if isinstance(v, dict) for k in v]
        fields = ", ".join([*row, *inner][:20])
        raise _BadRow(
            f"has no field {name!r}; its fields are {fields}: set data.text_field to one of them"
        ) from None
    if not isinstance(text, str):
        found = "null" if text is None else type(text).__name__
        raise _BadRow(f"has no text: the field {name!r} is {found}; expected text: mend the row")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _BadRow(
            f"has half of a surrogate pair, {text[error.start]!a}, at character {error.start}; "
            "expected text that can be UTF-8: mend the row"
        ) from None
    return text


def _field(row: Any, name: str) -> Any:
    """row["a"]["b"] for "a.b", unless a field has that very name."""
    first, _, rest = name.partition(".")
    return row[name] if name in row or not rest else _field(row[first], rest)


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
