"""Named arrays in files: each process writes the pieces it holds, and any mesh reads them.

    GROUP/PROCESS/              what one process wrote with Orbax, a key for each piece
    GROUP/PROCESS/pieces.json   key -> the array it is a part of, and where it begins

A piece is a rectangle of an array; a run of one process has whole arrays. Every process uses Orbax
by itself, in a folder of its own, so no process waits for another one or reads what another one
wrote. Orbax's handler is called without its Checkpointer, whose barriers go by the wall clock.

`Identity` gives arrays one sha256 that is the same however they are cut into pieces, so that the
parameters of two runs can be compared across meshes and numbers of processes.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PIECES = "pieces.json"
# Orbax is asked for about this much at once: one call for each array would take milliseconds each.
_READ_BYTES = 2**28

Box = Sequence[slice]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a piece lies: a rectangle of the array `name`, which has `shape`, from `start` on."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: tuple[int, ...]
    extent: tuple[int, ...]

    @property
    def key(self) -> str:
        return self.name if self.extent == self.shape else f"{self.name}@{list(self.start)}"

    @property
    def bytes(self) -> int:
        return math.prod(self.extent) * jnp.dtype(self.dtype).itemsize

    def overlap(self, box: Box) -> list[slice] | None:
        """The part of a rectangle of the array that lies in this piece; None if there is none."""
        common = [
            slice(max(one.start, start), min(one.stop, start + size))
            for one, start, size in zip(box, self.start, self.extent, strict=True)
        ]
        return common if all(part.start < part.stop for part in common) else None


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece in memory."""

    place: Place
    values: np.ndarray

    @classmethod
    def of(
        cls, name: str, shape: Sequence[int], start: Sequence[int], values: np.ndarray
    ) -> "Piece":
        place = Place(name, tuple(shape), values.dtype.name, tuple(start), values.shape)
        return cls(place, values)


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
    return [Piece.of(name, shape, start, _copy(data)) for name, shape, start, data in held]


def _copy(data: Any) -> np.ndarray:
    # A CPU's "device" memory is the host's: the next step's donation would overwrite a view of it.
    shares_memory = jax.default_backend() == "cpu" or not isinstance(data, jax.Array)
    return np.array(data) if shares_memory else np.asarray(data)


def write_pieces(folder: Path, pieces: Sequence[Piece]) -> dict[str, dict[str, Any]]:
    """Write pieces into a new folder, flushed to disk.

    Returns each file's name, from `folder` on, with its size and sha256: {"bytes", "sha256"}.
    """
    folder.mkdir(parents=True)
    if pieces:
        handler = _handler()
        tree = {piece.place.key: piece.values for piece in pieces}
        handler.save(folder.resolve(), args=_orbax().args.PyTreeSave(tree))
    places = {piece.place.key: dataclasses.astuple(piece.place) for piece in pieces}
    (folder / PIECES).write_text(json.dumps(places))
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": sha256}
    return files


def stored_places(folder: Path) -> dict[str, Place]:
    """key -> where the piece lies, of a folder that `write_pieces` made.

    Raises:
      OSError, ValueError, TypeError: the folder is not such a folder.
    """
    stored = json.loads((folder / PIECES).read_bytes())
    return {
        key: Place(name, tuple(shape), dtype, tuple(start), tuple(extent))
        for key, (name, shape, dtype, start, extent) in stored.items()
    }


def read_pieces(places: Iterable[tuple[Path, Place]]) -> Iterator[Piece]:
    """The pieces at these places, given as (folder, place), in the order that they are given."""
    batch: list[tuple[Path, Place]] = []
    for one in places:
        batch.append(one)
        if sum(place.bytes for _, place in batch) >= _READ_BYTES:
            yield from _read_batch(batch)
            batch = []
    yield from _read_batch(batch)


