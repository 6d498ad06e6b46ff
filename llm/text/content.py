"""The content of a file: decompressed as a stream, hashed while it is read, bounded.

The hash is that of the file as it lies there, so that a change is noticed before and while it is
read.
"""

import hashlib
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from llm.errors import DataError
from llm.files import why

# Compressions of streams, and what pyarrow calls them. It has no xz, and refuses padding in gzip.
COMPRESSIONS = {"gzip": "", "bzip2": "bz2", "zstd": "zstd", "lz4": "lz4", "xz": ""}

# Text becomes 2 to 10 times smaller, logs and tables up to some 50 times. A stream beyond this is
# taken for a bomb: 1 MB of gzip can hold 1 GB of zeros, 1 MB of zstd some 10 GB.
MOST_TIMES, FREE_BYTES = 200, 2**28

_BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class Origin:
    """One file, or one hub data set, and the identity of its content.

    Attributes:
      name: for people; does not depend on where the corpus lies on this machine.
      kind: a key of `KINDS` (llm/text/documents.py), which says how the content becomes documents.
      location: path of the file, or NAME[:CONFIG[:SPLIT]] on the hub.
      bytes: size of the file; 0 for the hub, which does not tell the size.
      sha256: hash of the file's bytes; for the hub, the revision.
    """

    name: str
    kind: str
    location: str
    bytes: int
    sha256: str

    @property
    def compression(self) -> str:
        """How the file is compressed, a key of COMPRESSIONS; "" if it is not."""
        return self.kind.partition("+")[0] if "+" in self.kind else ""


class Stream(Protocol):
    """What is read in order, once."""

    def read(self, size: int, /) -> bytes: ...


class _Hashed(io.RawIOBase):
    """Hashes what is read of a file."""

    def __init__(self, file: BinaryIO):
        self._file, self.digest, self.bytes = file, hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size)
        self.digest.update(block)
        self.bytes += len(block)
        return block


class _Gzip:
    """One stream of gzip, as `lzma.LZMADecompressor` is one of xz."""

    def __init__(self) -> None:
        self._stream, self.needs_input = zlib.decompressobj(wbits=31), True

    eof = property(lambda self: self._stream.eof)
    unused_data = property(lambda self: self._stream.unused_data)

    def decompress(self, data: bytes, size: int) -> bytes:
        block = self._stream.decompress(self._stream.unconsumed_tail + data, size)
        self.needs_input = len(block) < size and not self._stream.unconsumed_tail
        return block


class _Padded:
    """Streams of gzip or xz behind each other, with zeros between or behind them, as tapes and
    both programs have it. `lzma.LZMAFile` would end at these.
    """

    def __init__(self, file: _Hashed, new: Callable[[], Any]):
        self._file, self._new = file, new
        self._stream = self._new()

    def read(self, size: int) -> bytes:
        block = data = b""
        while not block:
            if self._stream.eof:
                data = self._stream.unused_data.lstrip(b"\0")
                while not data:
                    if not (read := self._file.read(_BLOCK_BYTES)):
                        return b""
                    data = read.lstrip(b"\0")
                self._stream = self._new()
            elif self._stream.needs_input and not (data := self._file.read(_BLOCK_BYTES)):
                raise EOFError("it is cut off")
            block, data = self._stream.decompress(data, size), b""
        return block


class _Decompressed:
    """What is in a compressed file.

    Raises:
      OSError: it is damaged or cut off, with how far it was read.
      DataError: more comes out than out of any text.
    """

    def __init__(self, file: _Hashed, origin: Origin):
        self._file, self._origin, self.bytes = file, origin, 0
        if codec := COMPRESSIONS[origin.compression]:
            import pyarrow

            self._stream: Any = pyarrow.CompressedInputStream(file, codec)
        elif origin.compression == "gzip":
            self._stream = _Padded(file, _Gzip)
        else:
            import lzma

            self._stream = _Padded(file, lzma.LZMADecompressor)

    def read(self, size: int, /) -> bytes:
        try:
            block = self._stream.read(size)
        except Exception as error:  # each of the libraries has its own
            raise OSError(
                f"{why(error)}, after {self._file.bytes} of its {self._origin.bytes} bytes"
            ) from None
        self.bytes += len(block)
        if self.bytes > max(FREE_BYTES, MOST_TIMES * self._file.bytes):
            raise DataError(
                f"{self._origin.location} may be a bomb: {self.bytes} bytes came out of the first "
                f"{self._file.bytes}; expected at most {MOST_TIMES} times as many, or "
                f"{FREE_BYTES}. If it is text all the same, decompress it and name the file that "
                "comes out"
            )
        return block


@contextmanager
def opened(origin: Origin) -> Iterator[Stream]:
    """The content of a file, read in order; at the end, the file's hash is compared.

    Raises:
      DataError: the file cannot be read, or has changed.
    """
    with explained(origin), open(origin.location, "rb") as file:
        hashed = _Hashed(file)
        yield _Decompressed(hashed, origin) if origin.compression else hashed
        _check_same(origin, hashed)


@contextmanager
def opened_anywhere(origin: Origin) -> Iterator[BinaryIO]:
    """As `opened`, for a library that reads a file that is not compressed in any order."""
    with explained(origin), open(origin.location, "rb") as file:
        yield file
        file.seek(0)
        _check_same(origin, _Hashed(file))


def _check_same(origin: Origin, hashed: _Hashed) -> None:
    """Read the rest of a file, and compare its hash."""
    while hashed.read(_BLOCK_BYTES):
        pass
    if (found := hashed.digest.hexdigest()) != origin.sha256:
        raise DataError(
            f"{origin.location} changed while it was read: expected sha256 {origin.sha256}, "
            f"found {found}; run the same command again when nothing writes to it"
        )


@contextmanager
def explained(origin: Origin) -> Iterator[None]:
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
        known = "; put it back whole, " + ("decompress it, " if origin.compression else "")
        remedy = "" if origin.kind == "hub" else f"{known}or leave it out"
        raise DataError(f"{origin.location} cannot be read: {reason}{remedy}") from error


def beginning(path: Path, size: int, compression: str = "") -> bytes:
    """The first bytes of a file, or of what is compressed in it."""
    with open(path, "rb") as file:
        if not compression:
            return file.read(size)
        origin = Origin(path.name, f"{compression}+", str(path), path.stat().st_size, "")
        with explained(origin):
            return _Decompressed(_Hashed(file), origin).read(size)
