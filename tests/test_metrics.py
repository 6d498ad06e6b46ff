"""metrics.jsonl holds each step once, survives torn lines and full disks, and is strict JSON."""

import json

import pytest

from llm.run import metrics as metrics_module
from llm.run.metrics import MetricsFile, read_metrics


def row(step, kind="train", **values):
    return {"kind": kind, "step": step, "loss": 1.0 / step, **values}


def write(path, steps):
    metrics = MetricsFile(path)
    for step in steps:
        metrics.write(row(step))
    metrics.close()


def test_rewinding_keeps_each_step_up_to_the_checkpoint_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3, 4, 5])
    metrics = MetricsFile(path)
    dropped = metrics.rewind(3)
    assert [r["step"] for r in dropped] == [4, 5]
    metrics.write(row(4))
    metrics.close()
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_that_a_crash_cut_off_is_dropped(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3])
    path.write_bytes(path.read_bytes()[:-cut])
    metrics = MetricsFile(path)
    metrics.rewind(10)
    metrics.write(row(3))
    metrics.close()
    lines = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_numbers_that_are_not_finite_become_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.write({"kind": "train", "step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    metrics.close()
    assert read_metrics(path) == [{"kind": "train", "step": 1, "loss": None, "grad_norm": None}]


def test_a_full_disk_is_warned_of_once_and_counted(tmp_path, monkeypatch, capsys):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.write(row(1))
    monkeypatch.setenv("LLM_FAULT", "metrics.write:enospc")
    metrics.write(row(2))
    metrics.write(row(3))
    monkeypatch.delenv("LLM_FAULT")
    metrics.write(row(4))
    metrics.close()
    assert metrics.lost == 2
    assert capsys.readouterr().err.count("cannot be written") == 1
    assert [r["step"] for r in read_metrics(path)] == [1, 4]


def test_the_best_evaluation_is_the_lowest_validation_loss(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5)):
        metrics.write({"kind": "eval", "step": step, "split": "validation", "loss": loss})
    assert metrics.best_evaluation() == (2, 2.0)
    assert metrics.has_evaluation(2)
    assert not metrics.has_evaluation(4)


@pytest.mark.parametrize(
    ("refused", "step", "expected"),
    [
        ([103, 111, 127, 140], 140, 1),  # between them updates were applied and not written
        ([103, 111, 127, 140], 150, 0),
        ([138, 139, 140], 140, 3),
        ([138, 139, 140, 141], 140, 3),
        ([], 140, 0),
    ],
)
def test_skipped_updates_are_counted_in_a_row_up_to_the_step(tmp_path, refused, step, expected):
    """With logging.every = 100: of the applied updates only the hundredth has a row."""
    first = MetricsFile(tmp_path / "metrics.jsonl")
    for number in sorted([100, *refused]):
        first.write(row(number, **({"spike": True} if number in refused else {})))
    first.close()
    metrics, other = (
        MetricsFile(tmp_path / "metrics.jsonl"),
        MetricsFile(tmp_path / "no", writes=False),
    )
    metrics.rewind(step)
    other.remember(metrics.memory(), step)
    assert metrics.skipped == other.skipped == expected


def test_only_the_newest_steps_stay_in_memory_and_every_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_module, "NEWEST_ROWS", 5)
    path = tmp_path / "metrics.jsonl"

    def in_memory(metrics):
        return [(r["kind"], r["step"]) for r in metrics.rows]

    metrics = MetricsFile(path)
    metrics.write(row(1, "eval", split="validation"))
    for step in range(1, 21):
        metrics.write(row(step))
    metrics.close()
    newest = [("eval", 1), *(("train", step) for step in range(16, 21))]
    assert in_memory(metrics) == newest
    again = MetricsFile(path)
    again.rewind(20)
    assert in_memory(again) == newest
    assert len(read_metrics(path)) == 21
