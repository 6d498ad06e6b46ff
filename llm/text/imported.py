"""Tokenizers that others made: a tokenizer.json, a folder of Hugging Face, a sentencepiece model.

The `tokenizers` library encodes. Everything else follows from the vocabulary, because decoding id
by id with the library loses spaces:

    a token's bytes   byte-level vocabularies: the bytes that its symbols stand for; others: its
                      UTF-8, U+2581 being a space where the tokenizer uses it so, <0xNN> that byte;
                      special tokens and ids without a token: none
    a text's bytes    those of its tokens, one after the other, less the one space that some
                      tokenizers put before a document

`encode` checks this for every text, so that records, offsets and bits per byte are of the text that
was given. A tokenizer that is made to lose text is refused when it is opened, unless the caller
takes the loss.

Sources: the format is that of https://github.com/huggingface/tokenizers; byte fallback and U+2581
are sentencepiece's (Kudo and Richardson 2018).
"""

import functools
import json
import re
from typing import Any

import numpy as np

from llm.text.described import SPACE, Described, without_prefix
from llm.text.tokenizer import (
    LARGEST_VOCABULARY,
    SURROGATE,
    Ids,
    Tokenizer,
    byte_of_symbol,
    panics_as,
    unseen,
    utf8_length,
)


class ImportedTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library.

    Args:
      file: the content of its tokenizer.json.
      vocab_size: of the model that it is for, whose other ids no token has; 0: as many as it has.
      begin: the id before a document; None if the model was trained without one.
      ends: the ids that end a document; the first is put behind one in training.
      lossy: take a tokenizer that loses text, and do not check what it does to a text.
    Raises:
      ValueError: `file` is no such tokenizer, an id is outside the vocabulary, or it loses text.
    """

    def __init__(
        self,
        name: str,
        file: str,
        vocab_size: int,
        begin: int | None = None,
        ends: tuple[int, ...] = (),
        lossy: bool = False,
    ):
        try:
            self.parsed = json.loads(file)
            library = self._library_of(file)
            vocabulary = library.get_vocab(with_added_tokens=True)
            self.described = Described.of(self.parsed, vocabulary.keys())
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"it is not a tokenizer.json ({error!r})") from None
        if self.described.losses and not lossy:
            raise ValueError(
                f"it loses text: {', '.join(self.described.losses)}; take another tokenizer, or "
                "set tokenizer.lossy = true, which every report will repeat"
            )
        self._file, self._libraries, self.lossy = file, {(False, False): library}, lossy
        vocab_size = vocab_size or max(vocabulary.values()) + 1
        if vocab_size > LARGEST_VOCABULARY:
            raise ValueError(f"it has {vocab_size} ids, expected at most {LARGEST_VOCABULARY}")
        for id_ in (*ends, *([] if begin is None else [begin])):
            if type(id_) is not int or not 0 <= id_ < vocab_size:
                raise ValueError(
                    f"a text of it begins or ends with the token {id_!r}, expected an id below "
                    f"{vocab_size}"
                )
        added = library.get_added_tokens_decoder()
        table, special = [b""] * vocab_size, {}
        for spelling, id_ in vocabulary.items():
            if id_ >= vocab_size and id_ in added and added[id_].special:
                continue  # no text becomes this token, so that the model can do without it
            if not 0 <= id_ < vocab_size:
                raise ValueError(
                    f"its token {spelling!r} has the id {id_}, and the model has only "
                    f"{vocab_size} tokens"
                )
            if id_ not in added:
                table[id_] = self._spelled(spelling)
            elif not added[id_].special and id_ not in (begin, *ends):
                table[id_] = self._raw(spelling)
            if not table[id_]:
                special[spelling] = id_
        super().__init__(name, table, special)
        self.begin_of_text, self.other_ends = begin, ends[1:]
        self.end_of_text = ends[0] if ends else None
        self.prefix = b" " * self.described.prefix

    def _encode(self, text: str, continues: bool) -> Ids:
        ids = self._ids(text, False, continues)
        if not self.lossy:
            self._check(text, ids, continues)
        return ids

    def _encode_special(self, text: str, continues: bool) -> Ids:
        return self._ids(text, True, continues)

    def definition(self) -> dict[str, Any]:
        return {
            "kind": "imported",
            "file": self._file,
            "vocab_size": self.vocab_size,
            "begin": self.begin_of_text,
            "ends": list(self.ends_of_text),
            "lossy": self.lossy,
        }

    def last_cut(self, text: str) -> int:
        """As `Tokenizer.last_cut`. A merge makes a token, so that no merge crosses two characters
        that no token has side by side, and what lies before them is encoded by itself.
        """
        if self.described.byte_level:
            return len(text)
        if not self.described.local:
            return 0
        spelled = text.replace(" ", SPACE)
        places = range(len(text) - 1, 0, -1)
        return next((i for i in places if spelled[i - 1 : i + 1] not in self._neighbours), 0)

    def changed(self, text: str) -> int:
        """As `Tokenizer.changed`: the bytes of words that are not in NFC."""
        normal = self._normal(text)
        if normal == text:
            return 0
        words = zip(text.split(" "), normal.split(" "), strict=True)
        return sum(utf8_length(word) for word, composed in words if word != composed)

    @functools.cached_property
    def _neighbours(self) -> set[str]:
        """Each two characters that stand side by side in a token."""
        tokens = self._libraries[False, False].get_vocab(with_added_tokens=True)
        spelled = [token.replace(" ", SPACE) for token in tokens]
        return {token[i : i + 2] for token in spelled for i in range(len(token) - 1)}

    def _ids(self, text: str, special: bool, continues: bool) -> Ids:
        library = self._library(special, continues and bool(self.prefix))
        try:
            with panics_as(f"the tokenizer {self.name!r} cannot cut this text into words"):
                encoded = library.encode_batch_fast([text], add_special_tokens=False)[0]
        except (TypeError, UnicodeEncodeError):
            place = next(i for i, character in enumerate(text) if "\ud800" <= character < "\ue000")
            raise unseen(text, place, SURROGATE) from None
        return np.array(encoded.ids, np.int32)

    def _check(self, text: str, ids: Ids, continues: bool) -> None:
        """Raise a UsageError with the first place where the tokens' bytes are not the text's."""
        normal, prefix = self._normal(text), b"" if continues or not text else self.prefix
        found = b"".join(map(self.token_table.__getitem__, ids.tolist()))
        expected = prefix + normal.encode()
        if found == expected:
            return
        pairs = enumerate(zip(found, expected, strict=False))
        same = next((i for i, (a, b) in pairs if a != b), min(len(found), len(expected)))
        place = len(expected[len(prefix) : same].decode("utf-8", "ignore"))
        place = min(place, len(normal) - 1)
        space = ", which stands for a space in this tokenizer," * (normal[place] == SPACE)
        raise unseen(
            normal,
            place,
            f"is lost{space} when the tokenizer {self.name!r} encodes it; leave it out, or set "
            "tokenizer.lossy = true, which every report will repeat",
        )

    def _normal(self, text: str) -> str:
        """The text that the tokenizer encodes: in NFC, where it asks for that."""
        if text.isascii() or not self.described.composes:
            return text
        from tokenizers.normalizers import NFC

        return NFC().normalize_str(text)

    def _spelled(self, token: str) -> bytes:
        """The bytes of a token of the model's vocabulary."""
        if self.described.byte_level:
            symbols = byte_of_symbol()
            return bytes(symbols[c] for c in token) if set(token) <= symbols.keys() else b""
        if self.parsed["model"].get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        if token == self.parsed["model"].get("unk_token"):
            return b""
        return self._raw(token)

    def _raw(self, token: str) -> bytes:
        return (token.replace(SPACE, " ") if self.described.spaces else token).encode()

    def _library(self, special: bool, continues: bool) -> Any:
        """The library's tokenizer; what continues a document has no space put before it."""
        if (special, continues) not in self._libraries:
            keys = ("normalizer", "pre_tokenizer") if continues else ()
            changed = {key: without_prefix(self.parsed.get(key)) for key in keys}
            library = self._library_of(json.dumps(self.parsed | changed))
            library.encode_special_tokens = not special
            self._libraries[special, continues] = library
        return self._libraries[special, continues]

    @staticmethod
    def _library_of(file: str) -> Any:
        import tokenizers

        try:
            with panics_as("the library fails", ValueError):
                library = tokenizers.Tokenizer.from_str(file)
        except Exception as error:  # the library has no class of its own
            raise ValueError(f"it is not a tokenizer.json ({error})") from None
        library.no_truncation()
        library.no_padding()
        library.encode_special_tokens = True
        return library
