"""What a client may ask of the server: a request's fields, their checks, and errors in its words.

    request = parse(body, limits)                    a CompletionRequest, or an APIError
    prompts = prompt_ids(request, tokenizer, T, limits)    token ids

The fields are OpenAI's legacy completions, those of vLLM that evaluation and interpretability need,
and ours:

    prompt          may be token ids, the only exact way to give bytes that are not text; null as
                    the first of them stands for the beginning of a text
    records         true, or how many alternatives: the answer has the token-probability records of
                    records.py in the field "records", beside "choices"

A value that changes nothing is taken, in whatever field of whichever decoder: null, a penalty of
nothing, an empty bias. What would change the text and is not done here is refused by name.

What it is not: the answer (completions.py), or HTTP (server.py).

Sources: https://platform.openai.com/docs/api-reference/completions
https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html
"""

import json
import secrets
from collections.abc import Iterable, Sized
from typing import Annotated, Any, NoReturn, Self, TypeVar

import pydantic
from msgspec import UNSET
from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt

from llm.config import expected
from llm.inference.decode import TokenIds, encode_prompt
from llm.inference.records import DEFAULT_TOP, Sampling
from llm.inference.samples import NEUTRAL, without_neutral
from llm.names import nearest
from llm.section import Probability, Section, TopK
from llm.serving.limits import Limits
from llm.text.tokenizer import Tokenizer

# What servers of other programs take beside the settings of NEUTRAL: the value that changes
# nothing here.
_NEUTRAL = {
    **NEUTRAL,
    "suffix": "",
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "return_tokens_as_token_ids": False,
    "response_format": {"type": "text"},
    "priority": 0,
}
_WHY_NOT = {
    "suffix": "text cannot be filled in before another",
    "best_of": "samples are not ranked; ask for n and choose",
}
_ELSEWHERE = {
    "messages": "this server completes text, it has no chat format: give prompt to /v1/completions",
    "truncate_prompt_tokens": "shorten the prompt; POST /tokenize counts its tokens",
    "allowed_token_ids": "give each of them 100 in logit_bias",
}
# Fields that name tokens.
_IDS = ("logprob_token_ids", "logit_bias", "stop_token_ids")

Asked = TypeVar("Asked", bound=Section)


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


def bad(param: str, message: str) -> APIError:
    """The error of a request whose field `param` is wrong."""
    return APIError(400, message, param=param)


class StreamOptions(Section):
    """What a stream has beside its events."""

    include_usage: bool = False
    include_obfuscation: bool = False


def _at_most(limit: str) -> pydantic.AfterValidator:
    """A limit of the server: on a number, or on how many members a value has."""

    def check(value: Any, info: pydantic.ValidationInfo) -> Any:
        found = len(value) if isinstance(value, Sized) else value
        most = getattr(info.context, limit)
        if found is not None and found > most:
            flag = f"--{limit.replace('_', '-')}"
            raise ValueError(f"found {found}, expected at most {most} (the server's {flag})")
        return value

    return pydantic.AfterValidator(check)


def _prompts(value: Any) -> list[str] | list[list[int | None]]:
    prompts = value if isinstance(value, list) and not _is_ids(value) else [value]
    if prompts and (all(isinstance(p, str) for p in prompts) or all(map(_is_ids, prompts))):
        return prompts
    raise ValueError(
        "expected a text, a list of texts, a list of token ids, or a list of such lists, none of "
        "them empty but a text"
    )


def _is_ids(value: Any) -> bool:
    """Whether it is token ids, the first of them perhaps null."""
    if not isinstance(value, list) or not value:
        return False
    ids = value[1:] if value[0] is None else value
    return all(type(id_) is int for id_ in ids)


def _stops(value: Any) -> tuple[str, ...]:
    stops = value if isinstance(value, list) else [value]
    if not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError("expected a text or a list of texts, none of them empty")
    if len(stops) > 16:
        raise ValueError(f"found {len(stops)} texts, expected at most 16")
    return tuple(stops)


