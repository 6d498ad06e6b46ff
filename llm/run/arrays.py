"""Named arrays on disk, in zarr format: each process writes its pieces, and any mesh reads them.

    GROUP/NAME/.zarray    shape and dtype of the array NAME, shape of its pieces
    GROUP/NAME/1.0        the elements of one piece, uncompressed; named by its place in the grid

A piece is the part of an array that one device holds, so that an array that lies whole on a device
is one piece. No process waits for another one, or reads what another one wrote.

`identity` gives arrays one sha256 that is the same however they are cut into pieces, so that the
parameters of two runs can be compared across meshes and numbers of processes.

This is the layout of Orbax without OCDBT. Orbax reads it; its own writer would have every process
wait for the others, so each writes its pieces with tensorstore, which Orbax stands on.

Source: the zarr storage specification, version 2.
"""

import asyncio
import collections
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from llm.files import check_regular, open_regular


class Piece(NamedTuple):
    """A part of the array `name`, which has `shape`: its values from the indices `start` on."""

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    values: Any


def own_pieces(arrays: Mapping[str, jax.Array]) -> list[Piece]:
    """The pieces that this process is to write, on their devices.

    Several processes may hold the same piece; exactly one of them gets it here.
    """
    return [
        Piece(name, array.shape, tuple(part.start or 0 for part in shard.index), shard.data)
        for name, array in sorted(arrays.items())
        for shard in array.addressable_shards
        if shard.replica_id == 0
    ]


