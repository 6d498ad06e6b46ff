r"""OpenAI's completions: how an answer looks, whole or as the events of a stream.

    answer = Answer(request, prompts, served)     NewTokens in, events or one completion out

    openai_completion(records, model, created)    the records of a file as one completion

Answers follow OpenAI's legacy completions, with the additions of vLLM that a request asks for
(`stop_reason`, `token_ids`, `prompt_token_ids`, `prompt_logprobs`) and the field "records".

Sample j of prompt i is choice n i + j and draws with noise (seed, j), as in sample.py. In
records, "sample" is the number of the choice. Without `echo` neither the text of a choice nor its
records include the prompt. `max_tokens` 0 with `echo` scores the prompt: nothing is drawn,
`sampling` is null, and the end record sums the prompt.

A dict of alternatives has their spellings as keys. A token that is not UTF-8 by itself is spelled
`bytes:\xNN`, as OpenAI does: as U+FFFD all such tokens would share one key.

What it is not: the meaning of requests (requests.py), HTTP (server.py), or decoding (engine.py).

Sources: https://platform.openai.com/docs/api-reference/completions
https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html
"""

import itertools
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from llm.inference.decode import NewTokens, Request, TokenIds
from llm.inference.records import (
    Alternative,
    AnyRecord,
    EndRecord,
    Record,
    RunRecord,
    TokenRecord,
    as_json,
)
from llm.serving.requests import CompletionRequest

_FINISH = {"length": "length", "context": "length", "stop": "stop", "end_of_text": "stop"}


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
                stop_ids=request.stop_token_ids,
                keep_stop=request.include_stop_str_in_output,
                ignore_end=request.ignore_eos,
                top=request.top,
                watch=request.logprob_token_ids,
                sample=number * request.n + index,
            )
            for number, ids in enumerate(prompts)
            for index in range(request.n)
        ]
        self._ends: list[NewTokens | None] = [None] * len(self.requests)
        self._tokens: list[list[TokenRecord]] = [[] for _ in self.requests]
        self._prompt_tokens = sum(map(len, prompts))
        self._run: list[Record] = []  # until it is sent
        if request.records is not None:
            drawn = sampling if request.max_tokens else None
            top = min(request.records, served.run.tokenizer.vocab_size)
            self._run.append(as_json(replace(served.run, sampling=drawn, top=top)))
        self._shows_usage = request.stream_options.include_usage
        self._head = _head(secrets.token_hex(12), int(time.time()), served.name)

    @property
    def finished(self) -> bool:
        return None not in self._ends

    def add(self, index: int, new: NewTokens) -> None:
        """Add what a choice got."""
        self._tokens[index] += new.tokens
        self._ends[index] = new if new.finish is not None else None

    def event(self, index: int, new: NewTokens) -> dict[str, Any] | None:
        """The event of a stream for what a choice got; None if it would say nothing."""
        self.add(index, new)
        choice, records = self._part(index, new.tokens)
        counts = self.request.top is not None or self.request.return_token_ids
        says = self._seen(new.tokens) if counts else False
        asked = "prompt_token_ids" in choice or "prompt_logprobs" in choice
        if not (choice["text"] or new.finish or says or asked):
            return None
        return self._said([choice], records) | ({"usage": None} if self._shows_usage else {})

    def last_event(self) -> dict[str, Any] | None:
        """What a stream says after its choices: the usage, if the client asked for it."""
        return self._head | {"choices": [], "usage": self._usage()} if self._shows_usage else None

    def completion(self) -> dict[str, Any]:
        """The whole answer, once all choices are finished."""
        choices, records = zip(*itertools.starmap(self._part, enumerate(self._tokens)), strict=True)
        return self._said(choices, itertools.chain(*records)) | {"usage": self._usage()}

    def _said(self, choices: Sequence[Any], records: Iterable[Record]) -> dict[str, Any]:
        """An answer or an event, whose records begin with the run record unless it was sent."""
        if self.request.records is None:
            return self._head | {"choices": choices}
        run, self._run = self._run, []
        return self._head | {"choices": choices, "records": [*run, *records]}

    def _seen(self, tokens: Sequence[TokenRecord]) -> list[TokenRecord]:
        """Those that the text of a choice has."""
        return [t for t in tokens if self.request.echo or t.phase == "generated"]

    def _part(self, index: int, new: Sequence[TokenRecord]) -> tuple[dict[str, Any], list[Record]]:
        """These tokens of a choice in OpenAI's shape, and their records."""
        request, tokens, end = self.request, self._seen(new), self._ends[index]
        watch = request.logprob_token_ids
        logprobs = None
        if request.logprobs is not None:
            logprobs = _logprobs(tokens, request.logprobs, watch)
        text = "".join(token.text for token in tokens)
        choice = _choice(index, text, logprobs, end.finish if end else None)
        choice |= {"stop_reason": end.stop if end else None} | self._extras(new)
        if request.records is None:
            return choice, []
        records = [as_json(replace(t, top=_listed(t, request.records, watch))) for t in tokens]
        if end is not None and end.finish is not None:
            counted = "generated" if request.max_tokens else "prompt"
            all_tokens = self._seen(self._tokens[index])
            records.append(as_json(EndRecord.of(index, all_tokens, end.finish, counted)))
        return choice, records

    def _extras(self, new: Sequence[TokenRecord]) -> dict[str, Any]:
        """What else a request may ask of a choice. The prompt comes with its first tokens."""
        request, prompt = self.request, [token for token in new if token.phase == "prompt"]
        extras: dict[str, Any] = {}
        if request.return_token_ids:
            extras["token_ids"] = [token.id for token in new if token.phase == "generated"]
        if request.return_token_ids and prompt:
            extras["prompt_token_ids"] = [token.id for token in prompt]
        if request.prompt_logprobs is not None and prompt:
            extras["prompt_logprobs"] = [
                _by_id(token, request.prompt_logprobs, request.logprob_token_ids)
                for token in prompt
            ]
        return extras

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


