"""Token-probability records as a page that people read in a browser.

The page is one file that loads nothing. The tokens are written into it as coloured text, so that
it can be read, and coloured by another number, without JavaScript; page.js adds the panel, the
strip's clicks, the table and the keys from the same records, which the page carries in a packed
form. Numbers are rounded to four decimals there; the JSONL file is the exact source.

What it is not: where the records come from (records.py), or their colours in a terminal (paint.py).
A server's live page is in live_view.py.

Text in a record is a stranger's: it is escaped wherever it is written.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm.errors import UsageError
from llm.files import write_output
from llm.inference.records import Record
from llm.pages import scales
from llm.pages.document import THEME, Choice, document, escape
from llm.pages.packing import packed
from llm.pages.spelling import TokenRecord
from llm.pages.token_html import Sample, sample_html


def write_page(records: Sequence[Record], path: Path, *, title: str) -> None:
    """Write `page` to a file, which is replaced as a whole or left as it was.

    Raises:
      UsageError: the file cannot be written.
    """
    write_output(path, page(records, title=title).encode(), UsageError)


def write_diff_page(
    records_a: Sequence[Record], records_b: Sequence[Record], path: Path, *, title: str
) -> None:
    """As `write_page`, of `diff_page`."""
    write_output(path, diff_page(records_a, records_b, title=title).encode(), UsageError)


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


def _by_sample(records: Sequence[Record]) -> tuple[Record | None, list[Sample]]:
    run: Record | None = None
    samples: dict[int, Sample] = {}
    for record in records:
        if record["type"] == "run":
            run = record
            continue
        sample = samples.setdefault(record["sample"], Sample(record["sample"]))
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
    samples_a: list[Sample],
    run_b: Record | None,
    samples_b: list[Sample],
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
            f"the first dump holds {_counted(samples_a, 'sample')}, the second {len(samples_b)}; "
            + _SCORE_THE_SAME
        )
    for one, other in zip(samples_a, samples_b, strict=True):
        _check_same_sample(one, other)


def _check_same_sample(one: Sample, other: Sample) -> None:
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
            f"{one.name}: the first ends after {_counted(one.tokens, 'token')}, the second after "
            f"{len(other.tokens)}; {_SCORE_THE_SAME}"
        )


def _counted(things: Sequence[object], noun: str) -> str:
    return f"{len(things)} {noun}" + ("" if len(things) == 1 else "s")


_SCORE_THE_SAME = "score the same text with both checkpoints"


def _render(
    title: str, kind: str, run: Record | None, run_before: Record | None, samples: list[Sample]
) -> str:
    vocab_size = _path(run, "tokenizer", "vocab_size") or 2
    multiple = len(samples) > 1
    body = (
        f"<header><h1>{escape(title)}</h1>\n"
        f'<dl class="facts" id="run">{_facts(run, run_before)}</dl></header>\n'
        f"{toolbar(kind, vocab_size)}\n<main>\n"
        '<div id="samples">'
        + "".join(sample_html(sample, kind, vocab_size, multiple) for sample in samples)
        + f'</div>\n<aside id="panel" aria-label="Details of a token">{_HINT}</aside>\n</main>\n'
        '<details id="all"><summary>All tokens as a table</summary></details>\n'
        f"{GLOSSARY}\n"
        '<p id="say" class="unseen" role="status"></p>'
    )
    data = {"kind": kind, "run": run, **packed(samples, kind)}
    choices = (COLOUR_BY[kind], SPACES, THEME)
    return document(title, body, kind=kind, choices=choices, scripts=("page.js",), data=data)


_HINT = (
    '<p class="hint">Point at a token, or press an arrow key: its probability, its rank and what '
    "else the model considered appear here. A click keeps it here, Escape lets go.</p>"
    "<noscript><p>Without JavaScript, rest the pointer on a token for its id, probability and "
    "rank. The colours can still be switched.</p></noscript>"
)

GLOSSARY = """<details id="glossary"><summary>What the numbers mean</summary><dl>
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
<dt>brackets</dt><dd>A character may be spread over several tokens. It is coloured by what they
cost together; each bar of the bracket under it is one of them.</dd>
<dt>perplexity</dt><dd>e to the mean surprisal of the tokens: how many equally likely choices would
be as hard.</dd></dl></details>"""


def _facts(run: Record | None, before: Record | None) -> str:
    """The run record as a list of terms; a value that differs between two runs is shown twice."""
    pairs = []
    old = dict(run_facts(before)) if before else {}
    for term, value in run_facts(run) if run else ():
        shown = escape(value)
        if before and old.get(term) != value:
            shown = f"{escape(old.get(term, ''))} &rarr; {shown}"
        pairs.append(f"<div><dt>{term}</dt><dd>{shown}</dd></div>")
    return "".join(pairs)


def run_facts(run: Record) -> Iterator[tuple[str, str]]:
    if name := _path(run, "checkpoint", "run"):
        yield "run", str(name)
    if (step := _path(run, "checkpoint", "step")) is not None:
        yield "step", f"{step:,}"
    if sha256 := _path(run, "checkpoint", "params_sha256"):
        yield "parameters' sha256", sha256[:10]
    if name := _path(run, "tokenizer", "name"):
        yield "tokenizer", f"{name}, {_path(run, 'tokenizer', 'vocab_size'):,} tokens"
    yield "sampling", _sampling(run.get("sampling"))
    numerics = run.get("numerics") or {}
    if path := numerics.get("path"):
        yield "computed", _COMPUTED.get(path, path)
    if platform := numerics.get("platform"):
        yield "on", f"{platform}, {numerics.get('compute_dtype')}, JAX {numerics.get('jax')}"
    if (distance := numerics.get("cached_minus_full_nats")) is not None:
        # Measured on one short text, it bounds nothing.
        yield "off a full pass by", f"{distance:.4f} nats, on a probe"


_COMPUTED = {"teacher_forced": "in one teacher-forced pass", "cached": "by cached decoding"}


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


COLOUR_BY = {
    "tokens": Choice(
        "by",
        "Colour by",
        {
            "p": "probability",
            "r": "rank",
            "s": "surprisal",
            "e": "entropy",
            "m": "effect of sampling",
        },
    ),
    "diff": Choice("by", "Colour by", {"x": "change", "q": "before", "a": "after"}),
}
SPACES = Choice("spaces", "Spaces", {"on": "marked", "off": "plain"})


def toolbar(kind: str, vocab_size: int) -> str:
    keys = "".join(_key(letter, vocab_size) for letter in COLOUR_BY[kind].options)
    return (
        f'<div class="bar">{COLOUR_BY[kind].labels()}'
        f'<div class="keys" role="group" aria-label="Colour scale">{keys}</div>'
        f"{SPACES.labels()}{THEME.labels()}</div>"
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
            ends, scale = ("certain", "25 %", "0 %"), "sequential"
        case "m" | "x":
            ends, scale = (f"÷ {_CHANGE_FACTOR}", "same", f"× {_CHANGE_FACTOR}"), "diverging"
        case _:
            blind = f'ln V = <span class="blind">{math.log(vocab_size):.1f}</span> nats'
            ends, scale = ("0", "", blind), "sequential"
    spans = "".join(f"<span>{end}</span>" for end in ends)
    return f'<div class="key key-{letter}"><div class="{scale}"></div><div>{spans}</div></div>'


_CHANGE_FACTOR = round(math.exp(scales.CHANGE_LIMIT_NATS))
