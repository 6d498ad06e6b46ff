"""The report of one run or of several: `gather` reads their files, `report_page` makes the page.

The page is one file that loads nothing: report.js draws the curves with uPlot (pages/vendor, MIT)
and ties points to tokens; page.js shows texts as it does on the page of probabilities.
"""

import base64
import gzip
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from llm.config import flatten
from llm.errors import CheckpointError
from llm.files import now, write_atomic
from llm.inference.records import Record, Spellings, as_json
from llm.pages.document import document, escape
from llm.pages.report_data import (
    GrowingRows,
    Metrics,
    ProbeRows,
    changed_settings,
    curves,
    has_ids_below,
    marks,
    receipt,
    time_spent,
)
from llm.run.directory import RunDirectory
from llm.run.probes import ProbeRow
from llm.run.provenance import came_from
from llm.text.tokenizer import load_tokenizer

# Of a run: samples that the page shows, and steps at which a text is drawn.
MOST_SAMPLES, MOST_COLUMNS = 8, 120
# The place of a run does not change what it computes.
PLACES = ("run.dir", "data.cache_dir")

Report = dict[str, Any]


def write_report(run: RunDirectory, over: bool = False) -> None:
    """RUN/report.html, replaced as a whole.

    Args:
      over: the start that writes it trains no more, though it still holds the lock.
    Raises:
      LLMError, OSError: something of the run cannot be read, or the page not be written.
    """
    write_atomic(run.path / "report.html", report_page(gather([run], over=over)).encode())


def gather(
    runs: Sequence[RunDirectory],
    whole: bool = False,
    read: Sequence[GrowingRows] | None = None,
    over: bool = False,
) -> Report:
    """Everything that the page shows, as JSON.

    Args:
      whole: every row of the curves, not only what can be seen.
      read: the rows of the runs, if they are kept.
      over: none of them is being trained, whoever holds its lock.
    Raises:
      UsageError, CheckpointError: a run has files that cannot be read.
    """
    # The shortest names that tell the runs apart.
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.path) for run in runs]
    read = read or [GrowingRows(run) for run in runs]
    parts = [_one(*one, whole, over) for one in zip(names, runs, read, strict=True)]
    settings = {
        name: values
        for name in {name: None for part in parts for name in part["all"]}
        for values in [[part["all"].get(name) for part in parts]]
        if name not in PLACES and any(value != values[0] for value in values)
    }
    for part in parts:
        del part["all"]
    return {
        "written": now(),
        "runs": parts,
        "differences": settings,
        "parting": [_parting(read[0].metrics, other.metrics) for other in read[1:]],
    }


def _parting(one: Metrics, other: Metrics) -> dict[str, Any]:
    """The steps that two runs both have, and the first at which their losses are not equal."""
    losses = [dict(zip(m.train["step"], m.train["loss"], strict=True)) for m in (one, other)]
    common = sorted(losses[0].keys() & losses[1].keys())
    pairs = ((n, losses[0][n], losses[1][n]) for n in common)
    step = next((int(n) for n, a, b in pairs if a != b and not a != a != b != b), None)
    return {"common": len(common), "step": step}


def _one(name: str, run: RunDirectory, rows: GrowingRows, whole: bool, over: bool) -> Report:
    metrics = rows.metrics
    config, record = run.read_config(), run.read_provenance()
    steps = metrics.train["step"]
    reached = int(steps[-1]) if len(steps) else 0
    notes = []
    if metrics.broken:
        notes.append(f"{metrics.broken} lines of metrics.jsonl are damaged and are left out.")
    if "imported" in record:
        notes.append(f"The model came from {record['imported']['from']}; no step was taken here.")
    elif not metrics.evaluations:
        why = "holds nothing out" if config.data.validation == "none" else "has not evaluated yet"
        notes.append(f"There is no validation loss: this run {why}.")
    texts, samples = _texts(run, rows.probes, notes)
    return {
        "name": name,
        "state": _state(record, reached, config.training.steps, not over and is_training(run)),
        "facts": _facts(record, config),
        "settings": changed_settings(config),
        "all": flatten(config),
        "steps": config.training.steps,
        "flops_per_token": record["model"].get("flops_per_token"),
        "vocab_size": record["model"].get("vocab_size"),
        **curves(metrics, whole),
        "marks": marks(metrics, record),
        "time": time_spent(metrics, record["starts"]),
        "texts": texts,
        "samples": samples,
        "notes": notes,
        "next": _next(run, record, metrics, reached, config.training.steps),
    }


