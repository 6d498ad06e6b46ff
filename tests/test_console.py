"""Every way in which standard output and standard error can fail: progress is for people, and may
be lost; a result may not. Control characters of others never reach a terminal."""

import contextlib
import fcntl
import os
import pty
import subprocess
import sys
import threading
import time

import pytest
from runs import ROOT, starts, train_process, write_config

from llm.console import escaped, for_terminal

PROGRAM = """
import os, sys
from llm import console
from llm.commands import run_command
from llm.errors import DataError
def command(words):
    {body}
    return 0
sys.exit(run_command(command))
"""
SAYS = "console.say('one'); console.say('two'); os.write(3, console.lost().encode())"
needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


def run(body, redirected="", **options):
    """The finished process of a command with this body; a shell redirects its streams."""
    shell = ["bash", "-c", f'exec "$0" -c "$1" {redirected}']
    words = [*shell, sys.executable, PROGRAM.format(body=body)]
    return subprocess.run(words, cwd=ROOT, timeout=100, **options)


def run_said(body, redirected="", **options):
    """(exit code, what the command wrote to descriptor 3)"""
    reader, writer = os.pipe()
    done = run(body, f"{redirected} 3>&{writer}", pass_fds=[writer], **options)
    os.close(writer)
    with open(reader, "rb") as file:
        return done.returncode, file.read().decode()


@contextlib.contextmanager
def closed_pipe():
    """A pipe that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@contextlib.contextmanager
def vanished_terminal():
    controller, terminal = pty.openpty()
    os.close(controller)
    yield terminal
    os.close(terminal)


@needs_full
@pytest.mark.parametrize(
    ("redirected", "reason"),
    [
        ("", ""),
        ("2>/dev/full", "No space left on device"),
        ("2>&-", "Bad file descriptor"),
        ("0<&- >&- 2>&-", "Bad file descriptor"),
    ],
)
def test_what_is_said_may_be_lost(redirected, reason):
    assert run_said(SAYS, redirected) == (0, reason)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [(closed_pipe, "Broken pipe"), (vanished_terminal, "Input/output error")],
)
def test_what_is_said_may_be_lost_when_nobody_looks_any_more(broken, reason):
    with broken() as stderr:
        assert run_said(SAYS, stderr=stderr) == (0, reason)


@needs_full
def test_a_log_goes_on_when_its_disk_has_room_again():
    body = (
        "os.dup2(os.open('/dev/full', os.O_WRONLY), 2); console.say('one')\n"
        "    os.dup2(3, 2); console.say('two'); os.write(3, console.lost().encode())"
    )
    assert run_said(body) == (0, "two\nNo space left on device")


def test_a_reader_that_stops_reading_is_not_waited_for():
    """A pipe holds 64 KiB; what is said is ten times as much."""
    body = (
        "console.never_wait()\n    for _ in range(640): console.say('x' * 1023)\n"
        "    os.write(3, console.lost().encode())"
    )
    reader, writer = os.pipe()
    assert run_said(body, stderr=writer) == (0, "it was not read")
    os.close(writer)
    with open(reader, "rb") as file:
        assert 0 < len(file.read()) < 100 * 1024


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_descriptor_that_others_made_nonblocking_loses_nothing(stream):
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETFL, os.O_NONBLOCK)
    content = []

    def read_late():
        time.sleep(1)
        with open(reader, "rb") as file:
            content.append(file.read())

    thread = threading.Thread(target=read_late)
    thread.start()
    body = f"print('x' * 300_000, file=sys.{stream})"
    assert run(body, **{stream: writer}).returncode == 0
    os.close(writer)
    thread.join()
    assert content == [b"x" * 300_000 + b"\n"]


WRITES = ["print('data')", "console.show('data')", "print('data' * 9999)"]


@needs_full
@pytest.mark.parametrize("body", WRITES)
@pytest.mark.parametrize(
    ("redirected", "reason"),
    [(">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")],
)
def test_data_that_is_lost_fails_the_command_in_one_line(body, redirected, reason):
    done = run(body, redirected, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert reason in done.stderr


@pytest.mark.parametrize("body", WRITES)
def test_a_pipe_whose_reader_has_left_fails_it_silently(body):
    with closed_pipe() as stdout:
        done = run(body, stdout=stdout, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (141, b"")


@needs_full
def test_a_result_for_people_is_data_too():
    said = "console.say_result('7 nats')"
    assert run(said, "2>/dev/full").returncode == 2
    assert run(said, "2>&-").returncode == 0  # as if it were sent to /dev/null
    with closed_pipe() as stderr:
        assert run(said, stderr=stderr).returncode == 141


@needs_full
@pytest.mark.parametrize("redirected", [">/dev/full", ">&-", ">/dev/full 2>&1"])
def test_an_error_keeps_its_exit_code_if_the_output_is_lost_too(redirected):
    assert run("print('data'); raise DataError('no text')", redirected).returncode == 3


@needs_full
def test_a_help_that_is_lost_is_no_success():
    for program in (["train.py"], ["-m", "llm"], ["-m", "llm", "score"]):
        with open("/dev/full", "w") as full:
            words = [sys.executable, *program, "--help"]
            done = subprocess.run(words, cwd=ROOT, stdout=full, stderr=subprocess.PIPE)
        assert (done.returncode, done.stderr.count(b"\n")) == (2, 1), done.stderr


def test_no_file_takes_the_number_of_a_closed_stream(tmp_path):
    """What C code or a signal's handler writes to descriptor 2 would be in the middle of it."""
    path = tmp_path / "metrics.jsonl"
    body = (
        f"file = open({str(path)!r}, 'wb', buffering=0)\n"
        "    console.write_stderr('SIGTERM')\n"
        "    print('a name', file=sys.stderr)\n"
        "    os.system('echo noise >&2')\n"
        "    file.write(b'row'); os._exit(file.fileno() > 2)"
    )
    assert run(body, "0<&- >&- 2>&-").returncode == 1
    assert path.read_bytes() == b"row"


