r"""OpenAI's completions: what a request may say, and how an answer looks.

    request = parse(body, limits)                 a CompletionRequest, or an APIError
    prompts = prompt_ids(request, tokenizer, T)   token ids
    answer = Answer(request, prompts, served)     NewTokens in, events or one completion out

    openai_completion(records, model, created)    the records of a file as one completion

Requests and answers follow OpenAI's legacy completions, with these extensions:

    prompt          may be token ids, the only exact way to give bytes that are not text
    top_k, min_p    as in filters.py
    records         true, or how many alternatives: the answer has the token-probability records of
                    records.py in the field "records", beside "choices". Each event of a stream
                    carries the new ones.

Sample j of prompt i is choice n i + j and draws with noise (seed, j), as in sample.py. In
records, "sample" is the number of the choice. Without `echo` neither the text of a choice nor its
records include the prompt. `max_tokens` 0 with `echo` scores the prompt: nothing is drawn,
`sampling` is null, and the end record sums the prompt.

A dict of alternatives has their spellings as keys. A token that is not UTF-8 by itself is spelled
`bytes:\xNN`, as OpenAI does: as U+FFFD all such tokens would share one key.

What it is not: HTTP (server.py), or decoding (engine.py).

Source: https://platform.openai.com/docs/api-reference/completions
"""

import itertools
import json
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn

import pydantic
from msgspec.structs import replace
from pydantic import Field, NonNegativeInt, PositiveInt

from llm.config import Section, expected
from llm.inference.decode import NewTokens, Request, TokenIds, encode_prompt
from llm.inference.records import (
    DEFAULT_TOP,
    Alternative,
    AnyRecord,
    EndRecord,
    Record,
    RunRecord,
    Sampling,
    TokenRecord,
    as_json,
)
from llm.names import nearest
from llm.serving.limits import Limits
from llm.text.tokenizer import Tokenizer

_FINISH = {"length": "length", "context": "length", "stop": "stop", "end_of_text": "stop"}
# OpenAI's fields that would change the text: the value that does not, and why no other is taken.
_NOT_DONE: dict[str, tuple[Any, str]] = {
    "suffix": ("", "text cannot be filled in before another"),
    "logit_bias": ({}, "logits cannot be biased"),
    "presence_penalty": (0.0, "penalties are not implemented"),
    "frequency_penalty": (0.0, "penalties are not implemented"),
}
_ELSEWHERE = {
    "messages": "this server completes text, it has no chat format: give prompt to /v1/completions",
    "max_completion_tokens": "did you mean max_tokens?",
    "max_new_tokens": "did you mean max_tokens?",
    "num_samples": "did you mean n?",
    "top_logprobs": "did you mean logprobs, the number of alternatives?",
}


