r"""How tokens are spelled for people, on a page and in a terminal.

Two questions that every surface must answer alike: which tokens share a character (a byte-level
token may end inside one), and which characters must not be shown as they are. Control characters
drive a terminal, and invisible or direction-changing ones make a text look like what it is not
(Boucher and Anderson 2021, "Trojan Source"), so they are spelled as Python would: \x1b, \u202e.

page.js does the same in the browser.
"""

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

TokenRecord = dict[str, Any]

# They join or part letters and emoji, and change nothing else.
JOINERS = "\u200c\u200d"
_UNSAFE_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")


@dataclass(frozen=True)
class Cell:
    """The shortest run of tokens that begins and ends between characters; most hold one token.

    Attributes:
      start: index of the first token in its sample.
      tokens: their records.
      closed: False where the last token's text is still to come.
    """

    start: int
    tokens: tuple[TokenRecord, ...]
    closed: bool

    @property
    def text(self) -> str:
        return "".join(token["text"] for token in self.tokens) if self.closed else ""

    @property
    def spelled_out(self) -> bool:
        """True where tokens stand for no text of their own: each is shown by its name."""
        return not self.text


def cells(tokens: Iterable[TokenRecord]) -> Iterator[Cell]:
    """The tokens of one sample as cells, each as soon as it is complete."""
    start, shared = 0, list[TokenRecord]()
    for token in tokens:
        shared.append(token)
        if not ends_inside_character(token):
            yield Cell(start, tuple(shared), closed=True)
            start, shared = start + len(shared), []
    if shared:
        # A finished sample that ends inside a character has U+FFFD as the text of its last token.
        yield Cell(start, tuple(shared), closed=shared[-1]["utf8"] == "bad")


def ends_inside_character(token: TokenRecord) -> bool:
    """Whether the next token is needed to complete the last character of this one."""
    if token["utf8"] != "bad":
        return token["utf8"] in ("open", "continue")
    # Bytes that are no UTF-8 together with those before them may still open a character.
    for back, byte in enumerate(reversed(token["bytes"][-3:]), start=1):
        if byte < 0x80:
            return False
        if byte >= 0xC0:
            return back < _sequence_length(byte)
    return False


def pieces(text: str) -> Iterator[tuple[str, str]]:
    """A text as runs of one kind: "plain", "space", "tab", "newline" or "escape"."""
    kind, run = "", ""
    for character in text:
        its_kind = _kind(character)
        if run and (its_kind != kind or kind in ("tab", "newline", "escape")):
            yield kind, run
            run = ""
        kind, run = its_kind, run + character
    if run:
        yield kind, run


def escaped(text: str) -> str:
    r"""A text in one line that does nothing but be read: \n, \x1b, \u202e."""
    return "".join(
        escape_character(part) if kind in ("escape", "newline", "tab") else part
        for kind, part in pieces(text)
    )


def escape_character(character: str) -> str:
    r"""\xNN, \uNNNN or \UNNNNNNNN, with \n, \r and \t by their letters."""
    if character in "\n\r\t":
        return {"\n": r"\n", "\r": r"\r", "\t": r"\t"}[character]
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _kind(character: str) -> str:
    match character:
        case " ":
            return "space"
        case "\t":
            return "tab"
        case "\n":
            return "newline"
    if character.isprintable() or character in JOINERS:
        return "plain"
    return "escape" if unicodedata.category(character) in _UNSAFE_CATEGORIES else "plain"


def _sequence_length(lead: int) -> int:
    """How many bytes a character has that begins with this byte; 0 for a byte that cannot."""
    if 0xC2 <= lead < 0xE0:
        return 2
    if 0xE0 <= lead < 0xF0:
        return 3
    return 4 if 0xF0 <= lead < 0xF5 else 0
