"""A text at each checkpoint of a run: the rows are what `score` says of that checkpoint."""

import json
import shutil
import unicodedata

import pytest

from llm.__main__ import main
from llm.commands.history import for_people
from llm.errors import CheckpointError, UsageError
from llm.run.checkpoint import saved_steps

TEXT = "the teeth"


def history(run, capsys, *words):
    assert main(["history", str(run), "--text", TEXT, *words]) == 0
    return capsys.readouterr()


def test_each_row_is_the_score_of_its_checkpoint(unbroken, tmp_path, capsys):
    run = unbroken / "run"
    found = json.loads(history(run, capsys, "--json").out)
    assert found["steps"] == saved_steps(run / "checkpoints") and len(found["steps"]) > 1
    assert "".join(found["tokens"]) == TEXT
    for step, logprobs in zip(found["steps"], found["logprobs"], strict=True):
        probs = tmp_path / f"{step}.jsonl"
        words = ["score", str(run), "--step", str(step), "--text", TEXT, "--probs", str(probs)]
        assert main(words) == 0
        records = map(json.loads, probs.read_text().splitlines())
        assert logprobs == [r["logprob"] for r in records if r["type"] == "token"]
    capsys.readouterr()
    table = history(run, capsys).out.splitlines()
    assert table[1].split() == ["step", *map(str, found["steps"])]
    assert len(table) == 2 + len(TEXT) + 1


def test_a_damaged_checkpoint_is_passed_over_and_said(unbroken, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(unbroken / "run", run)
    steps = saved_steps(run / "checkpoints")
    for file in (run / "checkpoints" / str(steps[0])).rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(b"\0" * file.stat().st_size)
    said = history(run, capsys, "--json")
    assert json.loads(said.out)["steps"] == steps[1:]
    assert f"WARNING: step {steps[0]} is passed over" in said.err
    for step in steps[1:]:
        shutil.rmtree(run / "checkpoints" / str(step))
    with pytest.raises(CheckpointError, match="no checkpoint that can be read"):
        main(["history", str(run), "--text", TEXT])


def test_columns_stand_below_each_other_in_a_terminal_whatever_the_tokens():
    tokens = ["a", "名字", "👩", "\u202e", "very long indeed, 名字"]
    found = {"steps": [1, 20], "tokens": tokens, "logprobs": [[None, -1.0, -2.0, -3.0, -4.0]] * 2}
    _, *lines = for_people(found).splitlines()
    wide = [sum(unicodedata.east_asian_width(c) in "WF" for c in line) for line in lines]
    assert {len(line) + more for line, more in zip(lines, wide, strict=True)} == {14 + 2 * 10}


def test_a_text_of_one_token_is_refused(unbroken):
    with pytest.raises(UsageError, match="--text has 1 token; expected at least 2"):
        main(["history", str(unbroken / "run"), "--text", "t"])
