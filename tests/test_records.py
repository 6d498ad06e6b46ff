"""Texts that grow token by token, stop strings, and the records made of them."""

import dataclasses
import json
import math
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from msgspec.structs import replace

from llm.errors import DataError, NonFiniteError, UsageError
from llm.inference.distribution import Described, to_host
from llm.inference.records import (
    Alternative,
    EndRecord,
    Numerics,
    RunRecord,
    Sampling,
    Spellings,
    TokenRecord,
    as_json,
    fields,
    read_records,
    to_line,
)
from llm.inference.transcript import Match, StopStrings, Transcript
from llm.text.tokenizer import END_OF_TEXT, ByteTokenizer, Tokenizer, tiktoken_tokenizer


class TableTokenizer(Tokenizer):
    """Tokens of any bytes, and an end of text."""

    def __init__(self, tokens):
        super().__init__("table", [*tokens, b""], {END_OF_TEXT: len(tokens)})

    def encode(self, text):
        raise NotImplementedError

    def definition(self):
        return {"kind": "table", "tokens": [list(token) for token in self.token_table]}


def transcribe(tokenizer, ids, phase="generated"):
    transcript = Transcript(Spellings(tokenizer))
    tokens = [transcript.add(int(id_), phase) for id_ in ids]
    if tokens:
        tokens[-1] = transcript.close(tokens[-1])
    return tokens


# Bytes that make characters of every length, and whatever cannot be one.
SOME_BYTES = st.one_of(
    st.binary(max_size=5),
    st.text(alphabet="a\n\u00e9\u6797\U0001f469\u200d\ufffd\ufe0f", max_size=4).map(str.encode),
    st.sampled_from([b"\xf0\x9f", b"\x91\xa9", b"\xe6", b"\x9e\x97", b"\xed\xa0\x80", b"\xc0"]),
)


@given(st.lists(SOME_BYTES, max_size=12))
def test_concatenated_pieces_are_the_bytes_and_the_text(pieces):
    tokenizer = TableTokenizer(pieces)
    tokens = transcribe(tokenizer, range(len(pieces)))
    records = list(map(as_json, tokens))
    whole = b"".join(pieces)
    assert bytes(byte for record in records for byte in record["bytes"]) == whole
    assert "".join(record["text"] for record in records) == whole.decode("utf-8", "replace")
    end = EndRecord.of(0, tokens, "length", "generated")
    assert end.text == whole.decode("utf-8", "replace")
    for n, record in enumerate(records):
        assert record["position"] == n
        assert record["byte_offset"] == len(b"".join(pieces[:n]))
        assert record["text_offset"] == len("".join(r["text"] for r in records[:n]))


@given(st.lists(SOME_BYTES, min_size=1, max_size=12))
def test_utf8_says_where_a_token_stands_in_its_character(pieces):
    tokens = transcribe(TableTokenizer(pieces), range(len(pieces)))
    for n, (piece, token) in enumerate(zip(pieces, tokens, strict=True)):
        before = waiting(b"".join(pieces[:n]))
        after = waiting(b"".join(pieces[: n + 1]))
        is_last = n == len(pieces) - 1
        if not is_utf8_so_far(before + piece) or (is_last and after):
            assert token.utf8 == "bad"
            assert "\ufffd" in token.text
        else:
            labels = {(0, 0): "ok", (0, 1): "open", (1, 1): "continue", (1, 0): "close"}
            assert token.utf8 == labels[bool(before), bool(after)]
            assert token.text == (before + piece).removesuffix(after).decode()


def is_utf8_so_far(data):
    """By the definition: some bytes can follow that make all of it UTF-8.

    But Python's decoder refuses a surrogate, ED A0 80 to ED BF BF, only at its third byte.
    """
    if data[-2:-1] == b"\xed" and data[-1] in range(0xA0, 0xC0):
        data = data[:-1]
    tails = [b"", b"\x80", b"\x90", b"\xa0", b"\x80\x80", b"\x90\x80", b"\xa0\x80"]
    tails += [b"\x80\x80\x80", b"\x90\x80\x80", b"\xa0\x80\x80"]
    return any(decodes(data + tail) for tail in tails)


def decodes(data):
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def waiting(data):
    """The end of the bytes that begins a character without completing it, from its lead byte."""
    for length in (1, 2, 3):
        tail = data[-length:]
        if len(tail) == length and not decodes(tail) and tail[0] >= 0xC2 and is_utf8_so_far(tail):
            return tail
    return b""


EMOJI = "\U0001f469\u200d\U0001f4bb"  # woman, joiner, laptop


