"""python -m llm prepare CONFIG [--section.key VALUE ...] [--json]: tokenise, and say what is there.

Prints the documents, the tokens and the bytes per token of each source, those of gpt2 on a sample
of its text, and what was left out. Training with the same settings then finds the tokens prepared.
"""

import json
from typing import Any

from llm.commands.flags import CommandLine, argument, parse
from llm.commands.init_from import source_tokenizer
from llm.commands.shared import counted
from llm.config import Config
from llm.console import say, show
from llm.section import setting


class Options(CommandLine):
    """The command line."""

    lists_settings = True

    config: str = argument("CONFIG", "configuration file")
    as_json: bool = setting(False, "print one JSON object", flag="json")
    settings: Config = Config()


def main(arguments: list[str]) -> int:
    """Print a line for each source, or one JSON object with --json."""
    chosen = parse(Options, arguments)

    from llm.api.preparation import summary
    from llm.run.display import make_display
    from llm.text.shards import prepare

    config = chosen.settings
    with make_display(config.logging.progress) as display:
        own = source_tokenizer(config)
        corpus = prepare(config.data, config.tokenizer, own=own, on_progress=display.prepare)
    for note in corpus.notes:
        say(note)
    found = summary(corpus)
    if chosen.as_json:
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
    return 0


def _beside(sample: dict[str, Any] | None) -> str:
    if sample is None:
        return " (gpt2 is not on this machine to compare)"
    return (
        f" (in {counted(sample['sample_bytes'], 'byte')} of it "
        f"{sample['bytes_per_token']:.3f}, gpt2's {sample['gpt2_bytes_per_token']:.3f})"
    )
