"""verify, replay and diff tell the truth about a run."""

import base64
import gzip
import json
import math
import re
import shutil

import numpy as np
import pytest
from runs import STEPS, train, write_config

import llm.run.open
from llm.commands import diff, replay, run_command, verify
from llm.errors import CheckpointError, DataError, UsageError
from llm.inference.records import NO_NUMBERS, EndRecord, Numerics, RunRecord, Spellings, to_line
from llm.inference.transcript import Transcript
from llm.run import checkpoint
from llm.run.checkpoint import saved_steps
from llm.run.directory import RunDirectory
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


@pytest.mark.thorough
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


@pytest.mark.parametrize("group", ["params", "training"])
def test_verify_finds_damaged_arrays_and_hashes_every_file_once(
    group, runs, tmp_path, capsys, monkeypatch
):
    """Also files whose damage changes no array that is read."""
    run = shutil.copytree(runs[0] / "run", tmp_path / "run")
    folder = run / "checkpoints" / str(STEPS)
    hashed, compare = [], checkpoint._problem

    def comparing(path, expected):
        hashed.append(path)
        return compare(path, expected)

    monkeypatch.setattr(checkpoint, "_problem", comparing)
    assert printed(capsys, verify, run)["manifest_ok"]
    assert len(hashed) == len(set(hashed)), "a file is hashed twice"
    written = {path for path in folder.rglob("*") if path.is_file()}
    assert set(hashed) == written - {folder / "manifest.json"}
    largest = max((folder / group).rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{largest.name} has changed"):
        verify.main([str(run), "--json"])
    assert json.loads(capsys.readouterr().out)["manifest_ok"] is False


def removing(monkeypatch, run, times, adding=()):
    """As a run that trains: the next `times` steps that are opened are removed before they are
    read, each time after the next of `adding` was saved."""
    open_model, removed, new = llm.run.open.open_model, [], list(adding)

    def opening(path, step=None):
        if len(removed) < times:
            removed.append(step)
            if new:
                shutil.copytree(run / "checkpoints" / str(step), run / "checkpoints" / new.pop(0))
            shutil.rmtree(run / "checkpoints" / str(step))
        return open_model(path, step)

    monkeypatch.setattr(llm.run.open, "open_model", opening)
    return removed


def test_verify_takes_the_newest_again_when_the_run_removed_it(runs, tmp_path, capsys, monkeypatch):
    run = shutil.copytree(runs[0] / "run", tmp_path / "run")
    removed = removing(monkeypatch, run, times=1, adding=["99"])
    assert printed(capsys, verify, run)["step"] == 99
    assert removed == [STEPS]


def test_verify_of_steps_that_the_run_removed_meanwhile_finds_no_damage(
    runs, tmp_path, capsys, monkeypatch
):
    run = shutil.copytree(runs[0] / "run", tmp_path / "run")
    removed = removing(monkeypatch, run, times=1)
    assert run_command(verify.main, [str(run), "--all"]) == 0
    said = capsys.readouterr()
    assert f"removed by the run meanwhile, which is no damage: step {removed[0]}" in said.err
    verified = [json.loads(line)["step"] for line in said.out.splitlines()]
    assert verified == saved_steps(run / "checkpoints") and verified[-1] == STEPS
    removing(monkeypatch, run, times=1)
    assert run_command(verify.main, [str(run), "--step", str(STEPS)]) == 2
    assert f"which is no damage: step {STEPS};" in capsys.readouterr().err


def test_verify_gives_up_when_the_newest_is_gone_each_time(runs, tmp_path, capsys, monkeypatch):
    run = shutil.copytree(runs[0] / "run", tmp_path / "run")
    removing(monkeypatch, run, verify.ATTEMPTS, [str(step) for step in range(90, 99)])
    assert run_command(verify.main, [str(run)]) == 2
    assert f"gone {verify.ATTEMPTS} times" in capsys.readouterr().err


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


def test_replay_refuses_a_step_that_was_not_trained_yet(runs, tmp_path):
    with pytest.raises(UsageError, match=f"not trained yet; .* expected 1 to {STEPS}$"):
        replay.main([str(runs[0] / "run"), "--step", str(STEPS + 1)])
    run = shutil.copytree(runs[0] / "run", tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    replay.check_step(RunDirectory(run), STEPS)  # there is its checkpoint
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UsageError, match="not trained yet"):
        replay.main([str(run), "--step", "1"])


def test_replay_counts_one_token_as_one():
    sequence = {"row": 0, "ids": [7], "text": "x", "documents": []}
    parts = [{"document": "a", "offset": 5, "tokens": count} for count in (1, 2)]
    page = replay.for_people(1, sequence | {"documents": parts})
    assert "a from token 5: 1 token\n" in page and "a from token 5: 2 tokens\n" in page


def test_diff_says_how_much_was_compared(runs, tmp_path, capsys):
    whole, part = runs[0] / "run", shutil.copytree(runs[0] / "run", tmp_path / "run")
    lines = (part / "metrics.jsonl").read_text().splitlines(keepends=True)
    (part / "metrics.jsonl").write_text(lines[0])
    report = printed(capsys, diff, whole, part, "--json")
    assert (report["common_steps"], report["recorded_steps"]) == (1, [STEPS, 1])
    assert diff.main([str(whole), str(part)]) == 0
    said = capsys.readouterr().out
    assert f"1 step in both: the first run has {STEPS} recorded, the second 1\n" in said
    (part / "metrics.jsonl").unlink()
    assert diff.main([str(part), str(whole)]) == 0
    said = capsys.readouterr().out
    assert "no step is recorded in both" in said and "equal" not in said
    assert f"the first run has 0 recorded, the second {STEPS}" in said


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("run.json", "[]", "run.json is not what a run writes: expected"),
        ("run.json", "{}", "run.json is not what a run writes: expected"),
        ("run.json", '{"data": {}, "starts": []}', "run.json is not what a run writes: expected"),
        ("run.json", '{"a":' * 10_000, "run.json cannot be read .its values are nested too deeply"),
        ("metrics.jsonl", "torn\n[1]\n", "metrics.jsonl, line 2: expected .* found \\[1\\]"),
        ("metrics.jsonl", '{"a": 1}\n', "metrics.jsonl, line 1: expected"),
    ],
)
def test_json_of_another_shape_is_named(runs, tmp_path, capsys, name, content, named):
    run = shutil.copytree(runs[0] / "run", tmp_path / "run")
    (run / name).write_text(content)
    for command, arguments in ((diff, [runs[0] / "run"]), (replay, ["--step", 1])):
        assert run_command(command.main, [str(run), *map(str, arguments)]) == 4
        assert re.search(named, capsys.readouterr().err)


