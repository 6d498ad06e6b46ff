"""Windows of a split: what is read at once, and how a split is cut into them.

A window is context_length + 1 tokens: the inputs, and the same moved on by one as targets. Here a
split is one row of tokens, and windows cut it wherever they end; packing.py keeps documents whole
and apart.

Source: Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators" (the mixing function,
as in SplitMix64).
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from llm.text.splits import TokenSplit

Words = npt.NDArray[np.uint64]


class Batch(NamedTuple):
    """Windows of text, as the loader makes them and the loss and the evaluation read them.

    Attributes:
      tokens: int32 [B, T + 1]; each token but the first of a window is a target.
      weights: float32 [B, T], how much each target counts; None: all the same.
      segments: int32 [B, T], the document of each input if several are packed in a window, each in
        one piece; None: each window is one text.
    """

    tokens: Any
    weights: Any = None
    segments: Any = None


class Windows(Protocol):
    """The windows of one epoch after the other of a split.

    Attributes:
      per_epoch: W, how many windows an epoch has.
    """

    per_epoch: int

    def read(self, keys: Words, windows: Words) -> Batch:
        """A row for each window, which is in [0, W). Each key is that of the window's epoch."""
        ...

    def parts(self, keys: Words, windows: Words) -> list[list[tuple[int, int]]]:
        """The pieces of the split that each window holds: (first token, how many)."""
        ...


class RingWindows:
    """Windows of context_length + 1 tokens that cut a split, taken as a ring.

    Epoch e has W = floor(N / T) windows of the N tokens, window k from token
    (phase_e + k T) mod N on; so each token is predicted at most once an epoch, and the N mod T that
    are left out are others in each.

    Args:
      context_length: T; the split has more tokens than that (`splits.check_window`).
    """

    def __init__(self, split: TokenSplit, context_length: int):
        assert len(split) > context_length, "check_window comes first"
        self._split, self._context_length = split, context_length
        self.per_epoch = len(split) // context_length

    def read(self, keys: Words, windows: Words) -> Batch:
        """Tokens alone."""
        return Batch(self._split.windows(self._starts(keys, windows), self._context_length + 1))

    def parts(self, keys: Words, windows: Words) -> list[list[tuple[int, int]]]:
        """One piece, or two where the ring closes."""
        parts = []
        for start in self._starts(keys, windows).tolist():
            count = min(self._context_length + 1, len(self._split) - start)
            rest = self._context_length + 1 - count
            parts.append([(start, count), *([(0, rest)] if rest else [])])
        return parts

    def _starts(self, keys: Words, windows: Words) -> npt.NDArray[np.int64]:
        """int64 [n]: where each window begins in the split."""
        tokens = np.uint64(len(self._split))
        starts = (mix(keys) % tokens + windows * np.uint64(self._context_length)) % tokens
        return starts.astype(np.int64)


# The odd number nearest to 2^64 / golden ratio: its multiples are spread evenly.
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(words: Words) -> Words:
    """SplitMix64's output function: a permutation of uint64 without visible structure."""
    words = words + GOLDEN
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
