"""python -m llm serve RUN: an HTTP server for the model of a run, and its live page.

It answers POST /v1/completions and GET /v1/models as OpenAI's API does, and GET /health. The page
at / continues the text that you type, and shows each token with its probability. Only this machine
can reach the server unless --host says otherwise; --api-key is its password. SIGTERM or Ctrl-C lets
running requests finish; the exit code is 0.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, Field

from llm.commands.flags import parse
from llm.commands.shared import RunOptions
from llm.console import never_wait, say
from llm.errors import needing
from llm.runtime import prepare_process
from llm.section import setting
from llm.serving.limits import Limits

if TYPE_CHECKING:
    from llm.inference.decode import Decoder
    from llm.run.open import OpenedModel
    from llm.serving.completions import Served
    from llm.serving.server import Site

# In bfloat16, cached decoding is compared with one whole pass on so many tokens of all kinds.
PROBE = 32


def _key(text: str) -> str:
    if not (text.isascii() and text.isprintable() and text) or " " in text:
        raise ValueError("expected letters, digits and signs of ASCII, without spaces")
    return text


Key = Annotated[str, AfterValidator(_key)]


class Options(Limits, RunOptions):
    """The command line."""

    host: str = setting("127.0.0.1", "address to listen on; 127.0.0.1: this machine only", "HOST")
    port: Annotated[int, Field(ge=0, le=65535)] = setting(8000, "port to listen on; 0: any free")
    name: str = setting("", "the model's name in the API; by default the run's", "NAME")
    allow_host: tuple[str, ...] = setting(
        (),
        "also answer requests to this name (Host) and from pages of it (Origin); *: any name",
        "NAME",
    )
    api_key: Key | None = Field(
        default_factory=lambda: os.environ.get("LLM_API_KEY") or None,
        validate_default=True,
        title="KEY",
        description="password of the server; $LLM_API_KEY is better, since others can see flags",
    )
    warm_up: bool = setting(
        False, "compile for every number of users before the first is served, not as they come"
    )
    grace: Annotated[float, Field(ge=0, le=86400)] = setting(
        30.0, "how long a stop waits for running requests", "SECONDS"
    )


def main(arguments: list[str]) -> int:
    """Exit codes as in docs/design.md; errors are raised as LLMError."""
    options = parse(Options, arguments)
    prepare_process()  # before JAX is imported, as it is below

    from llm.inference.decode import Decoder
    from llm.serving.engine import Engine

    with needing("serve", "'glassbox-gpt[serve]'"):
        from llm.pages.report_server import is_loopback
        from llm.serving.connections import Server, listen, run, url_of
        from llm.serving.server import make_app

    listener = listen(options.host, options.port)
    opened = options.open()
    decoder = Decoder.create(opened.spec, opened.params, opened.tokenizer)
    served = describe(opened, decoder, options)
    engine = Engine(decoder, options)
    engine.warm_up(options.warm_up)
    engine.start()
    site = replace(site_of(options.host, options.allow_host), key=options.api_key)
    app = make_app(served, engine, site)
    ready = f"serving {served.name}, step {opened.step}, at {url_of(listener)}"
    if not (is_loopback(options.host) or options.api_key):
        ready += "\nwhoever reaches this machine can use it: there is no --api-key"
    say_ready = partial(say, ready)
    never_wait()  # for a log that nobody reads
    run(Server(app, engine, options.grace, say_ready), listener)
    return 0


def site_of(host: str, also: Sequence[str]) -> "Site":
    """Whose requests are answered, by --host and --allow-host.

    If only this machine can reach the server, a request by another name is the trick of a web page.
    On other addresses nobody knows which names people use, so the host is checked only if names
    were given.
    """
    from llm.pages.report_server import is_loopback
    from llm.serving.server import LOOPBACK, Site

    if "*" in also:
        return Site(names=None, guests=None)
    guests = tuple(map(str.lower, also))
    names = tuple(dict.fromkeys([*LOOPBACK, host.lower(), *guests]))
    return Site(names if guests or is_loopback(host) else None, guests)


def describe(opened: "OpenedModel", decoder: "Decoder", options: Options) -> "Served":
    """What the server says of the model that it serves, and the live page."""
    from llm.inference.decode import Request
    from llm.inference.numerics import decoding_numerics
    from llm.inference.records import RunRecord, as_json
    from llm.pages.live_view import live_page
    from llm.serving.completions import Served

    name, spec = options.name or opened.run, opened.spec
    tokens = min(PROBE, spec.config.context_length)
    probe = Request([i * spec.vocab_size // tokens for i in range(tokens)], top=0)
    numerics = decoding_numerics(spec, opened.params, decoder, probe)
    run = RunRecord.of(opened.checkpoint, opened.tokenizer, None, numerics, options.max_top)
    page = live_page(
        name,
        context_length=spec.config.context_length,
        vocab_size=spec.vocab_size,
        run=as_json(run),
        defaults=opened.config.sample,
        most_top=options.max_top,
        most_tokens=options.max_tokens,
    )
    return Served(name, run, int(time.time()), page)
