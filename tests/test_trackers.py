"""Copies of the metrics show each step once, and their failures end no run."""

import errno
import importlib.util
import os
import struct
import sys
from types import SimpleNamespace

import pytest

from llm.config import Config, LoggingConfig
from llm.errors import UsageError
from llm.run.directory import RunDirectory
from llm.run.trackers import make_trackers, wandb_id

BOARD = Config(logging=LoggingConfig(tensorboard=True))
WANDB = Config(logging=LoggingConfig(wandb_project="p"))


def row(step, loss):
    return {"kind": "train", "step": step, "loss": loss}


def shown(folder):
    """(step, loss) of each point that TensorBoard shows.

    Files come by name, records in their order. A START of a session at step n hides the points
    before it from step n on.

    Source: _Purge in tensorboard/backend/event_processing/event_accumulator.py.
    """
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    points = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])  # length, its checksum, record, checksum
            event, content = Event.FromString(content[12 : 12 + length]), content[16 + length :]
            if event.session_log.status == SessionLog.START:
                points = [point for point in points if point[0] < event.step]
            points += [(event.step, value.simple_value) for value in event.summary.value]
    return points


def test_tensorboard_shows_a_step_once_after_a_crash(tmp_path):
    pytest.importorskip("tensorboardX")
    run = RunDirectory(tmp_path)
    for start, last in ((0, 7), (4, 6), (4, 9)):  # two crashes, after a checkpoint of step 4
        [tracker] = make_trackers(BOARD, run, start)
        for step in range(start + 1, last + 1):
            tracker.write(row(step, step + start / 8))
    expected = [(step, step + 4 / 8 * (step > 4)) for step in range(1, 10)]
    assert shown(tmp_path / "tensorboard") == expected
    if importlib.util.find_spec("tensorboard"):
        from tensorboard.backend.event_processing import event_accumulator

        events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        assert [(point.step, point.value) for point in events.Scalars("train/loss")] == expected


def test_tensorboard_that_cannot_be_written_is_said_at_the_start(tmp_path):
    pytest.importorskip("tensorboardX")
    (tmp_path / "tensorboard").write_text("not a folder")
    with pytest.raises(UsageError, match="tensorboard cannot be written: File exists"):
        make_trackers(BOARD, RunDirectory(tmp_path), 0)


def test_a_full_disk_takes_tensorboard_away_and_not_the_run(tmp_path, monkeypatch, capsys):
    writer = pytest.importorskip("tensorboardX.event_file_writer").EventsWriter
    [tracker] = make_trackers(BOARD, RunDirectory(tmp_path), 0)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer, "flush", full)
    for step in range(1, 50):
        tracker.write(row(step, 1.0))
    tracker.close()
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1 and "No space left on device" in said and "training goes on" in said
    )


def fake_wandb(monkeypatch, **methods):
    started = SimpleNamespace(log=lambda *_: None, finish=lambda: None)
    defaults = {"init": lambda **_: started}
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(**(defaults | methods)))


@pytest.mark.parametrize("name", ["run", "gpt2 124M", "a.b-c_d=1", "ü"])
def test_a_name_that_wandb_takes_stays_the_runs_id(name):
    assert wandb_id(name) == name


NAMES = ["lr=1e-3,bs=8", "lr=1e-3;bs=8", "#1", "what?", "50%", "a:b", "x" * 200, "", "\x1b[2J"]


@pytest.mark.parametrize("name", NAMES)
def test_any_other_name_becomes_an_id_that_wandb_takes(name):
    """Its rule: no :;,#?/' and, from the manual, no backslash and no % either; 128 characters."""
    id_ = wandb_id(name)
    assert 0 < len(id_) <= 128 and not set(id_) & set(":;,#?/'\\%\x1b")
    assert id_ == wandb_id(name)
    assert len({wandb_id(other) for other in NAMES}) == len(NAMES)


def test_wandb_that_does_not_start_is_one_sentence(tmp_path, monkeypatch):
    def no_key(**_):
        raise RuntimeError("No API key configured. Use `wandb login` to log in.\nmore")

    fake_wandb(monkeypatch, init=no_key)
    said = r"wandb_project: W&B does not start: No API key configured.*WANDB_MODE=offline"
    with pytest.raises(UsageError, match=said):
        make_trackers(WANDB, RunDirectory(tmp_path), 0)


def test_wandb_gets_a_name_and_an_id_of_text_whatever_the_folder_is_called(tmp_path, monkeypatch):
    asked = {}
    fake_wandb(
        monkeypatch, init=lambda **said: asked.update(said) or SimpleNamespace(log=0, finish=0)
    )
    folder = tmp_path / os.fsdecode(b"lr=1e-3,\xff")
    folder.mkdir()
    make_trackers(WANDB, RunDirectory(folder), 0)
    assert asked["name"] == "lr=1e-3,\\xff"
    assert asked["id"].encode().startswith(b"lr=1e-3--xff-")


def test_wandb_that_ends_while_a_run_trains_is_left_out(tmp_path, monkeypatch, capsys):
    def gone(*_):
        raise BrokenPipeError("the service is gone")

    started = SimpleNamespace(log=gone, finish=gone)
    fake_wandb(monkeypatch, init=lambda **_: started)
    [tracker] = make_trackers(WANDB, RunDirectory(tmp_path), 0)
    for step in (1, 2):
        tracker.write(row(step, 1.0))
    tracker.close()
    assert capsys.readouterr().err.count("W&B takes no more rows (the service is gone)") == 1
