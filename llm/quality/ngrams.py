"""Words and runs of words of many texts at once, as 64-bit hashes.

A unit is what is counted in place of words, in every script: a word (letters, marks and digits that
nothing separates), or, in scripts that put no spaces between words, one character. So a run of five
units is five words of English, five characters of Chinese, and a mixture of both where a text mixes
them. Case, punctuation, spaces and compatibility forms (NFKC) do not count.

Hashes are polynomials modulo 2^64, computed by NumPy for all units together. They are the same on
every machine; Python's Unicode tables decide which of the newest characters are letters.
"""

import functools
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]

# Blocks of Unicode whose scripts put no spaces between words: Thai and Lao, Tibetan, Burmese,
# Khmer, kana, Han. From 0x20000 on there are only Han characters.
WITHOUT_SPACES = (
    *(range(0x0E00, 0x10A0), range(0x1780, 0x1800), range(0x3005, 0x3008), range(0x3040, 0x3100)),
    *(range(0x31F0, 0x3200), range(0x3400, 0x4DC0), range(0x4E00, 0xA000), range(0xAA60, 0xAA80)),
    range(0xF900, 0xFB00),
    range(0x20000, 0x3FFFE),
)
_HAN_BEGINS, _HAN_ENDS = 0x20000, 0x3FFFF
_ALONE = np.uint32(1 << 31)  # marks a letter that is a unit by itself

# Odd numbers drawn once; the increment of Steele, Lea & Flood 2014, "Fast Splittable Pseudorandom
# Number Generators" (SplitMix64), whose finaliser `mixed` is.
_BASE, _STEP = 0xD1342543DE82EF95, 0x9E3779B97F4A7C15
_WORD = 1 << 64


class Units(NamedTuple):
    """The units of some texts.

    Attributes:
      hashes: [U]; equal units have equal hashes.
      text, line: [U], the text that each is in, and the line; lines are counted over all texts.
      begins: [U], the first character of each in `joined`.
      joined: the texts in NFKC, one after the other, with a newline between them.
    """

    hashes: Hashes
    text: Numbers
    line: Numbers
    begins: Numbers
    joined: str


def mixed(values: Hashes) -> Hashes:
    """A permutation of the numbers below 2^64 that leaves no pattern in them."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def drawn(count: int) -> Hashes:
    """The first numbers of SplitMix64: constants that look random."""
    return mixed(np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_STEP))


def units_of(texts: Sequence[str]) -> Units:
    """The units of all texts. A call holds about 60 bytes for each character."""
    normal = [one if one.isascii() else unicodedata.normalize("NFKC", one) for one in texts]
    joined = "\n".join(normal)
    codes = np.frombuffer(joined.encode("utf-32-le"), "<u4")
    letters = _letters()[np.minimum(codes, _HAN_ENDS)]
    is_letter, alone = letters != 0, letters >= _ALONE
    first = is_letter.copy()
    first[1:] &= ~is_letter[:-1] | alone[1:] | alone[:-1]
    begins = np.flatnonzero(first)
    powers, inverse = _powers(len(codes).bit_length())
    # The characters between two units are zeros, so the sum up to the next unit is that of one.
    hashes = np.empty(0, np.uint64)
    if len(begins):
        hashes = np.add.reduceat(letters * powers[: len(codes)], begins) * inverse[begins]
    ends = np.cumsum([len(text) + 1 for text in normal])
    line_ends = np.flatnonzero(codes == ord("\n"))
    text, line = (np.searchsorted(of, begins, side="right") for of in (ends, line_ends))
    return Units(mixed(hashes), text, line, begins, joined)


def runs_of(hashes: Hashes, group: Numbers, length: int) -> tuple[Hashes, Numbers, Numbers]:
    """Every run of `length` units of one group; a group with fewer units is one run.

    Args:
      hashes, group: [U], of each unit. The group is that of `Units.text` or `Units.line`.
    Returns:
      Of each run: its hash, the index of its first unit, and how many units it has.
    """
    count, odd = len(hashes), drawn(length) | np.uint64(1)
    total, sizes = np.zeros(count, np.uint64), np.zeros(count, np.int64)
    for place in range(min(length, count)):
        inside = group[place:] == group[: count - place]
        total[: count - place] += hashes[place:] * odd[place] * inside
        sizes[: count - place] += inside
    opens = np.ones(count, bool)
    opens[1:] = group[1:] != group[:-1]
    first = np.flatnonzero((sizes == length) | opens)
    return mixed(total[first]), first, sizes[first]


def in_batches(texts: Iterable[str], characters: int) -> Iterator[tuple[Numbers, list[str]]]:
    """Texts in batches of about so many characters, and the number of each.

    A longer text is cut, always at the same places: a run of units over a cut does not count.
    """
    numbers, batch, size = [], [], 0
    for number, text in enumerate(texts):
        for start in range(0, len(text), characters):
            numbers.append(number)
            batch.append(text[start : start + characters])
            size += len(batch[-1])
            if size >= characters:
                yield np.array(numbers), batch
                numbers, batch, size = [], [], 0
    if batch:
        yield np.array(numbers), batch


@functools.cache
def _letters() -> npt.NDArray[np.uint32]:
    """For each code point, its letter in lower case, or 0 if it is no letter, mark or digit."""
    table = np.zeros(_HAN_ENDS + 1, np.uint32)
    for code in range(_HAN_BEGINS):
        letter = chr(code)
        if unicodedata.category(letter)[0] in "LMN":
            lower = letter.lower()
            table[code] = ord(lower) if len(lower) == 1 else code
    for block in WITHOUT_SPACES:
        table[block] |= np.where(table[block], _ALONE, np.uint32(0))
    table[_HAN_BEGINS:] = np.arange(_HAN_BEGINS, _HAN_ENDS + 1) | _ALONE
    table[_HAN_ENDS] = 0  # stands for everything beyond
    return table


@functools.lru_cache(maxsize=2)
def _powers(bits: int) -> tuple[Hashes, Hashes]:
    """The powers of _BASE below 2^bits, and their inverses, modulo 2^64."""

    def powers(base: int) -> Hashes:
        factors = np.full(1 << bits, base, np.uint64)
        factors[0] = 1
        return np.multiply.accumulate(factors)

    return powers(_BASE), powers(pow(_BASE, -1, _WORD))
