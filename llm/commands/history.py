"""python -m llm history RUN --text T [--json] [--html FILE]: a text at each checkpoint of a run.

Scores the text with every checkpoint of the run that is there (checkpoint.keep says how many stay),
so that a row equals `score --step N`. A checkpoint that is damaged or goes away meanwhile is passed
over, and said.
"""

import json
import math
from typing import Any

from rich.cells import set_cell_size

from llm.commands.flags import CommandLine, InputFile, OutputFile, argument, parse
from llm.commands.shared import as_text, counted
from llm.console import escaped, say, show
from llm.errors import CheckpointError, UsageError
from llm.files import write_output
from llm.runtime import prepare_process
from llm.section import setting

# A token's spelling in a table for people, in cells of a terminal: a Chinese character has two.
SPELLING = 14


class Options(CommandLine):
    """The command line."""

    run: InputFile = argument("RUN", "run directory")
    text: str = setting(..., "the text to score")
    as_json: bool = setting(False, "print one JSON object", flag="json")
    html: OutputFile = setting(None, "write the text at each checkpoint as a page", "FILE")


def main(arguments: list[str]) -> int:
    """Print a table, or one JSON object {steps, tokens, logprobs} with --json.

    logprobs[i][t] is of token t at steps[i], nats; the first token has none, null.
    """
    options = parse(Options, arguments)
    prepare_process()  # before JAX is imported
    from pathlib import Path

    from llm.inference.records import Spellings
    from llm.inference.score import Scorer
    from llm.pages.report import history_page
    from llm.run.checkpoint import saved_steps
    from llm.run.directory import RunDirectory
    from llm.run.open import open_model
    from llm.run.probes import ProbeRow

    run = RunDirectory(Path(options.run))
    run.read_config()
    rows: list[ProbeRow] = []
    for step in saved_steps(run.checkpoints):
        try:
            opened = open_model(run.path, step)
        except CheckpointError as error:
            say(f"WARNING: step {step} is passed over: {error}")
            continue
        tokenizer = opened.tokenizer
        data = options.text.encode("utf-8", "surrogateescape")
        ids = tokenizer.begun(tokenizer.encode(as_text(data, tokenizer, "--text")))
        if len(ids) < 2:
            raise UsageError(
                f"--text has {counted(len(ids), 'token')}; expected at least 2, since the first "
                "has nothing before it to predict it from"
            )
        (records,) = Scorer(opened.spec, opened.params, tokenizer, top=1).score([ids])
        rows.append(ProbeRow.of(step, options.text[:SPELLING], records))
    if not rows:
        raise CheckpointError(f"{run.path} has no checkpoint that can be read")
    found = {
        "steps": [row.step for row in rows],
        "tokens": [record.token for record in records],
        "logprobs": [[said and said.logprob for said in row.said] for row in rows],
    }
    if options.html is not None:
        page = history_page(run, rows, Spellings(tokenizer))
        write_output(options.html, page.encode(), UsageError)
    show(f"{json.dumps(found) if options.as_json else for_people(found)}\n")
    return 0


def for_people(found: dict[str, Any]) -> str:
    """A line for each token, a column for each checkpoint: probabilities in percent."""
    lines = ["probability of each token, in percent", row("step", found["steps"], "{:,}")]
    for token, *column in zip(found["tokens"], *found["logprobs"], strict=True):
        percents = ["-" if x is None else f"{100 * math.exp(x):.2f}" for x in column]
        lines.append(row(f"'{escaped(token)}'", percents, "{}"))
    sums = [-math.fsum(x for x in logprobs if x is not None) for logprobs in found["logprobs"]]
    lines.append(row("nats in all", sums, "{:.2f}"))
    return "\n".join(lines)


def row(name: str, values: list[Any], form: str) -> str:
    """A line of the table."""
    return set_cell_size(name, SPELLING) + "".join(f"{form.format(value):>10}" for value in values)
