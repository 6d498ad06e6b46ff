"""Samples of token records as HTML: text whose every token is an element, and the strip above it.

Each token carries the level of every number it can be coloured by, as classes; page.css and the
rules of document.py choose among them. page.js builds the same elements for tokens that come later.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llm.inference.records import Record
from llm.pages import scales
from llm.pages.document import escape, visible
from llm.pages.spelling import Cell, TokenRecord, cells

# Beyond this many tokens a bar of the strip would be thinner than a pixel, and a peak would fade.
_THIN_BARS = 400
_STRIP_HEIGHT = 48


@dataclass
class Sample:
    """One sample: its token records in order, and its end record if there is one."""

    name: int
    tokens: list[TokenRecord] = field(default_factory=list)
    end: Record | None = None


def sample_html(sample: Sample, kind: str, vocab_size: int, multiple: bool) -> str:
    """One sample: heading, summary, strip, and its tokens in two phases."""
    number = escape(str(sample.name))
    phases: list[tuple[str, list[str]]] = []
    for cell in cells(sample.tokens):
        phase = cell.tokens[0]["phase"]
        if not phases or phases[-1][0] != phase:
            phases.append((phase, []))
        phases[-1][1].append(_cell_html(cell, number, kind, vocab_size))
    text = "".join(
        f'<span class="{escape(phase)}">{"".join(parts)}</span>' for phase, parts in phases
    )
    name = f"Sample {number}"
    return (
        f'<section class="sample{" mixed" if len(phases) > 1 else ""}" id="s{number}">'
        f"<h2{'' if multiple else ' class=unseen'}>{name}</h2>"
        f'<p class="end">{_end_line(sample)}</p>{_strip(sample.tokens, kind)}'
        f'<div class="text" tabindex="0" role="group" aria-label="{name}, text">{text}</div>'
        "</section>"
    )


def _end_line(sample: Sample) -> str:
    end = sample.end
    if end is None:
        return ""
    generated = any(token["phase"] == "generated" for token in sample.tokens)
    parts = [
        f"<b>{end['tokens']:,}</b> tokens {'generated' if generated else 'predicted'}",
        f"finish: <b>{escape(end['finish'])}</b>",
    ]
    for key, name in (("perplexity", "perplexity"), ("bits_per_byte", "bits per byte")):
        if end[key] is not None:
            parts.append(f"{name} <b>{_decimal(end[key])}</b>")
    parts.append(f"sum of log-probabilities <b>{_decimal(end['sum_logprob'])}</b> nats")
    return "".join(f"<span>{part}</span>" for part in parts)


def _decimal(value: float) -> str:
    if abs(value) < 1e6:
        return f"{value:,.2f}"
    return f"{value:.2e}".replace("e+0", "e+")


def _strip(tokens: list[TokenRecord], kind: str) -> str:
    """Surprisal by position, or the change in a diff, as bars of a picture that scales."""
    values = [_strip_value(token, kind) for token in tokens]
    if not any(values):
        return '<p class="note"></p><svg class="strip" aria-hidden="true"></svg>'
    largest = max(abs(value) for value in values)
    paths = "".join(
        f'<path class="{phase}" d="{_bars(tokens, values, phase, largest, kind)}"></path>'
        for phase in ("prompt", "generated")
    )
    thin = " thin" if len(tokens) > _THIN_BARS else ""
    name = "Change" if kind == "diff" else "Surprisal"
    return (
        f'<p class="note">{name} by position, up to {largest:.2f} nats</p>'
        f'<svg class="strip{thin}" viewBox="0 0 {len(tokens)} {_STRIP_HEIGHT}" '
        f'preserveAspectRatio="none" role="slider" tabindex="0" aria-label="{name} by position" '
        f'aria-valuemin="0" aria-valuemax="{len(tokens) - 1}" aria-valuenow="0">{paths}</svg>'
    )


def _strip_value(token: TokenRecord, kind: str) -> float:
    if kind == "diff":
        return _change(token) or 0.0
    return -(token["logprob"] or 0.0)


def _bars(
    tokens: list[TokenRecord], values: list[float], phase: str, largest: float, kind: str
) -> str:
    """One upright stroke a token: from the ground, or in a diff up or down from the middle."""
    ground = _STRIP_HEIGHT / 2 if kind == "diff" else _STRIP_HEIGHT
    return "".join(
        f"M{index}.5 {ground:g}V{ground - value / largest * ground:.1f}"
        for index, (token, value) in enumerate(zip(tokens, values, strict=True))
        if value and token["phase"] == phase
    )


def _cell_html(cell: Cell, sample: str, kind: str, vocab_size: int) -> str:
    """Tokens that share no character, as text; those that do, under the text they share.

    sample: its number, escaped.
    """
    spans = [
        _token_html(f"s{sample}t{cell.start + i}", token, kind, vocab_size, inner, extra)
        for i, token in enumerate(cell.tokens)
        for inner, extra in [_inner(cell, token)]
    ]
    if cell.spelled_out or len(cell.tokens) == 1:
        return "".join(spans)
    levels = _levels(_joint(cell.tokens), kind, vocab_size)
    return (
        f'<span class="cell n{min(len(cell.tokens), 6)}"><b class="{levels}">'
        f"{visible(cell.text)}</b><span>{''.join(spans)}</span></span>"
    )


def _inner(cell: Cell, token: TokenRecord) -> tuple[str, str]:
    """What a token's own element holds, and its further class."""
    if cell.spelled_out:
        return visible(token["token"]), " name"
    return (visible(cell.text), "") if len(cell.tokens) == 1 else ("", "")