def test_a_field_of_run_json_that_was_edited_by_hand_is_named(runs, tmp_path):
    run = RunDirectory(shutil.copytree(runs[0] / "run", tmp_path / "run"))
    written = run.read_provenance()
    batch_size = {"training.batch_size": ["8", 16]}
    for change, place in [
        ({"model": {}}, "model.compute_dtype"),
        ({"data": written["data"] | {"origins": [3]}}, "data.origins.0"),
        ({"data": written["data"] | {"fingerprint": None}}, "data.fingerprint"),
        ({"starts": [written["starts"][0] | {"changed": batch_size}]}, "starts.0.changed"),
        ({"starts": [{}]}, "starts.0.from_step"),
        ({"imported": "elsewhere"}, "imported"),
    ]:
        run.provenance.write_text(json.dumps(written | change))
        with pytest.raises(CheckpointError, match=rf"expected an object with .*; {place}"):
            run.read_provenance()


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
    transcript = Transcript(Spellings(tokenizer))
    said = [NO_NUMBERS, *((x, 1, 0.5, None, 1.0, 257, ()) for x in logprobs)]
    tokens = [transcript.add(id_, "prompt", one) for id_, one in enumerate(said, start=97)]
    checkpoint = {"run": "mine", "step": step, "params_sha256": "ab" * 32}
    run = RunRecord.of(checkpoint, tokenizer, None, Numerics("teacher_forced"), 0)
    records = [run, *tokens, EndRecord.of(0, tokens, "length", "prompt")]
    path.write_text("".join(map(to_line, records)))


