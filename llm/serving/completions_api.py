r"""POST /v1/completions: what a request may say, and how an answer looks.

    request = parse(body, limits)                 a CompletionRequest, or an APIError
    prompts = prompt_ids(request, tokenizer, T)   token ids
    requests = samples(request, prompts)          one decode.Request for each sample
    answer = Answer(request, requests, ...)       Progress in, events or one completion out

As OpenAI's legacy completions, with extensions:

    prompt    also token ids, which is the only exact way to give bytes that are no text
    top_k, min_p    as in filters.py
    records   true, or how many alternatives: the token-probability records of records.py, in the
              field "records" beside "choices". Of a stream each event carries the new ones.

Sample j of prompt i is choice n i + j and draws with noise (seed, j), as sample.py's does. In
records, "sample" is the number of the choice. Without `echo` a choice has no prompt, neither in its
text nor in its records, and its end record's `text` is the text of the tokens that it has.
`max_tokens` 0 with `echo` scores the prompt: nothing is drawn, `sampling` is null, and the end
record sums the prompt.

What it is not: HTTP (server.py), or decoding (llm/serving/engine.py).

Source: https://platform.openai.com/docs/api-reference/completions
"""

import difflib
import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn, Self

import numpy as np
import pydantic
from pydantic import BaseModel, ConfigDict, Field

from llm.errors import UsageError
from llm.inference.decode import Progress, Request, encode_prompt
from llm.inference.filters import Sampling
from llm.inference.records import Record, RecordBuilder
from llm.inference.samples import DEFAULT_TOP
from llm.inference.transcript import Token
from llm.serving.completions import FINISH, logprobs_of
from llm.text.tokenizer import Ids, Tokenizer

_MOST_SEED = 2**63


class APIError(Exception):
    """An answer that is not what was asked for, in OpenAI's shape.

    Attributes:
      param: the field that is wrong; None where no one field is.
      code: a word that programs can compare, or None.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        kinds = {429: "rate_limit_error", 404: "invalid_request_error"}
        kind = kinds.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


@dataclass(frozen=True)
class RequestLimits:
    """The most that one request may ask for; each is a flag of `serve`."""

    max_body: int = 2**20
    max_prompts: int = 64
    max_n: int = 16
    max_tokens: int = 4096
    max_top: int = 100


class StreamOptions(BaseModel):
    """What a stream has beside its events."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False


Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class CompletionRequest(BaseModel):
    """The fields of a request; null is as good as absent."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    prompt: Any
    model: str | None = None
    max_tokens: Annotated[int, Field(ge=0)] = 16
    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Probability = 0.0
    n: Annotated[int, Field(ge=1)] = 1
    best_of: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None
    echo: bool = False
    stop: Any = ()
    seed: Annotated[int, Field(ge=-_MOST_SEED, lt=_MOST_SEED)] | None = None
    records: Any = None
    user: str | None = None
    suffix: str = ""
    logit_bias: dict[str, Any] = Field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    @pydantic.field_validator("prompt")
    @classmethod
    def _check_prompt(cls, value: Any) -> "list[str | list[int]]":
        """Always a list of prompts."""
        if isinstance(value, str):
            return [value]
        if isinstance(value, list) and value:
            if all(type(item) is int for item in value):
                return [value]
            if all(isinstance(item, str) for item in value):
                return value
            if all(_is_ids(item) for item in value):
                return value
        raise ValueError(
            "expected a text, a list of texts, a list of token ids, or a list of such lists, none "
            "of them empty but a text"
        )

    @pydantic.field_validator("stop")
    @classmethod
    def _check_stop(cls, value: Any) -> tuple[str, ...]:
        stops = (value,) if isinstance(value, str) else tuple(value) if _is_list(value) else None
        if stops is None or not all(isinstance(stop, str) and stop for stop in stops):
            raise ValueError("expected a text or a list of texts, none of them empty")
        if len(stops) > 16:
            raise ValueError(f"found {len(stops)} texts, expected at most 16")
        return stops

    @pydantic.field_validator("records")
    @classmethod
    def _check_records(cls, value: Any, info: pydantic.ValidationInfo) -> int | None:
        """How many alternatives; None for no records."""
        if isinstance(value, bool):
            # A client that names no number is not refused for one.
            assert isinstance(info.context, RequestLimits)
            return min(DEFAULT_TOP, info.context.max_top) if value else None
        if value is None or (isinstance(value, int) and value >= 0):
            return value
        raise ValueError("expected true, false, or how many alternatives to list, 0 or more")

    @pydantic.model_validator(mode="after")
    def _check_what_is_not_done(self) -> Self:
        neutral = {
            "suffix": ("", "text cannot be filled in before another"),
            "logit_bias": ({}, "logits cannot be biased"),
            "presence_penalty": (0.0, "penalties are not implemented"),
            "frequency_penalty": (0.0, "penalties are not implemented"),
            "best_of": (self.n, "samples are not ranked; ask for n and choose"),
        }
        for name, (expected, why) in neutral.items():
            found = getattr(self, name)
            if found not in (None, expected):
                raise APIError(
                    400,
                    f"{name} = {_short(found)}: {why}; leave it out, or give {expected!r}",
                    param=name,
                    code="unsupported_parameter",
                )
        if self.stream_options is not None and not self.stream:
            _refuse("stream_options", "is for streams only; give stream = true or leave it out")
        return self

    @property
    def top(self) -> int | None:
        """How many alternatives must be known; None: no numbers are asked for."""
        asked = [count for count in (self.logprobs, self.records) if count is not None]
        return max(asked, default=None)

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn. Where none is, nothing is cut from the distribution either."""
        if self.max_tokens == 0:
            return Sampling()
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, seed)


