"""Which tokens make batch n, a pure function of (seed, n); and a whole split, once, in order.

An epoch cuts the split, taken as a ring, into windows that share no target. Where the cutting
begins and the order of the windows are new in each epoch, and both are computed, never stored: a
run needs one integer to find its place, and n hosts agree without a word.

No library's randomness is used here, because none promises the same order across its versions. The
windows of whole blocks of batches are computed at once, which is several times faster than one
window at a time. A thread reads ahead.

Sources: Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains" (the generalised Feistel
network and the cycle walk); Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators"
(the mixing function, as in SplitMix64).
"""

import itertools
import math
import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llm.config import Config
from llm.text.shards import TokenizedCorpus
from llm.text.splits import TokenSplit

_Words = npt.NDArray[np.uint64]

# Some rows of a global batch: a slice, or their numbers.
Rows = slice | npt.NDArray[np.int64]

# With 8 the permutations of few windows are equally likely, which takes more than many windows do:
# over 60,000 keys, chi-squared of the 720 orders of six windows is 2 standard deviations above its
# mean with 8 rounds, 12 with 6 and 186 with 4; from 17 windows on nothing shows with 4.
_ROUNDS = 8

# What is read ahead at once: some batches, so that small ones do not pay the hand-over between
# threads each, and no more than this many tokens of them, unless one batch has more.
_BLOCK_BATCHES = 64
_BLOCK_TOKENS = 2**16
_BLOCKS_AHEAD = 3


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


