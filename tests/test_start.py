"""A directory that holds nothing trained belongs to whoever starts, and what is not ours stays."""

import contextlib
import json
import os

import pytest
from runs import SETTINGS, make_strange, train, write_config

from llm.config import Config
from llm.errors import CheckpointError, DataError, RunLockedError, UsageError
from llm.run import start
from llm.run.directory import RunDirectory
from llm.run.start import claim
from llm.text.tokenizer import ByteTokenizer

CONFIG = Config.model_validate(SETTINGS).resolved()
OTHER = CONFIG.model_copy(update={"run": CONFIG.run.model_copy(update={"seed": 3})})
PROVENANCE = {
    "model": {"compute_dtype": "float32"},
    "data": {"fingerprint": "", "origins": []},
    "starts": [],
}
ROW = {"kind": "train", "step": 1, "loss": 1.0, "tokens": 8, "step_seconds": 0.1}


def claimed(folder, config=CONFIG):
    with contextlib.ExitStack() as held:
        return claim(RunDirectory(folder), config, held)


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "run.lock"
    }


def begin(folder, config=CONFIG):
    """What a start writes before it trains."""
    run = RunDirectory(folder)
    ByteTokenizer().save(run.tokenizer)
    run.write_provenance(PROVENANCE)
    run.write_config(config)
    run.checkpoints.mkdir(exist_ok=True)
    return run


FOREIGN = [
    "log.txt", "nohup.out", ".DS_Store", "thesis.tex", "config.toml~", "config.toml.tmp",
    "lost+found/x", "checkpoints/lost+found/x", "checkpoints/7", "checkpoints/my.partial/x",
    "tokenizer/vocab.json", "wandb/debug.log",
]  # fmt: skip


@pytest.mark.parametrize("begun", [False, True], ids=["nothing of ours", "a start that failed"])
def test_files_that_are_not_ours_are_left_alone(tmp_path, begun):
    for name in FOREIGN:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    if begun:
        begin(tmp_path, OTHER)
    assert claimed(tmp_path) == {}
    start.Checkpoints(tmp_path / "checkpoints", keep=1).clean()
    assert not (tmp_path / "config.toml").exists()
    assert {name: name.encode() for name in FOREIGN}.items() <= contents(tmp_path).items()


def leave_provenance(run):
    run.write_provenance(PROVENANCE)


def leave_tokenizer(run):
    ByteTokenizer().save(run.tokenizer)


def leave_torn_row(run):
    run.path.mkdir(exist_ok=True)
    run.metrics.write_text(json.dumps(ROW)[:-9])


def leave_half_a_step(run):
    begin(run.path)
    (run.checkpoints / "4.partial" / "params").mkdir(parents=True)


def leave_no_config(run):
    begin(run.path).config.unlink()


@pytest.mark.parametrize(
    "leave",
    [
        leave_provenance,
        leave_tokenizer,
        leave_torn_row,
        leave_half_a_step,
        leave_no_config,
        lambda run: begin(run.path).config.write_text("[from.another]\nversion = 9\n"),
        lambda run: begin(run.path, OTHER),
    ],
)
def test_what_a_start_left_that_trained_nothing_is_in_nobodys_way(tmp_path, leave):
    (tmp_path / "run").mkdir()
    leave(RunDirectory(tmp_path / "run"))
    assert claimed(tmp_path / "run") == {}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.toml", "[model]\nn_layer = 2\n"),  # a person's own, given as CONFIG
        ("run.json", '{"mine": 1}'),
        ("run.json", "not json"),
        ("tokenizer/tokenizer.json", '{"model": {"vocab": {}}}'),
        ("checkpoints", "a file"),
        ("tokenizer", "a file"),
    ],
)
def test_a_file_that_a_run_would_replace_is_named_and_stays(tmp_path, name, content):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=f"{name} is in the way: .*; move it away, or set another"):
        claimed(tmp_path)
    assert contents(tmp_path) == {name: content.encode()}
    assert not (tmp_path / "run.lock").exists()


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder", "loop"])
@pytest.mark.parametrize("name", ["config.toml", "run.json", "metrics.jsonl", "run.lock"])
@pytest.mark.parametrize("begun", [False, True])
def test_what_is_not_a_file_where_a_run_has_one_is_named(tmp_path, name, kind, begun):
    if begun:
        begin(tmp_path)
    make_strange(kind, tmp_path / name)
    with pytest.raises(UsageError, match=f"{name} is in the way"):
        claimed(tmp_path)


