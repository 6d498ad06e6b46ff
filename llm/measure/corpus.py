"""What is in a corpus: one pass over its documents, in bounded memory.

Every document is counted whole. Rules, personal data and duplicates look at its first 4 million
characters, languages at its first 500. py3langid tells languages and ftfy finds text that was
decoded wrongly, if they are installed (the extra `data`).
"""

import collections
import functools
import heapq
import tempfile
import unicodedata
import zlib
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llm.errors import UsageError
from llm.measure.overlap import Leak, Overlap, RepeatedLines
from llm.quality import personal
from llm.quality.duplicates import Sketch, Sketched, find_duplicates
from llm.quality.rules import RULES, broken
from llm.text.documents import Document
from llm.text.splits import is_held_out
from llm.text.tokenizer import Ids, Tokenizer

if TYPE_CHECKING:
    from llm.measure.scored import Sampled

JUDGED_CHARACTERS, LANGUAGE_CHARACTERS = 2**22, 500
# Of each rule and each kind of personal data, on the page; and of lists in the JSON object.
EXAMPLES, LISTED = 3, 1000
_AROUND = 40
_MOJIBAKE = "documents with mojibake"


class Census:
    """Counts what is in documents.

    Args:
      tokenizer: what counts tokens.
      held_out: the fraction of documents that are validation, by the hash of their text.
      against: evaluation documents.
      validation: the documents that are held out, to be looked for in the others.
      sampled: takes the tokens of each document, to score some.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        held_out: float,
        against: Iterable[Document] = (),
        validation: Iterable[Document] = (),
        sampled: "Sampled | None" = None,
    ):
        self.tokenizer, self.held_out = tokenizer, held_out
        self.documents = self.bytes = self.compressed = 0
        self.counts = collections.defaultdict[str, collections.Counter[str]](collections.Counter)
        self.examples: dict[str, list[dict[str, str]]] = collections.defaultdict(list)
        self.used = np.zeros(tokenizer.vocab_size, np.int64)
        self.sizes: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0, 0])
        self.lines = RepeatedLines()
        self.against, self.validation = (
            Overlap((one.name, start_of(one)) for one in documents)
            for documents in (against, validation)
        )
        self.sampled = sampled
        self.langid, self.badness = _optional("py3langid"), _optional("ftfy.badness")

    def read(self, documents: Iterable[Document]) -> None:
        """Count all documents, and find those that repeat others."""
        with tempfile.TemporaryDirectory() as folder:
            with Sketch(Path(folder), near=True) as sketch:
                for document in documents:
                    try:
                        start = self._count(document)
                    except UsageError as error:  # characters that the tokenizer does not have
                        raise UsageError(f"{document.name}: {error}") from None
                    sketch.add(start, document.sha256, document.name)
                    self.documents += 1
            self.duplicates = found = find_duplicates([Path(folder)], near=True)
            sketched = Sketched([Path(folder)], near=True)
            self.pairs = [
                [[*map(sketched.name, pair)] for pair in pairs[:LISTED].tolist()]
                for pairs in (found.exact, found.near)
            ]

    def _count(self, document: Document) -> str:
        """Count one document; its start, which is judged."""
        text, size, tokens = "", 0, 0
        first: list[Ids] = []  # tokens, for the model
        characters: collections.Counter[str] = collections.Counter()
        packer = zlib.compressobj(1)
        for piece in document.pieces:
            text += piece[: JUDGED_CHARACTERS - len(text)]
            data = piece.encode()
            size += len(data)
            self.compressed += len(packer.compress(data))
            characters.update(piece)
            ids = self.tokenizer.encode(piece, continues=size > len(data))
            if self.sampled and tokens < self.sampled.longest:
                first.append(ids)
            tokens += len(ids)
            self.used += np.bincount(ids, minlength=len(self.used))
        self.compressed += len(packer.flush())
        self.bytes += size
        self.counts["length"][str(1 << size.bit_length())] += 1
        main = self._characters(characters)
        for place, number in enumerate((1, size, tokens)):
            self.sizes[main][place] += number
        self._judge(document.name, text)
        self.lines.add(text)
        self.against.read(document.name, text)
        held_out = is_held_out(document.sha256, self.held_out)
        self.counts["split"]["held out" if held_out else "train"] += 1
        if not held_out:
            self.validation.read(document.name, text)
        if self.sampled:
            self.sampled.add(
                document.sha256, document.name, np.concatenate([np.empty(0, np.int32), *first])
            )
        return text

    def _characters(self, characters: collections.Counter[str]) -> str:
        """Count the characters of a document; the script of most of its letters."""
        scripts: collections.Counter[str] = collections.Counter()
        for character, count in characters.items():
            if character == "\ufffd":
                self.counts["characters"]["replacement"] += count
            elif unicodedata.category(character) == "Cc" and character not in "\n\t\r":
                self.counts["characters"]["control"] += count
            elif name := script_of(character):
                scripts[name] += count
        self.counts["script"].update(scripts)
        return scripts.most_common(1)[0][0] if scripts else "none"

    def _judge(self, name: str, text: str) -> None:
        for preset, rule, value in broken(text):
            key = f"{preset}: {rule.name}"
            self.counts["quality"][key] += 1
            self._show(key, name, f"{value:,.3g}", text[: 4 * _AROUND])
        for kind, start, end in personal.find(text):
            self.counts["personal"][kind] += 1
            around = text[max(start - _AROUND, 0) : start], text[end : end + _AROUND]
            self._show(kind, name, "", f"<{kind.upper()}>".join(map(masked, around)))
        if self.langid and text.strip():
            self.counts["language"][self.langid.classify(text[:LANGUAGE_CHARACTERS])[0]] += 1
        if self.badness:
            # Of ASCII alone, text is never bad.
            self.counts["characters"][_MOJIBAKE] += not text.isascii() and self.badness.is_bad(text)

    def _show(self, key: str, name: str, value: str, text: str) -> None:
        if len(self.examples[key]) < EXAMPLES:
            self.examples[key].append({"document": name, "value": value, "text": masked(text)})

    def report(self) -> dict[str, Any]:
        """Everything as one JSON object; lists have at most LISTED entries."""
        found, table = self.duplicates, self.tokenizer.token_table
        exact, near = self.pairs
        several = (id_ for id_ in np.flatnonzero(self.used) if len(table[id_]) > 1)
        longest = heapq.nlargest(10, several, key=lambda id_: len(table[id_]))
        tokens, characters = int(self.used.sum()), self.counts["characters"]
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "tokens": tokens,
            "split": self.counts["split"],
            "lengths": dict(sorted(self.counts["length"].items(), key=lambda item: int(item[0]))),
            "scripts": dict(self.counts["script"].most_common()),
            "languages": dict(self.counts["language"].most_common()) if self.langid else None,
            "exact_duplicates": len(found.exact),
            "exact_duplicate_pairs": exact,
            "near_duplicates": [
                {"documents": pair, "similarity": similarity}
                for pair, similarity in zip(near, found.similarity.tolist(), strict=False)
            ],
            "near_duplicate_documents": len(found.near),
            "repeated_line_share": self.lines.repeated / max(self.lines.characters, 1),
            "repeated_lines": [
                {"line": masked(line), "documents": count} for line, count in self.lines.most(20)
            ],
            "quality": {
                f"{preset}: {rule.name}": {
                    "expected": rule.bounds(),
                    "documents": self.counts["quality"][f"{preset}: {rule.name}"],
                }
                for preset, rules in RULES.items()
                for rule in rules
            },
            "personal_data": {kind: self.counts["personal"][kind] for kind in personal.KINDS},
            "characters": {
                "control": characters["control"],
                "replacement": characters["replacement"],
                _MOJIBAKE: characters[_MOJIBAKE] if self.badness else None,
            },
            "compressed_share": self.compressed / max(self.bytes, 1),
            "tokenizer": {
                "name": self.tokenizer.name,
                "unused": int((self.used == 0).sum()),
                "longest": [self.tokenizer.token_name(int(id_)) for id_ in longest],
                "bytes_per_token": {
                    script: size / max(count, 1) for script, (_, size, count) in self.sizes.items()
                },
            },
            "against": _shown(self.against.found()),
            "validation": _shown(self.validation.found()),
            "examples": self.examples,
        }


def _optional(name: str) -> Any:
    """A module of the extra `data`; None if it is not installed."""
    try:
        return import_module(name)
    except ImportError:
        return None


def _shown(leaks: list[Leak]) -> list[dict[str, Any]]:
    return [{**one._asdict(), "example": masked(one.example)} for one in leaks[:LISTED]]


def start_of(document: Document) -> str:
    """The characters of a document that are judged."""
    text = ""
    for piece in document.pieces:
        text += piece[: JUDGED_CHARACTERS - len(text)]
        if len(text) >= JUDGED_CHARACTERS:
            break
    return text


def masked(text: str) -> str:
    """Text of a document as it is shown: without personal data."""
    return personal.redact(text, personal.KINDS)


@functools.cache
def script_of(letter: str) -> str:
    """The script of a letter, as Unicode's names begin: LATIN, CJK; "" for other characters."""
    return unicodedata.name(letter, "OTHER").split()[0] if letter.isalpha() else ""
