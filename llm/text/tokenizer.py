"""Text to token ids and back: bytes, characters, byte-pair encodings; each token's bytes.

A tokenizer is fully described by its definition, a small JSON object. Saved with a run, it encodes
and decodes without the corpus and without a network, and its sha256 identifies it.

Sources: byte-level BPE is Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners"; it runs in tiktoken (https://github.com/openai/tiktoken). `characters` is nanoGPT's
data/shakespeare_char/prepare.py. Training a vocabulary is llm/text/bpe.py.
"""

import abc
import base64
import contextlib
import difflib
import hashlib
import itertools
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from llm.errors import CheckpointError, DataError, UsageError
from llm.files import read_json, why, write_atomic

Ids = npt.NDArray[np.int32]

END_OF_TEXT = "<|endoftext|>"
FILE_NAME = "tokenizer.json"

# A file may claim any id, and each costs memory. The largest vocabularies have a million tokens
# (Liang et al. 2023, "XLM-V").
LARGEST_VOCABULARY = 2**22

# After so many characters, a tenth of a second of tiktoken's work, a faster library's tables pay.
_FAST_AFTER = 2**20

# Kinds of tokenizers whose vocabulary the corpus decides (llm/text/shards.py makes them). Every
# other kind is a name that `named_tokenizer` knows.
MADE_FROM_CORPUS = ("characters", "bpe")


def sha256_of_json(values: Mapping[str, Any]) -> str:
    """Hash of values as JSON; equal values have equal hashes, in whatever order their keys are."""
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


