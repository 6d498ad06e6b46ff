"""Prepare a corpus: tokenise it once into shards on disk, find them again, open them.

    CACHE/shards/FINGERPRINT/header.json    what is there: counts, bounds, hashes, origins
    CACHE/shards/FINGERPRINT/STREAM.*       streams (llm/text/stream.py): train and validation for
                                            data.validation = "documents:F", else one, text
    CACHE/tokenizers/FINGERPRINT/           tokenizers that were made from a corpus

A folder of shards holds the tokens of one origin, or of some small ones (`_groups`). Its
fingerprint is a hash of everything that decides its content: the files, the tokenizer and how
documents are split. Equal settings on equal content find the same folders, wherever the corpus
lies; a file that is new costs its own folder, and a preparation that was killed goes on with the
folders that are missing.
"""

import collections
import contextlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from pydantic import TypeAdapter

from llm.config import DataConfig, TokenizerConfig
from llm.errors import CheckpointError, DataError, UsageError
from llm.files import is_disk_full
from llm.text.bpe import LONGEST_WORD, PATTERN, TRAINING_CHARACTERS, UNBROKEN, train_bpe
from llm.text.cache import OnProgress, built_once, cache_root, no_room, silent
from llm.text.corpus import Source, TokenizedCorpus, of_source
from llm.text.documents import KINDS, WITHOUT_TEXT, Document, Origin, Reader
from llm.text.encoding import encoded, marked_pieces
from llm.text.filtering import (
    Copies,
    Filter,
    find_copies,
    gathered,
    notes_on,
    nothing_stays,
    recorded,
    what_decides,
)
from llm.text.sources import Found, find_origins
from llm.text.splits import Span, TokenSplit, tail_boundary
from llm.text.stream import StreamManifest, StreamWriter, TokenStream, remedy, smallest_dtype
from llm.text.tokenizer import (
    MADE_FROM_CORPUS,
    CharacterTokenizer,
    Tokenizer,
    characters_of,
    check_kind,
    load_tokenizer,
    lossy_note,
    named_tokenizer,
    sha256_of_json,
    utf8_length,
)

# Increase it when the same settings and content would give other tokens. `shard_tokens` is in the
# fingerprint of a corpus because it always was: runs that began with it go on.
FORMAT = 1
_SHARD_TOKENS = 100_000_000
# Increase it when the same tokens would be stored in another way.
LAYOUT = 2
HEADER = "header.json"

# The text whose tokens lie in one folder: a second or two of work. A small file counts as a block
# of a disk, so that there are not too many in a folder.
PART_BYTES = 2**24
_BLOCK_BYTES = 2**12

# Up to this size, opening compares the sha256 of every file. Beyond it, opening checks sizes and
# bounds, and the ids of each batch are checked as they are read.
VERIFY_ON_OPEN_BYTES = 2**26

_NO_TEXT = "the corpus has no text: every document is empty; point data.source at text"


# The sources of a corpus by their names: the settings of each, and what it names.
_Sources = Mapping[str, tuple[DataConfig, Found]]


def prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    *,
    own: Tokenizer | None = None,
    on_progress: OnProgress = silent,
) -> TokenizedCorpus:
    """The corpus of the settings, tokenised: from the cache, or made now.

    Args:
      own: the tokenizer, if a run has it already; None: the one that the settings name.
      on_progress: called with (what, bytes done, bytes in all or None), often enough for a progress
        bar. An exception from it stops the preparation, which leaves nothing half-made behind.
    Raises:
      DataError: no text, text that cannot be read, shards that cannot be trusted, a full disk.
      UsageError: a setting that cannot be used, a split that leaves one side empty, half of a
        surrogate pair in the text.
    """
    root = cache_root(data.cache_dir)
    if own is None:
        check_kind(tokenizer.kind)
    found: dict[str, tuple[DataConfig, Found]] = {}
    parts: dict[str, list[_Part]] = {}
    try:
        for name, settings in data.by_source.items():
            with of_source(name):
                found[name] = settings, find_origins(settings.source, root, on_progress)
        groups = _grouped(root, data, found, on_progress)
        encoder = own or _tokenizer_for(tokenizer, found, groups, root, on_progress)
        for name, (settings, origins) in found.items():
            total = origins.text_bytes
            with of_source(name):
                parts[name] = _prepared(
                    root, settings, groups[name], total, encoder, on_progress, name
                )
    except OSError as error:
        if is_disk_full(error):
            raise no_room("the token shards", root, _needed(found), error) from None
        # Errors of the sources are answered where they are read.
        raise UsageError(
            f"{error.filename or root}: {error.strerror}; this corpus has to be prepared first, so "
            "set data.cache_dir to a folder that can be written"
        ) from None
    hashed = sum(part.stored_bytes for of in parts.values() for part in of) <= VERIFY_ON_OPEN_BYTES
    sources = tuple(
        _opened(name, *found[name], groups[name], parts[name], encoder, hashed=hashed)
        for name in found
    )
    fingerprints = [[source.name, source.fingerprint] for source in sources]
    fingerprint = sha256_of_json({"sources": fingerprints}) if data.mixture else fingerprints[0][1]
    folders = [part.folder for of in parts.values() for part in of]
    return TokenizedCorpus(
        tokenizer=encoder,
        sources=sources,
        fingerprint=fingerprint,
        folder=root / "shards",
        notes=(
            *(f"{one.name}: {note}" if one.name else note for one in sources for note in one.notes),
            *_notes(encoder, tokenizer),
            *gathered(root, data.filters, fingerprint, folders),
        ),
        reused=not any(part.is_new for of in parts.values() for part in of),
    )


