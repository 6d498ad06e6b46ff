"""Named arrays in files: each process writes the pieces it holds, and any mesh reads them.

    GROUP/PROCESS.safetensors    what one process wrote; of a run of one process, the whole arrays

A piece is a rectangle of an array. A file is hashed while it is written, from the memory that it is
written from, so no byte is read back and no process touches what another one holds.

`Identity` gives arrays one sha256 that is the same however they are cut into pieces, so that the
parameters of two runs can be compared across meshes and numbers of processes.

File format: https://huggingface.co/docs/safetensors. Pieces that are not whole arrays are listed in
the header's metadata, which the format leaves to its users.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_CODES = {
    "float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64",
    "int32": "I32", "uint32": "U32", "int64": "I64", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_NAMES = {code: name for name, code in _CODES.items()}


@dataclasses.dataclass(frozen=True)
class Piece:
    """A rectangle of the array `name`, which has `shape`; it begins at `start`."""

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    values: np.ndarray

    @property
    def is_whole(self) -> bool:
        return self.values.shape == self.shape


def whole_piece(name: str, array: Any) -> Piece:
    """An array as one piece, in this process's memory."""
    values = np.asarray(array)
    return Piece(name, values.shape, (0,) * values.ndim, values)


def own_pieces(arrays: Mapping[str, Any]) -> list[Piece]:
    """A copy, in the host's memory, of what this process is to write.

    Several processes may hold the same piece; exactly one of them gets it here.
    """
    held = []
    for name, array in sorted(arrays.items()):
        if getattr(array, "is_fully_addressable", True):
            held.append((name, array.shape, (0,) * array.ndim, array))
            continue
        for shard in array.addressable_shards:
            if shard.replica_id == 0:
                start = tuple(part.start or 0 for part in shard.index)
                held.append((name, array.shape, start, shard.data))
    for *_, data in held:
        if isinstance(data, jax.Array):
            data.copy_to_host_async()
    return [Piece(name, shape, start, _copy(data)) for name, shape, start, data in held]


def _copy(data: Any) -> np.ndarray:
    # A CPU's "device" memory is the host's: the next step's donation would overwrite a view of it.
    shares_memory = jax.default_backend() == "cpu" or not isinstance(data, jax.Array)
    return np.array(data) if shares_memory else np.asarray(data)


