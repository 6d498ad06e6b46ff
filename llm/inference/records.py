r"""Token-probability records: what the model said about every token, as JSON lines.

    run     once: the checkpoint, the tokenizer, how tokens were drawn, how numbers were computed
    token   one for each token, prompt included, in order
    end     after the tokens of each sample: how it ended, and its sums

Natural logarithms; strict JSON in ASCII, without NaN or infinity, so any JSON reader and any way of
splitting lines will do. Numbers are the model's own, not rounded.

Promises beside those of the fields:

- Concatenating `bytes` gives the bytes of all the sample's tokens; concatenating `text` gives the
  end record's `text`. That is the text of all those bytes, U+FFFD standing for what is not UTF-8
  (a character that the sample's end left open is flushed by its last token), cut where a stop
  string begins: the tokens that spell it have their records, with the `text` that stays.
- `top` holds the run's `top` likeliest tokens, then watched ones that are not among them, all in
  rank order. A token is kept by sampling where its rank is at most `kept_tokens`.
- An empty prompt appears as the end of text that stands in its place: token 0 of the prompt, with
  its name, `bytes` [] and `text` "". The first token of a sample has nothing before it: its numbers
  are null and its `top` is empty.
- Where nothing is drawn (`sampling` null), all is kept: kept_mass 1, kept_tokens the vocabulary.
- The end record counts the generated tokens of a sample, and of a scored text all tokens but the
  first: `tokens`, `sum_logprob`, `perplexity` = exp(-sum_logprob / tokens) and `bits_per_byte` =
  -sum_logprob / (ln 2 * bytes of these tokens); the last two are null where there is nothing to
  divide by. A scored text ends by "length": all its tokens are there.

What it is not: a view; view.py shows the same records as a page, paint.py in colour.
"""

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llm.errors import DataError, UsageError

if TYPE_CHECKING:  # reading records must not cost the import of JAX
    from llm.inference.distribution import Prediction
    from llm.inference.filters import Sampling
    from llm.inference.transcript import Token
    from llm.model.gpt import ModelSpec, Params
    from llm.text.tokenizer import Tokenizer

Record = dict[str, Any]

SCHEMA = 1
TOKEN_FIELDS = (
    "type", "sample", "phase", "position", "id", "token", "bytes", "text", "text_offset",
    "byte_offset", "utf8", "logprob", "rank", "entropy", "sampling_logprob", "kept_mass",
    "kept_tokens", "top",
)  # fmt: skip
RUN_FIELDS = ("type", "schema", "checkpoint", "tokenizer", "sampling", "numerics", "top")
END_FIELDS = (
    "type", "sample", "finish", "tokens", "sum_logprob", "perplexity", "bits_per_byte", "text",
)  # fmt: skip
_FIELDS = {"run": RUN_FIELDS, "token": TOKEN_FIELDS, "end": END_FIELDS}
# Records are trees that this file builds: looking for circles in them would take half of the time.
_encode = json.JSONEncoder(allow_nan=False, separators=(",", ":"), check_circular=False).encode


