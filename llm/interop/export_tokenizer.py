"""A tokenizer of ours as the files that transformers' AutoTokenizer opens without a network.

    bytes, bpe, tiktoken    byte-level BPE. tiktoken joins the two neighbours whose bytes are the
                            token of lowest rank, so that each split of a token into two is a merge,
                            in the order of ranks; a word that is a token is taken whole
    characters              a WordLevel of characters; one without a token is an error, as here
    imported                the file as it came

A special token that is written in a text becomes its id there, as transformers' users expect.

Source: the format is that of https://github.com/huggingface/tokenizers.
"""

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm.errors import UsageError
from llm.files import write_atomic
from llm.text.tokenizer import (
    FILE_NAME,
    BytePairTokenizer,
    CharacterTokenizer,
    Tokenizer,
    byte_of_symbol,
    panics_as,
)
from llm.text.tokenizer_folder import begin_of

# What patterns of words treat differently: numbers, marks, spaces, ends of lines, other scripts.
_PROBE = (
    "Hello world, it's 12 of 1234567 or 10000.50\u20ac!!  (x)\r\n\r\n\tdef f(a_b):\n    return'LL "
    "\u4f60\u597d\uff0c\u4e16\u754c \U0001f469\u200d\U0001f52c e\u0301a\u0323 \u0663\u00bd\u2167 "
    "\u00a0 \u3000\x00\x1f\u01c5\u02b0 I'\u017f x   \n \n  y \n"
)


def symbols_of(data: bytes) -> str:
    """Bytes in GPT-2's printable spelling, a character each."""
    return data.decode("latin-1").translate(_symbols())


@functools.cache
def _symbols() -> dict[int, str]:
    return {byte: symbol for symbol, byte in byte_of_symbol().items()}


def merges_of(tokenizer: Tokenizer) -> Iterator[str]:
    """Each split of a token into two tokens, in the order of ranks: "left right", in symbols."""
    spelled = [symbols_of(data) for data in tokenizer.token_table]
    known = {*spelled} - {""}
    for token in spelled:
        for i in range(1, len(token)):
            if token[:i] in known and token[i:] in known:
                yield f"{token[:i]} {token[i:]}"


def write_tokenizer(tokenizer: Tokenizer, folder: Path, context_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json.

    Raises:
      UsageError: the library's tokenizer does not give our ids.
    """
    definition = tokenizer.definition()
    imported = definition["kind"] == "imported"
    described = json.loads(definition["file"]) if imported else _described(tokenizer)
    if imported and begin_of(described) == tokenizer.begin_of_text:
        text = definition["file"]
    else:
        described["post_processor"] = _beginning(tokenizer)
        text = json.dumps(described, ensure_ascii=False)
    if not imported:
        _check(tokenizer, text)
    write_atomic(folder / FILE_NAME, text.encode())
    begin, ends = begin_and_ends(tokenizer)
    names = _names(tokenizer)
    settings = {
        **tokenizer.settings,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "bos_token": names.get(begin),
        "eos_token": names.get(tokenizer.end_of_text),
    }
    # An end of text alone is a number there; several are a list.
    stops = {"bos_token_id": begin, "eos_token_id": ends if len(ends) > 1 else (*ends, None)[0]}
    for name, content in (("tokenizer", settings), ("generation", stops)):
        held = {key: value for key, value in content.items() if value is not None}
        write_atomic(folder / f"{name}_config.json", (json.dumps(held, indent=2) + "\n").encode())


def begin_and_ends(tokenizer: Tokenizer) -> tuple[int | None, list[int]]:
    """The id that stands before a text, and those that end one.

    Where documents only end, a text begins behind the end of another.
    """
    begin = tokenizer.begin_of_text
    return tokenizer.end_of_text if begin is None else begin, [*tokenizer.ends_of_text]


def _names(tokenizer: Tokenizer) -> dict[int | None, str]:
    return {id_: spelling for spelling, id_ in tokenizer.special_tokens.items()}


def _described(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json."""
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokens = sorted(tokenizer.special_tokens.items(), key=lambda token: token[1])
    described: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id_, "content": name, **added, "special": True} for name, id_ in tokens
        ],
        "normalizer": None,
        "post_processor": None,
    }
    if isinstance(tokenizer, CharacterTokenizer):
        vocabulary = {character: id_ for id_, character in enumerate(tokenizer.characters)}
        # No character is spelled "<unk>", so that an unseen one is an error.
        model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
        return {
            **described,
            "pre_tokenizer": _split(r"[\s\S]"),
            "decoder": {"type": "Fuse"},
            "model": model,
        }
    table = enumerate(tokenizer.token_table)
    vocabulary = {symbols_of(data): id_ for id_, data in table if data}
    off = dict.fromkeys(("add_prefix_space", "trim_offsets", "use_regex"), False)
    byte_level = {"type": "ByteLevel", **off}
    words = [_split(_pattern(tokenizer))] if isinstance(tokenizer, BytePairTokenizer) else []
    merges = [*merges_of(tokenizer)]
    return {
        **described,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*words, byte_level]},
        "decoder": byte_level,
        "model": {"type": "BPE", "ignore_merges": True, "vocab": vocabulary, "merges": merges},
    }


def _split(pattern: str) -> dict[str, Any]:
    regex = {"Regex": pattern}
    return {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}


def _pattern(tokenizer: BytePairTokenizer) -> str:
    """Its pattern for Oniguruma, where {1,3}+ repeats and $ is also the end of a line."""
    atomic = re.sub(r"(\\p\{\w+\}\{\d+,\d+\})\+", r"(?>\1)", tokenizer.pattern)
    return re.sub(r"(?<!\\)\$", r"\\z", atomic)


def _beginning(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """A post-processor that puts the beginning of text before a text."""
    names, begin = _names(tokenizer), tokenizer.begin_of_text
    if begin is None or begin not in names:
        return None
    token = {"SpecialToken": {"id": names[begin], "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    known = {"id": names[begin], "ids": [begin], "tokens": [names[begin]]}
    return {
        "type": "TemplateProcessing",
        "single": [token, first],
        "pair": [token, first, second],
        "special_tokens": {names[begin]: known},
    }


def _check(tokenizer: Tokenizer, text: str) -> None:
    import tokenizers

    probe = tokenizer.characters if isinstance(tokenizer, CharacterTokenizer) else _PROBE
    try:
        with panics_as("the library fails", ValueError):
            ids = tokenizers.Tokenizer.from_str(text).encode(probe, add_special_tokens=False).ids
    except Exception as error:  # the library has no class of its own
        raise UsageError(
            f"the tokenizer {tokenizer.name!r} cannot be written as a tokenizer.json ({error})"
        ) from None
    if ids != tokenizer.encode(probe).tolist():
        raise UsageError(
            f"the tokenizer {tokenizer.name!r} cannot be written as a tokenizer.json: its split "
            "pattern means something else to Hugging Face's library"
        )
