"""Rules of quality: numbers that are measured on a document, and the bounds that Gopher, C4 and
FineWeb keep.

    failed(text, "gopher")     the first rule that a document breaks
    broken(text)               every rule of every set that it breaks

A word is a run of letters, digits and marks, or, in scripts that put no spaces between words
(Chinese, Japanese, Thai and others), one character. A run of signs is a word too, as it is for
datatrove. A rule that has no meaning for such scripts, or for the language, does not apply:

    mean word length        measured on words that spaces divide, if most are
    words with a letter     without spaces, signs do not count as words
    stop words              are English, and are asked of texts in Latin letters only
    words of a line (C4)    the longest is measured between spaces and characters that stand alone
    short lines (FineWeb)   a character of such a script is as wide as two letters

C4 also removes lines from the documents that it keeps; here a document is only judged.

Sources: Rae et al. 2021, "Scaling Language Models" (Gopher), tables A1 and section A.1.1; Raffel et
al. 2020 (C4), section 2.2; Penedo et al. 2024, "The FineWeb Datasets", section 3.6. Tests compare
the verdicts with those of `datatrove`.
"""

import functools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from llm.quality.ngrams import WITHOUT_SPACES

# As ranges of a pattern's set.
_ALONE = "".join(f"{chr(block[0])}-{chr(block[-1])}" for block in WITHOUT_SPACES)
_ENDS = "。｡．！？؟۔।॥։።፧။។‼⁇⁈⁉"
_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
_POLICY = re.compile(
    "terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies"
)
_C4_LONGEST_WORD, _C4_WORDS_OF_LINE, _SHORT_LINE = 1000, 3, 30

_alone = re.compile(f"[{_ALONE}]")
_between = re.compile(rf"[\s{_ALONE}]+")
_citation = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
# In scripts other than Latin, closing quotes may stand behind what ends a sentence.
_ends_line = re.compile(rf"(?:[.!?{_ENDS}]|[{_ENDS}][”’」』）》〉]+)\Z")
_sentence_end = re.compile(rf"[.!?]+[\"'”’)\]]*(?=\s|\Z)|[{_ENDS}]+[”’」』）》〉]*")


class Rule(NamedTuple):
    """A number of a document, and its bounds.

    Attributes:
      name: what is measured.
      measure: the number; None if the rule does not apply to the document.
      least, most: the bounds, which themselves are allowed.
    """

    name: str
    measure: Callable[["Measured"], float | None]
    least: float = -math.inf
    most: float = math.inf

    def bounds(self) -> str:
        """ "at least 50 and at most 100,000" """
        parts = [f"at least {self.least:,}"] if self.least > -math.inf else []
        parts += [f"at most {self.most:,}"] if self.most < math.inf else []
        return " and ".join(parts)

    def allows(self, value: float | None) -> bool:
        return value is None or self.least <= value <= self.most


def failed(text: str, rules: str) -> str | None:
    """The first rule of a set that a document breaks, in words; None if it keeps them all.

    Args:
      rules: a key of `RULES`.
    """
    measured = Measured(text)
    for rule in RULES[rules]:
        value = rule.measure(measured)
        if not rule.allows(value):
            return f"{rule.name} {value:,.3g}, expected {rule.bounds()}"
    return None


def broken(text: str) -> Iterator[tuple[str, Rule, float]]:
    """Every rule of every set that a document breaks: the set, the rule and the number."""
    measured = Measured(text)
    for name, rules in RULES.items():
        for rule in rules:
            value = rule.measure(measured)
            if value is not None and not rule.allows(value):
                yield name, rule, value