def test_an_emoji_in_bytes_opens_continues_and_closes():
    tokenizer = ByteTokenizer()
    tokens = transcribe(tokenizer, tokenizer.encode(f"a{EMOJI}\u6797"))
    four, three = ["open", "continue", "continue", "close"], ["open", "continue", "close"]
    assert [token.utf8 for token in tokens] == ["ok", *four, *three, *four, *three]
    assert [token.text for token in tokens if token.text] == ["a", *EMOJI, "\u6797"]


INVALID = [b"\x80", b"\xff\xfe", b"\xe6\x9ea", b"\xf0\x9f\x91", b"ok\xed\xa0\x80"]


@pytest.mark.parametrize("data", INVALID)
def test_invalid_bytes_are_marked_and_named(data):
    records = records_of(ByteTokenizer(), list(data))
    assert "".join(r["text"] for r in records) == data.decode("utf-8", "replace")
    assert any(r["utf8"] == "bad" for r in records)
    for byte, record in zip(data, records, strict=True):
        assert record["bytes"] == [byte]
        assert record["token"] == (chr(byte) if byte < 0x80 else f"\\x{byte:02x}")


def records_of(tokenizer, ids):
    return [as_json(token) for token in transcribe(tokenizer, ids)]


SHARED_ENCODINGS = Path(__file__).resolve().parents[2] / "shared" / "tiktoken-cache"


def test_chinese_and_emoji_with_gpt2(monkeypatch):
    if SHARED_ENCODINGS.is_dir():
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED_ENCODINGS))
    try:
        tokenizer = tiktoken_tokenizer("gpt2")
    except DataError:
        pytest.skip("needs the gpt2 encoding: set TIKTOKEN_CACHE_DIR")
    text = f"\u5b54\u5b50\u66f0\uff1a {EMOJI} \u5b78\u800c\u6642\u7fd2\u4e4b"
    records = records_of(tokenizer, tokenizer.encode(text))
    assert "".join(r["text"] for r in records) == text
    assert bytes(b for r in records for b in r["bytes"]) == text.encode()
    assert {"open", "close"} <= {r["utf8"] for r in records}
    assert "bad" not in {r["utf8"] for r in records}


def test_a_special_token_has_a_name_and_no_text():
    tokenizer = ByteTokenizer()
    [record, _] = records_of(tokenizer, [256, 65])
    assert (record["token"], record["bytes"], record["text"]) == (END_OF_TEXT, [], "")
    assert record["utf8"] == "ok"


def test_the_end_of_a_sample_flushes_an_unfinished_character():
    last = records_of(ByteTokenizer(), [65, 0xE6, 0x9E])[-1]
    assert (last["text"], last["utf8"]) == ("\ufffd", "bad")


WORDS = st.lists(st.text(alphabet="ab", min_size=0, max_size=4), min_size=1, max_size=10)


@given(WORDS, st.lists(st.text(alphabet="ab", min_size=1, max_size=8), min_size=1, max_size=3))
def test_stop_strings_cut_where_the_first_one_begins(words, stops):
    tokenizer = TableTokenizer([word.encode() for word in words])
    transcript, filter_ = Transcript(Spellings(tokenizer)), StopStrings(stops)
    out, stopped = [], None
    transcript.add(0, "prompt")  # what was given does not count
    shown = ""
    for id_ in range(len(words)):
        released, stopped = filter_.add(transcript.add(id_, "generated"))
        out += released
        shown = "".join(token.text for token in out)
        if stopped is not None:
            break
        assert not any(stop in shown for stop in stops)
    if stopped is None:
        out += filter_.release()

    # The first token after which a stop string is there decides; of those there, the first place.
    prefixes = ["".join(words[: n + 1]) for n in range(len(words))]
    completing = next((n for n, p in enumerate(prefixes) if any(s in p for s in stops)), None)
    assert (stopped is not None) == (completing is not None)
    assert [token.id for token in out] == list(range(len(out)))
    if completing is None:
        expected = prefixes[-1]
        assert len(out) == len(words)
    else:
        text = prefixes[completing]
        expected = text[: min(text.find(stop) for stop in stops if stop in text)]
        assert (expected + stopped) == text[: len(expected + stopped)]
        assert len(out) == completing + 1
    assert "".join(token.text for token in out) == expected
    place = len(words[0])
    for token in out:
        assert token.text_offset == place
        place += len(token.text)


def test_text_that_cannot_become_a_stop_string_is_not_withheld():
    tokenizer = TableTokenizer([b"x", b"a", b"b", b"c"])
    transcript, stops = Transcript(Spellings(tokenizer)), StopStrings(["abc"])
    released = [
        [token.id for token in stops.add(transcript.add(id_, "generated"))[0]]
        for id_ in (0, 1, 2, 0, 1, 1)
    ]
    assert released == [[0], [], [], [1, 2, 0], [], [1]]


