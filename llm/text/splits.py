"""Which tokens train and which are held out; a split as a row of tokens.

`documents:F` holds out documents by the hash of their text, so that equal documents land on one
side and new documents move none of the old. `tail:F` holds out the end of the text, as nanoGPT's
shakespeare_char does.
"""

from fractions import Fraction

import numpy as np

from llm.errors import DataError, UsageError
from llm.text.stream import TokenStream
from llm.text.tokenizer import Ids

# A corpus shorter than this is no corpus for any context length that people use: below it the
# data are at fault, above it the setting.
SMALLEST_CORPUS_TOKENS = 256


class TokenSplit:
    """The tokens [start, stop) of a stream."""

    def __init__(self, stream: TokenStream, start: int, stop: int):
        self.stream, self.start, self.stop = stream, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def vocab_size(self) -> int:
        return self.stream.vocab_size

    def read(self, start: int, count: int) -> Ids:
        """int32 [count]: the tokens from `start` on, which must exist."""
        if not 0 <= start <= start + count <= len(self):
            raise IndexError(f"tokens [{start}, {start + count}) of a split of {len(self)}")
        out = np.empty(count, np.int32)
        if count:
            self.stream.read_into(out, self.start + start)
        self.stream.check_ids(out)
        return out

    def windows(self, starts: np.ndarray, length: int) -> Ids:
        """int32 [len(starts), length]: the tokens from each start on, the split taken as a ring.

        Args:
          starts: int [n], each in [0, len(self)).
          length: at most len(self).
        """
        out = np.empty((len(starts), length), np.int32)
        for row, start in zip(out, starts.tolist(), strict=True):
            before_end = len(self) - start
            if before_end >= length:
                self.stream.read_into(row, self.start + start)
            else:
                self.stream.read_into(row[:before_end], self.start + start)
                self.stream.read_into(row[before_end:], self.start)
        self.stream.check_ids(out)
        return out

    def document_at(self, position: int) -> tuple[str, int]:
        """The name of the document that holds the split's token, and the token's place in it."""
        if not 0 <= position < len(self):
            raise IndexError(f"token {position} of a split of {len(self)}")
        return self.stream.document_at(self.start + position)


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
