"""Documents to token ids: in pieces, by threads, in order."""

import collections
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np

from llm.text.documents import Document
from llm.text.splits import is_held_out
from llm.text.tokenizer import Ids, Tokenizer, utf8_length

# One task of a tokenising thread: large enough that handing it over costs little in comparison.
_TASK_CHARACTERS = 2**18

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Piece(NamedTuple):
    """A piece of a document, the stream it goes to, and whether it is the first or the last."""

    stream: str
    document: str
    text: str
    begins: bool
    ends: bool


def marked_pieces(
    documents: Iterable[Document], validation: str, encoder: Tokenizer
) -> Iterator[Piece]:
    kind, _, fraction = validation.partition(":")
    stream = "text"
    for document in documents:
        if kind == "documents":
            held_out = is_held_out(document.sha256, float(fraction))
            stream = "validation" if held_out else "train"
        begins = True
        pieces = _encodable(document.pieces, encoder)
        for text, following in itertools.pairwise(itertools.chain(pieces, [""])):
            yield Piece(stream, document.name, text, begins, ends=not following)
            begins = False


def _encodable(pieces: Iterable[str], encoder: Tokenizer) -> Iterator[str]:
    """The same text in pieces that the tokenizer may encode one by one."""
    held: list[str] = []
    for piece in pieces:
        cut = encoder.last_cut(piece)
        held.append(piece[:cut] if cut else piece)
        if cut:
            yield "".join(held)
            held = [piece[cut:]] if cut < len(piece) else []
    if held:
        yield "".join(held)


def encoded(
    pieces: Iterable[Piece], encoder: Tokenizer, workers: int
) -> Iterator[tuple[Piece, Ids, int, int]]:
    """Each piece in order, its ids, and its size in bytes. A beginning and an end of text, if the
    tokenizer has them, stand before and behind each document.
    """
    end = [] if encoder.end_of_text is None else [encoder.end_of_text]
    end_ids = np.array(end, np.int32)

    def encode(piece: Piece) -> tuple[Piece, Ids, int, int]:
        ids = encoder.encode(piece.text, continues=not piece.begins)
        ids = encoder.begun(ids) if piece.begins else ids
        ids = np.concatenate([ids, end_ids]) if piece.ends else ids
        return piece, ids, utf8_length(piece.text), encoder.changed(piece.text)

    tasks = _in_order(
        lambda task: [encode(piece) for piece in task], _grouped(pieces), workers or _cores()
    )
    return itertools.chain.from_iterable(tasks)


def _grouped(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    group: list[Piece] = []
    characters = 0
    for piece in pieces:
        group.append(piece)
        characters += len(piece.text)
        if characters >= _TASK_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _in_order(
    function: Callable[[_Item], _Result], items: Iterable[_Item], workers: int
) -> Iterator[_Result]:
    """The function's result for each item, in order, computed by threads.

    Threads suffice, because tiktoken and NumPy release the interpreter's lock, and threads copy
    nothing. At most two items per thread are in flight, so memory is bounded.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="tokenise")
    pending: collections.deque[Future[_Result]] = collections.deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _cores() -> int:
    """How many cores this process may use, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