class RecordBuilder:
    """Builds the records of one run; keeps the spelling of each token that it has met."""

    def __init__(self, tokenizer: "Tokenizer"):
        self._tokenizer = tokenizer
        self._spellings: dict[int, tuple[str, list[int]]] = {}

    def run(
        self,
        checkpoint: Mapping[str, Any],
        sampling: "Sampling | None",
        numerics: Mapping[str, Any],
        top: int,
    ) -> Record:
        """The first record.

        Args:
          checkpoint: "run", "step" and "params_sha256".
          numerics: from `numerics_of`.
        """
        tokenizer = self._tokenizer
        drawn = None
        if sampling is not None:
            names = ("temperature", "top_k", "top_p", "min_p", "seed")
            drawn = {name: getattr(sampling, name) for name in names}
        return {
            "type": "run",
            "schema": SCHEMA,
            "checkpoint": {key: checkpoint[key] for key in ("run", "step", "params_sha256")},
            "tokenizer": {
                "name": tokenizer.name,
                "sha256": tokenizer.sha256,
                "vocab_size": tokenizer.vocab_size,
            },
            "sampling": drawn,
            "numerics": dict(numerics),
            "top": min(top, tokenizer.vocab_size),
        }

    def token(self, sample: int, token: "Token") -> Record:
        """One token of a sample."""
        name, data = self._spelling(token.id)
        record = {
            "type": "token",
            "sample": sample,
            "phase": token.phase,
            "position": token.position,
            "id": token.id,
            "token": name,
            "bytes": data,
            "text": token.text,
            "text_offset": token.text_offset,
            "byte_offset": token.byte_offset,
            "utf8": token.utf8,
        }
        said = token.prediction
        return record | (_NO_NUMBERS if said is None else self._numbers(said))

    def end(self, sample: int, tokens: "Sequence[Token]", finish: str, counted: str) -> Record:
        """How a sample ended, and its sums.

        Args:
          tokens: all of the sample.
          counted: the phase whose tokens are summed: "generated", or "prompt" for a scored text.
        """
        summed = [t for t in tokens if t.phase == counted and t.prediction is not None]
        total = math.fsum(t.prediction.logprob for t in summed if t.prediction is not None)
        size = sum(len(self._spelling(t.id)[1]) for t in summed)
        return {
            "type": "end",
            "sample": sample,
            "finish": finish,
            "tokens": len(summed),
            "sum_logprob": total,
            "perplexity": perplexity(-total, len(summed)),
            "bits_per_byte": bits_per_byte(-total, size),
            "text": "".join(token.text for token in tokens),
        }

    def _numbers(self, prediction: "Prediction") -> Record:
        kept_tokens = prediction.kept_tokens
        top = []
        for id_, logprob, rank in prediction.rivals:
            name, data = self._spelling(id_)
            kept = rank <= kept_tokens
            top.append({"id": id_, "token": name, "bytes": data, "logprob": logprob, "kept": kept})
        drawn = prediction.sampling_logprob
        return {
            "logprob": prediction.logprob,
            "rank": prediction.rank,
            "entropy": prediction.entropy,
            # Adding zero turns the -0.0 of a certain draw into 0.0.
            "sampling_logprob": None if drawn is None else drawn + 0.0,
            "kept_mass": prediction.kept_mass,
            "kept_tokens": kept_tokens,
            "top": top,
        }

    def _spelling(self, id_: int) -> tuple[str, list[int]]:
        if id_ not in self._spellings:
            data = list(self._tokenizer.token_bytes(id_))
            self._spellings[id_] = (self._tokenizer.token_name(id_), data)
        return self._spellings[id_]


_NO_NUMBERS: Record = {
    "logprob": None, "rank": None, "entropy": None, "sampling_logprob": None, "kept_mass": None,
    "kept_tokens": None, "top": [],
}  # fmt: skip


def perplexity(total_nats: float, tokens: int) -> float | None:
    """exp(total / tokens); None for no tokens, or where that is beyond a float."""
    try:
        return math.exp(total_nats / tokens) if tokens else None
    except OverflowError:
        return None


def bits_per_byte(total_nats: float, size: int) -> float | None:
    """total / (ln 2 * bytes); None for no bytes."""
    return total_nats / (math.log(2) * size) if size else None


def numerics_of(spec: "ModelSpec", params: "Params", path: str) -> Record:
    """How the numbers are computed.

    Args:
      path: "cached" (decoding with a key/value cache) or "teacher_forced" (whole texts at once).
    """
    import jax

    weight = next(iter(params.values()))
    return {
        "path": path,
        "param_dtype": str(weight.dtype),
        "compute_dtype": spec.compute_dtype,
        "platform": next(iter(weight.devices())).platform,
        "jax": jax.__version__,
    }


def to_line(record: Record) -> str:
    """One line of the file.

    Raises:
      ValueError: a number is NaN or infinite.
    """
    return _encode(record) + "\n"


