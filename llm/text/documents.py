"""Reading origins: from the bytes of a file to documents. To add a kind of file, add it to `KINDS`.

A document is a name and its text in pieces. A document may be larger than memory, so its text comes
in pieces, which end only at places that no token can span. Newlines stay as they are in the file.
"""

import codecs
import collections
import csv
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llm.errors import DataError
from llm.text.archives import KEY, parsed, samples
from llm.text.content import COMPRESSIONS, Origin, beginning, explained, opened, opened_anywhere

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

# A row, or a member of an archive, is in memory as a whole, several times. A text file is not.
_LONGEST_ROW = 2**27

_EXPECTED_JSON = "expected one JSON object a line, or a list of them"
# Why a document is left out.
EMPTY, WITHOUT_TEXT = "empty", "row without text"

_SKIP = "or set data.bad_rows = 'skip' to leave out and count such rows"

Row = dict[str, Any]


@dataclass(frozen=True)
class Document:
    """A text and where it is from.

    Attributes:
      name: the file, or FILE#ROW; for a sample of an archive, ARCHIVE#KEY.
      sha256: of its text; for a file of its bytes, as they are when they are decompressed.
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
        size, sha256 = origin.bytes, origin.sha256
        if origin.compression:
            # Which side a text is on and what it repeats has to be known before it is read.
            size, digest = 0, hashlib.sha256()
            with opened(origin) as content:
                while block := content.read(PIECE_BYTES):
                    size += len(block)
                    digest.update(block)
            sha256 = digest.hexdigest()
        if size:
            yield Document(origin.name, sha256, pieces(self._blocks(origin)))
        else:
            self.dropped[EMPTY] += 1

    def json_rows(self, origin: Origin) -> Iterator[Row]:
        """Rows of JSON lines, or of one list of rows, which has to fit into memory.

        `datasets` does not read them, because it infers types: a text that looks like a date would
        become a date, and its spelling would be lost.
        """
        lines = enumerate(self._lines(origin), 1)
        for number, text in lines:
            if not text.strip():
                continue
            if text.lstrip().startswith("["):
                text = "\n".join([text, *(rest for _, rest in lines)])
            value = parsed(text, f"{origin.name}, line {number},", _EXPECTED_JSON)
            for row in value if isinstance(value, list) else [value]:
                # A bare text is a row of one column, as in `datasets`.
                yield {"text": row} if isinstance(row, str) else row

    def csv_rows(self, origin: Origin) -> Iterator[Row]:
        """The rows of a table whose first line names its columns; quotes as spreadsheets use them.

        No type is inferred: a field is the text that stands there.
        """
        csv.field_size_limit(_LONGEST_ROW)
        lines = (line + "\n" for line in self._lines(origin))
        dialect = "excel-tab" if origin.kind.endswith("tsv") else "excel"
        table = csv.DictReader(lines, dialect=dialect, strict=True)
        try:
            names = table.fieldnames or ()
            if names.count(self.text_field) > 1:
                raise DataError(
                    f"{origin.name} has {names.count(self.text_field)} columns "
                    f"{self.text_field!r}; expected one: give the others another name"
                )
            yield from table
        except csv.Error as error:
            raise DataError(
                f"{origin.name}, line {table.reader.line_num}, is not as tables of text are: "
                f"{error}; expected quotes around fields with separators or quotes in them, and at "
                f"most {_LONGEST_ROW:,} characters in a field"
            ) from None

    def tar_rows(self, origin: Origin) -> Iterator[Row]:
        """The samples of an archive as WebDataset lays it out."""
        with opened(origin) as content:
            yield from samples(content, origin.name, self._decoded, _LONGEST_ROW)

    def parquet_rows(self, origin: Origin) -> Iterator[Row]:
        """The rows of a parquet file, with no other column than that of the text.

        `datasets` does not read it: it would take a path as a pattern, and decode every column.
        """
        import pyarrow.parquet

        with opened_anywhere(origin) as file:
            table = pyarrow.parquet.ParquetFile(file)
            wanted = self._columns(table.schema_arrow.names)
            for batch in table.iter_batches(_BATCH_ROWS, columns=wanted):
                yield from batch.to_pylist()

    def arrow_rows(self, origin: Origin) -> Iterator[Row]:
        """The rows of an Arrow file or stream, which `datasets.save_to_disk` writes."""
        import pyarrow.ipc

        with opened_anywhere(origin) as file:
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
        with explained(origin):
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
        """Each row with text as a document."""
        for number, row in enumerate(rows):
            place: str | int = number
            if isinstance(row, dict) and isinstance(row.get(KEY), str):
                # A key may hold bytes, or halves of surrogate pairs, that are not UTF-8.
                place = row[KEY].encode("utf-8", "backslashreplace").decode()
            try:
                text = _text_of(row, self.text_field)
            except _BadRow as problem:
                if self.bad_rows == "error":
                    raise DataError(f"{origin.name}, row {place} {problem}, {_SKIP}") from None
                self.first_bad = self.first_bad or f"{origin.name}, row {place} {problem}"
                self.dropped[WITHOUT_TEXT] += 1
                continue
            if text:
                yield document_of(f"{origin.name}#{place}", text)
            else:
                self.dropped[EMPTY] += 1

    def _lines(self, origin: Origin) -> Iterator[str]:
        """Lines without their newlines, and without a byte order mark before the first.

        Other separators of lines may occur inside of a text.
        """
        parts: list[str] = []
        number, size = 1, 0
        for block in itertools.chain(self._blocks(origin), ["\n"]):
            end, *rest = block.split("\n")
            parts.append(end)
            size += len(end)
            if size > _LONGEST_ROW and not parts[0].lstrip("\ufeff \t\r").startswith("["):
                raise DataError(
                    f"{origin.name}, line {number}, is longer than {_LONGEST_ROW:,} characters, "
                    "which a row may have to fit into memory; make its text a file of its own"
                )
            if rest:
                line = "".join(parts)
                yield line.removeprefix("\ufeff") if number == 1 else line
                yield from rest[:-1]
                parts, size, number = [rest[-1]], len(rest[-1]), number + len(rest)

    def _blocks(self, origin: Origin) -> Iterator[str]:
        """The decoded content of a file, block by block."""
        decoder = codecs.getincrementaldecoder("utf-8")(self.errors)
        offset, tail, more = 0, b"", True
        with opened(origin) as content:
            while more:
                block = content.read(PIECE_BYTES)
                more = bool(block)
                waiting = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(block, final=not more)
                except UnicodeDecodeError as error:
                    place = offset - waiting + error.start
                    raise _not_utf8(origin.location, error, place) from None
                if self.errors == "replace":
                    # Do not count replacement characters that are in the file itself.
                    genuine = (tail + block).count("\ufffd".encode())
                    self.replaced += text.count("\ufffd") - genuine
                    tail = (tail + block)[-2:]
                offset += len(block)
                yield text

    def _decoded(self, data: bytes, what: str) -> str:
        """The text of bytes that are in memory."""
        try:
            text = data.decode("utf-8", self.errors)
        except UnicodeDecodeError as error:
            raise _not_utf8(what, error, error.start) from None
        self.replaced += text.count("\ufffd") - data.count("\ufffd".encode())
        return text


def _not_utf8(what: str, error: UnicodeDecodeError, offset: int) -> DataError:
    shown = error.object.decode("utf-8", "replace")
    stray = shown.count("\ufffd") < _STRAY_SHARE * len(shown)
    replace = ", or set data.errors = 'replace'" if stray else ""
    return DataError(
        f"{what} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset}; convert "
        f"the file (iconv -f ITS_ENCODING -t UTF-8){replace}"
    )


class Kind(NamedTuple):
    """A kind of files: how it is recognised, and how it becomes documents.

    Attributes:
      read: an origin's documents; its rows, if it has rows; None if such files are not read.
      suffixes: of the names of such files, in lower case.
      begins: a pattern of the first bytes. What a file begins with counts before its name.
      has_rows: each row that has a text is a document.
      is_text: the size of the file is the size of its text.
      is_stream: such files are read in order, and so may be compressed.
      what, remedy: if such files are not read: what a file is, and what a person can do.
      holds_text: such files are not read, but text may be in them.
    """

    read: Callable[[Reader, Origin], Iterator[Any]] | None = None
    suffixes: tuple[str, ...] = ()
    begins: bytes = b"(?!)"
    has_rows: bool = False
    is_text: bool = True
    is_stream: bool = True
    what: str = ""
    remedy: str = ""
    holds_text: bool = False


def _unread(what: str, suffixes: str, begins: bytes, remedy: str, holds_text: bool = True) -> Kind:
    known_by = tuple(suffixes.split()), begins
    return Kind(None, *known_by, is_text=False, what=what, remedy=remedy, holds_text=holds_text)


_DECOMPRESS = "decompress it and name the file that comes out"
_UNPACK = "unpack it and name the files or the folder that come out"
_MADE_FROM = "name the text that it was made from"

_COLUMNS = Kind(has_rows=True, is_text=False, is_stream=False)

KINDS = {
    "text": Kind(Reader.text, (".txt",)),
    # The standard library's source code, which is UTF-8 throughout (PEP 8).
    "python": Kind(Reader.text),
    "json": Kind(Reader.json_rows, (".json", ".jsonl", ".ndjson"), has_rows=True),
    "csv": Kind(Reader.csv_rows, (".csv",), has_rows=True),
    "tsv": Kind(Reader.csv_rows, (".tsv",), has_rows=True),
    "tar": Kind(Reader.tar_rows, (".tar",), rb".{257}ustar", has_rows=True, is_text=False),
    "parquet": _COLUMNS._replace(read=Reader.parquet_rows, suffixes=(".parquet",), begins=rb"PAR1"),
    "arrow": _COLUMNS._replace(
        read=Reader.arrow_rows, suffixes=(".arrow",), begins=rb"ARROW1\0|\xff{4}.{3}\0"
    ),
    "hub": _COLUMNS._replace(read=Reader.hub_rows),
    "lfs": _unread(
        "a pointer of Git LFS", "", rb"version https://git-lfs", "fetch its content: git lfs pull"
    ),
    "gzip": _unread("compressed by gzip", ".gz .tgz", rb"\x1f\x8b", _DECOMPRESS),
    "bzip2": _unread("compressed by bzip2", ".bz2 .tbz2", rb"BZh[1-9]1AY", _DECOMPRESS),
    "xz": _unread("compressed by xz", ".xz .lzma .txz", rb"\xfd7zXZ\0", _DECOMPRESS),
    "zstd": _unread("compressed by zstd", ".zst .zstd", rb"\x28\xb5\x2f\xfd", _DECOMPRESS),
    "lz4": _unread("compressed by lz4", ".lz4", rb"\x04\x22\x4d\x18", _DECOMPRESS),
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


# Git looks at so many bytes.
_LOOK_AT = 8000
_BY_SUFFIX = {suffix: name for name, kind in KINDS.items() for suffix in kind.suffixes}
_BY_BEGINNING = re.compile(
    b"|".join(b"(?P<%s>%s)" % (name.encode(), kind.begins) for name, kind in KINDS.items()),
    re.DOTALL,
)


# A file that is compressed is of the kind "gzip+text", for example.
KINDS |= {
    f"{outer}+{inner}": kind._replace(suffixes=(), is_text=False)
    if kind.read and kind.is_stream
    else kind._replace(
        read=None,
        what=f"{KINDS[outer].what}, and what is in it is {kind.what or 'a table of columns'}",
        remedy=kind.remedy or _DECOMPRESS,
    )
    for outer in COMPRESSIONS
    for inner, kind in KINDS.items()
}


def kind_of_file(path: Path) -> str:
    """The kind of a file: by the bytes that it begins with, else by the suffix of its name.

    Raises:
      DataError: it is compressed, and its beginning is damaged.
    """
    kind = _kind_of(path, beginning(path, _LOOK_AT))
    if kind not in COMPRESSIONS:
        return kind
    named = path.with_suffix("") if path.suffix.lower() in KINDS[kind].suffixes else path
    return f"{kind}+{_kind_of(named, beginning(path, _LOOK_AT, kind))}"


def _kind_of(path: Path, begins: bytes) -> str:
    by_name = _BY_SUFFIX.get(path.suffix.lower(), "text")
    found = _BY_BEGINNING.match(begins)
    by_bytes = found.lastgroup if found else None
    # Files of many kinds have NUL bytes; their names tell more.
    tells_more = by_bytes == "binary" and not KINDS[by_name].is_text
    return by_name if by_bytes is None or tells_more else by_bytes


class _BadRow(ValueError):
    """Why a row has no text, as the end of a sentence that begins with the row."""


def _text_of(row: Any, name: str) -> str:
    """The text of a row, which may be nested: "a.b" is field b of field a."""
    if not isinstance(row, dict):
        raise _BadRow(f"is {type(row).__name__}; {_EXPECTED_JSON}: mend or remove the row")
    if None in row:  # csv's name for what is beyond the columns
        columns = len(row) - 1
        raise _BadRow(
            f"has {columns + len(row[None])} fields; expected {columns}, as many as its header: "
            "put fields with separators in them in quotes"
        )
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
