"""Which tokens make batch n, a pure function of (seed, n); and a whole split, once, in order.

An epoch cuts the split, taken as a ring, into windows that share no target. Where the cutting
begins and the order of the windows are new in each epoch, and both are computed, never stored: a
run needs one integer to find its place, and n hosts agree without a word. Of several sources, each
has its own epochs, and llm/text/mixture.py says whose turn it is.

No library's randomness is used here, because none promises the same order across its versions. The
windows of whole blocks of batches are computed at once, which is several times faster than one
window at a time. A thread reads ahead.

Sources: Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains" (the generalised Feistel
network and the cycle walk); Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators"
(the mixing function, as in SplitMix64).
"""

import itertools
import math
import operator
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llm.config import Config
from llm.errors import UsageError
from llm.text.corpus import Source, TokenizedCorpus
from llm.text.mixture import Mixture, Phase, mixture_of
from llm.text.packing import PackedWindows, packed
from llm.text.splits import TokenSplit
from llm.text.windows import GOLDEN, Batch, RingWindows, Windows, Words, mix

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


class TrainingBatches:
    """Batches of windows, for as many epochs as are asked for; they run on across epochs.

    Args:
      windows: those of the only source, or of each source of a mixture.
      batch_size: sequences of the global batch of each step.
      seed: any integer.
      rows: of each global batch, those that this host reads; None: all.
      mixture: whose turn it is; None: there is one source.

    Attributes:
      windows: of each source.
    """

    def __init__(
        self,
        windows: Windows | Sequence[Windows],
        *,
        batch_size: int,
        seed: int,
        rows: Rows | None = None,
        mixture: Mixture | None = None,
    ):
        self.windows = windows if isinstance(windows, Sequence) else [windows]
        assert (mixture is None) <= (len(self.windows) == 1), "several sources need a mixture"
        self._batch_size, self._mixture = batch_size, mixture
        self._from_step = mixture.phase.from_step if mixture else 0
        rows = slice(None) if rows is None else rows
        # Nothing is as large as the batch, which may be too large for this machine.
        self._own_rows = (
            np.arange(*rows.indices(batch_size)) if isinstance(rows, slice) else np.asarray(rows)
        )
        self._key = mix(np.array([seed % 2**64], np.uint64))

    def __getitem__(self, step: int) -> Batch:
        """This host's rows of batch `step`, counted from 0."""
        return _mapped(self._block(step, 1), operator.itemgetter(0))

    def epochs(self, step: int) -> list[float]:
        """How often each source was read when `step` steps are complete."""
        read = self._mixture.read(step) if self._mixture else [step * self._batch_size]
        return [n / one.per_epoch for n, one in zip(read, self.windows, strict=True)]

    def window_sources(self, step: int) -> npt.NDArray[np.int64]:
        """int64 [batch_size]: which source each row of the global batch is from."""
        out = np.empty(self._batch_size, np.int64)
        for rows, source, _, _ in self._places(self._numbers(step, np.arange(self._batch_size))):
            out[rows] = source
        return out

    def window_starts(self, step: int) -> npt.NDArray[np.int64]:
        """int64 [batch_size]: where each row of the global batch begins in its source's split."""
        out = np.empty(self._batch_size, np.int64)
        for rows, source, *place in self._places(self._numbers(step, np.arange(self._batch_size))):
            out[rows] = [parts[0][0] for parts in self.windows[source].parts(*place)]
        return out

    def window_parts(self, step: int) -> list[list[tuple[int, int]]]:
        """Of each row of the global batch: the pieces of its source's split, (start, tokens)."""
        out: list[Any] = [None] * self._batch_size
        for rows, source, *place in self._places(self._numbers(step, np.arange(self._batch_size))):
            for row, parts in zip(
                np.arange(self._batch_size)[rows].tolist(),
                self.windows[source].parts(*place),
                strict=True,
            ):
                out[row] = parts
        return out

    def iterate(self, from_step: int = 0) -> Generator[Batch, None, None]:
        """Batch `from_step` and all that follow, read ahead by a thread.

        An error of the thread is raised here, after the batches that were read before it. Closing
        the iterator, or letting go of it, ends the thread.
        """
        first = self[from_step]
        yield first
        size = max(1, min(_BLOCK_BATCHES, _BLOCK_TOKENS // max(1, first.tokens.size)))
        blocks: queue.SimpleQueue[Batch | Exception] = queue.SimpleQueue()
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
                for number in range(len(block.tokens)):
                    yield _mapped(block, operator.itemgetter(number))
            raise block
        finally:
            ended.set()
            room.release()

    def _block(self, step: int, batches: int) -> Batch:
        """The steps from `step` on: arrays [batches, rows, ...]."""
        steps = step + np.arange(batches, dtype=np.int64)
        numbers = self._numbers(steps[:, None], self._own_rows)
        whole: Batch | None = None
        for rows, source, *place in self._places(numbers.ravel()):
            part = self.windows[source].read(*place)
            if whole is None and len(part.tokens) == numbers.size:
                whole = part
                break
            if whole is None:
                whole = _mapped(part, lambda a: np.empty((numbers.size, *a.shape[1:]), a.dtype))
            for out, values in zip(whole, part, strict=True):
                if values is not None:
                    out[rows] = values
        assert whole is not None
        return _mapped(whole, lambda array: array.reshape(*numbers.shape, *array.shape[1:]))

    def _numbers(self, step: Any, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The running number of each row's window, counted over all epochs of the phase."""
        return (step - self._from_step) * self._batch_size + rows

    def _places(self, numbers: npt.NDArray[np.int64]) -> Iterator[tuple[Any, int, Words, Words]]:
        """For each source: the rows that it gives, its number, their epochs' keys and windows."""
        if self._mixture is None:
            yield slice(None), 0, *self._order(numbers, self.windows[0].per_epoch)
            return
        sources, within = self._mixture.place(numbers)
        for source in np.unique(sources).tolist() or [0]:
            rows = np.flatnonzero(sources == source)
            yield rows, source, *self._order(within[rows], self.windows[source].per_epoch)

    def _order(self, numbers: npt.NDArray[np.int64], per_epoch: int) -> tuple[Words, Words]:
        """The epoch's key and the window of each running number of one source."""
        epoch, place = np.divmod(numbers.astype(np.uint64), np.uint64(per_epoch))
        keys = mix(self._key + epoch)
        return keys, _permuted(place, per_epoch, keys)


def _mapped(batch: Batch, function: Callable[[Any], Any]) -> Batch:
    """A batch with the function's result for each array that it has."""
    return Batch(*(None if array is None else function(array) for array in batch))


def training_batches(
    config: Config,
    corpus: TokenizedCorpus,
    rows: Rows | None = None,
    phases: Sequence[Phase] = (),
) -> TrainingBatches:
    """The batches of a run, whose sources hold one window each (`splits.check_window`).

    Args:
      phases: the batch sizes and weights that the run had, up to the steps that are asked for;
        empty: those of the configuration, from the first step on.
    """
    size = phases[-1].batch_size if phases else config.training.batch_size
    mixture = None
    if config.data.mixture:
        mixture = mixture_of(phases or [Phase(0, size, config.data.proportions)])
    length = config.model.context_length
    is_packed = config.data.windows == "packed"
    return TrainingBatches(
        [
            packed(corpus, one, "train", length) if is_packed else RingWindows(one.train, length)
            for one in corpus.sources
        ],
        batch_size=size,
        seed=config.run.seed,
        rows=rows,
        mixture=mixture,
    )


def check_epochs(config: Config, batches: TrainingBatches) -> None:
    """Raise a UsageError if the run would read a source of its mixture too often."""
    steps = config.training.steps
    epochs = batches.epochs(steps)
    for one, times in zip(config.data.mixture, epochs, strict=False):
        if times > one.max_epochs:
            raise UsageError(
                f"data.mixture: {one.name!r} would be read {times:.3g} times in {steps:,} steps, "
                f"expected at most max_epochs = {one.max_epochs:g}: lower its weight "
                f"({one.weight:g}), train fewer steps, add text to it, or set its max_epochs"
            )


def shares(config: Config, corpus: TokenizedCorpus, batches: TrainingBatches) -> Iterator[str]:
    """What a person should know before the first step: a line for each source.

    Of a mixture: its tokens, its share, and how often it is read. Of packed documents: how many
    windows they fill, and how much of these is padding.
    """
    epochs, whole = batches.epochs(config.training.steps), sum(config.data.proportions)
    for source, part, times in zip(corpus.sources, config.data.proportions, epochs, strict=False):
        yield (
            f"  {source.name}: {len(source.train):,} training tokens, {100 * part / whole:.3g} % "
            f"of the windows, {times:.3g} epochs; {len(source.validation):,} held out"
        )
    for source, windows in zip(corpus.sources, batches.windows, strict=True):
        if isinstance(windows, PackedWindows):
            yield (
                f"  {source.name or 'documents'}: packed in {windows.per_epoch:,} windows, "
                f"{100 * windows.padding:.2f} % of them padding"
            )


def held_out_batches(
    config: Config, corpus: TokenizedCorpus, source: Source, batch_size: int, rows: Rows | None
) -> Iterator[Batch]:
    """What a source holds out, in windows as the run trains on, each target once.

    The batches are of one shape. The weight of a target that counts is 1, of padding 0.

    Args:
      rows: of each global batch, those that this host reads; None: all.
    """
    length = config.model.context_length
    if config.data.windows == "stream":
        sizes = {"context_length": length, "batch_size": batch_size}
        yield from evaluation_batches(source.validation, rows=rows, **sizes)
        return
    windows = packed(corpus, source, "validation", length)
    all_rows = np.arange(batch_size)[slice(None) if rows is None else rows]
    for first in range(0, windows.per_epoch, batch_size):
        numbers = first + all_rows
        batch = windows.rows(np.minimum(numbers, windows.per_epoch - 1))
        batch.weights[numbers >= windows.per_epoch] = 0.0
        yield batch


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


def _permuted(places: Words, size: int, keys: Words) -> Words:
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


def _network(places: Words, a: np.uint64, b: np.uint64, keys: Words) -> Words:
    left, right = np.divmod(places, b)
    for _ in range(_ROUNDS):
        keys = keys + GOLDEN
        left = (left + mix(keys + right)) % a
        keys = keys + GOLDEN
        right = (right + mix(keys + left)) % b
    return left * b + right
