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
from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import Any

from llm.errors import UsageError
from llm.inference.records import Record
from llm.pages.document import document, escape, plain_text


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
    samples_a, samples_b = _tokens_by_sample(records_a), _tokens_by_sample(records_b)
    one, other = (records[0]["tokenizer"] for records in (records_a, records_b))
    if one["sha256"] != other["sha256"]:
        raise UsageError(
            f"the two dumps were made with different tokenizers, {one['name']!r} "
            f"({one['sha256']}) and {other['name']!r} ({other['sha256']}); only checkpoints with "
            "the same tokenizer can be compared token by token"
        )
    _check_same_tokens(samples_a, samples_b)
    pairs = zip(chain(*samples_a.values()), chain(*samples_b.values()), strict=True)
    compared = [{**new, "before": {key: old[key] for key in _COMPARED}} for old, new in pairs]
    ends = [record for record in records_b if record["type"] == "end"]
    return _render(title, "diff", [records_b[0], *compared, *ends], before=records_a[0])


_COMPARED = ("logprob", "rank", "entropy", "top")


def _tokens_by_sample(records: Sequence[Record]) -> dict[Any, list[Record]]:
    samples: dict[Any, list[Record]] = {}
    for record in records:
        if record["type"] == "token":
            samples.setdefault(record["sample"], []).append(record)
    return samples


def _check_same_tokens(
    samples_a: dict[Any, list[Record]], samples_b: dict[Any, list[Record]]
) -> None:
    """Raise a UsageError that says where two dumps part."""
    advice = "score the same text with both checkpoints"
    if len(samples_a) != len(samples_b):
        raise UsageError(
            f"the dumps hold different numbers of samples, {len(samples_a)} and {len(samples_b)}; "
            + advice
        )
    for (name, one), other in zip(samples_a.items(), samples_b.values(), strict=True):
        for index, (a, b) in enumerate(zip_longest(one, other)):
            if a is None or b is None or a["id"] != b["id"]:
                there, here = (
                    f"has {token['token']!a} (id {token['id']})" if token else "has ended"
                    for token in (a, b)
                )
                raise UsageError(
                    f"the two dumps part at token {index} of sample {name}: the first {there}, the "
                    f"second {here}; {advice}"
                )


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
        data={"before": before, "records": packed},
        plain="".join(texts),
    )
