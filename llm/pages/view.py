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
import math
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

from llm.errors import UsageError
from llm.inference.records import Record, bits_per_byte, perplexity
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
    return _render(title, "diff", compared(records_a, records_b), before=records_a[0])


def compared(records_a: Sequence[Record], records_b: Sequence[Record]) -> list[Record]:
    """The records of `records_b`, with what `records_a` says as their `before`.

    The end of a sample has `before`, `after` and their `difference`: the sums over the tokens that
    both give a probability to. A last end, whose sample is None, has them for all samples.

    Raises:
      UsageError: as `diff_page`.
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
    records, every = [records_b[0]], []
    for (sample, tokens), old in zip(samples_b.items(), samples_a.values(), strict=True):
        pairs = zip(tokens, old, strict=True)
        both = [{**new, "before": {key: was[key] for key in _COMPARED}} for new, was in pairs]
        every += both
        records += [*both, _end_of_both(sample, both)]
    return [*records, _end_of_both(None, every)]


_COMPARED = ("logprob", "rank", "entropy", "top")


def _end_of_both(sample: Any, tokens: Sequence[Record]) -> Record:
    counted = [t for t in tokens if None not in (t["logprob"], t["before"]["logprob"])]
    size = sum(len(token["bytes"]) for token in counted)

    def sums(records: Iterable[Record]) -> dict[str, float | None]:
        total = math.fsum(record["logprob"] for record in records)
        return {
            "sum_logprob": total,
            "perplexity": perplexity(-total, len(counted)),
            "bits_per_byte": bits_per_byte(-total, size),
        }

    before, after = sums(token["before"] for token in counted), sums(counted)
    pairs = {name: (before[name], after[name]) for name in after}
    change = {n: None if a is None or b is None else b - a for n, (a, b) in pairs.items()}
    end = {"type": "end", "sample": sample, "tokens": len(counted)}
    return end | {"before": before, "after": after, "difference": change}


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
