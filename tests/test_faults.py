"""What can happen to a run, one by one: on a real small disk, by real signals, with a clock that
jumps, beside a reader. Crashes and kills are in test_train_command.py and test_kills.py."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from runs import (
    ROOT,
    STEPS,
    losses,
    params_sha256,
    run_process,
    saved_arrays,
    starts,
    train,
    train_process,
    until,
    write_config,
)

import llm.pages.report_writer
import llm.training.loop
from llm.errors import CheckpointError, DataError, NonFiniteError, UsageError
from llm.run.checkpoint import GROUPS, Checkpoints, read_receipt, saved_steps, verify_files
from llm.run.metrics import MetricsFile, newest_rows
from llm.run.open import open_model
from llm.run.receipt import check_receipt


@pytest.fixture
def small_disk(tmp_path):
    """A function: an empty file system of so many KiB; needs the right to mount one."""
    with contextlib.ExitStack() as stack:

        def mount(kib, options=""):
            folder = tmp_path / f"disk-{kib}"
            folder.mkdir()
            size = f"size={kib}k{options}"
            command = ["mount", "-t", "tmpfs", "-o", size, "none", str(folder)]
            if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
                pytest.skip("may not mount a file system")
            stack.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=False)
            return folder

        yield mount


def fill(folder, leave_bytes=0):
    """Write until only so much room is left."""
    ballast = folder / "ballast"
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while shutil.disk_usage(folder).free > leave_bytes:
            file.write(b"x" * 4096)
    return ballast


def without_traceback(output):
    assert "Traceback" not in output, output
    return output


# A disk that is full.


@pytest.mark.thorough
def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(
    unbroken_process, tmp_path, small_disk
):
    """On a disk that fills up after step 4: exit 4 with both numbers, and nothing lost."""
    disk = small_disk(4096)
    config = write_config(tmp_path, run={"dir": str(disk / "run")})
    code, output = run_process(config, fault="checkpoint.before_copy:step=8:kill")
    assert code == -signal.SIGKILL, output
    ballast = fill(disk, leave_bytes=60_000)
    code, output = run_process(config)
    assert code == 4, output
    assert re.search(
        r"no room for a checkpoint .* it needs .*\(\d+ bytes\), .*\(\d+ bytes\)", output
    )
    without_traceback(output)
    verify_files(disk / "run" / "checkpoints" / "4")
    ballast.unlink()
    code, output = run_process(config)
    assert code == 0, output
    assert losses(disk / "run") == losses(unbroken_process / "run")
    assert params_sha256(disk / "run") == params_sha256(unbroken_process / "run")


def test_a_disk_without_a_byte_left_is_said_at_the_start(copy, small_disk, capsys):
    disk = small_disk(4096)
    shutil.copytree(copy / "run", disk / "run")
    fill(disk)
    flags = ["--run.dir", str(disk / "run"), "--training.steps", "14"]
    with pytest.raises(CheckpointError, match=r"no room for .*run.json .* bytes are free"):
        train(copy / "config.toml", *flags)
    verify_files(disk / "run" / "checkpoints" / str(STEPS))
    assert len(json.loads((disk / "run" / "run.json").read_text())["starts"]) == 1


def test_metrics_that_do_not_fit_are_counted_and_no_line_is_torn(small_disk, capsys):
    disk = small_disk(64)
    metrics = MetricsFile(disk / "metrics.jsonl")
    row = {"kind": "train", "loss": 1.0, "text": "x" * 3000}
    metrics.write({**row, "step": 1})
    ballast = fill(disk)
    for step in range(2, 30):
        metrics.write({**row, "step": step})
    lost = metrics.lost
    assert 20 < lost < 29
    assert capsys.readouterr().err.count("cannot be written") == 1
    ballast.unlink()
    metrics.write({**row, "step": 30})
    metrics.close()
    lines = (disk / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == [*range(1, 30 - lost), 30]


@pytest.mark.thorough
def test_shards_that_do_not_fit_leave_nothing_half_made(tmp_path, small_disk):
    disk = small_disk(32)
    (tmp_path / "long.txt").write_text("the cat sat on the mat " * 4000)
    config = write_config(
        tmp_path, data={"source": str(tmp_path / "long.txt"), "cache_dir": str(disk)}
    )
    with pytest.raises(DataError, match=r"(?i)(space|room).* \d+"):
        train(config)
    assert not list(disk.rglob("*.bin"))
    assert train(config, "--data.cache-dir", str(tmp_path / "cache")) == 0


def test_a_disk_that_fills_up_while_pages_and_probes_are_written_ends_no_training(
    tmp_path, small_disk, monkeypatch, capfd
):
    """It is full between the save of step 4 and that of step 8; the last page is whole again."""
    disk, ballast = small_disk(4096), []
    honest = llm.training.loop.Validation.run

    def run(self, state, step):
        if step == 6:
            self._outputs.checkpoints.wait()
            ballast.append(fill(disk))
        honest(self, state, step)
        if step == 6:
            threads = [one for one in threading.enumerate() if one.name == "report"]
            [one.join() for one in threads]
            assert threads and not list(disk.rglob("*.tmp"))
            ballast.pop().unlink()

    monkeypatch.setattr(llm.training.loop.Validation, "run", run)
    monkeypatch.setattr(llm.pages.report_writer, "SHARE", 1e9)  # each evaluation has its page
    config = write_config(
        tmp_path,
        run={"dir": str(disk / "run")},
        training={"steps": 8, "eval_every": 3},
        checkpoint={"every": 4, "keep_best": False},
    )
    assert train(config) == 0
    said = capfd.readouterr().err
    assert said.count("probes.jsonl cannot be written (No space left on device)") == 1
    assert said.count("report.html is not written (No space left on device)") == 1
    assert re.search(r"2 lines of .*/probes.jsonl are lost", said)
    page = (disk / "run" / "report.html").read_text()
    assert "finished, step 8 of 8" in page and page.endswith("</html>\n")
    probes = (disk / "run" / "probes.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in probes} == {3, 8}


# Signals.


def is_whole(page):
    return page.read_text().endswith("</html>\n")


@pytest.mark.thorough
def test_signals_while_the_page_is_written_lose_and_delay_nothing(unbroken_process, tmp_path):
    """Its writing takes for ever; then it is killed there; then nothing disturbs it."""
    config, run = write_config(tmp_path), tmp_path / "run"
    process = train_process(config, fault="replace.report.html:hang")
    until(lambda: list(run.glob("report.html.*.tmp")))
    process.send_signal(signal.SIGTERM)
    until(lambda: "ended" in starts(run)[-1])  # though the page is not written yet
    assert saved_steps(run / "checkpoints")[-1] >= 6
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert not (run / "report.html").exists() and list(run.glob("*.tmp"))
    (run / "report.html").write_text("the old page")
    os.utime(run / "report.html", (1, 1))
    code, output = run_process(config, fault="replace.report.html:kill")
    assert code == -signal.SIGKILL, output
    assert (run / "report.html").read_text() == "the old page" and list(run.glob("*.tmp"))
    code, output = run_process(config)
    assert code == 0, output
    assert is_whole(run / "report.html") and not list(run.glob("*.tmp"))
    assert f"finished, step {STEPS} of {STEPS}" in (run / "report.html").read_text()
    assert losses(run) == losses(unbroken_process / "run")


def test_a_finished_run_gets_the_page_that_a_kill_prevented(copy, capsys):
    run = copy / "run"
    left = [
        run / "report.html.77.tmp",
        run / "run.json.77.tmp",
        run / "tokenizer" / "tokenizer.json.77.tmp",
    ]
    for path in left:
        path.write_text("<!doc")
    (run / "report.html").write_text("the old page")
    os.utime(run / "report.html", (1, 1))
    assert train(copy / "config.toml") == 0
    assert "is finished" in capsys.readouterr().err
    assert is_whole(run / "report.html") and not [path for path in left if path.exists()]
    written = (run / "report.html").stat().st_mtime_ns
    assert train(copy / "config.toml") == 0  # and is left as it is from then on
    assert (run / "report.html").stat().st_mtime_ns == written
    (run / "metrics.jsonl").touch()  # as if neither the page nor run.json could be written
    assert train(copy / "config.toml") == 0
    assert (run / "report.html").stat().st_mtime_ns > written


@pytest.mark.thorough
def test_a_signal_while_text_is_prepared_the_step_compiles_or_one_is_saved(
    unbroken_process, tmp_path
):
    """The run says "starting", then compiles; a signal there waits for the first step."""
    config = write_config(tmp_path, logging={"progress": "plain"})
    code, output = run_process(config, fault="prepare:term")
    assert code == 75, output
    without_traceback(output)
    process = train_process(config)
    seen = ""
    while "starting" not in seen:
        line = process.stdout.readline()
        assert line, seen
        seen += line
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 75, seen + output
    without_traceback(output)
    assert max(saved_steps(tmp_path / "run" / "checkpoints"), default=0) < 8
    code, output = run_process(config, fault="checkpoint.after_write:step=8:int")
    assert code == 75, output
    without_traceback(output)
    code, output = run_process(config)
    assert code == 0, output
    assert losses(tmp_path / "run") == losses(unbroken_process / "run")
    assert params_sha256(tmp_path / "run") == params_sha256(unbroken_process / "run")


@pytest.fixture
def deaf_process():
    """One call that runs for hours without coming back to the interpreter, as a compiler may."""
    program = (
        "import hashlib, sys\n"
        "from llm.run.stop import StopRequest\n"
        "with StopRequest():\n"
        "    print('in', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "in\n"
    yield process
    process.kill()
    process.communicate()


def await_line(process, text):
    assert any(text in line for line in iter(process.stderr.readline, ""))


def test_a_second_signal_ends_a_process_that_python_cannot_interrupt(deaf_process):
    deaf_process.send_signal(signal.SIGTERM)
    await_line(deaf_process, "SIGTERM: finishing this step")
    deaf_process.send_signal(signal.SIGTERM)
    assert deaf_process.wait(timeout=60) == 128 + signal.SIGTERM
    assert "stopped at once" in deaf_process.stderr.read()


def test_what_a_scheduler_sends_before_and_with_sigterm_never_ends_a_run_at_once(deaf_process):
    """Slurm sends SIGUSR1 and later SIGTERM; systemd sends SIGTERM and SIGHUP; a shell and the
    kernel each send SIGHUP when a terminal is closed."""
    for name in ("SIGUSR1", "SIGHUP", "SIGHUP", "SIGTERM", "SIGHUP", "SIGUSR1"):
        deaf_process.send_signal(signal.Signals[name])
        await_line(deaf_process, f"{name}: finishing this step")
    deaf_process.send_signal(signal.SIGINT)
    assert deaf_process.wait(timeout=60) == 128 + signal.SIGINT


# Numbers that are no numbers.


def spoiled_step(monkeypatch, steps, **said):
    """The honest step, but at these steps it leaves the weights alone and says `said`."""
    honest = llm.training.loop.make_train_step

    def make(*arguments):
        step = honest(*arguments)

        def run(state, tokens):
            number = int(state.step) + 1
            kept = (
                jax.tree.map(lambda leaf: leaf.copy(), state.weights) if number in steps else None
            )
            after, metrics = step(state, tokens)
            if kept is None:
                return after, metrics
            said_now = {name: jax.numpy.asarray(value) for name, value in said.items()}
            return dataclasses.replace(after, weights=kept), {**metrics, **said_now}

        return run

    monkeypatch.setattr(llm.training.loop, "make_train_step", make)


def test_skipped_updates_are_counted_and_too_many_in_a_row_end_the_run(
    tmp_path, monkeypatch, capsys
):
    bad = {"finite": False, "loss": np.float32(np.nan)}
    config = write_config(tmp_path, training={"on_nonfinite": "skip", "max_skipped": 3})
    spoiled_step(monkeypatch, {3, 4, 6, 7, 8}, **bad)
    with pytest.raises(NonFiniteError, match=r"step 8: loss nan.*the last 3 updates were skipped"):
        train(config)
    assert capsys.readouterr().err.count("this update was skipped") == 4
    rows = list(newest_rows(tmp_path / "run" / "metrics.jsonl"))[::-1]
    rows = {row["step"]: row for row in rows if row["kind"] == "train"}
    assert [step for step, row in rows.items() if row.get("finite") is False] == [3, 4, 6, 7, 8]
    assert rows[3]["loss"] is None
    assert list((tmp_path / "run").glob("nonfinite-step-8.npz"))
    opened = open_model(tmp_path / "run")
    assert all(np.isfinite(weight).all() for weight in opened.params.values())


def test_a_loss_spike_is_skipped_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    config = write_config(tmp_path, training={"spike_zscore": 4.0})
    spoiled_step(monkeypatch, {5}, spike=True)
    assert train(config) == 0
    assert "step 5: loss" in capsys.readouterr().err
    rows = list(newest_rows(tmp_path / "run" / "metrics.jsonl"))[::-1]
    assert [row["step"] for row in rows if row.get("spike")] == [5]


# The checkpoint is not what it says.


def resaved(folder, change):
    """The step's parameters changed, saved anew with a manifest and a hash that fit them."""
    groups = {group: saved_arrays(folder / group) for group in GROUPS}
    groups = jax.tree.map(jax.numpy.asarray, {**groups, "params": change(groups["params"])})
    receipt = read_receipt(folder)
    step = int(folder.name)
    shutil.rmtree(folder)
    checkpoints = Checkpoints(folder.parent, keep=9)
    said = {name: receipt[name] for name in ("tokens", "logprobs", "tokenizer_sha256")}
    checkpoints.save(step, groups, lambda: said)
    checkpoints.wait()
    checkpoints.close()


