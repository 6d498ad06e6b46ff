r"""How text is spelled for people, on a page and in a terminal.

Control characters drive a terminal, and invisible or direction-changing ones make a text look like
something else (Boucher and Anderson 2021, "Trojan Source"), so both are spelled as Python spells
them: \x1b, \u202e. page.js spells text in the same way in the browser.
"""

import codecs
import unicodedata
from collections.abc import Mapping
from typing import Any

# They join or part letters and emoji, and change nothing else.
JOINERS = "\u200c\u200d"
_UNSAFE_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")


def is_unsafe(character: str) -> bool:
    """Whether a character must be spelled out; line breaks and tabs are among these."""
    if character.isprintable() or character in JOINERS:
        return False
    return unicodedata.category(character) in _UNSAFE_CATEGORIES


def escape_character(character: str) -> str:
    r"""\xNN, \uNNNN or \UNNNNNNNN, with \n, \r and \t by their letters."""
    return character.encode("unicode_escape").decode("ascii")


def escaped(text: str, keep: str = "") -> str:
    r"""A text that does nothing but be read: \n, \x1b, \u202e; characters of `keep` stay."""
    return "".join(escape_character(c) if is_unsafe(c) and c not in keep else c for c in text)


def ends_inside_character(token: Mapping[str, Any]) -> bool:
    """Whether the next token is needed to complete the last character of this token record."""
    if token["utf8"] != "bad":
        return token["utf8"] in ("open", "continue")
    # Bytes that are no UTF-8 together with the bytes before them may still open a character.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(bytes(token["bytes"]))
    return decoder.getstate()[0] != b""
