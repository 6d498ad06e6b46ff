r"""Token-probability records: what the model said about every token, as JSON lines.

    run     once: the checkpoint, the tokenizer, how tokens were drawn, how numbers were computed
    token   one for each token, prompt included, in order
    end     after the tokens of each sample: how it ended, and its sums

A `TokenRecord` is the one form of a token with its probabilities: the decoder and the scorer make
it, the Python API returns it, and encoded it is the JSON line, the server's field and the page's
data. The classes below are the schema; docs/records.md has their fields as tables.

Natural logarithms; strict JSON in ASCII, without NaN or infinity, so any JSON reader and any way of
splitting lines will do. Numbers are the model's own, not rounded.

Promises beside those of the fields:

- Concatenating `bytes` gives the bytes of all the sample's tokens; concatenating `text` gives the
  end record's `text`. That is the text of all those bytes, less the one space that some imported
  tokenizers put before a document, which no offset counts; U+FFFD stands for what is not UTF-8
  (a character that the sample's end left open is flushed by its last token), cut where a stop
  string begins: the tokens that spell it have their records, with the `text` that stays.
- `top` holds the run's `top` likeliest tokens, then watched ones that are not among them, all in
  rank order. Sampling keeps a token if its rank is at most `kept_tokens`, unless `logit_bias` or
  `min_tokens` changed the ranking that it draws from; `kept` says it of each token in `top`.
- A beginning of text, if the model was trained with one, is token 0 of every text, with its name,
  `bytes` [] and `text` "". Otherwise an empty prompt appears as the end of text, in the same way.
  The first token of a sample has nothing before it: its numbers are null and its `top` is empty.
- If nothing is drawn (`sampling` null), all is kept: kept_mass 1, kept_tokens the vocabulary.
- The end record counts the generated tokens of a sample, and of a scored text all tokens but the
  first: `tokens`, `sum_logprob`, `perplexity` = exp(-sum_logprob / tokens) and `bits_per_byte` =
  -sum_logprob / (ln 2 * bytes of these tokens); the last two are null if there is nothing to
  divide by. A scored text ends by "length": all its tokens are there.

What it is not: a view; view.py shows the same records as a page, paint.py in colour.
"""

import inspect
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from llm.config import SamplingConfig
from llm.errors import DataError, UsageError

if TYPE_CHECKING:  # numpy, which `--help` does without
    from llm.text.tokenizer import Tokenizer

# A record as json.loads gives it.
Record = dict[str, Any]

# Alternatives that are listed with each token unless somebody says how many.
DEFAULT_TOP = 10

Phase = Literal["prompt", "generated"]
Utf8 = Literal["ok", "open", "continue", "close", "bad"]
LogProbability = Annotated[float, Meta(le=0)]
Byte = Annotated[int, Meta(ge=0, le=255)]


class Checkpoint(Struct, frozen=True):
    """The parameters that were asked."""

    run: str
    step: int
    params_sha256: str


class TokenizerIdentity(Struct, frozen=True, omit_defaults=True):
    """The tokenizer that token ids belong to."""

    name: str
    sha256: str
    vocab_size: Annotated[int, Meta(ge=1)]
    lossy: bool = False


