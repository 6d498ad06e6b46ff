"""Token-probability records as a page that people read in a browser.

The page is one file that loads nothing. It carries the records as they are in the JSONL file,
compressed; page.js decompresses and renders them. Without JavaScript the page shows the text of the
samples and says why there are no colours.

What it is not: the source of the records (records.py), or their colours in a terminal (paint.py). A
server's live page is in live_view.py.

Text in a record comes from strangers: it is escaped wherever it is written.
"""

import base64
import gzip
import json
import math
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any

from llm.errors import UsageError
from llm.files import write_output
from llm.inference.records import Record
from llm.pages.document import THEME, Choice, document, escape, plain_text


def write_page(records: Sequence[Record], path: Path, *, title: str) -> None:
    """Write `page` to a file, which is replaced as a whole or left as it was.

    Raises:
      UsageError: the file cannot be written.
    """
    write_output(path, page(records, title=title).encode(), UsageError)


def write_diff_page(
    records_a: Sequence[Record], records_b: Sequence[Record], path: Path, *, title: str
) -> None:
    """Write `diff_page` to a file, as `write_page` does."""
    write_output(path, diff_page(records_a, records_b, title=title).encode(), UsageError)


def page(records: Sequence[Record], *, title: str) -> str:
    """The records of one run as one HTML document.

    Args:
      records: a run record, then token and end records, as in the JSONL file. An empty list makes
        an empty page, for a script to fill.
      title: its heading.
    """
    return _render(title, "tokens", records, before=None)


def diff_page(records_a: Sequence[Record], records_b: Sequence[Record], *, title: str) -> str:
    """Two dumps of the same text as one page: what changed from `records_a` to `records_b`.

    change = logprob after - logprob before, in nats, for each token.

    Raises:
      UsageError: the dumps are not of the same tokens; the message says where they part.
    """
    run_a, run_b = _run_of(records_a), _run_of(records_b)
    samples_a, samples_b = _tokens_by_sample(records_a), _tokens_by_sample(records_b)
    _check_same_tokenizer(run_a, run_b)
    _check_same_tokens(samples_a, samples_b)
    before = iter([token for tokens in samples_a.values() for token in tokens])
    tokens = [token for tokens in samples_b.values() for token in tokens]
    compared = [
        {**new, "before": {key: old.get(key) for key in _COMPARED}}
        for old, new in zip(before, tokens, strict=True)
    ]
    others = [record for record in records_b if record["type"] == "end"]
    runs = [run_b] if run_b else []
    return _render(title, "diff", [*runs, *compared, *others], before=run_a)


_COMPARED = ("logprob", "rank", "entropy", "top")


def _run_of(records: Sequence[Record]) -> Record | None:
    return next((record for record in records if record["type"] == "run"), None)


def _tokens_by_sample(records: Sequence[Record]) -> dict[Any, list[Record]]:
    samples: dict[Any, list[Record]] = {}
    for record in records:
        if record["type"] == "token":
            samples.setdefault(record["sample"], []).append(record)
    return samples


def _check_same_tokenizer(run_a: Record | None, run_b: Record | None) -> None:
    one, other = ((run or {}).get("tokenizer") or {} for run in (run_a, run_b))
    if one.get("sha256") != other.get("sha256"):
        raise UsageError(
            f"the two dumps were made with different tokenizers, {one.get('name')!r} "
            f"({one.get('sha256')}) and {other.get('name')!r} ({other.get('sha256')}); only "
            "checkpoints with the same tokenizer can be compared token by token"
        )


def _check_same_tokens(
    samples_a: dict[Any, list[Record]], samples_b: dict[Any, list[Record]]
) -> None:
    if len(samples_a) != len(samples_b):
        raise UsageError(
            f"the first dump holds {_counted(samples_a, 'sample')}, the second {len(samples_b)}; "
            + _SCORE_THE_SAME
        )
    for (name, one), other in zip(samples_a.items(), samples_b.values(), strict=True):
        for index, (a, b) in enumerate(zip(one, other, strict=False)):
            if a["id"] != b["id"]:
                raise UsageError(
                    f"the two dumps part at token {index} of sample {name}: the first has "
                    f"{a['token']!a} (id {a['id']}), the second {b['token']!a} (id {b['id']}); "
                    + _SCORE_THE_SAME
                )
        if len(one) != len(other):
            raise UsageError(
                f"the two dumps part at token {min(len(one), len(other))} of sample {name}: the "
                f"first ends after {_counted(one, 'token')}, the second after {len(other)}; "
                + _SCORE_THE_SAME
            )


def _counted(things: Sized, noun: str) -> str:
    return f"{len(things)} {noun}" + ("" if len(things) == 1 else "s")


_SCORE_THE_SAME = "score the same text with both checkpoints"


def _render(title: str, kind: str, records: Sequence[Record], before: Record | None) -> str:
    vocab_size = ((_run_of(records) or {}).get("tokenizer") or {}).get("vocab_size") or 2
    body = (
        f'<header><h1>{escape(title)}</h1>\n<dl class="facts" id="run"></dl></header>\n'
        f"{toolbar(kind, vocab_size)}\n<main>\n"
        f'<div id="samples"></div>{_without_scripts(records)}\n'
        f'<aside id="panel" aria-label="Details of a token">{HINT}</aside>\n</main>\n'
        '<details id="all"><summary>All tokens as a table</summary></details>\n'
        f"{GLOSSARY}\n"
        '<p id="say" class="unseen" role="status"></p>'
    )
    data = {"kind": kind, "before": before, "records": _compressed(records)}
    choices = (COLOUR_BY[kind], SPACES, THEME)
    return document(title, body, kind=kind, choices=choices, scripts=("page.js",), data=data)


def _compressed(records: Sequence[Record]) -> str:
    """The records as a JSON array, gzipped, in base64: about a fifth of the JSON."""
    array = json.dumps(list(records), allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(array.encode(), 6, mtime=0)).decode()


def _without_scripts(records: Sequence[Record]) -> str:
    """What a browser shows that runs no scripts: the text of each sample."""
    texts = [
        f"<h2>Sample {escape(str(name))}</h2>"
        f'<div class="plain">{plain_text("".join(token["text"] for token in tokens))}</div>'
        for name, tokens in _tokens_by_sample(records).items()
    ]
    return (
        '<noscript><p class="note">This is the text alone: its colours, probabilities and '
        f"alternatives are drawn by JavaScript, which is switched off.</p>{''.join(texts)}"
        "</noscript>"
    )


HINT = (
    '<p class="hint">Point at a token, or press an arrow key: its probability, its rank and what '
    "else the model considered appear here. A click keeps it here, Escape lets go.</p>"
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
            swatches = "".join(
                f'<span class="r{6 * level}">{name}</span>' for level, name in enumerate(names)
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


_CHANGE_FACTOR = 20  # e to the CHANGE_LIMIT_NATS of page.js
