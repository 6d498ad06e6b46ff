"""Which tokens train and which are held out; a split as a row of tokens.

`documents:F` holds out documents by the hash of their text, so that equal documents land on one
side and new documents move none of the old. `tail:F` holds out the end of the text, as nanoGPT's
shakespeare_char does.
"""

import bisect
import itertools
from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llm.errors import DataError, UsageError
from llm.text.stream import TokenStream, remedy
from llm.text.tokenizer import Ids

# A corpus shorter than this is no corpus for any context length that people use: below it the
# data are at fault, above it the setting.
SMALLEST_CORPUS_TOKENS = 256


# The system maps at most 65,530 files into one process.
_MOST_MAPPED = 2**13


class Span(NamedTuple):
    """The tokens [start, stop) of a stream."""

    stream: TokenStream
    start: int
    stop: int


class TokenSplit:
    """Spans of streams, one after the other, as one row of tokens.

    No document goes on from one stream into the next.
    """

    def __init__(self, spans: Iterable[Span]):
        self.spans = tuple(span for span in spans if span.stop > span.start)
        sizes = (span.stop - span.start for span in self.spans)
        self._begins = [0, *itertools.accumulate(sizes)]  # one more than there are spans
        self._mapped: dict[int, npt.NDArray] = {}

    def __len__(self) -> int:
        return self._begins[-1]

    def part(self, start: int, stop: int) -> "TokenSplit":
        """The tokens [start, stop) of this split as a split."""
        return TokenSplit(
            Span(
                span.stream,
                span.start + max(0, start - begin),
                span.start + min(span.stop - span.start, stop - begin),
            )
            for span, begin in zip(self.spans, self._begins, strict=False)
        )

    def read(self, start: int, count: int) -> Ids:
        """int32 [count]: the tokens from `start` on, which must exist."""
        if not 0 <= start <= start + count <= len(self):
            raise IndexError(f"tokens [{start}, {start + count}) of a split of {len(self)}")
        return self.windows(np.array([start]), count)[0]

    def windows(self, starts: np.ndarray, length: int) -> Ids:
        """int32 [len(starts), length]: the tokens from each start on, the split taken as a ring.

        Args:
          starts: int [n], each in [0, len(self)).
          length: at most len(self).
        Raises:
          DataError: an id is not in the vocabulary. Its embedding would be NaN, and the error
            would show far from its cause.
        """
        out = np.empty((len(starts), length), np.int32)
        for row, start in zip(out, starts.tolist(), strict=True):
            done = 0
            while done < length:
                number, place = self._at((start + done) % len(self))
                span = self.spans[number]
                part = self._tokens(number)[place : min(place + length - done, span.stop)]
                row[done : done + len(part)] = part
                done += len(part)
        # Viewed as unsigned numbers, negative ids are large: one comparison finds both kinds.
        if out.size and int(out.view(np.uint32).max()) >= self.spans[0].stream.vocab_size:
            self._refuse(out, starts)
        return out

    def document_at(self, position: int) -> tuple[str, int]:
        """The name of the document that holds the split's token, and the token's place in it."""
        if not 0 <= position < len(self):
            raise IndexError(f"token {position} of a split of {len(self)}")
        number, place = self._at(position)
        return self.spans[number].stream.document_at(place)

    def document_starts(self) -> npt.NDArray[np.int64]:
        """int64 [documents]: the first token of each document that begins in the split."""
        starts = [np.empty(0, np.int64)]
        for span, begin in zip(self.spans, self._begins, strict=False):
            firsts = span.stream.places()[:-1, 0]
            inside = firsts[(firsts >= span.start) & (firsts < span.stop)]
            starts.append(inside - span.start + begin)
        return np.concatenate(starts)

    def _at(self, position: int) -> tuple[int, int]:
        """Which span holds a token of the split, and the token's place in the span's stream."""
        number = bisect.bisect_right(self._begins, position) - 1
        return number, self.spans[number].start + position - self._begins[number]

    def _tokens(self, number: int) -> npt.NDArray:
        tokens = self._mapped.get(number)
        if tokens is None:
            if len(self._mapped) >= _MOST_MAPPED:
                self._mapped.clear()
            tokens = self._mapped[number] = self.spans[number].stream.tokens()
        return tokens

    def _refuse(self, ids: Ids, starts: np.ndarray) -> None:
        """Raise the DataError for the first of the ids that is not in the vocabulary."""
        vocab_size = self.spans[0].stream.vocab_size
        row, column = np.argwhere((ids < 0) | (ids >= vocab_size))[0].tolist()
        folder = self.spans[self._at((int(starts[row]) + column) % len(self))[0]].stream.folder
        raise DataError(
            f"the shards in {folder} hold the token id {ids[row, column]}; expected ids below the "
            f"vocabulary's {vocab_size}{remedy(folder)}"
        )


def is_held_out(document_sha256: str, fraction: float) -> bool:
    """Whether `documents:F` puts a document into validation: its hash as a number in [0, 1) < F."""
    return int(document_sha256[:16], 16) < fraction * 2**64


def tail_boundary(tokens: int, fraction: str) -> int:
    """How many tokens `tail:F` trains on: floor(tokens (1 - F)), in exact arithmetic.

    On Tiny Shakespeare with F = 0.1 this is nanoGPT's int(n * 0.9) = 1,003,854.
    """
    return int(tokens * (1 - Fraction(fraction)))


def check_held_out(split: TokenSplit, validation: str) -> None:
    """Raise a UsageError unless there is a token to predict from another, or nothing is held out.

    Args:
      validation: data.validation.
    """
    if validation == "none" or len(split) > 1:
        return
    raise UsageError(
        f"data.validation = {validation!r} holds out {len(split)} token(s) of the text; expected "
        "at least 2, one to predict from the other: hold out a larger fraction, or set "
        "data.validation = 'none'"
    )


def check_window(split: TokenSplit, context_length: int) -> None:
    """Raise unless the split holds one window, context_length tokens and the one that follows.

    Raises:
      DataError: a corpus too small for any use.
      UsageError: a context too long for this corpus.
    """
    if len(split) > context_length:
        return
    if len(split) < SMALLEST_CORPUS_TOKENS:
        raise DataError(
            f"the training text has {len(split)} tokens, fewer than one window of "
            f"{context_length + 1} (model.context_length = {context_length}, and the token that "
            "follows); add text to data.source"
        )
    raise UsageError(
        f"model.context_length = {context_length} needs {context_length + 1} tokens, and the "
        f"training text has {len(split)}; the longest that works is {len(split) - 1}"
    )
