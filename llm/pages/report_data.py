"""What the report of a run shows, as numbers: curves, marks, time, texts being learnt.

Everything is read from the files of the run, while it trains too. What a crash left of a line is
passed over. Curves are thinned by what can be seen: of each bucket of rows the extremes of every
curve stay, so that no peak is lost, and what stays are rows of metrics.jsonl, not means of them.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from llm.config import Config, differences
from llm.files import read_json
from llm.run.directory import RunDirectory, saved_steps
from llm.run.metrics import Rows
from llm.run.probes import ProbeKey, ProbeRow

Column = npt.NDArray[np.float64]

# A chart is about a thousand pixels wide; up to MOST_ROWS nothing is left out.
BUCKETS, MOST_ROWS = 300, 3000
# A smoothed curve is the mean over a fiftieth of the rows.
SMOOTHED = 50
# Rows that are parsed before they become numbers of an array.
ROWS_AT_ONCE = 50_000
# Skipped updates that are marked, and evaluations that are drawn.
MOST_MARKS, MOST_EVALUATIONS = 200, 1000

_Step = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class _Train(msgspec.Struct, tag_field="kind", tag="train"):
    step: _Step
    tokens: _Step
    step_seconds: Annotated[float, msgspec.Meta(ge=0, le=1e12)]
    loss: float | None
    grad_norm: float | None = None
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    memory_bytes: float | None = None
    mfu: float | None = None
    load_balancing_loss: float | None = None
    router_z_loss: float | None = None
    router_load_max: float | None = None
    finite: bool = True
    spike: bool = False


# The curves of training, in the order of the page; a run has those that its rows have.
_FIELDS = _Train.__struct_fields__
CURVES = _FIELDS[3:-2]


class _Evaluation(msgspec.Struct, tag_field="kind", tag="eval"):
    step: _Step
    loss: float | None
    bits_per_byte: float | None = None
    source: str = ""


class Metrics:
    """metrics.jsonl in columns, each step once.

    Attributes:
      train: "step", "tokens", "seconds" and the curves; NaN where a row has no number. Seconds are
        those of the steps until then, without evaluations, saves and what was done again.
      evaluations: source -> its rows; "" is the whole.
      skipped: (step, why) of updates that were not applied.
      broken: how many lines are no rows.
    """

    def __init__(self, path: Path):
        self._rows = Rows(path, _Train | _Evaluation)
        self._forget()
        self.read()

    def _forget(self) -> None:
        self._table: npt.NDArray[np.float64] = np.zeros((0, len(_FIELDS)))
        self._evaluated: dict[tuple[str, int], _Evaluation] = {}

    def read(self) -> None:
        """Read what was appended since the last time."""
        new: list[tuple[Any, ...]] = []
        for _, row in self._rows.appended():
            if row is None:
                self._forget()
            elif isinstance(row, _Train):
                new.append(msgspec.structs.astuple(row))
                if len(new) == ROWS_AT_ONCE:
                    self._add(new)
            else:
                self._evaluated[row.source, row.step] = row
        self._add(new)
        self.broken = self._rows.broken
        columns = dict(zip(_FIELDS, self._table.T, strict=True))
        refused = (columns["finite"] == 0) | (columns["spike"] == 1)
        self.skipped = [
            (int(row[0]), "a spike" if row[-1] else "not finite") for row in self._table[refused]
        ]
        self.train = {name: columns[name] for name in ("step", "tokens", *CURVES)}
        # With logging.every a row stands for the steps since the row before it.
        each = columns["step_seconds"] * np.diff(columns["step"], prepend=0.0)
        self.train["seconds"] = np.cumsum(each)
        self.evaluations: dict[str, list[_Evaluation]] = {}
        for (source, _), one in sorted(self._evaluated.items(), key=lambda item: item[0]):
            self.evaluations.setdefault(source, []).append(one)

    def _add(self, new: list[tuple[Any, ...]]) -> None:
        """Take rows from a list. Of a step that was taken twice the later row counts."""
        table = np.concatenate([self._table, np.array(new, np.float64).reshape(-1, len(_FIELDS))])
        new.clear()
        if (np.diff(table[:, 0]) <= 0).any():
            _, last = np.unique(table[::-1, 0], return_index=True)
            table = table[len(table) - 1 - last]
        self._table = table

    def at(self, name: str, steps: Sequence[int]) -> list[float]:
        """Tokens or seconds after some steps."""
        known = [0.0, *self.train["step"]], [0.0, *self.train[name]]
        return [float(x) for x in np.interp(steps, *known)]


class ProbeRows:
    """Where the rows of each text lie in probes.jsonl. They are read when they are drawn.

    A text that the settings changed is another text; a step that was scored twice counts once.
    """

    def __init__(self, path: Path):
        self._rows = Rows(path, ProbeKey)
        self._offsets: dict[tuple[str, bytes], dict[int, int]] = {}
        self._samples: dict[int, int] = {}
        self.read()

    def read(self) -> None:
        """Read what was appended since the last time."""
        for offset, row in self._rows.appended():
            if row is None:
                self._offsets, self._samples = {}, {}
            elif row.prompt is not None:
                self._samples[row.step] = offset
            else:
                self._offsets.setdefault((row.name, bytes(row.ids)), {})[row.step] = offset

    def texts(self, most: int, size: int) -> list[list[ProbeRow]]:
        """Of each text the rows at so many steps, evenly; of ids below `size` alone."""
        found = [self._at(of, most, size) for of in self._offsets.values()]
        return [rows for rows in found if rows]

    def samples(self, most: int, size: int) -> list[ProbeRow]:
        """What the model wrote, at so many steps."""
        return self._at(self._samples, most, size)

    def _at(self, offsets: Mapping[int, int], most: int, size: int) -> list[ProbeRow]:
        rows = self._rows.at([offsets[step] for step in spread(sorted(offsets), most)], ProbeRow)
        return [row for row in rows if has_ids_below(size, row)]


def has_ids_below(size: int, row: ProbeRow) -> bool:
    """Whether a tokenizer of so many tokens has all ids of a row."""
    likeliest = (said.likeliest or 0 for said in row.said if said is not None)
    return max(*row.ids, *likeliest, 0, 0) < size


class GrowingRows:
    """The rows of a run. What was read of them is kept until they are read on."""

    def __init__(self, run: RunDirectory):
        self.metrics, self.probes = Metrics(run.metrics), ProbeRows(run.probes)

    def read(self) -> None:
        self.metrics.read()
        self.probes.read()


def visible(columns: Sequence[Column], buckets: int = BUCKETS) -> npt.NDArray[np.int64]:
    """The rows that a chart shows: the first, the last, and each bucket's extremes in each column.

    Buckets are equal in number of rows and, for a logarithmic axis, in its logarithm.
    """
    length = len(columns[0])
    if length <= MOST_ROWS:
        return np.arange(length)
    even = np.linspace(0, length, buckets + 1).astype(int)
    edges = np.unique([*even, *np.geomspace(1, length, buckets + 1).astype(int)])
    kept = [0, length - 1]
    for column, (start, stop) in itertools.product(columns, itertools.pairwise(edges)):
        part = column[start:stop]
        if not np.isnan(part).all():
            kept += [start + np.nanargmin(part), start + np.nanargmax(part)]
    return np.unique(kept)


def smoothed(column: Column) -> Column:
    """The mean of the finite numbers around each row, over a fiftieth of all rows."""
    half = max(1, len(column) // SMOOTHED // 2)
    known = ~np.isnan(column)
    counts = np.concatenate([[0], np.cumsum(known)])
    places = np.arange(len(column))
    start, stop = np.maximum(places - half, 0), np.minimum(places + half + 1, len(column))
    counted = counts[stop] - counts[start]
    with np.errstate(all="ignore"):
        sums = np.concatenate([[0.0], np.cumsum(np.where(known, column, 0.0))])
        return np.where(counted > 0, (sums[stop] - sums[start]) / counted, np.nan)


def numbers(column: Any) -> list[float | int | None]:
    """A column as JSON: whole numbers without a point, null for NaN and infinities."""
    return [
        None if not math.isfinite(x) else int(x) if x.is_integer() and abs(x) < 2**53 else x
        for x in map(float, column)
    ]


def curves(metrics: Metrics, whole: bool) -> dict[str, Any]:
    """The curves of training and validation, ready for JSON."""
    train = metrics.train
    present = [name for name in CURVES if not np.isnan(train[name]).all()]
    kept = visible([train[name] for name in present] or [train["step"]])
    kept = np.arange(len(train["step"])) if whole else kept
    evaluations = []
    for source, rows in metrics.evaluations.items():
        rows = rows if whole else spread(rows, MOST_EVALUATIONS)
        steps = [row.step for row in rows]
        evaluations.append(
            {
                "source": source,
                "step": steps,
                "tokens": numbers(metrics.at("tokens", steps)),
                "seconds": numbers(metrics.at("seconds", steps)),
                "loss": [row.loss for row in rows],
                "bits_per_byte": [row.bits_per_byte for row in rows],
            }
        )
    names = ("step", "tokens", "seconds", *present)
    return {
        "train": {name: numbers(train[name][kept]) for name in names},
        "smoothed": {name: numbers(smoothed(train[name])[kept]) for name in present},
        "evaluations": evaluations,
        "rows": len(train["step"]),
    }


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of a row of things, evenly, the first and the last among them."""
    places = np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)
    return [items[place] for place in places]