def _logprobs(
    tokens: Sequence[TokenRecord], count: int | None = None, watch: Collection[int] = ()
) -> dict[str, list[Any]]:
    """The `logprobs` of a choice that has these tokens.

    Args:
      count: how many of the likeliest tokens to list, if the records list more.
      watch: ids that are listed at any rank.
    """
    return {
        "tokens": [_spelling(token) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_alternatives(token, count, watch) for token in tokens],
        "text_offset": [token.text_offset for token in tokens],
    }


def _usage(prompt: int, drawn: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}


def _listed(
    token: TokenRecord, count: int | None, watch: Collection[int]
) -> tuple[Alternative, ...]:
    """The `count` likeliest alternatives, None for all, and those that are watched."""
    return token.top[:count] + tuple(entry for entry in token.top[count:] if entry.id in watch)


def _alternatives(
    token: TokenRecord, count: int | None, watch: Collection[int]
) -> dict[str, float] | None:
    """The likeliest tokens and, as OpenAI has it, the token itself if it is not among them."""
    if token.logprob is None:
        return None
    listed = {_spelling(entry): entry.logprob for entry in _listed(token, count, watch)}
    return listed | {_spelling(token): token.logprob}


def _by_id(token: TokenRecord, count: int, watch: Collection[int]) -> dict[str, Any] | None:
    """The token and its alternatives as vLLM has them in `prompt_logprobs`; null for the first."""
    if token.logprob is None:
        return None
    entries: list[TokenRecord | Alternative] = [token, *_listed(token, count, watch)]
    return {
        str(entry.id): {
            "logprob": entry.logprob,
            "rank": entry.rank,
            "decoded_token": _spelling(entry),
        }
        for entry in entries
    }


def _spelling(entry: TokenRecord | Alternative) -> str:
    """The key of a token."""
    try:
        entry.bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry.byte_values)
    return entry.token
