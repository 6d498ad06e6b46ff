"""Samples: settings and prompts become requests, and their tokens come back one sample at a time.

    settings, prompts  ->  requests  ->  decoder  ->  Progress, all of sample 0, then all of 1, ...

What the `sample` command and `llm.load(...).generate` share, so that the same settings give the
same records from both. What it is not: the decoding (decode.py), or where text goes.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llm.config import SamplingConfig, validate

if TYPE_CHECKING:  # `--help` must not cost the import of JAX
    from llm.inference.decode import Decoder, Progress, Request
    from llm.inference.records import Record
    from llm.model.gpt import ModelSpec, Params
    from llm.text.tokenizer import Tokenizer

# Rows of one batch; more samples take several. 32 full contexts of GPT-2 124M need 2.4 GB of cache.
MAX_ROWS = 32
# Alternatives that are listed with each token where nobody says how many.
DEFAULT_TOP = 10


def overlay(section: SamplingConfig, given: Mapping[str, Any], where: str) -> SamplingConfig:
    """A run's `sample` section with what was given in place of what it says.

    Raises:
      UsageError: a value is out of its range or of another type; `where` says whose it is.
    """
    return validate({"sample": section.model_dump() | dict(given)}, where=where).sample


def make_requests(
    settings: SamplingConfig,
    prompts: Sequence[str],
    tokenizer: "Tokenizer",
    *,
    stop: Sequence[str] = (),
    top: int | None = None,
    watch: Sequence[int] = (),
) -> "list[Request]":
    """num_samples requests for each prompt; sample j of any prompt draws with noise (seed, j).

    Args:
      stop, top, watch: as in Request.
    """
    from llm.inference.decode import Request, encode_prompt
    from llm.inference.filters import Sampling

    return [
        Request(
            prompt=ids,
            sampling=Sampling.of(settings),
            index=index,
            max_new_tokens=settings.max_new_tokens,
            stop=tuple(stop),
            top=top,
            watch=tuple(watch),
        )
        for ids in (encode_prompt(tokenizer, prompt) for prompt in prompts)
        for index in range(settings.num_samples)
    ]


def continued(decoder: "Decoder", requests: "Sequence[Request]") -> "Iterator[Progress]":
    """The tokens of all samples, one sample after the other, as soon as each is final.

    Any number of requests, MAX_ROWS at a time. The `row` of a Progress is its request's index.
    """
    for start in range(0, len(requests), MAX_ROWS):
        group = requests[start : start + MAX_ROWS]
        for progress in in_order(decoder.generate(group), len(group)):
            yield dataclasses.replace(progress, row=start + progress.row)


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


def decoding_numerics(
    spec: "ModelSpec", params: "Params", decoder: "Decoder", first: "Request"
) -> "Record":
    """`numerics` of a run record of samples.

    Args:
      spec, params: the model that is trained and scored.
      decoder: the same model, prepared for decoding.
      first: the first request. Where it asks for probabilities and they are not computed in
        float32, how far they are from one whole pass is measured on its prompt.
    """
    from llm.inference.records import numerics_of

    numerics = numerics_of(spec, params, "cached")
    if first.top is not None and spec.compute_dtype != "float32":
        from llm.inference.numerics import cached_minus_full

        numerics["cached_minus_full_nats"] = cached_minus_full(spec, params, decoder, first.prompt)
    return numerics