def parse(body: bytes, limits: RequestLimits) -> CompletionRequest:
    """The request that a body is.

    Raises:
      APIError: it is none; the message names the field, what was found and what was expected.
    """
    values = {name: value for name, value in _read_json(body).items() if value is not None}
    for name in values:
        if name not in CompletionRequest.model_fields:
            raise APIError(400, _unknown(name), param=name, code="unknown_parameter")
    try:
        request = CompletionRequest.model_validate(values, context=limits)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        raise APIError(400, _explain(problem), param=_name(problem["loc"])) from None
    _check_limits(request, limits)
    return request


def prompt_ids(request: CompletionRequest, tokenizer: Tokenizer, context_length: int) -> list[Ids]:
    """The token ids of each prompt.

    Raises:
      APIError: the tokenizer has no tokens for a text, or it is longer than the context.
    """
    longest = max(map(len, tokenizer.token_table))
    prompts = []
    for number, prompt in enumerate(request.prompt):
        # What cannot fit is refused before it is encoded, which could take long.
        size = len(prompt) if isinstance(prompt, list) else -(-len(prompt) // longest)
        ids = None
        if size <= context_length:
            ids = _encode(prompt, tokenizer, number)
            size = len(ids)
        if ids is None or size > context_length:
            raise APIError(
                400,
                f"prompt {number} has {size} tokens{' or more' if ids is None else ''}, this "
                f"model's context holds {context_length}; shorten it",
                param="prompt",
                code="context_length_exceeded",
            )
        prompts.append(ids)
    return prompts


def samples(request: CompletionRequest, prompts: Sequence[Ids]) -> list[Request]:
    """n for each prompt, in the order of the choices."""
    sampling = request.sampling
    return [
        Request(
            prompt=ids,
            sampling=sampling,
            index=index,
            max_new_tokens=request.max_tokens,
            stop=request.stop,
            top=request.top,
        )
        for ids in prompts
        for index in range(request.n)
    ]


class Answer:
    """The answer to one request as it grows: events of a stream, and the whole.

    Args:
      requests: from `samples`.
      run_record: builds the run record from how tokens are drawn (None: nothing is) and `top`.
    """

    def __init__(
        self,
        request: CompletionRequest,
        requests: Sequence[Request],
        model: str,
        builder: RecordBuilder,
        run_record: Callable[[Sampling | None, int], Record],
    ):
        self.request = request
        self._builder = builder
        self._tokens: list[list[Token]] = [[] for _ in requests]
        self._finish: list[str | None] = [None] * len(requests)
        self._prompts = requests[:: request.n]
        self._run: Record | None = None
        if request.records is not None:
            drawn = requests[0].sampling if request.max_tokens else None
            self._run = run_record(drawn, request.records)
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    @property
    def finished(self) -> bool:
        return None not in self._finish

    def add(self, index: int, progress: Progress) -> dict[str, Any] | None:
        """What a choice got: the event of a stream, None where it would say nothing."""
        tokens = [t for t in progress.tokens if self.request.echo or t.phase == "generated"]
        self._tokens[index] += tokens
        self._finish[index] = progress.finish
        if not self.request.stream or not (tokens or progress.finish):
            return None
        shown = [self._record(index, token) for token in tokens]
        text = "".join(token.text for token in tokens)
        if not (text or progress.finish or self.request.top is not None):
            return None
        event = self._head | {"choices": [self._choice(index, text, shown, progress.finish)]}
        if self.request.records is not None:
            event["records"] = [*self._first(), *self._listed(shown), *self._end(index)]
        if self._shows_usage:
            event["usage"] = None
        return event

    def last_event(self) -> dict[str, Any] | None:
        """What a stream says after its choices: the usage, if it was asked for."""
        return self._head | {"choices": [], "usage": self._usage()} if self._shows_usage else None

    def completion(self) -> dict[str, Any]:
        """The whole answer, once all choices are finished."""
        choices, records = [], list(self._first())
        for index, tokens in enumerate(self._tokens):
            shown = [self._record(index, token) for token in tokens]
            text = "".join(token.text for token in tokens)
            choices.append(self._choice(index, text, shown, self._finish[index]))
            if self.request.records is not None:
                records += [*self._listed(shown), *self._end(index)]
        extension = {} if self.request.records is None else {"records": records}
        return self._head | {"choices": choices, "usage": self._usage()} | extension

    @property
    def _shows_usage(self) -> bool:
        options = self.request.stream_options
        return options is not None and options.include_usage

    def _record(self, index: int, token: Token) -> Record:
        return {} if self.request.top is None else self._builder.token(index, token)

    def _choice(
        self, index: int, text: str, shown: Sequence[Record], finish: str | None
    ) -> dict[str, Any]:
        count = self.request.logprobs
        return {
            "text": text,
            "index": index,
            "logprobs": None if count is None else logprobs_of(shown, count),
            "finish_reason": None if finish is None else FINISH[finish],
        }

    def _first(self) -> list[Record]:
        """The run record, the first time."""
        record, self._run = self._run, None
        return [] if record is None else [record]

    def _listed(self, shown: Sequence[Record]) -> list[Record]:
        return [record | {"top": record["top"][: self.request.records]} for record in shown]

    def _end(self, index: int) -> list[Record]:
        finish = self._finish[index]
        if finish is None:
            return []
        counted = "generated" if self.request.max_tokens else "prompt"
        return [self._builder.end(index, self._tokens[index], finish, counted)]

    def _usage(self) -> dict[str, int]:
        prompts = sum(len(request.prompt) for request in self._prompts)
        drawn = sum(token.phase == "generated" for tokens in self._tokens for token in tokens)
        return {
            "prompt_tokens": prompts,
            "completion_tokens": drawn,
            "total_tokens": prompts + drawn,
        }


def _read_json(body: bytes) -> Mapping[str, Any]:
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


def _check_limits(request: CompletionRequest, limits: RequestLimits) -> None:
    asked = {
        "prompt": (len(request.prompt), limits.max_prompts, "--max-prompts", " prompts"),
        "n": (request.n, limits.max_n, "--max-n", ""),
        "max_tokens": (request.max_tokens, limits.max_tokens, "--max-tokens", ""),
        "logprobs": (request.logprobs or 0, limits.max_top, "--max-top", ""),
        "records": (request.records or 0, limits.max_top, "--max-top", ""),
    }
    for name, (found, most, flag, unit) in asked.items():
        if found > most:
            _refuse(name, f"= {found}{unit}: expected at most {most} (the server's {flag})")


def _encode(prompt: str | list[int], tokenizer: Tokenizer, number: int) -> Ids:
    if isinstance(prompt, str):
        try:
            return encode_prompt(tokenizer, prompt)
        except UsageError as error:
            raise APIError(400, f"prompt {number}: {error}", param="prompt") from None
    outside = [id_ for id_ in prompt if not 0 <= id_ < tokenizer.vocab_size]
    if outside:
        _refuse(
            "prompt",
            f"{number} has the token id {_short(outside[0])}; ids go from 0 to "
            f"{tokenizer.vocab_size - 1}",
        )
    return np.array(prompt, np.int32)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(id_) is int for id_ in value)


