"""python sample.py RUN [--prompt TEXT ...]: continue texts, show the probability of every token.

Text goes to stdout as it is written, prompt included: what stdout receives of a sample is the
`text` of its end record and a newline. With several samples a line on stderr names each. All
samples are computed together and shown one after the other.
"""

import argparse
import os
import select
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.commands.texts import (
    add_record_flags,
    as_text,
    check_record_flags,
    checkpoint_of,
    open_records,
    paint,
    paints,
    read_file,
    with_dashes,
    written,
)
from llm.config import SamplingConfig, validate
from llm.runtime import prepare_process

if TYPE_CHECKING:
    from llm.inference.decode import Decoder, Progress, Request
    from llm.inference.records import Record, RecordBuilder
    from llm.run.model import OpenedModel
    from llm.text.tokenizer import Tokenizer

# Rows of one batch; more samples take several. 32 full contexts of GPT-2 124M need 2.4 GB of cache.
MAX_ROWS = 32
_SETTINGS = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "num_samples")


def main(arguments: list[str]) -> int:
    """Exit codes as in docs/design.md; errors are raised as LLMError."""
    options = parse(arguments)
    flags = given_settings(options)
    files = [read_file(path) for path in options.prompt_file]
    prepare_process()  # before JAX is imported, as it is below

    from llm.inference.decode import Decoder
    from llm.run.model import open_model

    opened = open_model(options.run, options.step)
    settings = overlay(opened.config.sample, flags)
    prompts = [*options.prompt, *(as_text(data, opened.tokenizer, name) for name, data in files)]
    prompts += stdin_prompts(options.stdin, not prompts, opened.tokenizer)
    decoder = Decoder.create(opened.spec, opened.params, opened.tokenizer)
    requests = make_requests(options, settings, prompts or [settings.prompt], opened.tokenizer)
    for request in requests:
        decoder.check(request)
    _run(options, settings, opened, decoder, requests)
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; flags may be spelled with - or _ between words."""
    parser = argparse.ArgumentParser(
        prog="sample.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="What no flag says is as the run's `sample` section has it.",
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="run directory")
    add("stdin", metavar="-", nargs="?", choices=["-"], help="read a prompt from standard input")
    add(
        "--prompt",
        metavar="TEXT",
        nargs="+",
        action="extend",
        default=[],
        help="texts to continue; empty: start from an end of text",
    )
    add(
        "--prompt-file",
        metavar="FILE",
        nargs="+",
        action="extend",
        default=[],
        help="files to continue, each as it is, with its last newline",
    )
    add("--max-new-tokens", type=int, metavar="N", help="tokens to write after the prompt")
    cold = parser.add_mutually_exclusive_group()
    cold.add_argument(
        "--temperature", type=float, metavar="T", help="divides the logits; 0: greedy"
    )
    cold.add_argument("--greedy", action="store_true", help="always the likeliest token")
    add("--top-k", type=int, metavar="K", help="keep the K likeliest tokens; 0: all")
    add("--top-p", type=float, metavar="P", help="keep the likeliest tokens that reach this mass")
    add(
        "--min-p",
        type=float,
        metavar="P",
        help="keep tokens at least this fraction as likely as the likeliest",
    )
    add(
        "--stop",
        metavar="TEXT",
        nargs="+",
        action="extend",
        default=[],
        help="end a sample where one of these texts begins",
    )
    add("--seed", type=int, metavar="N", help="sample i is a function of seed and i alone")
    add("--num-samples", type=int, metavar="N", help="samples of each prompt")
    add_record_flags(parser)
    options = parser.parse_args([with_dashes(word) for word in arguments])
    check_record_flags(options)
    return options


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What the flags say of the `sample` section, checked by its rules."""
    flags = {name: getattr(options, name) for name in _SETTINGS}
    if options.greedy:
        flags["temperature"] = 0.0
    flags = {name: value for name, value in flags.items() if value is not None}
    validate({"sample": flags}, where="the flags")
    return flags


def overlay(section: SamplingConfig, flags: dict[str, Any]) -> SamplingConfig:
    """The run's section with the flags in place of what they say."""
    return validate({"sample": section.model_dump() | flags}, where="the flags").sample