def _count_of_records(value: Any, info: pydantic.ValidationInfo) -> int | None:
    if isinstance(value, bool):
        assert isinstance(info.context, Limits)
        # A client that names no number is not refused for one.
        return min(DEFAULT_TOP, info.context.max_top) if value else None
    if isinstance(value, int) and value >= 0:
        return value
    raise ValueError("expected true, false, or how many alternatives to list, 0 or more")


TokenIdList = Annotated[tuple[int, ...], Field(strict=False)]
_Tokens = Annotated[TokenIdList, _at_most("max_top")]
_Alternatives = Annotated[NonNegativeInt, _at_most("max_top")]
_Records = Annotated[Any, AfterValidator(_count_of_records), _at_most("max_top")]
_Bias = Annotated[float, Field(ge=-100.0, le=100.0)]
# The keys of a JSON object are texts.
_Biases = Annotated[dict[Annotated[int, Field(strict=False)], _Bias], _at_most("max_top")]


class CompletionRequest(Section):
    """The fields of a request that have an effect here.

    Attributes:
      prompt: always a list of prompts.
      records: how many alternatives the records list; None for no records.
    """

    prompt: Annotated[Any, AfterValidator(_prompts), _at_most("max_prompts")]
    model: str | None = None
    max_tokens: Annotated[NonNegativeInt, _at_most("max_tokens")] = 16
    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: TopK = 0
    min_p: Probability = 0.0
    logit_bias: _Biases = Field(default_factory=dict)
    n: Annotated[PositiveInt, _at_most("max_n")] = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    logprobs: _Alternatives | None = None
    prompt_logprobs: _Alternatives | None = None
    records: _Records = None
    logprob_token_ids: _Tokens = ()
    echo: bool = False
    stop: Annotated[Any, AfterValidator(_stops)] = ()
    stop_token_ids: _Tokens = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: NonNegativeInt = 0
    return_token_ids: bool = False
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    user: str | None = None

    @pydantic.model_validator(mode="after")
    def _check_together(self, info: pydantic.ValidationInfo) -> Self:
        assert isinstance(info.context, Limits)
        samples, most = len(self.prompt) * self.n, info.context.max_queue
        if samples > most:
            found = f"prompts x n, the number of samples, is {samples}"
            raise bad("n", f"{found}: expected at most {most} (the server's --max-queue)")
        if self.min_tokens > self.max_tokens:
            found = f"min_tokens is {self.min_tokens}"
            raise bad("min_tokens", f"{found}: expected at most max_tokens, {self.max_tokens}")
        if self.logprob_token_ids and self.top is None:
            adds = "logprob_token_ids adds to alternatives"
            raise bad("logprob_token_ids", f"{adds}: give logprobs, prompt_logprobs or records")
        if self.stream_options.include_usage and not self.stream:
            remedy = "give stream = true or leave it out"
            raise bad("stream_options", f"stream_options is for streams only; {remedy}")
        return self

    @property
    def top(self) -> int | None:
        """How many alternatives must be known; None if no numbers are asked for."""
        counts = self.logprobs, self.prompt_logprobs, self.records
        return max((count for count in counts if count is not None), default=None)

    @property
    def describes_prompt(self) -> bool:
        """Whether the tokens of the prompt have numbers, if any have."""
        return self.echo or self.prompt_logprobs is not None

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn. If none is drawn, nothing is cut from the distribution either."""
        if self.max_tokens == 0:
            return Sampling()
        seed = secrets.randbits(63) if self.seed is None else self.seed
        filters = self.temperature, self.top_k, self.top_p, self.min_p
        return Sampling(*filters, seed, self.logit_bias or UNSET, self.min_tokens or UNSET)


def parse(body: bytes, limits: Limits) -> CompletionRequest:
    """The request in a body.

    Raises:
      APIError: the body is no request; the message names the field, what was found and what was
        expected.
    """
    return read(CompletionRequest, body, limits)


def read(model: type[Asked], body: bytes, limits: Limits) -> Asked:
    """What a body asks for, as one of these models. Raises an APIError as `parse` does."""
    given, fields = _read_json(body), model.model_fields
    neutral = {**_NEUTRAL, "best_of": given.get("n", 1)}
    values = without_neutral(given, neutral)
    for name in values.keys() - fields.keys():
        code = "unknown_parameter"
        message = f"unknown field {_short(name)}; {_hint(name, [*fields])}"
        if name in neutral:
            code, why = "unsupported_parameter", _WHY_NOT.get(name, "there is no such setting here")
            message = (
                f"{name} = {_short(values[name])}: {why}; leave it out, or give "
                f"{_short(neutral[name])}"
            )
        raise APIError(400, message, param=name, code=code)
    try:
        return model.model_validate(values, context=limits)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(str(part) for part in problem["loc"] if part != "[key]")
        raise bad(name, _explain(name, problem)) from None


def check_ids(name: str, ids: Iterable[int], tokenizer: Tokenizer) -> None:
    """Raise an APIError for an id of the field `name` that the tokenizer does not have."""
    for id_ in ids:
        if not 0 <= id_ < tokenizer.vocab_size:
            last = tokenizer.vocab_size - 1
            raise bad(name, f"{name} has the token id {id_}; ids go from 0 to {last}")


def prompt_ids(
    request: CompletionRequest, tokenizer: Tokenizer, context_length: int, limits: Limits
) -> list[TokenIds]:
    """The token ids of each prompt; `Decoder.check` checks that the model has the prompt's ids.

    A prompt that nothing is drawn after may be longer than the context.

    Raises:
      APIError: a prompt is too long, or another field has ids that the model does not have.
      UsageError: the tokenizer has no tokens for a text.
    """
    for name in _IDS:
        check_ids(name, getattr(request, name), tokenizer)
    longest = max(map(len, tokenizer.token_table))
    most = context_length if request.max_tokens else max(context_length, limits.max_prompt)
    prompts: list[TokenIds] = []
    for number, prompt in enumerate(request.prompt):
        ids, size, or_more = prompt, len(prompt), ""
        if isinstance(prompt, str):
            # A text that cannot fit is refused before it is encoded, which could take long.
            size, or_more = -(-len(prompt) // longest), " or more"
            if size <= most:
                ids = encode_prompt(tokenizer, prompt)
                size, or_more = len(ids), ""
        elif prompt[0] is None:
            ids = [*encode_prompt(tokenizer, ""), *prompt[1:]]
        if size > most:
            holds, remedy = f"this model's context holds {context_length}", "shorten it"
            if request.max_tokens == 0:
                holds = f"a text that is only scored may have {most} (the server's --max-prompt)"
            elif size <= limits.max_prompt:
                remedy += ", or give max_tokens = 0 to score it through windows"
            raise APIError(
                400,
                f"prompt {number} has {size} tokens{or_more}, {holds}; {remedy}",
                param="prompt",
                code="context_length_exceeded",
            )
        prompts.append(ids)
    return prompts


def _read_json(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body, parse_constant=_no_constant, object_hook=_without_nulls)
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


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    """A field that is null counts as absent, at any depth."""
    return {name: value for name, value in values.items() if value is not None}


def _no_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number in JSON")


def _hint(name: str, fields: list[str]) -> str:
    """What to write in place of a field that is not there; always something that works."""
    meant = nearest(name, fields)
    hint = f"did you mean {meant}?" if meant else f"fields are {', '.join(fields)}"
    return _ELSEWHERE.get(name, hint)


def _explain(name: str, problem: Any) -> str:
    """One pydantic problem with a field in a person's words."""
    match problem["type"]:
        case "missing":
            return f"{name} is missing; expected the text to continue, or its token ids"
        case "extra_forbidden":
            return f"unknown field {name}"
        case "model_type" | "dict_type":
            reason = "expected an object"
        case "tuple_type":
            reason = "expected a list of token ids"
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
