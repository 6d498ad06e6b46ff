"""python -m llm diff A B: where do two runs part, or how do two dumps of one text differ?

For two run directories, the report says where their losses part and what differs between the runs.
For two files that `score --probs` wrote of the same text, --html FILE writes a page that shows, at
each token, what the second checkpoint gives it and what the first did.
"""

import json
from pathlib import Path
from typing import Any

from llm.commands.flags import CommandLine, argument, parse
from llm.commands.texts import check_writable
from llm.config import differences, setting
from llm.errors import UsageError
from llm.inference.records import read_records
from llm.pages.view import write_diff_page
from llm.run.directory import RunDirectory
from llm.run.metrics import read_metrics

# Where the run lies says nothing of what it computes.
IGNORED = ("run.dir", "data.cache_dir")


class Options(CommandLine):
    """The command line."""

    a: str = argument("A", "run directory, or a file of token records")
    b: str = argument("B", "another of the same kind")
    as_json: bool = setting(False, "of runs: print one JSON object", flag="json")
    html: str | None = setting(None, "of files of records: write the page", "FILE")


def main(arguments: list[str]) -> int:
    """Prints a page for a person, or with --json one JSON object. 0 whether they differ or not."""
    chosen = parse(Options, arguments)
    if chosen.html is not None:
        write_changes(chosen.a, chosen.b, chosen.html)
        return 0
    if Path(chosen.a).is_file():
        raise UsageError(f"{chosen.a} is a file; what changed between two dumps needs --html FILE")
    runs = [RunDirectory(Path(path)) for path in (chosen.a, chosen.b)]
    report = compare(*runs)
    print(json.dumps(report) if chosen.as_json else _page(report))
    return 0


def write_changes(before: str, after: str, html: str) -> None:
    """The page of two files of records."""
    check_writable(html)
    one, other = read_records(before), read_records(after)
    names = [f"{of['run']}, step {of['step']}" for of in (d[0]["checkpoint"] for d in (one, other))]
    write_diff_page(one, other, Path(html), title=f"From {names[0]} to {names[1]}")


def compare(run_a: RunDirectory, run_b: RunDirectory) -> dict[str, Any]:
    """first_difference: {step, loss_a, loss_b} or None; recorded_steps of each run, common_steps of
    both; and causes by kind."""
    from llm.run.provenance import check_trained  # JAX, which `--help` does without

    config = differences(run_a.read_config(), run_b.read_config())
    records = [run.read_provenance() for run in (run_a, run_b)]
    for run in (run_a, run_b):
        check_trained(run)
    losses = [_losses(run) for run in (run_a, run_b)]
    common = sorted(set(losses[0]) & set(losses[1]))
    first = next((step for step in common if losses[0][step] != losses[1][step]), None)
    return {
        "recorded_steps": [len(of_run) for of_run in losses],
        "common_steps": len(common),
        "first_difference": None
        if first is None
        else {"step": first, "loss_a": losses[0][first], "loss_b": losses[1][first]},
        "config": {k: list(v) for k, v in config.items() if k not in IGNORED and k != "run.seed"},
        "randomness": {k: list(v) for k, v in config.items() if k == "run.seed"},
        "data": _unequal(records, lambda r: r["data"]["fingerprint"]),
        "code": _unequal(records, lambda r: sorted({s["code_sha256"] for s in r["starts"]})),
        "versions": _unequal(records, lambda r: r["starts"] and r["starts"][-1]["versions"]),
        "devices": _unequal(
            records, lambda r: [{**s["devices"], "mesh": s["mesh"]} for s in r["starts"]]
        ),
    }


def _losses(run: RunDirectory) -> dict[int, float | None]:
    return {row["step"]: row["loss"] for row in read_metrics(run.metrics) if row["kind"] == "train"}


def _unequal(records: list[dict[str, Any]], part: Any) -> list[Any]:
    """Both values when they differ, else nothing."""
    a, b = part(records[0]), part(records[1])
    return [] if a == b else [a, b]


def _page(report: dict[str, Any]) -> str:
    causes: list[str] = []
    for kind in ("config", "randomness"):
        causes += [f"{kind}: {name} is {a!r} and {b!r}" for name, (a, b) in report[kind].items()]
    for kind in ("data", "code", "versions", "devices"):
        if report[kind]:
            causes.append(f"{kind} differ: {report[kind][0]} and {report[kind][1]}")
    nothing = "nothing else differs: config, data, code, versions, devices, seed"
    return "\n".join([*_compared(report), *(causes or [nothing])])


def _compared(report: dict[str, Any]) -> list[str]:
    """How many steps there are to compare, and where the losses part in them."""
    common, first = report["common_steps"], report["first_difference"]
    one, other = report["recorded_steps"]
    counts = f"the first run has {one} recorded, the second {other}"
    if not common:
        return [f"no step is recorded in both, so no losses are compared: {counts}"]
    head = f"{common} {'step' if common == 1 else 'steps'} in both"
    return [
        head if one == other == common else f"{head}: {counts}",
        "equal losses, bit for bit, at each of them"
        if first is None
        else f"they part at step {first['step']}: loss {first['loss_a']} and {first['loss_b']}",
    ]
