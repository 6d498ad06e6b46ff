"""python -m llm serve RUN: an HTTP server for the model of a run, and its live page.

It answers POST /v1/completions and GET /v1/models as OpenAI's API does, and GET /health. The page
at / continues the text that you type, and shows each token with its probability. Only this machine
can reach the server unless --host says otherwise; there is no password. SIGTERM or Ctrl-C lets
running requests finish; the exit code is 0.
"""

import ipaddress
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from llm.commands.flags import parse
from llm.commands.shared import RunOptions
from llm.config import setting
from llm.runtime import prepare_process
from llm.serving.limits import Limits

if TYPE_CHECKING:
    from llm.inference.decode import Decoder
    from llm.run.open import OpenedModel
    from llm.serving.completions import Served
    from llm.serving.server import Site

# In bfloat16, cached decoding is compared with one whole pass on so many tokens of all kinds.
PROBE = 32


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
    from llm.serving.server import Server, listen, make_app, run, url_of

    listener = listen(options.host, options.port)
    opened = options.open()
    decoder = Decoder.create(opened.spec, opened.params, opened.tokenizer)
    served = describe(opened, decoder, options)
    engine = Engine(decoder, options)
    engine.warm_up(options.warm_up)
    engine.start()
    app = make_app(served, engine, site_of(options.host, options.allow_host))
    ready = f"serving {served.name}, step {opened.step}, at {url_of(listener)}"
    if not is_loopback(options.host):
        ready += "\nwhoever reaches this machine can use it: there is no password"
    say_ready = partial(print, ready, file=sys.stderr, flush=True)
    run(Server(app, engine, options.grace, say_ready), listener)
    return 0


def site_of(host: str, also: Sequence[str]) -> "Site":
    """Whose requests are answered, by --host and --allow-host.

    If only this machine can reach the server, a request by another name is the trick of a web page.
    On other addresses nobody knows which names people use, so the host is checked only if names
    were given.
    """
    from llm.serving.server import LOOPBACK, Site

    if "*" in also:
        return Site(names=None, guests=None)
    guests = tuple(map(str.lower, also))
    names = tuple(dict.fromkeys([*LOOPBACK, host.lower(), *guests]))
    return Site(names if guests or is_loopback(host) else None, guests)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


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