def _state(record: Mapping[str, Any], reached: int, steps: int, training: bool) -> str:
    """How far the run is, and how it ended."""
    ended = record["starts"][-1].get("ended") if record["starts"] else None
    how_far = f"step {reached:,} of {steps:,}"
    if "imported" in record:
        return "imported"
    if ended is None and training:
        return f"training, {how_far}" if reached else "beginning"
    if not record["starts"]:
        return "it ended before anything was trained"
    if reached >= steps and ended in (None, "finished"):
        return f"finished, {how_far}"
    return f"{how_far}: {ended or 'it ended without a word, as after a kill or a loss of power'}"


def is_training(run: RunDirectory) -> bool:
    """Whether a process of this machine trains, without taking the lock even for a moment."""
    try:
        inode = os.stat(run.lock).st_ino
        with open("/proc/locks") as file:
            return any(f":{inode} " in line for line in file)
    except OSError:
        return False


def _facts(record: Mapping[str, Any], config: Any) -> list[tuple[str, str]]:
    model, data = record["model"], record["data"]
    sources = [one.name for one in config.data.mixture] or config.data.source
    starts = record["starts"]
    counts = [data.get(f"{part}_tokens", 0) for part in ("train", "validation")]
    loses = ", which loses text" if config.tokenizer.lossy else ""
    facts = [
        ("parameters", f"{model['parameters']:,}" if "parameters" in model else None),
        ("text", sources if isinstance(sources, str) else ", ".join(sources)),
        ("tokens", "{:,}, {:,} held out".format(*counts)),
        ("tokenizer", f"{config.tokenizer.kind}, {model.get('vocab_size', 0):,} tokens" + loses),
        ("products", model["compute_dtype"]),
        ("begun", record.get("created")),
    ]
    if starts:
        last = starts[-1]
        devices = "{count} x {kind}".format(**{"count": "?", "kind": "?"} | last["devices"])
        processes = last.get("processes", 1)
        facts += [
            ("devices", devices + f", {processes} processes" * (processes != 1)),
            ("starts", f"{len(starts):,}"),
            ("versions", ", ".join(f"{name} {value}" for name, value in last["versions"].items())),
        ]
    if ancestor := record.get("ancestor"):
        facts.append(("origin", came_from(ancestor)))
    return [(term, value) for term, value in facts if value]


def _texts(
    run: RunDirectory, rows: ProbeRows, notes: list[str]
) -> tuple[list[Record], list[Record]]:
    """Texts being learnt, and texts to read: samples of evaluations and the receipt's.

    A text has its `tokens`, and what was `said` of each at each of its `steps`; a text to read has
    a `label` and whole records.
    """
    try:
        spellings = Spellings(load_tokenizer(run.tokenizer))
        size = spellings.tokenizer.vocab_size
        texts = [learning(of, spellings) for of in rows.texts(MOST_COLUMNS, size)]
        written = rows.samples(MOST_SAMPLES, size)[::-1]
    except CheckpointError as error:
        notes.append(f"The texts cannot be shown: {error}")
        return [], []
    of_receipt = [row for row in receipt(run) if has_ids_below(size, row)]
    samples = [
        {
            "label": f"{row.name}, step {row.step:,}",
            "records": list(map(as_json, row.records(spellings, number))),
        }
        for number, row in enumerate(written + of_receipt)
    ]
    return texts, samples


