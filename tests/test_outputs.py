"""No command writes over what it reads, or writes one file twice, whatever names a file has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_flags import options_of

from llm.commands import outputs
from llm.commands.flags import parse
from llm.commands.import_hf import new_folder
from llm.errors import UsageError

OWN = "a text that must not be lost"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """own.txt, and other names of it; a run."""
    monkeypatch.chdir(tmp_path)
    Path("own.txt").write_text(OWN)
    os.link("own.txt", "hard.txt")
    Path("soft.txt").symlink_to("own.txt")
    Path("folder").symlink_to(".")
    for file in ("config.toml", "run.json", "metrics.jsonl", "tokenizer/tokenizer.json",
                 "checkpoints/5/params/weight"):  # fmt: skip
        path = Path("run", file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(OWN)
    return tmp_path


NAMES = ["own.txt", "./own.txt", "hard.txt", "soft.txt", "folder/own.txt", "run/../own.txt"]
READING = [
    ("score", "run --file own.txt --probs", "--file"),
    ("score", "run --file run/metrics.jsonl own.txt --full", "--file"),
    ("score", "run --file own.txt --attention-html", "--file"),
    ("sample", "run --prompt-file own.txt --html", "--prompt-file"),
    ("diff", "own.txt other.jsonl --html", "A"),
    ("diff", "other.jsonl own.txt --html", "B"),
    ("eval", "run --tasks one,own.txt --samples", "--tasks"),
    ("eval", "run --tasks one --samples own.txt --output", "--samples"),
]


@pytest.mark.parametrize(("command", "words", "other"), READING)
def test_an_output_that_is_an_input_is_refused_by_every_name_of_it(folder, command, words, other):
    for name in [*NAMES, f"{folder}/own.txt"]:
        flag = words.split()[-1]
        with pytest.raises(UsageError) as caught:
            parse(options_of(command), [*words.split(), name])
        uses, _, rest = str(caught.value).partition(" both name ")
        assert set(uses.split(" and ")) == {other, flag}
        assert rest.endswith("; give each a file of its own")
    parse(options_of(command), [*words.split(), "new.txt"])
    parse(options_of(command), [*words.split(), os.devnull])
    assert Path("own.txt").read_text() == OWN and not Path("new.txt").exists()


def test_an_output_is_not_a_file_of_the_run_and_may_lie_beside_them(folder):
    for own in ("config.toml", "run.json", "metrics.jsonl", "checkpoints/5/params/weight"):
        with pytest.raises(UsageError, match=f"the run run and --probs both name run/{own}"):
            parse(options_of("sample"), ["run", "--probs", f"run/{own}"])
    Path("run/probs.jsonl").write_text("of an earlier call")
    parse(options_of("sample"), ["run", "--probs", "run/probs.jsonl"])


def test_only_probs_may_be_standard_output(folder):
    parse(options_of("score"), ["run", "--probs", "-"])
    for command, flag in [("score", "--html"), ("score", "--full"), ("eval --tasks a", "--output"),
                          ("diff other", "--html")]:  # fmt: skip
        name, *words = command.split()
        with pytest.raises(UsageError, match=f"{flag} -: expected the name of a file"):
            parse(options_of(name), ["run", *words, flag, "-"])


def test_new_names_are_one_file_if_their_folder_makes_them_one(folder, monkeypatch):
    assert not outputs.same_file("new.html", "NEW.html")
    assert outputs.same_file("new.html", "folder/new.html")
    assert not outputs.same_file("new.html", "run/new.html")
    Path("to-come").symlink_to("new.html")
    assert outputs.same_file("new.html", "to-come")
    there = os.path.exists

    def ignoring_case(path):
        parent = os.path.dirname(os.path.realpath(path))
        names = [name.casefold() for name in os.listdir(parent)]
        return there(path) or os.path.basename(path).casefold() in names

    monkeypatch.setattr(outputs.os.path, "exists", ignoring_case)
    before = sorted(os.listdir())
    assert outputs.same_file("new.html", "NEW.html")
    assert not outputs.same_file("new.html", "newer.html")
    assert sorted(os.listdir()) == before


def test_a_file_behind_a_stream_is_not_written_too(folder):
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "llm", "score", "run", "-", "--html", "page.html"]
    for stream, name in [("stdout", "output"), ("stderr", "error"), ("stdin", "input")]:
        with open("page.html", "a+b") as page, open("said", "w+b") as said:
            streams = {"stdin": subprocess.DEVNULL, "stdout": None, "stderr": said, stream: page}
            environment = os.environ | {"PYTHONPATH": str(root)}
            assert subprocess.run(command, **streams, env=environment, check=False).returncode == 2
        text = Path("page.html").read_text() + Path("said").read_text()
        assert f"standard {name} and --html both name page.html" in text


def test_a_folder_that_is_cleared_first_does_not_hold_what_is_read(folder):
    model = Path("new.partial/model")
    model.mkdir(parents=True)
    for source in (model, model.parent, Path("folder/new.partial")):
        said = f"new is written in new.partial, where {source} lies; give another name"
        with pytest.raises(UsageError, match=said), new_folder(Path("new"), source):
            raise AssertionError
    assert model.is_dir()
    with new_folder(Path("other"), model) as partial:
        (partial / "file").write_text("new")
    assert Path("other/file").read_text() == "new"
