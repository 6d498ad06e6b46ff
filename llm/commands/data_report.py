"""python -m llm data-report SOURCE ... [--run RUN] [--html FILE] [--json]: what is in a corpus.

Prints documents, bytes and tokens, duplicates, the rules of quality that documents break, personal
data, and text that training shares with what data.validation holds out by default, and with given
evaluation files. With --run, also how well the model predicts documents: some of them, chosen by
the hash of their text, each from its first two windows. The run's tokenizer counts tokens then. The
worst and the best are shown on a second page beside that of --html.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.commands.flags import CommandLine, InputFiles, OptionalInput, OutputFile, argument, parse
from llm.commands.outputs import check_outputs, same_file
from llm.commands.shared import RunOptions, counted, scored_page
from llm.console import escaped, say, show
from llm.data_config import DataConfig
from llm.errors import UsageError
from llm.files import write_output
from llm.section import Positive, setting

if TYPE_CHECKING:
    from llm.text.documents import Document

TOP = 5  # alternatives of each token on the second page
PRINTED = 3  # documents that the model predicts worst, and best


class Options(CommandLine):
    """The command line."""

    source: InputFiles = argument(
        "SOURCE ...", "files, folders, globs, URLs, data sets: data.source"
    )
    against: InputFiles = setting((), "evaluation text to look for in the corpus", "SOURCE")
    tokenizer: str = setting("bytes", "what counts tokens: bytes, gpt2, ...")
    text_field: str = setting("text", "the field of rows that holds the text")
    run: OptionalInput = setting(None, "a model that scores documents", "RUN")
    scored: Positive = setting(300, "documents that the model scores, at most")
    html: OutputFile = setting(None, "write the report as a page", "FILE")
    as_json: bool = setting(False, "print one JSON object", flag="json")


def main(arguments: list[str]) -> int:
    """Print the report, or one JSON object with --json."""
    options = parse(Options, arguments)
    if options.run and "tokenizer" in options.model_fields_set:
        raise UsageError("--tokenizer and --run: the run's tokenizer counts; leave --tokenizer out")
    opened = RunOptions(run=options.run).open() if options.run else None

    from llm.measure.corpus import Census
    from llm.pages.data_view import data_page, worst_and_best
    from llm.text.splits import is_held_out
    from llm.text.tokenizer import named_tokenizer

    sampled = None
    if opened:
        from llm.inference.score import Scorer
        from llm.measure.scored import Sampled

        scorer = Scorer(opened.spec, opened.params, opened.tokenizer)
        sampled = Sampled(scorer, options.scored)
    pages = [options.html] if options.html else []
    if pages and options.run:
        pages.append(str(Path(pages[0]).with_suffix(".documents.html")))
        check_outputs({"--html and --run": pages[1]}, {"--run": [options.run]})
    share = float(DataConfig().validation.partition(":")[2])
    corpus = Texts(options.source, options.text_field, pages)
    census = Census(
        opened.tokenizer if opened else named_tokenizer(options.tokenizer),
        share,
        Texts(options.against, options.text_field, pages) if options.against else (),
        (one for one in corpus if is_held_out(one.sha256, share)),
        sampled,
    )
    census.read(corpus)
    if not census.documents:
        raise UsageError(f"{' '.join(options.source)} has no document with text; see --text-field")
    report = census.report() | {"model": None}
    if opened and sampled:
        ranked = sorted(sampled.scored(), key=lambda one: -one[0]["bits_per_byte"])
        report["model"] = opened.checkpoint | {"documents": [said for said, _ in ranked]}
        if pages:
            title = f"Documents that {opened.run}, step {opened.step}, predicts worst and best"
            shown = [ids for _, ids in worst_and_best(ranked)]
            page = scored_page(opened, dataclasses.replace(scorer, top=TOP), shown, title)
            write_output(pages[1], page.encode(), UsageError)
    if options.html:
        title = f"What is in {', '.join(options.source)}"
        page = data_page(report, title, Path(pages[-1]).name)
        write_output(options.html, page.encode(), UsageError)
    show(json.dumps(report) + "\n" if options.as_json else for_people(report))
    return 0


class Texts:
    """The documents of sources, each time that it is iterated.

    Raises:
      UsageError: one of `pages`, which will be written, is a document.
    """

    def __init__(self, sources: Sequence[str], text_field: str, pages: Sequence[str] = ()):
        from llm.text.cache import cache_root
        from llm.text.sources import find_origins

        found = find_origins(sources, cache_root(""))
        for note in found.notes:
            say(note)
        self._origins, self._text_field = found.origins, text_field
        for page in filter(os.path.exists, pages):
            if any(same_file(one.location, page) for one in self._origins):
                raise UsageError(f"--html would write over {page}, a document of the corpus")

    def __iter__(self) -> "Iterator[Document]":
        from llm.text.documents import Reader

        return Reader("replace", self._text_field, "skip").documents(self._origins)


def for_people(report: dict[str, Any]) -> str:
    """The report as lines of text."""
    from llm.pages.data_view import worst_and_best

    lines = [
        f"{counted(report['documents'], 'document')}, {counted(report['bytes'], 'byte')}, "
        f"{counted(report['tokens'], 'token')} ({report['tokenizer']['name']})",
        f"duplicates: {report['exact_duplicates']:,} exact, "
        f"{report['near_duplicate_documents']:,} near",
        *(f"personal data, {kind}: {n:,}" for kind, n in report["personal_data"].items() if n),
        *(
            f"{counted(one['documents'], 'document')} against {rule}, {one['expected']}"
            for rule, one in report["quality"].items()
            if one["documents"]
        ),
        *(
            f"{one['name']}: {one['found']} of {one['grams']} runs of words are in {one['where']}"
            for one in report["against"]
        ),
        f"held out by default: {counted(report['split']['held out'], 'document')}; "
        f"{len(report['validation']):,} share text with training",
    ]
    documents = (report["model"] or {}).get("documents", ())
    if documents:
        lines.append(f"bits per byte under the model, {counted(len(documents), 'document')}:")
        lines += [
            f"  {one['bits_per_byte']:.3f}  {escaped(one['document'])}"
            for one in worst_and_best(documents, PRINTED)
        ]
    return "\n".join(lines) + "\n"
