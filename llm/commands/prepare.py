"""python -m llm prepare CONFIG [--section.key VALUE ...] [--json] [--show N] [--html FILE]:
tokenise, and say what is there.

Prints the documents, the tokens and the bytes per token of each source, those of gpt2 on a sample
of its text, and what was left out. Training with the same settings then finds the tokens prepared.
--show adds the first windows that training would read, with their tokens apart.
"""

import itertools
import json
from typing import TYPE_CHECKING, Any

from pydantic import NonNegativeInt

from llm.commands.flags import CommandLine, OutputFile, argument, parse
from llm.commands.init_from import source_tokenizer
from llm.commands.outputs import check_outputs
from llm.commands.replay import sequences
from llm.commands.shared import counted
from llm.config import Config
from llm.console import say, show
from llm.errors import UsageError
from llm.files import write_output
from llm.section import setting

if TYPE_CHECKING:
    from llm.text.corpus import TokenizedCorpus


class Options(CommandLine):
    """The command line."""

    lists_settings = True

    config: str = argument("CONFIG", "configuration file")
    as_json: bool = setting(False, "print one JSON object", flag="json")
    windows: NonNegativeInt = setting(
        0, "show so many windows as the model will read them", "N", flag="show"
    )
    html: OutputFile = setting(None, "write the windows of --show as a page", "FILE")
    settings: Config = Config()


def main(arguments: list[str]) -> int:
    """Print a line for each source, or one JSON object with --json."""
    chosen = parse(Options, arguments)

    if chosen.html and not chosen.windows:
        raise UsageError("--html shows windows: say how many by --show N")
    check_outputs({"--html": chosen.html} if chosen.html else {}, {"CONFIG": [chosen.config]})
    from llm.api.preparation import summary
    from llm.pages.window_view import in_terminal, windows_page
    from llm.run.display import make_display
    from llm.text.shards import prepare

    config = chosen.settings
    with make_display(config.logging.progress) as display:
        own = source_tokenizer(config)
        corpus = prepare(config.data, config.tokenizer, own=own, on_progress=display.prepare)
    for note in corpus.notes:
        say(note)
    found = summary(corpus)
    windows = _windows(config, corpus, chosen.windows) if chosen.windows else []
    if chosen.html:
        title = f"{counted(len(windows), 'window')} of {chosen.config}"
        page = windows_page(windows, corpus.tokenizer, title)
        write_output(chosen.html, page.encode(), UsageError)
    if chosen.as_json:
        found |= {"windows": windows} if windows else {}
        show(json.dumps(found) + "\n")
        return 0
    for one in found["sources"]:
        left = ", ".join(f"{count:,} {reason}" for reason, count in one["dropped"].items())
        show(
            f"{one['name'] or 'corpus'}: {counted(one['documents'], 'document')}, "
            f"{counted(one['tokens'], 'token')} ({corpus.tokenizer.name}), "
            f"{counted(one['bytes'], 'byte')}, {one['bytes_per_token']:.3f} a token"
            f"{_beside(one['beside_gpt2'])}; left out: {left or 'nothing'}\n"
        )
    if not chosen.html:
        show(in_terminal(windows, corpus.tokenizer))
    return 0


def _windows(config: Config, corpus: "TokenizedCorpus", count: int) -> list[dict[str, Any]]:
    """The windows that training would read first."""
    from llm.text.batches import training_batches

    corpus.check_windows(config.model.context_length, config.data.validation)
    batches = training_batches(config, corpus)
    found = (sequences(corpus, batches, index) for index in itertools.count())
    return list(itertools.islice(itertools.chain.from_iterable(found), count))


def _beside(sample: dict[str, Any] | None) -> str:
    if sample is None:
        return " (gpt2 is not on this machine to compare)"
    return (
        f" (in {counted(sample['sample_bytes'], 'byte')} of it "
        f"{sample['bytes_per_token']:.3f}, gpt2's {sample['gpt2_bytes_per_token']:.3f})"
    )
