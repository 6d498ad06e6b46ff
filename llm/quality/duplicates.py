"""Find documents that are equal to, or nearly, a document before them.

Exact duplicates have the same text, byte for byte (its sha256). Near duplicates share most of their
runs of five words (llm/quality/ngrams.py): the Jaccard similarity |A and B| / |A or B| of their
sets of runs is at least SIMILAR. MinHash proposes pairs: 112 minima in 14 bands of 8 rows, so that
two documents of similarity s share a band with probability 1 - (1 - s^8)^14. Each proposed pair is
then verified by its true similarity, from the sets themselves.

A document is a duplicate only of one that is kept and stands before it. So what is added behind
changes nothing before it, and similarity is never passed on from one document to the next.

    Sketch            one pass over documents: a folder with hashes, bands and sets, on disk
    find_duplicates   from some sketches, in order

Sources: Broder 1997, "On the resemblance and containment of documents"; Leskovec, Rajaraman &
Ullman, "Mining of Massive Datasets", 3.4; the bands are those of Penedo et al. 2024, "The FineWeb
Datasets", the threshold is that of Lee et al. 2022, "Deduplicating Training Data Makes Language
Models Better".
"""

import collections
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llm.quality.ngrams import Hashes, Numbers, drawn, in_batches, mixed, runs_of, units_of

SHINGLE = 5
BANDS, ROWS = 14, 8
SIMILAR = 0.8

# Increase it when equal documents would get other sketches.
FORMAT = 2

# Characters whose units are computed together: they fit into a core's cache.
_BATCH = 2**18
# A document is compared with so many others at most, those first that share the most bands with
# it. Without a bound, a million pages of one template would be compared each with each.
_MOST_COMPARED = 100

_Shingles = npt.NDArray[np.uint32]
# A row of a document: where its name and its set end, the start of its sha256, its bands.
_EXACT = [("name_end", "<i8"), ("sha256", "<u8", 2)]
_NEAR = [*_EXACT, ("end", "<i8"), ("bands", "<u8", BANDS)]
_DOCUMENTS, _NAMES, _SETS = "documents.bin", "names.txt", "sets.bin"
_ROWS_AT_ONCE = 2**16


class Duplicates(NamedTuple):
    """Documents that repeat others, by their numbers over all sketches.

    Attributes:
      exact, near: int64 [n, 2], a document and the kept one before it.
      similarity: [n] of the near ones, at least SIMILAR.
    """

    exact: Numbers
    near: Numbers
    similarity: npt.NDArray[np.float64]


class Sketch(AbstractContextManager):
    """Writes what `find_duplicates` needs to know of documents into a folder, in bounded memory.

    Args:
      near: for near duplicates too. Their sets take four bytes on disk for each word, or for each
        character of a script without spaces.
    """

    def __init__(self, folder: Path, *, near: bool):
        self._near, self._files = near, ExitStack()
        self._documents, self._names, self._sets = (
            self._files.enter_context(open(folder / name, "wb"))  # noqa: SIM115
            for name in (_DOCUMENTS, _NAMES, _SETS)
        )
        self._waiting: list[tuple[str, bytes, bytes]] = []
        self._characters = self._name_end = self._end = 0

    def add(self, text: str, sha256: str, name: str = "") -> None:
        """The next document, and the hash of its text. For exact duplicates the hash suffices."""
        self._waiting.append(
            (text if self._near else "", bytes.fromhex(sha256[:32]), name.encode())
        )
        self._characters += len(text)
        if self._characters >= _BATCH or len(self._waiting) >= _ROWS_AT_ONCE:
            self._write()

    def __exit__(self, *failed: object) -> None:
        with self._files:
            if failed[0] is None:
                self._write()

    def _write(self) -> None:
        if not self._waiting:
            return
        texts, hashes, names = zip(*self._waiting, strict=True)
        rows = np.zeros(len(texts), _NEAR if self._near else _EXACT)
        rows["sha256"] = np.frombuffer(b"".join(hashes), "<u8").reshape(-1, 2)
        rows["name_end"] = self._name_end + np.cumsum([*map(len, names)])
        self._name_end += self._names.write(b"".join(names))
        if self._near:
            shingles, sizes = shingles_of(texts)
            rows["bands"] = bands_of(shingles, sizes)
            rows["end"] = self._end + np.cumsum(sizes)
            self._end += len(shingles)
            self._sets.write(shingles.astype("<u4").tobytes())
        self._documents.write(rows.tobytes())
        self._waiting, self._characters = [], 0


