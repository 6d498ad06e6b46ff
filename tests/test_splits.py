"""Which tokens train, which are held out, and the split as a ring."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.errors import DataError, UsageError
from llm.text.splits import (
    Span,
    TokenSplit,
    check_held_out,
    check_window,
    is_held_out,
    tail_boundary,
)
from llm.text.stream import StreamWriter, TokenStream

IDS = np.arange(50, dtype=np.int32) * 7 % 53


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    writer = StreamWriter(folder, "train", "uint16")
    for name, start, stop in (("a", 0, 20), ("b", 20, 50)):
        writer.begin_document(name)
        writer.add(IDS[start:stop])
    return TokenStream(folder, writer.finish(), 53, hashed=True)


def split_of(tokens: int) -> TokenSplit:
    """A split of that length, of which nothing is read."""
    return TokenSplit([Span(None, 0, tokens)])


def test_a_split_reads_its_own_tokens(stream):
    split = TokenSplit([Span(stream, 10, 40)])
    assert len(split) == 30
    assert split.read(0, 30).tolist() == IDS[10:40].tolist()
    assert split.read(5, 3).tolist() == IDS[15:18].tolist()


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (29, 2), (0, 31), (3, -1)])
def test_a_split_gives_no_token_of_another(stream, start, count):
    with pytest.raises(IndexError):
        TokenSplit([Span(stream, 10, 40)]).read(start, count)


@settings(deadline=None)
@given(st.lists(st.integers(0, 29), min_size=1, max_size=5), st.integers(1, 30))
def test_windows_go_round(stream, starts, length):
    split = TokenSplit([Span(stream, 10, 40)])
    ring = np.concatenate([IDS[10:40]] * 2)
    expected = [ring[start : start + length].tolist() for start in starts]
    assert split.windows(np.array(starts), length).tolist() == expected


@pytest.mark.parametrize("bad", [53, 2**31 - 1, -1])
def test_an_id_outside_the_vocabulary_is_found_as_it_is_read(tmp_path, bad):
    """Of two streams, the one that holds it is named."""
    spans = []
    for name, ids in (("good", [0, 52]), ("bad", [1, bad % 2**32])):
        (tmp_path / name).mkdir()
        writer = StreamWriter(tmp_path / name, "train", "uint32")
        writer.begin_document("a")
        writer.add(np.array([0, 0]))
        opened = TokenStream(tmp_path / name, writer.finish(), 53, hashed=True)
        (tmp_path / name / "train.bin").write_bytes(np.array(ids, "<u4").tobytes())
        spans.append(Span(opened, 0, 2))
    split = TokenSplit(spans)
    assert split.read(0, 3).tolist() == [0, 52, 1]
    with pytest.raises(DataError, match=f"/bad hold the token id {bad}; .* vocabulary's 53"):
        split.read(2, 2)


# Several streams


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 52), max_size=6), max_size=6), st.data())
def test_spans_of_many_streams_are_one_row(tmp_path_factory, documents, data):
    """Of each stream a part: tokens, windows around the end, documents and their beginnings."""
    spans, row, places, starts = [], [], [], []
    for n, ids in enumerate(documents):
        folder = tmp_path_factory.mktemp("stream")
        writer = StreamWriter(folder, "train", "uint16")
        for half in (ids[:3], ids[3:]):
            writer.begin_document(f"{n}")
            writer.add(np.array(half, np.int32))
        stream = TokenStream(folder, writer.finish(), 53, hashed=True)
        start = data.draw(st.integers(0, len(ids)))
        stop = data.draw(st.integers(start, len(ids)))
        spans.append(Span(stream, start, stop))
        begins = (0, min(3, len(ids)))
        starts += [len(row) + first - start for first in begins if start <= first < stop]
        row += ids[start:stop]
        places += [(f"{n}", place % 3 if place < 3 else place - 3) for place in range(start, stop)]
    split = TokenSplit(spans)
    assert split.read(0, len(split)).tolist() == row
    assert [split.document_at(n) for n in range(len(split))] == places
    assert split.document_starts().tolist() == starts
    if row:
        start, length = data.draw(st.integers(0, len(row) - 1)), data.draw(st.integers(1, len(row)))
        assert split.windows(np.array([start]), length)[0].tolist() == (row * 2)[start:][:length]
        part = split.part(start, start + length)
        assert part.read(0, len(part)).tolist() == row[start:][:length]


def test_a_token_of_a_split_knows_its_document(stream):
    split = TokenSplit([Span(stream, 10, 40)])
    assert split.document_at(0) == ("a", 10)
    assert split.document_at(10) == ("b", 0)
    with pytest.raises(IndexError):
        split.document_at(30)


def test_the_tail_is_nanogpts():
    """data/shakespeare_char/prepare.py: train_data = data[:int(n * 0.9)]."""
    assert tail_boundary(1_115_394, "0.1") == 1_003_854
    assert [tail_boundary(n, "0.1") for n in range(5000)] == [int(n * 0.9) for n in range(5000)]


@settings(deadline=None)
@given(st.integers(0, 10**15), st.integers(1, 999))
def test_the_tail_is_exact(tokens, per_mille):
    """floor(tokens (1 - F)) in integers: in floating point 0.9 of 10^15 can be off by one."""
    assert tail_boundary(tokens, f"0.{per_mille:03d}") == tokens * (1000 - per_mille) // 1000


def test_documents_are_held_out_by_their_hash_alone():
    hashes = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(20_000)]
    held_out = [is_held_out(h, 0.05) for h in hashes]
    # Binomial: 1000 +- 31.
    assert abs(sum(held_out) - 1000) < 5 * 31
    # A larger fraction holds out more documents, and all of the former.
    assert all(is_held_out(h, 0.1) for h, out in zip(hashes, held_out, strict=True) if out)


def test_hashes_at_the_ends_fall_on_their_sides():
    assert is_held_out("0" * 64, 1e-9)
    assert not is_held_out("f" * 64, 0.999)


@pytest.mark.parametrize("tokens", [0, 1])
def test_held_out_text_without_a_prediction_is_refused_with_the_number(tokens):
    with pytest.raises(UsageError, match=rf"'tail:0.00001' holds out {tokens} token.* at least 2"):
        check_held_out(split_of(tokens), "tail:0.00001")


def test_two_tokens_or_none_wanted_pass():
    check_held_out(split_of(2), "tail:0.00001")
    check_held_out(split_of(0), "none")


def test_a_split_longer_than_a_window_passes():
    check_window(split_of(65), 64)


def test_a_context_longer_than_the_text_is_a_usage_error_with_both_numbers():
    with pytest.raises(
        UsageError, match=r"context_length = 1024 needs 1025 tokens.* has 1024;"
    ) as e:
        check_window(split_of(1024), 1024)
    assert "the longest that works is 1023" in str(e.value) and e.value.exit_code == 2


@pytest.mark.parametrize("tokens", [0, 64])
def test_a_text_too_short_for_anything_is_a_data_error_with_both_numbers(tokens):
    with pytest.raises(DataError, match=f"has {tokens} tokens, fewer than one window of 65") as e:
        check_window(split_of(tokens), 64)
    assert e.value.exit_code == 3
