"""python -m llm replay RUN --step N [--json]: what was step N trained on?

Prints the token ids and the text of each sequence of the batch, and the documents that they come
from. The corpus must be there, unchanged since the run began.
"""

import bisect
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.commands.flags import CommandLine, argument, parse
from llm.commands.shared import corpus_of, counted
from llm.console import show
from llm.errors import UsageError
from llm.section import setting

if TYPE_CHECKING:
    from llm.run.directory import RunDirectory
    from llm.text.batches import TrainingBatches
    from llm.text.corpus import TokenizedCorpus
    from llm.text.splits import TokenSplit


class Options(CommandLine):
    """The command line."""

    run: str = argument("RUN", "run directory")
    step: int = setting(..., "step, from 1")
    as_json: bool = setting(False, "print one JSON object", flag="json")


def main(arguments: list[str]) -> int:
    """Print each sequence as text, or one JSON object with --json."""
    chosen = parse(Options, arguments)

    from llm.run.directory import RunDirectory
    from llm.run.provenance import check_trained, phases_of
    from llm.text.batches import training_batches

    run = RunDirectory(Path(chosen.run))
    config = run.read_config()
    check_trained(run)
    check_step(run, chosen.step)
    corpus = corpus_of(run, config)
    index = chosen.step - 1
    phases = phases_of(run.read_provenance()["starts"], config)
    batches = training_batches(
        config, corpus, phases=[phase for phase in phases if phase.from_step <= index]
    )
    found = list(sequences(corpus, batches, index))
    text = "\n".join(for_people(chosen.step, sequence) for sequence in found)
    whole = json.dumps({"step": chosen.step, "sequences": found}) if chosen.as_json else text
    show(f"{whole}\n")
    return 0


def sequences(
    corpus: "TokenizedCorpus", batches: "TrainingBatches", index: int
) -> Iterator[dict[str, Any]]:
    """The windows of a batch, counted from 0: their tokens without padding, and their documents."""
    numbers, windows = batches.window_sources(index), batches.window_parts(index)
    batch = batches[index]
    for row, ids in enumerate(batch.tokens):
        if batch.weights is not None:
            ids = ids[: batch.weights[row].nonzero()[0][-1] + 2]
        source = corpus.sources[numbers[row]]
        of_window = (documents(source.train, *part) for part in windows[row])
        yield {
            "row": row,
            **({"source": source.name} if source.name else {}),
            "ids": ids.tolist(),
            "text": corpus.tokenizer.decode(ids, continues=True),
            "documents": list(itertools.chain.from_iterable(of_window)),
        }


def check_step(run: "RunDirectory", step: int) -> None:
    """Raise a UsageError if the files of the run do not show that it has reached the step."""
    from llm.run.checkpoint import saved_steps
    from llm.run.metrics import newest_rows

    # With logging.every not every step has a line, and a full disk may lose lines.
    recorded = next((row["step"] for row in newest_rows(run.metrics)), 0)
    last = max([recorded, *saved_steps(run.checkpoints)])
    if not 1 <= step <= last:
        reason = "step 1 is the first update" if step < 1 else "not trained yet"
        raise UsageError(
            f"--step {step}: {reason}; {run.path} has come to step {last} by its metrics and "
            f"checkpoints{f'; expected 1 to {last}' * (last > 0)}"
        )


def documents(split: "TokenSplit", start: int, length: int) -> Iterator[dict[str, Any]]:
    """The documents of tokens of the split that lie side by side: name, offset in it, tokens."""
    done = 0
    while done < length:
        position = start + done
        name, offset = split.document_at(position)
        places = range(position, start + length)
        # Find the end of the document by bisection: its places come before all others.
        tokens = bisect.bisect_left(
            places, True, key=lambda place: split.document_at(place)[1] - offset != place - position
        )
        yield {"document": name, "offset": offset, "tokens": tokens}
        done += tokens


def for_people(step: int, sequence: dict[str, Any]) -> str:
    """A sequence as lines of text: its documents, its ids and its own text."""
    sources = [
        f"  {part['document']} from token {part['offset']}: {counted(part['tokens'], 'token')}"
        for part in sequence["documents"]
    ]
    head, ids = f"step {step}, sequence {sequence['row']}", f"  ids {sequence['ids']}"
    head += f", from {sequence['source']}" if "source" in sequence else ""
    return "\n".join([head, *sources, ids, sequence["text"], ""])