class APIError(Exception):
    """An answer that is not what was asked for, in OpenAI's shape.

    Attributes:
      param: the field that is wrong; None if no single field is.
      code: a word that programs can compare, or None.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


@dataclass(frozen=True)
class Served:
    """What is served.

    Attributes:
      name: the id of the model in the API.
      run: the run record of an answer, but for what the request says: `sampling` and `top`.
      created: seconds since 1970, when the server started.
      page: the HTML at /.
    """

    name: str
    run: RunRecord
    created: int
    page: str


class StreamOptions(Section):
    """What a stream has beside its events."""

    include_usage: bool = False
    include_obfuscation: bool = False


class CompletionRequest(Section):
    """The fields of a request that have an effect here.

    Attributes:
      prompt: always a list of prompts.
      records: how many alternatives the records list; None for no records.
    """

    prompt: Any
    model: str | None = None
    max_tokens: NonNegativeInt = 16
    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: NonNegativeInt = 0
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    n: PositiveInt = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: NonNegativeInt | None = None
    echo: bool = False
    stop: Any = ()
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    records: Any = None
    user: str | None = None

    @pydantic.field_validator("prompt")
    @classmethod
    def _check_prompt(cls, value: Any) -> "list[str] | list[list[int]]":
        prompts = value if isinstance(value, list) and not _is_ids(value) else [value]
        if prompts and (all(isinstance(p, str) for p in prompts) or all(map(_is_ids, prompts))):
            return prompts
        raise ValueError(
            "expected a text, a list of texts, a list of token ids, or a list of such lists, none "
            "of them empty but a text"
        )

    @pydantic.field_validator("stop")
    @classmethod
    def _check_stop(cls, value: Any) -> tuple[str, ...]:
        stops = value if isinstance(value, list) else [value]
        if not all(isinstance(stop, str) and stop for stop in stops):
            raise ValueError("expected a text or a list of texts, none of them empty")
        if len(stops) > 16:
            raise ValueError(f"found {len(stops)} texts, expected at most 16")
        return tuple(stops)

    @pydantic.field_validator("records")
    @classmethod
    def _check_records(cls, value: Any, info: pydantic.ValidationInfo) -> int | None:
        if isinstance(value, bool):
            assert isinstance(info.context, Limits)
            # A client that names no number is not refused for one.
            return min(DEFAULT_TOP, info.context.max_top) if value else None
        if isinstance(value, int) and value >= 0:
            return value
        raise ValueError("expected true, false, or how many alternatives to list, 0 or more")

    @pydantic.field_validator("stream_options")
    @classmethod
    def _check_stream_options(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        if not info.data.get("stream"):
            raise ValueError("it is for streams only; give stream = true or leave it out")
        return value

    @property
    def top(self) -> int | None:
        """How many alternatives must be known; None if no numbers are asked for."""
        asked = [count for count in (self.logprobs, self.records) if count is not None]
        return max(asked, default=None)

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn. If none is drawn, nothing is cut from the distribution either."""
        if self.max_tokens == 0:
            return Sampling()
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, seed)


def parse(body: bytes, limits: Limits) -> CompletionRequest:
    """The request in a body. A field that is null counts as absent.

    Raises:
      APIError: the body is no request; the message names the field, what was found and what was
        expected.
    """
    values = {name: value for name, value in _read_json(body).items() if value is not None}
    best_of = values.get("n", 1), "samples are not ranked; ask for n and choose"
    for name, (neutral, why) in (_NOT_DONE | {"best_of": best_of}).items():
        value = values.pop(name, neutral)
        if value != neutral:
            raise APIError(
                400,
                f"{name} = {_short(value)}: {why}; leave it out, or give {neutral!r}",
                param=name,
                code="unsupported_parameter",
            )
    fields = CompletionRequest.model_fields
    for name in values:
        if name not in fields:
            near = nearest(name, fields)
            hint = f"did you mean {near}?" if near else f"fields are {', '.join(fields)}"
            message = f"unknown field {_short(name)}; {_ELSEWHERE.get(name, hint)}"
            raise APIError(400, message, param=name, code="unknown_parameter")
    try:
        request = CompletionRequest.model_validate(values, context=limits)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(map(str, problem["loc"]))
        raise APIError(400, _explain(name, problem), param=name) from None
    _check_limits(request, limits)
    return request


