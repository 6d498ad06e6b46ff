"""The live page of a server: type a text, watch tokens come with their probabilities, branch.

It is the page of view.py with a form above it and live.js behind it. The script asks the server
that sent the page, and nobody else:

    POST v1/completions   relative to the page's own address, so a server may stand under a prefix
    {"model", "prompt": TEXT or [ids], "max_tokens", "temperature", "top_k", "top_p", "min_p",
     "seed", "echo": true, "stream": true, "records": alternatives to list for each token}

The answer is a stream of Server-Sent Events, {"records": [record, ...]} with token-probability
records, then [DONE]. An error is {"error": {"message"}}, as the body of an answer that is not 200
or as an event. To score a text, the script asks for it with max_tokens 0. To take a branch, it asks
with the ids of all tokens before the branch and the id of the alternative.

What it is not: the server (llm/serving/server.py), or a client of other servers.
"""

from llm.config import SamplingConfig
from llm.inference.records import DEFAULT_TOP, Record
from llm.pages.document import document

MOST_TOP = 100


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
      most_tokens: the largest `max_tokens` that the server takes, if that is less than the context.
      top: alternatives listed for each token, to begin with.
      most_top: the largest `records` that the server takes.
    """
    settings = defaults or SamplingConfig()
    most_tokens = context_length if most_tokens is None else min(context_length, most_tokens)
    live = {
        "model": model,
        "prompt": settings.prompt,
        "context_length": context_length,
        "vocab_size": vocab_size,
    }
    filters = ("temperature", "top_k", "top_p", "min_p")
    return document(
        model,
        "live.html",
        kind="tokens",
        scripts=("page.js", "live.js"),
        data={"run": run, "live": live},
        connect="'self'",
        most_tokens=most_tokens,
        max_tokens=min(settings.max_new_tokens, most_tokens),
        most_top=most_top,
        top=min(top, most_top),
        **{name: str(getattr(settings, name)).removesuffix(".0") for name in filters},
    )
