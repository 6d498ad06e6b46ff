"""python -m llm data-report SOURCE [--html FILE] [--json]: what is in a corpus.

Prints documents, bytes and tokens, duplicates, the rules of quality that documents break, personal
data, and overlap with given evaluation files. --source adds more sources.
"""

import json
from typing import Any

from llm.commands.flags import CommandLine, OutputFile, argument, parse
from llm.commands.shared import counted
from llm.console import say, show
from llm.data_config import DataConfig
from llm.errors import UsageError
from llm.files import write_output
from llm.section import setting


class Options(CommandLine):
    """The command line."""

    first: str = argument("SOURCE", "a file, folder, glob, URL or data set, as data.source")
    source: tuple[str, ...] = setting((), "more sources")
    against: tuple[str, ...] = setting((), "evaluation text to look for in the corpus", "SOURCE")
    tokenizer: str = setting("bytes", "what counts tokens: bytes, gpt2, ...")
    text_field: str = setting("text", "the field of rows that holds the text")
    html: OutputFile = setting(None, "write the report as a page", "FILE")
    as_json: bool = setting(False, "print one JSON object", flag="json")


def main(arguments: list[str]) -> int:
    """Print the report, or one JSON object with --json."""
    options = parse(Options, arguments)

    from llm.measure.corpus import Census
    from llm.pages.data_view import data_page
    from llm.text.cache import cache_root
    from llm.text.documents import Reader
    from llm.text.sources import find_origins
    from llm.text.tokenizer import named_tokenizer

    cache = cache_root("")

    def documents(sources: tuple[str, ...]) -> Any:
        found = find_origins(sources, cache)
        for note in found.notes:
            say(note)
        return Reader("replace", options.text_field, "skip").documents(found.origins)

    against = documents(options.against) if options.against else ()
    held_out = float(DataConfig().validation.partition(":")[2])
    census = Census(
        named_tokenizer(options.tokenizer),
        held_out,
        ((one.name, "".join(one.pieces)) for one in against),
    )
    census.read(documents((options.first, *options.source)))
    if not census.names:
        raise UsageError(f"{options.first} has no document with text; see --text-field")
    report = census.report()
    if options.html:
        page = data_page(report, f"What is in {options.first}")
        write_output(options.html, page.encode(), UsageError)
    show(json.dumps(report) + "\n" if options.as_json else for_people(report))
    return 0


def for_people(report: dict[str, Any]) -> str:
    """The report as lines of text."""
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
    ]
    return "\n".join(lines) + "\n"
