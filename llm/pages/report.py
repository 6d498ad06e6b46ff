"""The report of one run or of several: `gather` reads their files, `report_page` makes the page.

The page is one file that loads nothing: report.js draws the curves with uPlot (pages/vendor, MIT)
and ties points to tokens; page.js shows texts as it does on the page of probabilities.
"""

import base64
import gzip
import json
import os
import shlex
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from llm.config import Config, flatten
from llm.errors import CheckpointError
from llm.files import now, read_regular, write_atomic
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
from llm.run.directory import RunDirectory, saved_steps
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
    write_atomic(run.report, report_page(gather([run], over=over)).encode())


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
    configs = [run.read_config() for run in runs]
    settings = list(map(flatten, configs))
    values = {name: [one.get(name) for one in settings] for one in settings for name in one}
    parts = zip(names, runs, configs, read, strict=True)
    return {
        "written": now(),
        "runs": [_one(*part, whole, over) for part in parts],
        "differences": {
            name: chosen
            for name, chosen in values.items()
            if name not in PLACES and any(value != chosen[0] for value in chosen)
        },
        "parting": [_parting(read[0].metrics, other.metrics) for other in read[1:]],
    }


def _parting(one: Metrics, other: Metrics) -> dict[str, Any]:
    """The steps that two runs both have, and the first at which their losses are not equal."""
    steps, at, there = np.intersect1d(one.train["step"], other.train["step"], return_indices=True)
    losses = one.train["loss"][at], other.train["loss"][there]
    parted = steps[~np.isclose(*losses, rtol=0, atol=0, equal_nan=True)]
    return {"common": len(steps), "step": int(parted[0]) if len(parted) else None}


def _one(
    name: str, run: RunDirectory, config: Config, rows: GrowingRows, whole: bool, over: bool
) -> Report:
    metrics, record, steps = rows.metrics, run.read_provenance(), config.training.steps
    reached = int(max(metrics.train["step"][-1:], default=0))
    state, goes_on = _state(run, record, reached, steps, over)
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
        "state": state,
        "facts": _facts(record, config),
        "settings": changed_settings(config),
        "steps": steps,
        "flops_per_token": record["model"].get("flops_per_token"),
        "vocab_size": record["model"].get("vocab_size"),
        **curves(metrics, whole),
        "marks": marks(metrics, record),
        "time": time_spent(metrics, record["starts"]),
        "texts": texts,
        "samples": samples,
        "notes": notes,
        "next": _next(run, record, metrics, goes_on),
    }


def _state(
    run: RunDirectory, record: Mapping[str, Any], reached: int, steps: int, over: bool
) -> tuple[str, bool]:
    """How far the run is, and how it ended; whether the command of its last start would go on."""
    ended = record["starts"][-1].get("ended") if record["starts"] else None
    how_far = f"step {reached:,} of {steps:,}"
    if "imported" in record:
        return "imported", False
    if ended is None and not over and is_training(run):
        return f"training, {how_far}" if reached else "beginning", False
    if not record["starts"]:
        return "it ended before anything was trained", False
    if reached >= steps and (ended == "finished" or steps in saved_steps(run.checkpoints)):
        return f"finished, {how_far}", False
    silent = "it ended without a word, as after a kill or a loss of power"
    if (host := _host(run)) not in ("", socket.gethostname()):
        silent = f"it trains on {host}, or was killed there; this machine cannot tell"
    return f"{how_far}: {ended or silent}", True


def _host(run: RunDirectory) -> str:
    """The machine of the last start, from the lock (llm/run/start.py:locked); "" if unknown."""
    try:
        holder = read_regular(run.lock, most_bytes=1 << 12).decode(errors="replace")
    except OSError:
        return ""
    return holder.partition(" on ")[2].partition(", since ")[0]


def is_training(run: RunDirectory) -> bool:
    """Whether a process of this machine trains, without taking the lock even for a moment."""
    try:
        inode = os.stat(run.lock).st_ino
        with open("/proc/locks") as file:
            return any(f":{inode} " in line for line in file)
    except OSError:
        return False


def _facts(record: Mapping[str, Any], config: Config) -> list[tuple[str, str]]:
    model, data = record["model"], record["data"]
    sources = [one.name for one in config.data.mixture] or config.data.source
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
    if starts := record["starts"]:
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
    likeliest = {said.likeliest for row in rows for said in row.said if said}
    return {
        "name": rows[-1].name,
        "tokens": list(map(as_json, rows[-1].records(spellings))),
        "steps": [row.step for row in rows],
        "said": [msgspec.to_builtins(row.said) for row in rows],
        "spelled": {str(id_): spellings[id_][0] for id_ in likeliest if id_ is not None},
    }


def _next(
    run: RunDirectory, record: Mapping[str, Any], metrics: Metrics, goes_on: bool
) -> list[tuple[str, str]]:
    """What to do next: a sentence, and the words of a shell for it, which may be empty."""
    path = shlex.quote(str(run.path))
    losses = [
        (row.loss, row.step) for row in metrics.evaluations.get("", []) if row.loss is not None
    ]
    saved, advice = saved_steps(run.checkpoints), []
    if goes_on:
        command = shlex.join(["python", *record["starts"][-1].get("command", ["train.py"])])
        advice.append(("Go on from the last checkpoint: the same command resumes.", command))
    if losses and min(losses) != losses[-1]:
        (loss, step), (last, _) = min(losses), losses[-1]
        worse = f"The validation loss is {last:.4f} nats, and was {loss:.4f} at step {step:,}"
        command = f"python sample.py {path} --step {step}" if step in saved else ""
        advice.append((f"{worse}: more steps on this text may not help.", command))
    elif len(losses) > 1:
        fell = losses[-2][0] - losses[-1][0]
        better = f"The validation loss fell by {fell:.4f} nats since the evaluation before"
        advice.append((f"{better}: more steps may help (training.steps).", ""))
    if saved:
        advice += [
            ("Write text, coloured by probability.", f"python sample.py {path} --html S.html"),
            ("See how a text of yours became probable.", f"python -m llm history {path} --text T"),
        ]
    command = f"python -m llm report {path} OTHER --html BOTH.html"
    return [*advice, ("Compare with another run.", command)]


def report_page(report: Report, *, live: bool = False) -> str:
    """One HTML document.

    Args:
      live: the page asks the server that sent it for newer numbers (report_server.py).
    """
    rows = [
        f"<tr><td>{escape(run['name'])}<td>{escape(of['source'] or 'the whole')}<td>{step:,}"
        f"<td>{'not finite' if loss is None else format(loss, '.4f')}</tr>"
        for run in report["runs"]
        for of in run.get("evaluations", ())
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
    one: Report = {
        "name": run.name,
        "state": f"a text at {len(rows)} checkpoints",
        "vocab_size": spellings.tokenizer.vocab_size,
        "texts": [learning(rows, spellings)],
    }
    return report_page({"written": now(), "runs": [one], "differences": {}, "parting": []})


def packed(report: Report) -> str:
    """JSON, gzipped, in base64."""
    text = json.dumps(report, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()
