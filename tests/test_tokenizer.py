"""Text to ids and back: nothing is lost, and every id knows its bytes."""

import base64
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.errors import CheckpointError, DataError, UsageError
from llm.text import fast
from llm.text import tokenizer as tokenizer_module
from llm.text.bpe import train_bpe
from llm.text.tokenizer import (
    FILE_NAME,
    BytePairTokenizer,
    ByteTokenizer,
    CharacterTokenizer,
    characters_of,
    check_kind,
    load_tokenizer,
    sha256_of_json,
    tiktoken_tokenizer,
)

SHARED = Path(__file__).parents[2] / "shared"
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # one emoji of five code points
HARD = [
    "",
    "plain",
    "naïve café",
    "學而時習之，不亦說乎？",
    f"a{FAMILY}b",
    "line\r\nline\n\n\ttab  two",
    "e\u0301 \ufeff \ufffd \x00 \U0010ffff",
    "<|endoftext|> is text here",
]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def gpt2():
    cache = SHARED / "tiktoken-cache"
    if not cache.is_dir():
        pytest.skip("no cached gpt2 encoding")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        yield tiktoken_tokenizer("gpt2")


@pytest.fixture(scope="module")
def small_bpe():
    return train_bpe(["the theory of the thing, 學而時習之 " * 20] * 5, 300)


@pytest.fixture(params=["bytes", "bpe", "gpt2"])
def tokenizer(request):
    if request.param == "bytes":
        return ByteTokenizer()
    return request.getfixturevalue("small_bpe" if request.param == "bpe" else "gpt2")


def assert_round_trip(tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert all(0 <= id_ < tokenizer.vocab_size for id_ in ids.tolist())
    assert b"".join(tokenizer.token_bytes(id_) for id_ in ids.tolist()) == text.encode()
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())


@pytest.mark.parametrize("text", HARD)
def test_hard_texts_round_trip(tokenizer, text):
    assert_round_trip(tokenizer, text)


@settings(deadline=None)
@given(TEXTS)
def test_any_text_round_trips_as_bytes(text):
    assert_round_trip(ByteTokenizer(), text)


@pytest.mark.thorough
@settings(deadline=None)
@given(text=TEXTS)
def test_any_text_round_trips_through_a_small_bpe(small_bpe, text):
    assert_round_trip(small_bpe, text)


@settings(deadline=None)
@given(text=TEXTS)
def test_any_text_round_trips_through_gpt2(gpt2, text):
    assert_round_trip(gpt2, text)


@settings(deadline=None)
@given(TEXTS.filter(bool))
def test_any_text_round_trips_through_its_own_characters(text):
    assert_round_trip(CharacterTokenizer(characters_of([text])), text)


@settings(deadline=None)
@given(st.binary())
def test_any_bytes_round_trip(data):
    """Bytes that are no text come in by surrogateescape, and out as they were."""
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(data.decode("utf-8", "surrogateescape"))
    assert ids.tolist() == list(data)
    assert tokenizer.decode_bytes(ids) == data


@settings(deadline=None)
@given(data=st.binary())
def test_any_ids_decode(small_bpe, data):
    ids = [small_bpe.encode(chr(b))[0] for b in data]
    assert small_bpe.decode(ids) == small_bpe.decode_bytes(ids).decode("utf-8", "replace")


def test_every_byte_is_a_token(tokenizer):
    assert {bytes([b]) for b in range(256)} <= set(tokenizer.token_table)


def test_gpt2_ids_are_the_published_ones(gpt2):
    """The example of OpenAI's gpt-2 repository and of every course since."""
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert (gpt2.vocab_size, gpt2.end_of_text) == (50257, 50256)


def public_pattern(name, monkeypatch):
    from tiktoken_ext import openai_public

    for load in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(openai_public, load, lambda *_, **__: {})
    return openai_public.ENCODING_CONSTRUCTORS[name]()["pat_str"]