class Sampling(Struct, frozen=True):
    """How one sample's tokens are drawn; llm.config.SamplingConfig checks the ranges.

    Attributes:
      logit_bias: token id -> nats added to its logit before the temperature; if any is.
      min_tokens: how many tokens must be drawn before one that ends the sample can be; if any.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    logit_bias: dict[int, float] | UnsetType = UNSET
    min_tokens: int | UnsetType = UNSET

    @classmethod
    def of(cls, config: SamplingConfig) -> "Sampling":
        """The part of a `sample` section that drawing needs."""
        return msgspec.convert(config, cls, from_attributes=True)


class Numerics(Struct, frozen=True, omit_defaults=True):
    """How numbers were computed."""

    path: Literal["cached", "teacher_forced"]
    param_dtype: str = ""
    compute_dtype: str = ""
    platform: str = ""
    jax: str = ""
    cached_minus_full_nats: float | None = None


class RunRecord(Struct, frozen=True, tag_field="type", tag="run"):
    """The first record of a file: the model, and how tokens were drawn and numbers computed.

    Attributes:
      schema: 1
      checkpoint: {`run`, `step`, `params_sha256`}
      tokenizer: {`name`, `sha256`, `vocab_size`}, and `lossy` true if it loses text
      sampling: {`temperature`, `top_k`, `top_p`, `min_p`, `seed`}, and `logit_bias` and
        `min_tokens` if a request has them; null if text was given and nothing was drawn
      numerics: {`path`: "cached" or "teacher_forced", `param_dtype`, `compute_dtype`,
        `platform`, `jax`}; when decoding not in float32 also `cached_minus_full_nats`, how far
        cached decoding was from one whole pass on this machine
      top: how many alternatives each token lists
    """

    schema: Literal[1]
    checkpoint: Checkpoint
    tokenizer: TokenizerIdentity
    sampling: Sampling | None
    numerics: Numerics
    top: int

    @classmethod
    def of(
        cls,
        checkpoint: Mapping[str, Any],
        tokenizer: "Tokenizer",
        sampling: Sampling | None,
        numerics: Numerics,
        top: int,
    ) -> "RunRecord":
        """The record of a model.

        Args:
          checkpoint: with "run", "step" and "params_sha256".
          numerics: from `numerics_of` or `decoding_numerics`.
        """
        return cls(
            1,
            msgspec.convert(checkpoint, Checkpoint),
            TokenizerIdentity(
                tokenizer.name, tokenizer.sha256, tokenizer.vocab_size, tokenizer.lossy
            ),
            sampling,
            numerics,
            min(top, tokenizer.vocab_size),
        )


class _Spelled(Struct, frozen=True, rename={"byte_values": "bytes"}):
    """What has the bytes of a token: integers in JSON, `bytes` in Python."""

    @property
    def bytes(self) -> bytes:
        """The bytes that the token stands for; b"" for special tokens."""
        return bytes(self.byte_values)  # type: ignore[attr-defined]


class Alternative(_Spelled, frozen=True):
    """One of the tokens that could have stood at a place.

    Attributes:
      id: token id
      token: its spelling
      bytes: its bytes
      logprob: as in the token's record
      kept: whether the filters kept it
      rank: 1 + how many tokens are likelier
    """

    id: int
    token: str
    byte_values: tuple[Byte, ...]
    logprob: LogProbability
    kept: bool | None
    rank: int | UnsetType = UNSET


class TokenRecord(_Spelled, frozen=True, tag_field="type", tag="token"):
    r"""A token, its place in a text and what the model said of it.

    Attributes:
      sample: number of the sample, from 0
      phase: "prompt" or "generated"
      position: index in the sample, from 0
      id: token id
      token: its spelling; a byte that is not UTF-8 by itself as `\xNN`; the name of a special
        token
      bytes: its bytes, from the tokenizer, never from re-encoded text; [] for special tokens
      text: what it adds to the sample's text; "" inside a character
      text_offset: characters of the sample before it
      byte_offset: bytes of the sample before it
      utf8: "ok", "open", "continue", "close" or "bad": where its bytes begin and end in a
        character (`llm/inference/transcript.py`)
      logprob: float32 log-softmax of the model's raw logits over the real vocabulary, at this
        token. No sampling flag changes it
      rank: 1 + how many tokens are likelier; ties by lower id
      entropy: of the same distribution, nats
      sampling_logprob: log of the probability it was drawn with, after temperature and filters;
        0 when greedy; null for prompt tokens
      kept_mass: probability, by the model, of all tokens that the filters kept; 1 if nothing is
        drawn
      kept_tokens: how many they kept, the likeliest (with `logit_bias`, by the biased ranking);
        the vocabulary if nothing is drawn
      top: the likeliest tokens in rank order, then watched ones that are not among them, each
        {`id`, `token`, `bytes`, `logprob`, `kept`, `rank`}; the token itself may be absent
    """

    sample: int
    phase: Phase
    position: int
    id: int
    token: str
    byte_values: tuple[Byte, ...]
    text: str
    text_offset: int
    byte_offset: int
    utf8: Utf8
    logprob: LogProbability | None
    rank: int | None
    entropy: float | None
    sampling_logprob: float | None
    kept_mass: float | None
    kept_tokens: int | None
    top: tuple[Alternative, ...]

    @property
    def probability(self) -> float | None:
        """exp(logprob)"""
        return None if self.logprob is None else math.exp(self.logprob)


# The last fields of a token's record, from `logprob` on.
Numbers = tuple[Any, ...]
NO_NUMBERS: Numbers = (None, None, None, None, None, None, ())


class EndRecord(Struct, frozen=True, tag_field="type", tag="end"):
    """How a sample ended, and its sums.

    Attributes:
      sample: number of the sample
      finish: "length", "stop", "end_of_text" or "context"
      tokens: tokens counted: the generated ones, or of a scored text all but the first
      sum_logprob: sum of their `logprob`
      perplexity: exp(-sum_logprob / tokens); null for no tokens
      bits_per_byte: -sum_logprob / (ln 2 x their bytes); null for no bytes
      text: the text of the sample, prompt included, cut where a stop string begins
    """

    sample: int
    finish: str
    tokens: int
    sum_logprob: float
    perplexity: float | None
    bits_per_byte: float | None
    text: str

    @classmethod
    def of(
        cls, sample: int, tokens: Sequence[TokenRecord], finish: str, counted: str
    ) -> "EndRecord":
        """The record of a sample.

        Args:
          tokens: all of the sample.
          counted: the phase whose tokens are summed: "generated", or "prompt" for a scored text.
        """
        summed = [t for t in tokens if t.phase == counted and t.logprob is not None]
        total = math.fsum(t.logprob for t in summed if t.logprob is not None)
        return cls(
            sample,
            finish,
            tokens=len(summed),
            sum_logprob=total,
            perplexity=perplexity(-total, len(summed)),
            bits_per_byte=bits_per_byte(-total, sum(map(text_bytes, summed))),
            text="".join(token.text for token in tokens),
        )


AnyRecord = RunRecord | TokenRecord | EndRecord


def fields(record: type[Struct]) -> tuple[str, ...]:
    """The names of a record's fields in JSON, in order."""
    return ("type", *(field.encode_name for field in msgspec.structs.fields(record)))


