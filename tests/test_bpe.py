"""A vocabulary trained here is the one that the textbook algorithm gives."""

import itertools
import random
from collections import Counter

import pytest
import regex

from llm.errors import StoppedError, UsageError
from llm.text.bpe import LONGEST_WORD, PATTERN, UNBROKEN, _first, train_bpe

CORPUS = [
    "low lower lowest newer newest wider widest, the quick brown fox\n" * 8,
    "the theory of the thing: 2024 and 2025! 學而時習之，不亦說乎？學而不思則罔\n" * 5,
]


def reference_merges(texts: list[str], merges: int) -> list[bytes]:
    """Sennrich et al. 2016, algorithm 1, at byte level; until two pairs are equally frequent."""
    words = Counter(
        tuple(bytes([b]) for b in word.encode())
        for text in texts
        for word in regex.findall(PATTERN, text)
    )
    made = []
    for _ in range(merges):
        pairs: Counter = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        (best, count), (_, second) = pairs.most_common(2)
        if count == second:
            break
        made.append(best[0] + best[1])
        words = Counter({_merged(word, best): count for word, count in words.items()})
    return made


def _merged(word: tuple[bytes, ...], pair: tuple[bytes, bytes]) -> tuple[bytes, ...]:
    out, i = [], 0
    while i < len(word):
        if word[i : i + 2] == pair:
            out.append(pair[0] + pair[1])
            i += 2
        else:
            out.append(word[i])
            i += 1
    return tuple(out)


def test_merges_are_the_most_frequent_pairs_in_order():
    counts = {"ab\n": 97, "abc\n": 59, "abcd\n": 31, "bcd\n": 11, "cdx\n": 7, "x學\n": 5}
    texts = [word * count for word, count in counts.items()]
    expected = reference_merges(texts, 12)
    assert len(expected) >= 5
    tokenizer = train_bpe(texts, 257 + len(expected))
    assert tokenizer.token_table[256 : 256 + len(expected)] == expected


def test_the_vocabulary_is_bytes_merges_and_an_end_of_text():
    tokenizer = train_bpe(CORPUS, 300)
    assert tokenizer.vocab_size == 300
    assert tokenizer.end_of_text == 299
    assert {bytes([b]) for b in range(256)} == set(tokenizer.token_table[:256])
    assert len(set(tokenizer.token_table)) == 300


def test_training_is_deterministic():
    assert train_bpe(CORPUS, 320).sha256 == train_bpe(CORPUS, 320).sha256


def test_merges_do_not_cross_pieces_of_the_pattern():
    tokenizer = train_bpe(CORPUS, 400)
    for token in tokenizer.token_table[256:-1]:
        text = token.decode("utf-8", "ignore")
        if text.encode() == token:
            assert len(regex.findall(PATTERN, text)) == 1, text


def test_more_merges_make_fewer_tokens():
    text = CORPUS[0]
    lengths = [len(train_bpe(CORPUS, size).encode(text)) for size in (257, 280, 330)]
    assert lengths[0] == len(text.encode())
    assert lengths[0] > lengths[1] > lengths[2]


def test_a_small_corpus_gives_fewer_tokens_than_asked():
    tokenizer = train_bpe(["ab"], 1000)
    assert tokenizer.vocab_size == 258
    assert tokenizer.token_table[256] == b"ab"


def test_a_vocabulary_without_all_bytes_is_refused():
    with pytest.raises(UsageError, match=r"tokenizer.vocab_size = 256: expected at least 257"):
        train_bpe(CORPUS, 256)


def test_only_the_first_characters_are_counted():
    assert "".join(_first(iter(["a c", "d f", "g i"]), 5)) == "a cd "


def test_text_without_word_breaks_counts_more():
    """Its words hardly repeat, and each distinct word is kept in memory."""
    unbroken = ["a" * 50] * 100
    assert len(list(_first(iter(unbroken), 5000))) == -(-100 // UNBROKEN)
    assert len(list(_first(iter(["a word or two " * 4] * 100), 5600))) == 100


@pytest.mark.parametrize("text", ["a" * 5000, "學而" * 2000, "acgt" * 1000 + "\n"])
def test_no_word_is_longer_than_a_merge_can_afford(text):
    """Otherwise time grows with the square of a text without word breaks."""
    longest = max(map(len, train_bpe([text], 400).token_table))
    assert longest <= LONGEST_WORD * len(text[0].encode())


def test_choosing_merges_is_said_and_can_be_stopped(monkeypatch):
    monkeypatch.setattr("llm.text.bpe.POLL_SECONDS", 1e-3)
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=2**16)

    def stop(what, done, total):
        assert (what, total) == ("choosing merges", None)
        raise StoppedError("stopped")

    with pytest.raises(StoppedError):
        train_bpe(["".join(letters)], 4096, stop)


def test_what_stops_the_reading_of_text_stops_the_training():
    def texts():
        yield "some text"
        raise TimeoutError("the network is gone")

    with pytest.raises(TimeoutError, match="the network is gone"):
        train_bpe(texts(), 300)