@pytest.fixture(params=["gpt2", "cl100k_base", "o200k_base"])
def pairs(request, small_bpe, monkeypatch):
    """The patterns of the public encodings with small ranks, by gigatoken and by tiktoken."""
    pytest.importorskip("gigatoken")
    ranks = {token: rank for rank, token in enumerate(small_bpe.token_table[:-1])}
    name, pattern = request.param, public_pattern(request.param, monkeypatch)
    special = {"<|endoftext|>": len(ranks)}
    ours = BytePairTokenizer(name, pattern, ranks, special)
    monkeypatch.setattr(tokenizer_module, "_FAST_AFTER", -1)
    assert ours._fast is not None
    theirs = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    return ours, lambda text: theirs.encode(text, disallowed_special=())


ADVERSE = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
        st.sampled_from(
            [*HARD, "'S", "'ſ", "’re", "İı", "Ⅷ²½٣", "\x85\x1c\u180e\u200b", "//\n", "\r\n"]
        ),
        st.tuples(st.sampled_from(" a\n\t1學!"), st.integers(1, 300)).map(lambda of: of[0] * of[1]),
    ),
    max_size=12,
).map("".join)


def test_the_faster_library_gives_the_ids_of_tiktoken(pairs):
    ours, theirs = pairs

    @settings(deadline=None, database=None)
    @given(ADVERSE)
    def check(text):
        assert ours._fast.encode(text).tolist() == theirs(text)
        assert ours.encode(text).tolist() == theirs(text)

    check()
    with pytest.raises(UsageError, match="half of a surrogate pair"):
        ours.encode("a\ud83d")


@pytest.mark.thorough
def test_the_faster_library_knows_every_character_as_tiktoken_does(pairs):
    ours, theirs = pairs
    characters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(characters), 4096):
        text = "\x01".join(f"A{one}a {one}1" for one in characters[start : start + 4096])
        assert ours._fast.encode(text).tolist() == theirs(text)


def test_the_faster_library_is_made_anew_before_it_fills_memory(pairs, monkeypatch):
    ours, theirs = pairs
    monkeypatch.setattr(fast, "_RENEWED_AFTER", 100)
    before, ours._fast._left = ours._fast._backend, 100
    for text in ("the theory of " * 20, "another thing " * 20, "and so on"):
        assert ours.encode(text).tolist() == theirs(text)
    assert ours._fast._backend is not before


@pytest.mark.parametrize("damage", ["missing", "other ids", "another pattern"])
def test_without_the_faster_library_tiktoken_does_the_work(damage, small_bpe, monkeypatch):
    pattern = public_pattern("gpt2", monkeypatch) + "|x" * (damage == "another pattern")
    if damage == "missing":
        monkeypatch.setitem(sys.modules, "gigatoken.gigatoken_rs", None)
    if damage == "other ids":
        monkeypatch.setattr(fast.FastPairs, "encode", lambda *_: np.zeros(3, np.int32))
    monkeypatch.setattr(tokenizer_module, "_FAST_AFTER", -1)
    ranks = {token: rank for rank, token in enumerate(small_bpe.token_table[:-1])}
    ours = BytePairTokenizer("gpt2", pattern, ranks, {})
    assert ours._fast is None
    assert ours.decode(ours.encode("the theory")) == "the theory"


def test_characters_are_nanogpts():
    text = "First Citizen:\nBefore we proceed"
    itos = sorted(set(text))
    tokenizer = CharacterTokenizer(characters_of([text[:9], text[9:]]))
    assert tokenizer.characters == "".join(itos)
    assert tokenizer.encode(text).tolist() == [itos.index(c) for c in text]
    assert tokenizer.end_of_text is None


def test_the_spelling_of_a_special_token_is_text(tokenizer):
    assert tokenizer.end_of_text not in tokenizer.encode("a<|endoftext|>b").tolist()


def test_special_tokens_stand_for_no_text(tokenizer):
    assert tokenizer.token_bytes(tokenizer.end_of_text) == b""
    assert tokenizer.token_name(tokenizer.end_of_text) == "<|endoftext|>"
    assert tokenizer.decode([tokenizer.end_of_text]) == ""


