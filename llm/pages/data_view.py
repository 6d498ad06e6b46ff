"""The report on a corpus as a page: tables, which need no script. Text of documents is escaped."""

from collections.abc import Iterable, Mapping
from typing import Any

from llm.pages.document import document, escape


def data_page(report: Mapping[str, Any], title: str) -> str:
    """The page of what `llm/measure/corpus.py:Census.report` gives."""
    facts = {
        "documents": report["documents"],
        "bytes": report["bytes"],
        "tokens": report["tokens"],
        "exact duplicates": report["exact_duplicates"],
        "near duplicates": report["near_duplicate_documents"],
        "compressed": f"{report['compressed_share']:.1%}",
        "unused tokens": report["tokenizer"]["unused"],
    }
    shown = "".join(
        f"<div><dt>{name}</dt><dd>{_shown(value)}</dd></div>" for name, value in facts.items()
    )
    return document(
        title,
        "data.html",
        kind="data",
        scripts=(),
        data=None,
        styles=("page.css", "data.css"),
        facts=shown,
        sections="".join(_sections(report)),
    )


def _sections(report: Mapping[str, Any]) -> list[str]:
    near = [(*one["documents"], f"{one['similarity']:.3f}") for one in report["near_duplicates"]]
    characters = report["characters"].items()
    tokenizer = report["tokenizer"]
    languages = report["languages"]
    return [
        _table("Length", ("bytes, below", "documents"), report["lengths"].items()),
        _table("Scripts", ("script", "letters"), report["scripts"].items()),
        _table("Languages", ("language", "documents"), (languages or {}).items())
        if languages is not None
        else "<h2>Languages</h2><p>They were not identified: pip install py3langid.</p>",
        _table(
            f"Bytes per token of {tokenizer['name']}, of documents by their main script",
            ("script", "bytes per token"),
            ((name, f"{value:.2f}") for name, value in tokenizer["bytes_per_token"].items()),
        ),
        _table("The longest tokens", ("token",), ((name,) for name in tokenizer["longest"])),
        _table(
            "Rules of quality",
            ("rule", "expected", "documents that break it"),
            ((key, one["expected"], one["documents"]) for key, one in report["quality"].items()),
        ),
        _table("Personal data", ("kind", "found"), report["personal_data"].items()),
        _table(
            "Characters",
            ("kind", "found"),
            ((k, "not counted: pip install ftfy" if v is None else v) for k, v in characters),
        ),
        _table("Near duplicates", ("document", "of", "similarity"), near[:20]),
        _table(
            "Lines of several documents",
            ("line", "documents"),
            ((one["line"], one["documents"]) for one in report["repeated_lines"]),
        ),
        _table(
            "Evaluation text that is in the corpus",
            ("document", "share", "where", "text"),
            (
                (one["name"], f"{one['found'] / one['grams']:.1%}", one["where"], one["example"])
                for one in report["against"][:20]
            ),
        ),
        _table(
            "Examples; personal data is masked",
            ("what", "document", "value", "text"),
            (
                (key, one["document"], one["value"], one["text"])
                for key, found in report["examples"].items()
                for one in found
            ),
        ),
    ]


def _table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    body = "".join(f"<tr>{''.join(f'<td>{_shown(one)}' for one in row)}" for row in rows)
    if not body:
        return f"<h2>{escape(title)}</h2><p>None.</p>"
    head = "".join(f"<th>{escape(name)}" for name in columns)
    return f"<h2>{escape(title)}</h2><table><thead><tr>{head}</thead><tbody>{body}</tbody></table>"


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else escape(str(value))
