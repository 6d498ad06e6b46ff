"""average: the mean of checkpoints against numpy in float64, and what is refused."""

import gc
import json
import shutil

import jax
import numpy as np
import pytest
from runs import saved_arrays, train, write_config

from llm.__main__ import main
from llm.commands.diff import lineage
from llm.errors import CheckpointError, UsageError
from llm.run.directory import RunDirectory
from llm.run.open import open_model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with checkpoints of steps 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("average")
    kept = {"every": 4, "keep": 3, "keep_best": False}
    assert train(write_config(folder, checkpoint=kept)) == 0
    return folder / "run"


def test_the_mean_is_numpys_and_a_run_to_open(trained, tmp_path, capsys):
    output = tmp_path / "mean"
    arguments = ["average", str(trained), "--last", "3", "--output", str(output), "--json"]
    capsys.readouterr()
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    folders = [trained / "checkpoints" / str(step) / "params" for step in (4, 8, 12)]
    members = [saved_arrays(folder) for folder in folders]
    opened = open_model(output)
    for name, found in opened.params.items():
        exact = np.mean([member[name].astype(np.float64) for member in members], axis=0)
        np.testing.assert_allclose(found, exact, rtol=3e-7, atol=1e-7)
    assert opened.step == 12 and opened.params_sha256 == report["params_sha256"]
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    evaluated = {row["step"]: row["loss"] for row in rows if row["kind"] == "eval"}
    assert report["members"][-1]["validation_loss"] == pytest.approx(evaluated[12], abs=1e-6)
    record = json.loads((output / "run.json").read_text())
    assert record["imported"]["members"] == report["members"]
    with pytest.raises(UsageError, match=f"holds the mean of checkpoints of {trained}: it was not"):
        train(trained.parent / "config.toml", "--run.dir", str(output))


def test_steps_that_are_named_are_averaged_and_are_its_ancestors(trained, tmp_path, capsys):
    output = str(tmp_path / "mean")
    capsys.readouterr()
    assert main(["average", str(trained), "--steps", "8", "4", "--output", output, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [member["step"] for member in report["members"]] == [4, 8]
    assert report["step"] == 8
    assert main(["verify", output]) == 0
    said = capsys.readouterr()
    assert f"the run is the mean of steps 4, 8 of {trained}" in said.err
    ancestor = json.loads(said.out)["ancestor"]
    assert ancestor["members"] == [4, 8]
    assert ancestor["params_sha256"] == report["members"][-1]["params_sha256"]
    assert main(["diff", str(trained), output]) == 0
    assert "B comes from A at step 8" in capsys.readouterr().out
    assert [of["name"] for of in lineage(RunDirectory(tmp_path / "mean"))] == ["mean", "run"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--last", "1"], "1 to average; expected at least 2"),
        (["--last", "9"], "3 to average; expected at least 9"),
        (["--steps", "4", "5"], "no checkpoint of step 5"),
        (["--steps", "4", "4"], "1 to average"),
        ([], "either --last N or --steps"),
        (["--last", "2", "--steps", "4", "8"], "either --last N or --steps"),
    ],
)
def test_what_cannot_be_averaged_is_said(trained, tmp_path, flags, said):
    with pytest.raises(UsageError, match=said):
        main(["average", str(trained), "--output", str(tmp_path / "mean"), *flags])
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_kept_and_a_run_is_not_written_into(trained, tmp_path):
    (tmp_path / "mean").mkdir()
    (tmp_path / "mean" / "mine").touch()
    for output, said in ((tmp_path / "mean", "exists already"), (trained / "mean", "lies in")):
        with pytest.raises(UsageError, match=said):
            main(["average", str(trained), "--last", "2", "--output", str(output)])
    assert not (trained / "mean").exists()


def test_a_damaged_member_is_no_member(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints" / "8" / "params").rglob("*"):
        if path.is_file() and path.stat().st_size > 100:
            path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(CheckpointError, match="8"):
        main(["average", str(tmp_path / "run"), "--last", "3", "--output", str(tmp_path / "mean")])
    assert not (tmp_path / "mean").exists()


def test_one_model_is_in_memory_when_the_next_is_opened(trained, tmp_path, monkeypatch):
    held = []

    def opened(*arguments):
        gc.collect()
        # Two arrays may show one buffer: the whole, and its only shard.
        arrays = [array for array in jax.live_arrays() if len(array.devices()) == 1]
        buffers = {array.unsafe_buffer_pointer(): array.nbytes for array in arrays}
        held.append(sum(buffers.values()))
        return open_model(*arguments)

    monkeypatch.setattr("llm.run.open.open_model", opened)
    output = tmp_path / "mean"
    assert main(["average", str(trained), "--last", "3", "--output", str(output)]) == 0
    size = sum(array.nbytes for array in open_model(output).params.values())
    assert [round((now - held[0]) / size) for now in held] == [0, 1, 1]
