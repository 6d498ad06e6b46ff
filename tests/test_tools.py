"""verify, replay and diff tell the truth about a run."""

import json
import shutil

import numpy as np
import pytest
from runs import STEPS, train, write_config

from llm.commands import diff, replay, verify
from llm.errors import CheckpointError, DataError, UsageError
from llm.inference.distribution import Prediction
from llm.inference.records import RecordBuilder, to_line
from llm.inference.transcript import Transcript
from llm.text.tokenizer import ByteTokenizer


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs that differ in the seed."""
    folders = [tmp_path_factory.mktemp(name) for name in "ab"]
    for seed, folder in enumerate(folders):
        train(write_config(folder, run={"seed": seed}, model={"dropout": 0.0}))
    return folders


def printed(capsys, command, *arguments):
    assert command.main([*map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_verify_prints_what_the_design_promises(runs, capsys):
    result = printed(capsys, verify, runs[0] / "run", "--json")
    assert set(result) == {"step", "params_sha256", "manifest_ok", "receipt_max_abs_diff"}
    assert result["step"] == STEPS
    assert result["manifest_ok"] is True
    assert result["receipt_max_abs_diff"] < 1e-5


def test_verify_finds_a_changed_byte(runs, tmp_path, capsys):
    shutil.copytree(runs[0] / "run", tmp_path / "run")
    receipt = tmp_path / "run" / "checkpoints" / str(STEPS) / "receipt.json"
    receipt.write_text(receipt.read_text().replace("1", "2", 1))
    with pytest.raises(CheckpointError, match=r"receipt.json has changed|expected \d+ bytes"):
        verify.main([str(tmp_path / "run"), "--all"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["manifest_ok"] for line in lines] == [line["step"] != STEPS for line in lines]


def test_replay_shows_text_and_documents_of_the_batch(runs, capsys):
    page = printed(capsys, replay, runs[0] / "run", "--step", 3, "--json")
    text = (runs[0] / "corpus.txt").read_text()
    assert len(page["sequences"]) == 8
    for sequence in page["sequences"]:
        assert sum(part["tokens"] for part in sequence["documents"]) == len(sequence["ids"]) == 17
        place = 0
        for part in sequence["documents"]:
            assert part["document"] == "corpus.txt"
            said = sequence["text"][place : place + part["tokens"]]
            assert text[part["offset"] :].startswith(said)
            place += part["tokens"]


def test_replay_is_what_the_loop_trained_on(runs, tmp_path, capsys, monkeypatch):
    """The loop keeps the batch of a step that is not finite; replay of that step shows the same."""
    config = write_config(
        tmp_path, optimizer={"learning_rate": 1e38, "min_learning_rate": 0.0, "warmup_steps": 0}
    )
    with pytest.raises(Exception, match="step"):
        train(config)
    (kept,) = (tmp_path / "run").glob("nonfinite-step-*.npz")
    step = int(kept.stem.rsplit("-", 1)[1])
    page = printed(capsys, replay, tmp_path / "run", "--step", step, "--json")
    ids = [sequence["ids"] for sequence in page["sequences"]]
    np.testing.assert_array_equal(np.load(kept)["tokens"], ids)


def test_replay_refuses_a_step_before_the_first(runs):
    with pytest.raises(UsageError, match="step 1 is the first"):
        replay.main([str(runs[0] / "run"), "--step", "0"])


def test_diff_names_the_seed_and_the_first_step(runs, capsys):
    report = printed(capsys, diff, runs[0] / "run", runs[1] / "run", "--json")
    assert report["first_difference"]["step"] == 1
    assert report["randomness"] == {"run.seed": [0, 1]}
    assert report["code"] == report["versions"] == report["devices"] == []


def test_diff_of_a_run_with_itself_finds_nothing(runs, capsys):
    report = printed(capsys, diff, runs[0] / "run", runs[0] / "run", "--json")
    assert report["first_difference"] is None
    assert report["common_steps"] == STEPS
    assert not any(report[kind] for kind in ("config", "data", "code", "versions", "devices"))


def dump(path, step, logprobs):
    """A file of records in which ids 0, 1, ... have these log-probabilities."""
    tokenizer = ByteTokenizer()
    builder, transcript = RecordBuilder(tokenizer), Transcript(tokenizer)
    said = [None, *(Prediction(x, 1, 0.5, None, 1.0, 257, ()) for x in logprobs)]
    tokens = [transcript.add(id_, "prompt", one) for id_, one in enumerate(said, start=97)]
    checkpoint = {"run": "mine", "step": step, "params_sha256": "ab" * 32}
    records = [builder.run(checkpoint, None, {"path": "teacher_forced"}, 0)]
    records += [builder.token(0, token) for token in tokens]
    records.append(builder.end(0, tokens, "length", "prompt"))
    path.write_text("".join(map(to_line, records)))


def test_diff_of_two_dumps_of_a_text_is_a_page_of_what_changed(tmp_path, capsys):
    files = [tmp_path / name for name in ("4.jsonl", "8.jsonl", "other.jsonl", "page.html")]
    dump(files[0], 4, [-3.0, -1.0])
    dump(files[1], 8, [-1.0, -1.5])
    dump(files[2], 8, [-1.0, -1.5, -2.0])
    assert diff.main([*map(str, files[:2]), "--html", str(files[3])]) == 0
    page = files[3].read_text()
    assert "From mine, step 4 to mine, step 8" in page
    # The tooltips: exp(-3) to exp(-1), exp(-1) to exp(-1.5).
    assert "4.98 % \u2192 36.8 %" in page and "36.8 % \u2192 22.3 %" in page
    for wrong, error, words in [
        ([files[0], files[2], "--html", files[3]], UsageError, "the first ends after 3 tokens"),
        ([files[0], files[1]], UsageError, "--html"),
        ([files[0], tmp_path / "none", "--html", files[3]], UsageError, "none"),
        ([files[0], files[3], "--html", tmp_path / "x"], DataError, "line 1"),
        ([files[0], files[1], "--html", tmp_path / "no" / "x"], UsageError, "no folder"),
    ]:
        with pytest.raises(error, match=words):
            diff.main([*map(str, wrong)])
