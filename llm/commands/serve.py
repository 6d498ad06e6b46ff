"""python -m llm serve RUN: an HTTP server for the model of a run, and its live page.

POST /v1/completions and GET /v1/models as OpenAI's, GET /health, and at / a page on which one
types and watches tokens come with their probabilities. Only this machine can reach it unless
--host says otherwise; there is no password. SIGTERM or Ctrl-C finishes what runs; exit code 0.
"""

import argparse
import ipaddress
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llm.commands.texts import open_and_say, with_dashes
from llm.errors import UsageError
from llm.inference.samples import decoding_numerics
from llm.runtime import prepare_process

if TYPE_CHECKING:
    from llm.run.model import OpenedModel
    from llm.serving.server import Served, Site

# Tokens, of all kinds, at which cached decoding is compared with one whole pass in bfloat16.
PROBE = 32


def main(arguments: list[str]) -> int:
    """Exit codes as in docs/design.md; errors are raised as LLMError."""
    options = parse(arguments)
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


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; flags may be spelled with - or _ between words."""
    parser = argparse.ArgumentParser(
        "python -m llm serve",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="run directory")
    add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)")
    add("--port", type=int, default=8000, metavar="N", help="port to listen on (8000); 0: any free")
    add("--step", type=int, metavar="N", help="checkpoint to use; by default the newest")
    add("--name", metavar="NAME", help="the model's name in the API; by default the run's")
    add(
        "--allow-host",
        metavar="NAME",
        nargs="+",
        action="extend",
        default=[],
        help="also answer to this name (Host), and to pages of it (Origin); *: to any",
    )
    add(
        "--warm-up",
        action="store_true",
        help="compile for every number of users before the first is served, not as they come",
    )
    counts = {
        "max_batch": (16, 1, "samples computed at once, rounded up to a power of two"),
        "max_queue": (256, 1, "samples that may wait; more are answered with 429"),
        "max_body": (2**20, 1, "bytes of a request"),
        "max_prompts": (64, 1, "prompts of a request"),
        "max_n": (16, 1, "samples of a prompt"),
        "max_tokens": (4096, 0, "tokens that a request may ask for"),
        "max_top": (100, 0, "alternatives that a request may ask for"),
    }
    for name, (default, _, meaning) in counts.items():
        flag = f"--{name.replace('_', '-')}"
        add(flag, type=int, default=default, metavar="N", help=f"{meaning} ({default})")
    add(
        "--grace",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="how long a stop waits for what runs (30)",
    )
    options = parser.parse_args([with_dashes(word) for word in arguments])
    for name, (_, least, _) in counts.items():
        _check(f"--{name.replace('_', '-')}", getattr(options, name), least, None)
    _check("--port", options.port, 0, 65535)
    _check("--grace", options.grace, 0, 86400)
    return options


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


def describe(opened: "OpenedModel", decoder: Any, options: argparse.Namespace) -> "Served":
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


def page(
    name: str, opened: "OpenedModel", numerics: dict[str, Any], options: argparse.Namespace
) -> str:
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


def _check(flag: str, found: float, least: float, most: float | None) -> None:
    if not (found >= least and (most is None or found <= most)):
        upto = f" to {most}" if most is not None else " or more"
        raise UsageError(f"{flag} {found}: expected {least}{upto}")