class _Group(NamedTuple):
    """Origins whose tokens share a folder, and which of their documents repeat others."""

    origins: list[Origin]
    copies: Copies


class _Part(NamedTuple):
    """A folder of shards, its header, and whether it was made now."""

    folder: Path
    header: dict[str, Any]
    is_new: bool

    @property
    def streams(self) -> dict[str, StreamManifest]:
        return _MANIFESTS.validate_python(self.header["streams"])

    @property
    def stored_bytes(self) -> int:
        return sum(file.bytes for stream in self.streams.values() for file in stream.files)


_MANIFESTS = TypeAdapter(dict[str, StreamManifest])


def _prepared(
    root: Path,
    data: DataConfig,
    groups: Iterable[_Group],
    total: int | None,
    encoder: Tokenizer,
    on_progress: OnProgress,
    name: str,
) -> list[_Part]:
    """The folders that hold the tokens of one source, in order, each from the cache or made now."""
    parts: list[_Part] = []
    done, what = 0, f"tokenising {name}".strip()
    for group in groups:
        fingerprint = _fingerprint_of_part(data, group, encoder)
        folder = root / "shards" / fingerprint[:32]
        with built_once(folder, on_progress) as partial:
            if partial is not None:
                # It is called before `done` changes.
                report = lambda new: on_progress(what, done + new, total)  # noqa: B023, E731
                header = _tokenise(partial, data, group, encoder, report)
                _write_header(partial, {"fingerprint": fingerprint, **header})
        parts.append(_Part(folder, _read_header(folder, fingerprint), partial is not None))
        done += parts[-1].header["text_bytes"]
    return parts


def _grouped(
    root: Path, data: DataConfig, found: _Sources, on_progress: OnProgress
) -> dict[str, list[_Group]]:
    """The groups of each source, in order, and the copies in them that data.filters leaves out."""
    groups = [(name, one) for name, (_, of) in found.items() for one in _groups(of.origins)]
    copies: Sequence[Copies] = [{}] * len(groups)
    if data.filters.deduplicate != "none":
        contents = [
            (_content(found[name][0], one), _documents(found[name][0], _Group(one, {}))[0])
            for name, one in groups
        ]
        copies = find_copies(root, data.filters, contents, on_progress)
    grouped: dict[str, list[_Group]] = {name: [] for name in found}
    for (name, one), of in zip(groups, copies, strict=True):
        grouped[name].append(_Group(one, of))
    return grouped


def _documents(
    data: DataConfig, group: _Group, record: TextIO | None = None
) -> tuple[Iterable[Document], Reader, Filter]:
    """The documents of a group that stay, and what counts the others."""
    reader = Reader(data.errors, data.text_field, data.bad_rows)
    filter_ = Filter(data.filters, group.copies, reader.dropped, record)
    return filter_.documents(reader.documents(group.origins)), reader, filter_


def _groups(origins: Iterable[Origin]) -> Iterator[list[Origin]]:
    """The origins in order, those in groups whose tokens share a folder.

    A file of PART_BYTES stands alone. Smaller files end a group by chance, by their own hashes and
    sizes, each PART_BYTES on the average; so a new file changes no group but that which it is in.
    """
    group: list[Origin] = []
    for origin in origins:
        size = max(origin.bytes, _BLOCK_BYTES)
        alone = size >= PART_BYTES or origin.kind == "hub"
        if alone and group:
            yield group
            group = []
        group.append(origin)
        if alone or int(origin.sha256[:16], 16) * PART_BYTES < size << 64:
            yield group
            group = []
    if group:
        yield group


