"""The text of a growing sequence of tokens, and where a stop string cuts it.

A token may end inside a character, so text comes from an incremental UTF-8 decoder: a token's
`text` is what the decoder emits when the token's bytes arrive. Concatenated, the `text` of all
tokens is the text of all their bytes, less the space that a tokenizer may put before a document.

    utf8        before the token       after it
    ok          between characters     between characters
    open        between                inside one
    continue    inside                 inside one (the same, or the next)
    close       inside                 between
    bad         the token's bytes, with those that waited, are not UTF-8: its text carries U+FFFD

What it is not: a tokenizer. Bytes come from the tokenizer; they are never re-encoded from text.
"""

import codecs
from collections.abc import Sequence

from msgspec.structs import replace

from llm.inference.records import NO_NUMBERS, Numbers, Phase, Spellings, TokenRecord, Utf8
from llm.text.tokenizer import TextBytes


class Transcript:
    """Token ids in, records out; remembers what a decoder must remember between them."""

    def __init__(self, spellings: Spellings, sample: int = 0):
        self._spellings = spellings
        self._text_bytes = TextBytes(spellings.tokenizer)
        self._sample = sample
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._position = self._characters = self._bytes = 0

    def add(
        self, id_: int, phase: Phase, numbers: Numbers = NO_NUMBERS, silent: bool = False
    ) -> TokenRecord:
        """The next token.

        Args:
          silent: it adds nothing to the text, as a stop string adds nothing.
        """
        name, values = self._spellings[id_]
        adds = self._text_bytes(id_)
        data = b"" if silent else adds
        waiting = self._decoder.getstate()[0]
        text = self._decoder.decode(data)
        if "\ufffd" in text and not _is_utf8_so_far(waiting + data):
            utf8: Utf8 = "bad"
        else:
            utf8 = _UTF8[bool(waiting), bool(self._decoder.getstate()[0])]
        token = TokenRecord(
            self._sample,
            phase,
            self._position,
            id_,
            name,
            values,
            text,
            self._characters,
            self._bytes,
            utf8,
            *numbers,
        )
        self._position += 1
        self._characters += len(text)
        self._bytes += len(adds)
        return token

    def close(self, last: TokenRecord) -> TokenRecord:
        """The last token again, carrying U+FFFD for a character that nobody completed."""
        rest = self._decoder.decode(b"", final=True)
        self._characters += len(rest)
        return replace(last, text=last.text + rest, utf8="bad") if rest else last


class StopStrings:
    """Ends a sample where its generated text first contains one of these strings.

    Tokens whose text may yet turn out to belong to a stop string are withheld, so that what comes
    out is final: streamed text never shows part of a stop string. The tokens up to and including
    the one that completes it all come out; their `text` is cut where the stop string begins, and
    their `bytes` stay what the model said.

    Args:
      kept: the text is cut behind the stop string instead, which is then part of it.
    """

    def __init__(self, stops: Sequence[str], kept: bool = False):
        self._matches = {stop: Match(stop) for stop in stops}
        self._kept = kept
        self._withheld: list[TokenRecord] = []

    def add(self, token: TokenRecord) -> tuple[list[TokenRecord], str | None]:
        """The tokens that are final now, and the stop string if one was completed."""
        if not self._matches:
            return [token], None
        self._withheld.append(token)
        starts = {stop: match.read(token.text) for stop, match in self._matches.items()}
        found = {stop: start for stop, start in starts.items() if start is not None}
        if found:
            stop = min(found, key=found.__getitem__)
            cut = token.text_offset + found[stop] + (len(stop) if self._kept else 0)
            return [_cut(token, cut) for token in self.release()], stop
        end = token.text_offset + len(token.text)
        safe = end - max(match.length for match in self._matches.values())
        final = 0
        for token in self._withheld:
            if token.text_offset + len(token.text) > safe:
                break
            final += 1
        released, self._withheld = self._withheld[:final], self._withheld[final:]
        return released, None

    def release(self) -> list[TokenRecord]:
        """What is withheld, when no more will come."""
        released, self._withheld = self._withheld, []
        return released


class Match:
    """How much of a stop string the end of a growing text spells.

    Knuth, Morris and Pratt 1977: each character is looked at once, so that a long stop string costs
    no more than the text. What is known of the string's own repetitions grows with `length`.

    Attributes:
      length: characters of the stop string, from its first, that the text ends with.
    """

    def __init__(self, stop: str):
        self.length = 0
        self._stop = stop
        self._borders = [0, 0]  # of n characters of it: how many both begin and end them, under n

    def read(self, text: str) -> int | None:
        """Where the stop string begins if this text completes it, else None.

        Counted from the text's own beginning, so below 0 where it began before.
        """
        for place, character in enumerate(text, start=1):
            self.length = self._longest(self.length, character)
            if self.length == len(self._stop):
                return place - self.length
            if self.length == len(self._borders):
                self._borders.append(self._longest(self._borders[-1], character))
        return None

    def _longest(self, length: int, character: str) -> int:
        """`length` after one more character."""
        while length and self._stop[length] != character:
            length = self._borders[length]
        return length + 1 if self._stop[length] == character else 0


def _cut(token: TokenRecord, end: int) -> TokenRecord:
    """The token without the text at and beyond character `end` of its sample."""
    return replace(
        token,
        text=token.text[: max(0, end - token.text_offset)],
        text_offset=min(token.text_offset, end),
    )


def _is_utf8_so_far(data: bytes) -> bool:
    """Whether these bytes can be the beginning of a text."""
    try:
        codecs.getincrementaldecoder("utf-8")("strict").decode(data)
    except UnicodeDecodeError:
        return False
    return True


_UTF8: dict[tuple[bool, bool], Utf8] = {
    (False, False): "ok",
    (False, True): "open",
    (True, True): "continue",
    (True, False): "close",
}