def write_pieces(path: Path, pieces: Sequence[Piece]) -> dict[str, Any]:
    """Write and flush one file. Returns its size and sha256: {"bytes", "sha256"}."""
    header: dict[str, Any] = {}
    parts, offset = {}, 0
    for piece in pieces:
        key = piece.name if piece.is_whole else f"{piece.name}@{list(piece.start)}"
        if not piece.is_whole:
            parts[key] = [piece.name, piece.shape, piece.start]
        end = offset + piece.values.nbytes
        header[key] = {
            "dtype": _CODES[piece.values.dtype.name],
            "shape": piece.values.shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps({"__metadata__": {"pieces": json.dumps(parts)}, **header}).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for data in (len(text).to_bytes(8, "little"), text, *(_bytes(p.values) for p in pieces)):
            file.write(data)
            digest.update(data)
            size += len(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _bytes(values: np.ndarray) -> Any:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


@dataclasses.dataclass(frozen=True)
class _Extent:
    """Where a piece lies in a file."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    start: tuple[int, ...]

    def read(self, dtype: np.dtype, first: int, last: int) -> np.ndarray:
        """Rows `first` to `last` of the piece; all of it when it has no axis."""
        shape = (last - first, *self.shape[1:]) if self.shape else ()
        row = math.prod(self.shape[1:]) * dtype.itemsize
        count = math.prod(shape) * dtype.itemsize
        data = np.fromfile(self.path, np.uint8, count, offset=self.offset + first * row)
        return data.view(dtype).reshape(shape)


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array in files, whichever processes wrote its pieces."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    extents: list[_Extent]

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A rectangle of the array, all of it by default; reads the rows that it needs.

        Raises:
          ValueError: the files do not hold all of it.
        """
        box = [slice(0, size) for size in self.shape]
        for axis, part in enumerate(index):
            box[axis] = slice(*part.indices(self.shape[axis])[:2])
        found = np.empty([part.stop - part.start for part in box], self.dtype)
        missing = found.size
        for extent in self.extents:
            low = [max(b.start, s) for b, s in zip(box, extent.start, strict=True)]
            high = [
                min(b.stop, s + n) for b, s, n in zip(box, extent.start, extent.shape, strict=True)
            ]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            first, last = (low[0] - extent.start[0], high[0] - extent.start[0]) if low else (0, 0)
            rows = extent.read(self.dtype, first, last)
            source = [slice(a - s, b - s) for a, b, s in zip(low, high, extent.start, strict=True)]
            target = [
                slice(a - b.start, c - b.start) for a, c, b in zip(low, high, box, strict=True)
            ]
            rows = rows[(slice(None), *source[1:])] if low else rows
            found[tuple(target)] = rows
            missing -= rows.size
        if missing:
            raise ValueError(f"{missing} elements of {self.name} are in no file")
        return found


def stored_arrays(paths: Iterable[Path]) -> dict[str, StoredArray]:
    """What the files of a group hold, by their headers.

    Raises:
      OSError, ValueError, KeyError: a file is not one of `write_pieces`.
    """
    arrays: dict[str, StoredArray] = {}
    for path in paths:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError(f"{path} has no header")
            header = json.loads(file.read(length))
        parts = json.loads(header.pop("__metadata__")["pieces"])
        for key, entry in header.items():
            shape = tuple(entry["shape"])
            name, whole, start = parts.get(key, (key, shape, (0,) * len(shape)))
            extent = _Extent(path, 8 + length + entry["data_offsets"][0], shape, tuple(start))
            dtype = jnp.dtype(_NAMES[entry["dtype"]])
            array = arrays.setdefault(name, StoredArray(name, tuple(whole), dtype, []))
            array.extents.append(extent)
    return arrays


_LANES = 4
_BLOCK = 1 << 15  # words that are worked on at a time: they and their keys stay in the cache


class Identity:
    """One sha256 of named arrays, from pieces in any order and cut.

        sum_k[name] = sum over elements of f(word ^ row key_k ^ column key_k) mod 2^32, k < 4
        sha256 of the sorted lines "name dtype shape sums"

    A word is an element's bits; its keys follow from its place in the whole array. Sums are what
    makes it independent of the cut: each process adds up the pieces it holds, and `merge` joins the
    processes' sums, 16 bytes an array. Two arrays that differ have equal sums with a probability
    of about 2^-128. That finds damage and tells runs apart; it does not hold against somebody who
    constructs a collision, and the manifest's hashes of files are not made of it.

    Source: sums of element hashes as in Bellare and Micciancio, A new paradigm for collision-free
    hashing: incrementality at reduced cost, 1997; mixing by the finaliser of MurmurHash3.
    """

    def __init__(self) -> None:
        self.sums: dict[str, list[Any]] = {}

    def add(self, piece: Piece) -> None:
        """Count one piece in. Each part of an array has to be added exactly once."""
        self.merge({piece.name: [piece.values.dtype.name, list(piece.shape), _sums(piece)]})

    def merge(self, sums: Mapping[str, Sequence[Any]]) -> None:
        """Count in the `sums` of another one, as JSON gives them back."""
        for name, (dtype, shape, lanes) in sums.items():
            before = self.sums.get(name, [dtype, shape, [0] * _LANES])[2]
            added = [(a + b) % 2**32 for a, b in zip(before, lanes, strict=True)]
            self.sums[name] = [dtype, shape, added]

    def sha256(self) -> str:
        """Hexadecimal."""
        lines = [f"{name} {json.dumps(said)}\n" for name, said in sorted(self.sums.items())]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def params_sha256(params: Mapping[str, Any]) -> str:
    """The identity of arrays that this process holds as a whole."""
    identity = Identity()
    for name, array in params.items():
        identity.add(whole_piece(name, array))
    return identity.sha256()


def _sums(piece: Piece) -> list[int]:
    with np.errstate(over="ignore"):
        return _wrapping_sums(piece)


def _wrapping_sums(piece: Piece) -> list[int]:
    words = _words(piece.values)  # [rows, columns]
    leading = [
        np.arange(start, start + size, dtype=np.uint64)
        for start, size in zip(piece.start[:-1], piece.values.shape[:-1], strict=True)
    ]
    row = np.zeros((), np.uint64)
    for size, place in zip(piece.shape[:-1], leading, strict=True):
        row = row[..., None] * np.uint64(size) + place
    per_element = words.shape[1] // max(1, piece.values.shape[-1] if piece.shape else 1)
    first = (piece.start[-1] if piece.shape else 0) * per_element
    column = np.arange(first, first + words.shape[1], dtype=np.uint64)
    keys = [
        (_keys(row.reshape(-1, 1), 3 * lane), _keys(column, 3 * lane + 1),
         _keys(column, 3 * lane + 2) | np.uint32(1))
        for lane in range(_LANES)
    ]  # fmt: skip
    sums = np.zeros(_LANES, np.uint32)
    rows = max(1, _BLOCK // max(1, words.shape[1]))
    for block in (slice(first, first + rows) for first in range(0, len(words), rows)):
        bits = _mix(words[block] * np.uint32(0x85EBCA6B))
        for lane, (row_key, column_key, factor) in enumerate(keys):
            mixed = bits ^ column_key
            mixed ^= row_key[block]
            mixed *= factor
            sums[lane] += _mix(mixed).sum(dtype=np.uint32)
    return sums.tolist()


def _mix(words: np.ndarray) -> np.ndarray:
    words ^= words >> np.uint32(16)
    return words


def _words(values: np.ndarray) -> np.ndarray:
    """The bits of the elements as uint32 [rows, columns]; one of 8 bytes is two words."""
    size = values.dtype.itemsize
    columns = values.shape[-1] if values.ndim else 1
    unsigned = np.ascontiguousarray(values).reshape(-1).view(f"u{min(size, 4)}")
    rows = values.size // columns if columns else 0
    return unsigned.astype(np.uint32, copy=False).reshape(rows, columns * max(1, size // 4))


def _keys(places: np.ndarray, seed: int) -> np.ndarray:
    """uint32 keys of places: the upper half of SplitMix64 (Steele, Lea and Flood, 2014)."""
    key = (places + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    key += np.uint64(seed) * np.uint64(0xD1342543DE82EF95)
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((key ^ (key >> np.uint64(31))) >> np.uint64(32)).astype(np.uint32)
