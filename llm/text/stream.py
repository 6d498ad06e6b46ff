"""A row of token ids on disk, memory-mapped, with the places of its documents.

    train.bin              token ids, little-endian uint16 or uint32
    train.documents        int64 pairs: a document's first token, and the first byte of its name in
                           train.names; a last pair holds the ends
    train.names            the documents' names, UTF-8, one after the other

Counts, bounds and hashes of these files are in the stream's StreamManifest, a part of header.json.
"""

import hashlib
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from llm.errors import DataError
from llm.files import sha256_of_file
from llm.text.tokenizer import Ids


@dataclass(frozen=True)
class StoredFile:
    """A file of a stream: its size and its sha256."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class StreamManifest:
    """What a stream's files should hold.

    Attributes:
      largest_id: over all tokens; -1 if there are none.
    """

    dtype: str
    tokens: int
    documents: int
    largest_id: int
    shard: StoredFile
    index: StoredFile
    names: StoredFile

    @property
    def files(self) -> tuple[StoredFile, ...]:
        return self.shard, self.index, self.names


def smallest_dtype(vocab_size: int) -> str:
    """uint16 for vocabularies of up to 65,536 tokens, else uint32."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


class _HashedFile:
    """A file that hashes what is written to it. It is closed at the latest when `files` is."""

    def __init__(self, path: Path, files: ExitStack):
        self._file: BinaryIO = files.enter_context(open(path, "wb"))  # noqa: SIM115
        self._digest = hashlib.sha256()
        self.name = path.name
        self.bytes = 0

    def write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._digest.update(content)
        self.bytes += len(content)

    def close(self) -> StoredFile:
        self._file.close()
        return StoredFile(self.name, self.bytes, self._digest.hexdigest())


class StreamWriter(AbstractContextManager):
    """Writes a stream in bounded memory, documents one after the other.

    Leaving its context closes every file, whether the stream is finished or not.
    """

    def __init__(self, folder: Path, name: str, dtype: str):
        self._files, self._dtype = ExitStack(), np.dtype(dtype).newbyteorder("<")
        self._shard = _HashedFile(folder / f"{name}.bin", self._files)
        self._index = _HashedFile(folder / f"{name}.documents", self._files)
        self._names = _HashedFile(folder / f"{name}.names", self._files)
        self.tokens = self.documents = 0
        self._largest_id = -1

    def begin_document(self, name: str) -> None:
        """Start a document: the ids added next belong to it."""
        self._mark()
        self._names.write(name.encode())
        self.documents += 1

    def add(self, ids: Ids) -> None:
        """Append token ids."""
        if len(ids):
            self._largest_id = max(self._largest_id, int(ids.max()))
        self._shard.write(ids.astype(self._dtype).tobytes())
        self.tokens += len(ids)

    def finish(self) -> StreamManifest:
        self._mark()
        return StreamManifest(
            dtype=self._dtype.name,
            tokens=self.tokens,
            documents=self.documents,
            largest_id=self._largest_id,
            shard=self._shard.close(),
            index=self._index.close(),
            names=self._names.close(),
        )

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def _mark(self) -> None:
        self._index.write(np.array([self.tokens, self._names.bytes], "<i8").tobytes())


class TokenStream:
    """A stream that was written.

    Args:
      folder: the folder that holds its files.
      manifest: what the files should hold.
      vocab_size: all ids must be below it.
      hashed: also compare each file's sha256, which reads the whole file.
    Raises:
      DataError: a file is not as the manifest says; the message says what was expected and found.
    """

    def __init__(self, folder: Path, manifest: StreamManifest, vocab_size: int, *, hashed: bool):
        self.folder, self.manifest, self.vocab_size = folder, manifest, vocab_size
        if manifest.largest_id >= vocab_size:
            raise DataError(
                f"{folder} holds the token id {manifest.largest_id}; expected ids below the "
                f"vocabulary's {vocab_size}{remedy(folder)}"
            )
        for file in manifest.files:
            if not (path := folder / file.name).exists():
                raise DataError(f"{path} is missing; expected {file.bytes} bytes{remedy(folder)}")
        self.check_sizes()
        if hashed:
            self.verify()

    def __len__(self) -> int:
        return self.manifest.tokens

    def check_sizes(self) -> None:
        """Raise a DataError that names the first file of another size than it should have.

        A file that was removed while it is mapped can still be read.
        """
        for file in self.manifest.files:
            path = self.folder / file.name
            found = path.stat().st_size if path.exists() else file.bytes
            if found != file.bytes:
                raise DataError(
                    f"{path}: expected {file.bytes} bytes, found {found}{remedy(self.folder)}"
                )

    def verify(self) -> None:
        """Read every file and compare its sha256; DataError names the first that differs."""
        for file in self.manifest.files:
            found = sha256_of_file(self.folder / file.name)
            if found != file.sha256:
                raise DataError(
                    f"{self.folder / file.name} has changed: expected sha256 {file.sha256}, found "
                    f"{found}{remedy(self.folder)}"
                )

    def tokens(self) -> npt.NDArray:
        """The token ids [N], mapped anew by each call.

        Raises:
          DataError: the file is not as long as it was.
        """
        self.check_sizes()
        dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        return _mapped(self.folder / self.manifest.shard.name, dtype)

    def places(self) -> npt.NDArray[np.int64]:
        """int64 [documents + 1, 2]: what the .documents file holds, mapped anew by each call."""
        return _mapped(self.folder / self.manifest.index.name, np.dtype("<i8")).reshape(-1, 2)

    def document_at(self, position: int) -> tuple[str, int]:
        """The name of the document that holds a token, and the token's index in it."""
        places = self.places()
        number = int(np.searchsorted(places[:, 0], position, side="right")) - 1
        start, name_start = places[number].tolist()
        name_stop = int(places[number + 1, 1])
        with open(self.folder / self.manifest.names.name, "rb") as names:
            names.seek(name_start)
            return names.read(name_stop - name_start).decode(), position - start


def remedy(folder: Path) -> str:
    """Advice for the end of a message about shards that cannot be trusted."""
    return f"; delete {folder} and run the same command again to prepare it anew"


def _mapped(path: Path, dtype: np.dtype) -> npt.NDArray:
    # A plain array over the map: slicing an np.memmap costs several times as much.
    return np.memmap(path, dtype, mode="r").view(np.ndarray)
