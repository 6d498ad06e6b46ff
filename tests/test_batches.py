"""Batch n is a pure function of (seed, n); an epoch predicts each token once, in random order."""

import gc
import itertools
import math
import os
import queue
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.errors import DataError
from llm.text import batches as batches_module
from llm.text.batches import RingWindows, TrainingBatches, _permuted, evaluation_batches
from llm.text.splits import Span, TokenSplit
from llm.text.stream import StreamWriter, TokenStream

VOCAB = 1000


def make_split(folder, ids: np.ndarray, start: int = 0, of_each: int = 64) -> TokenSplit:
    """The ids from `start` on, as a split of several streams."""
    spans = []
    for first in range(0, len(ids), of_each):
        writer = StreamWriter(folder, f"train-{first}", "uint16")
        writer.begin_document("document")
        writer.add(ids[first : first + of_each].astype(np.int32))
        stream = TokenStream(folder, writer.finish(), VOCAB, hashed=True)
        spans.append(Span(stream, 0, len(stream)))
    return TokenSplit(spans).part(start, len(ids))


class Counting:
    """A split whose token n is n."""

    def __init__(self, tokens: int):
        self.tokens = tokens

    def __len__(self):
        return self.tokens

    def read(self, start, count):
        assert start >= 0 and start + count <= self.tokens
        return np.arange(start, start + count, dtype=np.int32)

    def windows(self, starts, length):
        return ((starts[:, None] + np.arange(length)) % self.tokens).astype(np.int32)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    ids = np.random.default_rng(0).integers(0, VOCAB, 1000)
    return make_split(tmp_path_factory.mktemp("stream"), ids, start=10)


# The order of an epoch

SIZES = st.integers(2, 300).flatmap(
    lambda tokens: st.tuples(st.just(tokens), st.integers(1, tokens - 1))
)


@settings(deadline=None)
@given(sizes=SIZES, seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 3))
def test_each_token_is_a_target_at_most_once_an_epoch(sizes, seed, epoch):
    """And exactly once where the context divides the split: counted by hand."""
    tokens, context = sizes
    windows = tokens // context
    batches = TrainingBatches(RingWindows(Counting(tokens), context), batch_size=windows, seed=seed)
    assert batches.epochs(1) == [1.0]
    counts = [0] * tokens
    for row in batches[epoch].tokens.tolist():
        for target in row[1:]:
            counts[target] += 1
    assert max(counts) == 1
    assert sum(counts) == windows * context > tokens - context
    if tokens % context == 0:
        assert min(counts) == 1


def test_what_one_epoch_leaves_out_another_predicts():
    batches = TrainingBatches(RingWindows(Counting(100), 70), batch_size=1, seed=0)
    seen = Counter(t for epoch in range(200) for t in batches[epoch].tokens[0, 1:].tolist())
    assert len(seen) == 100
    # Binomial(200, 0.7): 140 +- 6.5 for each token, the first and the last like any other.
    assert all(abs(count - 140) < 5 * 6.5 for count in seen.values())


def test_batches_run_on_across_epochs():
    """Batch size 4 over epochs of 7 windows: the windows come as those of batch size 1."""
    one = TrainingBatches(RingWindows(Counting(75), 10), batch_size=1, seed=3)
    four = TrainingBatches(RingWindows(Counting(75), 10), batch_size=4, seed=3)
    singles = np.concatenate([one[step].tokens for step in range(40)])
    assert np.array_equal(np.concatenate([four[step].tokens for step in range(10)]), singles)
    assert four.epochs(10) == [40 / 7]


def test_a_batch_may_be_larger_than_an_epoch():
    batches = TrainingBatches(RingWindows(Counting(35), 10), batch_size=8, seed=3)
    one = TrainingBatches(RingWindows(Counting(35), 10), batch_size=1, seed=3)
    assert np.array_equal(
        batches[1].tokens, np.concatenate([one[step].tokens for step in range(8, 16)])
    )


def test_windows_are_the_text_of_the_split_taken_as_a_ring(split):
    ring = np.concatenate([split.read(0, len(split))] * 2)
    batches = TrainingBatches(RingWindows(split, 90), batch_size=5, seed=1)
    for step in range(6):
        starts = batches.window_starts(step)
        assert starts.dtype == np.int64 and starts.shape == (5,)
        assert starts.min() >= 0 and starts.max() < len(split)
        expected = [ring[start : start + 91] for start in starts.tolist()]
        assert np.array_equal(batches[step].tokens, expected)


