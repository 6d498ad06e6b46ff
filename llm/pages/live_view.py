"""The live page of a server: type a text, watch tokens come with their probabilities, branch.

It is the page of view.py with a form above it and live.js behind it, which asks the server that
sent the page, and nobody else:

    POST v1/completions   relative to the page's own address, so a server may stand under a prefix
    {"model", "prompt": TEXT or [ids], "max_tokens", "temperature", "top_k", "top_p", "min_p",
     "seed", "echo": true, "stream": true, "records": alternatives to list for each token}

The answer is a stream of Server-Sent Events, {"records": [record, ...]} with token-probability
records, then [DONE]. An error is {"error": {"message"}}, as the body of an answer that is not 200
or as an event. To score a text is to ask for it with max_tokens 0. To take a branch is to ask with
the ids of all tokens before it and of the alternative.

What it is not: the server (llm/serving/server.py), or a client of other servers.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass

from llm.config import SamplingConfig
from llm.inference.records import Record
from llm.inference.samples import DEFAULT_TOP
from llm.pages.document import THEME, document, escape
from llm.pages.view import COLOUR_BY, GLOSSARY, HINT, SPACES, toolbar

MOST_TOP = 100
# JavaScript counts exactly up to here (ECMA-262, Number.MAX_SAFE_INTEGER).
LARGEST_SEED = 2**53 - 1


def live_page(
    model: str,
    *,
    context_length: int,
    vocab_size: int,
    run: Record | None = None,
    defaults: SamplingConfig | None = None,
    most_tokens: int | None = None,
    top: int = DEFAULT_TOP,
    most_top: int = MOST_TOP,
) -> str:
    """The page as one HTML document, to be sent as it is for GET /.

    It carries its own Content-Security-Policy in a meta element (scripts and style by their hashes,
    connect-src 'self'); a server that sends such a header too must allow at least as much.

    Args:
      model: its name, as in /v1/models; the page's heading, and `model` of each request.
      context_length: tokens that prompt and continuation have together; bounds max tokens.
      vocab_size: of the tokenizer; for the legend until the first record says it.
      run: a run record such as the server sends, for what the heading says of the checkpoint until
        the first answer; its `sampling` is not looked at.
      defaults: what the settings begin with, such as a run's own `sample` section. The seed is left
        empty, which draws another one for each text.
      most_tokens: the largest `max_tokens` that the server takes, where that is less than the
        context.
      top: alternatives listed for each token, to begin with.
      most_top: the largest `records` that the server takes.
    """
    settings = defaults or SamplingConfig()
    longest = context_length if most_tokens is None else min(context_length, most_tokens)
    fields = _fields(settings, longest, min(top, most_top), most_top)
    live = {"model": model, "prompt": settings.prompt, "context_length": context_length}
    return document(
        model,
        _body(model, vocab_size, fields),
        kind="tokens",
        choices=(COLOUR_BY["tokens"], SPACES, THEME),
        scripts=("page.js", "live.js"),
        data={"kind": "tokens", "run": run, "live": live},
        connect="'self'",
    )


def _body(model: str, vocab_size: int, fields: "Sequence[_Field]") -> str:
    """Heading, form, toolbar, and the places that the scripts fill."""
    form = _FORM.format(fields="".join(field.element() for field in fields))
    return (
        f'<header><h1>{escape(model)}</h1>\n<dl class="facts" id="run"></dl></header>\n'
        f"{_NO_SCRIPT}\n"
        f"{form}\n{toolbar('tokens', vocab_size)}\n"
        f"<main>\n{_TEXTS}\n"
        f'<aside id="panel" aria-label="Details of a token">{_HINT}</aside>\n</main>\n'
        '<details id="all"><summary>All tokens as a table</summary></details>\n'
        f'{GLOSSARY}\n<p id="say" class="unseen" role="status" aria-live="polite"></p>'
    )


@dataclass(frozen=True)
class _Field:
    """A setting: its name in a request, its label, what it begins with and may be."""

    name: str
    label: str
    value: float | None
    high: float | None
    step: str
    meaning: str

    def element(self) -> str:
        high = "" if self.high is None else f' max="{self.high}"'
        value = str(self.value).removesuffix(".0")
        # An empty seed is an answer; the others need one.
        given = ' placeholder="any"' if self.value is None else f' value="{value}" required'
        return (
            f'<label title="{html.escape(self.meaning)}"><span>{self.label}</span>'
            f'<input type="number" name="{self.name}" min="0"{high} step="{self.step}"{given}>'
            "</label>"
        )


def _fields(settings: SamplingConfig, longest: int, top: int, most_top: int) -> tuple[_Field, ...]:
    tokens = min(settings.max_new_tokens, longest)
    return (
        _Field("max_tokens", "Max tokens", tokens, longest, "1", "tokens to write"),
        _Field(
            "temperature",
            "Temperature",
            settings.temperature,
            None,
            "any",
            "divides the scores: below 1 likely tokens are drawn more often, 0 takes the likeliest",
        ),
        _Field("top_k", "Top-k", settings.top_k, None, "1", "keep the k likeliest; 0: all"),
        _Field(
            "top_p",
            "Top-p",
            settings.top_p,
            1,
            "any",
            "keep the likeliest that reach this probability together; 1: all",
        ),
        _Field(
            "min_p",
            "Min-p",
            settings.min_p,
            1,
            "any",
            "keep those at least this fraction as likely as the likeliest; 0: all",
        ),
        _Field(
            "seed",
            "Seed",
            None,
            LARGEST_SEED,
            "1",
            "the same seed, text and settings give the same tokens; empty: another each time",
        ),
        _Field(
            "records",
            "Alternatives",
            top,
            most_top,
            "1",
            "how many of the likeliest tokens are listed at each place",
        ),
    )


# Hidden until the script runs: without it, none of this does anything.
_FORM = """<form id="compose" hidden>
<label class="prompt"><span>Text to continue</span>
<textarea id="prompt" rows="3" spellcheck="false" autocapitalize="off"
placeholder="Type how the text begins, or leave this empty"></textarea></label>
<div class="settings" role="group" aria-label="Settings">{fields}</div>
<div class="actions"><button type="submit" id="write" title="Ctrl-Enter">Write</button>
<button type="button" id="stop" disabled>Stop</button>
<button type="button" id="score"
title="The probabilities of this text, without going on">Score</button>
<kbd>Ctrl-Enter writes</kbd></div>
<p id="error" role="alert" hidden></p>
</form>"""

_TEXTS = """<div class="texts">
<nav id="branches" aria-label="Texts and branches" hidden>
<button type="button" id="back">&larr; Back</button><ol></ol></nav>
<p id="progress">What the model writes appears here, each token coloured by its probability.</p>
<div id="samples"></div>
<p id="after" hidden><button type="button" id="go-on">Go on</button>
<button type="button" id="save">Save records</button></p>
</div>"""

_HINT = HINT + (
    '<p class="hint">Click one of these alternatives, and the text is cut there and goes on with '
    "it. The text as it was stays in a list above.</p>"
)

_NO_SCRIPT = (
    "<noscript><p>This page writes with the model while you watch, and needs JavaScript for that. "
    "Without it, <code>python sample.py RUN --html FILE</code> writes a page that can be read."
    "</p></noscript>"
)
