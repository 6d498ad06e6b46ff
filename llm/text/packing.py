"""Whole documents packed into windows: which go together, and how such a window reads.

Documents longer than the context are cut at it. The pieces are then packed best fit first, the
longest before the others (best-fit decreasing, as in Ding et al. 2024, "Fewer Truncations Improve
Language Modeling"): each piece goes into the fullest window that still has room for it.

What is predicted: each token of a document but its first, given what stands before it in the
document; after an end of text, where the tokenizer has one and no beginning of text, the first
token too. A piece goes on where the one before it ended, so that no target is lost or counted
twice.

    T context  P pieces  W windows
"""

import bisect
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from llm.text.cache import built_once
from llm.text.corpus import Source, TokenizedCorpus
from llm.text.splits import TokenSplit
from llm.text.tokenizer import sha256_of_json
from llm.text.windows import Batch, Words

# first: where a piece's tokens begin in the split. tokens: how many; the last is a target alone.
# opened: an end of text stands before them, as their first input.
# closed: the last of them ends a document.
PIECE = np.dtype([("first", "<i8"), ("tokens", "<i4"), ("opened", "?"), ("closed", "?")])

# Increase it when the same documents would be packed in another way.
FORMAT = 1

Pieces = npt.NDArray[Any]  # PIECE [P]