def _opened(
    name: str,
    data: DataConfig,
    found: Found,
    groups: Sequence[_Group],
    parts: Sequence[_Part],
    encoder: Tokenizer,
    *,
    hashed: bool,
) -> Source:
    """One source, from its folders.

    Args:
      hashed: compare the sha256 of each file.
    Raises:
      DataError: a file is not as its header says; the message says what was expected and found.
    """
    spans = collections.defaultdict[str, list[Span]](list)
    for part in parts:
        for stream, manifest in part.streams.items():
            opened = TokenStream(part.folder, manifest, encoder.vocab_size, hashed=hashed)
            spans[stream].append(Span(opened, 0, len(opened)))
    headers = [part.header for part in parts]
    totals: dict[str, Any] = {
        key: sum((collections.Counter(h.get(key)) for h in headers), collections.Counter())
        for key in ("dropped", "redacted")
    }
    for key in ("documents", "text_bytes", "replaced", "normalised"):
        totals[key] = sum(header[key] for header in headers)
    totals["first_bad"] = next((h["first_bad"] for h in headers if h["first_bad"]), "")
    with of_source(name):
        train, validation = _splits(data.validation, spans, totals)
    return Source(
        name=name,
        train=train,
        validation=validation,
        fingerprint=_fingerprint(data, groups, encoder),
        # The shards may have been made from the same files in another place.
        origins=found.origins,
        documents=totals["documents"],
        text_bytes=totals["text_bytes"],
        replaced=totals["replaced"],
        dropped=dict(totals["dropped"]),
        notes=(*found.notes, *_notes_on_text(totals, encoder)),
    )


def _tokenizer_for(
    config: TokenizerConfig,
    found: _Sources,
    groups: Mapping[str, Sequence[_Group]],
    root: Path,
    on_progress: OnProgress,
) -> Tokenizer:
    """The tokenizer of the settings. One that is made from the corpus uses held-out text too, as in
    nanoGPT.
    """
    if config.kind not in MADE_FROM_CORPUS:
        return named_tokenizer(config.kind, lossy=config.lossy)
    contents: list[Any] = [
        [name, _content_of(data, groups[name])] for name, (data, _) in found.items()
    ]
    content: dict[str, Any] = contents[0][1] if "" in found else {"sources": contents}
    recipe = {"format": FORMAT, "kind": config.kind, **content}
    if config.kind == "bpe":
        recipe |= {
            "vocab_size": config.vocab_size,
            "pattern": PATTERN,
            "training_characters": [TRAINING_CHARACTERS, UNBROKEN, LONGEST_WORD],
        }
    folder = root / "tokenizers" / sha256_of_json(recipe)[:32]
    with built_once(folder, on_progress) as partial:
        if partial is not None:
            texts = _all_text(found, groups, on_progress)
            if config.kind == "bpe":
                made: Tokenizer = train_bpe(texts, config.vocab_size, on_progress)
            else:
                made = CharacterTokenizer(characters_of(texts))
            made.save(partial)
    try:
        return load_tokenizer(folder)
    except CheckpointError as error:
        raise DataError(f"{error}{remedy(folder)}") from None


def _all_text(
    found: _Sources, groups: Mapping[str, Sequence[_Group]], on_progress: OnProgress
) -> Iterator[str]:
    done, sizes = 0, [of.text_bytes for _, of in found.values()]
    total = None if None in sizes else sum(filter(None, sizes))
    dropped: collections.Counter[str] = collections.Counter()
    for name, (data, _) in found.items():
        with of_source(name):
            for group in groups[name]:
                documents, reader, _ = _documents(data, group)
                for text in itertools.chain.from_iterable(one.pieces for one in documents):
                    on_progress("reading the vocabulary", done, total)
                    yield text
                    done += utf8_length(text)
                dropped += reader.dropped
    if not done:
        raise nothing_stays(dropped) or DataError(_NO_TEXT)


def _fingerprint(data: DataConfig, groups: Sequence[_Group], encoder: Tokenizer) -> str:
    """Of the tokens of one source, in their order and splits."""
    decides = {
        "format": FORMAT,
        "shard_tokens": _SHARD_TOKENS,
        "tokenizer": encoder.sha256,
        "validation": data.validation,
        **_content_of(data, groups),
    }
    return sha256_of_json(decides)


def _fingerprint_of_part(data: DataConfig, group: _Group, encoder: Tokenizer) -> str:
    """Of what a folder of shards holds. Any tail of it may be held out."""
    decides = {
        "format": FORMAT,
        "layout": LAYOUT,
        "tokenizer": encoder.sha256,
        "held_out": data.validation if data.validation.startswith("documents:") else None,
        **_content_of(data, [group]),
    }
    return sha256_of_json(decides)


def _content_of(data: DataConfig, groups: Sequence[_Group]) -> dict[str, Any]:
    """Everything that decides the documents, names included: the shards hold them for `replay`."""
    content = _content(data, [origin for group in groups for origin in group.origins])
    copies = [sorted(group.copies.items()) for group in groups]
    return content | ({"copies": copies} if any(copies) else {})


