"""Prepare a corpus: tokenise it once into shards on disk, find them again, open them.

    CACHE/shards/FINGERPRINT/header.json    what is there: counts, bounds, hashes, sources, splits
    CACHE/shards/FINGERPRINT/STREAM*        streams (llm/text/stream.py): train and validation for
                                            data.validation = "documents:F", else one, text
    CACHE/tokenizers/FINGERPRINT/           tokenizers that were made from a corpus

A fingerprint is a hash of everything that decides the content of the folder: the files, the
tokenizer and the split. Equal settings on equal content find the same folder, wherever the corpus
lies.
"""

import collections
import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from pydantic import TypeAdapter

from llm.config import DataConfig, TokenizerConfig
from llm.errors import CheckpointError, DataError, UsageError
from llm.files import is_disk_full
from llm.text.bpe import LONGEST_WORD, PATTERN, TRAINING_CHARACTERS, UNBROKEN, train_bpe
from llm.text.cache import OnProgress, built_once, cache_root, no_room, silent
from llm.text.documents import KINDS, Document, Origin, Reader
from llm.text.sources import Found, find_origins
from llm.text.splits import TokenSplit, is_held_out, tail_boundary
from llm.text.stream import StreamManifest, StreamWriter, TokenStream, remedy, smallest_dtype
from llm.text.tokenizer import (
    MADE_FROM_CORPUS,
    CharacterTokenizer,
    Ids,
    Tokenizer,
    characters_of,
    check_kind,
    known_kinds,
    load_tokenizer,
    lossy_note,
    named_tokenizer,
    sha256_of_json,
    utf8_length,
)

# Increase it when the same settings and content would give other tokens or another layout.
FORMAT = 1
SHARD_TOKENS = 100_000_000
HEADER = "header.json"

# Up to this size, opening compares the sha256 of every file. Beyond it, opening checks sizes and
# bounds, and the ids of each batch are checked as they are read.
VERIFY_ON_OPEN_BYTES = 2**26

# One task of a tokenising thread: large enough that handing it over costs little in comparison.
_TASK_CHARACTERS = 2**18