def test_a_long_stop_string_costs_what_the_text_costs():
    """A request may bring one of a megabyte; it must not hold the server's other streams up."""

    class Counted(str):
        looked_at = 0

        def __getitem__(self, place):
            assert isinstance(place, int), "a slice copies the string"
            self.looked_at += 1
            return super().__getitem__(place)

    stop = Counted("b" + "ab" * 500_000)
    match = Match(stop)
    for word in ["bab", "abb", "x"] * 100:
        assert match.read(word) is None
    assert stop.looked_at <= 5 * 700  # characters of the text


TOP = (
    Alternative(65, "A", (65,), -0.5, True, 1),
    Alternative(0xE6, "\\xe6", (0xE6,), -1.0, True, 2),
    Alternative(256, END_OF_TEXT, (), -9.0, False, 200),
)
NUMBERS = (-1.5, 3, 2.0, 0.0, 0.75, 2, TOP)


def sample_tokens(sample=0):
    """A prompt of two tokens, then three generated ones and the end of text."""
    transcript = Transcript(Spellings(ByteTokenizer()), sample)
    given = [transcript.add(72, "prompt"), transcript.add(105, "prompt", NUMBERS)]
    return given + [transcript.add(id_, "generated", NUMBERS) for id_ in (33, 0xC3, 0xA9, 256)]


def test_token_records_have_the_fields_of_the_design_in_order():
    first, second = (json.loads(to_line(token)) for token in sample_tokens(4)[:2])
    assert tuple(first) == tuple(second) == fields(TokenRecord)
    assert first == {
        "type": "token", "sample": 4, "phase": "prompt", "position": 0, "id": 72, "token": "H",
        "bytes": [72], "text": "H", "text_offset": 0, "byte_offset": 0, "utf8": "ok",
        "logprob": None, "rank": None, "entropy": None, "sampling_logprob": None,
        "kept_mass": None, "kept_tokens": None, "top": [],
    }  # fmt: skip
    assert second["top"] == [
        {"id": 65, "token": "A", "bytes": [65], "logprob": -0.5, "kept": True, "rank": 1},
        {"id": 0xE6, "token": "\\xe6", "bytes": [0xE6], "logprob": -1.0, "kept": True, "rank": 2},
        {"id": 256, "token": END_OF_TEXT, "bytes": [], "logprob": -9.0, "kept": False, "rank": 200},
    ]


def test_the_numbers_of_a_token_come_from_the_arrays_of_the_device():
    """Rank order, the watched ids that are not listed, no -0.0, and nothing that is not finite."""
    described = Described(
        logprob=np.float32([-1.5]), rank=np.int32([3]), entropy=np.float32([2.0]),
        kept_mass=np.float32([0.75]), kept_tokens=np.int32([2]),
        top_ids=np.int32([[65, 0xE6, 66]]), top_logprobs=np.float32([[-0.5, -1.0, -1.5]]),
        top_kept=np.array([[True, True, False]]),
        watch_logprobs=np.float32([[-9.0, -0.5, 0.0]]), watch_ranks=np.int32([[200, 1, 1]]),
        watch_kept=np.array([[False, True, True]]),
    )  # fmt: skip
    spellings = Spellings(ByteTokenizer())
    [numbers] = to_host(described, np.float32([-0.0]), 2, (256, 65), spellings)
    assert numbers == NUMBERS and math.copysign(1.0, numbers[3]) == 1.0
    assert to_host(described, None, 0, (), spellings) == [(-1.5, 3, 2.0, None, 0.75, 2, ())]
    for field in ("logprob", "entropy", "top_logprobs", "watch_logprobs"):
        for bad in (np.nan, -np.inf):
            values = getattr(described, field) * 0 + np.float32(bad)
            broken = dataclasses.replace(described, **{field: values})
            with pytest.raises(NonFiniteError):
                to_host(broken, None, 1, (256,), spellings)


def test_the_end_record_sums_what_was_generated_or_scored():
    tokens = sample_tokens()
    end = as_json(EndRecord.of(2, tokens, "end_of_text", "generated"))
    assert tuple(end) == fields(EndRecord)
    assert (end["tokens"], end["sum_logprob"], end["finish"]) == (4, -6.0, "end_of_text")
    assert end["perplexity"] == pytest.approx(math.exp(1.5))
    assert end["bits_per_byte"] == pytest.approx(6.0 / (3 * math.log(2)))
    assert end["text"] == "Hi!\u00e9"
    scored = EndRecord.of(2, tokens[:2], "length", "prompt")
    assert (scored.tokens, scored.sum_logprob) == (1, -1.5)
    nothing = EndRecord.of(2, tokens[:2], "length", "generated")
    assert (nothing.tokens, nothing.sum_logprob) == (0, 0.0)
    assert nothing.perplexity is None and nothing.bits_per_byte is None


