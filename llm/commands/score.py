"""python -m llm score RUN --file FILE | --text TEXT | -: how probable is every token of a text?

Reports on stderr how well the model predicts the texts, and the passages that it predicts worst;
with --json, as one JSON object on stdout. A text longer than the context is read through windows
(--stride). The first token of a text has nothing before it and is not counted.

The files of arrays hold, for text I with T tokens:

    --full       ids_I int32 [T]; logprobs_I float32 [T - 1, vocabulary]
    --attention  ids_I; attention_I float32 [layers, heads, T, T]: row t
                 belongs to the token that looks, and rows sum to one
"""

import json
import math
import time
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, Self

import pydantic
from pydantic import NonNegativeInt

from llm.commands.flags import InputFiles, OutputFile, argument, parse
from llm.commands.shared import RecordOptions, as_text, counted, read_file, read_input, writing
from llm.console import say_result
from llm.errors import UsageError
from llm.files import write_output
from llm.inference.records import (
    NO_NUMBERS,
    AnyRecord,
    EndRecord,
    RunRecord,
    Spellings,
    TokenRecord,
    as_json,
    bits_per_byte,
    perplexity,
    text_bytes,
)
from llm.section import setting

if TYPE_CHECKING:
    import numpy as np

    from llm.run.open import OpenedModel
    from llm.text.tokenizer import Ids

# Tokens of a passage: a line or two of text, long enough to be read alone.
PASSAGE_TOKENS = 16
WORST_PASSAGES = 5


class Options(RecordOptions):
    """The command line."""

    stdin: Literal["-"] | None = argument("-", "score standard input", None)
    file: InputFiles = setting((), "files to score, each a text of its own", "FILE")
    text: tuple[str, ...] = setting((), "texts to score")
    stride: NonNegativeInt = setting(
        0,
        "tokens between the windows of a long text; smaller gives more context and takes longer; "
        "0: half of the context",
    )
    format: Literal["records", "openai"] = setting(
        "records", "what --probs writes: records, or one JSON object like OpenAI's completions"
    )
    full: OutputFile = setting(None, "write the whole distribution at every token (.npz)", "FILE")
    attention: OutputFile = setting(None, "write where each head looks (.npz)", "FILE")
    attention_html: OutputFile = setting(None, "write where each head looks, as a page", "FILE")
    as_json: bool = setting(False, "print the summary as one JSON object", flag="json")

    @pydantic.model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.as_json and self.probs == "-":
            raise UsageError("--json and --probs - would both write to stdout; give --probs a file")
        if self.format == "openai" and not self.probs:
            raise UsageError(
                "--format openai is the format of --probs; give --probs FILE or --probs -"
            )
        return self


def read_sources(options: Options) -> list[tuple[str, bytes]]:
    """(name, content) of each text that is to be scored, in the order of the samples."""
    sources = [read_file(path) for path in options.file]
    sources += [("--text", text.encode("utf-8", "surrogateescape")) for text in options.text]
    if options.stdin:
        sources.append(("standard input", read_input()))
    if not sources:
        raise UsageError("no text to score: give --file FILE, --text TEXT, or - for standard input")
    return sources


def main(arguments: list[str]) -> int:
    """Exit codes as in docs/design.md; errors are raised as LLMError."""
    options = parse(Options, arguments)
    sources = read_sources(options)
    opened = options.open()

    from llm.inference.numerics import numerics_of
    from llm.inference.score import Scorer
    from llm.serving.completions import openai_completion

    tokenizer = opened.tokenizer
    read = [tokenizer.encode(as_text(data, tokenizer, name)) for name, data in sources]
    texts = [tokenizer.begun(ids) for ids in read]
    if all(len(ids) < 2 for ids in texts):
        raise UsageError(
            "nothing to score: no text has two tokens, and the first token of a text has nothing "
            "before it to predict it from"
        )
    top = options.top if options.shows_numbers else 0
    scorer = Scorer(
        opened.spec, opened.params, tokenizer, top, tuple(options.watch), options.stride
    )
    if options.attention or options.attention_html:
        write_attention(options, opened, texts, [name for name, _ in sources])
    ends: list[EndRecord] = []
    size = 0
    worst: list[dict[str, Any]] = []

    def records() -> Iterable[AnyRecord]:
        nonlocal size
        numerics = numerics_of(opened.spec, opened.params, "teacher_forced")
        yield RunRecord.of(opened.checkpoint, tokenizer, None, numerics, options.top)
        for sample, tokens in enumerate(scorer.score(texts)):
            yield from tokens
            ends.append(EndRecord.of(sample, tokens, "length", counted="prompt"))
            size += sum(map(text_bytes, tokens[1:]))
            worst.extend(worst_of(tokens))
            yield ends[-1]

    def as_openai(records: list[AnyRecord]) -> str:
        answer = openai_completion(records, opened.run, int(time.time()))
        return json.dumps(answer, allow_nan=False) + "\n"

    options.emit(
        records(),
        title=f"Scored by {opened.run}, step {opened.step}",
        encode=as_openai if options.format == "openai" else None,
    )
    if options.full:
        write_arrays(options.full, "logprobs", texts, map(scorer.distributions, texts))
    report = opened.checkpoint | summary(ends, size, worst)
    if options.as_json:
        print(json.dumps(report, allow_nan=False))
    else:
        say_result(for_people(report))
    return 0


