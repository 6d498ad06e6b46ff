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
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from llm.config import DataConfig, TokenizerConfig
from llm.errors import CheckpointError, DataError, UsageError
from llm.files import is_disk_full
from llm.text.bpe import PATTERN, TRAINING_CHARACTERS, train_bpe
from llm.text.cache import OnProgress, built_once, cache_root, silent
from llm.text.documents import Document, ReadingReport, read_documents
from llm.text.sources import Found, Origin, find_origins
from llm.text.splits import TokenSplit, is_held_out, tail_boundary
from llm.text.stream import StreamManifest, StreamWriter, TokenStream, remedy, smallest_dtype
from llm.text.tokenizer import (
    ByteTokenizer,
    CharacterTokenizer,
    Ids,
    Tokenizer,
    characters_of,
    check_kind,
    load_tokenizer,
    tiktoken_tokenizer,
)

# Increase it when the same settings and content would give other tokens or another layout.
FORMAT = 1
SHARD_TOKENS = 100_000_000
HEADER = "header.json"

# Up to this size, opening compares the sha256 of every file. Beyond it, opening checks sizes and
# bounds, the ids of each batch are checked, and TokenizedCorpus.verify() reads everything.
VERIFY_ON_OPEN_BYTES = 2**26

# One task of a tokenising thread: large enough that handing it over costs little in comparison.
_TASK_CHARACTERS = 2**18

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
      streams: the streams that `train` and `validation` are parts of.
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
    data: DataConfig, tokenizer: TokenizerConfig, *, on_progress: OnProgress = silent
) -> TokenizedCorpus:
    """The corpus of the settings, tokenised: from the cache, or made now.

    Args:
      on_progress: called with (what, bytes done, bytes in all or None), often enough for a progress
        bar. An exception from it stops the preparation, which leaves nothing behind.
    Raises:
      DataError: no text, text that cannot be read, shards that cannot be trusted, a full disk.
      UsageError: a setting that cannot be used, a split that leaves one side empty.
      UnseenCharacterError: the corpus has half of a surrogate pair.
    """
    root = cache_root(data.cache_dir)
    check_kind(tokenizer.kind)
    found = Found([], [])
    try:
        found = find_origins(data.source, root, on_progress)
        encoder = _tokenizer_for(tokenizer, data, found, root, on_progress)
        fingerprint = _fingerprint(data, found.origins, encoder)
        folder = root / "shards" / fingerprint[:32]
        with built_once(folder, on_progress) as partial:
            if partial is not None:
                header = _tokenise(partial, data, found, encoder, on_progress)
                _write_header(partial, {"fingerprint": fingerprint, **header})
    except OSError as error:
        if is_disk_full(error):
            raise DataError(_disk_full(root, found.origins, error)) from None
        raise
    corpus = open_corpus(folder, encoder)
    notes = corpus.notes
    if tokenizer.kind == "bpe" and encoder.vocab_size < tokenizer.vocab_size:
        notes += (
            f"the corpus is too small for {tokenizer.vocab_size} bpe tokens; it gave "
            f"{encoder.vocab_size}",
        )
    # The shards may have been made from the same files in another place.
    return replace(corpus, origins=tuple(found.origins), notes=notes, reused=partial is None)


def open_corpus(folder: Path, tokenizer: Tokenizer) -> TokenizedCorpus:
    """The corpus whose shards `prepare` wrote.

    Raises:
      DataError: a file is not as the header says; the message says what was expected and found.
    """
    header = _read_header(folder)
    if header["tokenizer"]["sha256"] != tokenizer.sha256:
        raise DataError(
            f"{folder / HEADER}: expected the tokenizer {tokenizer.name} ({tokenizer.sha256}), "
            f"found {header['tokenizer']['name']} ({header['tokenizer']['sha256']}){remedy(folder)}"
        )
    manifests = {name: StreamManifest.from_json(m) for name, m in header["streams"].items()}
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
        reused=True,
        streams=tuple(streams.values()),
    )


def _tokenizer_for(
    config: TokenizerConfig, data: DataConfig, found: Found, root: Path, on_progress: OnProgress
) -> Tokenizer:
    if config.kind == "bytes":
        return ByteTokenizer()
    if config.kind not in ("characters", "bpe"):
        return tiktoken_tokenizer(config.kind)
    recipe = {"format": FORMAT, "kind": config.kind, **_content(data, found.origins)}
    if config.kind == "bpe":
        recipe |= {
            "vocab_size": config.vocab_size,
            "pattern": PATTERN,
            "training_characters": TRAINING_CHARACTERS,
        }
    folder = root / "tokenizers" / _sha256_of_json(recipe)[:32]
    with built_once(folder, on_progress) as partial:
        if partial is not None:
            _made_from(config, _all_text(data, found, on_progress)).save(partial)
    try:
        return load_tokenizer(folder)
    except CheckpointError as error:
        raise DataError(f"{error}{remedy(folder)}") from None