def _refuse(name: str, why: str) -> NoReturn:
    raise APIError(400, f"{name} {why}", param=name)


_ELSEWHERE = {
    "messages": "this server completes text, it has no chat format: give prompt to /v1/completions",
    "max_completion_tokens": "did you mean max_tokens?",
    "max_new_tokens": "did you mean max_tokens?",
    "num_samples": "did you mean n?",
    "top_logprobs": "did you mean logprobs, the number of alternatives?",
}


def _unknown(name: str) -> str:
    fields = CompletionRequest.model_fields
    near = difflib.get_close_matches(name, fields, 1)
    hint = f"did you mean {near[0]}?" if near else f"fields are {', '.join(fields)}"
    return f"unknown field {_short(name)}; {_ELSEWHERE.get(name, hint)}"


def _name(place: Sequence[Any]) -> str:
    return ".".join(str(part) for part in place)


def _explain(problem: Any) -> str:
    """One pydantic problem in a person's words."""
    name = _name(problem["loc"])
    match problem["type"]:
        case "missing":
            return f"{name} is missing; expected the text to continue, or its token ids"
        case "extra_forbidden":
            return f"unknown field {name}"
        case "value_error":
            reason = str(problem["ctx"]["error"])
        case _:
            reason = f"expected {problem['msg'].removeprefix('Input should be ')}"
    return f"{name} = {_short(problem['input'])}: {reason}"


def _short(value: Any) -> str:
    """A value as JSON, cut where it is long."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = ascii(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