def test_standard_input_that_is_closed_is_said():
    body = "from llm.commands.shared import read_input; read_input()"
    done = run(body, "<&-", stderr=subprocess.PIPE, text=True)
    assert (done.returncode, "standard input: it is closed" in done.stderr) == (2, True)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_character_that_an_encoding_does_not_have_is_escaped(encoding):
    body = r"print('\u03c0\ud800'); console.say('\u03c0 \ud800')"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = run(body, env=environment, capture_output=True)
    shown = r"\u03c0" if encoding != "utf-8" else "\u03c0"
    assert (done.returncode, done.stdout.decode()) == (0, shown + "\\ud800\n")
    assert done.stderr.decode() == shown + " \\ud800\n"


CLEARS = "\x1b[2J\x1b]0;title\x07\x9b2J\u202e\r\b"
SPELLED = r"\x1b[2J\x1b]0;title\x07\x9b2J\u202e\r\x08"


def test_control_characters_are_spelled_and_lines_stay_lines():
    assert for_terminal(f"a\n\tb{CLEARS}\u200dé") == f"a\n\tb{SPELLED}\u200dé"
    assert escaped("a\n\t") == r"a\n\t"


@pytest.mark.parametrize(
    "body",
    ["console.say({text!r})", "raise DataError({text!r})", "raise RuntimeError({text!r})"],
    ids=["said", "error", "traceback"],
)
def test_stderr_gets_control_characters_escaped(body):
    error = run(body.format(text=CLEARS), stderr=subprocess.PIPE).stderr.decode()
    assert SPELLED in error
    assert error == for_terminal(error)


def test_text_is_escaped_in_a_terminal_and_whole_elsewhere():
    body = f"console.show({CLEARS!r})"
    assert run(body, stdout=subprocess.PIPE).stdout.decode() == CLEARS
    controller, terminal = pty.openpty()
    run(body, stdout=terminal)
    os.close(terminal)
    assert os.read(controller, 1000).decode() == SPELLED
    os.close(controller)


@pytest.mark.thorough(keep=1)
@pytest.mark.parametrize("broken", [vanished_terminal, closed_pipe])
def test_training_goes_on_when_nobody_looks(tmp_path, broken):
    config = write_config(tmp_path, logging={"progress": "bar"})
    with broken() as stderr:
        process = train_process(config, stderr=stderr)
        assert process.wait(timeout=300) == 0
    [start] = starts(tmp_path / "run")
    assert start["progress_lost"] in ("Input/output error", "Broken pipe")
    assert (tmp_path / "run" / "checkpoints" / "12").is_dir()