def read_records(path: str | Path) -> list[Record]:
    """The records of a file, in order: a run record, then token and end records.

    Raises:
      UsageError: there is no such file.
      DataError: it holds something else; the message names the line, and the field that is wrong.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError(f"cannot read the records {path}: {error.strerror}") from None
    if lines[-1] == b"":
        lines.pop()
    records = [_read_line(line, f"{path}, line {n}") for n, line in enumerate(lines, start=1)]
    if not records or records[0]["type"] != "run":
        raise DataError(f"{path} does not begin with a run record; expected {_WRITTEN}")
    return records


_WRITTEN = "a file as `sample.py --probs` and `python -m llm score --probs` write it"


def _read_line(line: bytes, where: str) -> Record:
    try:
        record = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not strict JSON ({error}); was the file cut short?") from None
    kind = record.get("type") if isinstance(record, dict) else None
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise DataError(f"{where}: no record of type 'run', 'token' or 'end': {line[:60]!r}")
    missing = [field for field in _FIELDS[kind] if field not in record]
    if missing:
        raise DataError(f"{where}: the {kind} record lacks {', '.join(missing)}")
    if kind == "run" and record["schema"] != SCHEMA:
        raise DataError(
            f"{where}: records of schema {record['schema']!a}; this program reads {SCHEMA}"
        )
    _check_record(record, kind, where)
    return record


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number in JSON")


def _check_record(record: Record, kind: str, where: str) -> None:
    """Raise a DataError for a field of another type: what shows records relies on them."""
    _check_fields(record, _CHECKS[kind], where)
    if kind == "token":
        for number, entry in enumerate(record["top"]):
            _check_fields(entry, _ALTERNATIVE, where, "top", number)
    if kind == "run":
        for part, checks in _PARTS.items():
            _check_fields(record[part], checks, where, part)


def _check_fields(
    record: Record,
    checks: "Mapping[str, Check]",
    where: str,
    part: str = "",
    number: int | None = None,
) -> None:
    """Of a record, or of a part of one, which may be one of a list."""
    for field, (types, expected, holds) in checks.items():
        value = record.get(field)
        if type(value) in types and (holds is None or value is None or holds(value)):
            continue
        index = "" if number is None else f"[{number}]"
        name = f"{part}{index}.{field}" if part else field
        raise DataError(
            f"{where}: {name} = {json.dumps(value)[:60]}: expected {expected}, in {_WRITTEN}"
        )


class Check(NamedTuple):
    """What the value of a field can be.

    Attributes:
      types: of the value; exact, for JSON's true is no number.
      expected: the same in words.
      holds: what else is asked of it, where it is not null.
    """

    types: tuple[type, ...]
    expected: str
    holds: Callable[[Any], bool] | None = None


_NULL = type(None)
# 1e999 is read as infinity, and an integer may be larger than any float.
_MOST = sys.float_info.max


def _is_bytes(value: list[Any]) -> bool:
    try:
        bytes(value)
    except (TypeError, ValueError):
        return False
    return True


def _one_of(*values: str) -> Check:
    return Check((str,), f"one of {', '.join(values)}", lambda value: value in values)


def _or_null(check: Check) -> Check:
    return Check((*check.types, _NULL), f"{check.expected}, or null", check.holds)


_STRING = Check((str,), "a string")
_INTEGER = Check((int,), "an integer")
_NUMBER = Check((float, int), "a finite number", lambda value: -_MOST <= value <= _MOST)
_LOGPROB = Check(
    (float, int), "a log-probability, finite and at most 0", lambda value: -_MOST <= value <= 0
)
_BYTES = Check((list,), "a list of integers from 0 to 255", _is_bytes)
_OBJECT = Check((dict,), "an object")
_OBJECTS = Check((list,), "a list of objects", lambda value: {*map(type, value)} <= {dict})
_CHECKS: dict[str, dict[str, Check]] = {
    "run": {
        "checkpoint": _OBJECT, "tokenizer": _OBJECT, "sampling": _or_null(_OBJECT),
        "numerics": _OBJECT, "top": _INTEGER,
    },
    "token": {
        "sample": _INTEGER, "phase": _one_of("prompt", "generated"), "position": _INTEGER,
        "id": _INTEGER, "token": _STRING, "bytes": _BYTES, "text": _STRING,
        "text_offset": _INTEGER, "byte_offset": _INTEGER,
        "utf8": _one_of("ok", "open", "continue", "close", "bad"),
        "logprob": _or_null(_LOGPROB), "rank": _or_null(_INTEGER), "entropy": _or_null(_NUMBER),
        "sampling_logprob": _or_null(_NUMBER), "kept_mass": _or_null(_NUMBER),
        "kept_tokens": _or_null(_INTEGER), "top": _OBJECTS,
    },
    "end": {
        "sample": _INTEGER, "finish": _STRING, "tokens": _INTEGER, "sum_logprob": _NUMBER,
        "perplexity": _or_null(_NUMBER), "bits_per_byte": _or_null(_NUMBER), "text": _STRING,
    },
}  # fmt: skip
_ALTERNATIVE = {
    "id": _INTEGER, "token": _STRING, "bytes": _BYTES, "logprob": _LOGPROB,
    "kept": Check((bool, _NULL), "true, false or null"),
}  # fmt: skip
_PARTS = {
    "checkpoint": {"run": _STRING, "step": _INTEGER, "params_sha256": _STRING},
    "tokenizer": {
        "name": _STRING, "sha256": _STRING,
        "vocab_size": Check((int,), "an integer, 1 or more", lambda value: value > 0),
    },
    "numerics": {"path": _or_null(_STRING), "cached_minus_full_nats": _or_null(_NUMBER)},
}  # fmt: skip
