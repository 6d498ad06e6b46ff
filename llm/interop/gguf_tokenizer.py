"""A tokenizer as the keys of a GGUF file.

llama.cpp has two kinds of byte pairs:

    gpt2     bytes in words. It cuts words by patterns of its own, and a file names one of them
    llama    characters and U+2581 for a space, as sentencepiece. It joins any two neighbours that
             are a token, the token of the highest score first

Source: llama.cpp's src/llama-vocab.cpp.
"""

from collections.abc import Mapping
from typing import Any

from llm.console import say
from llm.errors import UsageError
from llm.interop.export_tokenizer import begin_and_ends, merges_of, symbols_of
from llm.text.bpe import PATTERN
from llm.text.described import PREPEND, REPLACE, SPACE, parts_of
from llm.text.imported import ImportedTokenizer
from llm.text.tokenizer import BytePairTokenizer, ByteTokenizer, Tokenizer

# The words of a tokenizer of ours, by its name -> llama.cpp's name of a pattern that cuts the same.
_WORDS = {
    "bytes": "gpt-2",
    "gpt2": "gpt-2",
    "r50k_base": "gpt-2",
    "p50k_base": "gpt-2",
    "cl100k_base": "llama-bpe",
    "o200k_base": "gpt-4o",
    "bpe": "bailingmoe",
}
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGIT = r"\p{N}"
# The patterns of an imported tokenizer, one after the other, and whether it takes a word that is a
# token whole -> llama.cpp's name.
_IMPORTED_WORDS = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGIT, _GPT2), False): "starcoder",
    ((_GPT4.replace("DIGITS", r"\p{N}{1,3}"),), True): "llama-bpe",
    ((_GPT4.replace("DIGITS", r"\p{N}{1,3}"),), False): "dbrx",
    ((_GPT4.replace("DIGITS", r"\p{N}"),), False): "qwen2",
    ((PATTERN,), False): "bailingmoe",
}
# Kinds of tokens in a file.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)


