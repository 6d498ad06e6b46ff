"""Samples: settings and prompts become requests, and their tokens come back one sample at a time.

    settings, prompts  ->  requests  ->  decoder  ->  NewTokens, all of sample 0, then all of 1, ...

The `sample` command and `llm.load(...).generate` share this, so that the same settings give both
the same records. What it is not: the decoding (decode.py), or the output of text.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llm.config import SamplingConfig, validate

if TYPE_CHECKING:  # `--help` must not cost the import of JAX
    from llm.inference.decode import Decoder, NewTokens, Request, TokenIds
    from llm.text.tokenizer import Tokenizer

# Rows of one batch; more samples take several. 32 full contexts of GPT-2 124M need 2.4 GB of cache.
MAX_ROWS = 32
# Settings of other decoders, and the value at which each changes nothing, so that it is taken.
NEUTRAL: Mapping[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "use_beam_search": False,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "typical_p": 1.0,
    "early_stopping": False,
    "use_cache": True,
    "bad_words": [],
}


def without_neutral(
    given: Mapping[str, Any], neutral: Mapping[str, Any] = NEUTRAL
) -> dict[str, Any]:
    """What changes something: without None, which is as good as absent, and without `neutral`."""
    return {
        name: value
        for name, value in given.items()
        if value is not None and not (name in neutral and value == neutral[name])
    }


def overlay(section: SamplingConfig, given: Mapping[str, Any], where: str) -> SamplingConfig:
    """A run's `sample` section, with the given settings in place of its own.

    Raises:
      UsageError: a value is out of its range or of another type; `where` says whose it is.
    """
    return validate({"sample": section.model_dump() | dict(given)}, where=where).sample


def make_requests(
    settings: SamplingConfig,
    prompts: "Sequence[str | TokenIds]",
    tokenizer: "Tokenizer",
    *,
    stop: Sequence[str] = (),
    top: int | None = None,
    watch: Sequence[int] = (),
) -> "list[Request]":
    """num_samples requests for each prompt; sample j of any prompt draws with noise (seed, j).

    Args:
      prompts: texts or token ids.
      stop, top, watch: as in Request.
    """
    from llm.inference.decode import Request, encode_prompt
    from llm.inference.records import Sampling

    return [
        Request(
            prompt=ids,
            sampling=Sampling.of(settings),
            index=index,
            max_new_tokens=settings.max_new_tokens,
            stop=tuple(stop),
            top=top,
            watch=tuple(watch),
            sample=number * settings.num_samples + index,
        )
        for number, prompt in enumerate(prompts)
        for ids in [encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else prompt]
        for index in range(settings.num_samples)
    ]


def continued(decoder: "Decoder", requests: "Sequence[Request]") -> "Iterator[NewTokens]":
    """The tokens of all samples, one sample after the other, as soon as each is final.

    Any number of requests, MAX_ROWS at a time.
    """
    for start in range(0, len(requests), MAX_ROWS):
        group = requests[start : start + MAX_ROWS]
        yield from in_order(decoder.generate(group))


def in_order(tokens: "Iterable[NewTokens]") -> "Iterator[NewTokens]":
    """The same tokens, one row after the other: tokens that come early wait for their turn."""
    waiting: dict[int, list[NewTokens]] = defaultdict(list)
    current = 0
    for new in tokens:
        waiting[new.row].append(new)
        while ready := waiting.pop(current, None):
            yield from ready
            if ready[-1].finish is None:
                break
            current += 1