def test_a_lock_that_is_a_link_empties_no_other_file(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UsageError, match=r"run.lock cannot be written|levels of symbolic links"):
        claimed(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("place", ["checkpoints/4", "checkpoints/4.damaged", "metrics.jsonl"])
def test_what_was_trained_belongs_to_its_run(tmp_path, place):
    run = begin(tmp_path)
    if place == "metrics.jsonl":
        run.metrics.write_text(json.dumps(ROW) + "\n")
    else:
        (tmp_path / place).mkdir()
    with pytest.raises(UsageError, match=r"(?s)holds a run with other settings:.*run.seed"):
        claimed(tmp_path, OTHER)
    run.config.unlink()
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=r"not a run \(no config.toml\).*put config.toml back"):
        claimed(tmp_path)
    assert contents(tmp_path) == before


def test_a_run_of_a_version_that_had_fewer_sizes_goes_on(tmp_path):
    run = begin(tmp_path)
    run.metrics.write_text(json.dumps(ROW) + "\n")
    written = run.config.read_text()
    older = "".join(line for line in written.splitlines(True) if not line.startswith("head_size"))
    assert older != written
    run.config.write_text(older)
    assert claimed(tmp_path) == {}


def test_a_start_that_another_has_overtaken_looks_again_before_it_takes_anything(
    tmp_path, monkeypatch
):
    """Between its look and its lock another start trains and ends."""
    lock = start.locked

    def overtaken(run):
        begin(run.path).metrics.write_text(json.dumps(ROW) + "\n")
        return lock(run)

    monkeypatch.setattr(start, "locked", overtaken)
    with pytest.raises(UsageError, match="other settings"):
        claimed(tmp_path, OTHER)
    assert (tmp_path / "config.toml").exists()
    assert claimed(tmp_path) == {}  # the lock was given back


def test_of_two_starts_at_once_one_is_refused(tmp_path):
    with contextlib.ExitStack() as held:
        claim(RunDirectory(tmp_path), CONFIG, held)
        begin(tmp_path)
        for config in (CONFIG, OTHER):
            with pytest.raises(RunLockedError, match=f"in use by process {os.getpid()} on"):
                claimed(tmp_path, config)
        assert (tmp_path / "config.toml").exists()


@pytest.mark.parametrize("length", [300, 5000])
def test_a_path_that_is_too_long_is_refused_in_one_sentence(tmp_path, length):
    folder = tmp_path / ("x" * length)
    with pytest.raises(UsageError, match="cannot be used as a run directory: File name too long"):
        claimed(folder)
    with pytest.raises(UsageError, match="cannot be used as a run directory: File name too long"):
        RunDirectory(folder).read_config()


def test_a_path_that_is_a_loop_of_links_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for look in (claimed, lambda path: RunDirectory(path).read_config()):
        with pytest.raises(UsageError, match="loop cannot be used as a run directory"):
            look(tmp_path / "loop")


def test_starts_that_failed_at_every_stage_leave_room_for_the_right_one(tmp_path, monkeypatch):
    """Each time with a log in the run directory, as `> runs/x/log.txt` puts it there."""
    config = write_config(tmp_path, training={"steps": 1})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").write_text("said")
    with pytest.raises(UsageError, match=r"U\+2603"):
        train(config, "--sample.prompt", "\N{SNOWMAN}")
    with pytest.raises(DataError, match=r"nowhere\.txt"):
        train(config, "--data.source", str(tmp_path / "nowhere.txt"))
    for fault in ("prepare:raise", "checkpoint.before_copy:raise", "step:step=1:raise"):
        monkeypatch.setenv("LLM_FAULT", fault)
        with pytest.raises((RuntimeError, CheckpointError)):
            train(config, "--training.steps", "2", "--run.seed", "9", "--data.workers", "1")
    monkeypatch.delenv("LLM_FAULT")
    (tmp_path / "corpus.txt").write_text((tmp_path / "corpus.txt").read_text() + " another text")
    assert train(config) == 0
    assert (tmp_path / "run" / "log.txt").read_text() == "said"