class Tokenizer(abc.ABC):
    """Token ids 0 to vocab_size - 1, and the bytes of each token.

    Attributes:
      name: "bytes", "characters", "bpe" or the name of a tiktoken encoding.
      special_tokens: spelling -> id of tokens that stand for no text.
      end_of_text: the id that ends a document; None if there is none.
      other_ends: more ids that end a text, where generation stops too.
      begin_of_text: the id that stands before a document; None if nothing does.
      prefix: the bytes of a document's tokens that are before its text: a space, or nothing.
      lossy: the bytes of a text's tokens may be other than the text's.
      token_table: the bytes of each id; b"" for special tokens and unassigned ids.
      settings: what else its folder said of it, such as a chat template. It changes no id, so that
        it is no part of the definition; an export hands it on.
    """

    begin_of_text: int | None = None
    other_ends: tuple[int, ...] = ()
    prefix = b""
    lossy = False
    settings: Mapping[str, Any] = {}

    def __init__(self, name: str, token_table: list[bytes], special_tokens: Mapping[str, int]):
        self.name = name
        self.token_table = token_table
        self.special_tokens = dict(special_tokens)
        self.end_of_text = self.special_tokens.get(END_OF_TEXT)
        self._special_names = {id_: spelling for spelling, id_ in special_tokens.items()}

    def encode(self, text: str, *, special: bool = False, continues: bool = False) -> Ids:
        """int32 [n], without a beginning and an end of text.

        Args:
          special: the spelling of a special token becomes its id; otherwise it is ordinary text.
          continues: the text goes on with a document, so that nothing is put before it.
        Raises:
          UsageError: a character without a token, or a lone surrogate; with its place in the text.
        """
        special = special and bool(self.special_tokens)
        return (self._encode_special if special else self._encode)(text, continues)

    def _encode(self, text: str, continues: bool) -> Ids:
        raise NotImplementedError

    def _encode_special(self, text: str, continues: bool) -> Ids:
        spellings = sorted(self.special_tokens, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, spellings))})", text)
        ids = [
            [self.special_tokens[part]] if n % 2 else self._encode(part, continues)
            for n, part in enumerate(parts)
        ]
        return np.concatenate(ids).astype(np.int32)

    def begun(self, ids: Sequence[int] | Ids) -> Ids:
        """The ids of a document with the beginning of text before them, unless they have it."""
        ids = np.asarray(ids, np.int32)
        if self.begin_of_text is None or ids[:1].tolist() == [self.begin_of_text]:
            return ids
        return np.concatenate([np.array([self.begin_of_text], np.int32), ids])

    def last_cut(self, text: str) -> int:
        """How much of a piece of a document may be encoded by itself: an index, the last one.

        A piece ends where no byte-level pattern's token goes on (llm/text/documents.py).
        """
        return len(text)

    def changed(self, text: str) -> int:
        """How many bytes of a text are spelled in another way by its tokens, as NFC does."""
        return 0

    @abc.abstractmethod
    def definition(self) -> dict[str, Any]:
        """Everything needed to build an equal tokenizer, as JSON."""

    @property
    def ends_of_text(self) -> tuple[int, ...]:
        """Every id that ends a text."""
        return () if self.end_of_text is None else (self.end_of_text, *self.other_ends)

    @property
    def vocab_size(self) -> int:
        return len(self.token_table)

    @cached_property
    def sha256(self) -> str:
        """Hash of the definition: equal tokenizers have equal hashes."""
        return sha256_of_json(self.definition())

    @cached_property
    def unassigned(self) -> tuple[tuple[int, int], ...]:
        """[start, stop) of ids that no token has."""
        taken = (
            id_ for id_, data in enumerate(self.token_table) if data or id_ in self._special_names
        )
        ids = [-1, *taken, self.vocab_size]
        return tuple((a + 1, b) for a, b in itertools.pairwise(ids) if a + 1 < b)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token; b"" for special tokens and unassigned ids."""
        if not 0 <= token_id < self.vocab_size:
            raise IndexError(f"token id {token_id} is not in [0, {self.vocab_size})")
        return self.token_table[token_id]

    def token_name(self, token_id: int) -> str:
        r"""The token for people: its text, with \xNN for bytes that are not UTF-8 by themselves."""
        shown = self.token_bytes(token_id).decode("utf-8", "backslashreplace")
        return shown or self._special_names.get(token_id, f"<|unassigned {token_id}|>")

    def byte_lengths(self) -> Ids:
        """int32 [vocab_size]: the bytes of text in each token, summed over whole documents: what
        stands before or behind a document takes away the bytes that are put before its text.
        """
        lengths = np.fromiter(map(len, self.token_table), np.int32, self.vocab_size)
        border = self.end_of_text if self.begin_of_text is None else self.begin_of_text
        if border is not None:
            lengths[border] -= len(self.prefix)
        return lengths

    def decode_bytes(self, ids: Iterable[int], *, continues: bool = False) -> bytes:
        """The bytes of a text's tokens, less those that are put before a document.

        Args:
          continues: the first token is not the first of a document.
        """
        read = TextBytes(self, continues)
        return b"".join(read(int(token_id)) for token_id in ids)

    def decode(self, ids: Iterable[int], *, continues: bool = False) -> str:
        """The text of tokens, as `decode_bytes`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids, continues=continues).decode("utf-8", "replace")

    def save(self, directory: Path) -> None:
        """Write DIRECTORY/tokenizer.json unless it exists; all that `load_tokenizer` needs."""
        directory.mkdir(parents=True, exist_ok=True)
        saved = {"name": self.name, "sha256": self.sha256, "definition": self.definition()}
        saved |= {"settings": self.settings} if self.settings else {}
        path, content = directory / FILE_NAME, json.dumps(saved, indent=1).encode()
        is_there = path.is_file() and path.stat().st_size == len(content)
        if not is_there or path.read_bytes() != content:
            write_atomic(path, content)


class TextBytes:
    """The bytes that each token of a growing text adds to it: the token's bytes, less those that
    the tokenizer puts before a document.
    """

    def __init__(self, tokenizer: Tokenizer, continues: bool = False):
        self._tokenizer = tokenizer
        self._borders = {tokenizer.begin_of_text, *tokenizer.ends_of_text}
        self._begins = bool(tokenizer.prefix) and not continues

    def __call__(self, token_id: int) -> bytes:
        """The next token's."""
        data = self._tokenizer.token_bytes(token_id)
        if self._begins and data:
            self._begins, data = False, data.removeprefix(self._tokenizer.prefix)
        elif token_id in self._borders:
            self._begins = bool(self._tokenizer.prefix)
        return data