CHECKPOINT = {"run": "mine", "step": 3, "params_sha256": "ab"}
NUMERICS = Numerics("cached", "float32")


def test_the_run_record_says_how_it_was_made():
    tokenizer = ByteTokenizer()
    sampling = Sampling(0.5, 7, 0.9, 0.1, 42)
    run = as_json(RunRecord.of(CHECKPOINT | {"more": 1}, tokenizer, sampling, NUMERICS, 10))
    assert tuple(run) == fields(RunRecord)
    assert run["schema"] == 1 and run["checkpoint"] == CHECKPOINT
    assert run["tokenizer"] == {"name": "bytes", "sha256": tokenizer.sha256, "vocab_size": 257}
    assert run["sampling"] == {
        "temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1, "seed": 42
    }  # fmt: skip
    assert run["numerics"] == {"path": "cached", "param_dtype": "float32"}
    assert RunRecord.of(CHECKPOINT, tokenizer, None, NUMERICS, 999).top == 257


def test_lines_are_strict_json_in_ascii():
    text = '\u2028\u6797\U0001f469\x7f\x80"\\'
    token = replace(transcribe(ByteTokenizer(), [65])[0], text=text, token=text)
    line = to_line(token)
    assert line.isascii() and line.count("\n") == 1 == len(line.splitlines())
    assert json.loads(line)["text"] == json.loads(line)["token"] == text


def sample_records():
    tokens = sample_tokens()
    return [
        RunRecord.of(CHECKPOINT, ByteTokenizer(), Sampling(), NUMERICS, 10),
        *tokens,
        EndRecord.of(0, tokens, "length", "generated"),
    ]


def test_records_are_read_back_as_they_were_written(tmp_path):
    records = sample_records()
    path = tmp_path / "out.jsonl"
    path.write_text("".join(map(to_line, records)))
    assert read_records(path) == list(map(as_json, records))
    assert read_records(path) == [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["run record"]),
        ('{"type":"end","sample":0}', ["line 1", "missing", "finish"]),
        ("hello", ["line 1", "JSON"]),
        ('{"type":"other"}', ["line 1", "other"]),
        ("[1]", ["line 1"]),
        ('{"type":"run","schema":1,"top":NaN}', ["line 1", "not strict JSON"]),
        (
            '{"type":"run","schema":9,"checkpoint":{},"tokenizer":{},"sampling":null,'
            '"numerics":{},"top":1}',
            ["schema = 9"],
        ),
    ],
)
def test_what_is_not_a_file_of_records_is_named(tmp_path, content, words):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(DataError) as error:
        read_records(path)
    assert all(word in str(error.value) for word in [str(path), *words])


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        (1, "checkpoint", None),
        (1, "checkpoint.step", "3"),
        (1, "tokenizer.vocab_size", 0),
        (1, "sampling", 0.5),
        (1, "numerics.cached_minus_full_nats", "small"),
        (2, "sample", '0"><h1>'),
        (2, "phase", 'p"><script>alert(1)</script>'),
        (3, "id", True),
        (3, "bytes[0]", 256),
        (3, "logprob", 0.5),
        (3, "logprob", -(10**400)),
        (3, "rank", "1"),
        (3, "utf8", "other"),
        (3, "top", None),
        (3, "top[1]", 1),
        (3, "top[1].token", 7),
        (3, "top[1].kept", "yes"),
        (8, "perplexity", [1.0]),
        (8, "text", None),
    ],
)
def test_a_field_of_another_type_is_named_with_its_line(tmp_path, line, name, value):
    lines = [json.loads(to_line(record)) for record in sample_records()]
    *path, field = name.replace("[", ".").replace("]", "").split(".")
    place = lines[line - 1]
    for part in path:
        place = place[int(part) if part.isdigit() else part]
    place[int(field) if field.isdigit() else field] = value
    file = tmp_path / "bad.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in lines))
    with pytest.raises(DataError) as error:
        read_records(file)
    start = f"{file}, line {line}: {name} = {json.dumps(value)[:60]}: "
    assert str(error.value).startswith(start) and "--probs" in str(error.value)


def test_a_number_that_is_read_as_infinity_is_refused(tmp_path):
    file = tmp_path / "bad.jsonl"
    lines = "".join(map(to_line, sample_records()))
    file.write_text(lines.replace('"entropy":2.0', '"entropy":1e999', 1))
    with pytest.raises(DataError, match="line 3: entropy = Infinity: number out of range"):
        read_records(file)
    file.write_text("[" * 100_000)  # too deep for a recursive parser
    with pytest.raises(DataError, match="line 1: expected `object`, got `array`"):
        read_records(file)


def test_a_missing_file_of_records_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="cannot read"):
        read_records(tmp_path / "none.jsonl")
