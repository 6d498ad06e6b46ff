"""What a text shares with others: evaluation text that training text has, and repeated lines.

Two texts overlap in runs of GRAM units (llm/quality/ngrams.py: words, or characters of scripts
without spaces), and in whole lines, or whole documents, of SHORTEST to GRAM - 1 units, which such
runs miss. Source of the 13: Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llm.quality.ngrams import Hashes, Numbers, Units, in_batches, runs_of, units_of

GRAM, SHORTEST = 13, 5

_BATCH = 2**18
# Grams of evaluation text that are held in memory, 40 bytes each. If there are more, every second,
# fourth ... is looked for, chosen by its hash.
_MOST_GRAMS = 2**23
_MAY_BITS = 24  # of a hash, to tell quickly that it is none of those looked for

# Lines that are counted at once, and characters of a line that are shown.
_MOST_LINES, _SHOWN = 2**19, 200
# A line's count, and above these bits what was forgotten before the line was first counted.
_COUNT = (1 << 32) - 1


class Leak(NamedTuple):
    """A document that shares text with what was read.

    Attributes:
      found, grams: how many of its grams were found, and how many were looked for.
      example: the first shared run, as the text that was read has it.
      where: the document that has it.
    """

    name: str
    found: int
    grams: int
    example: str
    where: str


class Overlap:
    """Which of the expected documents, evaluation text for example, share text with others.

    Args:
      expected: the names and texts of documents.
    """

    def __init__(self, expected: Iterable[tuple[str, str]]):
        self.names: list[str] = []
        self.one_in = 1  # how many grams one that is looked for stands for
        parts: list[tuple[Hashes, Numbers]] = []
        held = 0

        def texts() -> Iterator[str]:
            for name, text in expected:
                self.names.append(name)
                yield text

        for numbers, batch in in_batches(texts(), _BATCH):
            hashes, first, _, units = _grams(batch)
            parts.append(self._chosen(hashes, numbers[units.text[first]]))
            held += len(parts[-1][0])
            while held > _MOST_GRAMS:
                self.one_in *= 2
                parts = [self._chosen(*part) for part in parts]
                held = sum(len(of) for of, _ in parts)
        parts.append((np.empty(0, np.uint64), np.empty(0, np.int64)))
        every, self._owner = (np.concatenate(of) for of in zip(*parts, strict=True))
        self._wanted, self._which = np.unique(every, return_inverse=True)
        self._seen = np.zeros(len(self._wanted), bool)
        self._may = np.zeros(2**_MAY_BITS, bool)
        self._may[self._top(self._wanted)] = True
        self._examples: dict[int, tuple[str, str]] = {}

    def read(self, name: str, text: str) -> None:
        """Look for the expected documents in another."""
        if not len(self._wanted):
            return
        for _, batch in in_batches([text], _BATCH):
            hashes, first, sizes, units = _grams(batch)
            maybe = np.flatnonzero(self._may[self._top(hashes)])
            places = np.searchsorted(self._wanted, hashes[maybe])
            places = np.minimum(places, len(self._wanted) - 1)
            hits = self._wanted[places] == hashes[maybe]
            for place, run in zip(places[hits], maybe[hits], strict=True):
                if not self._seen[place]:
                    self._seen[place] = True
                    self._examples[int(place)] = name, _excerpt(units, first[run], sizes[run])

    def found(self) -> list[Leak]:
        """The expected documents that share text with what was read, the most shared first."""
        seen = self._seen[self._which]
        grams = np.bincount(self._owner, minlength=len(self.names))
        found = np.bincount(self._owner[seen], minlength=len(self.names))
        # Sorted, so that the first of a document's grams in the order of the text is taken.
        first = dict(zip(self._owner[seen][::-1], self._which[seen][::-1], strict=True))
        leaks = []
        for number in np.flatnonzero(found).tolist():
            where, example = self._examples[int(first[number])]
            sizes = int(found[number]), int(grams[number])
            leaks.append(Leak(self.names[number], *sizes, example, where))
        return sorted(leaks, key=lambda leak: -leak.found / leak.grams)

    def _chosen(self, hashes: Hashes, owner: Numbers) -> tuple[Hashes, Numbers]:
        kept = hashes % np.uint64(self.one_in) == 0
        return hashes[kept], owner[kept]

    @staticmethod
    def _top(hashes: Hashes) -> npt.NDArray[np.uint64]:
        return hashes >> np.uint64(64 - _MAY_BITS)


def _grams(texts: list[str]) -> tuple[Hashes, Numbers, Numbers, Units]:
    """The grams of some texts: their hashes, their first units and how many units they have."""
    units = units_of(texts)
    hashes, first, sizes = runs_of(units.hashes, units.text, GRAM)
    several_lines = units.line[first + sizes - 1] != units.line[first]
    in_text = (sizes == GRAM) | ((sizes >= SHORTEST) & several_lines)
    lines, line_first, line_sizes = runs_of(units.hashes, units.line, GRAM)
    short = (line_sizes >= SHORTEST) & (line_sizes < GRAM)
    return (
        np.concatenate([hashes[in_text], lines[short]]),
        np.concatenate([first[in_text], line_first[short]]),
        np.concatenate([sizes[in_text], line_sizes[short]]),
        units,
    )


def _excerpt(units: Units, first: int, size: int) -> str:
    """The text of a run of units."""
    ends = [*units.begins[first + size : first + size + 1], len(units.joined)]
    return units.joined[units.begins[first] : ends[0]].strip()


class RepeatedLines:
    """Counts the documents that each line is in, in bounded memory.

    If too many lines are held, the rarest are forgotten, so that counts may be too small, by up to
    `forgotten` (Manku & Motwani 2002, "Approximate Frequency Counts over Data Streams").

    Attributes:
      characters, repeated: of all lines, and of those that another document has too.
    """

    def __init__(self) -> None:
        self.characters = self.repeated = self.forgotten = 0
        self._documents: dict[str, int] = {}

    def add(self, text: str) -> None:
        """Count the lines of the next document, each once."""
        held = self._documents
        for line in {line.strip() for line in text.splitlines()} - {""}:
            # Two long lines that begin alike and are of one length count as one.
            key = line if len(line) <= _SHOWN else f"{line[:_SHOWN]}\0{hash(line)}"
            held[key] = held.get(key, self.forgotten << 32) + 1
            count = held[key] & _COUNT
            self.characters += len(line)
            self.repeated += len(line) * (2 if count == 2 else count > 2)
        if len(held) > _MOST_LINES:
            self.forgotten += 1
            self._documents = {
                line: value
                for line, value in held.items()
                if (value & _COUNT) + (value >> 32) > self.forgotten
            }

    def most(self, count: int) -> list[tuple[str, int]]:
        """The lines that are in the most documents, at least two, and in how many."""
        counts = ((line, value & _COUNT) for line, value in self._documents.items())
        often = [item for item in counts if item[1] > 1]
        often.sort(key=lambda item: (-item[1], item[0]))
        return [(line.partition("\0")[0], documents) for line, documents in often[:count]]
