"""metrics.jsonl holds each step once, survives torn lines and full disks, and is strict JSON."""

import json

import pytest
from runs import make_strange

from llm.errors import CheckpointError
from llm.run import metrics as metrics_module
from llm.run.metrics import MetricsFile, newest_rows


def row(step, kind="train", **values):
    values = {"tokens": 8 * step, "step_seconds": 0.5, **values}
    return {"kind": kind, "step": step, "loss": 1.0 / step, **values}


def steps_in(path):
    """The steps in a file, in its order."""
    return [row["step"] for row in newest_rows(path)][::-1]


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
    assert steps_in(path) == [1, 2, 3, 4]


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
    assert path.read_text() == '{"kind": "train", "step": 1, "loss": null, "grad_norm": null}\n'


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
    assert steps_in(path) == [1, 4]


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
    assert len(steps_in(path)) == 21


def test_a_start_parses_the_newest_steps_and_the_evaluations_and_no_other_row(
    tmp_path, monkeypatch
):
    """A file of 20,000 steps with 20 evaluations, of which 30 steps come after the checkpoint."""
    path = tmp_path / "metrics.jsonl"
    with open(path, "w") as file:
        for step in range(1, 20_001):
            file.write(json.dumps(row(step)) + "\n")
            if step % 1000 == 0:
                file.write(json.dumps(row(step, "eval", split="validation")) + "\n")
    expected = path.read_text().splitlines(keepends=True)[: 19_970 + 19]
    parsed, decode = [], metrics_module._decode
    monkeypatch.setattr(metrics_module, "_decode", lambda line: parsed.append(line) or decode(line))
    monkeypatch.setattr(metrics_module, "NEWEST_ROWS", 50)
    assert next(newest_rows(path))["step"] == 20_000
    assert len(parsed) == 1
    parsed.clear()
    metrics = MetricsFile(path)
    assert [r["step"] for r in metrics.rewind(19_970)] == [*range(19_971, 20_001), 20_000]
    assert len(parsed) == 31 + 50 + 19
    assert path.read_text() == "".join(expected)
    assert [r["step"] for r in metrics.rows[-50:]] == [*range(19_921, 19_971)]
    assert metrics.best_evaluation() == (19_000, 1 / 19_000)


def test_lines_are_found_wherever_a_block_of_the_file_ends(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(row(step)) for step in (1, 10, 100)]
    for text, steps in [
        ("\n".join(lines) + "\n", [1, 10, 100]),
        ("\n".join(lines), [1, 10]),
        ("\n" + "\n\n".join(lines) + "\ntorn", [1, 10, 100]),
        (lines[0], []),
        ("", []),
    ]:
        path.write_text(text)
        for block in range(1, 80):
            monkeypatch.setattr(metrics_module, "_BLOCK", block)
            assert steps_in(path) == steps


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": "3"}, r"Expected `int`, got `str` - at `\$.step`"),
        ({"step": 3.5}, "Expected `int`"),
        ({"step": -1}, "Expected `int` >= 0"),
        ({"step": 10**30}, "Expected `int` <= "),
        ({"loss": "low"}, "Expected `float | null`"),
        ({"tokens": None}, "Expected `int`, got `null`"),
        ({"kind": 3}, "Expected `str`"),
        ({"kind": "eval"}, "no split"),
        ({"step_seconds": [[]]}, "Expected `float`"),
    ],
)
def test_a_field_that_was_edited_by_hand_is_named_with_its_line(tmp_path, change, words):
    path = tmp_path / "metrics.jsonl"
    lines = [row(1), {**row(2), **change}, row(3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(CheckpointError, match=rf"metrics.jsonl, line 2: .*{words}"):
        MetricsFile(path).rewind(3)


def test_a_field_that_is_missing_or_nested_ten_thousand_deep_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    without = {name: value for name, value in row(1).items() if name != "tokens"}
    deep = json.dumps(row(1))[:-1] + ', "more": ' + "[" * 100_000 + "}"
    for text, words in ((json.dumps(without), "no tokens"), (deep, "recursion")):
        path.write_text(text + "\n")
        with pytest.raises(CheckpointError, match=f"line 1: .*{words}"):
            next(newest_rows(path))


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder", "loop", "huge"])
def test_metrics_that_are_not_a_file_of_lines_are_refused_in_bounded_memory(tmp_path, kind):
    make_strange(kind, tmp_path / "metrics.jsonl")
    with pytest.raises(CheckpointError, match=r"metrics.jsonl cannot be read: "):
        MetricsFile(tmp_path / "metrics.jsonl").rewind(3)