def test_batches_are_contiguous_int32(split):
    batches = TrainingBatches(RingWindows(split, 7), batch_size=5, seed=1)
    for batch in (batches[0], next(batches.iterate(0))):
        assert batch.tokens.dtype == np.int32 and batch.tokens.shape == (5, 8)
        assert batch.tokens.flags.c_contiguous
        assert batch.weights is None and batch.segments is None


# A pure function of (seed, step)


def test_batch_n_is_the_same_in_any_order_and_by_any_object(split):
    first = TrainingBatches(RingWindows(split, 30), batch_size=4, seed=9)
    forward = [first[step] for step in range(30)]
    second = TrainingBatches(RingWindows(split, 30), batch_size=4, seed=9)
    for step in reversed(range(30)):
        assert np.array_equal(second[step].tokens, forward[step].tokens)


def test_the_order_is_the_one_that_it_always_was():
    """Runs of earlier versions resume: these numbers never change."""
    batches = TrainingBatches(RingWindows(Counting(1_000_003), 64), batch_size=4, seed=1337)
    assert batches.window_starts(0).tolist() == [733444, 513156, 208769, 916228]
    assert batches.window_starts(123_456_789).tolist() == [996812, 454537, 228809, 146697]


@settings(deadline=None)
@given(
    tokens=st.integers(2, 10**12),
    context=st.integers(1, 5000),
    seed=st.integers(-(2**65), 2**65),
    step=st.integers(0, 10**9),
)
def test_the_order_is_the_one_that_the_formulas_give(tokens, context, seed, step):
    """The same in plain integers, one window at a time, without NumPy's wrapping arithmetic."""
    context = min(context, tokens - 1)
    batches = TrainingBatches(RingWindows(Counting(tokens), context), batch_size=3, seed=seed)
    expected = [reference_start(tokens, context, seed, 3 * step + row) for row in range(3)]
    assert batches.window_starts(step).tolist() == expected


