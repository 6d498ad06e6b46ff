"""python -m llm serve RUN: an HTTP server for the model of a run, and its live page.

It answers POST /v1/completions and GET /v1/models as OpenAI's API does, and GET /health. At / is a
page: type there, and watch tokens come with their probabilities. Only this machine can reach the
server unless --host says otherwise; there is no password. SIGTERM or Ctrl-C lets running requests
finish; the exit code is 0.
"""

import ipaddress
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveInt

from llm.commands.flags import parse
from llm.commands.shared import RunOptions, open_and_say
from llm.config import setting
from llm.inference.samples import decoding_numerics
from llm.runtime import prepare_process

if TYPE_CHECKING:
    from llm.run.open import OpenedModel
    from llm.serving.server import Served, Site

# Tokens, of all kinds, at which cached decoding is compared with one whole pass in bfloat16.
PROBE = 32


class Options(RunOptions):
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
    max_batch: PositiveInt = setting(16, "samples computed at once, rounded up to a power of two")
    max_queue: PositiveInt = setting(256, "samples that may wait; more are answered with 429")
    max_body: PositiveInt = setting(2**20, "bytes of a request")
    max_prompts: PositiveInt = setting(64, "prompts of a request")
    max_n: PositiveInt = setting(16, "samples of a prompt")
    max_tokens: NonNegativeInt = setting(4096, "tokens that a request may ask for")
    max_top: NonNegativeInt = setting(100, "alternatives that a request may ask for")
    grace: Annotated[float, Field(ge=0, le=86400)] = setting(
        30.0, "how long a stop waits for running requests", "SECONDS"
    )


def main(arguments: list[str]) -> int:
    """Exit codes as in docs/design.md; errors are raised as LLMError."""
    options = parse(Options, arguments)
    prepare_process()  # before JAX is imported, as it is below

    from llm.inference.decode import Decoder
    from llm.serving.completions_api import RequestLimits
    from llm.serving.engine import Engine, Limits
    from llm.serving.server import Server, listen, make_app, run, url_of

    listener = listen(options.host, options.port)
    opened = open_and_say(options.run, options.step)
    decoder = Decoder.create(opened.spec, opened.params, opened.tokenizer)
    served = describe(opened, decoder, options)
    engine = Engine(decoder, Limits(options.max_batch, options.max_queue))
    limits = RequestLimits(
        max_body=options.max_body,
        max_prompts=options.max_prompts,
        max_n=options.max_n,
        max_tokens=options.max_tokens,
        max_top=options.max_top,
    )
    engine.warm_up(options.warm_up)
    engine.start()
    app = make_app(served, engine, limits, site_of(options.host, options.allow_host))
    ready = f"serving {served.name}, step {opened.step}, at {url_of(listener)}"
    if not is_loopback(options.host):
        ready += "\nwhoever reaches this machine can use it: there is no password"
    server = Server(app, options.grace, lambda: print(ready, file=sys.stderr, flush=True))
    run(server, engine, listener)
    return 0


def site_of(host: str, also: Sequence[str]) -> "Site":
    """Whose requests are answered, by --host and --allow-host.

    Where only this machine can reach the server, a request by another name is a page's trick. On
    other addresses the names that people use are not known, so only given ones are checked.
    """
    from llm.serving.server import LOOPBACK, Site

    if "*" in also:
        return Site(names=None, guests=None)
    guests = tuple(map(str.lower, also))
    if guests or is_loopback(host):
        return Site(names=tuple(dict.fromkeys([*LOOPBACK, host.lower(), *guests])), guests=guests)
    return Site(names=None, guests=guests)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def describe(opened: "OpenedModel", decoder: Any, options: Options) -> "Served":
    """What the server says of the model that it serves."""
    from llm.inference.decode import Request
    from llm.inference.records import RecordBuilder
    from llm.serving.server import Served

    name, spec = options.name or opened.run, opened.spec
    tokens = min(PROBE, spec.config.context_length)
    probe = Request([i * spec.vocab_size // tokens for i in range(tokens)], top=0)
    numerics = decoding_numerics(spec, opened.params, decoder, probe)
    return Served(
        name=name,
        builder=RecordBuilder(opened.tokenizer),
        checkpoint=opened.checkpoint,
        numerics=numerics,
        created=int(time.time()),
        page=page(name, opened, numerics, options),
    )


def page(name: str, opened: "OpenedModel", numerics: dict[str, Any], options: Options) -> str:
    """The live page."""
    from llm.inference.records import RecordBuilder
    from llm.pages.live_view import live_page

    builder = RecordBuilder(opened.tokenizer)
    return live_page(
        name,
        context_length=opened.spec.config.context_length,
        vocab_size=opened.spec.vocab_size,
        run=builder.run(opened.checkpoint, None, numerics, options.max_top),
        defaults=opened.config.sample,
        most_top=options.max_top,
        most_tokens=options.max_tokens,
    )