def _read_batch(batch: Sequence[tuple[Path, Place]]) -> Iterator[Piece]:
    ocp, held = _orbax(), {}
    for folder, group in itertools.groupby(sorted(batch, key=_folder_of), _folder_of):
        keys = [place.key for _, place in group]
        arguments = ocp.args.PyTreeRestore(
            item=dict.fromkeys(keys, 0),
            restore_args={key: ocp.RestoreArgs(restore_type=np.ndarray) for key in keys},
            partial_restore=True,
        )
        held[folder] = _handler().restore(folder.resolve(), args=arguments)
    for folder, place in batch:
        yield Piece(place, np.asarray(held[folder].pop(place.key)))


def _folder_of(one: tuple[Path, Place]) -> Path:
    return one[0]


def cut(pieces: Sequence[Piece], box: Box) -> np.ndarray:
    """A rectangle of an array, from the pieces that overlap it, in memory of its own.

    Raises:
      ValueError: the pieces do not hold all of it.
    """
    found = np.empty([part.stop - part.start for part in box], pieces[0].values.dtype)
    missing = found.size
    for piece in pieces:
        common = piece.place.overlap(box)
        if common is None:
            continue
        source = tuple(
            slice(part.start - start, part.stop - start)
            for part, start in zip(common, piece.place.start, strict=True)
        )
        target = tuple(
            slice(part.start - one.start, part.stop - one.start)
            for part, one in zip(common, box, strict=True)
        )
        found[target] = piece.values[source]
        missing -= found[target].size
    if missing:
        raise ValueError(f"{missing} elements of {pieces[0].place.name} are in no file")
    return found


def box_of(shape: Sequence[int], index: tuple[slice, ...] = ()) -> list[slice]:
    """An index of slices with every bound written out; the whole array by default."""
    whole = [*index, *itertools.repeat(slice(None), len(shape) - len(index))]
    return [slice(*part.indices(size)[:2]) for part, size in zip(whole, shape, strict=True)]


@functools.cache
def _orbax() -> Any:
    """Imported when it is needed, which takes most of a second."""
    import logging

    import orbax.checkpoint as ocp

    # Orbax warns of what is done here on purpose, and logs the errors that it then raises.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    return ocp


def _handler() -> Any:
    """Orbax for this process alone; a folder for each array, which needs no merging."""
    ocp, process = _orbax(), jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"only{process}"
    )
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, multiprocessing_options=alone, type_handler_registry=_registry()
    )


@functools.cache
def _registry() -> Any:
    """Orbax's handler of NumPy arrays, which writes in process 0 alone, made to write in any."""
    import tensorstore

    type_handlers: Any = _orbax().type_handlers
    arrays: Any = type_handlers.NumpyHandler

    class AnyProcess(arrays):
        async def serialize(self, values, infos, args=None):
            for value, info in zip(values, infos, strict=True):
                spec = {
                    "driver": "zarr",
                    "kvstore": {"driver": "file", "path": f"{info.parent_dir / info.name}/"},
                    "metadata": {"compressor": None},
                }
                array = await tensorstore.open(
                    spec, dtype=value.dtype.name, shape=value.shape, create=True, open=True
                )
                await array.write(value)
            return []

    return type_handlers.create_type_handler_registry((np.ndarray, AnyProcess()))


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
        place = piece.place
        self.merge({place.name: [place.dtype, list(place.shape), _sums(piece)]})

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
        values = np.asarray(array)
        identity.add(Piece.of(name, values.shape, (0,) * values.ndim, values))
    return identity.sha256()


def _sums(piece: Piece) -> list[int]:
    with np.errstate(over="ignore"):
        return _wrapping_sums(piece)


def _wrapping_sums(piece: Piece) -> list[int]:
    words = _words(piece.values)  # [rows, columns]
    leading = [
        np.arange(start, start + size, dtype=np.uint64)
        for start, size in zip(piece.place.start[:-1], piece.values.shape[:-1], strict=True)
    ]
    row = np.zeros((), np.uint64)
    for size, place in zip(piece.place.shape[:-1], leading, strict=True):
        row = row[..., None] * np.uint64(size) + place
    per_element = words.shape[1] // max(1, piece.values.shape[-1] if piece.place.shape else 1)
    first = (piece.place.start[-1] if piece.place.shape else 0) * per_element
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