def vocabulary(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a file says of a tokenizer, by the names of keys without "tokenizer.".

    Raises:
      UsageError: llama.cpp has no such tokenizer.
    """
    is_pairs = isinstance(tokenizer, BytePairTokenizer | ByteTokenizer)
    if isinstance(tokenizer, ImportedTokenizer):
        spellings, kinds, words = _imported(tokenizer)
    elif is_pairs and tokenizer.name in _WORDS:
        spellings, kinds, words = _of_ours(tokenizer)
    else:
        raise UsageError(
            f"llama.cpp has no tokenizer like {tokenizer.name!r}; export-gguf writes those of "
            f"{', '.join(_WORDS)}, and imported ones"
        )
    begin, ends = begin_and_ends(tokenizer)
    roles = zip(("bos", "eos", "eot", "eom"), (begin, *ends), strict=False)
    template = tokenizer.settings.get("chat_template")
    if isinstance(template, dict):  # several, by their names; llama.cpp knows one
        template = template.get("default")
    return {
        **words,
        **({"chat_template": template} if isinstance(template, str) else {}),
        "ggml.tokens": spellings,
        "ggml.token_type": kinds,
        **{f"ggml.{role}_token_id": id_ for role, id_ in roles if id_ is not None},
        "ggml.add_bos_token": tokenizer.begin_of_text is not None,
    }


def _of_ours(tokenizer: Tokenizer) -> tuple[list[str], list[int], dict[str, Any]]:
    """The spelling and the kind of each token, and the keys of its kind of tokenizer."""
    if r"\p{N}{1,2}" in getattr(tokenizer, "pattern", ""):
        say(
            "WARNING: this vocabulary has tokens of two digits, and llama.cpp cuts numbers into "
            "single digits: texts with numbers have other ids there, and less likely ones; every "
            "other text has the same"
        )
    names = {id_: spelling for spelling, id_ in tokenizer.special_tokens.items()}
    spellings, kinds = [], []
    for id_, data in enumerate(tokenizer.token_table):
        spellings.append(symbols_of(data) if data else names.get(id_, f"[UNUSED{id_}]"))
        kinds.append(_NORMAL if data else _CONTROL if id_ in names else _UNUSED)
    # A file without merges does not open. This one makes no token, so that bytes stay bytes.
    merges = [*merges_of(tokenizer)] or ["~ ~"]
    return spellings, kinds, _gpt2(_WORDS[tokenizer.name], merges)


def _gpt2(words: str, merges: list[str]) -> dict[str, Any]:
    return {"ggml.model": "gpt2", "ggml.pre": words, "ggml.merges": merges}


def _imported(tokenizer: ImportedTokenizer) -> tuple[list[str], list[int], dict[str, Any]]:
    """As `_of_ours`."""
    file = tokenizer.parsed
    model, added = file["model"], {x["id"]: x for x in file.get("added_tokens") or ()}
    if model.get("type", "BPE") != "BPE":
        raise _unknown(tokenizer, f"its model is {model['type']}")
    spelled = {id_: token for token, id_ in model["vocab"].items()}
    spelled |= {id_: token["content"] for id_, token in added.items()}
    spellings, kinds = [], []
    for id_, data in enumerate(tokenizer.token_table):
        spelling = spelled.get(id_, f"[UNUSED{id_}]")
        spellings.append(spelling)
        if not data:
            is_unknown = spelling == model.get("unk_token")
            kind = _UNKNOWN if is_unknown else _CONTROL if id_ in spelled else _UNUSED
        elif id_ in added:
            kind = _USER_DEFINED
        else:
            is_byte = not tokenizer.described.byte_level and spelling == f"<0x{data[0]:02X}>"
            kind = _BYTE if is_byte else _NORMAL
        kinds.append(kind)
    merges = [x.split(" ") if isinstance(x, str) else x for x in model["merges"]]
    if tokenizer.described.byte_level:
        return spellings, kinds, _gpt2(_words(tokenizer), [" ".join(merge) for merge in merges])
    return spellings, kinds, _llama(tokenizer, spellings, kinds, merges)


def _unknown(tokenizer: Tokenizer, reason: str) -> UsageError:
    return UsageError(f"llama.cpp has no tokenizer like {tokenizer.name!r}: {reason}")


def _words(tokenizer: ImportedTokenizer) -> str:
    """llama.cpp's name of the words of a byte-level tokenizer."""
    patterns = []
    for part in parts_of(tokenizer.parsed["pre_tokenizer"]):
        if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
            patterns.append(part["pattern"].get("Regex"))
        elif part["type"] == "Digits" and part["individual_digits"]:
            patterns.append(_DIGIT)
        elif part["type"] == "ByteLevel" and not part["add_prefix_space"]:
            patterns += [_GPT2] * part.get("use_regex", True)
        else:
            raise _unknown(tokenizer, f"pre_tokenizer = {part}")
    whole = bool(tokenizer.parsed["model"].get("ignore_merges"))
    if (tuple(patterns), whole) not in _IMPORTED_WORDS:
        raise _unknown(
            tokenizer,
            f"none of its pre-tokenizers cuts words by {' and then '.join(map(repr, patterns))}"
            f" with ignore_merges = {str(whole).lower()}",
        )
    normalizers = [part["type"] for part in parts_of(tokenizer.parsed.get("normalizer"))]
    if normalizers:
        say(
            f"WARNING: llama.cpp does not normalise a text as this tokenizer does "
            f"({', '.join(normalizers)}): a text that this changes has other ids there"
        )
    return _IMPORTED_WORDS[tuple(patterns), whole]


def _llama(
    tokenizer: ImportedTokenizer, spellings: list[str], kinds: list[int], merges: list[list[str]]
) -> dict[str, Any]:
    """The keys of a tokenizer with byte fallback, with a score for each token that merges make."""
    file = tokenizer.parsed
    cuts_words = False
    for part in (*parts_of(file.get("normalizer")), *parts_of(file.get("pre_tokenizer"))):
        if part["type"] == "Metaspace":
            cuts_words |= part.get("split", True)
        elif part not in (PREPEND, REPLACE) and part.get("pattern") != {"String": " "}:
            raise _unknown(tokenizer, f"it has the part {part['type']}")
    scores: dict[str, float] = {}
    for rank, (left, right) in enumerate(merges):
        scores.setdefault(left + right, -float(rank))
    normal = {token for token, kind in zip(spellings, kinds, strict=True) if kind == _NORMAL}
    pairs = {
        (token[:i], token[i:])
        for token in normal
        for i in range(1, len(token))
        if token[:i] in normal and token[i:] in normal
    }
    ranks = [scores[left + right] for left, right in merges]
    has_inner = cuts_words and any(SPACE in token[1:] for token in normal)
    if pairs != set(map(tuple, merges)) or ranks != sorted(ranks, reverse=True) or has_inner:
        raise _unknown(tokenizer, "its merges are not those of a sentencepiece model")
    unknown: Mapping[str, int] = {"ggml.unknown_token_id": kinds.index(_UNKNOWN)}
    return {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.scores": [scores.get(token, 0.0) for token in spellings],
        "ggml.add_space_prefix": bool(tokenizer.prefix),
        **(unknown if _UNKNOWN in kinds else {}),
    }