class ByteTokenizer(Tokenizer):
    """256 bytes and an end of text: encodes any text without training."""

    def __init__(self) -> None:
        super().__init__("bytes", [bytes([b]) for b in range(256)] + [b""], {END_OF_TEXT: 256})

    def _encode(self, text: str, continues: bool) -> Ids:
        """As `Tokenizer.encode`. Bytes decoded with surrogateescape become the same bytes again."""
        try:
            encoded = text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError as error:
            raise unseen(text, error.start, SURROGATE) from None
        return np.frombuffer(encoded, np.uint8).astype(np.int32)

    def definition(self) -> dict[str, Any]:
        return {"kind": "bytes"}


class CharacterTokenizer(Tokenizer):
    """One token for each character of the corpus, in the order of code points; no end of text."""

    def __init__(self, characters: str):
        self.characters = "".join(sorted(set(characters)))
        super().__init__("characters", [c.encode() for c in self.characters], {})
        codes = _code_points(self.characters)
        self._id_of = np.full(codes.max() + 2, -1, np.int32)
        self._id_of[codes] = np.arange(len(codes))

    def _encode(self, text: str, continues: bool) -> Ids:
        # Code points beyond the end of the table use its last entry, which is always -1.
        ids = self._id_of[np.minimum(_code_points(text), len(self._id_of) - 1)]
        missing = np.flatnonzero(ids < 0)
        if missing.size:
            reason = (
                f"is not one of the {self.vocab_size} characters that this tokenizer was built "
                "from; leave it out, or train with a corpus that has it or with tokenizer.kind = "
                "'bytes'"
            )
            raise unseen(text, int(missing[0]), reason)
        return ids

    def definition(self) -> dict[str, Any]:
        return {"kind": "characters", "characters": self.characters}


def characters_of(texts: Iterable[str]) -> str:
    """Each distinct character once, in the order of code points."""
    seen = np.zeros(sys.maxunicode + 1, np.bool_)
    for text in texts:
        seen[_code_points(text)] = True
    return "".join(map(chr, np.flatnonzero(seen).tolist()))


class BytePairTokenizer(Tokenizer):
    """A byte-level byte-pair encoding, run by tiktoken.

    Args:
      name: "bpe" for a vocabulary trained here, else the name of the tiktoken encoding.
      pattern: regular expression of the pre-tokens; no merge crosses their borders.
      ranks: token -> id, which is also the order of merges.
      special_tokens: spelling -> id.
      vocab_size: of the model that it is for, if that has more ids.
    Raises:
      ValueError: a byte without a token, two tokens of one id, or a pattern that does not compile.
    """

    def __init__(
        self,
        name: str,
        pattern: str,
        ranks: Mapping[bytes, int],
        special_tokens: Mapping[str, int],
        vocab_size: int = 0,
    ):
        import tiktoken

        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise ValueError(f"the byte {missing[0]} has no token; expected one for each byte")
        ids = [*ranks.values(), *special_tokens.values()]
        self._least_size = max(ids) + 1
        table = [b""] * max(self._least_size, vocab_size)
        for token, rank in ranks.items():
            table[rank] = token
        if len(set(ids)) != len(ids):
            raise ValueError("two tokens have the same id")
        super().__init__(name, table, special_tokens)
        self.pattern, self._encoded = pattern, 0
        self._encoding = tiktoken.Encoding(
            name,
            pat_str=pattern,
            mergeable_ranks=dict(ranks),
            special_tokens=dict(special_tokens),
        )

    def _encode(self, text: str, continues: bool) -> Ids:
        self._encoded += len(text)
        if self._encoded > _FAST_AFTER and self._fast:
            with contextlib.suppress(Exception):  # tiktoken says what is wrong, or does it
                ids = self._fast.encode(text)
                if int(self._lengths[ids].sum()) == utf8_length(text):
                    return ids
        try:
            with panics_as(self._unusable_pattern):
                ids = self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int32)
        except UnicodeEncodeError as error:
            raise unseen(text, error.start, SURROGATE) from None
        except ValueError as error:  # tiktoken gives up a pattern that backtracks too long
            raise UsageError(f"{self._unusable_pattern} ({error})") from None
        if int(self._lengths[ids].sum()) != utf8_length(text):
            raise UsageError(self._unusable_pattern)
        return ids

    @cached_property
    def _lengths(self) -> Ids:
        return self.byte_lengths()

    @cached_property
    def _fast(self) -> Any:
        from llm.text.fast import fast_pairs

        return fast_pairs(self._encoding)

    @property
    def _unusable_pattern(self) -> str:
        return (
            f"the split pattern of the tokenizer, {self.pattern[:200]!r}, does not cut this text "
            "into words; expected a pattern that matches every character once"
        )

    def definition(self) -> dict[str, Any]:
        ranks = {base64.b64encode(t).decode(): id_ for id_, t in enumerate(self.token_table) if t}
        return {
            "kind": "byte_pairs",
            "name": self.name,
            "pattern": self.pattern,
            "special_tokens": self.special_tokens,
            "ranks": ranks,
        } | ({"vocab_size": self.vocab_size} if self.vocab_size > self._least_size else {})


