r"""Token records in the shape of OpenAI's completions, for programs that read that.

Alternatives are keyed by their spelling there, so tokens that are not UTF-8 by themselves are
spelled `bytes:\xNN`, as OpenAI does: as U+FFFD they would share one key.

Source: https://platform.openai.com/docs/api-reference/completions (`echo`, `logprobs`).
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from llm.inference.records import Record

FINISH = {"length": "length", "context": "length", "stop": "stop", "end_of_text": "stop"}


def openai_completion(records: Sequence[Record], model: str, created: int) -> dict[str, Any]:
    """The records of one run as one completion: a choice for each sample, its prompt echoed.

    Args:
      model: its name.
      created: seconds since 1970.
    """
    tokens: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        if record["type"] == "token":
            tokens[record["sample"]].append(record)
    phases = Counter(record["phase"] for sample in tokens.values() for record in sample)
    return {
        "id": f"cmpl-{created}",
        "object": "text_completion",
        "created": created,
        "model": model,
        "choices": [_choice(end, tokens[end["sample"]]) for end in records if end["type"] == "end"],
        "usage": {
            "prompt_tokens": phases["prompt"],
            "completion_tokens": phases["generated"],
            "total_tokens": phases.total(),
        },
    }


def _choice(end: Record, tokens: Sequence[Record]) -> dict[str, Any]:
    return {
        "text": end["text"],
        "index": end["sample"],
        "logprobs": logprobs_of(tokens),
        "finish_reason": FINISH[end["finish"]],
    }


def logprobs_of(tokens: Sequence[Record], count: int | None = None) -> dict[str, list[Any]]:
    """The `logprobs` of a choice that has these tokens.

    Args:
      count: how many of the likeliest to list, where the records list more.
    """
    return {
        "tokens": [_spelling(token) for token in tokens],
        "token_logprobs": [token["logprob"] for token in tokens],
        "top_logprobs": [_alternatives(token, count) for token in tokens],
        "text_offset": [token["text_offset"] for token in tokens],
    }


def _alternatives(token: Record, count: int | None) -> dict[str, float] | None:
    """The likeliest and, as OpenAI has it, the token itself where it is not among them."""
    if token["logprob"] is None:
        return None
    listed = {_spelling(entry): entry["logprob"] for entry in token["top"][:count]}
    return listed | {_spelling(token): token["logprob"]}


def _spelling(entry: Record) -> str:
    """Of a token record or an entry of its `top`."""
    try:
        bytes(entry["bytes"]).decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry["bytes"])
    return entry["token"]
