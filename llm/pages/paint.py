"""Token-probability records as coloured text for a terminal.

Each token stands on the colour of its probability; a character that is spread over several tokens,
on that of the token that closes it. What a model wrote could steer the terminal that shows it, so
control and direction characters are spelled out, never sent (see spelling.py); the same holds for
every other string of a record.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from llm.pages import scales
from llm.pages.spelling import (
    Cell,
    TokenRecord,
    cells,
    ends_inside_character,
    escape_character,
    escaped,
    pieces,
)

_RESET = "\x1b[0m"
_FAINT, _ITALIC, _UNDERLINE = 2, 3, 4


def paint_stream(
    records: Iterable[Mapping[str, Any]], environ: Mapping[str, str] = os.environ
) -> Iterator[str]:
    """The samples of these records, coloured by probability, with a legend.

    Piece by piece: a token as soon as its last character is complete.

    Args:
      environ: COLORTERM says whether the terminal knows 24-bit colours, else it gets 256;
        COLORFGBG, where the terminal sets it, whether its paper is light.
    """
    palette = _palette(environ)
    yield _legend(palette)
    sample: Any = None
    waiting: list[TokenRecord] = []
    for record in records:
        if record["type"] == "run":
            continue
        if record["sample"] != sample:
            yield from _flush(waiting, palette)
            waiting, sample = [], record["sample"]
            yield f"\n{_sgr(_FAINT)}sample {escaped(str(sample))}{_RESET}\n"
        if record["type"] == "end":
            yield from _flush(waiting, palette)
            waiting = []
            yield f"\n{_sgr(_FAINT)}{escaped(_end_line(record))}{_RESET}\n"
        else:
            waiting.append(dict(record))
            if not ends_inside_character(waiting[-1]):
                yield from _flush(waiting, palette)
                waiting = []
    yield from _flush(waiting, palette)


def _flush(waiting: list[TokenRecord], palette: list[str]) -> Iterator[str]:
    for cell in cells(waiting):
        yield from _cell(cell, palette)


def _cell(cell: Cell, palette: list[str]) -> Iterator[str]:
    for token in cell.tokens:
        style = _style(token, palette)
        if cell.spelled_out:
            yield f"{style}{_sgr(_ITALIC)}{escaped(token['token'])}{_RESET}"
        elif token["text"]:
            yield _painted(token["text"], style)


def _painted(text: str, style: str) -> str:
    parts = [style]
    for kind, part in pieces(text):
        if kind == "newline":
            # Colour must not be on when the line ends: some terminals paint the rest of the line.
            parts.append(f"\u21b5{_RESET}\n{style}")
        elif kind == "tab":
            parts.append("\u2192   ")
        elif kind == "escape":
            parts.append(f"{_sgr(_ITALIC)}{escape_character(part)}{_RESET}{style}")
        else:
            parts.append(part)
    return "".join(parts) + _RESET


def _style(token: TokenRecord, palette: list[str]) -> str:
    level = scales.probability_level(token["logprob"])
    colour = "" if level is None else palette[level]
    return colour + (_sgr(_UNDERLINE) if token["phase"] == "prompt" else "")


def _legend(palette: list[str]) -> str:
    levels = range(0, scales.SEQUENTIAL_LEVELS, 2)
    bar = "".join(f"{palette[level]} {_RESET}" for level in levels)
    prompt = f"{_sgr(_UNDERLINE)}prompt{_RESET}"
    return f"probability 100 % {bar} 0 %   {prompt}   {_sgr(_ITALIC)}\\x1b{_RESET} unprintable\n"


def _end_line(end: Mapping[str, Any]) -> str:
    parts = [f"{end['tokens']} tokens", f"finish {end['finish']}"]
    if end.get("perplexity") is not None:
        parts.append(f"perplexity {end['perplexity']:.2f}")
    if end.get("bits_per_byte") is not None:
        parts.append(f"{end['bits_per_byte']:.2f} bits per byte")
    return " \u00b7 ".join(parts)


def _palette(environ: Mapping[str, str]) -> list[str]:
    """For each level what sets background and ink; level 0 keeps the terminal's own."""
    # COLORFGBG is "foreground;background" in the 16 ANSI colours: 7 and 15 are the light ones.
    light = environ.get("COLORFGBG", "").rpartition(";")[2] in ("7", "15")
    theme = "light" if light else "dark"
    if environ.get("COLORTERM", "").lower() in ("truecolor", "24bit"):
        return ["", *(_truecolor_pair(colour) for colour in scales.sequential(theme)[1:])]
    return ["", *(pair for index in _XTERM[theme] for pair in 2 * [_xterm_pair(index)])]


# Of xterm's 256 colours those that go the way of the scales, two levels each. The nearest ones
# would not do: greys lie between the dark steps.
_XTERM = {
    "dark": (17, 18, 24, 30, 36, 42, 77, 113, 149, 184, 220, 226),
    "light": (230, 229, 193, 157, 116, 80, 44, 38, 31, 25, 19, 18),
}
_CUBE = (0, 95, 135, 175, 215, 255)


def _truecolor_pair(colour: scales.RGB) -> str:
    background = ";".join(map(str, colour))
    ink = "0;0;0" if scales.ink_on(colour) == "#000" else "255;255;255"
    return f"\x1b[48;2;{background};38;2;{ink}m"


def _xterm_pair(index: int) -> str:
    red, green, blue = (_CUBE[(index - 16) // size % 6] for size in (36, 6, 1))
    ink = 16 if scales.ink_on((red, green, blue)) == "#000" else 231
    return f"\x1b[48;5;{index};38;5;{ink}m"


def _sgr(attribute: int) -> str:
    return f"\x1b[{attribute}m"