SURROGATE = "is half of a surrogate pair, which is not a character"


@contextlib.contextmanager
def panics_as(message: str, error: type[Exception] = UsageError) -> Iterator[None]:
    """Raise an error if a library written in Rust panics, which is no Exception."""
    try:
        yield
    except BaseException as panic:
        if type(panic).__name__ != "PanicException":
            raise
        raise error(f"{message} ({panic})") from None


def lossy_note(tokenizer: Tokenizer) -> str:
    """What every report of a model with such a tokenizer says."""
    return (
        f"the tokenizer {tokenizer.name!r} loses text (tokenizer.lossy): bytes, bits per byte and "
        "offsets are of the text that its tokens spell"
    )


def named_tokenizer(kind: str, vocab_size: int = 0, *, lossy: bool = False) -> Tokenizer:
    """A tokenizer that needs no corpus: "bytes", the name of a tiktoken encoding, or a path.

    Args:
      vocab_size: of the model that it is for; the ids beyond the tokenizer's are no tokens.
    """
    if is_path(kind):
        from llm.text.tokenizer_folder import open_tokenizer

        return open_tokenizer(Path(kind), vocab_size, lossy=lossy)
    return ByteTokenizer() if kind == "bytes" else tiktoken_tokenizer(kind, vocab_size)


def known_kinds() -> tuple[str, ...]:
    """The kinds of tokenizers that are names; every other is a path."""
    import tiktoken

    return ("bytes", *MADE_FROM_CORPUS, *tiktoken.list_encoding_names())


def is_path(kind: str) -> bool:
    """Whether a kind of tokenizer is a file or a folder, and not a name."""
    return kind not in known_kinds() and ("/" in kind or Path(kind).exists())


def unseen(text: str, index: int, why: str) -> UsageError:
    """The error for a character without a token, with its place in the text."""
    character = text[index]
    shown = f", {character}" if character.isprintable() else ""
    line = text.count("\n", 0, index) + 1
    column = index - text.rfind("\n", 0, index)
    return UsageError(
        f"the character {character!a} (U+{ord(character):04X}{shown}) at index {index} (line "
        f"{line}, column {column}) {why}"
    )


def tiktoken_tokenizer(name: str, vocab_size: int = 0) -> BytePairTokenizer:
    """A public encoding by its name, from tiktoken's cache or the network.

    Raises:
      UsageError: there is no encoding of this name.
      DataError: the encoding is not cached and cannot be fetched.
    """
    import tiktoken

    check_kind(name)
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0][:200]
        raise DataError(
            f"the tiktoken encoding {name!r} is not on this machine and could not be fetched "
            f"({reason}). Offline: on a machine with a network run `TIKTOKEN_CACHE_DIR=DIR "
            f"python -c 'import tiktoken; tiktoken.get_encoding(\"{name}\")'`, copy DIR here and "
            "set TIKTOKEN_CACHE_DIR to it"
        ) from None
    return BytePairTokenizer(
        name, encoding._pat_str, encoding._mergeable_ranks, encoding._special_tokens, vocab_size
    )


def cached_gpt2() -> BytePairTokenizer | None:
    """The encoding gpt2 if its files are where tiktoken keeps them; nothing is fetched."""
    folder = os.environ.get("DATA_GYM_CACHE_DIR", f"{tempfile.gettempdir()}/data-gym-cache")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", folder)
    urls = (f"{_GPT2_URL}/{name}" for name in ("vocab.bpe", "encoder.json"))
    if all(Path(folder, hashlib.sha1(url.encode()).hexdigest()).is_file() for url in urls):
        with contextlib.suppress(DataError):
            return tiktoken_tokenizer("gpt2")
    return None


_GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"

# Sizes of the encodings that the settings name, so that a plan needs none of them on this machine.
_ENCODING_SIZES = {"gpt2": 50257, "cl100k_base": 100277, "o200k_base": 200019}


def known_vocab_size(kind: str) -> int | None:
    """The vocabulary size of a kind of tokenizer; None if the corpus decides it.

    Raises:
      UsageError: there is no such kind.
      DataError: the encoding is not known here and cannot be fetched.
    """
    if kind in MADE_FROM_CORPUS:
        return None
    return _ENCODING_SIZES.get(kind) or named_tokenizer(kind).vocab_size


def check_kind(kind: str) -> None:
    """Raise a UsageError that lists the known kinds, unless `kind` is one of them or a path."""
    known = known_kinds()
    if kind not in known and not is_path(kind):
        near = difflib.get_close_matches(kind, known, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(
            f"tokenizer.kind = {kind!r}: no such tokenizer; {hint}expected one of "
            f"{', '.join(known)}, or the path of a tokenizer.json, a sentencepiece .model or a "
            "folder of Hugging Face"
        )


_Id = Annotated[int, msgspec.Meta(ge=0, lt=LARGEST_VOCABULARY)]


class _Bytes(msgspec.Struct, tag_field="kind", tag="bytes"):
    def open(self) -> Tokenizer:
        return ByteTokenizer()


class _Characters(msgspec.Struct, tag_field="kind", tag="characters"):
    characters: Annotated[str, msgspec.Meta(min_length=1)]

    def open(self) -> Tokenizer:
        return CharacterTokenizer(self.characters)


class _BytePairs(msgspec.Struct, tag_field="kind", tag="byte_pairs"):
    name: str
    pattern: str
    special_tokens: dict[str, _Id]
    ranks: dict[Annotated[bytes, msgspec.Meta(min_length=1)], _Id]
    vocab_size: Annotated[int, msgspec.Meta(ge=0, le=LARGEST_VOCABULARY)] = 0

    def open(self) -> Tokenizer:
        return BytePairTokenizer(
            self.name, self.pattern, self.ranks, self.special_tokens, self.vocab_size
        )


class _Imported(msgspec.Struct, tag_field="kind", tag="imported"):
    file: str
    vocab_size: Annotated[int, msgspec.Meta(ge=1, le=LARGEST_VOCABULARY)]
    begin: _Id | None
    ends: tuple[_Id, ...]
    lossy: bool

    def open(self) -> Tokenizer:
        from llm.text.imported import ImportedTokenizer

        return ImportedTokenizer("imported", *msgspec.structs.astuple(self))


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer that `save` wrote.

    Raises:
      CheckpointError: the file is missing, is not what was saved, or describes no tokenizer.
    """
    path = Path(directory) / FILE_NAME
    try:
        saved = read_json(path)
        definition = saved["definition"]
        whole = saved["sha256"] == sha256_of_json(definition)
    except OSError as error:
        raise CheckpointError(f"no tokenizer at {path}: {why(error)}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise CheckpointError(f"{path} is not a saved tokenizer: it is damaged")
    try:
        tokenizer = msgspec.convert(
            definition, _Bytes | _Characters | _BytePairs | _Imported
        ).open()
        if definition["kind"] == "imported":
            # The name of its folder is no part of the hash: a copy elsewhere is the same tokenizer.
            tokenizer.name = msgspec.convert(saved.get("name", tokenizer.name), str)
            tokenizer.settings = msgspec.convert(saved.get("settings", {}), dict[str, Any])
        return tokenizer
    except (msgspec.ValidationError, ValueError) as error:
        raise CheckpointError(
            f"{path} describes no tokenizer that this version can use: {error}"
        ) from None


def utf8_length(text: str) -> int:
    """The bytes of a text; half of a surrogate pair counts as three."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


@cache
def byte_of_symbol() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte -> the byte (its encoder.py, bytes_to_unicode)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + n): byte for n, byte in enumerate(others)
    }


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.dtype("<u4"))
