"""Rules of quality: numbers that are measured on a document, and the bounds that Gopher, C4 and
FineWeb keep.

    failed(text, "gopher")     the first rule that a document breaks
    broken(text)               every rule of every set that it breaks

A word is a run of letters, digits and marks, or, in scripts that put no spaces between words
(Chinese, Japanese, Thai and others), one character. A run of signs is a word too, as it is for
datatrove. If at least half of the words are such characters, the rules that would count as a fault
what is normal there are asked in another way, or not at all:

    mean word length          is not asked
    words with a letter       signs do not count as words
    runs of n words           are runs of 2 n characters: a word has about two
    short lines (FineWeb)     are not asked; a verse has seven characters (so does FineWeb 2)
    repeated lines (FineWeb)  may hold 10 % of the characters (so does FineWeb 2)
    stop words                are English, and are asked of texts in Latin letters only
    words of a line (C4)      the longest is measured between spaces and characters that stand alone

C4 also removes lines from the documents that it keeps; here a document is only judged.

Sources: Rae et al. 2021, "Scaling Language Models" (Gopher), tables A1 and section A.1.1; Raffel et
al. 2020 (C4), section 2.2; Penedo et al. 2024, "The FineWeb Datasets", section 3.6; Penedo et al.
2025, "FineWeb2: One Pipeline to Scale Them All". Tests compare the verdicts with those of
`datatrove`.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property, partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llm.quality.ngrams import WITHOUT_SPACES, Hashes, Numbers, drawn, mixed

# As ranges of a pattern's set.
_ALONE = "".join(f"{chr(block[0])}-{chr(block[-1])}" for block in WITHOUT_SPACES)
_ENDS = "。｡．！？؟۔।॥։።፧။។‼⁇⁈⁉"
_CLOSING = "”’」』）》〉"
_LINE_ENDS, _FOREIGN_ENDS = frozenset(f".!?{_ENDS}"), frozenset(_ENDS)
_POLICY = re.compile(
    "terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies"
)
_C4_LONGEST_WORD, _C4_WORDS_OF_LINE, _SHORT_LINE, _LONGEST_RUN = 1000, 3, 30, 10

_alone = re.compile(f"[{_ALONE}]")
_between = re.compile(rf"[\s{_ALONE}]+")
_citation = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
_sentence_end = re.compile(rf"[.!?]+[\"'”’)\]]*(?=\s|\Z)|[{_ENDS}]+[{_CLOSING}]*")

# What a character is: one of the kinds, and flags.
_SPACE, _WORD, _MARK, _APOSTROPHE, _SIGN, _CHARACTER = range(6)
_KIND, _LETTER, _SPOKEN = 7, 8, 16
_LAST = 0x3FFFF
_Kinds = npt.NDArray[np.uint8]


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


def failed(text: str, rules: str) -> str | None:
    """The first rule of a set that a document breaks, in words; None if it keeps them all.

    Args:
      rules: a key of `RULES`.
    """
    for _, rule, value in broken(text, rules):
        return f"{rule.name} {value:,.3g}, expected {rule.bounds()}"
    return None


def broken(text: str, *sets: str) -> Iterator[tuple[str, Rule, float]]:
    """Every rule that a document breaks, of these sets or of all: the set, the rule, the number."""
    measured = Measured(text)
    for name in sets or RULES:
        for rule in RULES[name]:
            value = rule.measure(measured)
            if value is not None and not rule.least <= value <= rule.most:
                yield name, rule, value


class Words:
    """The words of a text, found in all of its characters together.

    Attributes:
      begins, sizes: int64 [W], the first character of each, and how many it has.
      ids: int64 [W], equal for equal words.
      hashes, count: [I], of each id: a hash of the word, and how often it occurs.
      alone: bool [W], a character of a script without spaces.
      spoken: bool [W], not a run of signs.
      letter: bool [W], there is a letter in it.
      latin: bool [W], it begins with a Latin letter, or a digit.
    """

    def __init__(self, text: str):
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        about = _characters()[np.minimum(codes, _LAST)]
        kinds = _joined(about & _KIND)
        opens = np.diff(kinds, prepend=np.uint8(_KIND)) != 0
        first = np.flatnonzero(opens | (kinds == _CHARACTER))
        is_word = kinds[first] != _SPACE
        self.begins, ends = first[is_word], np.append(first[1:], len(kinds))[is_word]
        self.sizes = ends - self.begins
        self.alone = kinds[self.begins] == _CHARACTER
        self.spoken = (about[self.begins] | about[ends - 1]) & _SPOKEN > 0
        self.latin = codes[self.begins] < 0x250
        self.letter, hashes = np.zeros(0, bool), np.empty(0, np.uint64)
        if len(ends):
            self.letter = np.bitwise_or.reduceat(about, self.begins) & _LETTER > 0
            hashes = _hashes(np.where(kinds == _SPACE, 0, codes + 1), self.begins)
        unique = np.unique(hashes, return_inverse=True, return_counts=True)
        self.hashes, self.ids, self.count = unique


def _joined(kinds: _Kinds) -> _Kinds:
    """The kinds, where marks behind a letter, and apostrophes between letters, are part of a word;
    elsewhere they are signs."""
    places = np.arange(len(kinds))
    for kind in (_MARK, _APOSTROPHE):
        if (inside := kinds == kind).any():
            last = np.maximum.accumulate(np.where(inside, 0, places))
            joins = kinds[last] == _WORD
            if kind == _APOSTROPHE:
                ends = np.where(inside, places[-1], places)[::-1]
                joins &= kinds[np.minimum.accumulate(ends)[::-1]] == _WORD
            kinds = np.where(inside, np.where(joins, np.uint8(_WORD), np.uint8(_SIGN)), kinds)
    return kinds


def _hashes(codes: npt.NDArray[np.uint32], begins: Numbers) -> Hashes:
    """A hash of each word: the sum of its characters, each times a number drawn for its place."""
    codes, begins = codes[begins[0] :], begins - begins[0]
    sizes = np.diff(begins, append=len(codes))  # with the spaces behind, whose codes are zero
    places = np.arange(len(codes)) - np.repeat(begins, sizes)
    return mixed(np.add.reduceat(codes * drawn(int(sizes.max()))[places], begins))


class Measured:
    """A document, and what several rules ask of it, computed when it is asked for first."""

    def __init__(self, text: str):
        self.text = text

    @cached_property
    def words(self) -> Words:
        return Words(self.text)

    @cached_property
    def spoken(self) -> int:
        """How many words are not signs."""
        return int(self.words.spoken.sum())

    @cached_property
    def without_spaces(self) -> bool:
        """Whether at least half of the words are characters of scripts without spaces."""
        return 2 * int(self.words.alone.sum()) >= self.spoken > 0

    @cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @cached_property
    def filled(self) -> list[str]:
        """The lines that are not blank, as FineWeb cuts them."""
        return [line for line in self.text.split("\n") if line.strip()]

    def share(self, lines: Sequence[str], holds: Callable[[str], object]) -> float | None:
        """The share of lines for which something holds."""
        return sum(map(bool, map(holds, lines))) / len(lines) if lines else None

    def per_word(self, *signs: str) -> float | None:
        """How often signs occur, for each word."""
        words = len(self.words.ids)
        return sum(map(self.text.count, signs)) / words if words else None

    def mean_length(self) -> float | None:
        divided = self.words.sizes[self.words.spoken & ~self.words.alone]
        return float(divided.mean()) if len(divided) and not self.without_spaces else None

    def with_letter(self) -> float | None:
        words = self.words
        letter = words.letter[words.spoken] if self.without_spaces else words.letter
        return float(letter.mean()) if len(letter) else None

    def stop_words(self) -> float | None:
        latin = int((self.words.latin & self.words.spoken).sum())
        known = int(np.isin(_stop_words(), self.words.hashes).sum())
        return float(known) if 2 * latin > self.spoken else None

    @cached_property
    def again(self) -> dict[str, tuple[float, float]]:
        """Of the parts between a pattern: the share that stood before, and of the characters."""
        found = {}
        for pattern, text in ((_PARAGRAPHS, self.text.strip()), (_LINES, self.text)):
            parts = re.split(pattern, text)
            different = dict.fromkeys(parts)
            size = len("".join(parts)) - len("".join(different))
            found[pattern] = 1 - len(different) / len(parts), size / max(len(self.text), 1)
        return found

    @cached_property
    def _runs(self) -> list[tuple[Numbers, Numbers]]:
        """Of each length from 1: where the runs of words begin that occur several times, and a
        number of each, equal for equal runs. A run that does begins with one that does."""
        ids = self.words.ids
        places = np.flatnonzero(self.words.count[ids] > 1)
        found, runs = [(places, ids[places])], ids[places]
        while len(places) and len(found) < self._length(_LONGEST_RUN):
            places = places[: np.searchsorted(places, len(ids) - len(found))]
            runs = runs[: len(places)] * len(ids) + ids[places + len(found)]
            _, runs, count = np.unique(runs, return_inverse=True, return_counts=True)
            several = count[runs] > 1
            places, runs = places[several], runs[several]
            found.append((places, runs))
        return found

    def _length(self, words: int) -> int:
        return words * 2 if self.without_spaces else words

    def _runs_of(self, n: int) -> tuple[int, Numbers, Numbers]:
        length = self._length(n)
        return length, *self._runs[min(length, len(self._runs)) - 1]

    def top_gram(self, n: int) -> float | None:
        """The share of the characters that the most frequent run of n words holds."""
        (length, places, runs), words = self._runs_of(n), self.words
        if len(words.ids) < length:
            return None
        first, often = 0, 1
        if len(places):
            count = np.bincount(runs)
            often = int(count.max())
            first = places[count[runs] == often][0]
        # A space stands between the words, and none behind the last.
        spaces = np.count_nonzero(~words.alone[first : first + length - 1])
        return float(words.sizes[first : first + length].sum() + spaces) * often / len(self.text)

    def repeated_grams(self, n: int) -> float:
        """The share of the characters in runs of n words that occurred before."""
        length, places, runs = self._runs_of(n)
        size = free = 0
        seen: set[int] = set()
        for place, run in zip(places.tolist(), runs.tolist(), strict=True):
            if place >= free and run in seen:
                size += int(self.words.sizes[place : place + length].sum())
                free = place + length
            elif place >= free:
                seen.add(run)
        return size / max(len(self.text), 1)

    @cached_property
    def c4(self) -> Counter[str]:
        """What is in the lines that C4 keeps, as far as it reads."""
        found: Counter[str] = Counter()
        for line in map(str.strip, self.lines):
            line, whole = _citation.sub("", line) if "[" in line else line, line
            ends = line.endswith(("'", '"')) or _ends_sentence(line)
            if not ends or line.endswith("..."):
                continue
            words = max(len(whole.split()), 0 if line.isascii() else len(_alone.findall(whole)))
            is_long = len(whole) > _C4_LONGEST_WORD
            if is_long and max(map(len, _between.split(whole))) > _C4_LONGEST_WORD:
                continue
            if words < _C4_WORDS_OF_LINE:
                continue
            lower = whole.lower()
            found["lorem ipsum"] += "lorem ipsum" in lower
            if "javascript" in lower:
                continue
            found["curly brackets"] += "{" in line
            if _POLICY.search(lower):
                continue
            found["sentences"] += len(sentences(line))
        return found

    def repeated_lines(self, without_spaces: bool) -> float | None:
        """The share of the characters in lines that stood before, as FineWeb counts."""
        if not self.filled or self.without_spaces != without_spaces:
            return None
        again = len("".join(self.filled)) - len("".join(dict.fromkeys(self.filled)))
        return again / len(self.text.replace("\n", ""))


def sentences(line: str) -> list[str]:
    """The sentences of a line; what stands behind the last full stop is one."""
    parts, start = [], 0
    for end in _sentence_end.finditer(line):
        parts.append(line[start : end.end()])
        start = end.end()
    parts += [line[start:]] if line[start:].strip() else []
    return parts


def _ends_sentence(line: str) -> bool:
    """In scripts other than Latin, closing quotes may stand behind what ends a sentence."""
    return line[-1:] in _LINE_ENDS or line.rstrip(_CLOSING)[-1:] in _FOREIGN_ENDS


def _is_short(line: str) -> bool:
    """A character of a script without spaces is as wide as two letters."""
    return len(line) <= _SHORT_LINE and len(line) + len(_alone.findall(line)) <= _SHORT_LINE


@cache
def _characters() -> _Kinds:
    """For each code point what it is."""
    table = np.full(_LAST + 1, _SIGN, np.uint8)
    for code in range(_LAST + 1):
        sign = chr(code)
        if sign.isalnum() or sign == "_":
            table[code] = _WORD | _LETTER * sign.isalpha() | _SPOKEN * sign.isalnum()
        elif sign.isspace():
            table[code] = _SPACE
        elif unicodedata.category(sign)[0] == "M":
            table[code] = _MARK
    table[[ord("'"), ord("’")]] = _APOSTROPHE
    for block in WITHOUT_SPACES:
        table[block] = table[block] & _LETTER | _SPOKEN | _CHARACTER
    return table


@cache
def _stop_words() -> Hashes:
    return Words("the be to of and that have with").hashes


_PARAGRAPHS, _LINES = r"\n{2,}", r"\n+"
_BULLETS, _ELLIPSES = ("•", "-"), ("...", "…")

# In the order in which datatrove asks.
RULES = {
    "gopher": (
        Rule("words", lambda m: m.spoken, 50, 100_000),
        Rule("mean word length", Measured.mean_length, 3, 10),
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
        Rule("words with a letter", Measured.with_letter, 0.8),
        Rule("different stop words", Measured.stop_words, 2),
        Rule("repeated paragraphs", lambda m: m.again[_PARAGRAPHS][0], most=0.3),
        Rule("characters in repeated paragraphs", lambda m: m.again[_PARAGRAPHS][1], most=0.2),
        Rule("repeated lines", lambda m: m.again[_LINES][0], most=0.3),
        Rule("characters in repeated lines", lambda m: m.again[_LINES][1], most=0.2),
        *(
            Rule(f"characters in the top {n}-gram", partial(Measured.top_gram, n=n), most=most)
            for n, most in ((2, 0.2), (3, 0.18), (4, 0.16))
        ),
        *(
            Rule(
                f"characters in repeated {n}-grams",
                partial(Measured.repeated_grams, n=n),
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
        Rule("lines that end a sentence", lambda m: m.share(m.filled, _ends_sentence), least=0.12),
        Rule(
            "lines of up to 30 characters",
            lambda m: None if m.without_spaces else m.share(m.filled, _is_short),
            most=0.67,
        ),
        Rule("characters in repeated lines", lambda m: m.repeated_lines(False), most=0.01),
        Rule(
            "characters in repeated lines, without spaces",
            lambda m: m.repeated_lines(True),
            most=0.1,
        ),
        Rule("line breaks for each word", lambda m: m.per_word("\n"), most=0.3),
    ),
}