def _made_from(config: TokenizerConfig, texts: Iterator[str]) -> Tokenizer:
    """A tokenizer made from the whole corpus, held-out text included, as in nanoGPT."""
    first = next(texts, None)
    if first is None:
        raise DataError(_NO_TEXT)
    texts = itertools.chain([first], texts)
    if config.kind == "bpe":
        return train_bpe(texts, config.vocab_size)
    return CharacterTokenizer(characters_of(texts))


_NO_TEXT = "the corpus has no text: every document is empty; point data.source at text"


def _all_text(data: DataConfig, found: Found, on_progress: OnProgress) -> Iterator[str]:
    done, total = 0, _total_bytes(found.origins)
    for document in _documents(data, found, ReadingReport()):
        for text in document.pieces:
            on_progress("reading the vocabulary", done, total)
            yield text
            done += _utf8_length(text)


def _documents(data: DataConfig, found: Found, report: ReadingReport) -> Iterator[Document]:
    return read_documents(
        found.origins, errors=data.errors, text_field=data.text_field, report=report
    )


def _fingerprint(data: DataConfig, origins: Sequence[Origin], encoder: Tokenizer) -> str:
    decides = {
        "format": FORMAT,
        "shard_tokens": SHARD_TOKENS,
        "tokenizer": encoder.sha256,
        "validation": data.validation,
        **_content(data, origins),
    }
    return _sha256_of_json(decides)


def _content(data: DataConfig, origins: Sequence[Origin]) -> dict[str, Any]:
    """Everything that decides the documents, names included: the shards hold them for `replay`."""
    rows = any(origin.has_rows for origin in origins)
    return {
        "origins": [[origin.name, origin.kind, origin.sha256] for origin in origins],
        "errors": data.errors,
        "text_field": data.text_field if rows else None,
    }


def _sha256_of_json(values: dict[str, Any]) -> str:
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _tokenise(
    folder: Path, data: DataConfig, found: Found, encoder: Tokenizer, on_progress: OnProgress
) -> dict[str, Any]:
    """Write the streams of the corpus, and return the header that describes them."""
    report = ReadingReport()
    pieces = _marked_pieces(_documents(data, found, report), data.validation)
    names = ("train", "validation") if data.validation.startswith("documents:") else ("text",)
    dtype = smallest_dtype(encoder.vocab_size)
    writers = {name: StreamWriter(folder, name, dtype, SHARD_TOKENS) for name in names}
    text_bytes, total = 0, _total_bytes(found.origins)
    try:
        for piece, encoded in _encoded(pieces, encoder, data.workers or _cores()):
            on_progress("tokenising", text_bytes, total)
            if piece.begins:
                writers[piece.stream].begin_document(piece.document)
            writers[piece.stream].add(encoded.ids)
            text_bytes += encoded.text_bytes
        manifests = {name: writer.finish() for name, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abandon()
    _check_sides(data.validation, manifests)
    return {
        "tokenizer": {
            "name": encoder.name,
            "sha256": encoder.sha256,
            "vocab_size": encoder.vocab_size,
        },
        "streams": {name: manifest.to_json() for name, manifest in manifests.items()},
        "splits": _splits(data.validation, manifests),
        "documents": sum(manifest.documents for manifest in manifests.values()),
        "text_bytes": text_bytes,
        "replaced": report.replaced,
        "origins": [asdict(origin) for origin in found.origins],
        "notes": [*found.notes, *_notes(report)],
    }


class _Piece(NamedTuple):
    """A piece of a document, the stream it goes to, and whether it is the first or the last."""

    stream: str
    document: str
    text: str
    begins: bool
    ends: bool


class _Encoded(NamedTuple):
    ids: Ids
    text_bytes: int


def _marked_pieces(documents: Iterable[Document], validation: str) -> Iterator[_Piece]:
    kind, _, fraction = validation.partition(":")
    stream = "text"
    for document in documents:
        if kind == "documents":
            held_out = is_held_out(document.sha256, float(fraction))
            stream = "validation" if held_out else "train"
        texts = iter(document.pieces)
        begins, text = True, next(texts)
        for following in texts:
            yield _Piece(stream, document.name, text, begins, ends=False)
            begins, text = False, following
        yield _Piece(stream, document.name, text, begins, ends=True)


def _encoded(
    pieces: Iterable[_Piece], encoder: Tokenizer, workers: int
) -> Iterator[tuple[_Piece, _Encoded]]:
    """Every piece with its ids, in order; an end of text follows each document, if there is one."""
    end = [] if encoder.end_of_text is None else [encoder.end_of_text]
    end_ids = np.array(end, np.int32)

    def encode(task: list[_Piece]) -> list[_Encoded]:
        encoded = []
        for piece in task:
            ids = encoder.encode(piece.text)
            if piece.ends and end:
                ids = np.concatenate([ids, end_ids])
            encoded.append(_Encoded(ids, _utf8_length(piece.text)))
        return encoded

    for task, results in _in_order(encode, _grouped(pieces), workers):
        yield from zip(task, results, strict=True)


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
) -> Iterator[tuple[_Item, _Result]]:
    """Each item with the function's result, in order, computed by threads.

    Threads suffice, because tiktoken and NumPy release the interpreter's lock, and threads copy
    nothing. At most two items per thread are in flight, so memory is bounded.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="tokenise")
    pending: collections.deque[tuple[_Item, Future[_Result]]] = collections.deque()
    try:
        for item in items:
            pending.append((item, pool.submit(function, item)))
            if len(pending) > 2 * workers:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _cores() -> int:
    """How many cores this process may use, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _total_bytes(origins: Sequence[Origin]) -> int | None:
    """Size of the text; None if an origin does not tell. A pass over all origins: call it once."""
    sizes = [origin.text_bytes for origin in origins]
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def _check_sides(validation: str, manifests: dict[str, StreamManifest]) -> None:
    """Raise unless there are tokens, and on both sides if documents are held out."""
    if not any(manifest.tokens for manifest in manifests.values()):
        raise DataError(_NO_TEXT)
    documents = sum(manifest.documents for manifest in manifests.values())
    for name, held_out in (("train", "all"), ("validation", "none")):
        if name in manifests and not manifests[name].tokens:
            fraction = validation.removeprefix("documents:")
            raise UsageError(
                f"data.validation = {validation!r} goes by the hash of each document and holds out "
                f"{held_out} of the {documents} there are: the {name} split is empty; set "
                f"data.validation = 'tail:{fraction}', which holds out the end of the text, or "
                "'none'"
            )


