"""data.filters: documents that are left out, and what is replaced in the others.

Redaction comes first, so that everything behind it sees the text that a model would. Then a
document is left out if it is too short, breaks a rule of quality, or repeats a document before it:
of its own file, of another file, of another source of a mixture. The first stays, in the order of
sources and files.

    CACHE/sketches/FINGERPRINT/     what the documents of one folder of shards are compared by
    CACHE/copies/FINGERPRINT/       which documents of a corpus repeat which
    CACHE/dropped/FINGERPRINT/      dropped.jsonl: what was left out of a corpus, and why

A folder of shards depends on its files, and on which of their documents are copies. So a new file
costs its own sketch, and the shards of those folders alone that have other copies because of it.
"""

import collections
import contextlib
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from llm.data_config import FilterConfig
from llm.errors import DataError, UsageError
from llm.files import sha256_of_file
from llm.quality.duplicates import FORMAT as SKETCH_FORMAT
from llm.quality.duplicates import Sketch, Sketched, find_duplicates
from llm.quality.personal import find, redact
from llm.quality.rules import failed
from llm.text.cache import OnProgress, built_once
from llm.text.documents import EMPTY, WITHOUT_TEXT, Document, document_of
from llm.text.stream import remedy
from llm.text.tokenizer import sha256_of_json, utf8_length

# Increase it when equal settings would leave out or replace something else.
FORMAT = 4

# Rules, redaction and near duplicates need the whole text of a document in memory, and several
# times its size while they work on it.
LONGEST = 2**24

# Characters of a document that rules judge; they take some seconds for so many.
_JUDGED = 2**22

DROPPED = "dropped.jsonl"
_COPIES, _HASHES = "copies.json", "sha256.json"
_SHOWN = 100  # characters of a document that is left out, in the file that names it

# Documents that repeat others, by their numbers among those that the other filters leave: "near
# duplicate" or "exact duplicate", and the name of the document that is kept.
Copies = Mapping[int, Sequence[str]]


class Filter:
    """Applies data.filters to documents.

    Args:
      copies: the documents that repeat others.
      dropped: counts the documents that are left out, by the reason.
      record: gets a line of JSON for each of them.
    Attributes:
      redacted: how often something was replaced, by its kind.
    """

    def __init__(
        self,
        settings: FilterConfig,
        copies: Copies,
        dropped: collections.Counter[str],
        record: TextIO | None = None,
    ):
        self._settings, self._copies = settings, copies
        self._dropped, self._record = dropped, record
        self._whole = bool(settings.redact) or settings.quality != "none"
        self.redacted: collections.Counter[str] = collections.Counter()

    def documents(self, documents: Iterable[Document]) -> Iterable[Document]:
        """The documents that stay, redacted.

        Raises:
          DataError: a document is longer than LONGEST, and a filter needs it whole.
        """
        return self._filtered(documents) if self._settings.active else documents

    def _filtered(self, documents: Iterable[Document]) -> Iterator[Document]:
        left = 0
        for whole in documents:
            document, begins, replaced = self._begun(whole)
            reason, detail = self._why(begins)
            if not reason:
                reason, detail = self._copies.get(left, ("", ""))
                left += 1
            if not reason:
                self.redacted += replaced
                yield document
                continue
            self._dropped[reason] += 1
            if self._record:
                shown = (begins or next(iter(document.pieces), ""))[:_SHOWN]
                line = {"document": document.name, "reason": reason, "detail": detail}
                self._record.write(json.dumps(line | {"begins": shown}, ensure_ascii=False) + "\n")

    def _begun(self, document: Document) -> tuple[Document, str, collections.Counter[str]]:
        """The document, redacted; its text, or as much as is looked at; what was replaced."""
        kinds, name = self._settings.redact, document.name
        if self._whole:
            text = whole_text(document)
            replaced = collections.Counter(one.kind for one in find(text, kinds))
            if replaced:
                text = redact(text, kinds)
            return document_of(name, text, "" if replaced else document.sha256), text, replaced
        pieces, held, size = iter(document.pieces), [], 0
        while size < self._settings.min_characters and (piece := next(pieces, "")):
            held.append(piece)
            size += len(piece)
        document = Document(name, document.sha256, itertools.chain(held, pieces))
        return document, "".join(held), collections.Counter()

    def _why(self, text: str) -> tuple[str, str]:
        """Why a document is left out, for its own sake, and by how much; else two empty words."""
        least, quality = self._settings.min_characters, self._settings.quality
        if len(text) < least:
            return f"fewer than {least} characters", f"{len(text)} characters"
        problem = failed(text[:_JUDGED], quality) if quality != "none" else None
        return (f"rules of {quality}", problem) if problem else ("", "")


def whole_text(document: Document) -> str:
    """The text of a document that fits into memory.

    Raises:
      DataError: it is longer than LONGEST.
    """
    held, size = [], 0
    for piece in document.pieces:
        held.append(piece)
        size += len(piece)
        if size > LONGEST:
            raise DataError(
                f"{document.name} has more than {LONGEST:,} characters, as many as data.filters "
                "can hold: make several documents of it, or do without quality, redact and "
                "deduplicate = 'near'"
            )
    return "".join(held)