def learning(rows: Sequence[ProbeRow], spellings: Spellings) -> Record:
    """One text at several steps, as the page draws it."""
    likeliest = {said.likeliest for row in rows for said in row.said if said} - {None}
    return {
        "name": rows[-1].name,
        "tokens": list(map(as_json, rows[-1].records(spellings))),
        "steps": [row.step for row in rows],
        "said": [msgspec.to_builtins(row.said) for row in rows],
        "spelled": {str(id_): spellings[id_][0] for id_ in likeliest if id_ is not None},
    }


def _next(
    run: RunDirectory, record: Mapping[str, Any], metrics: Metrics, reached: int, steps: int
) -> list[tuple[str, str]]:
    """What to do next: a sentence, and the words of a shell for it, which may be empty."""
    path = shlex.quote(str(run.path))
    losses = [
        (row.loss, row.step) for row in metrics.evaluations.get("", []) if row.loss is not None
    ]
    advice = []
    if reached < steps and record["starts"] and "imported" not in record:
        command = shlex.join(["python", *record["starts"][-1].get("command", ["train.py"])])
        advice.append(("Go on from the last checkpoint: the same command resumes.", command))
    if losses and min(losses) != losses[-1]:
        loss, step = min(losses)
        worse = (
            f"The validation loss was lowest at step {step:,}, with {loss:.4f} nats, and is "
            f"{losses[-1][0]:.4f} now: more steps on this text may not help. That step is kept "
            "if checkpoint.keep_best is on."
        )
        advice.append((worse, f"python sample.py {path} --step {step}"))
    elif len(losses) > 1:
        fell = losses[-2][0] - losses[-1][0]
        better = f"The validation loss fell by {fell:.4f} nats since the evaluation before"
        advice.append((f"{better}: more steps may help (training.steps).", ""))
    return [
        *advice,
        ("Write text, coloured by probability.", f"python sample.py {path} --html S.html"),
        ("See how a text of yours became probable.", f"python -m llm history {path} --text TEXT"),
        ("Compare with another run.", f"python -m llm report {path} OTHER --html BOTH.html"),
    ]


def report_page(report: Report, *, live: bool = False) -> str:
    """One HTML document.

    Args:
      live: the page asks the server that sent it for newer numbers (report_server.py).
    """
    rows = [
        f"<tr><td>{escape(run['name'])}<td>{escape(of['source'] or 'the whole')}<td>{step:,}"
        f"<td>{'not finite' if loss is None else format(loss, '.4f')}</tr>"
        for run in report["runs"]
        for of in run["evaluations"]
        for step, loss in list(zip(of["step"], of["loss"], strict=True))[-20:]
    ]
    return document(
        ", ".join(run["name"] for run in report["runs"]),
        "report.html",
        kind="tokens",
        styles=("page.css", "vendor/uPlot.min.css", "report.css"),
        scripts=("vendor/uPlot.iife.min.js", "page.js", "report.js"),
        data={"report": packed(report), "growing": live},
        connect="'self'" if live else "'none'",
        state="; ".join(f"{escape(run['name'])}: {escape(run['state'])}" for run in report["runs"]),
        plain="".join(rows),
    )


def history_page(run: RunDirectory, rows: Sequence[ProbeRow], spellings: Spellings) -> str:
    """The page of one text at several checkpoints."""
    lists = ("facts", "settings", "marks", "evaluations", "samples", "notes", "next")
    nothing: Report = {name: [] for name in lists}
    one = nothing | {
        "name": run.name,
        "state": f"a text at {len(rows)} checkpoints",
        "vocab_size": spellings.tokenizer.vocab_size,
        "train": {"step": []},
        "rows": 0,
        "time": {"seconds": {}, "unsaid": 0},
        "texts": [learning(rows, spellings)],
    }
    return report_page({"written": now(), "runs": [one], "differences": {}, "parting": []})


def packed(report: Report) -> str:
    """JSON, gzipped, in base64."""
    text = json.dumps(report, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()