def swapped(one, other):
    def change(params):
        return {**params, one: params[other], other: params[one]}

    return change


def permuted_shards(params):
    """As if the shards of two devices had been put together in the wrong order."""
    weight = params["blocks.0.mlp.up.weight"]
    return {**params, "blocks.0.mlp.up.weight": np.roll(weight, weight.shape[1] // 2, axis=1)}


def rounded(params):
    import ml_dtypes

    return {n: np.asarray(w).astype(ml_dtypes.bfloat16).astype("f4") for n, w in params.items()}


@pytest.mark.parametrize(
    "change",
    [
        swapped("blocks.0.attention.key.weight", "blocks.0.attention.query.weight"),
        permuted_shards,
        rounded,
    ],
    ids=["another config", "sharding", "dtype"],
)
def test_weights_that_are_not_those_saved_disagree_with_the_receipt(copy, change):
    """Hashes fit, the model does not: only what it predicts gives it away."""
    resaved(copy / "run" / "checkpoints" / str(STEPS), change)
    both_numbers = r"mean log-probability of -\d+\.\d+ nats, expected -\d+\.\d+"
    with pytest.raises(CheckpointError, match=both_numbers):
        open_model(copy / "run")
    with pytest.raises(CheckpointError, match=both_numbers):
        train(copy / "config.toml", "--training.steps", "14")


def test_a_receipt_of_values_that_no_model_wrote_is_refused(unbroken):
    opened = open_model(unbroken / "run")
    receipt = read_receipt(unbroken / "run" / "checkpoints" / str(STEPS))
    [tokens, _], [logprobs, _] = receipt["tokens"], receipt["logprobs"]
    for change in (
        {"tokens": [tokens, tokens[:-1]]},
        {"tokens": [tokens, ["a"] * len(tokens)]},
        {"tokens": [tokens, [10**30] * len(tokens)]},
        {"tokens": [tokens, [-1] * len(tokens)]},
        {"tokens": [tokens * 9] * 2, "logprobs": [(logprobs * 10)[: 9 * len(tokens) - 1]] * 2},
        {"tokens": [], "logprobs": None},
        {"logprobs": [logprobs, [{}] * len(logprobs)]},
        {"logprobs": [logprobs] * 3},
    ):
        with pytest.raises(CheckpointError, match="of the step has a receipt that is damaged"):
            check_receipt(
                opened.spec, opened.params, receipt | change, opened.tokenizer.sha256, "of the step"
            )


@pytest.mark.parametrize("replaced", [0, 1], ids=["larger", "of the same size"])
def test_another_tokenizer_is_not_the_checkpoints(copy, replaced):
    """Another character in the place of one, or one more; each tokenizer is whole by itself."""
    from llm.text.tokenizer import CharacterTokenizer, load_tokenizer

    folder = copy / "run" / "tokenizer"
    characters = load_tokenizer(folder).definition()["characters"]
    shutil.rmtree(folder)
    CharacterTokenizer(characters[replaced:] + "~").save(folder)
    with pytest.raises(CheckpointError, match="trained with the tokenizer"):
        open_model(copy / "run")


# Text.


@pytest.mark.thorough
def test_bytes_that_are_not_utf8_are_named_or_replaced_and_counted(tmp_path, unbroken):
    data = (unbroken / "corpus.txt").read_bytes()
    (tmp_path / "bad.txt").write_bytes(data[:100] + b"\xff" + data[100:200] + b"\xc3" + data[200:])
    config = write_config(tmp_path, data={"source": str(tmp_path / "bad.txt")})
    with pytest.raises(DataError, match=r"bad.txt.*\b100\b") as error:
        train(config)
    assert error.value.exit_code == 3
    assert train(config, "--data.errors", "replace") == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data"]["replaced"] == 2


@pytest.mark.parametrize("content", [b"", b"the cat"], ids=["empty", "shorter than a window"])
def test_too_little_text_is_said_with_numbers(tmp_path, content):
    (tmp_path / "little.txt").write_bytes(content)
    config = write_config(tmp_path, data={"source": str(tmp_path / "little.txt")})
    with pytest.raises(DataError) as error:
        train(config)
    assert content == b"" or re.search(r"\b\d+ tokens.*\b1[67]\b", str(error.value)), error.value


def test_shards_that_changed_since_the_run_began_are_named(tmp_path):
    config = write_config(tmp_path)
    train(config)
    (shard,) = (tmp_path / "cache").rglob("*.bin")
    content = bytearray(shard.read_bytes())
    content[7] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=rf"{shard.name}.*expected.*found"):
        train(config, "--training.steps", "14")


# Where and when.


@pytest.mark.thorough
def test_a_run_goes_on_on_another_mesh(tmp_path, unbroken, monkeypatch):
    config = write_config(tmp_path, mesh={"data": 2, "fsdp": 2, "tensor": 2})
    monkeypatch.setenv("LLM_FAULT", "step:step=7:raise")
    with pytest.raises(RuntimeError):
        train(config)
    monkeypatch.delenv("LLM_FAULT")
    flags = ["--mesh.data", "1", "--mesh.fsdp", "4", "--mesh.tensor", "1", "--mesh.context", "2"]
    assert train(config, *flags) == 0
    ours, theirs = losses(tmp_path / "run"), losses(unbroken / "run")
    assert [row[:2] for row in ours] == [row[:2] for row in theirs]
    np.testing.assert_allclose([row[2] for row in ours], [row[2] for row in theirs], rtol=1e-5)


def test_a_clock_that_jumps_changes_nothing(copy, unbroken, monkeypatch):
    """The newest step looks the oldest, and time runs backwards while training goes on."""
    shutil.rmtree(copy / "run" / "checkpoints" / str(STEPS))
    older, newer = saved_steps(copy / "run" / "checkpoints")
    for step, seconds in ((older, 4e9), (newer, 0)):
        os.utime(copy / "run" / "checkpoints" / str(step), (seconds, seconds))
    honest, jumps = time.time, []

    def jumping():
        """Thirty years back from the start; an hour forward whenever a save looks at it."""
        if threading.current_thread().name.startswith("checkpoint"):
            jumps.append(3600.0)
        return honest() - 1e9 + sum(jumps)

    monkeypatch.setattr(time, "time", jumping)
    train(copy / "config.toml")
    start = json.loads((copy / "run" / "run.json").read_text())["starts"][-1]
    assert start["from_step"] == newer
    assert 0 < start["seconds_to_first_step"] < 1e6
    assert losses(copy / "run") == losses(unbroken / "run")
    assert params_sha256(copy / "run") == params_sha256(unbroken / "run")


def test_a_read_only_run_is_refused_before_anything_compiles_and_can_be_read(
    copy, small_disk, monkeypatch
):
    disk = small_disk(4096)
    shutil.copytree(copy / "run", disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    monkeypatch.setattr(llm.training.loop, "make_train_step", lambda *_: pytest.fail("compiled"))
    flags = ["--run.dir", str(disk / "run"), "--training.steps", "14"]
    with pytest.raises(UsageError, match="cannot be written: Read-only file system"):
        train(copy / "config.toml", *flags)
    assert open_model(disk / "run").step == STEPS


@pytest.mark.thorough
def test_the_lock_of_a_dead_process_is_taken_over(copy):
    lock = copy / "run" / "run.lock"
    lock.write_text("process 1 on another-host, since 1970-01-01T00:00:00+00:00\n")
    train(copy / "config.toml", "--training.steps", "13")
    assert losses(copy / "run")[-1][1] == 13
    assert f"process {os.getpid()} on" in lock.read_text()


@pytest.mark.thorough
def test_a_reader_beside_a_trainer_sees_whole_steps_only(tmp_path):
    """Every step is saved and the one before deleted, while this process opens the model again
    and again."""
    config = write_config(
        tmp_path,
        training={"steps": 25, "eval_every": 0},
        checkpoint={"every": 1, "keep": 1},
        optimizer={"learning_rate": 1e-3, "min_learning_rate": 1e-4},
        data={"validation": "none"},
    )
    process = train_process(config)
    opened = []
    while process.poll() is None:
        if saved_steps(tmp_path / "run" / "checkpoints"):
            opened.append(open_model(tmp_path / "run").step)
        else:
            time.sleep(0.01)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert opened == sorted(opened)
    assert len(set(opened)) >= 3, opened


def test_a_save_that_failed_in_the_background_ends_the_run_at_the_next_step(tmp_path, monkeypatch):
    """Each step waits for the save to have failed; the first one after it must notice."""
    honest = Checkpoints.save

    def save_and_join(self, *arguments):
        honest(self, *arguments)
        self._writer.join()

    monkeypatch.setattr(Checkpoints, "save", save_and_join)
    monkeypatch.setenv("LLM_FAULT", "checkpoint.after_write:step=4:raise")
    with pytest.raises(CheckpointError, match="checkpoint of step 4 could not be saved"):
        train(write_config(tmp_path))
    assert losses(tmp_path / "run")[-1][1] <= 5


def test_evaluation_never_stands_between_a_due_save_and_the_disk(tmp_path, monkeypatch):
    """The evaluation that is due at step 4 as well waits for the save, which must have begun."""
    begun = []
    honest = llm.training.loop.Validation.run

    def run(self, state, step):
        checkpoints = self._outputs.checkpoints
        if step == 4:
            checkpoints._writer.join()
            begun.append(saved_steps(checkpoints.root))
        return honest(self, state, step)

    monkeypatch.setattr(llm.training.loop.Validation, "run", run)
    train(write_config(tmp_path, training={"eval_every": 4}))
    assert begun == [[4]]


JUMPING = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *now) {
  static int (*honest)(clockid_t, struct timespec *), looks;
  static const long jumps[] = {0, 7200, -259200, 7776000, 90, -3};
  if (!honest) honest = dlsym(RTLD_NEXT, "clock_gettime");
  int failed = honest(id, now);
  if (!failed && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE))
    now->tv_sec += jumps[__atomic_add_fetch(&looks, 1, 0) % 6];
  return failed;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  struct timespec exact;
  clock_gettime(CLOCK_REALTIME, &exact);
  now->tv_sec = exact.tv_sec, now->tv_usec = exact.tv_nsec / 1000;
  return 0;
}
time_t time(time_t *now) {
  struct timespec exact;
  clock_gettime(CLOCK_REALTIME, &exact);
  return now ? *now = exact.tv_sec : exact.tv_sec;
}
"""


@pytest.mark.thorough
def test_a_clock_that_jumps_at_every_look_changes_nothing(unbroken_process, tmp_path, monkeypatch):
    """Below Python: every library of the process sees hours, days and months come and go."""
    compiler, library = shutil.which("cc"), tmp_path / "jumping.so"
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", library, "-ldl"]
    if not compiler or subprocess.run(command, input=JUMPING.encode()).returncode:
        pytest.skip("needs a C compiler")
    config = write_config(tmp_path, checkpoint={"every": 1})
    monkeypatch.setenv("LD_PRELOAD", str(library))
    looked = subprocess.run(
        [
            sys.executable,
            "-c",
            "import time; print(max(time.time() for _ in range(9)) - time.time())",
        ],
        stdout=subprocess.PIPE,
    )
    assert float(looked.stdout) > 80
    for _ in range(3):
        process = train_process(config)
        try:
            output, _ = process.communicate(timeout=90)
            break
        except subprocess.TimeoutExpired:
            # tensorstore starts threads by the clock of the wall, and rarely waits for one of these
            # months. Killed and run again, nothing has changed either.
            process.kill()
            process.communicate()
    assert process.returncode == 0, output
    assert losses(tmp_path / "run") == losses(unbroken_process / "run")
    assert params_sha256(tmp_path / "run") == params_sha256(unbroken_process / "run")
    assert 0 < starts(tmp_path / "run")[-1]["seconds_to_first_step"] < 300


@pytest.mark.thorough(keep=1)
@pytest.mark.parametrize("cut_off", ["the end of a page", "everything"])
def test_a_shard_that_is_cut_short_while_the_run_has_it_mapped_is_named(tmp_path, cut_off):
    """A page without a byte is SIGBUS; the tokens missing on a page that is cut are zeros, which
    the next save finds."""
    config = write_config(tmp_path, training={"steps": 10**6}, checkpoint={"every": 100})
    process = train_process(config)
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size):
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.05)
        [shard] = (tmp_path / "cache").rglob("*.bin")
        size = shard.stat().st_size
        left = size - 100 if cut_off == "the end of a page" else 0
        os.truncate(shard, left)
        output, _ = process.communicate(timeout=200)
    finally:
        process.kill()
    said = f"{shard}: expected {size} bytes, found {left}; delete {shard.parent} and run"
    assert (process.returncode, output.count("error: "), said in output) == (3, 1, True), output
    with pytest.raises(DataError, match=rf"expected .* found {left}"):
        train(config)