def test_token_names_show_bytes_that_are_no_text():
    tokenizer = ByteTokenizer()
    assert [tokenizer.token_name(id_) for id_ in (65, 0xE5)] == ["A", "\\xe5"]


@pytest.mark.parametrize("token_id", [-1, 257])
def test_ids_outside_the_vocabulary_have_no_bytes(token_id):
    with pytest.raises(IndexError, match=str(token_id)):
        ByteTokenizer().token_bytes(token_id)


@pytest.mark.parametrize("unseen", ["Z", "é", "\U0001f600"])
def test_an_unseen_character_is_shown_with_its_place(unseen):
    tokenizer = CharacterTokenizer("abc \n")
    with pytest.raises(UsageError) as caught:
        tokenizer.encode(f"abc\nca{unseen}b")
    message = str(caught.value)
    assert f"the character {unseen!a} (U+{ord(unseen):04X}, {unseen}) at index 6" in message
    assert "(line 2, column 3) is not one of the 5 characters" in message
    assert caught.value.exit_code == 2


def test_half_a_surrogate_pair_is_no_character(tokenizer):
    with pytest.raises(UsageError, match=r"U\+D83D.*index 2"):
        tokenizer.encode("ab\ud83d")


@pytest.mark.parametrize("make", [ByteTokenizer, lambda: CharacterTokenizer("abc\n學")])
def test_a_saved_tokenizer_comes_back_equal(make, tmp_path):
    assert_equal_after_saving(make(), tmp_path)


def test_a_saved_encoding_comes_back_equal(tokenizer, tmp_path):
    assert_equal_after_saving(tokenizer, tmp_path)


def assert_equal_after_saving(tokenizer, folder):
    tokenizer.save(folder)
    loaded = load_tokenizer(folder)
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.token_table == tokenizer.token_table
    assert loaded.special_tokens == tokenizer.special_tokens
    assert loaded.name == tokenizer.name
    text = "abcca\n學" * 3
    assert loaded.encode(text).tolist() == tokenizer.encode(text).tolist()


def test_different_tokenizers_have_different_hashes(small_bpe):
    tokenizers = [ByteTokenizer(), CharacterTokenizer("ab"), CharacterTokenizer("abc"), small_bpe]
    assert len({tokenizer.sha256 for tokenizer in tokenizers}) == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("abc", "abd"),
        lambda text: "[]",
        lambda text: "\udcff",
    ],
)
def test_a_damaged_tokenizer_is_refused(damage, tmp_path):
    CharacterTokenizer("abc").save(tmp_path)
    path = tmp_path / FILE_NAME
    path.write_text(damage(path.read_text()), errors="surrogateescape")
    with pytest.raises(CheckpointError, match=FILE_NAME) as caught:
        load_tokenizer(tmp_path)
    assert caught.value.exit_code == 4


def save_byte_pairs(folder, **changed):
    """A byte-pair tokenizer in a run that somebody else gave, its hash in order."""
    ranks = {base64.b64encode(bytes([b])).decode(): b for b in range(256)}
    definition = {
        "kind": "byte_pairs",
        "name": "given",
        "pattern": r"\S+|\s+",
        "special_tokens": {"<|endoftext|>": 256},
        "ranks": ranks | changed.pop("more", {}),
        **changed,
    }
    saved = {"sha256": sha256_of_json(definition), "definition": definition}
    (folder / FILE_NAME).write_text(json.dumps(saved))


