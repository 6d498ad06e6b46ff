"""Folders of shards: what decides their content, made once, found again.

    CACHE/shards/FINGERPRINT/header.json    what is there: counts, bounds, hashes, origins
    CACHE/shards/FINGERPRINT/STREAM.*       streams (llm/text/stream.py): train and validation for
                                            data.validation = "documents:F", else one, text

A folder of shards, a part of a corpus, holds the tokens of one origin, or of some small ones
(`groups_of`). Its fingerprint is a hash of everything that decides its content: the files, the
tokenizer and how documents are split. Equal settings on equal content find the same folders,
wherever the corpus lies; a file that is new costs its own folder, and a preparation that was killed
goes on with the folders that are missing.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from pydantic import TypeAdapter

from llm.config import DataConfig
from llm.errors import DataError
from llm.text.cache import OnProgress, built_once
from llm.text.documents import KINDS, Document, Origin, Reader
from llm.text.encoding import encoded, marked_pieces
from llm.text.filtering import Copies, Filter, recorded, what_decides
from llm.text.stream import StreamManifest, StreamWriter, remedy, smallest_dtype
from llm.text.tokenizer import Tokenizer, sha256_of_json

# Increase it when the same settings and content would give other tokens.
FORMAT = 1
# Increase it when the same tokens would be stored in another way.
LAYOUT = 2
HEADER = "header.json"

# The text whose tokens lie in one folder: a second or two of work. A small file counts as a block
# of a disk, so that there are not too many in a folder.
PART_BYTES = 2**24
_BLOCK_BYTES = 2**12


class Group(NamedTuple):
    """Origins whose tokens share a folder, and which of their documents repeat others."""

    origins: list[Origin]
    copies: Copies


def groups_of(origins: Iterable[Origin]) -> Iterator[list[Origin]]:
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


def documents_of(
    data: DataConfig, group: Group, record: TextIO | None = None
) -> tuple[Iterable[Document], Reader, Filter]:
    """The documents of a group that stay, and what counts the others."""
    reader = Reader(data.errors, data.text_field, data.bad_rows)
    filter_ = Filter(data.filters, group.copies, reader.dropped, record)
    return filter_.documents(reader.documents(group.origins)), reader, filter_


def content_of_origins(data: DataConfig, origins: Sequence[Origin]) -> dict[str, Any]:
    """Everything that decides the documents, but which of them are left out as copies."""
    rows = any(KINDS[origin.kind].has_rows for origin in origins)
    content = {
        "origins": [[origin.name, origin.kind, origin.sha256] for origin in origins],
        "errors": data.errors,
        "text_field": data.text_field if rows else None,
    }
    # These are not there by default, so that shards from before the settings are found.
    later = {"bad_rows": "skip"} if rows and data.bad_rows == "skip" else {}
    if any(origin.compression and not KINDS[origin.kind].has_rows for origin in origins):
        later["hashed"] = "decompressed"
    return content | later | what_decides(data.filters)


def content_of_groups(data: DataConfig, groups: Sequence[Group]) -> dict[str, Any]:
    """Everything that decides the documents, names included: the shards hold them for `replay`."""
    content = content_of_origins(data, [origin for group in groups for origin in group.origins])
    copies = [sorted(group.copies.items()) for group in groups]
    return content | ({"copies": copies} if any(copies) else {})


class Part(NamedTuple):
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


def prepared(
    root: Path,
    data: DataConfig,
    groups: Iterable[Group],
    total: int | None,
    encoder: Tokenizer,
    on_progress: OnProgress,
    name: str,
) -> list[Part]:
    """The folders that hold the tokens of one source, in order, each from the cache or made now."""
    parts: list[Part] = []
    done, what = 0, f"tokenising {name}".strip()
    for group in groups:
        fingerprint = _fingerprint(data, group, encoder)
        folder = root / "shards" / fingerprint[:32]
        with built_once(folder, on_progress) as partial:
            if partial is not None:
                # It is called before `done` changes.
                report = lambda new: on_progress(what, done + new, total)  # noqa: B023, E731
                header = _tokenise(partial, data, group, encoder, report)
                _write_header(partial, {"fingerprint": fingerprint, **header})
        parts.append(Part(folder, _read_header(folder, fingerprint), partial is not None))
        done += parts[-1].header["text_bytes"]
    return parts


def _fingerprint(data: DataConfig, group: Group, encoder: Tokenizer) -> str:
    """Of what a folder of shards holds. Any tail of it may be held out."""
    decides = {
        "format": FORMAT,
        "layout": LAYOUT,
        "tokenizer": encoder.sha256,
        "held_out": data.validation if data.validation.startswith("documents:") else None,
        **content_of_groups(data, [group]),
    }
    return sha256_of_json(decides)


def _tokenise(
    folder: Path,
    data: DataConfig,
    group: Group,
    encoder: Tokenizer,
    on_progress: Callable[[int], None],
) -> dict[str, Any]:
    """Write the streams of some origins, and return the header that describes them."""
    names = ("train", "validation") if data.validation.startswith("documents:") else ("text",)
    dtype = smallest_dtype(encoder.vocab_size)
    text_bytes = changed = 0
    with contextlib.ExitStack() as files:
        record = files.enter_context(recorded(folder, data.filters))
        documents, reader, filter_ = documents_of(data, group, record)
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
