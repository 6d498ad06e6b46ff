"""A prepared corpus: its sources, each with the tokens that train and those that are held out."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from llm.errors import DataError, UsageError
from llm.text.documents import Origin
from llm.text.splits import TokenSplit, check_held_out, check_window
from llm.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Source:
    """What one source of a corpus holds.

    Attributes:
      name: of the table [[data.mixture]]; "" if the corpus is no mixture.
      train, validation: the splits; validation is empty for data.validation = "none".
      fingerprint: identifies these tokens; equal for equal content, tokenizer and split.
      origins: the files, with sizes and hashes.
      documents: number of documents that are in the splits.
      text_bytes: size of these documents as UTF-8.
      replaced: how many replacement characters data.errors = "replace" inserted.
      dropped: how many documents were left out, by the reason.
      notes: what a person should know, one sentence each.
    """

    name: str
    train: TokenSplit
    validation: TokenSplit
    fingerprint: str
    origins: tuple[Origin, ...]
    documents: int
    text_bytes: int
    replaced: int
    dropped: dict[str, int]
    notes: tuple[str, ...]

    @property
    def splits(self) -> tuple[TokenSplit, TokenSplit]:
        return self.train, self.validation


@dataclass(frozen=True)
class TokenizedCorpus:
    """A corpus ready to train on.

    Attributes:
      sources: one, or those of the mixture in its order.
      fingerprint: identifies the tokens of all sources.
      folder: the folder that holds all shards.
      notes: what a person should know, one sentence each.
      reused: whether all shards existed before.
    """

    tokenizer: Tokenizer
    sources: tuple[Source, ...]
    fingerprint: str
    folder: Path
    notes: tuple[str, ...]
    reused: bool

    @functools.cached_property
    def train(self) -> TokenSplit:
        """The training tokens of all sources, one source after the other."""
        return TokenSplit(span for source in self.sources for span in source.train.spans)

    @functools.cached_property
    def validation(self) -> TokenSplit:
        """The held-out tokens of all sources."""
        return TokenSplit(span for source in self.sources for span in source.validation.spans)

    @property
    def origins(self) -> tuple[Origin, ...]:
        """The origins of all sources; of a mixture, each named after its source."""
        return tuple(
            replace(origin, name=f"{source.name}/{origin.name}" if source.name else origin.name)
            for source in self.sources
            for origin in source.origins
        )

    def check_windows(self, context_length: int, validation: str) -> None:
        """Raise unless each source has a window to train on, and a token to predict if any is held
        out: `check_window` and `check_held_out`."""
        for source in self.sources:
            with of_source(source.name):
                check_window(source.train, context_length)
                check_held_out(source.validation, validation)

    def check_sizes(self) -> None:
        """Raise a DataError if a shard is not as long as it was: the system gives zeros for the
        tokens that are missing on a page, and ends a process that reads a page without any."""
        for split in (self.train, self.validation):
            for span in split.spans:
                span.stream.check_sizes()

    def why_unreadable(self) -> str:
        """What is wrong with the shards, for a process that the system ends because of them."""
        try:
            self.check_sizes()
        except DataError as error:
            return str(error)
        return (
            f"{self.folder} or another file in memory cannot be read any more: a disk failed, or a "
            "network file system is gone. When it is back, run the same command again"
        )


@contextlib.contextmanager
def of_source(name: str) -> Iterator[None]:
    """Name the source of a mixture in the errors that it raises."""
    try:
        yield
    except (DataError, UsageError) as error:
        if not name:
            raise
        raise type(error)(f"the source {name!r} of data.mixture: {error}") from None
