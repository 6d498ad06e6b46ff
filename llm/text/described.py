"""What a tokenizer.json says about itself: how its tokens are spelled, and what it does to a text.

Source: the format is that of https://github.com/huggingface/tokenizers.
"""

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

from llm.text.tokenizer import byte_of_symbol

SPACE = "\u2581"

# Parts of a tokenizer.json that lose nothing. Any other normalizer or pre-tokenizer does, or may.
_LOSSLESS = ("NFC", "ByteLevel", "Metaspace", "Split", "Digits", "Punctuation", "UnicodeScripts")
PREPEND = {"type": "Prepend", "prepend": SPACE}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}

# What makes an added token depend on more of a text than its own letters.
_FAR = ("single_word", "lstrip", "rstrip")


@dataclass(frozen=True)
class Described:
    """What a tokenizer.json says about itself.

    Attributes:
      byte_level: its tokens are spelled in GPT-2's symbols for bytes.
      spaces: U+2581 in a token is a space.
      prefix: it puts a space before a text.
      composes: it encodes the text in NFC.
      local: no rule of it looks further than two neighbouring characters.
      losses: the names of its parts that lose text.
    """

    byte_level: bool
    spaces: bool
    prefix: bool
    composes: bool
    local: bool
    losses: tuple[str, ...]

    @classmethod
    def of(cls, file: Mapping[str, Any], vocabulary: Set[str]) -> "Described":
        parts = (*parts_of(file.get("normalizer")), *parts_of(file.get("pre_tokenizer")))
        model, types = file["model"], {part["type"] for part in parts}
        byte_level = "ByteLevel" in types
        spelled = {byte: {symbol} for symbol, byte in byte_of_symbol().items()}
        if not byte_level:  # Gemma's vocabulary has a tabulator, and no <0x09>
            spelled = {byte: {f"<0x{byte:02X}>", chr(byte)} for byte in range(128)}
            spelled |= {byte: {f"<0x{byte:02X}>"} for byte in range(128, 256)}
        whole = not any(map(vocabulary.isdisjoint, spelled.values()))
        losses = [part["type"] for part in parts if _loses(part)]
        if not whole or not (byte_level or model.get("byte_fallback")):
            losses.append(f"{model.get('type', 'model')} without a token for each byte")
        added = [token for token in file.get("added_tokens") or () if not token["special"]]
        prefix = any(map(_puts_space_before, parts))
        # Each part of a text between added tokens may get a space of its own.
        far = any(token.get(rule) for token in added for rule in _FAR) or (prefix and bool(added))
        return cls(
            byte_level,
            spaces="Metaspace" in types or REPLACE in parts,
            prefix=prefix,
            composes="NFC" in types,
            local=all(map(_is_local, parts)) and not far,
            losses=tuple(losses),
        )


def parts_of(component: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """A normalizer, pre-tokenizer or post-processor, or its members if it is a sequence."""
    if component is not None and component["type"] == "Sequence":
        for member in component[_members(component)]:
            yield from parts_of(member)
    elif component is not None:
        yield component


def _members(sequence: Mapping[str, Any]) -> str:
    return next(key for key in ("normalizers", "pretokenizers", "processors") if key in sequence)


def _loses(part: Mapping[str, Any]) -> bool:
    removes = part.get("behavior") == "Removed" or part.get("replacement", SPACE) != SPACE
    return part not in (PREPEND, REPLACE) and (part["type"] not in _LOSSLESS or removes)


def _puts_space_before(part: Mapping[str, Any]) -> bool:
    if part["type"] == "Metaspace":
        return part.get("prepend_scheme") != "never" and part.get("add_prefix_space") is not False
    return part == PREPEND or (part["type"] == "ByteLevel" and part["add_prefix_space"])


def _is_local(part: Mapping[str, Any]) -> bool:
    """Whether what it does at a place depends on the two characters there alone."""
    one_character = len((part.get("pattern") or {}).get("String", "")) == 1
    return part == PREPEND or part["type"] == "Metaspace" or one_character


def without_prefix(component: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """A normalizer or pre-tokenizer that puts no space before a text."""
    if component is None or component == PREPEND:
        return None
    if component["type"] == "Sequence":
        key = _members(component)
        return {**component, key: [*filter(None, map(without_prefix, component[key]))]}
    never: dict[str, dict[str, Any]] = {
        "Metaspace": {"prepend_scheme": "never", "add_prefix_space": False},
        "ByteLevel": {"add_prefix_space": False},
    }
    return {**component, **never.get(component["type"], {})}