def _splits(validation: str, manifests: dict[str, StreamManifest]) -> dict[str, dict[str, Any]]:
    if "text" not in manifests:
        return {
            name: {"stream": name, "start": 0, "stop": manifest.tokens}
            for name, manifest in manifests.items()
        }
    tokens = boundary = manifests["text"].tokens
    if validation != "none":
        boundary = tail_boundary(tokens, validation.removeprefix("tail:"))
    return {
        "train": {"stream": "text", "start": 0, "stop": boundary},
        "validation": {"stream": "text", "start": boundary, "stop": tokens},
    }


def _notes(report: ReadingReport) -> Iterator[str]:
    if report.replaced:
        yield f"bytes that are not UTF-8 were replaced by {report.replaced} characters U+FFFD"
    if report.skipped:
        shown = ", ".join(report.skipped[:3]) + (", ..." if len(report.skipped) > 3 else "")
        yield f"{len(report.skipped)} files are not valid Python source and were left out: {shown}"


def _write_header(folder: Path, header: dict[str, Any]) -> None:
    """header.json holds its own hash too: nothing else vouches for the splits and counts."""
    content = {"sha256": _sha256_of_json(header), **header}
    (folder / HEADER).write_text(json.dumps(content, indent=1))


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / HEADER
    try:
        header = json.loads(path.read_bytes())
        expected = header.pop("sha256")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}{remedy(folder)}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path} is damaged: it is not a header{remedy(folder)}") from None
    found = _sha256_of_json(header)
    if found != expected:
        raise DataError(
            f"{path} has changed: expected sha256 {expected}, found {found}{remedy(folder)}"
        )
    return header


def _disk_full(root: Path, origins: Sequence[Origin], error: OSError) -> str:
    text_bytes = sum(origin.bytes for origin in origins)
    needed = (
        f"{text_bytes} bytes of text need up to {2 * text_bytes} (2 for each token, 4 where a "
        "vocabulary has more than 65,536)"
    )
    if _total_bytes(origins) is None:
        needed = "how much the corpus needs is not known beforehand"
    return (
        f"the token shards do not fit into {root} ({error.strerror}): {needed}, and "
        f"{shutil.disk_usage(root).free} bytes are free there; make room, or set data.cache_dir "
        "to a folder on another disk"
    )