class TrainingBatches:
    """Batches of windows of context_length + 1 tokens, for as many epochs as are asked for.

    Epoch e has W = floor(N / T) windows of the N tokens, window k from token
    (phase_e + k T) mod N on; so each token is predicted at most once an epoch, and the N mod T that
    are left out are others in each. Batches run on from one epoch into the next.

    Args:
      context_length: T; the split has more tokens than that (`splits.check_window`).
      batch_size: sequences of the global batch of each step.
      seed: any integer.
      rows: of each global batch, those that this host reads; None: all.
    """

    def __init__(
        self,
        split: TokenSplit,
        *,
        context_length: int,
        batch_size: int,
        seed: int,
        rows: Rows | None = None,
    ):
        assert len(split) > context_length, "check_window comes first"
        self._split, self._context_length = split, context_length
        self._batch_size = batch_size
        self._own_rows = np.arange(batch_size)[slice(None) if rows is None else rows]
        self._key = _mix(np.array([seed % 2**64], np.uint64))
        self.windows_per_epoch = len(split) // context_length

    @property
    def steps_per_epoch(self) -> float:
        """How many steps see each window once; rarely a whole number."""
        return self.windows_per_epoch / self._batch_size

    def __getitem__(self, step: int) -> Batch:
        """This host's rows of batch `step`, counted from 0."""
        return Batch(self._block(step, 1)[0])

    def window_starts(self, step: int) -> npt.NDArray[np.int64]:
        """int64 [batch_size]: where each row of the global batch begins in the split."""
        return self._starts(step * self._batch_size + np.arange(self._batch_size))

    def iterate(self, from_step: int = 0) -> Generator[Batch, None, None]:
        """Batch `from_step` and all that follow, read ahead by a thread.

        An error of the thread is raised here, after the batches that were read before it. Closing
        the iterator, or letting go of it, ends the thread.
        """
        yield self[from_step]
        batch_tokens = max(1, len(self._own_rows)) * (self._context_length + 1)
        size = max(1, min(_BLOCK_BATCHES, _BLOCK_TOKENS // batch_tokens))
        blocks: queue.SimpleQueue[npt.NDArray[np.int32] | Exception] = queue.SimpleQueue()
        room, ended = threading.Semaphore(_BLOCKS_AHEAD), threading.Event()

        def read() -> None:
            try:
                for step in itertools.count(from_step + 1, size):
                    room.acquire()
                    if ended.is_set():
                        return
                    blocks.put(self._block(step, size))
            except Exception as error:
                blocks.put(error)

        threading.Thread(target=read, name="read-ahead", daemon=True).start()
        try:
            while not isinstance(block := blocks.get(), Exception):
                room.release()
                yield from map(Batch, block)
            raise block
        finally:
            ended.set()
            room.release()

    def _block(self, step: int, batches: int) -> npt.NDArray[np.int32]:
        """int32 [batches, rows, T + 1]: the steps from `step` on."""
        steps = step + np.arange(batches, dtype=np.int64)
        numbers = steps[:, None] * self._batch_size + self._own_rows
        length = self._context_length + 1
        return self._split.windows(self._starts(numbers.ravel()), length).reshape(
            *numbers.shape, length
        )

    def _starts(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where the windows with these running numbers, counted over all epochs, begin."""
        tokens, context_length = len(self._split), self._context_length
        epoch, place = np.divmod(numbers.astype(np.uint64), np.uint64(self.windows_per_epoch))
        key = _mix(self._key + epoch)
        window = _permuted(place, self.windows_per_epoch, key)
        phase = _mix(key) % np.uint64(tokens)
        return ((phase + window * np.uint64(context_length)) % np.uint64(tokens)).astype(np.int64)


def training_batches(
    config: Config, corpus: TokenizedCorpus, rows: Rows | None = None
) -> TrainingBatches:
    """The batches of a run, whose text holds one window (`splits.check_window`)."""
    return TrainingBatches(
        corpus.train,
        context_length=config.model.context_length,
        batch_size=config.training.batch_size,
        seed=config.run.seed,
        rows=rows,
    )


def evaluation_batches(
    split: TokenSplit, *, context_length: int, batch_size: int, rows: Rows | None = None
) -> Iterator[Batch]:
    """Every token of a split but its first, predicted exactly once, in order.

    Args:
      rows: of each global batch, those that this host reads; None: all.
    Yields:
      Batches of one shape, padded with id 0. The weight of a target that counts is 1, of padding 0:
      over all batches and hosts the weights sum to len(split) - 1.
    """
    targets = max(0, len(split) - 1)
    all_rows = np.arange(batch_size)[slice(None) if rows is None else rows]
    for first in range(0, targets, batch_size * context_length):
        tokens_BT = np.zeros((len(all_rows), context_length + 1), np.int32)
        weights_BT = np.zeros((len(all_rows), context_length), np.float32)
        for row, start in enumerate((first + all_rows * context_length).tolist()):
            count = min(context_length, targets - start)
            if count > 0:
                tokens_BT[row, : count + 1] = split.read(start, count + 1)
                weights_BT[row, :count] = 1.0
        yield Batch(tokens_BT, weights_BT)


def _permuted(places: _Words, size: int, keys: _Words) -> _Words:
    """Each place, in [0, size), under the permutation that its key chooses.

    A Feistel network permutes pairs (left, right) in [0, a) x [0, b), where a b is the least such
    product that holds `size`; a pair beyond it is permuted again until it falls within.
    """
    side = math.isqrt(size - 1) + 1
    a, b = np.uint64(side), np.uint64(-(-size // side))
    permuted = _network(places, a, b, keys)
    while (outside := np.flatnonzero(permuted >= size)).size:
        permuted[outside] = _network(permuted[outside], a, b, keys[outside])
    return permuted


def _network(places: _Words, a: np.uint64, b: np.uint64, keys: _Words) -> _Words:
    left, right = np.divmod(places, b)
    for _ in range(_ROUNDS):
        keys = keys + _GOLDEN
        left = (left + _mix(keys + right)) % a
        keys = keys + _GOLDEN
        right = (right + _mix(keys + left)) % b
    return left * b + right


# The odd number nearest to 2^64 / golden ratio: its multiples are spread evenly.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(words: _Words) -> _Words:
    """SplitMix64's output function: a permutation of uint64 without visible structure."""
    words = words + _GOLDEN
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
