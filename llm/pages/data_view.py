"""The report on a corpus as a page: tables, which need no script. Text of documents is escaped."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

from llm.pages.document import document, escape

SHOWN = 10  # documents that a model predicts worst, and as many that it predicts best
LISTED = 20  # duplicates, and documents that share text

Ranked = TypeVar("Ranked")


def worst_and_best(ranked: Sequence[Ranked], count: int = SHOWN) -> list[Ranked]:
    """The first of a list, and the last that are not among them."""
    return [*ranked[:count], *ranked[count:][-count:]]


def data_page(report: Mapping[str, Any], title: str, scored: str = "") -> str:
    """The page of what `llm/measure/corpus.py:Census.report` gives.

    Args:
      scored: the name of a page beside it, whose samples are `worst_and_best` of the documents
        that the model of the report scored.
    """
    facts = {
        "documents": report["documents"],
        "bytes": report["bytes"],
        "tokens": report["tokens"],
        "exact duplicates": report["exact_duplicates"],
        "near duplicates": report["near_duplicate_documents"],
        "compressed to": f"{report['compressed_share']:.1%}",
        "in lines of several documents": f"{report['repeated_line_share']:.1%}",
        "unused tokens": report["tokenizer"]["unused"],
    }
    shown = "".join(
        f"<div><dt>{name}</dt><dd>{_shown(value)}</dd></div>" for name, value in facts.items()
    )
    return document(
        title,
        "data.html",
        kind="data",
        styles=("page.css", "data.css"),
        facts=shown,
        sections="".join([*_scored(report["model"], scored), *_sections(report)]),
    )


def _sections(report: Mapping[str, Any]) -> list[str]:
    near = [(*one["documents"], f"{one['similarity']:.3f}") for one in report["near_duplicates"]]
    quality, personal, examples = report["quality"], report["personal_data"], report["examples"]
    characters = report["characters"].items()
    tokenizer = report["tokenizer"]
    languages = report["languages"]
    longest = [(name.replace(" ", "·"),) for name in tokenizer["longest"]]
    most = max(report["lengths"].values(), default=0)
    lengths = [
        (f"{int(below):,}", number, _Html(f'<meter max="{most}" value="{number}"></meter>'))
        for below, number in report["lengths"].items()
    ]
    held_out = f"{report['split'].get('held out', 0):,} of {report['documents']:,}"
    return [
        _table("Length", ("bytes, below", "documents", ""), lengths),
        _table("Scripts", ("script", "letters"), report["scripts"].items()),
        _table("Languages", ("language", "documents"), (languages or {}).items())
        if languages is not None
        else _section("Languages", "<p>They were not identified: pip install py3langid.</p>"),
        _table(
            f"Bytes per token of {tokenizer['name']}, of documents by their main script",
            ("script", "bytes per token"),
            ((name, f"{value:.2f}") for name, value in tokenizer["bytes_per_token"].items()),
        ),
        _table("The longest tokens of several bytes (· is a space)", ("token",), longest),
        _table(
            "Rules of quality",
            ("rule", "expected", "documents that break it"),
            ((key, one["expected"], one["documents"]) for key, one in quality.items()),
        ),
        _table("Personal data", ("kind", "found"), personal.items()),
        _table(
            "Characters",
            ("kind", "found"),
            ((k, "not counted: pip install ftfy" if v is None else v) for k, v in characters),
        ),
        _table("Exact duplicates", ("document", "of"), report["exact_duplicate_pairs"], LISTED),
        _table("Near duplicates", ("document", "of", "similarity"), near, LISTED),
        _table(
            "Lines of several documents",
            ("line", "documents"),
            ((one["line"], one["documents"]) for one in report["repeated_lines"]),
        ),
        _overlap(
            f"Text of held-out documents ({held_out}) that training has", report["validation"]
        ),
        _overlap("Evaluation text that is in the corpus", report["against"]),
        _table(
            "Examples; personal data is masked",
            ("what", "document", "value", "text"),
            (
                (key, one["document"], one["value"], one["text"])
                for key in (*quality, *personal)
                for one in examples.get(key, ())
            ),
        ),
    ]


def _overlap(title: str, leaks: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (one["name"], f"{one['found'] / one['grams']:.1%}", one["where"], one["example"])
        for one in leaks
    ]
    return _table(title, ("document", "share", "where", "text"), rows, LISTED)


def _scored(model: Mapping[str, Any] | None, page: str) -> Iterable[str]:
    """The documents that the model predicts worst and best, as links into their page."""
    if model is None:
        return
    rows = [
        (
            f"{one['bits_per_byte']:.3f}",
            _Html(f'<a href="{quote(page)}#s{place}t0">{escape(one["document"])}</a>'),
            f"{'first ' * one['cut']}{one['tokens']:,}",
        )
        for place, one in enumerate(worst_and_best(model["documents"]))
    ]
    scored = f"of {len(model['documents']):,} that were scored, chosen by hash"
    for how, part in (("worst", rows[:SHOWN]), ("best", rows[SHOWN:])):
        title = f"Documents that {model['run']}, step {model['step']:,}, predicts {how}, {scored}"
        yield _table(title, ("bits per byte", "document", "tokens"), part)


class _Html(str):
    """Text that is escaped already."""


def _table(
    title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]], most: int = 1000
) -> str:
    """The first rows, with a note if there are more."""
    rows = [*rows]
    more = f"; the first {most} of {len(rows):,}" if len(rows) > most else ""
    body = "".join(
        f"<tr>{''.join(f'<td>{_shown(one)}' for one in row)}</tr>" for row in rows[:most]
    )
    head = "".join(f"<th>{escape(name)}" for name in columns)
    table = f"<table><thead><tr>{head}</thead><tbody>{body}</tbody></table>"
    return _section(f"{title}{more}", table if body else "<p>None.</p>")


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _shown(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, _Html) else escape(str(value))
