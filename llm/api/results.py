"""Texts with the probability of each of their tokens, as a Python program wants them.

    result.tokens, result.logprobs      typed tokens, and their numbers as numpy arrays
    result.records(), result.write(F)   token-probability records, as the commands write them
    result.html(), result.write_html(F) the page; a notebook shows it by itself
    result.to_pandas()                  one row a token

All of them show one thing, the tokens that the model read or drew. Nothing predicts the first token
of a text: its numbers are None in a token and NaN in an array, and no sum counts it.

What it is not: the model (language_model.py).
"""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from llm.errors import UsageError
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
from llm.pages.view import page, write_page
from llm.text.tokenizer import Ids

if TYPE_CHECKING:
    import pandas

Floats = npt.NDArray[np.float32]

# A page of more tokens than this would make a notebook file of tens of megabytes.
MOST_SHOWN_TOKENS = 10_000
_FRAME_PIXELS = 560


@dataclass(frozen=True, eq=False)
class Call:
    """What the results of one call of `score` or `generate` share.

    Attributes:
      title: heading of their page.
      describe: makes their run record. It is called only if the record is wanted: it may cost a
        pass of the model.
    """

    title: str
    describe: Callable[[], RunRecord]

    @cached_property
    def record(self) -> RunRecord:
        """The run record."""
        return self.describe()


class Shown:
    """What can be written as records, read as a page and taken as a table."""

    def _results(self) -> "Sequence[Result]":
        """The texts, in order."""
        raise NotImplementedError

    @property
    def _title(self) -> str:
        results = self._results()
        return results[0].call.title if results else "No texts"

    def records(self) -> list[Record]:
        """The records as json.loads reads their lines, see `typed_records`."""
        return list(map(as_json, self.typed_records()))

    def typed_records(self) -> list[AnyRecord]:
        """One run record, then the token and end records of each text (docs/records.md).

        Raises:
          UsageError: the results are not of one checkpoint, read or drawn in one way.
        """
        records: list[AnyRecord] = [result.call.record for result in self._results()[:1]]
        for sample, result in enumerate(self._results()):
            if result.call.record != records[0]:
                raise UsageError(
                    "these results are of different checkpoints or settings, and one file of "
                    "records has one run record; write each of them by itself"
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
        return page(self.records(), title=self._title)

    def write_html(self, path: str | Path) -> None:
        """Write the page; a file that is there is replaced.

        Raises:
          UsageError: the file cannot be written.
        """
        write_page(self.records(), Path(path), title=self._title)

    def _repr_html_(self) -> str | None:
        """What a notebook shows: the page in a frame, or its repr (None) for a long text."""
        tokens = sum(len(result.tokens) for result in self._results())
        return framed(self.html()) if tokens <= MOST_SHOWN_TOKENS else None

    def to_pandas(self) -> "pandas.DataFrame":
        """One row a token: the fields of its record, `bytes` as bytes; missing if null.

        Raises:
          UsageError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise UsageError(
                "to_pandas needs pandas, which is not installed: pip install pandas"
            ) from None
        rows = [record for record in self.records() if record["type"] == "token"]
        frame = pandas.DataFrame(rows, columns=fields(TokenRecord)[1:])
        frame["bytes"] = [bytes(row["bytes"]) for row in rows]
        floats = dict.fromkeys(("logprob", "entropy", "sampling_logprob", "kept_mass"), "float64")
        return frame.astype(floats | {"rank": "Int64", "kept_tokens": "Int64"})


@dataclass(frozen=True, eq=False, repr=False)
class Result(Shown):
    """One text, with what the model says of each of its tokens.

    Attributes:
      finish: how it ended, as in an end record.
      call: what it shares with the other results of its call.
      tokens: all tokens in order, the first with None for its numbers.
    """

    finish: str
    call: Call
    tokens: tuple[TokenRecord, ...]

    # The phase of the tokens that the sums count.
    _counted = "prompt"

    @cached_property
    def text(self) -> str:
        """All of the text."""
        return "".join(token.text for token in self.tokens)

    @cached_property
    def ids(self) -> Ids:
        """int32 [T]"""
        return np.array([token.id for token in self.tokens], np.int32)

    @cached_property
    def logprobs(self) -> Floats:
        """float32 [T] in nats: logprobs[t] belongs to tokens[t].

        logprobs[0] is NaN, since nothing predicts the first token. `-np.nansum(logprobs)` are the
        nats of all tokens that are predicted.
        """
        return np.array([token.logprob for token in self.tokens], np.float32)

    @property
    def total_nats(self) -> float:
        """-sum of the logprobs that are counted (never the first); see the class."""
        return 0.0 - self._end.sum_logprob

    @property
    def perplexity(self) -> float | None:
        """exp(total_nats / tokens counted); None for no tokens, or beyond a float."""
        return self._end.perplexity

    @property
    def bits_per_byte(self) -> float | None:
        """total_nats / (ln 2 * bytes of the tokens counted); None for no bytes."""
        return self._end.bits_per_byte

    @cached_property
    def _end(self) -> EndRecord:
        return EndRecord.of(0, self.tokens, self.finish, self._counted)

    def _results(self) -> "Sequence[Result]":
        return [self]


class Score(Result):
    """A given text. Sums count all its tokens but the first, which nothing predicts."""

    def __repr__(self) -> str:
        per_byte = self.bits_per_byte
        rate = f", {per_byte:.4f} bits per byte" if per_byte is not None else ""
        nats = f"{self.total_nats:.2f} nats"
        return f"Score({_shortened(self.text)}, {len(self.tokens):,} tokens, {nats}{rate})"


class Generation(Result):
    """A prompt and its continuation. Sums count the tokens that were drawn.

    `tokens`, `ids`, `logprobs` and `text` begin with the prompt, as records do. An empty prompt is
    an end of text, the first token, which has no text. `finish` is "length", "stop", "end_of_text"
    or "context". A stop string is cut from the texts; the tokens that spell it are there.
    """

    _counted = "generated"

    @cached_property
    def new_tokens(self) -> tuple[TokenRecord, ...]:
        """The tokens that were drawn."""
        return tuple(token for token in self.tokens if token.phase == "generated")

    @cached_property
    def new_text(self) -> str:
        """What the drawn tokens add to the prompt's text."""
        return "".join(token.text for token in self.tokens if token.phase == "generated")

    def __repr__(self) -> str:
        drawn = sum(token.phase == "generated" for token in self.tokens)
        return f"Generation({_shortened(self.text)}, {drawn:,} new tokens, finish={self.finish!r})"


R = TypeVar("R", bound=Result)


class Results(list[R], Shown, Generic[R]):
    """A list of results that is also shown as a whole; records number the texts from 0."""

    def _results(self) -> "Sequence[Result]":
        return self


def framed(document: str) -> str:
    """A document as a frame that stands in another page.

    The frame is sandboxed: its style and script end at the frame, it has no access to the page
    around it, and nothing of that page reaches into it.
    """
    # A frame's links are relative to the page around it, even `#token`. The base has to come before
    # the document's policy, which forbids one.
    based = document.replace("<head>", '<head><base href="about:srcdoc">', 1)
    # In ASCII: if a page were read in another encoding than it was written in, the script would not
    # have its hash.
    escaped = html.escape(based).encode("ascii", "xmlcharrefreplace").decode()
    return (
        f'<iframe sandbox="allow-scripts" srcdoc="{escaped}" width="100%" '
        f'height="{_FRAME_PIXELS}" style="border:0;resize:vertical;overflow:auto" '
        'title="Token probabilities"></iframe>'
    )


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