def find_copies(
    root: Path,
    settings: FilterConfig,
    contents: Sequence[tuple[Any, Iterable[Document]]],
    on_progress: OnProgress,
) -> list[Copies]:
    """The documents of each part of a corpus that repeat others; from the cache, or found now.

    Args:
      root: the cache.
      contents: of each part, what decides its documents, and the documents, which are read only
        if the part has no sketch.
    """
    near = settings.deduplicate == "near"
    kept = [{"format": SKETCH_FORMAT, "near": near, "content": content} for content, _ in contents]
    folders = [root / "sketches" / sha256_of_json(decides)[:32] for decides in kept]
    folder = root / "copies" / sha256_of_json({"sketches": [one.name for one in folders]})[:32]
    done = 0
    with built_once(folder, on_progress) as found:
        for sketched, (_, documents) in zip(folders, contents, strict=True) if found else ():
            with built_once(sketched, on_progress) as partial:
                if partial is not None:
                    with Sketch(partial, near=near) as sketch:
                        for document in documents:
                            on_progress("looking for duplicates", done, None)
                            text = whole_text(document) if near else ""
                            sketch.add(text, document.sha256, document.name)
                            done += utf8_length(text)
                    (partial / _HASHES).write_text(json.dumps(_hashes(partial)))
        if found:
            for sketched in folders:
                _verify(sketched)
            (found / _COPIES).write_text(json.dumps(_by_part(folders, near)), "utf-8")
    try:
        parts = json.loads((folder / _COPIES).read_bytes())
        return [{number: of for number, *of in part} for part in parts]
    except ValueError:
        raise DataError(f"{folder / _COPIES} is damaged{remedy(folder)}") from None


def _hashes(sketched: Path) -> dict[str, str]:
    """The sha256 of each file of a sketch."""
    return {one.name: sha256_of_file(one) for one in sketched.iterdir() if one.name != _HASHES}


def _verify(sketched: Path) -> None:
    with contextlib.suppress(OSError, ValueError):
        if json.loads((sketched / _HASHES).read_bytes()) == _hashes(sketched):
            return
    raise DataError(f"{sketched} is damaged: its files are not as written{remedy(sketched)}")


def _by_part(folders: Sequence[Path], near: bool) -> list[list[tuple[int, str, str]]]:
    """Of each sketch, the documents that repeat others: number, reason, which other."""
    found, sketched = find_duplicates(folders, near=near), Sketched(folders, near)
    exact = [(number, "exact duplicate", of, "") for number, of in found.exact.tolist()]
    others = [
        (number, "near duplicate", of, f", similarity {similarity:.2f}")
        for (number, of), similarity in zip(found.near.tolist(), found.similarity, strict=True)
    ]
    parts: list[list[tuple[int, str, str]]] = [[] for _ in folders]
    for number, reason, of, similarity in sorted(exact + others):
        part = sketched.part_of(number)
        within = number - int(sketched.begins[part])
        parts[part].append((within, reason, sketched.name(of) + similarity))
    return parts


def what_decides(settings: FilterConfig) -> dict[str, Any]:
    """What the filters add to what decides a document; copies are found by comparing them all."""
    own = settings.model_copy(update={"deduplicate": "none"})
    return {"filters": [FORMAT, own.model_dump(mode="json")]} if own.active else {}


@contextlib.contextmanager
def recorded(folder: Path, settings: FilterConfig) -> Iterator[TextIO | None]:
    """The file of what is left out of a folder of shards; None if nothing is filtered."""
    if not settings.active:
        yield None
        return
    with open(folder / DROPPED, "w", encoding="utf-8") as record:
        yield record


def gathered(
    root: Path, settings: FilterConfig, fingerprint: str, folders: Iterable[Path]
) -> Iterator[str]:
    """Put what was left out of each folder of shards into one file, and say where that is."""
    if not settings.active:
        return
    gathered = root / "dropped" / fingerprint[:32]
    with built_once(gathered) as partial:
        if partial is not None:
            with open(partial / DROPPED, "wb") as file:
                for folder in folders:
                    with contextlib.suppress(FileNotFoundError), open(folder / DROPPED, "rb") as of:
                        shutil.copyfileobj(of, file)
    if (gathered / DROPPED).stat().st_size:
        yield f"what data.filters left out, and why: {gathered / DROPPED}"


def nothing_stays(dropped: Mapping[str, int]) -> UsageError | None:
    """The error for a corpus without a document, if that is because of the filters."""
    counts = _in_words(_by_filters(dropped))
    message = f"data.filters leaves out every document ({counts}): loosen the filters"
    return UsageError(message) if counts else None


def notes_on(
    dropped: Mapping[str, int], redacted: Mapping[str, int], documents: int
) -> Iterator[str]:
    """What the filters did to a source in which so many documents are left."""
    filtered = _by_filters(dropped)
    if count := sum(filtered.values()):
        of = f"{count:,} of {documents + count:,}"
        yield f"data.filters left out {of} documents: {_in_words(filtered)}"
    if redacted:
        yield f"data.filters replaced personal data: {_in_words(redacted)}"


def _by_filters(dropped: Mapping[str, int]) -> dict[str, int]:
    return {why: count for why, count in dropped.items() if why not in (EMPTY, WITHOUT_TEXT)}


def _in_words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in counts.items())
