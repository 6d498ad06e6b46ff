"""Texts with the probability of each of their tokens, as a Python program wants them.

    result.tokens, result.logprobs      typed tokens, and their numbers as numpy arrays
    result.records(), result.write(F)   token-probability records, as the commands write them
    result.html(), result.write_html(F) the page; a notebook shows it by itself
    result.to_pandas()                  one row a token

All of them show the tokens that the model read or drew. Nothing predicts the first token of a text:
its numbers are None in a token and NaN in an array, and no sum counts it. language_model.py makes
the results.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from llm.errors import UsageError, needing
from llm.files import write_output
from llm.inference.records import (
    AnyRecord,
    EndRecord,
    Record,
    RunRecord,
    TokenRecord,
    as_json,
    fields,
    to_line,
)
from llm.pages.document import framed
from llm.pages.view import page
from llm.text.tokenizer import Ids

if TYPE_CHECKING:
    import pandas

Floats = npt.NDArray[np.float32]

# A notebook keeps each page that it shows, so the page of a longer text is not shown by itself.
MOST_SHOWN_TOKENS = 10_000


@dataclass(frozen=True, eq=False)
class Call:
    """The parts that all results of one call of `score` or `generate` share.

    Attributes:
      title: the heading of their page.
      record: returns their run record. It is called only when the record is needed, since it may
        cost a pass of the model.
    """

    title: str
    record: Callable[[], RunRecord]


class Shown:
    """Results that can be written as records, read as a page and taken as a table."""

    def _results(self) -> "Sequence[Result]":
        """The texts, in order."""
        raise NotImplementedError

    def records(self) -> list[Record]:
        """The records as json.loads reads their lines, see `typed_records`."""
        return list(map(as_json, self.typed_records()))

    def typed_records(self) -> list[AnyRecord]:
        """One run record, then the token and end records of each text (docs/records.md).

        Raises:
          UsageError: the results come from different checkpoints or settings.
        """
        records: list[AnyRecord] = [result.call.record() for result in self._results()[:1]]
        for sample, result in enumerate(self._results()):
            if result.call.record() != records[0]:
                raise UsageError(
                    "these results come from different checkpoints or settings, and a file of "
                    "records has one run record; write each result to its own file"
                )
            records += (replace(token, sample=sample) for token in result.tokens)
            records.append(EndRecord.of(sample, result.tokens, result.finish, result._counted))
        return records

    def write(self, path: str | Path) -> None:
        """Write the records as JSON lines; a file that is there is replaced.

        Raises:
          UsageError: the file cannot be written.
        """
        content = "".join(map(to_line, self.typed_records())).encode("ascii")
        write_output(path, content, UsageError)

    def html(self) -> str:
        """The page, one self-contained HTML document."""
        results = self._results()
        return page(self.records(), title=results[0].call.title if results else "No texts")

    def write_html(self, path: str | Path) -> None:
        """Write the page; a file that is there is replaced.

        Raises:
          UsageError: the file cannot be written.
        """
        write_output(path, self.html().encode(), UsageError)

    def _repr_html_(self) -> str | None:
        """The page in a frame, for a notebook; None for a long text, which shows as its repr."""
        tokens = sum(len(result.tokens) for result in self._results())
        return framed(self.html()) if tokens <= MOST_SHOWN_TOKENS else None

    def to_pandas(self) -> "pandas.DataFrame":
        """One row for each token: the fields of its record, with `bytes` as bytes.

        Raises:
          UsageError: pandas is not installed.
        """
        with needing("to_pandas", "pandas"):
            import pandas
        rows = [record for record in self.records() if record["type"] == "token"]
        frame = pandas.DataFrame(rows, columns=fields(TokenRecord)[1:])
        frame["bytes"] = [bytes(row["bytes"]) for row in rows]
        floats = dict.fromkeys(("logprob", "entropy", "sampling_logprob", "kept_mass"), "float64")
        return frame.astype(floats | {"rank": "Int64", "kept_tokens": "Int64"})


@dataclass(frozen=True, eq=False, repr=False)
class Result(Shown):
    """One text, with the model's numbers for each of its tokens.

    Attributes:
      finish: how it ended, as in an end record.
      call: the parts that it shares with the other results of its call.
      tokens: all tokens in order, the first with None for its numbers.
    """

    finish: str
    call: Call
    tokens: tuple[TokenRecord, ...]

    # The phase of the tokens that the sums count.
    _counted = "prompt"

    @cached_property
    def text(self) -> str:
        """The whole text."""
        return "".join(token.text for token in self.tokens)

    @cached_property
    def ids(self) -> Ids:
        """int32 [T]"""
        return np.array([token.id for token in self.tokens], np.int32)

    @cached_property
    def logprobs(self) -> Floats:
        """float32 [T] in nats: logprobs[t] belongs to tokens[t].

        logprobs[0] is NaN, since nothing predicts the first token. `-np.nansum(logprobs)` is the
        total of all predicted tokens.
        """
        return np.array([token.logprob for token in self.tokens], np.float32)

    @property
    def total_nats(self) -> float:
        """-sum of the counted logprobs. The class says which are counted; the first never is."""
        return 0.0 - self._end.sum_logprob

    @property
    def perplexity(self) -> float | None:
        """exp(total_nats / tokens counted); None for no tokens, or if it exceeds any float."""
        return self._end.perplexity

    @property
    def bits_per_byte(self) -> float | None:
        """total_nats / (ln 2 * bytes of the tokens counted); None for no bytes."""
        return self._end.bits_per_byte

    @cached_property
    def _end(self) -> EndRecord:
        return EndRecord.of(0, self.tokens, self.finish, self._counted)

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= 60 else self.text[:57] + "..."
        tokens = f"{len(self.tokens):,} tokens, {self._end.tokens:,} counted"
        rate = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits per byte"
        sums = f"{self.total_nats:.2f} nats{rate}, finish={self.finish!r}"
        return f"{type(self).__name__}({text!r}, {tokens}, {sums})"

    def _results(self) -> "Sequence[Result]":
        return [self]


class Score(Result):
    """A given text. Sums count all its tokens but the first, which nothing predicts."""


class Generation(Result):
    """A prompt and its continuation. Sums count the tokens that were drawn.

    `tokens`, `ids`, `logprobs` and `text` begin with the prompt, as records do. An empty prompt
    stands for an end of text: one first token without text. `finish` is "length", "stop",
    "end_of_text" or "context". A stop string is cut from the texts, but its tokens stay.
    """

    _counted = "generated"

    @cached_property
    def new_tokens(self) -> tuple[TokenRecord, ...]:
        """The tokens that were drawn."""
        return tuple(token for token in self.tokens if token.phase == "generated")

    @cached_property
    def new_text(self) -> str:
        """The text that the drawn tokens add to the prompt."""
        return "".join(token.text for token in self.tokens if token.phase == "generated")


R = TypeVar("R", bound=Result)


class Results(list[R], Shown):
    """A list of results that can also be shown as a whole; records number the texts from 0."""

    def _results(self) -> "Sequence[Result]":
        return self