_NO_TEXT = "the corpus has no text: every document is empty; point data.source at text"

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class TokenizedCorpus:
    """A corpus ready to train on.

    Attributes:
      train, validation: the splits; validation is empty for data.validation = "none".
      fingerprint: identifies these tokens; equal for equal content, tokenizer and split.
      folder: the folder that holds the shards.
      documents: number of documents that are not empty.
      text_bytes: size of all documents as UTF-8.
      replaced: how many replacement characters data.errors = "replace" inserted.
      origins: the files, with sizes and hashes.
      notes: what a person should know, one sentence each.
      reused: whether the shards existed before.
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

    def check_sizes(self) -> None:
        """Raise a DataError if a shard is not as long as it was: the system gives zeros for the
        tokens that are missing on a page, and ends a process that reads a page without any."""
        self.train.stream.check_sizes()
        self.validation.stream.check_sizes()

    def why_unreadable(self) -> str:
        """What is wrong with the shards, for a process that the system ends because of them."""
        try:
            self.check_sizes()
        except DataError as error:
            return str(error)
        return (
            f"{self.folder} or another file in memory cannot be read any more: a disk failed, or a "
            "network file system is gone. When it is back, run the same command again"
        )


def prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    *,
    of_run: Path | None = None,
    on_progress: OnProgress = silent,
) -> TokenizedCorpus:
    """The corpus of the settings, tokenised: from the cache, or made now.

    Args:
      of_run: the folder of a run's own tokenizer, which is taken if the settings name a file: the
        file may have changed since, or be gone.
      on_progress: called with (what, bytes done, bytes in all or None), often enough for a progress
        bar. An exception from it stops the preparation, which leaves nothing behind.
    Raises:
      DataError: no text, text that cannot be read, shards that cannot be trusted, a full disk.
      UsageError: a setting that cannot be used, a split that leaves one side empty, half of a
        surrogate pair in the text.
    """
    root = cache_root(data.cache_dir)
    own = None
    if of_run is not None and tokenizer.kind not in known_kinds():
        own = load_tokenizer(of_run)
    else:
        check_kind(tokenizer.kind)
    found = Found((), ())
    try:
        found = find_origins(data.source, root, on_progress)
        encoder = own or _tokenizer_for(tokenizer, data, found, root, on_progress)
        fingerprint = _fingerprint(data, found.origins, encoder)
        folder = root / "shards" / fingerprint[:32]
        with built_once(folder, on_progress) as partial:
            if partial is not None:
                header = _tokenise(partial, data, found, encoder, on_progress)
                _write_header(partial, {"fingerprint": fingerprint, **header})
    except OSError as error:
        if is_disk_full(error):
            raise no_room("the token shards", root, _needed(found), error) from None
        # Errors of the sources are answered where they are read.
        raise UsageError(
            f"{error.filename or root}: {error.strerror}; this corpus has to be prepared first, so "
            "set data.cache_dir to a folder that can be written"
        ) from None
    header = _read_header(folder, fingerprint)
    return TokenizedCorpus(
        **_open_splits(folder, header, encoder.vocab_size),
        tokenizer=encoder,
        fingerprint=fingerprint,
        folder=folder,
        documents=header["documents"],
        text_bytes=header["text_bytes"],
        replaced=header["replaced"],
        # The shards may have been made from the same files in another place.
        origins=found.origins,
        notes=(*found.notes, *_notes(header, encoder, tokenizer)),
        reused=partial is None,
    )


def _open_splits(folder: Path, header: dict[str, Any], vocab_size: int) -> dict[str, TokenSplit]:
    """The splits of a corpus by their names.

    Raises:
      DataError: a file is not as the header says; the message says what was expected and found.
    """
    manifests = TypeAdapter(dict[str, StreamManifest]).validate_python(header["streams"])
    stored = sum(file.bytes for manifest in manifests.values() for file in manifest.files)
    hashed = stored <= VERIFY_ON_OPEN_BYTES
    streams = {
        name: TokenStream(folder, manifest, vocab_size, hashed=hashed)
        for name, manifest in manifests.items()
    }
    return {
        name: TokenSplit(streams[split["stream"]], split["start"], split["stop"])
        for name, split in header["splits"].items()
    }


def _tokenizer_for(
    config: TokenizerConfig, data: DataConfig, found: Found, root: Path, on_progress: OnProgress
) -> Tokenizer:
    """The tokenizer of the settings. One that is made from the corpus uses held-out text too, as in
    nanoGPT.
    """
    if config.kind not in MADE_FROM_CORPUS:
        return named_tokenizer(config.kind, lossy=config.lossy)
    recipe = {"format": FORMAT, "kind": config.kind, **_content(data, found.origins)}
    if config.kind == "bpe":
        recipe |= {
            "vocab_size": config.vocab_size,
            "pattern": PATTERN,
            "training_characters": [TRAINING_CHARACTERS, UNBROKEN, LONGEST_WORD],
        }
    folder = root / "tokenizers" / sha256_of_json(recipe)[:32]
    with built_once(folder, on_progress) as partial:
        if partial is not None:
            texts = _all_text(data, found, on_progress)
            if config.kind == "bpe":
                made: Tokenizer = train_bpe(texts, config.vocab_size, on_progress)
            else:
                made = CharacterTokenizer(characters_of(texts))
            made.save(partial)
    try:
        return load_tokenizer(folder)
    except CheckpointError as error:
        raise DataError(f"{error}{remedy(folder)}") from None


def _all_text(data: DataConfig, found: Found, on_progress: OnProgress) -> Iterator[str]:
    done, total = 0, found.text_bytes
    reader = Reader(data.errors, data.text_field, data.bad_rows)
    for document in reader.documents(found.origins):
        for text in document.pieces:
            on_progress("reading the vocabulary", done, total)
            yield text
            done += utf8_length(text)
    if not done:
        raise DataError(_NO_TEXT)


def _fingerprint(data: DataConfig, origins: Iterable[Origin], encoder: Tokenizer) -> str:
    decides = {
        "format": FORMAT,
        "shard_tokens": SHARD_TOKENS,
        "tokenizer": encoder.sha256,
        "validation": data.validation,
        **_content(data, origins),
    }
    return sha256_of_json(decides)


def _content(data: DataConfig, origins: Iterable[Origin]) -> dict[str, Any]:
    """Everything that decides the documents, names included: the shards hold them for `replay`."""
    rows = any(KINDS[origin.kind].has_rows for origin in origins)
    content = {
        "origins": [[origin.name, origin.kind, origin.sha256] for origin in origins],
        "errors": data.errors,
        "text_field": data.text_field if rows else None,
    }
    # It is not there by default, so that shards from before the setting are found.
    return content | ({"bad_rows": "skip"} if rows and data.bad_rows == "skip" else {})


def _tokenise(
    folder: Path, data: DataConfig, found: Found, encoder: Tokenizer, on_progress: OnProgress
) -> dict[str, Any]:
    """Write the streams of the corpus, and return the header that describes them."""
    reader = Reader(data.errors, data.text_field, data.bad_rows)
    pieces = _marked_pieces(reader.documents(found.origins), data.validation, encoder)
    names = ("train", "validation") if data.validation.startswith("documents:") else ("text",)
    dtype = smallest_dtype(encoder.vocab_size)
    text_bytes, changed, total = 0, 0, found.text_bytes
    with contextlib.ExitStack() as files:
        writers = {
            name: files.enter_context(StreamWriter(folder, name, dtype, SHARD_TOKENS))
            for name in names
        }
        for piece, ids, size, differs in _encoded(pieces, encoder, data.workers or _cores()):
            on_progress("tokenising", text_bytes, total)
            if piece.begins:
                writers[piece.stream].begin_document(piece.document)
            writers[piece.stream].add(ids)
            text_bytes += size
            changed += differs
        manifests = {name: writer.finish() for name, writer in writers.items()}
    return {
        "tokenizer": {"name": encoder.name, "sha256": encoder.sha256},
        "streams": {name: asdict(manifest) for name, manifest in manifests.items()},
        "splits": _splits(data.validation, manifests),
        "documents": sum(manifest.documents for manifest in manifests.values()),
        "text_bytes": text_bytes,
        "replaced": reader.replaced,
        "skipped": reader.skipped,
        "first_skipped": reader.first_skipped,
        "normalised": changed,
        "origins": [asdict(origin) for origin in found.origins],
    }


def _notes(header: dict[str, Any], encoder: Tokenizer, wanted: TokenizerConfig) -> Iterator[str]:
    """What a person should know of the tokens, wherever their text lies now."""
    if count := header["replaced"]:
        yield f"bytes that are not UTF-8 were replaced by {count} characters U+FFFD"
    if count := header.get("skipped"):
        yield f"left out {count} rows without text; the first: {header['first_skipped']}"
    if count := header.get("normalised"):
        yield (
            f"the tokenizer {header['tokenizer']['name']!r} reads text in NFC, which spells "
            f"{count} bytes of it in another way: the text is as NFC has it"
        )
    if encoder.lossy:
        yield lossy_note(encoder)
    if wanted.kind == "bpe" and encoder.vocab_size < wanted.vocab_size:
        yield (
            f"the corpus is too small for {wanted.vocab_size} bpe tokens; it gave "
            f"{encoder.vocab_size}"
        )


class _Piece(NamedTuple):
    """A piece of a document, the stream it goes to, and whether it is the first or the last."""

    stream: str
    document: str
    text: str
    begins: bool
    ends: bool


def _marked_pieces(
    documents: Iterable[Document], validation: str, encoder: Tokenizer
) -> Iterator[_Piece]:
    kind, _, fraction = validation.partition(":")
    stream = "text"
    for document in documents:
        if kind == "documents":
            held_out = is_held_out(document.sha256, float(fraction))
            stream = "validation" if held_out else "train"
        begins = True
        pieces = _encodable(document.pieces, encoder)
        for text, following in itertools.pairwise(itertools.chain(pieces, [""])):
            yield _Piece(stream, document.name, text, begins, ends=not following)
            begins = False


def _encodable(pieces: Iterable[str], encoder: Tokenizer) -> Iterator[str]:
    """The same text in pieces that the tokenizer may encode one by one."""
    held: list[str] = []
    for piece in pieces:
        cut = encoder.last_cut(piece)
        held.append(piece[:cut] if cut else piece)
        if cut:
            yield "".join(held)
            held = [piece[cut:]] if cut < len(piece) else []
    if held:
        yield "".join(held)


def _encoded(
    pieces: Iterable[_Piece], encoder: Tokenizer, workers: int
) -> Iterator[tuple[_Piece, Ids, int, int]]:
    """Each piece in order, its ids, and its size in bytes. A beginning and an end of text, if the
    tokenizer has them, stand before and behind each document.
    """
    end = [] if encoder.end_of_text is None else [encoder.end_of_text]
    end_ids = np.array(end, np.int32)

    def encode(piece: _Piece) -> tuple[_Piece, Ids, int, int]:
        ids = encoder.encode(piece.text, continues=not piece.begins)
        ids = encoder.begun(ids) if piece.begins else ids
        ids = np.concatenate([ids, end_ids]) if piece.ends else ids
        return piece, ids, utf8_length(piece.text), encoder.changed(piece.text)

    tasks = _in_order(lambda task: [encode(piece) for piece in task], _grouped(pieces), workers)
    return itertools.chain.from_iterable(tasks)


def _grouped(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    group: list[_Piece] = []
    characters = 0
    for piece in pieces:
        group.append(piece)
        characters += len(piece.text)
        if characters >= _TASK_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _in_order(
    function: Callable[[_Item], _Result], items: Iterable[_Item], workers: int
) -> Iterator[_Result]:
    """The function's result for each item, in order, computed by threads.

    Threads suffice, because tiktoken and NumPy release the interpreter's lock, and threads copy
    nothing. At most two items per thread are in flight, so memory is bounded.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="tokenise")
    pending: collections.deque[Future[_Result]] = collections.deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _cores() -> int:
    """How many cores this process may use, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _splits(validation: str, manifests: dict[str, StreamManifest]) -> dict[str, dict[str, Any]]:
    """The place of each split: a stream, and the first and last token there.

    Raises:
      DataError: there are no tokens.
      UsageError: documents are held out, and one side has none.
    """
    if not any(manifest.tokens for manifest in manifests.values()):
        raise DataError(_NO_TEXT)
    kind, _, fraction = validation.partition(":")
    if kind == "documents":
        documents = sum(manifest.documents for manifest in manifests.values())
        for name, held_out in (("train", "all"), ("validation", "none")):
            if not manifests[name].tokens:
                raise UsageError(
                    f"data.validation = {validation!r} goes by the hash of each document and holds "
                    f"out {held_out} of the {documents} there are: the {name} split is empty; set "
                    f"data.validation = 'tail:{fraction}', which holds out the end of the text, or "
                    "'none'"
                )
        places = {name: (name, 0, manifest.tokens) for name, manifest in manifests.items()}
    else:
        tokens = manifests["text"].tokens
        boundary = tokens if kind == "none" else tail_boundary(tokens, fraction)
        places = {"train": ("text", 0, boundary), "validation": ("text", boundary, tokens)}
    keys = ("stream", "start", "stop")
    return {name: dict(zip(keys, place, strict=True)) for name, place in places.items()}


def _write_header(folder: Path, header: dict[str, Any]) -> None:
    """header.json holds its own hash too: nothing else vouches for the splits and counts."""
    content = {"sha256": sha256_of_json(header), **header}
    (folder / HEADER).write_text(json.dumps(content, indent=1))


def _read_header(folder: Path, fingerprint: str) -> dict[str, Any]:
    path = folder / HEADER
    try:
        header = json.loads(path.read_bytes())
        whole = header.pop("sha256") == sha256_of_json(header)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}{remedy(folder)}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise DataError(f"{path} is damaged: it is not what was written{remedy(folder)}")
    if header["fingerprint"] != fingerprint:
        raise DataError(
            f"{path} is of another corpus or tokenizer: expected the fingerprint {fingerprint}, "
            f"found {header['fingerprint']}{remedy(folder)}"
        )
    return header


def _needed(found: Found) -> str:
    if found.text_bytes is None:
        return "how much the corpus needs is not known beforehand"
    return (
        f"{found.text_bytes} bytes of text need up to {2 * found.text_bytes} (2 for each token, 4 "
        "if the vocabulary has more than 65,536)"
    )
