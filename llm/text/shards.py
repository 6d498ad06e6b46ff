"""Prepare a corpus: tokenise it once into shards on disk, find them again, open them.

CACHE/shards/FINGERPRINT/               parts of corpora (llm/text/parts.py)
CACHE/tokenizers/FINGERPRINT/           tokenizers that were made from a corpus
"""

import collections
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm.config import DataConfig, TokenizerConfig
from llm.errors import CheckpointError, DataError, UsageError
from llm.files import is_disk_full
from llm.text.bpe import LONGEST_WORD, PATTERN, TRAINING_CHARACTERS, UNBROKEN, train_bpe
from llm.text.cache import OnProgress, built_once, cache_root, no_room, silent
from llm.text.corpus import Source, TokenizedCorpus, of_source
from llm.text.documents import WITHOUT_TEXT
from llm.text.filtering import Copies, find_copies, gathered, notes_on, nothing_stays
from llm.text.parts import (
    FORMAT,
    Group,
    Part,
    content_of_groups,
    content_of_origins,
    documents_of,
    groups_of,
    prepared,
)
from llm.text.sources import Found, find_origins
from llm.text.splits import Span, TokenSplit, tail_boundary
from llm.text.stream import TokenStream, remedy
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

# It is in the fingerprint of a corpus because it always was: runs that began with it go on.
_SHARD_TOKENS = 100_000_000

# Up to this size, source after source, opening compares the sha256 of every file. Beyond it,
# opening checks sizes and bounds, and the ids of each batch are checked as they are read.
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
    parts: list[Part] = []
    sources: list[Source] = []
    try:
        for name, settings in data.by_source.items():
            with of_source(name):
                found[name] = settings, find_origins(settings.source, root, on_progress)
        groups = _grouped(root, data, found, on_progress)
        encoder = own or _tokenizer_for(tokenizer, found, groups, root, on_progress)
        for name, (settings, origins) in found.items():
            with of_source(name):
                of_it = prepared(
                    root, settings, groups[name], origins.text_bytes, encoder, on_progress, name
                )
            parts += of_it
            hashed = sum(part.stored_bytes for part in parts) <= VERIFY_ON_OPEN_BYTES
            sources.append(
                _opened(name, settings, origins, groups[name], of_it, encoder, hashed=hashed)
            )
        fingerprint = _fingerprint_of_all(sources, bool(data.mixture))
        notes = [
            *(f"{one.name}: {note}" if one.name else note for one in sources for note in one.notes),
            *_notes(encoder, tokenizer),
            *gathered(root, data.filters, fingerprint, [part.folder for part in parts]),
        ]
    except OSError as error:
        if is_disk_full(error):
            raise no_room("the token shards", root, _needed(found), error) from None
        # Errors of the sources are answered where they are read.
        raise UsageError(
            f"{error.filename or root}: {error.strerror}; this corpus has to be prepared first, so "
            "set data.cache_dir to a folder that can be written"
        ) from None
    return TokenizedCorpus(
        tokenizer=encoder,
        sources=tuple(sources),
        fingerprint=fingerprint,
        folder=root / "shards",
        notes=tuple(notes),
        reused=not any(part.is_new for part in parts),
    )


def _fingerprint_of_all(sources: Sequence[Source], is_mixture: bool) -> str:
    """That of the only source, or of all with their names."""
    of_all = [[source.name, source.fingerprint] for source in sources]
    return sha256_of_json({"sources": of_all}) if is_mixture else sources[0].fingerprint


def _grouped(
    root: Path, data: DataConfig, found: _Sources, on_progress: OnProgress
) -> dict[str, list[Group]]:
    """The groups of each source, in order, and the copies in them that data.filters leaves out."""
    groups = [(name, one) for name, (_, of) in found.items() for one in groups_of(of.origins)]
    copies: Sequence[Copies] = [{}] * len(groups)
    if data.filters.deduplicate != "none":
        contents = [
            (
                content_of_origins(found[name][0], one),
                documents_of(found[name][0], Group(one, {}))[0],
            )
            for name, one in groups
        ]
        copies = find_copies(root, data.filters, contents, on_progress)
    grouped: dict[str, list[Group]] = {name: [] for name in found}
    for (name, one), of in zip(groups, copies, strict=True):
        grouped[name].append(Group(one, of))
    return grouped


def _opened(
    name: str,
    data: DataConfig,
    found: Found,
    groups: Sequence[Group],
    parts: Sequence[Part],
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
    groups: Mapping[str, Sequence[Group]],
    root: Path,
    on_progress: OnProgress,
) -> Tokenizer:
    """The tokenizer of the settings. One that is made from the corpus uses held-out text too, as in
    nanoGPT.
    """
    if config.kind not in MADE_FROM_CORPUS:
        return named_tokenizer(config.kind, lossy=config.lossy)
    contents: list[Any] = [
        [name, content_of_groups(data, groups[name])] for name, (data, _) in found.items()
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
    found: _Sources, groups: Mapping[str, Sequence[Group]], on_progress: OnProgress
) -> Iterator[str]:
    done, sizes = 0, [of.text_bytes for _, of in found.values()]
    total = None if None in sizes else sum(filter(None, sizes))
    dropped: collections.Counter[str] = collections.Counter()
    for name, (data, _) in found.items():
        with of_source(name):
            for group in groups[name]:
                documents, reader, _ = documents_of(data, group)
                for text in itertools.chain.from_iterable(one.pieces for one in documents):
                    on_progress("reading the vocabulary", done, total)
                    yield text
                    done += utf8_length(text)
                dropped += reader.dropped
    if not done:
        raise nothing_stays(dropped) or DataError(_NO_TEXT)


def _fingerprint(data: DataConfig, groups: Sequence[Group], encoder: Tokenizer) -> str:
    """Of the tokens of one source, in their order and splits."""
    decides = {
        "format": FORMAT,
        "shard_tokens": _SHARD_TOKENS,
        "tokenizer": encoder.sha256,
        "validation": data.validation,
        **content_of_groups(data, groups),
    }
    return sha256_of_json(decides)


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


def _needed(found: _Sources) -> str:
    sizes = [of.text_bytes for _, of in found.values()]
    if None in sizes or not sizes:
        return "how much the corpus needs is not known beforehand"
    text = sum(filter(None, sizes))
    return (
        f"{text} bytes of text need up to {2 * text} (2 for each token, 4 if the vocabulary has "
        "more than 65,536)"
    )