class Measured:
    """A document, and what several rules ask of it, computed when it is asked for first."""

    def __init__(self, text: str):
        self.text = text

    @functools.cached_property
    def words(self) -> list[str]:
        return _word_pattern().findall(self.text)

    @functools.cached_property
    def spoken(self) -> list[str]:
        """The words that are not signs."""
        return [
            word
            for word in self.words
            if word[0].isalnum() or word[-1].isalnum() or _alone.match(word)
        ]

    @functools.cached_property
    def spaced(self) -> list[str]:
        """The words that spaces divide; none if most of the text is in scripts without spaces."""
        divided = [word for word in self.spoken if not _alone.match(word)]
        return divided if 2 * len(divided) > len(self.spoken) else []

    @functools.cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @functools.cached_property
    def filled(self) -> list[str]:
        """The lines that are not blank, as FineWeb cuts them."""
        return [line for line in self.text.split("\n") if line.strip()]

    def share(self, lines: Sequence[str], holds: Callable[[str], object]) -> float | None:
        """The share of lines for which something holds."""
        return sum(map(bool, map(holds, lines))) / len(lines) if lines else None

    def per_word(self, *signs: str) -> float | None:
        """How often signs occur, for each word."""
        return sum(map(self.text.count, signs)) / len(self.words) if self.words else None

    @functools.cached_property
    def mean_length(self) -> float | None:
        return sum(map(len, self.spaced)) / len(self.spaced) if self.spaced else None

    @functools.cached_property
    def with_letter(self) -> float | None:
        words = self.words if self.spaced else self.spoken
        return self.share(words, lambda word: any(map(str.isalpha, word)))

    @functools.cached_property
    def stop_words(self) -> float | None:
        latin = sum(word[0] < "\u0250" for word in self.spoken)
        known = len(_STOP_WORDS.intersection(self.words))
        return float(known) if 2 * latin > len(self.spoken) else None

    def repeated(self, pattern: str) -> tuple[float, float]:
        """Of the parts between a pattern: the share that stood before, and of the characters."""
        seen: set[str] = set()
        text = self.text.strip() if pattern == _PARAGRAPH else self.text
        parts, count, size = re.split(pattern, text), 0, 0
        for part in parts:
            if part in seen:
                count, size = count + 1, size + len(part)
            seen.add(part)
        return count / len(parts), size / max(len(self.text), 1)

    @functools.cached_property
    def _runs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each word its number, and the characters before it, without and with spaces."""
        numbers: dict[str, int] = {}
        ids = [numbers.setdefault(word, len(numbers)) for word in self.words]
        sizes = np.fromiter(map(len, self.words), np.int64, len(ids))
        spaces = np.fromiter((not _alone.match(word) for word in self.words), np.int64, len(ids))
        before, spaced = (np.cumsum([0, *part]) for part in (sizes, sizes + spaces))
        return np.array(ids, np.uint64), before, spaced

    def _grams(self, n: int) -> list[int]:
        """A hash of each run of n words."""
        ids = self._runs[0]
        grams = np.zeros(max(len(ids) - n + 1, 0), np.uint64)
        for place in range(n):
            # The multiplier is that of Steele & Vigna 2021, "Computationally easy, spectrally good
            # multipliers"; the shift keeps low bits from depending on low bits alone.
            grams = (grams + ids[place : place + len(grams)] + np.uint64(1)) * np.uint64(
                0xD1342543DE82EF95
            )
            grams ^= grams >> np.uint64(32)
        return grams.tolist()

    def top_gram(self, n: int) -> float | None:
        """The share of the characters that the most frequent run of n words holds."""
        grams = self._grams(n)
        if not grams:
            return None
        (top, count), *_ = Counter(grams).most_common(1)
        first = grams.index(top)
        spaced = self._runs[2]
        # A space stands between the words, and none behind the last.
        last_space = 0 if _alone.match(self.words[first + n - 1]) else 1
        return (spaced[first + n] - spaced[first] - last_space) * count / len(self.text)

    def repeated_grams(self, n: int) -> float:
        """The share of the characters in runs of n words that occurred before."""
        grams, size, place = self._grams(n), 0, 0
        seen: set[int] = set()
        if len(set(grams)) == len(grams):
            return 0.0
        before = self._runs[1]
        while place < len(grams):
            if grams[place] in seen:
                size += before[place + n] - before[place]
                place += n
            else:
                seen.add(grams[place])
                place += 1
        return size / len(self.text)

    @functools.cached_property
    def c4(self) -> Counter[str]:
        """What is in the lines that C4 keeps, as far as it reads."""
        found: Counter[str] = Counter()
        for line in map(str.strip, self.lines):
            if max(map(len, _between.split(line))) > _C4_LONGEST_WORD:
                continue
            words = max(len(line.split()), len(_alone.findall(line)))
            line, lower = _citation.sub("", line), line.lower()
            ends = line.endswith(("'", '"')) or _ends_line.search(line)
            if not ends or line.endswith("...") or words < _C4_WORDS_OF_LINE:
                continue
            found["lorem ipsum"] += "lorem ipsum" in lower
            if "javascript" in lower:
                continue
            found["curly brackets"] += "{" in line
            if _POLICY.search(lower):
                continue
            found["sentences"] += len(sentences(line))
        return found

    @functools.cached_property
    def repeated_lines(self) -> float | None:
        """The share of the characters in lines that stood before, as FineWeb counts."""
        again = len("".join(self.filled)) - len("".join(dict.fromkeys(self.filled)))
        return again / len(self.text.replace("\n", "")) if self.filled else None


def sentences(line: str) -> list[str]:
    """The sentences of a line; what stands behind the last full stop is one."""
    parts, start = [], 0
    for end in _sentence_end.finditer(line):
        parts.append(line[start : end.end()])
        start = end.end()
    parts += [line[start:]] if line[start:].strip() else []
    return parts


def _width(line: str) -> int:
    return len(line) + len(_alone.findall(line))


@functools.cache
def _word_pattern() -> re.Pattern[str]:
    """A word. Marks, which `re` takes for signs, stand inside of words, and so does '."""
    marks = "".join(c for c in map(chr, range(0x20000)) if unicodedata.category(c)[0] == "M")
    letters, inside = rf"[^\W{_ALONE}]", f"['’{marks}]"
    return re.compile(rf"[{_ALONE}]|{letters}+(?:{inside}+{letters}+|[{marks}])*|[^\w\s]+")