def table(record: type[Struct]) -> str:
    """The fields of a record as the Markdown table of docs/records.md, from its docstring."""
    described = re.findall(r"^  (\w+): (.+(?:\n    .+)*)", inspect.getdoc(record) or "", re.M)
    rows = [("type", f'"{record.__struct_config__.tag}"'), *described]
    lines = [f"| `{name}` | {' '.join(meaning.split())} |\n" for name, meaning in rows]
    return "".join(["| field | meaning |\n|---|---|\n", *lines])


class Spellings(dict[int, tuple[str, tuple[int, ...]]]):
    """The name and the bytes of each token that was met, as records have them."""

    def __init__(self, tokenizer: "Tokenizer"):
        super().__init__()
        self.tokenizer = tokenizer

    def __missing__(self, id_: int) -> tuple[str, tuple[int, ...]]:
        spelling = self.tokenizer.token_name(id_), tuple(self.tokenizer.token_bytes(id_))
        self[id_] = spelling
        return spelling


def text_bytes(token: TokenRecord) -> int:
    """How many bytes of the text a token is: all but the space that its tokenizer put before it."""
    first = not token.text_offset and token.byte_values[:1] == (32,)
    return len(token.byte_values) - (first and not token.text.startswith(" "))


def perplexity(total_nats: float, tokens: int) -> float | None:
    """exp(total / tokens); None for no tokens, or if that is beyond a float."""
    try:
        return math.exp(total_nats / tokens) if tokens else None
    except OverflowError:
        return None


def bits_per_byte(total_nats: float, size: int) -> float | None:
    """total / (ln 2 * bytes); None for no bytes."""
    return total_nats / (math.log(2) * size) if size else None


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(AnyRecord).decode


def to_line(record: AnyRecord) -> str:
    """One line of the file."""
    text = _encode(record).decode()
    if not text.isascii():
        # Outside strings JSON is ASCII, so that every other character may become an escape.
        text = re.sub("[^\0-\x7f]+", lambda run: json.dumps(run[0])[1:-1], text)
    return text + "\n"


def as_json(record: AnyRecord) -> Record:
    """The record as json.loads would read its line."""
    return cast(Record, msgspec.json.decode(_encode(record)))


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
        return as_json(_decode(line))
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at `$")
        name = f"{place.strip('.`')} = {_value_at(line, place)}: " if place else ""
        raise DataError(f"{where}: {name}{what[0].lower()}{what[1:]}, in {_WRITTEN}") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise DataError(f"{where}: not strict JSON ({error}); was the file cut short?") from None


def _value_at(line: bytes, place: str) -> str:
    """What a line has at a place such as `.top[1].kept`."""
    value = json.loads(line)
    for index, key in re.findall(r"\[(\d+)\]|(\w+)", place):
        value = value[int(index)] if index else value[key]
    return json.dumps(value)[:60]
