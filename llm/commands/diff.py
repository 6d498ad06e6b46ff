"""python -m llm diff A B: where do two runs part, or how do two dumps of one text differ?

For two run directories, the report says where their losses part and what differs between the runs.
For two files that `score --probs` wrote of the same text, --html FILE writes a page that compares
the probabilities that the two checkpoints give to each token.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm.commands.flags import CommandLine, OutputFile, argument, parse
from llm.commands.shared import counted
from llm.config import differences, setting
from llm.errors import UsageError
from llm.files import write_output
from llm.inference.records import read_records
from llm.pages.view import diff_page
from llm.run.directory import RunDirectory
from llm.run.metrics import newest_rows

# The place of a run does not change what it computes.
IGNORED = ("run.dir", "data.cache_dir")


class Options(CommandLine):
    """The command line."""

    a: str = argument("A", "run directory, or a file of token records")
    b: str = argument("B", "another of the same kind")
    as_json: bool = setting(False, "of runs: print one JSON object", flag="json")
    html: OutputFile = setting(None, "of files of records: write the page", "FILE")


def main(arguments: list[str]) -> int:
    """Print a report, or one JSON object with --json. The exit code is 0 if the runs differ too."""
    chosen = parse(Options, arguments)
    if chosen.html is not None:
        one, other = read_records(chosen.a), read_records(chosen.b)
        checkpoints = [records[0]["checkpoint"] for records in (one, other)]
        before, after = (f"{of['run']}, step {of['step']}" for of in checkpoints)
        page = diff_page(one, other, title=f"From {before} to {after}")
        write_output(chosen.html, page.encode(), UsageError)
        return 0
    if Path(chosen.a).is_file():
        raise UsageError(f"{chosen.a} is a file; what changed between two dumps needs --html FILE")
    report = compare(RunDirectory(Path(chosen.a)), RunDirectory(Path(chosen.b)))
    print(json.dumps(report) if chosen.as_json else for_people(report))
    return 0


def compare(*runs: RunDirectory) -> dict[str, Any]:
    """Where the losses of two runs part, and what differs between the runs, by kind.

    Keys: recorded_steps of each run, common_steps of both, first_difference {step, loss_a, loss_b}
    or None, then the kinds.
    """
    from llm.run.provenance import check_trained  # JAX, which `--help` does without

    config = differences(*(run.read_config() for run in runs))
    changed = {name: list(pair) for name, pair in config.items() if name not in IGNORED}
    randomness = {name: changed.pop(name) for name in ("run.seed",) if name in changed}
    records = [run.read_provenance() for run in runs]
    for run in runs:
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


def for_people(report: dict[str, Any]) -> str:
    """The report as lines of text: how many steps are compared, where they part, and the causes."""
    common, parting = report["common_steps"], report["first_difference"]
    one, other = report["recorded_steps"]
    lines = [f"{counted(common, 'step')} in both"]
    if not common:
        lines = ["no step is recorded in both, so no losses are compared"]
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
