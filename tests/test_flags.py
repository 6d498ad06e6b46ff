"""Every command reads its words in one way, and answers a wrong word with one that works."""

import importlib
import io
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from llm.__main__ import COMMANDS
from llm.commands import run_command
from llm.commands.flags import CommandLine, Flag, OutputFile, flags_of, parse
from llm.config import Config
from llm.errors import UsageError
from llm.names import nearest
from llm.section import setting

ROOT = Path(__file__).resolve().parent.parent
MODULES = {
    name: importlib.import_module(f"llm.commands.{name.replace('-', '_')}") for name in COMMANDS
}
every_command = pytest.mark.parametrize("command", COMMANDS)

# Words without which a command says that they are missing.
REQUIRED = {
    "replay": ["RUN", "--step", "3"],
    "eval": ["--tasks", "one", "--seed", "1", "RUN"],  # a word behind --tasks is a task
    "diff": ["A", "B"],
    "import-hf": ["FOLDER", "RUN"],
    "export-hf": ["RUN", "FOLDER"],
    "export-gguf": ["RUN", "FILE"],
    "train": [os.devnull],
    "prepare": [os.devnull],
    "plan": [os.devnull],
    "bench": [os.devnull],
}


def options_of(command: str) -> type[CommandLine]:
    return MODULES[command].Options


def parsed(command: str, *words: str) -> CommandLine:
    return parse(options_of(command), [*REQUIRED.get(command, ["RUN"]), *words])


def refused(command: str, *words: str) -> str:
    with pytest.raises(UsageError) as caught:
        parsed(command, *words)
    assert caught.value.exit_code == 2
    return str(caught.value)


def flags(command: str) -> list[Flag]:
    return [flag for flag in flags_of(options_of(command)).values() if not flag.is_argument]


def words_for(flag: Flag) -> list[str]:
    """A value that the flag's type can be read from."""
    if bool in flag.types:
        return []
    return [next(iter(flag.choices), "a=1" if flag.name == "gen_kwargs" else "1")]


@every_command
def test_dashes_and_underscores_are_the_same(command):
    """Each flag is read the same in both spellings; ranges and combinations are checked later."""
    wanted = [flag for flag in flags(command) if flag.name != "help"]
    assert wanted
    for flag in wanted:
        answers = set()
        for name in (flag.name, flag.name.replace("_", "-")):
            for words in (
                [f"--{name}", *words_for(flag)],
                ["=".join([f"--{name}", *words_for(flag)])],
            ):
                try:
                    answers.add(repr(parsed(command, *words)))
                except UsageError as error:
                    answers.add(str(error))
        assert len(answers) == 1, answers
        assert not any("unknown flag" in answer for answer in answers), answers


@every_command
def test_an_abbreviation_is_refused_and_answered_with_a_flag_that_works(command):
    known = {flag.spelling for flag in flags(command)}
    for flag in flags(command):
        short = flag.spelling[:-1]
        if short not in known:
            hint = refused(command, short).partition("; did you mean ")[2].removesuffix("?")
            assert hint in known, (short, hint)


@every_command
def test_a_misspelt_flag_is_answered_with_the_nearest(command):
    for flag in flags(command):
        wrong = f"{flag.spelling}x"
        assert refused(command, wrong) == f"unknown flag {wrong}; did you mean {flag.spelling}?"


@every_command
@pytest.mark.parametrize("words", [["--frobnicate", "1"], ["a", "b", "c"], ["-q"]])
def test_every_mistake_is_one_line_on_stderr_with_its_exit_code(command, words, capsys):
    every = [*REQUIRED.get(command, ["RUN"]), *words]
    code, named = 2, words[0]
    if command == "data-report" and not named.startswith("-"):
        code, named = 3, every[0]  # all are sources, and the first is not there
    if command == "report" and not named.startswith("-"):
        named = "--html"  # all are runs, and a page of several needs a name
    assert run_command(MODULES[command].main, every) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert f" {named}" in said.err or "unexpected word" in said.err


@every_command
def test_what_is_missing_is_named_with_the_usage(command):
    with pytest.raises(UsageError, match="is missing; usage: python "):
        parse(options_of(command), [])


