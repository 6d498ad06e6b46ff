"""Prepare a corpus: tokenise it once into shards on disk, find them again, open them.

    CACHE/shards/FINGERPRINT/header.json    what is there: counts, bounds, hashes, sources, splits
    CACHE/shards/FINGERPRINT/train*         a stream (llm/text/stream.py); validation* is another

The fingerprint is a hash of all that decides the tokens: the content of the files, the tokenizer,
the split. Equal settings on equal content find the same folder, wherever the corpus lies.
"""

import collections
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from llm.config import DataConfig, TokenizerConfig
from llm.errors import DataError
from llm.text.bpe import PATTERN, train_bpe
from llm.text.cache import Progress, built_once, cache_root, is_disk_full, silent
from llm.text.documents import Document, ReadingReport, read_documents
from llm.text.sources import Found, Origin, find_origins
from llm.text.splits import TokenSplit, is_held_out, tail_boundary
from llm.text.stream import Manifest, StreamWriter, TokenStream, remedy, smallest_dtype
from llm.text.tokenizer import (
    ByteTokenizer,
    CharacterTokenizer,
    Ids,
    Tokenizer,
    check_kind,
    load_tokenizer,
    tiktoken_tokenizer,
)

# Raised when the same settings and content would give other tokens or another layout.
FORMAT = 1
SHARD_TOKENS = 100_000_000
HEADER = "header.json"

# Opening compares sha256 up to this size, which costs less than 0.1 s; beyond it sizes, bounds and
# each batch's ids are checked, and TokenizedCorpus.verify() reads everything.
VERIFY_ON_OPEN_BYTES = 2**26

# One task of a tokenising thread: enough that handing it over costs nothing beside it.
_TASK_CHARACTERS = 2**18


@dataclass(frozen=True)
class TokenizedCorpus:
    """A corpus ready to train on.

    Attributes:
      train, validation: the splits; validation is empty for data.validation = "none".
      fingerprint: names these tokens; equal for equal content, tokenizer and split.
      documents: how many there are; empty ones are not counted.
      text_bytes: of all documents, as UTF-8.
      replaced: how many replacement characters data.errors = "replace" put in.
      origins: the files, with sizes and hashes.
      notes: what a person should know, one sentence each.
      reused: the shards were there already.
    """

    tokenizer: Tokenizer
    train: TokenSplit
    validation: TokenSplit
    fingerprint: str
    folder: Path
    documents: int
    text_bytes: int
    replaced: int
    origins: tuple[Origin, ...]
    notes: tuple[str, ...]
    reused: bool
    streams: tuple[TokenStream, ...]

    @property
    def tokens(self) -> int:
        return sum(len(stream) for stream in self.streams)

    def verify(self) -> None:
        """Compare every byte of the shards with its sha256; DataError names what differs."""
        for stream in self.streams:
            stream.verify()


def prepare(
    data: DataConfig, tokenizer: TokenizerConfig, *, on_progress: Progress = silent
) -> TokenizedCorpus:
    """The corpus of the settings, tokenised: from the cache, or made now.

    Args:
      on_progress: called with (what, bytes done, bytes in all or None) often enough for a bar; what
        it raises stops the preparation and leaves nothing behind.
    Raises:
      DataError: no text, text that cannot be read, shards that cannot be trusted, a full disk.
      UsageError: a setting that cannot be used.
      UnseenCharacterError: never for text of the corpus itself but for half surrogate pairs.
    """
    root = cache_root(data.cache_dir)
    check_kind(tokenizer.kind)
    found = find_origins(data.source, root, on_progress)
    try:
        encoder = _tokenizer_for(tokenizer, data, found, root, on_progress)
        fingerprint = _fingerprint(data, found.origins, encoder)
        folder = root / "shards" / fingerprint[:32]
        with built_once(folder, on_progress) as partial:
            if partial is not None:
                header = _tokenise(partial, data, found, encoder, on_progress)
                _write_header(partial, {"fingerprint": fingerprint, **header})
    except OSError as error:
        if is_disk_full(error):
            raise DataError(_disk_full(root, found.origins)) from None
        raise
    corpus = open_corpus(folder, encoder, reused=partial is None)
    if tokenizer.kind == "bpe" and encoder.vocab_size < tokenizer.vocab_size:
        note = (
            f"the corpus is too small for {tokenizer.vocab_size} bpe tokens; it gave "
            f"{encoder.vocab_size}"
        )
        corpus = _with_note(corpus, note)
    return corpus


def open_corpus(folder: Path, tokenizer: Tokenizer, *, reused: bool = True) -> TokenizedCorpus:
    """Shards that `prepare` wrote.

    Raises:
      DataError: naming the file that is not as the header says, what was expected and found.
    """
    header = _read_header(folder)
    if header["tokenizer"]["sha256"] != tokenizer.sha256:
        raise DataError(
            f"{folder / HEADER}: expected the tokenizer {tokenizer.name} ({tokenizer.sha256}), found "
            f"{header['tokenizer']['name']} ({header['tokenizer']['sha256']}){remedy(folder)}"
        )
    manifests = {name: Manifest.from_json(m) for name, m in header["streams"].items()}
    stored = sum(shard.bytes for manifest in manifests.values() for shard in manifest.shards)
    streams = {
        name: TokenStream(
            folder, manifest, tokenizer.vocab_size, hashed=stored <= VERIFY_ON_OPEN_BYTES
        )
        for name, manifest in manifests.items()
    }
    train, validation = (
        TokenSplit(streams[split["stream"]], split["start"], split["stop"])
        for split in (header["splits"]["train"], header["splits"]["validation"])
    )
    return TokenizedCorpus(
        tokenizer=tokenizer,
        train=train,
        validation=validation,
        fingerprint=header["fingerprint"],
        folder=folder,
        documents=header["documents"],
        text_bytes=header["text_bytes"],
        replaced=header["replaced"],
        origins=tuple(Origin(**origin) for origin in header["origins"]),
        notes=tuple(header["notes"]),
        reused=reused,
        streams=tuple(streams.values()),
    )