def make_requests(
    options: argparse.Namespace,
    settings: SamplingConfig,
    prompts: Sequence[str],
    tokenizer: "Tokenizer",
) -> "list[Request]":
    """num_samples requests for each prompt; sample j of any prompt draws with noise (seed, j)."""
    from llm.inference.decode import Request, encode_prompt
    from llm.inference.filters import Sampling

    shows_numbers = options.probs or options.html or paints(options)
    return [
        Request(
            prompt=ids,
            sampling=Sampling.of(settings),
            index=index,
            max_new_tokens=settings.max_new_tokens,
            stop=tuple(options.stop),
            top=options.top if shows_numbers else None,
            watch=tuple(options.watch),
        )
        for ids in (encode_prompt(tokenizer, prompt) for prompt in prompts)
        for index in range(settings.num_samples)
    ]


def _run(
    options: argparse.Namespace,
    settings: SamplingConfig,
    opened: "OpenedModel",
    decoder: "Decoder",
    requests: "Sequence[Request]",
) -> None:
    from llm.inference.filters import Sampling
    from llm.inference.records import RecordBuilder, numerics_of

    builder = RecordBuilder(opened.tokenizer)
    numerics = numerics_of(opened.spec, opened.params, "cached")
    if requests[0].top is not None and opened.spec.compute_dtype != "float32":
        from llm.inference.numerics import cached_minus_full

        numerics["cached_minus_full_nats"] = cached_minus_full(
            opened.spec, opened.params, decoder, requests[0].prompt
        )
    first = builder.run(checkpoint_of(opened), Sampling.of(settings), numerics, options.top)
    kept: list[Record] | None = [] if options.html else None
    with ExitStack() as stack:
        file = open_records(options.probs, stack)
        records = written(_records(first, builder, decoder, requests), file, kept)
        if options.probs == "-":
            for _ in records:
                pass
        else:
            show(records, len(requests), painted=paints(options))
    if kept is not None:
        from llm.inference.view import write_page

        write_page(kept, Path(options.html), title=f"Samples from {opened.run}, step {opened.step}")


def _records(
    first: "Record", builder: "RecordBuilder", decoder: "Decoder", requests: "Sequence[Request]"
) -> "Iterator[Record]":
    """The records of all samples, in order, as soon as each is final."""
    yield first
    for start in range(0, len(requests), MAX_ROWS):
        group = requests[start : start + MAX_ROWS]
        tokens = []
        for progress in in_order(decoder.generate(group), len(group)):
            sample = start + progress.row
            for token in progress.tokens:
                yield builder.token(sample, token)
            tokens += progress.tokens
            if progress.finish is not None:
                yield builder.end(sample, tokens, progress.finish, counted="generated")
                tokens = []


def in_order(progresses: "Iterable[Progress]", rows: int) -> "Iterator[Progress]":
    """The same, one row after the other: what comes early waits for its turn."""
    waiting: list[list[Progress]] = [[] for _ in range(rows)]
    current = 0
    for progress in progresses:
        waiting[progress.row].append(progress)
        while current < rows and waiting[current]:
            ended = waiting[current][-1].finish is not None
            yield from waiting[current]
            waiting[current] = []
            if not ended:
                break
            current += 1


def show(records: "Iterable[Record]", samples: int, *, painted: bool) -> None:
    """The text of the records on stdout as it comes."""
    out = sys.stdout
    if hasattr(out, "reconfigure"):
        out.reconfigure(errors="backslashreplace")  # a terminal that knows ASCII only
    if painted:
        paint(records)
        return
    begun: int | None = None
    for record in records:
        if record["type"] == "token":
            if record["sample"] != begun and samples > 1:
                print(f"--- sample {record['sample']}", file=sys.stderr, flush=True)
            begun = record["sample"]
            out.write(record["text"])
        elif record["type"] == "end":
            out.write("\n")
        out.flush()


def stdin_prompts(asked: str | None, may_default: bool, tokenizer: "Tokenizer") -> list[str]:
    """The prompt on standard input: when `-` asks for it, or something is piped in and nothing
    else was given.

    A pipe that nobody asked for is read only if it has something to say by now (the model is
    loaded): a shell or a scheduler may leave one open for ever.
    """
    if asked is None and not (may_default and _stdin_has_text()):
        return []
    text = as_text(sys.stdin.buffer.read(), tokenizer, "standard input")
    return [text] if text or asked else []


def _stdin_has_text() -> bool:
    try:
        descriptor = sys.stdin.fileno()
        mode = os.fstat(descriptor).st_mode
    except (AttributeError, OSError, ValueError):
        return False
    if stat.S_ISREG(mode):
        return True
    if not stat.S_ISFIFO(mode):
        return False
    if select.select([descriptor], [], [], 0.0)[0]:
        return True
    note = "standard input is open but silent, so it is not read; to wait for it, give -"
    print(note, file=sys.stderr)
    return False