@every_command
@pytest.mark.parametrize("columns", [80, 120])
def test_help_names_every_flag_and_fits_the_terminal(command, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    out = io.StringIO()
    with redirect_stdout(out), pytest.raises(SystemExit) as stop:
        parse(options_of(command), ["--help"])
    assert not stop.value.code
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("usage: python ") and max(map(len, lines)) <= columns
    first_words = {line.split()[0] for line in lines if line.startswith("  ")}
    named = {flag.spelling for flag in flags(command) if "." not in flag.name}
    assert named <= first_words


def test_help_imports_no_jax():
    """One process asks each command in turn, and looks each time at all that was imported."""
    program = f"""
import sys, contextlib, io, runpy
HEAVY = {{"jax", "numpy", "orbax", "tensorstore", "datasets", "tiktoken", "starlette", "lm_eval"}}
for command in {[*COMMANDS]!r}:
    sys.argv = ["llm", command, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        runpy.run_module("llm", run_name="__main__")
    assert printed.getvalue().startswith("usage: python "), command
    assert not HEAVY & {{name.split(".")[0] for name in sys.modules}}, command
assert "pydantic" in sys.modules
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE)
    assert ended.returncode == 0, ended.stderr.decode()


class Sample(CommandLine):
    """A command line of every type."""

    count: int = setting(1, "a number")
    share: float | None = setting(None, "a number with a fraction")
    many: tuple[int, ...] = setting((), "numbers")
    text: str = setting("", "a text")
    on: bool = setting(True, "a switch")


@pytest.mark.parametrize(
    ("words", "name", "expected"),
    [
        ("--count 1 --count=-2", "count", -2),
        ("--share 1", "share", 1.0),
        ("--share=-1e-3", "share", -0.001),
        ("--many 1 -2 --many 3", "many", (1, -2, 3)),
        ("--text -x", "text", "-x"),
        ("--text=--on", "text", "--on"),
        ("--text=", "text", ""),
        ("--text=a=b", "text", "a=b"),
        ("--no-on", "on", False),
        ("--no_on=false", "on", True),
        ("--on False", "on", False),
        ("--on=true", "on", True),
    ],
)
def test_every_form_of_a_value(words, name, expected):
    found = getattr(parse(Sample, words.split()), name)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--count", "--count has no value; expected --count N"),
        ("--count --on", "--count has no value; expected --count N"),
        ("--count 1.5", "--count 1.5: expected a valid integer"),
        ("--count 1 2", "unexpected word '2'; --count takes one value"),
        ("--many", "--many has no value; expected --many N ..."),
        ("--many 1 two", "--many two: expected a valid integer"),
        ("--many 1 -q", "unknown flag -q; --help lists the flags"),
        ("--share nan", "--share nan: expected a finite number"),
        ("--on maybe", "unexpected word 'maybe'; --on takes true or false"),
        ("--on=maybe", "--on maybe: expected a valid boolean"),
        ("--no-count", "unknown flag --no-count; did you mean --count?"),
        ("-count 1", "unknown flag -count; did you mean --count?"),
        ("--", "unknown flag --; --help lists the flags"),
    ],
)
def test_every_form_of_a_mistake(words, said):
    with pytest.raises(UsageError) as caught:
        parse(Sample, words.split())
    assert str(caught.value) == said


class Writer(CommandLine):
    """A command line that names files to write."""

    one: OutputFile = setting(None, "a file")
    other_one: OutputFile = setting(None, "another")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--one no/x", "cannot write no/x: there is no folder no"),
        ("--other-one .", "cannot write .: it is a folder; expected a file's name"),
        ("--one x --other-one ./x", "--one and --other-one both name ./x; give each a file"),
        ("--one x --other-one y", ""),
        ("--one -", "--one -: expected the name of a file, not standard output"),
    ],
)
def test_files_that_cannot_be_written_are_refused_before_a_command_runs(
    words, said, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    if said:
        with pytest.raises(UsageError, match=re.escape(said)):
            parse(Writer, words.split())
    else:
        parse(Writer, words.split())


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("model.n_embd", "model.d_model"),
        ("model.n_embed", "model.d_model"),
        ("hidden_size", "model.d_model"),
        ("block_size", "model.context_length"),
        ("model.n_positions", "model.context_length"),
        ("model.num_hidden_layers", "model.n_layer"),
        ("max_iters", "training.steps"),
        ("lr", "optimizer.learning_rate"),
        ("training.stps", "training.steps"),
        ("training.learning_rate", "optimizer.learning_rate"),
        ("trainning.steps", "training.steps"),
        ("out_dir", "run.dir"),
    ],
)
def test_the_names_of_other_programs_are_understood(wrong, right):
    assert nearest(wrong, flags_of(Config)) == right


def test_a_hint_names_nothing_that_is_not_there():
    assert nearest("n_embd", ["top", "step"]) is None
    assert nearest("zzzz", flags_of(Config)) is None


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("stride", ["--stride", "99"], "--stride"),
        ("stride", ["--stride=99"], "--stride"),
        ("stride", ["RUN", "--top", "3"], "stride"),
        ("training.batch_size", ["c.toml", "--training.batch-size", "99"], "--training.batch-size"),
        ("training.batch_size", ["c.toml", "--training.batch_size=99"], "--training.batch-size"),
        ("training.batch_size", ["c.toml"], "training.batch_size"),
    ],
)
def test_an_error_names_the_flag_that_was_given(name, words, said, capsys):
    def command(_):
        raise UsageError(f"{name} = 99: expected less")

    assert run_command(command, words) == 2
    assert capsys.readouterr().err == f"error: {said} = 99: expected less\n"