def _content(data: DataConfig, origins: Sequence[Origin]) -> dict[str, Any]:
    """Everything that decides the documents, but which of them are left out as copies."""
    rows = any(KINDS[origin.kind].has_rows for origin in origins)
    content = {
        "origins": [[origin.name, origin.kind, origin.sha256] for origin in origins],
        "errors": data.errors,
        "text_field": data.text_field if rows else None,
    }
    # These are not there by default, so that shards from before the settings are found.
    skips = {"bad_rows": "skip"} if rows and data.bad_rows == "skip" else {}
    return content | skips | what_decides(data.filters)


def _tokenise(
    folder: Path,
    data: DataConfig,
    group: _Group,
    encoder: Tokenizer,
    on_progress: Callable[[int], None],
) -> dict[str, Any]:
    """Write the streams of some origins, and return the header that describes them."""
    names = ("train", "validation") if data.validation.startswith("documents:") else ("text",)
    dtype = smallest_dtype(encoder.vocab_size)
    text_bytes = changed = 0
    with contextlib.ExitStack() as files:
        record = files.enter_context(recorded(folder, data.filters))
        documents, reader, filter_ = _documents(data, group, record)
        pieces = marked_pieces(documents, data.validation, encoder)
        writers = {name: files.enter_context(StreamWriter(folder, name, dtype)) for name in names}
        for piece, ids, size, differs in encoded(pieces, encoder, data.workers):
            on_progress(text_bytes)
            if piece.begins:
                writers[piece.stream].begin_document(piece.document)
            writers[piece.stream].add(ids)
            text_bytes += size
            changed += differs
        manifests = {name: writer.finish() for name, writer in writers.items()}
    return {
        "tokenizer": {"name": encoder.name, "sha256": encoder.sha256},
        "streams": {name: asdict(manifest) for name, manifest in manifests.items()},
        "documents": sum(manifest.documents for manifest in manifests.values()),
        "text_bytes": text_bytes,
        "replaced": reader.replaced,
        "dropped": dict(reader.dropped),
        "first_bad": reader.first_bad,
        "normalised": changed,
        "origins": [asdict(origin) for origin in group.origins],
        **({"redacted": dict(filter_.redacted)} if filter_.redacted else {}),
    }


def _notes_on_text(totals: Mapping[str, Any], encoder: Tokenizer) -> Iterator[str]:
    """What a person should know of the tokens of a source, wherever their text lies now."""
    if count := totals["replaced"]:
        yield f"bytes that are not UTF-8 were replaced by {count} characters U+FFFD"
    if count := totals["dropped"].get(WITHOUT_TEXT):
        yield f"left out {count} rows without text; the first: {totals['first_bad']}"
    yield from notes_on(totals["dropped"], totals["redacted"], totals["documents"])
    if count := totals["normalised"]:
        yield (
            f"the tokenizer {encoder.name!r} reads text in NFC, which spells {count} bytes of it "
            "in another way: the text is as NFC has it"
        )


def _notes(encoder: Tokenizer, wanted: TokenizerConfig) -> Iterator[str]:
    """What a person should know of the tokenizer."""
    if encoder.lossy:
        yield lossy_note(encoder)
    if wanted.kind == "bpe" and encoder.vocab_size < wanted.vocab_size:
        yield (
            f"the corpus is too small for {wanted.vocab_size} bpe tokens; it gave "
            f"{encoder.vocab_size}"
        )


def _splits(
    validation: str, spans: Mapping[str, Sequence[Span]], totals: Mapping[str, Any]
) -> tuple[TokenSplit, TokenSplit]:
    """The tokens that train and those that are held out, from the spans of each stream.

    Raises:
      DataError: there are no tokens.
      UsageError: the filters leave none; documents are held out, and one side has none.
    """
    documents = totals["documents"]
    if not documents:
        raise nothing_stays(totals["dropped"]) or DataError(_NO_TEXT)
    kind, _, fraction = validation.partition(":")
    if kind != "documents":
        text = TokenSplit(spans["text"])
        boundary = len(text) if kind == "none" else tail_boundary(len(text), fraction)
        return text.part(0, boundary), text.part(boundary, len(text))
    splits = TokenSplit(spans["train"]), TokenSplit(spans["validation"])
    for split, name, held_out in zip(splits, spans, ("all", "none"), strict=True):
        if not len(split):
            raise UsageError(
                f"data.validation = {validation!r} goes by the hash of each document and holds "
                f"out {held_out} of the {documents} there are: the {name} split is empty; set "
                f"data.validation = 'tail:{fraction}', which holds out the end of the text, or "
                "'none'"
            )
    return splits


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


def _needed(found: _Sources) -> str:
    sizes = [of.text_bytes for _, of in found.values()]
    if None in sizes or not sizes:
        return "how much the corpus needs is not known beforehand"
    text = sum(filter(None, sizes))
    return (
        f"{text} bytes of text need up to {2 * text} (2 for each token, 4 if the vocabulary has "
        "more than 65,536)"
    )