def test_a_given_encoding_opens(tmp_path):
    save_byte_pairs(tmp_path, more={"YWI=": 257})
    assert load_tokenizer(tmp_path).encode("ab c").tolist() == [257, 32, 99]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"more": {"YWI=": "257"}}, "Expected `int`, got `str`"),
        ({"more": {"YWI=": 97}}, "two tokens have the same id"),
        ({"more": {"YWI=": 256}}, "two tokens have the same id"),
        ({"more": {"not base64": 257}}, "Invalid base64"),
        ({"more": {"": 257}}, "length >= 1"),
        ({"more": {"YWI=": 10**12}}, "<= 4194303"),
        ({"more": {"YWI=": 10**30}}, "<= 4194303"),
        ({"more": {"YWI=": -1}}, ">= 0"),
        ({"special_tokens": {"<s>": 10**12}}, "<= 4194303"),
        ({"special_tokens": ["<s>"]}, "Expected `object`"),
        ({"ranks": {}}, "the byte 0 has no token"),
        ({"ranks": [1]}, "Expected `object`"),
        ({"pattern": "(["}, "Parsing error"),
        ({"pattern": 3}, "Expected `str`"),
        ({"pattern": "(?:" * 5000 + "a" + ")" * 5000}, "too deeply nested"),
        ({"pattern": r"(?:\p{L}{500}){500}"}, "Error compiling"),
        ({"kind": "characters", "characters": ""}, "length >= 1"),
        ({"kind": "characters", "characters": "a\ud800"}, "surrogates not allowed"),
        ({"kind": ["bytes"]}, "kind"),
    ],
)
def test_a_tokenizer_that_cannot_be_is_refused_in_one_sentence(changed, said, tmp_path):
    save_byte_pairs(tmp_path, **changed)
    with pytest.raises(CheckpointError, match=re.escape(said)) as caught:
        load_tokenizer(tmp_path)
    assert FILE_NAME in str(caught.value) and "\n" not in str(caught.value)


def test_a_tokenizer_that_is_nested_for_ever_is_refused(tmp_path):
    (tmp_path / FILE_NAME).write_text("[" * 10**5)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("pattern", [r"\d+", "", r"(?=(a|a|aa)+$)x|\s", r"[a-z]"])
def test_a_pattern_that_does_not_cut_the_text_is_named(pattern, tmp_path):
    save_byte_pairs(tmp_path, pattern=pattern)
    with pytest.raises(UsageError, match="the split pattern of the tokenizer"):
        load_tokenizer(tmp_path).encode("a" * 60 + "B")


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no tokenizer at"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_of_a_later_kind_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "definition", lambda self: {"kind": "morphemes"})
    ByteTokenizer().save(tmp_path)
    with pytest.raises(CheckpointError, match="morphemes"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "near"), [("gpt", "gpt2"), ("byte", "bytes"), ("cl100k", "cl100k_base")]
)
def test_a_wrong_name_is_answered_with_the_nearest(wrong, near):
    with pytest.raises(UsageError, match=f"did you mean '{near}'"):
        check_kind(wrong)


def test_an_encoding_out_of_reach_names_the_offline_way(tmp_path, monkeypatch):
    import requests
    import tiktoken.registry

    def no_network(*_args, **_kwargs):
        raise requests.exceptions.ConnectionError("no route to host")

    monkeypatch.setattr(requests, "get", no_network)
    # Newer versions of tiktoken fetch through a session.
    monkeypatch.setattr(requests.Session, "request", no_network)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(DataError, match="TIKTOKEN_CACHE_DIR=DIR") as caught:
        tiktoken_tokenizer("cl100k_base")
    assert "'cl100k_base'" in str(caught.value) and "no route to host" in str(caught.value)
    assert caught.value.exit_code == 3


def test_unassigned_ids_between_tokens_stand_for_nothing():
    ranks = {bytes([b]): b for b in range(256)}
    tokenizer = BytePairTokenizer("gap", r"\S+|\s+", ranks, {"<|endoftext|>": 300})
    assert tokenizer.vocab_size == 301
    assert tokenizer.token_bytes(280) == b""
    assert tokenizer.token_name(280) == "<|unassigned 280|>"


def test_the_saved_file_is_json_that_says_everything(tmp_path, small_bpe):
    small_bpe.save(tmp_path)
    saved = json.loads((tmp_path / FILE_NAME).read_text())
    assert saved["definition"]["special_tokens"] == small_bpe.special_tokens
    assert len(saved["definition"]["ranks"]) == small_bpe.vocab_size - 1


def test_importing_the_text_layer_imports_no_jax():
    import subprocess

    code = (
        "import sys, llm.text.shards, llm.text.batches; heavy = {'jax', 'tiktoken', 'datasets', "
        "'tokenizers'} & set(sys.modules); sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