def _token_html(
    element: str, token: TokenRecord, kind: str, vocab_size: int, inner: str, extra: str
) -> str:
    return (
        f'<span class="t{extra} {_levels(token, kind, vocab_size)}" id="{element}" '
        f'title="{escape(_tooltip(token, kind))}">{inner}</span>'
    )


def _tooltip(token: TokenRecord, kind: str) -> str:
    parts = [f"id {token['id']}", percent(token["logprob"])]
    if kind == "diff":
        parts[1] = f"{percent(token['before']['logprob'])} \u2192 {parts[1]}"
    if token["rank"] is not None:
        parts.append(f"rank {token['rank']}")
    if token["utf8"] != "ok":
        parts.append(f"bytes {bytes(token['bytes']).hex(' ')}")
    return " \u00b7 ".join(parts)


def percent(logprob: float | None) -> str:
    """A log-probability as a percentage of two or three digits."""
    if logprob is None:
        return "no probability"
    value = 100.0 * math.exp(logprob)
    if value >= 1.0:
        return f"{value:.1f} %" if value >= 10.0 else f"{value:.2f} %"
    return f"{value:.3f} %" if value >= 0.001 else "< 0.001 %"


def _levels(token: Mapping[str, Any], kind: str, vocab_size: int) -> str:
    """The classes that each way of colouring looks for: its letter and the level, or a dash."""
    if kind == "diff":
        levels = {
            "x": scales.change_level(_change(token)),
            "q": scales.probability_level(token["before"]["logprob"]),
            "a": scales.probability_level(token["logprob"]),
        }
    else:
        surprisal = None if token["logprob"] is None else -token["logprob"]
        levels = {
            "p": scales.probability_level(token["logprob"]),
            "r": scales.rank_level(token["rank"]),
            "s": scales.nats_level(surprisal, vocab_size),
            "e": scales.nats_level(token["entropy"], vocab_size),
            "m": scales.change_level(_effect_of_sampling(token)),
        }
    return " ".join(f"{key}{'-' if level is None else level}" for key, level in levels.items())


def _effect_of_sampling(token: Mapping[str, Any]) -> float | None:
    return _difference(token.get("sampling_logprob"), token["logprob"])


def _change(token: Mapping[str, Any]) -> float | None:
    return _difference(token["logprob"], token["before"]["logprob"])


def _difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _joint(tokens: Sequence[TokenRecord]) -> Record:
    """Tokens that share a character as if they were one: their probabilities multiply.

    The entropies add up too, by the chain rule, in expectation. The rank is the worst of them.
    """
    keys = ("logprob", "entropy", "sampling_logprob")
    joint: Record = {key: _sum([token.get(key) for token in tokens]) for key in keys}
    ranks = [token["rank"] for token in tokens]
    joint["rank"] = None if None in ranks else max(ranks)
    if "before" in tokens[0]:
        joint["before"] = {"logprob": _sum([token["before"]["logprob"] for token in tokens])}
    return joint


def _sum(values: list[float | None]) -> float | None:
    return None if None in values else sum(value for value in values if value is not None)