def shingles_of(texts: Sequence[str]) -> tuple[_Shingles, Numbers]:
    """The set of each text's runs of SHINGLE units, as hashes, sorted; and the size of each set."""
    keys = []
    for numbers, batch in in_batches(texts, _BATCH):
        units = units_of(batch)
        hashes, first, _ = runs_of(units.hashes, units.text, SHINGLE)
        of = numbers[units.text[first]]
        keys.append(of.astype(np.uint64) << np.uint64(32) | hashes >> np.uint64(32))
    every = np.sort(np.concatenate(keys)) if keys else np.empty(0, np.uint64)
    is_new = np.ones(len(every), bool)
    is_new[1:] = every[1:] != every[:-1]
    every = every[is_new]
    return every.astype(np.uint32), np.bincount(
        (every >> np.uint64(32)).astype(np.int64), minlength=len(texts)
    )


def bands_of(shingles: _Shingles, sizes: Numbers) -> npt.NDArray[np.uint64]:
    """uint64 [documents, BANDS]: a hash of the ROWS minima of each band. 0 for an empty set.

    A minimum is that of a x + b modulo 2^32 over the hashes x of a set, with another a and b for
    each; the hashes are random, so every such permutation finds each element equally often.
    """
    bands = np.zeros((len(sizes), BANDS), np.uint64)
    some = np.flatnonzero(sizes)
    if not len(some):
        return bands
    starts = (np.cumsum(sizes) - sizes)[some]
    factors, terms = (drawn(2 * BANDS * ROWS) >> np.uint64(32)).astype(np.uint32).reshape(2, -1)
    values = np.empty_like(shingles)
    for row, (factor, term) in enumerate(zip(factors | np.uint32(1), terms, strict=True)):
        np.multiply(shingles, factor, out=values)
        np.add(values, term, out=values)
        smallest = np.minimum.reduceat(values, starts)
        bands[some, row // ROWS] = mixed(bands[some, row // ROWS] + smallest + np.uint64(1))
    return bands


class Sketched:
    """Sketches that were written, as one row of documents.

    Attributes:
      begins: the number of the first document of each sketch, and of all documents.
    """

    def __init__(self, folders: Sequence[Path], near: bool):
        self._folders, self._kind = folders, np.dtype(_NEAR if near else _EXACT)
        sizes = [(one / _DOCUMENTS).stat().st_size // self._kind.itemsize for one in folders]
        self.begins = np.cumsum([0, *sizes])

    def part_of(self, number: int) -> int:
        """Which sketch has the document."""
        return int(np.searchsorted(self.begins, number, side="right")) - 1

    def name(self, number: int) -> str:
        """The name of a document."""
        part = self.part_of(number)
        within = number - int(self.begins[part])
        first = max(within - 1, 0)
        rows = np.fromfile(
            self._folders[part] / _DOCUMENTS,
            self._kind,
            within + 1 - first,
            offset=first * self._kind.itemsize,
        )
        start, stop = int(rows["name_end"][0]) * (within > 0), int(rows["name_end"][-1])
        with open(self._folders[part] / _NAMES, "rb") as names:
            names.seek(start)
            return names.read(stop - start).decode()

    def column(self, name: str, index: int | None = None) -> npt.NDArray:
        """A field of every document; of a field with several numbers, the one of that index."""
        parts = [np.empty(0, self._kind[name].base)]
        for folder in self._folders:
            with open(folder / _DOCUMENTS, "rb") as file:
                while len(rows := np.fromfile(file, self._kind, _ROWS_AT_ONCE)):
                    field = rows[name] if index is None else rows[name][:, index]
                    parts.append(field.copy())
        return np.concatenate(parts)

    def shingles(self, number: int, start: int, stop: int) -> _Shingles:
        """The set of a document, which lies there in its sketch."""
        folder = self._folders[self.part_of(number)]
        return np.fromfile(folder / _SETS, "<u4", stop - start, offset=4 * start)


def find_duplicates(folders: Sequence[Path], *, near: bool) -> Duplicates:
    """The duplicates among the documents of some sketches, which are numbered in their order.

    Memory: 150 bytes for each document, and 170 more for one that shares a band with another.
    """
    sketched = Sketched(folders, near)
    exact = _exact(sketched.column("sha256", 0), sketched.column("sha256", 1))
    if not near:
        return Duplicates(exact, np.empty((0, 2), np.int64), np.empty(0))
    ends = sketched.column("end")
    starts = np.concatenate([[0], ends])[:-1]
    starts[sketched.begins[:-1][sketched.begins[:-1] < len(starts)]] = 0
    is_left = ends > starts
    is_left[exact[:, 0]] = False
    left = np.flatnonzero(is_left)
    buckets = _buckets(sketched, left)
    shares = (buckets >= 0).any(0)
    left, buckets = left[shares], buckets[:, shares]
    pairs, similarities = [], []
    heads = np.full((BANDS, buckets.max(initial=0) + 1), -1, np.int32)
    behind = np.full(buckets.shape, -1, np.int32)  # chains of the kept documents of a bucket

    def shingles(place: int) -> _Shingles:
        number = left[place]
        return sketched.shingles(number, starts[number], ends[number])

    sizes = (ends - starts)[left]
    for place in range(len(left)):
        own = None
        for other in _proposed(heads, behind, buckets[:, place]):
            small, large = sorted((sizes[place], sizes[other]))
            if small < SIMILAR * large:
                continue
            own = shingles(place) if own is None else own
            similarity = jaccard(own, shingles(other))
            if similarity >= SIMILAR:
                pairs.append((left[place], left[other]))
                similarities.append(similarity)
                break
        else:
            bands = np.flatnonzero(buckets[:, place] >= 0)
            behind[bands, place] = heads[bands, buckets[bands, place]]
            heads[bands, buckets[bands, place]] = place
    return Duplicates(exact, np.array(pairs, np.int64).reshape(-1, 2), np.array(similarities))


def jaccard(one: _Shingles, other: _Shingles) -> float:
    """|A and B| / |A or B| of two sorted sets."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def _exact(high: Hashes, low: Hashes) -> Numbers:
    """int64 [n, 2]: each document whose hash occurred before, and the first that has it."""
    order = np.lexsort((low, high))  # stable: the first document of a hash comes first
    high, low = high[order], low[order]
    opens = np.ones(len(order), bool)
    opens[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    firsts = order[opens][np.cumsum(opens) - 1]
    pairs = np.stack([order, firsts], axis=1)[~opens]
    return pairs[np.argsort(pairs[:, 0])]


def _buckets(sketched: Sketched, numbers: Numbers) -> npt.NDArray[np.int32]:
    """int32 [BANDS, n]: the bucket of each document in each band; -1 if it is alone there."""
    buckets = np.full((BANDS, len(numbers)), -1, np.int32)
    for band in range(BANDS):
        values = sketched.column("bands", band)[numbers]
        order = np.argsort(values, kind="stable")
        same = np.diff(values[order]) == 0
        shared = np.zeros(len(order), bool)
        shared[1:] |= same
        shared[:-1] |= same
        opens = shared.copy()
        opens[1:] &= ~same
        buckets[band, order[shared]] = np.cumsum(opens)[shared] - 1
    return buckets


def _proposed(
    heads: npt.NDArray[np.int32], behind: npt.NDArray[np.int32], buckets: npt.NDArray[np.int32]
) -> list[int]:
    """The kept documents that share a bucket with one, those with the most buckets first."""
    shared: collections.Counter[int] = collections.Counter()
    for band in np.flatnonzero(buckets >= 0):
        place, steps = int(heads[band, buckets[band]]), 0
        while place >= 0 and steps < _MOST_COMPARED:
            shared[place] += 1
            place, steps = int(behind[band, place]), steps + 1
    ranked = sorted(shared.items(), key=lambda item: (-item[1], item[0]))
    return [place for place, _ in ranked[:_MOST_COMPARED]]
