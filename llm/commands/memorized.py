"""python -m llm memorized RUN [--json]: does the model repeat its training text?

Takes windows of 50 + 50 tokens from random places of the training text, and as many of the held-out
text, and asks of each: does the model, given the first 50 tokens, write the other 50? Held-out text
says how much of that is chance, or text that stands in both. The corpus must be there, unchanged.
"""

import json
from typing import TYPE_CHECKING, Any

from pydantic import NonNegativeInt

from llm.commands.flags import OutputFile, parse
from llm.commands.shared import RunOptions, corpus_of, counted, scored_page
from llm.console import escaped, show
from llm.errors import UsageError
from llm.files import write_output
from llm.section import Positive, setting

if TYPE_CHECKING:
    import numpy as np

    from llm.inference.score import Scorer
    from llm.text.splits import TokenSplit

# Windows on the page: those that the model is likeliest to repeat.
SHOWN = 20
TOP = 5


class Options(RunOptions):
    """The command line."""

    windows: Positive = setting(500, "windows of each of the two texts")
    seed: NonNegativeInt = setting(0, "what decides where they are")
    canary: tuple[str, ...] = setting((), "texts to rank among random ones of their form", "TEXT")
    html: OutputFile = setting(None, "write the likeliest windows as a page", "FILE")
    as_json: bool = setting(False, "print one JSON object", flag="json")


def main(arguments: list[str]) -> int:
    """Print a table, or one JSON object with --json."""
    options = parse(Options, arguments)
    opened = options.open()

    from llm.inference.score import Scorer
    from llm.measure import memorization as measure
    from llm.run.directory import RunDirectory
    from llm.run.provenance import check_trained

    run = RunDirectory(opened.path)
    check_trained(run)
    corpus = corpus_of(run, opened.config)
    scorer = Scorer(opened.spec, opened.params, opened.tokenizer, TOP)
    canaries = [measure.canary_exposure(scorer, text, options.seed) for text in options.canary]
    train, held_out = (
        windows_of(split, options, scorer, name)
        for name, split in (("training", corpus.train), ("held-out", corpus.validation))
    )
    counts = measure.occurrences(corpus.train, train)
    numbers, others = measure.predictions(scorer, train), measure.predictions(scorer, held_out)
    report = {
        **opened.checkpoint,
        "prefix_tokens": measure.PREFIX,
        "suffix_tokens": measure.SUFFIX,
        **measure.extraction(numbers),
        "by_occurrences": measure.by_occurrences(counts, numbers),
        "held_out": measure.extraction(others),
        "membership": measure.membership(numbers, others),
        "canaries": canaries,
    }
    if options.html:
        likeliest = train[measure.likeliest(numbers)[:SHOWN]]
        title = f"Training text that {opened.run}, step {opened.step}, is likeliest to repeat"
        page = scored_page(opened, scorer, likeliest, title)
        write_output(options.html, page.encode(), UsageError)
    show(f"{json.dumps(report) if options.as_json else for_people(report)}\n")
    return 0


def windows_of(split: "TokenSplit", options: Options, scorer: "Scorer", name: str) -> "np.ndarray":
    """int32 [n, 100]: the windows of a text."""
    from llm.measure.memorization import PREFIX, SUFFIX, draw_windows

    length = PREFIX + SUFFIX
    if scorer.spec.config.context_length < length - 1:
        raise UsageError(
            f"windows are of {length} tokens, and the model reads "
            f"{scorer.spec.config.context_length} at once (model.context_length)"
        )
    windows = draw_windows(split, options.windows, options.seed, scorer.tokenizer)
    if not len(windows):
        raise UsageError(
            f"no document of the {name} text has {length} tokens; expected text of that length "
            "in both the training text and what data.validation holds out"
        )
    return windows


def for_people(report: dict[str, Any]) -> str:
    """The report as lines of text."""
    held_out, membership = report["held_out"], report["membership"]
    lines = [
        f"{report['suffix_tokens']} tokens after {report['prefix_tokens']}, in windows of the "
        f"training text ({report['windows']}) and of held-out text ({held_out['windows']}):",
        f"  {'':34}  {'training':>9}  {'held out':>9}",
        row("written by greedy decoding", report["verbatim_share"], held_out["verbatim_share"]),
    ]
    for one, other in zip(report["extractable"], held_out["extractable"], strict=True):
        name = f"among {one['draws']:,} draws, probability {one['probability']:.0%}"
        lines.append(row(name, one["share"], other["share"]))
    lines.append("by how often a window stands in the training text:")
    for group in report["by_occurrences"]:
        least, most = group["at_least"], group["at_most"]
        times = "once" if most == 1 else f"{least:,} to {most:,} times"
        name = f"{times} ({counted(group['windows'], 'window')})"
        lines.append(row(name, group["verbatim_share"]) + "  by greedy decoding")
    lines.append(
        "told apart from held-out text (0.5 is chance): by the loss AUC "
        f"{membership['auc']:.3f}, by the least likely tokens {membership['min_k']['auc']:.3f}"
    )
    for canary in report["canaries"]:
        lines.append(
            f"canary {escaped(canary['text'])!r}: rank {canary['rank']:,} of {canary['of']:,}, "
            f"exposure {canary['exposure']:.2f} bits"
        )
    return "\n".join(lines)


def row(name: str, *shares: float) -> str:
    """A line of the table."""
    return f"  {name:34}" + "".join(f"  {share:9.2%}" for share in shares)