def cut_documents(starts: npt.NDArray[np.int64], size: int, context: int, opens: bool) -> Pieces:
    """The pieces of a split's documents, in order; those without a target are left out.

    Args:
      starts: int64, the first token of each document of the split, rising; the split may begin
        within a document, whose rest comes before the first.
      size: tokens of the split.
      context: T, how many tokens a piece predicts at most.
      opens: an end of text before a document is its first input.
    """
    if not len(starts) or starts[0]:
        starts = np.concatenate([[0], starts])
        goes_on = True
    else:
        goes_on = False
    opened = np.full(len(starts), opens)
    opened[0] &= not goes_on
    # With the end of text that opens it, a document of n tokens has n targets, else n - 1.
    targets = np.diff(starts, append=size) - ~opened
    pieces_of = -(-targets // context)
    document = np.repeat(np.arange(len(starts)), pieces_of)
    number = np.arange(len(document)) - np.repeat(np.cumsum(pieces_of) - pieces_of, pieces_of)
    pieces = np.empty(len(document), PIECE)
    pieces["opened"] = opened[document] & (number == 0)
    # What ends with the split may go on behind it.
    last = document == len(starts) - 1
    pieces["closed"] = (number == pieces_of[document] - 1) & ~last
    # Input t of a document is its token t, or the one before if an end of text comes first.
    before = number * context
    pieces["first"] = starts[document] + np.maximum(before - opened[document], 0)
    pieces["tokens"] = np.minimum(targets[document] - before, context) + ~pieces["opened"]
    return pieces


def pack(pieces: Pieces, context: int, opens: bool) -> tuple[Pieces, npt.NDArray[np.int64]]:
    """The pieces window by window, and where each window's pieces begin: int64 [W + 1].

    A window has T + 1 places for tokens. The end of text that closes a document is, in the same
    place, the first input of the next one that it opens, so that most documents take as many places
    as they have tokens, and one place is left for the first end of text.
    """
    costs = pieces["tokens"].astype(np.int64)
    if opens:
        costs = np.minimum(costs + ~pieces["closed"], context)
    window_of = best_fit(costs, context if opens else context + 1)
    order = np.lexsort((pieces["opened"], window_of))
    counts = np.bincount(window_of)
    return pieces[order], np.concatenate([[0], np.cumsum(counts)])


def best_fit(costs: npt.NDArray[np.int64], capacity: int) -> npt.NDArray[np.int64]:
    """The window of each piece: int64 [P], numbered from 0.

    Pieces of one size and windows of one room are interchangeable, so that they are placed many at
    a time: the time grows with the sizes that occur, not with the pieces.

    Args:
      costs: int64 [P], the room that each piece takes, in [1, capacity].
    """
    window_of = np.empty(len(costs), np.int64)
    by_cost = np.argsort(-costs, kind="stable")
    windows = 0
    rooms: list[int] = []  # rising: the rooms that windows have left
    with_room: dict[int, list[npt.NDArray[np.int64]]] = {}
    ends = np.flatnonzero(np.diff(costs[by_cost], append=0)) + 1
    for start, end in itertools.pairwise([0, *ends.tolist()]):
        cost, todo = int(costs[by_cost[start]]), by_cost[start:end]
        while len(todo):
            at = bisect.bisect_left(rooms, cost)
            room = rooms[at] if at < len(rooms) else capacity
            each = min(room // cost, len(todo))  # the fullest window takes them until it is full
            most = len(todo) // each
            if at < len(rooms):
                chosen = with_room[room].pop()
                if len(chosen) > most:
                    with_room[room].append(chosen[most:])
                    chosen = chosen[:most]
                if not with_room[room]:
                    del with_room[room], rooms[at]
            else:
                chosen = windows + np.arange(most)
                windows += most
            window_of[todo[: len(chosen) * each]] = np.repeat(chosen, each)
            todo = todo[len(chosen) * each :]
            if left := room - each * cost:
                if left not in with_room:
                    bisect.insort(rooms, left)
                with_room.setdefault(left, []).append(chosen)
    return window_of


class PackedWindows:
    """The windows of a split whose documents are packed: the same in each epoch, in another order.

    Args:
      pieces, ends: as `pack` gives them.
      end_of_text: what opens documents; None if nothing does.
    """

    def __init__(
        self,
        split: TokenSplit,
        pieces: Pieces,
        ends: npt.NDArray[np.int64],
        context: int,
        end_of_text: int | None,
    ):
        self._split, self._pieces, self._ends = split, pieces, ends
        self._context, self._end_of_text = context, end_of_text
        self.per_epoch = len(ends) - 1

    @property
    def padding(self) -> float:
        """The share of all inputs that predict nothing."""
        pieces = self._pieces
        targets = int(pieces["tokens"].sum()) - int(np.count_nonzero(~pieces["opened"]))
        return 1 - targets / (self.per_epoch * self._context)

    def read(self, keys: Words, windows: Words) -> Batch:
        """As `rows`."""
        return self.rows(windows.astype(np.int64))

    def parts(self, keys: Words, windows: Words) -> list[list[tuple[int, int]]]:
        """The pieces of documents, without the end of text that opens one."""
        found = (self._of(window) for window in windows.tolist())
        return [[(first, count) for first, count, _, _ in pieces] for pieces in found]

    def rows(self, windows: npt.NDArray[np.int64]) -> Batch:
        """tokens int32 [n, T + 1], weights float32 [n, T], segments int32 [n, T].

        The segments are numbered from 1; padding is segment 0.
        """
        T = self._context
        tokens = np.zeros((len(windows), T + 1), np.int32)
        weights = np.zeros((len(windows), T), np.float32)
        segments = np.zeros((len(windows), T), np.int32)
        for row, window in enumerate(windows.tolist()):
            place, closed = 0, False  # the next free place; whether an end of text is before it
            for number, (first, count, opened, closes) in enumerate(self._of(window), start=1):
                begin = place - (opened and closed)
                place = begin + opened
                if opened and self._end_of_text is not None:
                    tokens[row, begin] = self._end_of_text
                tokens[row, place : place + count] = self._split.read(first, count)
                place, closed = place + count, closes
                weights[row, begin : place - 1] = 1.0
                segments[row, begin:place] = number
        return Batch(tokens, weights, segments)

    def _of(self, window: int) -> list[tuple[int, int, bool, bool]]:
        pieces: list[Any] = self._pieces[self._ends[window] : self._ends[window + 1]].tolist()
        return pieces


def packed(corpus: TokenizedCorpus, source: Source, part: str, context: int) -> PackedWindows:
    """The packed windows of a source's split, planned once and kept beside the shards.

    Args:
      part: "train" or "validation".
    """
    split = source.train if part == "train" else source.validation
    tokenizer = corpus.tokenizer
    opener = tokenizer.end_of_text if tokenizer.begin_of_text is None else None
    opens = opener is not None
    decides = {
        "format": FORMAT,
        "tokens": source.fingerprint,
        "part": part,
        "context": context,
        "opens": opens,
    }
    folder = corpus.folder.parent / "packings" / sha256_of_json(decides)[:32]
    with built_once(folder) as partial:
        if partial is not None:
            starts = split.document_starts()
            pieces = cut_documents(starts, len(split), context, opens)
            pieces, ends = pack(pieces, context, opens)
            np.save(partial / "pieces.npy", pieces)
            np.save(partial / "ends.npy", ends)
    pieces, ends = (np.load(folder / f"{x}.npy", mmap_mode="r") for x in ("pieces", "ends"))
    return PackedWindows(split, pieces, ends, context, opener)
