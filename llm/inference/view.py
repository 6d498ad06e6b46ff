"""Token-probability records as a page that people read, in a browser or as colours in a terminal.

The page is one file that loads nothing. The tokens are written into it as coloured text, so that
it can be read, and coloured by another number, without JavaScript; page.js adds the panel, the
strip's clicks, the table and the keys from the same records, which the page carries in a packed
form. Numbers are rounded to four decimals there; the JSONL file is the exact source.

What it is not: where the records come from (records.py), or a server. A server's live page is
`page` of the records so far; its script hands further ones to `tokenPage.addRecord`.

Text in a record is a stranger's: it is escaped wherever it is written.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm.errors import UsageError
from llm.files import write_atomic
from llm.inference import scales
from llm.inference.attention_view import attention_page
from llm.inference.document import choices, document, escape, theme_choice, visible
from llm.inference.paint import paint_tokens
from llm.inference.spelling import Cell, TokenRecord, cells

__all__ = ["attention_page", "diff_page", "page", "paint_tokens", "write_page"]

Record = dict[str, Any]

# Beyond this many tokens a bar of the strip would be thinner than a pixel, and a peak would fade.
_THIN_BARS = 400
_STRIP_HEIGHT = 48


@dataclass
class _Sample:
    """One sample: its token records in order, and its end record if there is one."""

    name: int
    tokens: list[TokenRecord] = field(default_factory=list)
    end: Record | None = None


def write_page(records: Sequence[Record], path: Path, *, title: str) -> None:
    """Write `page` to a file, which is replaced as a whole or left as it was.

    Raises:
      UsageError: the file cannot be written.
    """
    content = page(records, title=title).encode()
    try:
        write_atomic(path, content)
    except OSError as error:
        raise UsageError(
            f"the page {path} cannot be written ({error.strerror}); name a file in a folder that "
            "exists and can be written"
        ) from None


def page(records: Sequence[Record], *, title: str) -> str:
    """The records of one run as one HTML document.

    Args:
      records: a run record, then token and end records, as in the JSONL file; an empty list makes
        an empty page, for a server to fill.
      title: its heading.
    """
    run, samples = _by_sample(records)
    return _render(title, "tokens", run, None, samples)


def diff_page(records_a: Sequence[Record], records_b: Sequence[Record], *, title: str) -> str:
    """Two dumps of the same text as one page: what changed from `records_a` to `records_b`.

    change = logprob after - logprob before, in nats, for each token.

    Raises:
      UsageError: the dumps are not of the same tokens; the message says where they part.
    """
    run_a, samples_a = _by_sample(records_a)
    run_b, samples_b = _by_sample(records_b)
    _check_same_tokens(run_a, samples_a, run_b, samples_b)
    for before, after in zip(samples_a, samples_b, strict=True):
        after.tokens = [
            {**new, "before": {key: old.get(key) for key in _COMPARED}}
            for old, new in zip(before.tokens, after.tokens, strict=True)
        ]
    return _render(title, "diff", run_b, run_a, samples_b)


_COMPARED = ("logprob", "rank", "entropy", "top")


def _by_sample(records: Sequence[Record]) -> tuple[Record | None, list[_Sample]]:
    run: Record | None = None
    samples: dict[int, _Sample] = {}
    for record in records:
        if record["type"] == "run":
            run = record
            continue
        sample = samples.setdefault(record["sample"], _Sample(record["sample"]))
        if record["type"] == "token":
            sample.tokens.append(_rounded(record))
        elif record["type"] == "end":
            sample.end = record
    return run, list(samples.values())


def _rounded(token: TokenRecord) -> TokenRecord:
    """The record with the precision of the page, so that its text and its script agree."""
    numbers = ("logprob", "entropy", "sampling_logprob", "kept_mass")
    top = [{**entry, "logprob": _round(entry["logprob"])} for entry in token["top"]]
    return {**token, **{key: _round(token.get(key)) for key in numbers}, "top": top}


def _round(value: float | None) -> float | None:
    # Adding zero turns -0.0 into 0.0.
    return None if value is None else round(value, 4) + 0.0


def _check_same_tokens(
    run_a: Record | None,
    samples_a: list[_Sample],
    run_b: Record | None,
    samples_b: list[_Sample],
) -> None:
    names = [_path(run, "tokenizer", "name") for run in (run_a, run_b)]
    hashes = [_path(run, "tokenizer", "sha256") for run in (run_a, run_b)]
    if hashes[0] != hashes[1]:
        raise UsageError(
            f"the two dumps were made with different tokenizers, {names[0]!r} ({hashes[0]}) and "
            f"{names[1]!r} ({hashes[1]}); only checkpoints with the same tokenizer can be compared "
            "token by token"
        )
    if len(samples_a) != len(samples_b):
        raise UsageError(
            f"the first dump holds {len(samples_a)} samples, the second {len(samples_b)}; "
            + _SCORE_THE_SAME
        )
    for one, other in zip(samples_a, samples_b, strict=True):
        _check_same_sample(one, other)


def _check_same_sample(one: _Sample, other: _Sample) -> None:
    for index, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=False)):
        if a["id"] != b["id"]:
            raise UsageError(
                f"the two dumps part at token {index} of sample {one.name}: the first has "
                f"{a['token']!a} (id {a['id']}), the second {b['token']!a} (id {b['id']}); "
                + _SCORE_THE_SAME
            )
    if len(one.tokens) != len(other.tokens):
        raise UsageError(
            f"the two dumps part at token {min(len(one.tokens), len(other.tokens))} of sample "
            f"{one.name}: the first ends after {len(one.tokens)} tokens, the second after "
            f"{len(other.tokens)}; {_SCORE_THE_SAME}"
        )


_SCORE_THE_SAME = "score the same text with both checkpoints"


def _render(
    title: str, kind: str, run: Record | None, run_before: Record | None, samples: list[_Sample]
) -> str:
    vocab_size = _path(run, "tokenizer", "vocab_size") or 2
    multiple = len(samples) > 1
    body = (
        f"<header><h1>{escape(title)}</h1>\n"
        f'<dl class="facts" id="run">{_facts(run, run_before)}</dl></header>\n'
        f"{_toolbar(kind, vocab_size)}\n<main>\n"
        '<div id="samples">'
        + "\n".join(_sample_html(sample, kind, vocab_size, multiple) for sample in samples)
        + f'</div>\n<aside id="panel" aria-label="Details of a token">{_HINT}</aside>\n</main>\n'
        '<details id="all"><summary>All tokens as a table</summary></details>\n'
        f"{_GLOSSARY}\n"
        '<p id="say" class="unseen" role="status"></p>'
    )
    data = {"kind": kind, "run": run, "before": run_before, **_packed(samples, kind)}
    return document(title, body, kind=kind, scripts=("page.js",), data=data)


_HINT = (
    '<p class="hint">Point at a token, or press an arrow key: its probability, its rank and what '
    "else the model considered appear here. A click keeps it here, Escape lets go.</p>"
    "<noscript><p>Without JavaScript, rest the pointer on a token for its id, probability and "
    "rank. The colours can still be switched.</p></noscript>"
)

_GLOSSARY = """<details id="glossary"><summary>What the numbers mean</summary><dl>
<dt>probability</dt><dd>What the model gave this token, before any sampling setting: the softmax of
its raw scores over the whole vocabulary. Training maximises the logarithm of it.</dd>
<dt>surprisal</dt><dd>&minus;ln of the probability, in nats. 0 is certain; ln&nbsp;V is what a blind
guess among the V tokens of the vocabulary would cost.</dd>
<dt>rank</dt><dd>1 for the likeliest token, 2 for the next; equals go by the lower id.</dd>
<dt>entropy</dt><dd>The surprisal that the model expected here, whatever came. e to the entropy is
the number of equally likely tokens that would be as uncertain.</dd>
<dt>kept mass</dt><dd>The probability of all tokens that temperature, top-k, top-p and min-p left to
draw from.</dd>
<dt>effect of sampling</dt><dd>How much likelier those settings made the token that was drawn: ln of
the probability it was drawn with, less ln of the model's own.</dd>
<dt>brackets</dt><dd>A character may be spread over several tokens. It is coloured by what they cost
together; each bar of the bracket under it is one of them.</dd>
<dt>perplexity</dt><dd>e to the mean surprisal of the tokens: how many equally likely choices would be
as hard.</dd></dl></details>"""


def _facts(run: Record | None, before: Record | None) -> str:
    """The run record as a list of terms; a value that differs between two runs is shown twice."""
    pairs = []
    old = dict(_run_facts(before)) if before else {}
    for term, value in _run_facts(run) if run else ():
        shown = escape(value)
        if before and old.get(term) != value:
            shown = f"{escape(old.get(term, ''))} &rarr; {shown}"
        pairs.append(f"<div><dt>{term}</dt><dd>{shown}</dd></div>")
    return "".join(pairs)


def _run_facts(run: Record) -> Iterator[tuple[str, str]]:
    if name := _path(run, "checkpoint", "run"):
        yield "run", str(name)
    if (step := _path(run, "checkpoint", "step")) is not None:
        yield "step", f"{step:,}"
    if sha256 := _path(run, "checkpoint", "params_sha256"):
        yield "parameters", sha256[:10]
    if name := _path(run, "tokenizer", "name"):
        yield "tokenizer", f"{name}, {_path(run, 'tokenizer', 'vocab_size'):,} tokens"
    yield "sampling", _sampling(run.get("sampling"))
    numerics = run.get("numerics") or {}
    if path := numerics.get("path"):
        yield "computed", {"teacher_forced": "in one teacher-forced pass"}.get(path, path)
    if platform := numerics.get("platform"):
        yield "on", f"{platform}, {numerics.get('compute_dtype')}, JAX {numerics.get('jax')}"


def _sampling(sampling: Mapping[str, Any] | None) -> str:
    if not sampling:
        return "none, the text was given"
    return ", ".join(
        f"{key.replace('_', '-')} {_number(value)}"
        for key, value in sampling.items()
        if value is not None
    )


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _path(record: Record | None, *keys: str) -> Any:
    """record[key][key]..., or None where something on the way is missing."""
    value: Any = record
    for key in keys:
        value = (value or {}).get(key)
    return value


_MODES_OF = {
    "tokens": {
        "p": "probability",
        "r": "rank",
        "s": "surprisal",
        "e": "entropy",
        "m": "effect of sampling",
    },
    "diff": {"x": "change", "q": "before", "a": "after"},
}


def _toolbar(kind: str, vocab_size: int) -> str:
    modes = _MODES_OF[kind]
    return (
        '<div class="bar">'
        + choices("by", "Colour by", modes, chosen=next(iter(modes)))
        + '<div class="keys" aria-label="Colour scale">'
        + "".join(_key(letter, vocab_size) for letter in modes)
        + "</div>"
        '<label class="check"><input type="checkbox" id="marks" checked> spaces</label>'
        + theme_choice()
        + "</div>"
    )


def _key(letter: str, vocab_size: int) -> str:
    """The legend of one way of colouring."""
    match letter:
        case "r":
            names = ("1", "2&ndash;10", "11&ndash;100", "101&ndash;1000", "beyond")
            levels = (scales.rank_level(rank) for rank in (1, 2, 11, 101, 1001))
            swatches = "".join(
                f'<span class="r{level}">{name}</span>'
                for name, level in zip(names, levels, strict=True)
            )
            return f'<div class="key key-r swatches">{swatches}</div>'
        case "p" | "q" | "a":
            ends, scale = ("certain", "50 %", "0 %"), "sequential"
        case "m" | "x":
            less, more = f"÷ {_CHANGE_FACTOR}", f"× {_CHANGE_FACTOR}"
            ends, scale = (f"{less} less likely", "same", f"likelier {more}"), "diverging"
        case _:
            blind = f'ln V = <span class="blind">{math.log(vocab_size):.1f}</span> nats'
            ends, scale = ("0", "", blind), "sequential"
    spans = "".join(f"<span>{end}</span>" for end in ends)
    return f'<div class="key key-{letter}"><div class="{scale}"></div><div>{spans}</div></div>'


_CHANGE_FACTOR = round(math.exp(scales.CHANGE_LIMIT_NATS))


def _sample_html(sample: _Sample, kind: str, vocab_size: int, multiple: bool) -> str:
    """One sample: heading, summary, strip, and its tokens in two phases."""
    phases: list[tuple[str, list[str]]] = []
    for cell in cells(sample.tokens):
        phase = cell.tokens[0]["phase"]
        if not phases or phases[-1][0] != phase:
            phases.append((phase, []))
        phases[-1][1].append(_cell_html(cell, sample.name, kind, vocab_size))
    text = "".join(f'<span class="{phase}">{"".join(parts)}</span>' for phase, parts in phases)
    name = f"Sample {sample.name}"
    return (
        f'<section class="sample{" mixed" if len(phases) > 1 else ""}" id="s{sample.name}">'
        f"<h2{'' if multiple else ' class=unseen'}>{name}</h2>"
        f'<p class="end">{_end_line(sample.end)}</p>{_strip(sample.tokens, kind)}'
        f'<div class="text" tabindex="0" role="group" aria-label="{name}, text">{text}</div>'
        "</section>"
    )


def _end_line(end: Record | None) -> str:
    if end is None:
        return ""
    parts = [f"<b>{end['tokens']:,}</b> tokens", f"finish: <b>{escape(end['finish'])}</b>"]
    for key, name in (("perplexity", "perplexity"), ("bits_per_byte", "bits per byte")):
        if end.get(key) is not None:
            parts.append(f"{name} <b>{end[key]:,.2f}</b>")
    if end.get("sum_logprob") is not None:
        parts.append(f"sum of log-probabilities <b>{end['sum_logprob']:,.2f}</b> nats")
    return "".join(f"<span>{part}</span>" for part in parts)


def _strip(tokens: list[TokenRecord], kind: str) -> str:
    """Surprisal by position, or the change in a diff, as bars of a picture that scales."""
    values = [_strip_value(token, kind) for token in tokens]
    if not any(values):
        return '<svg class="strip" aria-hidden="true"></svg>'
    largest = max(abs(value) for value in values)
    paths = "".join(
        f'<path class="{phase}" d="{_bars(tokens, values, phase, largest, kind)}"/>'
        for phase in ("prompt", "generated")
    )
    thin = " thin" if len(tokens) > _THIN_BARS else ""
    name = "Change" if kind == "diff" else "Surprisal"
    return (
        f'<svg class="strip{thin}" viewBox="0 0 {len(tokens)} {_STRIP_HEIGHT}" '
        f'preserveAspectRatio="none" role="slider" tabindex="0" aria-label="{name} by position" '
        f'aria-valuemin="0" aria-valuemax="{len(tokens) - 1}" aria-valuenow="0">'
        f"<title>{name} by position; the highest bar is {largest:.2f} nats</title>{paths}</svg>"
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


def _cell_html(cell: Cell, sample: int, kind: str, vocab_size: int) -> str:
    """Tokens that share no character, as text; those that do, under the text they share."""
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
        f'title="{_tooltip(token, kind)}">{inner}</span>'
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
    joint = {key: _sum([token.get(key) for token in tokens]) for key in keys}
    ranks = [token["rank"] for token in tokens]
    joint["rank"] = None if None in ranks else max(ranks)
    if "before" in tokens[0]:
        joint["before"] = {"logprob": _sum([token["before"]["logprob"] for token in tokens])}
    return joint


def _sum(values: list[float | None]) -> float | None:
    return None if None in values else sum(value for value in values if value is not None)


_UTF8 = ("ok", "open", "continue", "close", "bad")
_PLAIN_COLUMNS = (
    "position",
    "text_offset",
    "byte_offset",
    "logprob",
    "rank",
    "entropy",
    "sampling_logprob",
    "kept_mass",
    "kept_tokens",
)


def _packed(samples: list[_Sample], kind: str) -> Record:
    """The records as page.js unpacks them: each token's spelling once, then rows of numbers.

    Ten alternatives a token take about 250 bytes instead of 1,200.
    """
    spellings: dict[tuple[int, str, bytes], int] = {}

    def number_of(entry: Mapping[str, Any]) -> int:
        key = (entry["id"], entry["token"], bytes(entry["bytes"]))
        return spellings.setdefault(key, len(spellings))

    def top_of(top: Sequence[Mapping[str, Any]]) -> list[float]:
        return [value for entry in top for value in (number_of(entry), entry["logprob"])]

    def row(token: TokenRecord) -> list[Any]:
        text = 0 if token["text"] == token["token"] else token["text"]
        packed = [number_of(token), int(token["phase"] == "generated"), text]
        packed += [_UTF8.index(token["utf8"]), *(token.get(key) for key in _PLAIN_COLUMNS)]
        packed += [top_of(token["top"]), _kept(token["top"])]
        if kind == "diff":
            before = token["before"]
            packed.append([before["logprob"], before["rank"], before["entropy"]])
            packed.append(top_of(before["top"]))
        return packed

    packed_samples = [
        {
            "sample": sample.name,
            "rows": [row(token) for token in sample.tokens],
            "end": sample.end and {k: v for k, v in sample.end.items() if k != "text"},
        }
        for sample in samples
    ]
    return {
        "columns": _PLAIN_COLUMNS,
        "spellings": [_spelling(*key) for key in spellings],
        "samples": packed_samples,
    }


def _kept(top: Sequence[Mapping[str, Any]]) -> int | str:
    """1 where every alternative was kept, 0 where nothing was drawn, else a digit for each."""
    kept = [entry.get("kept") for entry in top]
    if None in kept:
        return 0
    return 1 if all(kept) else "".join(str(int(flag)) for flag in kept)


def _spelling(token_id: int, token: str, token_bytes: bytes) -> list[Any]:
    """The bytes are left out where the spelling is their UTF-8."""
    if token.encode("utf-8", "surrogatepass") == token_bytes:
        return [token_id, token]
    return [token_id, token, token_bytes.hex()]
