"""python -m llm diff A B: where do two runs part, or how do two dumps of one text differ?

For two run directories, the report says where their losses part and what differs between the runs.
For two files that `score --probs` wrote of the same text, it says how well the two checkpoints
predict the text; --html FILE writes a page that compares the probabilities of each token.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm.commands.flags import CommandLine, InputFile, OutputFile, argument, parse
from llm.commands.shared import counted
from llm.config import differences
from llm.console import escaped, show
from llm.errors import UsageError
from llm.files import write_output
from llm.inference.records import Record, read_records
from llm.pages.view import compared, diff_page
from llm.run.directory import RunDirectory
from llm.run.metrics import newest_rows
from llm.section import setting

# The place of a run does not change what it computes.
IGNORED = ("run.dir", "data.cache_dir")


class Options(CommandLine):
    """The command line."""

    a: InputFile = argument("A", "run directory, or a file of token records")
    b: InputFile = argument("B", "another of the same kind")
    as_json: bool = setting(False, "print one JSON object", flag="json")
    html: OutputFile = setting(None, "of files of records: write the page", "FILE")


def main(arguments: list[str]) -> int:
    """Print a report, or one JSON object with --json. The exit code is 0 if they differ too."""
    chosen = parse(Options, arguments)
    if chosen.html is not None or Path(chosen.a).is_file():
        report, lines = compare_dumps(read_records(chosen.a), read_records(chosen.b), chosen.html)
    else:
        report = compare(RunDirectory(Path(chosen.a)), RunDirectory(Path(chosen.b)))
        lines = for_people(report)
    show(f"{json.dumps(report) if chosen.as_json else lines}\n")
    return 0


def compare_dumps(
    one: list[Record], other: list[Record], html: str | None
) -> tuple[dict[str, Any], str]:
    """How well two checkpoints predict one text, as an object and as lines; the page is written.

    Keys: tokens, those that both predict; before and after, each a checkpoint with the sums of an
    end record; and the difference of these sums.
    """
    end = compared(one, other)[-1]
    before, after = (records[0]["checkpoint"] for records in (one, other))
    title = f"From {before['run']}, step {before['step']} to {after['run']}, step {after['step']}"
    if html is not None:
        write_output(html, diff_page(one, other, title=title).encode(), UsageError)
    lines = [f"{escaped(title)}: {counted(end['tokens'], 'token')}"]
    for name in ("before", "after", "difference"):
        values = ("-" if value is None else f"{value:,.4f}" for value in end[name].values())
        lines.append(
            "{:10} log-likelihood {:>14} nats, perplexity {:>12}, {:>8} bits per byte".format(
                name, *values
            )
        )
    checkpoints = {"before": before | end["before"], "after": after | end["after"]}
    report = {"tokens": end["tokens"], **checkpoints, "difference": end["difference"]}
    return report, "\n".join(lines)


def compare(*runs: RunDirectory) -> dict[str, Any]:
    """Where the losses of two runs part, and what differs between the runs, by kind.

    Keys: ancestry (what both come from, or None), recorded_steps of each run, common_steps of both,
    first_difference {step, loss_a, loss_b} or None, then the kinds.
    """
    from llm.run.provenance import check_trained  # JAX, which `--help` does without

    config = differences(*(run.read_config() for run in runs))
    changed = {name: list(pair) for name, pair in config.items() if name not in IGNORED}
    randomness = {name: changed.pop(name) for name in ("run.seed",) if name in changed}
    records = [run.read_provenance() for run in runs]
    ancestry = common_ancestor(*map(lineage, runs))
    for run in runs:
        if ancestry is None:
            check_trained(run)
    losses = [
        {row["step"]: row["loss"] for row in newest_rows(run.metrics) if row["kind"] == "train"}
        for run in runs
    ]
    common = sorted(losses[0].keys() & losses[1].keys())
    pairs = ({"step": n, "loss_a": losses[0][n], "loss_b": losses[1][n]} for n in common)

    def unequal(part: Callable[[dict[str, Any]], Any]) -> list[Any]:
        """Both values if they differ, else an empty list."""
        values = [part(record) for record in records]
        return values if values[0] != values[1] else []

    return {
        "ancestry": ancestry,
        "recorded_steps": [len(of_run) for of_run in losses],
        "common_steps": len(common),
        "first_difference": next((p for p in pairs if p["loss_a"] != p["loss_b"]), None),
        "config": changed,
        "randomness": randomness,
        "data": unequal(lambda r: r["data"]["fingerprint"]),
        "code": unequal(lambda r: sorted({start["code_sha256"] for start in r["starts"]})),
        "versions": unequal(lambda r: r["starts"] and r["starts"][-1]["versions"]),
        "devices": unequal(
            lambda r: [{**start["devices"], "mesh": start["mesh"]} for start in r["starts"]]
        ),
    }


def lineage(run: RunDirectory) -> list[dict[str, Any]]:
    """A run and its ancestors, the nearest first, each as run.json has it; the run has no step."""
    record = run.read_provenance()
    line = [{"name": run.name, "created": record.get("created", ""), **record}]
    while line[-1].get("ancestor"):
        line.append(line[-1]["ancestor"])
    return line


def common_ancestor(
    line_a: list[dict[str, Any]], line_b: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """The nearest run or folder that two runs come from: its name, and the step at which each of
    them begins with it, or is the mean of it and steps before; None for a run that is it."""

    def key(of: dict[str, Any]) -> Any:
        return (of["created"], of["name"]) if of["created"] else of["params_sha256"]

    for a, b in itertools.product(line_a, line_b):
        if key(a) == key(b) and (a is not line_a[0] or b is not line_b[0]):
            return {"name": a["name"], "step_a": a.get("step"), "step_b": b.get("step")}
    return None


def for_people(report: dict[str, Any]) -> str:
    """The report as lines of text: how many steps are compared, where they part, and the causes."""
    common, parting = report["common_steps"], report["first_difference"]
    one, other = report["recorded_steps"]
    lines = [f"{counted(common, 'step')} in both"]
    if not common:
        lines = ["no step is recorded in both, so no losses are compared"]
    if ancestry := report["ancestry"]:
        a, b = ancestry["step_a"], ancestry["step_b"]
        both = f"both come from {ancestry['name']}, at step {a} and at step {b}"
        from_one = f"B comes from A at step {b}" if a is None else both
        lines.insert(0, f"A comes from B at step {a}" if b is None else from_one)
    if not one == other == common > 0:
        lines[0] += f": the first run has {one} recorded, the second {other}"
    if parting:
        lines.append("they part at step {step}: loss {loss_a} and {loss_b}".format(**parting))
    elif common:
        lines.append("equal losses, bit for bit, at each of them")
    causes = [
        f"{kind}: {name} is {a!r} and {b!r}"
        for kind in ("config", "randomness")
        for name, (a, b) in report[kind].items()
    ]
    causes += [
        "{} differ: {} and {}".format(kind, *report[kind])
        for kind in ("data", "code", "versions", "devices")
        if report[kind]
    ]
    nothing = "nothing else differs: config, data, code, versions, devices, seed"
    return "\n".join([*lines, *(causes or [nothing])])
