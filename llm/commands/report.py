"""python -m llm report RUN [RUN ...]: a run as a page, or several compared.

The page shows what was trained on what, the curves, where the time went, texts being learnt and
samples coloured by probability. Without --html it is RUN/report.html; of several runs --html names
it. --serve shows the same page growing while a run trains, to this machine only unless --host says
otherwise.
"""

import json
from pathlib import Path
from typing import Annotated

from pydantic import Field

from llm.commands.flags import CommandLine, InputFiles, OutputFile, argument, parse
from llm.console import say_result, show
from llm.errors import UsageError
from llm.files import write_output
from llm.section import setting


class Options(CommandLine):
    """The command line."""

    runs: InputFiles = argument("RUN", "run directory; several are compared")
    as_json: bool = setting(False, "print every number as one JSON object", flag="json")
    html: OutputFile = setting(None, "write the page here", "FILE")
    png: str = setting("", "write each chart as a picture into this folder", "FOLDER")
    serve: bool = setting(False, "show the page in a browser, growing, until Ctrl-C")
    host: str = setting("127.0.0.1", "address to listen on; 127.0.0.1: this machine only", "HOST")
    port: Annotated[int, Field(ge=0, le=65535)] = setting(8001, "port to listen on; 0: any free")


def main(arguments: list[str]) -> int:
    """Exit codes as in docs/design.md; errors are raised as LLMError."""
    options = parse(Options, arguments)
    from llm.pages.report import gather, report_page
    from llm.run.directory import RunDirectory

    runs = [RunDirectory(Path(path)) for path in options.runs]
    if options.serve:
        if options.as_json or options.html or options.png:
            raise UsageError("--serve shows the page until Ctrl-C: leave out --json, --html, --png")
        from llm.pages.report_server import serve

        serve(runs, options.host, options.port)
        return 0
    html = options.html
    if options.as_json or options.png:
        numbers = gather(runs, whole=True)
        if options.as_json:
            show(f"{json.dumps(numbers)}\n")
        if options.png:
            from llm.pages.report_png import write_pictures

            for path in write_pictures(numbers, Path(options.png)):
                say_result(path)
    elif html is None and len(runs) > 1:
        raise UsageError("several runs have no page of their own: name one with --html FILE")
    elif html is None:
        html = str(runs[0].report)
    if html is not None:
        write_output(html, report_page(gather(runs)).encode(), UsageError)
        say_result(f"{html}: open it in a browser")
    return 0
