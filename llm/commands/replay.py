"""python -m llm replay RUN --step N [--json]: what was step N trained on?

Prints the token ids and the text of each sequence of the batch, and the documents they come from.
The command needs the corpus, which must still be the one that the run began with.
"""

import bisect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic

from llm.commands.flags import CommandLine, argument, parse
from llm.config import setting
from llm.errors import UsageError

if TYPE_CHECKING:
    from llm.run.directory import RunDirectory
    from llm.text.splits import TokenSplit


class Options(CommandLine):
    """The command line."""

    run: str = argument("RUN", "run directory")
    step: int = setting(..., "step, from 1")
    as_json: bool = setting(False, "print one JSON object", flag="json")

    @pydantic.field_validator("step")
    @classmethod
    def _check_step(cls, step: int) -> int:
        if step < 1:
            raise UsageError(f"--step {step}: expected 1 or more; step 1 is the first update")
        return step


def main(arguments: list[str]) -> int:
    """Prints a page for a person, or with --json one JSON object."""
    chosen = parse(Options, arguments)

    from llm.run.directory import RunDirectory
    from llm.run.provenance import batch_size_at, check_corpus, check_trained
    from llm.text.batches import TrainingBatches
    from llm.text.shards import prepare

    run = RunDirectory(Path(chosen.run))
    config = run.read_config()
    check_trained(run)
    check_step(run, chosen.step)
    corpus = prepare(config.data, config.tokenizer)
    check_corpus(run, corpus)
    batches = TrainingBatches(
        corpus.train,
        context_length=config.model.context_length,
        batch_size=batch_size_at(run, config, chosen.step),
        seed=config.run.seed,
    )
    index = chosen.step - 1
    sequences = [
        {
            "row": row,
            "ids": ids.tolist(),
            "text": corpus.tokenizer.decode(ids),
            "documents": list(documents(corpus.train, int(start), len(ids))),
        }
        for row, (start, ids) in enumerate(
            zip(batches.window_starts(index), batches[index].tokens, strict=True)
        )
    ]
    if chosen.as_json:
        print(json.dumps({"step": chosen.step, "sequences": sequences}))
    else:
        for sequence in sequences:
            print(for_people(chosen.step, sequence))
    return 0


def check_step(run: "RunDirectory", step: int) -> None:
    """Raise a UsageError for a step that the run has not reached, as far as its files say."""
    from llm.run.checkpoint import saved_steps
    from llm.run.metrics import read_metrics

    # Not every step has a line (logging.every), and lines may be lost on a full disk.
    recorded = [row["step"] for row in read_metrics(run.metrics)]
    last = max([0, *saved_steps(run.checkpoints), *recorded])
    if not last:
        raise UsageError(
            f"--step {step}: not trained yet; {run.path} has no step in metrics.jsonl and no "
            "checkpoint"
        )
    if step > last:
        raise UsageError(
            f"--step {step}: not trained yet; {run.path} has come to step {last} by its metrics "
            f"and checkpoints; expected 1 to {last}"
        )


def documents(split: "TokenSplit", start: int, length: int) -> Iterator[dict[str, Any]]:
    """The documents of a window of the split, which is a ring: name, offset in it, tokens."""
    done = 0
    while done < length:
        position = (start + done) % len(split)
        name, offset = split.document_at(position)
        places = range(position, min(position + length - done, len(split)))
        # The end of the document, by bisection: its places come before all others.
        tokens = bisect.bisect_left(
            places, True, key=lambda place: split.document_at(place)[1] - offset != place - position
        )
        yield {"document": name, "offset": offset, "tokens": tokens}
        done += tokens


def for_people(step: int, sequence: dict[str, Any]) -> str:
    """A sequence as lines of text: its documents, its ids and its own text."""
    sources = [
        f"  {part['document']} from token {part['offset']}: {part['tokens']} "
        f"{'token' if part['tokens'] == 1 else 'tokens'}"
        for part in sequence["documents"]
    ]
    head, ids = f"step {step}, sequence {sequence['row']}", f"  ids {sequence['ids']}"
    return "\n".join([head, *sources, ids, sequence["text"], ""])
