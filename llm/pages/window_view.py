"""Windows of training text, as the model will read them, with their tokens apart: for a terminal,
and as a page without a script. Text of documents is escaped.
"""

import codecs
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llm.console import escaped
from llm.pages.document import document, escape, plain_text
from llm.text.tokenizer import TextBytes, Tokenizer


class Cell(NamedTuple):
    """A token, or the tokens that share a character; if it has no text, its name."""

    text: str
    ids: tuple[int, ...]
    named: bool


def cells(tokenizer: Tokenizer, ids: Sequence[int]) -> Iterator[Cell]:
    """The tokens of a window in order."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    bytes_of = TextBytes(tokenizer, continues=True)
    text, held = "", []
    for number, id_ in enumerate(ids, start=1):
        held.append(id_)
        text += decoder.decode(bytes_of(id_), final=number == len(ids))
        if not decoder.getstate()[0]:
            name = "".join(map(tokenizer.token_name, held))
            yield Cell(text or name, tuple(held), not text)
            text, held = "", []


def in_terminal(windows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> str:
    """The windows as lines of text, a bar between tokens."""
    parts = []
    for number, window in enumerate(windows, start=1):
        text = "|".join(escaped(one.text, keep="\n\t") for one in cells(tokenizer, window["ids"]))
        parts.append("\n  ".join([_head(number, window), *_documents(window)]) + f"\n{text}\n")
    return "\n".join(parts)


def windows_page(windows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, title: str) -> str:
    """The windows as one HTML document, every second token shaded."""
    sections = []
    for number, window in enumerate(windows, start=1):
        tokens = "".join(map(_span, cells(tokenizer, window["ids"])))
        named = "".join(f"<li>{escape(one)}" for one in _documents(window))
        head = escape(_head(number, window))
        sections.append(
            f'<section><h2>{head}</h2><ul>{named}</ul><div class="text">{tokens}</div></section>'
        )
    facts = {"tokenizer": tokenizer.name, "vocabulary": f"{tokenizer.vocab_size:,}"}
    return document(
        title,
        "data.html",
        kind="windows",
        styles=("page.css", "windows.css"),
        facts="".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items()),
        sections="".join(sections),
    )


def _span(cell: Cell) -> str:
    kind, ids = "t name" if cell.named else "t", ", ".join(map(str, cell.ids))
    text = plain_text(cell.text).replace("\n", "↵\n").replace("\t", "→\t")
    return f'<span class="{kind}" title="id {ids}">{text}</span>'


def _head(number: int, window: Mapping[str, Any]) -> str:
    source = f" of {window['source']}" if "source" in window else ""
    return f"Window {number}{source}: {len(window['ids'])} tokens"


def _documents(window: Mapping[str, Any]) -> list[str]:
    return [
        f"{one['document']} from token {one['offset']}: {one['tokens']:,} tokens"
        for one in window["documents"]
    ]
