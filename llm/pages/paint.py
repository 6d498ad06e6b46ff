"""Token-probability records as coloured text for a terminal.

Each token stands on the colour of its probability. A character that is spread over several tokens
stands on the colour of the token that closes it. Text that a model wrote could steer the terminal
that shows it, so control and direction characters are spelled out, never sent (see llm/console.py);
the same holds for every other string of a record.
"""

import codecs
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

from rich.color import Color
from rich.style import Style

from llm.console import escape_character, escaped, is_unsafe
from llm.pages import scales

# The colours among xterm's 256 that follow the scales, each for two levels. The colour nearest to a
# level would not do: greys lie between the dark steps.
_XTERM = {
    "dark": (17, 18, 24, 30, 36, 42, 77, 113, 149, 184, 220, 226),
    "light": (230, 229, 193, 157, 116, 80, 44, 38, 31, 25, 19, 18),
}
_INKS = {"#000": Color.from_ansi(16), "#fff": Color.from_ansi(231)}
_FAINT, _ITALIC, _UNDERLINED = Style(dim=True), Style(italic=True), Style(underline=True)


def paint_stream(
    records: Iterable[Mapping[str, Any]], environ: Mapping[str, str] = os.environ
) -> Iterator[str]:
    """The samples of these records, coloured by probability, with a legend.

    The text comes in pieces: each token as soon as its last character is complete.

    Args:
      environ: COLORTERM says whether the terminal knows 24-bit colours; without it the terminal
        gets 256. COLORFGBG, if the terminal sets it, says whether its paper is light.
    """
    palette = _palette(environ)
    yield _legend(palette)
    sample: Any = None
    waiting: list[Mapping[str, Any]] = []
    for record in records:
        if record["type"] == "run":
            continue
        if record["sample"] != sample:
            yield from _painted(waiting, palette)
            waiting, sample = [], record["sample"]
            yield f"\n{_FAINT.render(f'sample {escaped(str(sample))}')}\n"
        if record["type"] == "token":
            waiting.append(record)
            if ends_inside_character(record):
                continue
        yield from _painted(waiting, palette)
        waiting = []
        if record["type"] == "end":
            yield f"\n{_FAINT.render(escaped(_end_line(record)))}\n"
    yield from _painted(waiting, palette)


def ends_inside_character(token: Mapping[str, Any]) -> bool:
    """Whether the next token is needed to complete the last character of this token record."""
    if token["utf8"] != "bad":
        return token["utf8"] in ("open", "continue")
    # Bytes that are no UTF-8 together with the bytes before them may still open a character.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(bytes(token["bytes"]))
    return decoder.getstate()[0] != b""


def _painted(tokens: list[Mapping[str, Any]], palette: list[Style]) -> Iterator[str]:
    """Tokens that share a character, or one token: their text, or their names if they have none."""
    is_open = bool(tokens) and tokens[-1]["utf8"] in ("open", "continue")
    has_text = not is_open and any(token["text"] for token in tokens)
    for token in tokens:
        style = palette[scales.probability_level(token["logprob"] or 0.0)]
        if token["phase"] == "prompt":
            style += _UNDERLINED
        if has_text:
            yield _spelled(token["text"], style)
        else:
            yield (style + _ITALIC).render(escaped(token["token"]))


def _spelled(text: str, style: Style) -> str:
    """A text with line breaks and tabs marked; other unsafe characters are escaped, in italics."""
    # Colour must not be on when a line ends: some terminals paint the rest of the line.
    special = {"\n": style.render("\u21b5") + "\n", "\t": style.render("\u2192   ")}
    parts = []
    for unsafe, run in groupby(text, is_unsafe):
        if not unsafe:
            parts.append(style.render("".join(run)))
            continue
        escape = style + _ITALIC
        parts += [special.get(c) or escape.render(escape_character(c)) for c in run]
    return "".join(parts)


def _legend(palette: list[Style]) -> str:
    bar = "".join(style.render(" ") for style in palette[::2])
    prompt, escape = _UNDERLINED.render("prompt"), _ITALIC.render("\\x1b")
    return f"probability 100 % {bar} 0 %   {prompt}   {escape} unprintable\n"


def _end_line(end: Mapping[str, Any]) -> str:
    parts = [f"{end['tokens']} tokens", f"finish {end['finish']}"]
    if end.get("perplexity") is not None:
        parts.append(f"perplexity {end['perplexity']:.2f}")
    if end.get("bits_per_byte") is not None:
        parts.append(f"{end['bits_per_byte']:.2f} bits per byte")
    return " \u00b7 ".join(parts)


def _palette(environ: Mapping[str, str]) -> list[Style]:
    """The background and ink of each level; level 0 keeps the terminal's own."""
    # COLORFGBG is "foreground;background" in the 16 ANSI colours: 7 and 15 are the light ones.
    light = environ.get("COLORFGBG", "").rpartition(";")[2] in ("7", "15")
    theme = "light" if light else "dark"
    if environ.get("COLORTERM", "").lower() in ("truecolor", "24bit"):
        colours = [Color.from_rgb(*colour) for colour in scales.sequential(theme)[1:]]
    else:
        colours = [Color.from_ansi(index) for index in _XTERM[theme] for _ in range(2)]
    inks = [_INKS[scales.ink_on(colour.get_truecolor())] for colour in colours]
    pairs = zip(inks, colours, strict=True)
    return [Style(), *(Style(color=ink, bgcolor=colour) for ink, colour in pairs)]
