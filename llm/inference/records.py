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

# ruff: noqa: RUF009  (`_is` makes a field, as dataclasses.field does)
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from llm.errors import DataError, UsageError

if TYPE_CHECKING:  # reading records must not cost the import of JAX
    from llm.inference.distribution import Prediction
    from llm.inference.filters import Sampling
    from llm.inference.transcript import Token
    from llm.model.gpt import ModelSpec, Params
    from llm.text.tokenizer import Tokenizer

Record = dict[str, Any]

SCHEMA = 1
# Records are trees that this file builds: looking for circles in them would take half of the time.
_encode = json.JSONEncoder(allow_nan=False, separators=(",", ":"), check_circular=False).encode


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
_TRUTH = Check((bool, _NULL), "true, false or null")
_OBJECT = Check((dict,), "an object")
_OBJECTS = Check((list,), "a list of objects", lambda value: {*map(type, value)} <= {dict})


def _is(check: Check | None, meaning: str, *, repr: bool = True) -> Any:
    """A field of a record: what its value can be in JSON, and what it means."""
    return dataclasses.field(metadata={"check": check, "meaning": meaning}, repr=repr)


@dataclass(frozen=True, slots=True)
class Alternative:
    """One of the tokens that could have stood at a place.

    Attributes:
      bytes: what the token stands for; b"" for special tokens.
      logprob: log-softmax of the model's raw logits, nats.
      kept: whether sampling could have drawn it; True if nothing is drawn.
      rank: 1 + how many tokens are likelier. A JSON line does not have it.
    """

    id: int = _is(_INTEGER, "token id")
    token: str = _is(_STRING, "its spelling")
    bytes: bytes = _is(_BYTES, "its bytes")
    logprob: float = _is(_LOGPROB, "as in the token's record")
    kept: bool = _is(_TRUTH, "whether the filters kept it")
    rank: int = _is(None, "1 + how many tokens are likelier")


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The first record of a file: the model, and how tokens were drawn and numbers computed."""

    kind: ClassVar[str] = "run"

    schema: int = _is(None, "1")
    checkpoint: Record = _is(_OBJECT, "{`run`, `step`, `params_sha256`}")
    tokenizer: Record = _is(_OBJECT, "{`name`, `sha256`, `vocab_size`}")
    sampling: Record | None = _is(
        _or_null(_OBJECT),
        "{`temperature`, `top_k`, `top_p`, `min_p`, `seed`}; null where text was given "
        "and nothing drawn",
    )
    numerics: Record = _is(
        _OBJECT,
        '{`path`: "cached" or "teacher_forced", `param_dtype`, `compute_dtype`, '
        "`platform`, `jax`}; when decoding not in float32 also "
        "`cached_minus_full_nats`, how far cached decoding was from one whole pass on "
        "this machine",
    )
    top: int = _is(_INTEGER, "how many alternatives each token lists")

    def as_json(self) -> Record:
        """The JSON line as a dict, its fields in order."""
        return _as_json(self)


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """A token, its place in a text and what the model said of it.

    `bytes` are bytes here and a list of integers in a JSON line.
    """

    kind: ClassVar[str] = "token"

    sample: int = _is(_INTEGER, "number of the sample, from 0")
    phase: str = _is(_one_of("prompt", "generated"), '"prompt" or "generated"')
    position: int = _is(_INTEGER, "index in the sample, from 0")
    id: int = _is(_INTEGER, "token id")
    token: str = _is(
        _STRING,
        "its spelling; a byte that is not UTF-8 by itself as `\\xNN`; the name of a special token",
    )
    bytes: bytes = _is(
        _BYTES, "its bytes, from the tokenizer, never from re-encoded text; [] for special tokens"
    )
    text: str = _is(_STRING, 'what it adds to the sample\'s text; "" inside a character')
    text_offset: int = _is(_INTEGER, "characters of the sample before it")
    byte_offset: int = _is(_INTEGER, "bytes of the sample before it")
    utf8: str = _is(
        _one_of("ok", "open", "continue", "close", "bad"),
        '"ok", "open", "continue", "close" or "bad": where its bytes begin and end in '
        "a character (`llm/inference/transcript.py`)",
    )
    logprob: float | None = _is(
        _or_null(_LOGPROB),
        "float32 log-softmax of the model's raw logits over the real vocabulary, at "
        "this token. No sampling flag changes it",
    )
    rank: int | None = _is(_or_null(_INTEGER), "1 + how many tokens are likelier; ties by lower id")
    entropy: float | None = _is(_or_null(_NUMBER), "of the same distribution, nats")
    sampling_logprob: float | None = _is(
        _or_null(_NUMBER),
        "log of the probability it was drawn with, after temperature and filters; 0 "
        "when greedy; null for prompt tokens",
    )
    kept_mass: float | None = _is(
        _or_null(_NUMBER),
        "probability, by the model, of all tokens that the filters kept; 1 where nothing is drawn",
    )
    kept_tokens: int | None = _is(
        _or_null(_INTEGER),
        "how many they kept, the likeliest; the vocabulary where nothing is drawn",
    )
    top: tuple[Alternative, ...] = _is(
        _OBJECTS,
        "the likeliest tokens in rank order, then watched ones that are not among "
        "them, each {`id`, `token`, `bytes`, `logprob`, `kept`}; the token itself may "
        "be absent",
        repr=False,
    )

    @property
    def probability(self) -> float | None:
        """exp(logprob)"""
        return None if self.logprob is None else math.exp(self.logprob)


@dataclass(frozen=True, slots=True)
class EndRecord:
    """How a sample ended, and its sums."""

    kind: ClassVar[str] = "end"

    sample: int = _is(_INTEGER, "number of the sample")
    finish: str = _is(_STRING, '"length", "stop", "end_of_text" or "context"')
    tokens: int = _is(
        _INTEGER, "tokens counted: the generated ones, or of a scored text all but the first"
    )
    sum_logprob: float = _is(_NUMBER, "sum of their `logprob`")
    perplexity: float | None = _is(
        _or_null(_NUMBER), "exp(-sum_logprob / tokens); null for no tokens"
    )
    bits_per_byte: float | None = _is(
        _or_null(_NUMBER), "-sum_logprob / (ln 2 x their bytes); null for no bytes"
    )
    text: str = _is(
        _STRING, "the text of the sample, prompt included, cut where a stop string begins"
    )

    def as_json(self) -> Record:
        """The JSON line as a dict, its fields in order."""
        return _as_json(self)


def _as_json(record: RunRecord | EndRecord) -> Record:
    names = _FIELDS[record.kind]
    return {"type": record.kind} | {name: getattr(record, name) for name in names[1:]}


def _names(record: type) -> tuple[str, ...]:
    return ("type", *(each.name for each in fields(record)))


def _checks(record: type) -> dict[str, Check]:
    checks = {each.name: each.metadata["check"] for each in fields(record)}
    return {name: check for name, check in checks.items() if check is not None}


RUN_FIELDS, TOKEN_FIELDS, END_FIELDS = map(_names, (RunRecord, TokenRecord, EndRecord))
_FIELDS = {"run": RUN_FIELDS, "token": TOKEN_FIELDS, "end": END_FIELDS}
_CHECKS = {each.kind: _checks(each) for each in (RunRecord, TokenRecord, EndRecord)}
_ALTERNATIVE = _checks(Alternative)
_PARTS = {
    "checkpoint": {"run": _STRING, "step": _INTEGER, "params_sha256": _STRING},
    "tokenizer": {
        "name": _STRING, "sha256": _STRING,
        "vocab_size": Check((int,), "an integer, 1 or more", lambda value: value > 0),
    },
    "numerics": {"path": _or_null(_STRING), "cached_minus_full_nats": _or_null(_NUMBER)},
}  # fmt: skip


def table(record: type[RunRecord] | type[TokenRecord] | type[EndRecord]) -> str:
    """The fields of a record as the Markdown table of docs/records.md."""
    rows = [("type", f'"{record.kind}"')]
    rows += [(each.name, each.metadata["meaning"]) for each in fields(record)]
    lines = [f"| `{name}` | {meaning} |\n" for name, meaning in rows]
    return "".join(["| field | meaning |\n|---|---|\n", *lines])


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
        return RunRecord(
            schema=SCHEMA,
            checkpoint={key: checkpoint[key] for key in ("run", "step", "params_sha256")},
            tokenizer={
                "name": tokenizer.name,
                "sha256": tokenizer.sha256,
                "vocab_size": tokenizer.vocab_size,
            },
            sampling=drawn,
            numerics=dict(numerics),
            top=min(top, tokenizer.vocab_size),
        ).as_json()

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

    def typed(self, sample: int, token: "Token") -> TokenRecord:
        """The same record as a Python program wants it.

        Built from the JSON line: a dump writes a line for every token, and a frozen dataclass for
        each alternative on the way would cost more than the line itself.
        """
        record = self.token(sample, token)
        rivals = () if token.prediction is None else token.prediction.rivals
        top = tuple(
            Alternative(**entry | {"bytes": bytes(entry["bytes"])}, rank=rival.rank)
            for entry, rival in zip(record["top"], rivals, strict=True)
        )
        values = {name: record[name] for name in TOKEN_FIELDS[1:]}
        return TokenRecord(**values | {"bytes": bytes(record["bytes"]), "top": top})

    def end(self, sample: int, tokens: "Sequence[Token]", finish: str, counted: str) -> Record:
        """How a sample ended, and its sums.

        Args:
          tokens: all of the sample.
          counted: the phase whose tokens are summed: "generated", or "prompt" for a scored text.
        """
        summed = [t for t in tokens if t.phase == counted and t.prediction is not None]
        total = math.fsum(t.prediction.logprob for t in summed if t.prediction is not None)
        size = sum(len(self._spelling(t.id)[1]) for t in summed)
        return EndRecord(
            sample=sample,
            finish=finish,
            tokens=len(summed),
            sum_logprob=total,
            perplexity=perplexity(-total, len(summed)),
            bits_per_byte=bits_per_byte(-total, size),
            text="".join(token.text for token in tokens),
        ).as_json()

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
