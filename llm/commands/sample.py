"""python sample.py RUN [-] [--prompt TEXT ...]: continue texts, show every token's probability.

The text, which begins with the prompt, goes to standard output while it is written. If there are
several samples, a line on stderr names each of them. They are computed together and shown one after
the other. A setting that no flag gives comes from the run's `sample` section.
"""

import os
import select
import stat
import sys
from collections.abc import Iterable, Iterator
from typing import Literal, Self

import pydantic

from llm.commands.flags import InputFiles, argument, parse
from llm.commands.shared import RecordOptions, as_text, counted, read_file, read_input
from llm.config import SamplingConfig
from llm.console import say
from llm.errors import UsageError
from llm.inference.records import AnyRecord, EndRecord, RunRecord, Sampling, TokenRecord
from llm.inference.samples import continued, make_requests, overlay
from llm.section import setting


class Options(SamplingConfig, RecordOptions):
    """The command line. The run's `sample` section has the defaults of its settings."""

    defaults_of_run = frozenset(SamplingConfig.model_fields)

    stdin: Literal["-"] | None = argument("-", "read a prompt from standard input", None)
    prompt: tuple[str, ...] = setting(  # type: ignore[assignment]
        (), "texts to continue; empty: start from an end of text"
    )
    prompt_file: InputFiles = setting(
        (), "files to continue; a newline at the end is part of the prompt", "FILE"
    )
    greedy: bool = setting(False, "always draw the likeliest token")
    stop: tuple[str, ...] = setting((), "end a sample before one of these texts")

    @pydantic.model_validator(mode="after")
    def _check_temperature(self) -> Self:
        if self.greedy and "temperature" in self.model_fields_set:
            raise UsageError("--greedy is --temperature 0; give only one of them")
        return self


def main(arguments: list[str]) -> int:
    """Exit codes as in docs/design.md; errors are raised as LLMError."""
    options = parse(Options, arguments)
    changed = options.model_fields_set & SamplingConfig.model_fields.keys() - {"prompt"}
    flags = options.model_dump(include=changed) | ({"temperature": 0.0} if options.greedy else {})
    files = [read_file(path) for path in options.prompt_file]
    opened = options.open()

    from llm.inference.decode import Decoder
    from llm.inference.numerics import decoding_numerics

    settings = overlay(opened.config.sample, flags, where="the flags")
    prompts = [*options.prompt, *(as_text(data, opened.tokenizer, name) for name, data in files)]
    if options.stdin or (not prompts and text_is_piped_in()):
        text = as_text(read_input(), opened.tokenizer, "standard input")
        prompts += [text] if text or options.stdin else []
    decoder = Decoder.create(opened.spec, opened.params, opened.tokenizer)
    requests = make_requests(
        settings,
        prompts or [settings.prompt],
        opened.tokenizer,
        stop=options.stop,
        top=options.top if options.shows_numbers else None,
        watch=options.watch,
    )
    for request in requests:
        decoder.check(request)
    numerics = decoding_numerics(opened.spec, opened.params, decoder, requests[0])
    sampling = Sampling.of(settings)
    context, cut_short = opened.spec.config.context_length, []

    def records() -> Iterator[AnyRecord]:
        yield RunRecord.of(opened.checkpoint, opened.tokenizer, sampling, numerics, options.top)
        tokens: list[TokenRecord] = []
        for new in continued(decoder, requests):
            yield from new.tokens
            tokens += new.tokens
            if new.finish is not None:
                number = tokens[0].sample
                yield EndRecord.of(number, tokens, new.finish, counted="generated")
                if new.finish == "context":
                    cut_short.append(context - len(requests[number].prompt))
                tokens = []

    options.emit(
        records(),
        title=f"Samples from {opened.run}, step {opened.step}",
        show=lambda records: plain_text(records, len(requests)),
    )
    if cut_short:
        low, high, asked = min(cut_short), max(cut_short), settings.max_new_tokens
        say(
            f"the context of {counted(context, 'token')} is full after "
            f"{f'{low} to ' * (low < high)}{counted(high, 'new token')}; {asked} "
            f"{'was' if asked == 1 else 'were'} asked for"
        )
    return 0


def plain_text(records: Iterable[AnyRecord], samples: int) -> Iterator[str]:
    """The text of the records. If there are several samples, a line on stderr names each."""
    begun: int | None = None
    for record in records:
        if isinstance(record, TokenRecord):
            if record.sample != begun and samples > 1:
                say(f"--- sample {record.sample}")
            begun = record.sample
            yield record.text
        elif isinstance(record, EndRecord):
            yield "\n"


def text_is_piped_in() -> bool:
    """Whether standard input holds a prompt that can be read without waiting for it.

    A pipe is read only if it holds something by now, when the model is loaded: a shell or a
    scheduler may leave a pipe open forever.
    """
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):
        return False
    if not stat.S_ISFIFO(mode):
        return stat.S_ISREG(mode)
    if select.select([sys.stdin], [], [], 0.0)[0]:
        return True
    say("standard input is open but silent, so it is not read; to wait for it, give -")
    return False