def reference_start(tokens: int, context: int, seed: int, number: int) -> int:
    def mix(word):
        word = (word + golden) % 2**64
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
        return word ^ (word >> 31)

    golden = 0x9E3779B97F4A7C15
    windows = tokens // context
    epoch, window = divmod(number, windows)
    key = mix((mix(seed % 2**64) + epoch) % 2**64)
    a = math.isqrt(windows)
    a += a * a < windows
    b = -(-windows // a)
    while True:
        left, right = divmod(window, b)
        for half in range(8):
            left = (left + mix((key + (2 * half + 1) * golden + right) % 2**64)) % 2**64 % a
            right = (right + mix((key + (2 * half + 2) * golden + left) % 2**64)) % 2**64 % b
        window = left * b + right
        if window < windows:
            return (mix(key) % tokens + window * context) % tokens


def test_seeds_and_epochs_give_other_orders():
    def starts(seed, step):
        return TrainingBatches(
            RingWindows(Counting(6400), 64), batch_size=100, seed=seed
        ).window_starts(step)

    orders = [starts(seed, epoch) for seed in (0, 1, 2, -1, 2**32, 2**63) for epoch in range(3)]
    for a, b in itertools.combinations(orders, 2):
        # Two random orders of 100 agree in about one place.
        assert (a // 64 == b // 64).sum() < 10
        assert (a - a[0]).tolist() != (b - b[0]).tolist()


@pytest.mark.parametrize("hosts", [1, 3, 5])
def test_the_slices_of_n_hosts_are_the_global_batch(split, hosts):
    whole = TrainingBatches(RingWindows(split, 20), batch_size=15, seed=5)
    per_host = 15 // hosts
    slices = [slice(host * per_host, (host + 1) * per_host) for host in range(hosts)]
    windows = RingWindows(split, 20)
    local = [TrainingBatches(windows, batch_size=15, seed=5, rows=own) for own in slices]
    for step in (0, 1, 17):
        assert np.array_equal(np.concatenate([b[step].tokens for b in local]), whole[step].tokens)
        for batches in local:
            assert np.array_equal(batches.window_starts(step), whole.window_starts(step))
    together = zip(*(batches.iterate(3) for batches in local), strict=True)
    for step, parts in zip(range(3, 8), together, strict=False):
        assert np.array_equal(np.concatenate([part.tokens for part in parts]), whole[step].tokens)


# Reading ahead


@pytest.mark.parametrize("from_step", [0, 1, 63, 64, 1000])
@pytest.mark.parametrize("block_tokens", [1, 500, 2**16])
def test_the_iterator_gives_the_same_batches_from_any_step(
    split, from_step, block_tokens, monkeypatch
):
    monkeypatch.setattr(batches_module, "_BLOCK_TOKENS", block_tokens)
    batches = TrainingBatches(RingWindows(split, 16), batch_size=3, seed=2)
    for step, batch in zip(
        range(from_step, from_step + 150), batches.iterate(from_step), strict=False
    ):
        assert np.array_equal(batch.tokens, batches[step].tokens)


def test_reading_ahead_is_bounded(split):
    read = []

    class Watched(Counting):
        def windows(self, starts, length):
            read.append(len(starts))
            return super().windows(starts, length)

    batches = TrainingBatches(RingWindows(Watched(10_000), 1000), batch_size=8, seed=2)
    iterator = batches.iterate(0)
    for _ in range(5):
        next(iterator)
    iterator.close()
    # 8 x 1001 tokens: 8 batches a block; the first batch, the block that is used and those ahead.
    assert sum(read) <= 8 * (1 + 8 * (1 + batches_module._BLOCKS_AHEAD))


def test_a_closed_iterator_ends_its_threads(split):
    def reading():
        return [t for t in threading.enumerate() if t.name == "read-ahead"]

    before = set(reading())
    batches = TrainingBatches(RingWindows(split, 16), batch_size=3, seed=2)
    closed, abandoned = batches.iterate(0), batches.iterate(5)
    for iterator in (closed, abandoned, closed, abandoned):
        next(iterator)  # the second is the first that was read ahead
    del iterator
    new = set(reading()) - before
    assert new
    closed.close()
    del abandoned
    gc.collect()
    for thread in new:
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.thorough
def test_a_program_that_lets_an_iterator_be_ends(tmp_path):
    code = (
        "import sys, numpy as np\nfrom llm.text.batches import RingWindows, TrainingBatches\n"
        "sys.path.insert(0, sys.argv[1])\nfrom test_batches import Counting\n"
        "it = TrainingBatches(RingWindows(Counting(9999), 8), batch_size=2, seed=0).iterate(0)\n"
        "next(it), next(it)\nprint('ends')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "ends\n", "")


def test_an_id_outside_the_vocabulary_stops_the_iterator(tmp_path):
    split = make_split(tmp_path, np.full(100, 5), of_each=50)
    shard = tmp_path / "train-50.bin"
    content = np.frombuffer(shard.read_bytes(), "<u2").copy()
    content[20] = VOCAB
    with open(shard, "r+b") as file:
        file.write(content.tobytes())
    batches = TrainingBatches(RingWindows(split, 50), batch_size=2, seed=0)
    with pytest.raises(DataError, match="token id 1000; expected ids below the vocabulary's 1000"):
        list(itertools.islice(batches.iterate(0), 4))


def test_an_error_of_the_reader_follows_the_batches_that_were_read_before_it(split):
    class Failing(TrainingBatches):
        def _block(self, step, batches):
            if step > 1:
                raise OSError("the disk is gone")
            return super()._block(step, batches)

    batches = Failing(RingWindows(split, 16), batch_size=3, seed=2)
    iterator = batches.iterate(0)
    taken = [next(iterator) for _ in range(1 + 64)]  # the first batch, then one block
    whole = TrainingBatches(RingWindows(split, 16), batch_size=3, seed=2)
    assert all(np.array_equal(b.tokens, whole[step].tokens) for step, b in enumerate(taken))
    said = queue.SimpleQueue()

    def ask():
        try:
            said.put(next(iterator))
        except OSError as error:
            said.put(error)

    # A thread that is left behind, if the error is swallowed and no batch ever comes.
    threading.Thread(target=ask, daemon=True).start()
    assert "the disk is gone" in str(said.get(timeout=30))


# The permutation


@settings(deadline=None)
@given(st.integers(1, 2000), st.integers(0, 2**64 - 1))
def test_it_is_a_permutation(size, key):
    keys = np.full(size, key, np.uint64)
    permuted = _permuted(np.arange(size, dtype=np.uint64), size, keys)
    assert sorted(permuted.tolist()) == list(range(size))


def test_it_holds_for_corpora_of_trillions_of_tokens():
    """Among 2^48 windows, 10,000 places go to 10,000 windows, spread over all of them."""
    places = np.arange(10_000, dtype=np.uint64)
    permuted = _permuted(places, 2**48 + 1, np.full(10_000, 7, np.uint64))
    assert len(set(permuted.tolist())) == 10_000 and int(permuted.max()) <= 2**48
    counts = np.bincount((permuted // np.uint64(2**48 // 10 + 1)).astype(int), minlength=10)
    assert_uniform(counts[:10])


def assert_uniform(counts: np.ndarray) -> None:
    """Pearson's chi-squared with its normal approximation: 5 standard deviations."""
    expected = counts.sum() / counts.size
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    freedom = counts.size - 1
    assert chi_squared < freedom + 5 * math.sqrt(2 * freedom), counts


def permutations(size: int, keys: int) -> np.ndarray:
    """[keys, size]: the permutations of consecutive seeds, as epochs have them."""
    places = np.tile(np.arange(size, dtype=np.uint64), keys)
    words = batches_module.mix(np.repeat(np.arange(keys, dtype=np.uint64), size))
    return _permuted(places, size, words).reshape(keys, size).astype(int)


@pytest.mark.parametrize("size", [3, 4, 5])
def test_every_permutation_is_equally_likely(size):
    found = Counter(map(tuple, permutations(size, 30_000).tolist()))
    assert_uniform(np.array([found[p] for p in itertools.permutations(range(size))]))


@pytest.mark.parametrize("size", [17, 64, 90])
def test_every_window_is_equally_likely_at_every_place(size):
    found = permutations(size, 20_000)
    counts = np.stack([np.bincount(found[:, place], minlength=size) for place in range(size)])
    assert_uniform(counts)


@pytest.mark.parametrize("size", [17, 64, 90])
def test_neighbours_are_as_far_apart_as_any_two(size):
    """Steps from one window to the next, modulo the size, take every value but 0 equally often."""
    found = permutations(size, 20_000)
    steps = (found[:, 1:] - found[:, :-1]) % size
    counts = np.bincount(steps.ravel(), minlength=size)
    assert counts[0] == 0
    # Steps within one permutation depend on one another a little: count every fourth.
    assert_uniform(np.bincount(steps[:, ::4].ravel(), minlength=size)[1:])


# Evaluation


@settings(deadline=None)
@given(
    tokens=st.integers(0, 200),
    context=st.integers(1, 40),
    batch_size=st.integers(1, 6),
)
def test_evaluation_predicts_every_token_but_the_first_once_in_order(tokens, context, batch_size):
    predicted = []
    batches = list(
        evaluation_batches(Counting(tokens), context_length=context, batch_size=batch_size)
    )
    for tokens_BT, mask_BT, _ in batches:
        assert tokens_BT.shape == (batch_size, context + 1) and tokens_BT.dtype == np.int32
        assert mask_BT.shape == (batch_size, context) and mask_BT.dtype == np.float32
        assert set(np.unique(mask_BT)) <= {0.0, 1.0}
        counted = mask_BT.astype(bool)
        # Each target follows its input.
        assert np.array_equal(tokens_BT[:, 1:][counted], tokens_BT[:, :-1][counted] + 1)
        assert tokens_BT[:, 1:][~counted].sum() == 0
        predicted += tokens_BT[:, 1:][counted].tolist()
    assert predicted == list(range(1, tokens))
    windows = -(-max(0, tokens - 1) // context)
    assert len(batches) == -(-windows // batch_size)


def test_hosts_evaluate_the_same_global_batches(split):
    sizes = {"context_length": 30, "batch_size": 4}
    whole = list(evaluation_batches(split, **sizes))
    halves = [
        list(evaluation_batches(split, **sizes, rows=rows)) for rows in (slice(0, 2), slice(2, 4))
    ]
    assert len(whole) == len(halves[0]) == len(halves[1])
    for (tokens_BT, mask_BT, _), *parts in zip(whole, *halves, strict=True):
        assert np.array_equal(tokens_BT, np.concatenate([part.tokens for part in parts]))
        assert np.array_equal(mask_BT, np.concatenate([part.weights for part in parts]))


def test_evaluation_reads_the_split(split):
    text = split.read(0, len(split))
    batches = evaluation_batches(split, context_length=33, batch_size=4)
    found = np.concatenate([t[:, 1:][m.astype(bool)] for t, m, _ in batches])
    assert np.array_equal(found, text[1:])


def test_a_batch_that_is_larger_than_memory_costs_the_rows_that_are_read():
    """One number for each row of this one would be eight terabytes."""
    windows = RingWindows(Counting(1000), 10)
    batches = TrainingBatches(windows, batch_size=10**12, seed=1, rows=slice(3, 5))
    whole = TrainingBatches(windows, batch_size=8, seed=1)
    assert np.array_equal(batches[0].tokens, whole[0].tokens[3:5])
    assert batches.epochs(2) == [2e12 / 100]