def test_diff_of_two_dumps_of_a_text_is_a_page_of_what_changed(tmp_path, capsys):
    files = [tmp_path / name for name in ("4.jsonl", "8.jsonl", "other.jsonl", "page.html")]
    dump(files[0], 4, [-3.0, -1.0])
    dump(files[1], 8, [-1.0, -1.5])
    dump(files[2], 8, [-1.0, -1.5, -2.0])
    assert diff.main([*map(str, files[:2]), "--html", str(files[3])]) == 0
    page = files[3].read_text()
    assert "From mine, step 4 to mine, step 8" in page
    packed = re.search(r'"records":\s*"([^"]+)"', page).group(1)
    records = json.loads(gzip.decompress(base64.b64decode(packed)))
    tokens = [record for record in records if record["type"] == "token"][1:]
    changes = [(token["before"]["logprob"], token["logprob"]) for token in tokens]
    assert changes == [(-3.0, -1.0), (-1.0, -1.5)]
    for wrong, error, words in [
        (
            [files[0], files[2], "--html", files[3]],
            UsageError,
            "token 3 of sample 0: the first has ended",
        ),
        ([files[0], tmp_path], UsageError, "cannot read the records"),
        ([files[0], tmp_path / "none", "--html", files[3]], UsageError, "none"),
        ([files[0], files[3], "--html", tmp_path / "x"], DataError, "line 1"),
        ([files[0], files[1], "--html", tmp_path / "no" / "x"], UsageError, "no folder"),
    ]:
        with pytest.raises(error, match=words):
            diff.main([*map(str, wrong)])


def test_diff_of_two_dumps_sums_up_before_after_and_the_difference(tmp_path, capsys):
    files = [str(tmp_path / name) for name in ("4.jsonl", "8.jsonl", "page.html")]
    dump(tmp_path / "4.jsonl", 4, [-3.0, -1.0])
    dump(tmp_path / "8.jsonl", 8, [-1.0, -1.5])
    report = printed(capsys, diff, *files[:2], "--json")
    sums = ("sum_logprob", "perplexity", "bits_per_byte")
    before, after = (math.exp(2.0), 2 / math.log(2)), (math.exp(1.25), 1.25 / math.log(2))
    for name, total, (perplexity, bits) in (("before", -4.0, before), ("after", -2.5, after)):
        expected = pytest.approx([total, perplexity, bits], rel=1e-12)
        assert [report[name][key] for key in sums] == expected
    assert (report["tokens"], report["before"]["step"], report["after"]["step"]) == (2, 4, 8)
    assert report["difference"] == {k: report["after"][k] - report["before"][k] for k in sums}
    assert diff.main([*files[:2], "--html", files[2]]) == 0
    said = capsys.readouterr().out
    lines = ["From mine, step 4 to mine, step 8: 2 tokens", "before", "after", "difference"]
    assert [
        line[: len(start)] for line, start in zip(said.splitlines(), lines, strict=True)
    ] == lines
    assert re.findall(r"log-likelihood +(\S+) nats", said) == ["-4.0000", "-2.5000", "1.5000"]
    assert re.findall(r"perplexity +(\S+),", said) == ["7.3891", "3.4903", "-3.8987"]
    dump(tmp_path / "4.jsonl", 4, [])
    assert printed(capsys, diff, files[0], files[0], "--json")["difference"]["perplexity"] is None
    dump(tmp_path / "4.jsonl", 4, [-1e6])
    assert (
        diff.main([files[0], files[0]]) == 0
        and "perplexity            -," in capsys.readouterr().out
    )


@pytest.mark.thorough
def test_replay_knows_that_the_batch_size_was_changed(tmp_path, capsys):
    config = write_config(tmp_path)
    assert train(config, "--training.steps", "2") == 0
    # The batch before is not divisible by the micro-batch of now.
    larger = ["--training.batch-size=16", "--training.micro-batch-size=16", "--run.allow-change"]
    assert train(config, "--training.steps", "3", *larger) == 0
    for step, sequences in ((2, 8), (3, 16)):
        page = printed(capsys, replay, tmp_path / "run", "--step", step, "--json")
        assert len(page["sequences"]) == sequences
