"""python sample.py RUN [-] [--prompt TEXT ...]: continue texts, show every token's probability.

The text goes to standard output as it is written, prompt included. With several samples, a line on
stderr names each. All samples are computed together and shown one after the other. Settings that
no flag gives are those of the run's `sample` section.
"""

import os
import select
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import pydantic

from llm.commands.flags import argument, parse
from llm.commands.texts import (
    RecordOptions,
    as_text,
    open_and_say,
    open_records,
    paint,
    paints,
    read_file,
    written,
)
from llm.config import SamplingConfig, setting
from llm.errors import UsageError
from llm.inference.samples import continued, decoding_numerics, make_requests, overlay
from llm.runtime import prepare_process

if TYPE_CHECKING:
    from llm.inference.decode import Decoder, Request
    from llm.inference.records import Record, RecordBuilder
    from llm.run.open import OpenedModel
    from llm.text.tokenizer import Tokenizer


class Options(SamplingConfig, RecordOptions):
    """The command line. The run's `sample` section has the defaults of its settings."""

    defaults_of_run = frozenset(SamplingConfig.model_fields)

    stdin: Literal["-"] | None = argument("-", "read a prompt from standard input", None)
    prompt: tuple[str, ...] = setting(  # type: ignore[assignment]
        (), "texts to continue; empty: start from an end of text"
    )
    prompt_file: tuple[str, ...] = setting(
        (), "files to continue, each as it is, with its last newline", "FILE"
    )
    greedy: bool = setting(False, "always the likeliest token")
    stop: tuple[str, ...] = setting((), "end a sample where one of these texts begins")

    @pydantic.model_validator(mode="after")
    def _check_temperature(self) -> Self:
        if self.greedy and "temperature" in self.model_fields_set:
            raise UsageError("--greedy is --temperature 0; give only one of them")
        return self


def main(arguments: list[str]) -> int:
    """Exit codes as in docs/design.md; errors are raised as LLMError."""
    options = parse(Options, arguments)
    flags = given_settings(options)
    files = [read_file(path) for path in options.prompt_file]
    prepare_process()  # before JAX is imported, as it is below

    from llm.inference.decode import Decoder

    opened = open_and_say(options.run, options.step)
    settings = overlay(opened.config.sample, flags, where="the flags")
    prompts = [*options.prompt, *(as_text(data, opened.tokenizer, name) for name, data in files)]
    prompts += stdin_prompts(options.stdin, not prompts, opened.tokenizer)
    decoder = Decoder.create(opened.spec, opened.params, opened.tokenizer)
    shows_numbers = options.probs or options.html or paints(options)
    requests = make_requests(
        settings,
        prompts or [settings.prompt],
        opened.tokenizer,
        stop=options.stop,
        top=options.top if shows_numbers else None,
        watch=options.watch,
    )
    for request in requests:
        decoder.check(request)
    _run(options, settings, opened, decoder, requests)
    return 0


def given_settings(options: Options) -> dict[str, Any]:
    """What the flags change in the run's `sample` section."""
    names = options.model_fields_set & SamplingConfig.model_fields.keys() - {"prompt"}
    return options.model_dump(include=names) | ({"temperature": 0.0} if options.greedy else {})


def _run(
    options: Options,
    settings: SamplingConfig,
    opened: "OpenedModel",
    decoder: "Decoder",
    requests: "Sequence[Request]",
) -> None:
    from llm.inference.filters import Sampling
    from llm.inference.records import RecordBuilder

    builder = RecordBuilder(opened.tokenizer)
    numerics = decoding_numerics(opened.spec, opened.params, decoder, requests[0])
    first = builder.run(opened.checkpoint, Sampling.of(settings), numerics, options.top)
    kept: list[Record] | None = [] if options.html else None
    with ExitStack() as stack:
        file = open_records(options.probs, stack)
        records = _records(first, builder, decoder, requests)
        records = _noting_full_context(records, decoder, settings.max_new_tokens)
        records = written(records, file, kept)
        if options.probs == "-":
            for _ in records:
                pass
        else:
            show(records, len(requests), painted=paints(options))
    if kept is not None and options.html is not None:
        from llm.pages.view import write_page

        write_page(kept, Path(options.html), title=f"Samples from {opened.run}, step {opened.step}")


def _records(
    first: "Record", builder: "RecordBuilder", decoder: "Decoder", requests: "Sequence[Request]"
) -> "Iterator[Record]":
    """The records of all samples, in order, as soon as each is final."""
    yield first
    tokens = []
    for progress in continued(decoder, requests):
        for token in progress.tokens:
            yield builder.token(progress.row, token)
        tokens += progress.tokens
        if progress.finish is not None:
            yield builder.end(progress.row, tokens, progress.finish, counted="generated")
            tokens = []


def _noting_full_context(
    records: "Iterable[Record]", decoder: "Decoder", asked: int
) -> "Iterator[Record]":
    """The same records; after the last, a line on stderr when the context cut samples short."""
    counts, new = [], 0
    for record in records:
        # Not the end record's count, which is of the tokens whose probability was asked for.
        if record["type"] == "token":
            new += record["phase"] == "generated"
        elif record["type"] == "end":
            if record["finish"] == "context":
                counts.append(new)
            new = 0
        yield record
    if counts:
        context = decoder.spec.config.context_length
        print(_full_context(context, min(counts), max(counts), asked), file=sys.stderr)


def _full_context(context: int, low: int, high: int, asked: int) -> str:
    new = f"{high}" if low == high else f"{low} to {high}"
    return (
        f"the context of {context} {'token' if context == 1 else 'tokens'} is full after {new} new "
        f"{'token' if high == 1 else 'tokens'}; {asked} {'was' if asked == 1 else 'were'} asked for"
    )


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