def prompt_ids(
    request: CompletionRequest, tokenizer: Tokenizer, context_length: int
) -> list[TokenIds]:
    """The token ids of each prompt; `Decoder.check` checks that the model has given ids.

    Raises:
      APIError: a prompt is longer than the context.
      UsageError: the tokenizer has no tokens for a text.
    """
    longest = max(map(len, tokenizer.token_table))
    prompts: list[TokenIds] = []
    for number, prompt in enumerate(request.prompt):
        ids, size, or_more = prompt, len(prompt), ""
        if isinstance(prompt, str):
            # A text that cannot fit is refused before it is encoded, which could take long.
            size, or_more = -(-len(prompt) // longest), " or more"
            if size <= context_length:
                ids = encode_prompt(tokenizer, prompt)
                size, or_more = len(ids), ""
        if size > context_length:
            raise APIError(
                400,
                f"prompt {number} has {size} tokens{or_more}, this model's context holds "
                f"{context_length}; shorten it",
                param="prompt",
                code="context_length_exceeded",
            )
        prompts.append(ids)
    return prompts


class Answer:
    """The answer to one request as it grows: the events of a stream, or the whole.

    Attributes:
      requests: what to decode: n samples of each prompt, in the order of the choices.
    """

    def __init__(self, request: CompletionRequest, prompts: Sequence[TokenIds], served: Served):
        self.request = request
        sampling = request.sampling
        self.requests = [
            Request(
                prompt=ids,
                sampling=sampling,
                index=index,
                max_new_tokens=request.max_tokens,
                stop=request.stop,
                top=request.top,
                sample=number * request.n + index,
            )
            for number, ids in enumerate(prompts)
            for index in range(request.n)
        ]
        self._tokens: list[list[TokenRecord]] = [[] for _ in self.requests]
        self._finish: list[str | None] = [None] * len(self.requests)
        self._prompt_tokens = sum(map(len, prompts))
        self._run: list[Record] = []  # until it is sent
        if request.records is not None:
            drawn = sampling if request.max_tokens else None
            top = min(request.records, served.run.tokenizer.vocab_size)
            self._run.append(as_json(replace(served.run, sampling=drawn, top=top)))
        self._shows_usage = bool(request.stream_options and request.stream_options.include_usage)
        self._head = _head(secrets.token_hex(12), int(time.time()), served.name)

    @property
    def finished(self) -> bool:
        return None not in self._finish

    def add(self, index: int, new: NewTokens) -> list[TokenRecord]:
        """Add what a choice got, and return the tokens that the client sees."""
        tokens = [t for t in new.tokens if self.request.echo or t.phase == "generated"]
        self._tokens[index] += tokens
        self._finish[index] = new.finish
        return tokens

    def event(self, index: int, new: NewTokens) -> dict[str, Any] | None:
        """The event of a stream for what a choice got; None if it would say nothing."""
        tokens = self.add(index, new)
        choice, records = self._part(index, tokens, new.finish)
        if not (choice["text"] or new.finish or (tokens and self.request.top is not None)):
            return None
        return self._said([choice], records) | ({"usage": None} if self._shows_usage else {})

    def last_event(self) -> dict[str, Any] | None:
        """What a stream says after its choices: the usage, if the client asked for it."""
        return self._head | {"choices": [], "usage": self._usage()} if self._shows_usage else None

    def completion(self) -> dict[str, Any]:
        """The whole answer, once all choices are finished."""
        ended = enumerate(zip(self._tokens, self._finish, strict=True))
        choices, records = zip(*(self._part(i, *end) for i, end in ended), strict=True)
        return self._said(choices, itertools.chain(*records)) | {"usage": self._usage()}

    def _said(self, choices: Sequence[Any], records: Iterable[Record]) -> dict[str, Any]:
        """An answer or an event, whose records begin with the run record unless it was sent."""
        if self.request.records is None:
            return self._head | {"choices": choices}
        run, self._run = self._run, []
        return self._head | {"choices": choices, "records": [*run, *records]}

    def _part(
        self, index: int, tokens: Sequence[TokenRecord], finish: str | None
    ) -> tuple[dict[str, Any], list[Record]]:
        """These tokens of a choice in OpenAI's shape, and their records."""
        request = self.request
        text = "".join(token.text for token in tokens)
        logprobs = None if request.logprobs is None else _logprobs(tokens, request.logprobs)
        choice = _choice(index, text, logprobs, finish)
        if request.records is None:
            return choice, []
        records = [as_json(replace(t, top=t.top[: request.records])) for t in tokens]
        if finish is not None:
            counted = "generated" if request.max_tokens else "prompt"
            records.append(as_json(EndRecord.of(index, self._tokens[index], finish, counted)))
        return choice, records

    def _usage(self) -> dict[str, int]:
        drawn = sum(token.phase == "generated" for tokens in self._tokens for token in tokens)
        return _usage(self._prompt_tokens, drawn)


def openai_completion(records: Sequence[AnyRecord], model: str, created: int) -> dict[str, Any]:
    """The records of one run as one completion: a choice for each sample, its prompt echoed.

    Args:
      model: its name.
      created: seconds since 1970.
    """
    tokens: dict[int, list[TokenRecord]] = defaultdict(list)
    for record in records:
        if isinstance(record, TokenRecord):
            tokens[record.sample].append(record)
    choices = [
        _choice(end.sample, end.text, _logprobs(tokens[end.sample]), end.finish)
        for end in records
        if isinstance(end, EndRecord)
    ]
    phases = Counter(token.phase for sample in tokens.values() for token in sample)
    usage = _usage(phases["prompt"], phases["generated"])
    return _head(str(created), created, model) | {"choices": choices, "usage": usage}


def _head(name: str, created: int, model: str) -> dict[str, Any]:
    return {"id": f"cmpl-{name}", "object": "text_completion", "created": created, "model": model}


def _choice(index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
    reason = None if finish is None else _FINISH[finish]
    return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": reason}


def _logprobs(tokens: Sequence[TokenRecord], count: int | None = None) -> dict[str, list[Any]]:
    """The `logprobs` of a choice that has these tokens.

    Args:
      count: how many of the likeliest tokens to list, if the records list more.
    """
    return {
        "tokens": [_spelling(token) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_alternatives(token, count) for token in tokens],
        "text_offset": [token.text_offset for token in tokens],
    }


def _usage(prompt: int, drawn: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}


def _alternatives(token: TokenRecord, count: int | None) -> dict[str, float] | None:
    """The likeliest tokens and, as OpenAI has it, the token itself if it is not among them."""
    if token.logprob is None:
        return None
    listed = {_spelling(entry): entry.logprob for entry in token.top[:count]}
    return listed | {_spelling(token): token.logprob}


def _spelling(entry: TokenRecord | Alternative) -> str:
    """The key of a token."""
    try:
        entry.bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry.byte_values)
    return entry.token


def _read_json(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise APIError(400, f"the body is not JSON: {why}", code="invalid_json") from None
    if not isinstance(values, dict):
        raise APIError(
            400,
            f"the body is {_short(values)}: expected a JSON object such as "
            '{"prompt": "Once", "max_tokens": 16}',
        )
    return values


def _no_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number in JSON")


def _check_limits(request: CompletionRequest, limits: Limits) -> None:
    prompts = len(request.prompt)
    asked = (
        ("prompt", "the number of prompts", prompts, "max_prompts"),
        ("n", "n", request.n, "max_n"),
        ("n", "prompts x n, the number of samples,", prompts * request.n, "max_queue"),
        ("max_tokens", "max_tokens", request.max_tokens, "max_tokens"),
        ("logprobs", "logprobs", request.logprobs or 0, "max_top"),
        ("records", "records", request.records or 0, "max_top"),
    )
    for name, what, found, limit in asked:
        most, flag = getattr(limits, limit), f"--{limit.replace('_', '-')}"
        if found > most:
            message = f"{what} is {found}: expected at most {most} (the server's {flag})"
            raise APIError(400, message, param=name)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(id_) is int for id_ in value)


def _explain(name: str, problem: Any) -> str:
    """One pydantic problem with a field in a person's words."""
    match problem["type"]:
        case "missing":
            return f"{name} is missing; expected the text to continue, or its token ids"
        case "extra_forbidden":
            return f"unknown field {name}"
        case "model_type":
            reason = "expected an object"
        case _:
            reason = expected(problem)
    return f"{name} = {_short(problem['input'])}: {reason}"


def _short(value: Any) -> str:
    """A value as JSON, cut if it is long."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = ascii(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