def copy_to_host(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces in the host's memory, out of reach of the next step's donation."""
    for piece in pieces:
        piece.values.copy_to_host_async()
    # A CPU's device memory is the host's: `asarray` would give a view of it.
    copy = np.array if jax.default_backend() == "cpu" else np.asarray
    return [piece._replace(values=copy(piece.values)) for piece in pieces]


def write_pieces(folder: Path, group: str, pieces: Sequence[Piece]) -> dict[str, dict[str, Any]]:
    """Write pieces in the host's memory to FOLDER/GROUP, each flushed to disk.

    Returns each file's name, from `folder` on, with its size and sha256: {"bytes", "sha256"}.
    """
    files = {}
    for piece in pieces:
        extent = piece.values.shape
        # Exactly one piece is the first of its array: whoever writes it describes the array.
        first = not any(piece.start)
        array = _open(
            folder / group / piece.name,
            metadata={"shape": piece.shape, "chunks": extent, "compressor": None},
            dtype=piece.values.dtype.name,
            store_data_equal_to_fill_value=True,
            **({"create": True} if first else {"open": True, "assume_metadata": True}),
        )
        box = [slice(start, start + size) for start, size in zip(piece.start, extent, strict=True)]
        array[tuple(box)].write(piece.values).result()
        place = [str(start // size) for start, size in zip(piece.start, extent, strict=True)]
        for name in [".".join(place) or "0", *([".zarray"] * first)]:
            path = folder / group / piece.name / name
            files[str(path.relative_to(folder))] = describe_file(path)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    return files


def describe_file(path: Path) -> dict[str, Any]:
    """What the manifest says of a file: {"bytes", "sha256"}."""
    with open_regular(path) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": sha256}


# The most bytes of a .zarray; those that are written have a few hundred.
_DESCRIBED = 1 << 16


def stored_arrays(folder: Path, group: str, files: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of FOLDER/GROUP as tensorstore.TensorStore, which have a shape and a dtype.

    Tensorstore reads only the files that are named here, and never more bytes than an array has.

    Args:
      files: of the group, as `write_pieces` has returned them.
    Raises:
      OSError, ValueError: a file cannot be read, or is not what `write_pieces` writes.
    """
    sizes: dict[str, dict[str, int]] = collections.defaultdict(dict)
    for file, said in files.items():
        place, name, piece = file.split("/")
        size = sizes[name][piece] = said["bytes"]
        is_strange = place != group or (piece == ".zarray" and size > _DESCRIBED)
        if is_strange or check_regular(folder / file).st_size != size:
            raise ValueError(f"{folder / file} is not what was saved")
    form = {"compressor": None, "filters": None, "dimension_separator": "."}
    arrays = {name: _open(folder / group / name, open=True, metadata=form) for name in sizes}
    for name, array in arrays.items():
        extent = array.chunk_layout.write_chunk.shape or ()  # None: it has no axes
        counts = [-(-size // step) for size, step in zip(array.shape, extent, strict=True)]
        places = np.ndindex(*counts) if math.prod(counts) < len(sizes[name]) else ()
        of_piece = array.dtype.numpy_dtype.itemsize * math.prod(extent)
        pieces = {".".join(map(str, place)) or "0": of_piece for place in places}
        if pieces | {".zarray": sizes[name].get(".zarray")} != sizes[name]:
            raise ValueError(f"{folder / name} does not have the pieces that its .zarray describes")
    return arrays


def read_arrays(
    folder: Path, shardings: Mapping[str, jax.sharding.Sharding]
) -> dict[str, jax.Array]:
    """Arrays of a group on their devices; a process reads what its own devices hold."""
    import logging

    import orbax.checkpoint as ocp  # takes most of a second
    import tensorstore

    # Orbax warns of what is done here on purpose, and logs the errors that it then raises.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    root = folder.resolve()
    shared = {"is_ocdbt_checkpoint": False, "ts_context": tensorstore.Context()}
    infos = [
        ocp.type_handlers.ParamInfo(name=name, parent_dir=root, path=root / name, **shared)
        for name in shardings
    ]
    wanted = [ocp.ArrayRestoreArgs(sharding=sharding) for sharding in shardings.values()]
    handler = ocp.type_handlers.ArrayHandler(array_metadata_store=None)
    # In a thread of its own: a notebook has an event loop already.
    with ThreadPoolExecutor(1) as thread:
        arrays = thread.submit(asyncio.run, handler.deserialize(infos, wanted)).result()
    return dict(zip(shardings, arrays, strict=True))


def _open(folder: Path, **options: Any) -> Any:
    import tensorstore  # takes a tenth of a second

    file = {"driver": "file", "path": f"{folder.resolve()}/"}
    # `write_pieces` flushes each file once. No other process writes it, so it needs no lock, which
    # some file systems do not have, and which tensorstore awaits by a clock that may jump.
    context = {"file_io_sync": False, "file_io_locking": {"mode": "none"}}
    spec = {"driver": "zarr", "kvstore": file, "context": context, **options}
    return tensorstore.open(spec).result()


_LANES = 4
_BLOCK = 1 << 15  # words that are worked on at a time: they and their keys stay in the cache


def element_sums(pieces: Iterable[Piece]) -> list[list[Any]]:
    """What `identity` is made of: [name, dtype, shape, sums] of each piece, as JSON has it."""
    return [
        [piece.name, piece.values.dtype.name, list(piece.shape), _sums(piece)] for piece in pieces
    ]


def identity(sums: Iterable[Sequence[Any]]) -> str:
    """One sha256 of named arrays, given the `element_sums` of all their pieces, in any order.

        sum_k[name] = sum over elements of f(word ^ row key_k ^ column key_k) mod 2^32, k < 4
        sha256 of the sorted lines "name dtype shape sums"

    A word is an element's bits; its keys follow from its place in the whole array. A sum does not
    depend on how the array is cut: each process adds up its own pieces, 16 bytes each. Two arrays
    that differ have equal sums with a probability of about 2^-128. This finds damage and tells runs
    apart. It does not stop somebody who constructs a collision; the manifest's hashes do.

    Source: sums of element hashes as in Bellare and Micciancio, A new paradigm for collision-free
    hashing: incrementality at reduced cost, 1997; mixing by the finaliser of MurmurHash3.
    """
    arrays: dict[str, list[Any]] = {}
    for name, dtype, shape, lanes in sums:
        array = arrays.setdefault(name, [dtype, shape, [0] * _LANES])
        array[2] = [(a + b) % 2**32 for a, b in zip(array[2], lanes, strict=True)]
    lines = [f"{name} {json.dumps(array)}\n" for name, array in sorted(arrays.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@np.errstate(over="ignore")
def _sums(piece: Piece) -> list[int]:
    words = _words(np.asarray(piece.values))  # [rows, columns]
    row = np.zeros(1, np.uint64)
    for size, start, extent in zip(piece.shape[:-1], piece.start, piece.values.shape, strict=False):
        row = row[:, None] * np.uint64(size) + np.arange(start, start + extent, dtype=np.uint64)
        row = row.reshape(-1)
    per_element = words.shape[1] // max(1, piece.values.shape[-1] if piece.shape else 1)
    first = (piece.start[-1] if piece.shape else 0) * per_element
    column = np.arange(first, first + words.shape[1], dtype=np.uint64)
    keys = [
        (_keys(row[:, None], 3 * lane), _keys(column, 3 * lane + 1),
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
