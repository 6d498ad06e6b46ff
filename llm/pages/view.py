"""Token-probability records as a page that people read in a browser.

The page is one file that loads nothing. It carries the records as they are in the JSONL file,
compressed; page.js decompresses and renders them. Without JavaScript the page shows the text of the
samples and says why there are no colours.

paint.py shows the same records in a terminal, live_view.py is the page of a server. Text in a
record comes from strangers, so it is escaped wherever it is written.
"""

import base64
import gzip
import json
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any

from llm.errors import UsageError
from llm.files import write_output
from llm.inference.records import Record
from llm.pages.document import document, escape, plain_text


def write_page(records: Sequence[Record], path: Path, *, title: str) -> None:
    """Write `page` to a file, which is replaced as a whole or left as it was.

    Raises:
      UsageError: the file cannot be written.
    """
    write_output(path, page(records, title=title).encode(), UsageError)


def write_diff_page(
    records_a: Sequence[Record], records_b: Sequence[Record], path: Path, *, title: str
) -> None:
    """Write `diff_page` to a file, which is replaced as a whole or left as it was."""
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
    # A browser that runs no scripts shows the text of each sample.
    texts = [
        f"<h2>Sample {escape(str(name))}</h2>"
        f'<div class="plain">{plain_text("".join(token["text"] for token in tokens))}</div>'
        for name, tokens in _tokens_by_sample(records).items()
    ]
    # gzip and base64 make about a fifth of the JSON.
    array = json.dumps(list(records), allow_nan=False, separators=(",", ":"))
    packed = base64.b64encode(gzip.compress(array.encode(), 6, mtime=0)).decode()
    return document(
        title,
        "tokens.html",
        kind=kind,
        scripts=("page.js",),
        data={"kind": kind, "before": before, "records": packed},
        plain="".join(texts),
    )