def summary(
    ends: Sequence[EndRecord], size: int, worst: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The object that --json prints, without the checkpoint.

    Args:
      ends: the end record of each text.
      size: bytes of all tokens that are counted.
      worst: the worst passages of each text, from `worst_of`.
    """
    tokens, nats = sum(end.tokens for end in ends), -math.fsum(end.sum_logprob for end in ends)
    return {
        "texts": len(ends),
        "tokens": tokens,
        "total_nats": nats,
        "nats_per_token": nats / tokens,
        "perplexity": perplexity(nats, tokens),
        "bits_per_byte": bits_per_byte(nats, size),
        "worst": sorted(worst, key=lambda one: -one["nats_per_token"])[:WORST_PASSAGES],
    }


def worst_of(tokens: Sequence[TokenRecord]) -> Iterator[dict[str, Any]]:
    """The passages of a text with the most nats per token, none overlapping another."""
    surprisals = [-token.logprob for token in tokens if token.logprob is not None]
    for start, end in worst_passages(surprisals):
        passage, nats = tokens[start + 1 : end + 1], math.fsum(surprisals[start:end])
        place = {name: getattr(passage[0], name) for name in ("sample", "position", "text_offset")}
        sums = {"tokens": len(passage), "nats": nats, "nats_per_token": nats / len(passage)}
        yield place | sums | {"text": "".join(token.text for token in passage)}


def worst_passages(surprisals: Sequence[float]) -> list[tuple[int, int]]:
    """[start, end) of the passages with the largest means, largest first, none overlapping."""
    length = min(PASSAGE_TOKENS, len(surprisals))
    if not length:
        return []
    sums = [0.0, *accumulate(surprisals)]
    starts = range(len(surprisals) - length + 1)
    chosen: list[tuple[int, int]] = []
    for start in sorted(starts, key=lambda start: sums[start] - sums[start + length]):
        if all(abs(start - other) >= length for other, _ in chosen):
            chosen.append((start, start + length))
            if len(chosen) == WORST_PASSAGES:
                break
    return chosen


def for_people(report: dict[str, Any]) -> str:
    """The summary as lines of text."""
    per_byte = report["bits_per_byte"]
    numbers = [
        counted(report["tokens"], "token"),
        f"{report['total_nats']:.2f} nats",
        f"{report['nats_per_token']:.4f} nats per token",
        f"perplexity {report['perplexity'] or math.inf:.2f}",
        *([f"{per_byte:.4f} bits per byte"] if per_byte is not None else []),
    ]
    passages = [
        # repr: a text must not steer the terminal.
        "  {nats_per_token:.2f}  text {sample} at {text_offset}  {text!r}".format(**passage)
        for passage in report["worst"]
    ]
    return "\n".join([" \u00b7 ".join(numbers), "predicted worst (nats per token):", *passages])


def write_arrays(
    path: str, name: str, texts: "Sequence[Ids]", arrays: "Iterable[np.ndarray]"
) -> None:
    """Write the ids and the array of each text to an .npz file, one text in memory at a time."""
    import numpy as np

    with writing(path), zipfile.ZipFile(path, "w") as archive:
        for index, (ids, array) in enumerate(zip(texts, arrays, strict=True)):
            for kind, values in (("ids", ids), (name, array)):
                with archive.open(f"{kind}_{index}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, values)


def write_attention(
    options: Options, opened: "OpenedModel", texts: "Sequence[Ids]", names: Sequence[str]
) -> None:
    """Write where each head looks: all texts as arrays, one text as a page.

    Raises:
      UsageError: the weights are too many, or a text is longer than the context. Nothing is written
        then.
    """
    from llm.inference.transcript import Transcript
    from llm.pages.attention import attention_of, check_attention
    from llm.pages.attention_view import attention_page

    if options.attention_html and len(texts) > 1:
        raise UsageError(
            f"--attention-html shows one text, and {len(texts)} were given; score one, or take all "
            "of them as arrays with --attention FILE.npz"
        )
    for ids, name in zip(texts, names, strict=True):
        check_attention(opened.spec, ids, name)
    weights: Iterable[np.ndarray] = (attention_of(opened.spec, opened.params, i) for i in texts)
    if options.attention_html:
        weights = list(weights)  # the page has one text
        transcript = Transcript(Spellings(opened.tokenizer))
        tokens = [transcript.add(id_, "prompt", NO_NUMBERS) for id_ in texts[0].tolist()]
        tokens[-1:] = map(transcript.close, tokens[-1:])
        title = f"Attention of {opened.run}, step {opened.step}"
        page = attention_page(weights[0], list(map(as_json, tokens)), title=title)
        write_output(options.attention_html, page.encode(), UsageError)
    if options.attention:
        write_arrays(options.attention, "attention", texts, weights)