_PARAGRAPH, _LINES = r"\n{2,}", r"\n+"
_BULLETS, _ELLIPSES = ("•", "-"), ("...", "…")

# In the order in which datatrove asks.
RULES = {
    "gopher": (
        Rule("words", lambda m: len(m.spoken), 50, 100_000),
        Rule("mean word length", lambda m: m.mean_length, 3, 10),
        Rule("# for each word", lambda m: m.per_word("#"), most=0.1),
        Rule("ellipses for each word", lambda m: m.per_word(*_ELLIPSES), most=0.1),
        Rule(
            "lines that begin with a bullet",
            lambda m: m.share(m.lines, lambda line: line.lstrip().startswith(_BULLETS)),
            most=0.9,
        ),
        Rule(
            "lines that end with an ellipsis",
            lambda m: m.share(m.lines, lambda line: line.rstrip().endswith(_ELLIPSES)),
            most=0.3,
        ),
        Rule("words with a letter", lambda m: m.with_letter, 0.8),
        Rule("different stop words", lambda m: m.stop_words, 2),
        Rule("repeated paragraphs", lambda m: m.repeated(_PARAGRAPH)[0], most=0.3),
        Rule("characters in repeated paragraphs", lambda m: m.repeated(_PARAGRAPH)[1], most=0.2),
        Rule("repeated lines", lambda m: m.repeated(_LINES)[0], most=0.3),
        Rule("characters in repeated lines", lambda m: m.repeated(_LINES)[1], most=0.2),
        *(
            Rule(
                f"characters in the top {n}-gram",
                functools.partial(Measured.top_gram, n=n),
                most=most,
            )
            for n, most in ((2, 0.2), (3, 0.18), (4, 0.16))
        ),
        *(
            Rule(
                f"characters in repeated {n}-grams",
                functools.partial(Measured.repeated_grams, n=n),
                most=most,
            )
            for n, most in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
        ),
    ),
    "c4": (
        Rule("lorem ipsum", lambda m: m.c4["lorem ipsum"], most=0),
        Rule("curly brackets", lambda m: m.c4["curly brackets"], most=0),
        Rule("sentences", lambda m: m.c4["sentences"], 5),
    ),
    "fineweb": (
        Rule("lines with text", lambda m: len(m.filled), 1),
        Rule(
            "lines that end a sentence", lambda m: m.share(m.filled, _ends_line.search), least=0.12
        ),
        Rule(
            "lines of up to 30 characters",
            lambda m: m.share(m.filled, lambda line: _width(line) <= _SHORT_LINE),
            most=0.67,
        ),
        Rule("characters in repeated lines", lambda m: m.repeated_lines, most=0.01),
        Rule("line breaks for each word", lambda m: m.per_word("\n"), most=0.3),
    ),
}
