"""What several commands share: they open a model, read texts, and send records where flags say."""

import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import NonNegativeInt

from llm.commands.flags import CommandLine, InputFile, OutputFile, OutputStream, argument
from llm.console import say
from llm.console import show as show_text
from llm.errors import UsageError
from llm.files import write_output
from llm.inference.records import (
    DEFAULT_TOP,
    AnyRecord,
    EndRecord,
    RunRecord,
    as_json,
    to_line,
)
from llm.runtime import prepare_process
from llm.section import setting

if TYPE_CHECKING:
    from llm.config import Config
    from llm.inference.score import Scorer, TokenIds
    from llm.run.directory import RunDirectory
    from llm.run.open import OpenedModel
    from llm.text.corpus import TokenizedCorpus
    from llm.text.tokenizer import Tokenizer


class RunOptions(CommandLine):
    """The run that a command reads, and its checkpoint."""

    run: InputFile = argument("RUN", "run directory")
    step: NonNegativeInt | None = setting(None, "checkpoint to use; by default the newest")

    def open(self) -> "OpenedModel":
        """The model of the run, in a process that is prepared for JAX.

        Each warning, such as that a damaged step is passed over, is one line on stderr.
        """
        prepare_process()  # before JAX is imported
        from llm.run.open import open_model

        def warn(message: Warning | str, *_: Any, **__: Any) -> None:
            say(f"WARNING: {message}")

        with warnings.catch_warnings():
            warnings.showwarning = warn
            return open_model(self.run, self.step)


class ExportOptions(RunOptions):
    """How a checkpoint is written for other programs."""

    dtype: Literal["float32", "bfloat16", "float16"] = setting(
        "float32", "numbers of the weights that are written"
    )
    as_json: bool = setting(False, "print what was made as one JSON object", flag="json")


class RecordOptions(RunOptions):
    """What the records list, and where they go."""

    probs: OutputStream = setting(
        None, "write the record of every token as JSON lines; - for standard output", "FILE"
    )
    html: OutputFile = setting(None, "write the records as a page", "FILE")
    color: bool = setting(False, "paint tokens by probability, on a terminal")
    top: NonNegativeInt = setting(DEFAULT_TOP, "alternatives in each record")
    watch: tuple[int, ...] = setting((), "token ids that each record lists at any rank", "ID")

    @property
    def paints(self) -> bool:
        """Whether tokens are painted. Colour is for a terminal: elsewhere --color does nothing."""
        return self.color and self.probs != "-" and sys.stdout.isatty()

    @property
    def shows_numbers(self) -> bool:
        """Whether anything shows the probabilities, so that they must be computed."""
        return bool(self.probs or self.html or self.paints)

    def emit(
        self,
        records: Iterable[AnyRecord],
        title: str,
        *,
        show: Callable[[Iterable[AnyRecord]], Iterable[str]] | None = None,
        encode: Callable[[list[AnyRecord]], str] | None = None,
    ) -> None:
        """Send records, each as soon as it comes, to the file, the terminal and the page.

        Args:
          title: heading of the page.
          show: makes the text for the terminal, unless it is painted or has the records themselves.
          encode: makes the content of the file from all records, in place of a line for each.
        """
        from llm.pages.paint import paint_stream
        from llm.pages.view import page

        kept: list[AnyRecord] = []
        with output(self.probs) as write:

            def sent(record: AnyRecord) -> AnyRecord:
                if self.probs and encode is None:
                    write(to_line(record))
                if self.html or encode is not None:
                    kept.append(record)
                return record

            records = map(sent, records)
            shown = show(records) if show else None
            if self.paints:
                shown = paint_stream(map(as_json, records))
            if shown is None or self.probs == "-":
                deque(records, maxlen=0)
            else:
                send = partial(print, end="", flush=True) if self.paints else show_text
                for text in shown:
                    send(text)
            if encode is not None:
                write(encode(kept))
        if self.html:
            content = page(list(map(as_json, kept)), title=title).encode()
            write_output(self.html, content, UsageError)


def scored_page(
    opened: "OpenedModel", scorer: "Scorer", texts: "Iterable[TokenIds]", title: str
) -> str:
    """The probability page of some texts."""
    from llm.inference.numerics import numerics_of
    from llm.pages.view import page

    numerics = numerics_of(opened.spec, opened.params, "teacher_forced")
    records: list[AnyRecord] = [
        RunRecord.of(opened.checkpoint, opened.tokenizer, None, numerics, scorer.top)
    ]
    for sample, tokens in enumerate(scorer.score(texts)):
        records += [*tokens, EndRecord.of(sample, tokens, "length", counted="prompt")]
    return page(list(map(as_json, records)), title=title)


def corpus_of(run: "RunDirectory", config: "Config") -> "TokenizedCorpus":
    """The corpus that a run was trained on, prepared once more if its shards are gone.

    Raises:
      DataError: it is not there, or not what it was.
    """
    from llm.run.provenance import check_corpus, kept_tokenizer
    from llm.text.shards import prepare

    corpus = prepare(config.data, config.tokenizer, own=kept_tokenizer(run, config))
    check_corpus(run, corpus)
    return corpus


def read_file(path: str) -> tuple[str, bytes]:
    """(name, content) of a file of text."""
    try:
        return path, Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the file {path}: {error.strerror}") from None


def read_input() -> bytes:
    """The content of standard input."""
    try:
        return sys.stdin.buffer.read()
    except (AttributeError, OSError) as error:  # if it is closed, sys.stdin is None
        reason = getattr(error, "strerror", None) or "it is closed"
        raise UsageError(f"cannot read standard input: {reason}") from None


def as_text(data: bytes, tokenizer: "Tokenizer", name: str) -> str:
    """Bytes as text. Only the `bytes` tokenizer takes bytes that are not UTF-8, as they are."""
    if tokenizer.name == "bytes":
        return data.decode("utf-8", "surrogateescape")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{name} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; only a "
            f"model of the 'bytes' tokenizer can read it, this one has {tokenizer.name!r}"
        ) from None


def counted(number: int, noun: str) -> str:
    """ "1 token", "1,024 tokens" """
    return f"{number:,} {noun}{'s' * (number != 1)}"


@contextmanager
def writing(path: str) -> Iterator[None]:
    """Turn an error of writing, such as a full disk's, into a UsageError that names the file."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None


@contextmanager
def output(path: str | None) -> "Iterator[Callable[[str], None]]":
    """A function that writes text to a new file; "-" and None are standard output.

    Raises:
      UsageError: the file cannot be written; the function raises it too.
    """
    name = path or "-"
    with writing(name):
        file = sys.stdout
        if name != "-":
            file = open(name, "w", encoding="ascii", newline="\n")  # noqa: SIM115  (closed below)

    def write(text: str) -> None:
        with writing(name):
            file.write(text)

    try:
        yield write
    finally:
        if file is not sys.stdout:
            with writing(name):
                file.close()