def changed_settings(config: Config) -> dict[str, Any]:
    """`section.key` -> value of settings that were chosen: neither default nor a consequence."""
    default = Config()
    given = {name: new for name, (_, new) in differences(default.resolved(), config).items()}
    for key in [name.removeprefix("model.") for name in given if name.startswith("model.")]:
        update = {key: getattr(default.model, key)}
        if config.model.model_copy(update=update).resolved() == config.model:
            del given[f"model.{key}"]
    return given


def marks(metrics: Metrics, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Restarts and skipped updates, by step."""
    found = [
        (start["from_step"], "restart", start.get("time", "")) for start in record["starts"][1:]
    ]
    found += [(step, "skipped", why) for step, why in spread(metrics.skipped, MOST_MARKS)]
    found.sort()
    steps = [step for step, _, _ in found]
    columns = found, metrics.at("tokens", steps), metrics.at("seconds", steps)
    return [
        {"step": step, "tokens": tokens, "seconds": seconds, "what": what, "why": why}
        for (step, what, why), tokens, seconds in zip(*columns, strict=True)
    ]


def time_spent(metrics: Metrics, starts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Seconds by what took them, over all starts; and how many starts did not say.

    A start says how long it prepared text, evaluated and saved, and when its first step was
    complete (llm/run/start.py:record_end). The time of steps is in their rows; the first row of a
    start has its compilation too. A restart costs its text, its compilation and the steps that were
    done again.
    """
    spent = dict.fromkeys(("text", "compiling", "steps", "evaluation", "saves", "restarts"), 0.0)
    each = np.diff(metrics.train["seconds"], prepend=0.0)
    recorded = metrics.train["step"]
    spent["steps"], unsaid, total = float(each.sum()), 0, 0.0
    for number, start in enumerate(starts):
        told = start.get("seconds") or {}
        unsaid += not told
        first = float(each[recorded == start["from_step"] + 1].sum())
        spent["steps"] -= first
        spent["restarts" if number else "text"] += told.get("text", 0.0)
        spent["restarts" if number else "compiling"] += told.get("compiling", first)
        spent["restarts"] += start.get("redone_seconds", 0.0)
        for part in ("evaluation", "saves"):
            spent[part] += told.get(part, 0.0)
        total += told.get("total", 0.0)
    if not unsaid:
        spent["other"] = max(0.0, total - sum(spent.values()))
    return {"seconds": dict(zip(spent, numbers(spent.values()), strict=True)), "unsaid": unsaid}


def receipt(run: RunDirectory) -> list[ProbeRow]:
    """The texts of the receipt of the newest step that has one, with their log-probabilities."""
    for step in reversed(saved_steps(run.checkpoints)):
        try:
            found = read_json(run.checkpoints / str(step) / "receipt.json")
            named = {"step": step, "name": "Held-out text of the receipt"}
            return [
                msgspec.convert({**named, "ids": ids, "said": [None, *zip(logprobs)]}, ProbeRow)
                for ids, logprobs in zip(found["tokens"], found["logprobs"], strict=True)
            ]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return []
