"""Whole runs: whatever stops one, the same command gives what an unbroken run would have given."""

import errno
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import time

import numpy as np
import pytest
from runs import (
    STEPS,
    losses,
    params_sha256,
    run_process,
    starts,
    train,
    train_process,
    write_config,
)

from llm.commands import run_command
from llm.commands.train import main
from llm.errors import CheckpointError, DataError, NonFiniteError, RunLockedError, UsageError
from llm.model import remat
from llm.run.directory import RunDirectory
from llm.run.start import locked
from llm.text.tokenizer import CharacterTokenizer


def test_a_run_writes_what_the_design_promises(unbroken):
    run = unbroken / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["kind"] == "train"]
    evaluated = [row for row in rows if row["kind"] == "eval"]
    assert [row["step"] for row in trained] == list(range(1, STEPS + 1))
    assert [row["step"] for row in evaluated] == [6, STEPS]
    assert set(trained[0]) == {
        "kind", "step", "tokens", "loss", "grad_norm", "learning_rate", "tokens_per_second",
        "step_seconds", "memory_bytes", "mfu",
    }  # fmt: skip
    assert set(evaluated[0]) == {"kind", "step", "split", "loss", "bits_per_byte", "tokens"}
    assert [row["tokens"] for row in trained] == [128 * n for n in range(1, STEPS + 1)]
    assert trained[0]["mfu"] is None
    assert RunDirectory(run).read_config().training.steps == STEPS
    assert len(json.loads((run / "run.json").read_text())["starts"]) == 1
    assert (run / "tokenizer" / "tokenizer.json").is_file()
    assert (run / "report.html").is_file() and (run / "probes.jsonl").is_file()


def test_the_same_command_again_says_it_is_finished(unbroken, capsys):
    before = (unbroken / "run" / "metrics.jsonl").read_bytes()
    assert train(unbroken / "config.toml") == 0
    assert "is finished" in capsys.readouterr().err
    assert (unbroken / "run" / "metrics.jsonl").read_bytes() == before


def test_a_run_that_is_killed_twice_is_bitwise_the_unbroken_one(unbroken_process, tmp_path):
    """In a step, and when a save only waits for its name. 25 kills: test_kills.py."""
    config = write_config(tmp_path)
    for place in ("step:step=7", "checkpoint.before_commit:step=8"):
        code, output = run_process(config, fault=f"{place}:kill")
        assert code == -signal.SIGKILL, output
    code, output = run_process(config)
    assert code == 0, output
    assert len(starts(tmp_path / "run")) == 3
    assert losses(tmp_path / "run") == losses(unbroken_process / "run")
    assert params_sha256(tmp_path / "run") == params_sha256(unbroken_process / "run")


@pytest.mark.thorough
def test_resume_after_crashes_is_bitwise(unbroken, tmp_path, monkeypatch):
    """By an unexpected error at one place after another; each time the same command. One crash:
    test_init_from.py."""
    config = write_config(tmp_path)
    for place in (
        "step:step=3", "metrics.write:step=5", "evaluation:step=6", "step:step=7",
        "checkpoint.after_write:step=8", "checkpoint.before_commit:step=8", "checkpoint.deleting",
    ):  # fmt: skip
        monkeypatch.setenv("LLM_FAULT", f"{place}:raise")
        with pytest.raises((RuntimeError, CheckpointError)):
            train(config)
    monkeypatch.delenv("LLM_FAULT")
    train(config)
    assert losses(tmp_path / "run") == losses(unbroken / "run")
    assert params_sha256(tmp_path / "run") == params_sha256(unbroken / "run")


def test_more_steps_can_hold_the_rate_at_the_end_of_its_decay(unbroken, copy, capsys):
    train(unbroken / "config.toml")
    [hold] = re.findall(r"Train on: --training.steps N (\S+ \d+)", capsys.readouterr().err)
    assert hold == f"--optimizer.decay-steps {STEPS}"
    train(copy / "config.toml", "--training.steps", "14", *hold.split())
    assert "learning rate" not in capsys.readouterr().err
    rows = map(json.loads, (copy / "run" / "metrics.jsonl").read_text().splitlines())
    rows = [row for row in rows if row["kind"] == "train"][-2:]
    np.testing.assert_allclose([row["learning_rate"] for row in rows], 1e-3, rtol=1e-6)
    with pytest.raises(UsageError, match=r"decay_steps.*12.*13.*\n.*--run.allow-change"):
        train(copy / "config.toml", "--training.steps", "14", "--optimizer.decay-steps", "13")


@pytest.mark.thorough
def test_a_run_that_is_lengthened_goes_on_and_records_it(copy, capsys):
    train(copy / "config.toml", "--training.steps", "14")
    # nanoGPT's cosine after 2 of 14 steps, at update 13: 0.001 + 0.009 (1 + cos(pi 10 / 12)) / 2.
    said = capsys.readouterr().err
    assert "the learning rate of step 13 is 0.0016, and was to be 0.001;" in said
    assert "--optimizer.decay-steps 12" in said
    assert losses(copy / "run")[-1][1] == 14
    start = json.loads((copy / "run" / "run.json").read_text())["starts"][-1]
    assert start["from_step"] == STEPS
    assert start["changed"] == {"training.steps": [STEPS, 14]}


@pytest.mark.thorough(keep=1)
@pytest.mark.parametrize(
    "places",
    [["step:step=5:term"], ["step:step=5:hup", "evaluation:step=6:int", "step:step=7:usr1"]],
    ids=len,
)
def test_a_signal_saves_and_exits_75_and_the_run_goes_on(unbroken_process, tmp_path, places):
    config = write_config(tmp_path)
    for place in places:
        code, output = run_process(config, fault=place)
        assert code == 75, output
        assert "Traceback" not in output
        stopped_at = int(place.split("step=")[1].split(":")[0])
        assert (tmp_path / "run" / "checkpoints" / str(stopped_at)).is_dir()
    code, output = run_process(config)
    assert code == 0, output
    assert losses(tmp_path / "run") == losses(unbroken_process / "run")
    assert params_sha256(tmp_path / "run") == params_sha256(unbroken_process / "run")


@pytest.mark.thorough
def test_nohup_stays_nohup(tmp_path):
    process = train_process(write_config(tmp_path), fault="step:step=5:hup", under=("nohup",))
    output, _ = process.communicate(timeout=300)
    assert (process.returncode, "SIGHUP" in output) == (0, False), output


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("step", "batch", "code", "evaluated"),
    [(6, 64, 75, True), (6, 8, 75, False), (12, 64, 0, True)],
)
def test_an_evaluation_that_was_whole_when_the_stop_came_is_kept(
    tmp_path, step, batch, code, evaluated
):
    """Of 64 windows there is one batch, of 8 there are several."""
    config = write_config(tmp_path, training={"eval_batch_size": batch})
    assert run_process(config, fault=f"evaluation:step={step}:int")[0] == code
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert any(row["kind"] == "eval" and row["step"] == step for row in rows) == evaluated


def test_another_number_of_devices_gives_the_same_losses_within_rounding(
    unbroken, unbroken_process
):
    for one, eight in zip(losses(unbroken_process / "run"), losses(unbroken / "run"), strict=True):
        assert one[:2] == eight[:2]
        assert one[2] == pytest.approx(eight[2], rel=1e-5)


def test_a_second_process_is_refused_and_told_who_holds_the_run(copy):
    with (
        locked(RunDirectory(copy / "run")),
        pytest.raises(RunLockedError, match=r"in use by process \d+ on "),
    ):
        train(copy / "config.toml")


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(unbroken, copy, capsys):
    files = [p for p in (copy / "run" / "checkpoints" / str(STEPS)).rglob("*") if p.stat().st_size]
    victim = max((p for p in files if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    train(copy / "config.toml")
    assert "damaged, set aside" in capsys.readouterr().err
    assert (copy / "run" / "checkpoints" / f"{STEPS}.damaged").is_dir()
    assert losses(copy / "run") == losses(unbroken / "run")
    assert params_sha256(copy / "run") == params_sha256(unbroken / "run")


def test_without_any_good_checkpoint_training_does_not_begin_again(copy):
    for step in (copy / "run" / "checkpoints").iterdir():
        (step / "receipt.json").unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="can be trusted"):
            train(copy / "config.toml", "--training.steps", "20")


@pytest.mark.thorough
def test_settings_that_make_another_model_are_refused_with_a_diff(copy):
    with pytest.raises(UsageError, match=r"model.n_layer: the run has 2, this command has 3"):
        train(copy / "config.toml", "--model.n-layer", "3")
    with pytest.raises(UsageError, match=r"--run.allow-change"):
        train(copy / "config.toml", "--optimizer.learning-rate", "0.02", "--training.steps", "20")
    train(
        copy / "config.toml", "--optimizer.learning-rate", "0.02", "--training.steps", "13",
        "--run.allow-change",
    )  # fmt: skip
    start = json.loads((copy / "run" / "run.json").read_text())["starts"][-1]
    assert start["changed"]["optimizer.learning_rate"] == [0.01, 0.02]


def test_another_compute_dtype_is_refused_though_both_say_auto(copy, monkeypatch):
    """As a run begun on a GPU that goes on where "auto" is float32."""
    provenance = copy / "run" / "run.json"
    text = provenance.read_text()
    provenance.write_text(text.replace('"compute_dtype": "float32"', '"compute_dtype": "bfloat16"'))
    monkeypatch.setattr("llm.run.setup.has_bfloat16_units", lambda: False)
    config = copy / "run" / "config.toml"
    config.write_text(
        config.read_text().replace('compute_dtype = "float32"', 'compute_dtype = "auto"')
    )
    with pytest.raises(
        UsageError,
        match=r"has 'bfloat16', this command has 'float32' .*--training.compute-dtype bfloat16",
    ):
        train(copy / "config.toml", "--training.steps", "20", "--training.compute-dtype", "auto")
    assert len(starts(copy / "run")) == 1


@pytest.mark.thorough
def test_a_compute_dtype_that_is_what_auto_stood_for_is_taken(copy):
    train(copy / "config.toml", "--training.steps=13", "--training.compute-dtype=auto")
    changed = starts(copy / "run")[-1]["changed"]
    assert changed["training.compute_dtype"] == ["float32", "auto"]
    with pytest.raises(UsageError, match=r"the run has 'float32', this command has 'bfloat16'"):
        train(copy / "config.toml", "--training.steps=14", "--training.compute-dtype=bfloat16")


def test_fewer_steps_than_are_trained_are_refused_before_anything_is_written(copy):
    run = copy / "run"
    before = {path: path.read_bytes() for path in run.glob("*.*")}
    with pytest.raises(UsageError, match=rf"steps = 6, .* to step {STEPS}; expected at least"):
        train(copy / "config.toml", "--training.steps", "6")
    assert {path: path.read_bytes() for path in run.glob("*.*")} == before


def test_the_best_step_does_not_stay_where_it_is_not_asked_for(copy):
    flags = ["--checkpoint.no-keep-best", "--checkpoint.every=1", "--checkpoint.keep=1"]
    train(copy / "config.toml", "--training.steps=14", *flags)
    assert [path.name for path in (copy / "run" / "checkpoints").iterdir()] == ["14"]


def test_held_out_text_of_one_token_is_refused(tmp_path):
    config = write_config(tmp_path, data={"validation": "tail:0.00001"})
    with pytest.raises(UsageError, match=r"'tail:0.00001' holds out 1 token.*data.validation ="):
        train(config)
    assert os.listdir(tmp_path / "run") == ["run.lock"]
    none = ["--data.validation", "none", "--training.steps", "1"]
    assert train(config, *none) == train(config, *none) == 0
    assert len(starts(tmp_path / "run")) == 1


def test_a_corpus_that_changed_is_named(copy, unbroken, tmp_path):
    text = (unbroken / "corpus.txt").read_text()
    (tmp_path / "corpus.txt").write_text("A" + text[1:])
    with pytest.raises(DataError, match=r"(?s)corpus.txt.*sha256"):
        train(
            copy / "config.toml", "--data.source", str(tmp_path / "corpus.txt"),
            "--training.steps", "20",
        )  # fmt: skip


def test_a_config_that_is_not_the_models_disagrees_with_the_receipt(copy):
    config = copy / "run" / "config.toml"
    config.write_text(config.read_text().replace("norm_epsilon = 1e-05", "norm_epsilon = 0.1"))
    from llm.run.open import open_model

    with pytest.raises(CheckpointError, match=r"mean log-probability of -\d.* expected -\d"):
        open_model(copy / "run")


def test_a_run_directory_may_be_moved_and_be_a_link(copy, monkeypatch):
    moved = copy / "elsewhere"
    (copy / "run").rename(moved)
    link = copy / "link"
    link.symlink_to(moved)
    monkeypatch.chdir(copy)
    train(copy / "config.toml", "--run.dir", "link", "--training.steps", "13")
    assert losses(moved)[-1][1] == 13


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [("remat", "offload", "needs devices that reach"), ("attention", "splash", "is for TPUs")],
)
def test_what_devices_cannot_do_is_refused_before_the_text_is_read(
    tmp_path, monkeypatch, flag, value, message
):
    monkeypatch.setattr(remat, "HOST", "a host's memory that nobody has")
    with pytest.raises(UsageError, match=f"training.{flag} = '{value}' .*{message}"):
        train(write_config(tmp_path), f"--training.{flag}", value)
    assert os.listdir(tmp_path / "run") == ["run.lock"]
    assert not (tmp_path / "cache").exists()


@pytest.mark.thorough(keep=1)
@pytest.mark.parametrize(
    ("platforms", "reason"), [("cuda", "it finds none"), ("abacus", "Unable to initialize")]
)
def test_devices_that_are_not_there_are_said_in_a_sentence(
    tmp_path, monkeypatch, platforms, reason
):
    if platforms == "cuda" and importlib.util.find_spec("jax_cuda13_plugin"):
        pytest.skip("JAX has a plugin for GPUs here")
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    code, output = run_process(write_config(tmp_path))
    assert code == 2 and "Traceback" not in output
    assert reason in output and f"JAX_PLATFORMS is '{platforms}'" in output


@pytest.mark.thorough
def test_a_start_that_fails_before_it_is_a_run_leaves_room_for_the_same_command(
    tmp_path, monkeypatch
):
    """Without a package, without room for the tokenizer, killed as config.toml is written."""
    config = write_config(tmp_path, training={"steps": 1})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=r"logging.wandb_project needs the package wandb"):
        train(config, "--logging.wandb-project", "x")
    assert os.listdir(tmp_path / "run") == ["run.lock"]

    save = CharacterTokenizer.save

    def no_room(tokenizer, folder):
        save(tokenizer, folder)
        if folder == tmp_path / "run" / "tokenizer":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def crash(*_):
        raise KeyboardInterrupt

    flags = ["--logging.tensorboard"] * (importlib.util.find_spec("tensorboardX") is not None)
    with monkeypatch.context() as patch:
        patch.setattr(CharacterTokenizer, "save", no_room)
        with pytest.raises(CheckpointError, match=r"no room for .*tokenizer"):
            train(config, *flags)
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "write_config", crash)
        with pytest.raises(KeyboardInterrupt):
            train(config, *flags)
    assert train(config, *flags) == 0


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(copy):
    """A disk that is not mounted looks like this."""
    metrics = (copy / "run" / "metrics.jsonl").read_bytes()
    shutil.rmtree(copy / "run" / "checkpoints")
    with pytest.raises(CheckpointError, match=rf"goes to step {STEPS}, and .* no checkpoint"):
        train(copy / "config.toml", "--training.steps", "20")
    assert (copy / "run" / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.thorough
def test_settings_by_which_nothing_was_trained_are_not_held_against_others(tmp_path, monkeypatch):
    """A first start that failed at its first step, say for lack of memory; then a smaller model."""
    config = write_config(tmp_path)
    monkeypatch.setenv("LLM_FAULT", "step:step=1:raise")
    with pytest.raises(RuntimeError):
        train(config, "--model.d-model", "64", "--run.seed", "3")
    monkeypatch.delenv("LLM_FAULT")
    train(config)
    assert RunDirectory(tmp_path / "run").read_config().model.d_model == 32
    assert len(losses(tmp_path / "run")) >= STEPS


def test_a_tokenizer_that_is_gone_is_written_again(copy):
    tokenizer = copy / "run" / "tokenizer" / "tokenizer.json"
    content = tokenizer.read_bytes()
    tokenizer.unlink()
    train(copy / "config.toml", "--training.steps", "13")
    assert tokenizer.read_bytes() == content


def test_a_loss_that_is_not_finite_stops_before_the_update_and_keeps_the_batch(tmp_path):
    config = write_config(
        tmp_path, optimizer={"learning_rate": 1e38, "min_learning_rate": 0.0, "warmup_steps": 0}
    )
    with pytest.raises(NonFiniteError, match=r"step \d+: loss"):
        train(config)
    assert list((tmp_path / "run").glob("nonfinite-step-*.npz"))
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))


def test_a_model_that_gives_no_probabilities_is_not_saved_and_said_to_have_diverged(
    tmp_path, monkeypatch
):
    def nothing(_self, texts):
        return np.full((len(texts), len(texts[0]) - 1), np.nan, np.float32)

    monkeypatch.setattr("llm.training.probes.Scorer.logprobs", nothing)
    with pytest.raises(NonFiniteError, match="diverged"):
        train(write_config(tmp_path))
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--model.n-head", "3"], 2, ["model.d_model = 32", "model.n_head = 3", "nearest"]),
        (["--sample.top-p", "1.5"], 2, ["--sample.top-p 1.5:", "less than or equal to 1"]),
        (["--model.context-length", "100000"], 2, ["--model.context-length = 100000"]),
        (["--training.batch-size", "9"], 2, ["batch_size", "9", "8 or 16"]),
        (
            ["--model.d-model", "1048576"],
            2,
            ["26,388,392,312,832 parameters", "need at least 39,58"],
        ),
        (["--training.batch-size", "2000000000"], 2, ["2,000,000,000 sequences", "need at least"]),
        (["--tokenizer.kind", "gpt3"], 2, ["tokenizer.kind", "gpt3"]),
        (["--data.source", "no/such/file"], 3, ["no/such/file"]),
    ],
)
def test_wrong_input_is_answered_by_name(tmp_path, capsys, flags, code, words):
    assert run_command(main, [str(write_config(tmp_path)), *flags]) == code
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert all(word in message for word in words), message


def test_help_needs_no_jax(tmp_path):
    code, output = run_process(write_config(tmp_path), "--help")
    assert code == 0
    assert "--training.steps" in output
    program = (
        "import sys, contextlib, io\nfrom llm.commands.train import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "    main(['--help'])\n"
        "assert not {'jax', 'numpy', 'orbax', 'tensorstore'} & set(sys.modules)"
    )
    import subprocess

    from runs import ROOT

    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.thorough
def test_a_second_signal_ends_it_at_once(tmp_path):
    process = train_process(write_config(tmp_path, training={"steps": 100_000, "eval_every": 0}))
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() or not metrics.stat().st_size:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGSTOP)  # so that both signals are pending before it reacts
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    code = process.wait(timeout=60)
    process.communicate()
    assert code in (128 + signal.SIGINT, 128 + signal.SIGTERM)


@pytest.mark.thorough
def test_a_backend_that_does_not_repeat_itself_is_refused(tmp_path, monkeypatch):
    """With a step that adds a fresh number each time; the honest step passes."""
    import llm.training.loop as loop

    config = write_config(tmp_path, run={"deterministic": True}, training={"steps": 2})
    honest = loop.make_train_step

    def dishonest(*arguments):
        step, calls = honest(*arguments), []

        def run(state, tokens):
            calls.append(1)
            state, metrics = step(state, tokens)
            return state, {**metrics, "loss": metrics["loss"] + len(calls)}

        return run

    monkeypatch.setattr(loop, "make_train_step", dishonest)
    with pytest.raises(UsageError, match="step 1 taken twice"):
        train(config)
    monkeypatch.setattr(loop, "make_train_step", honest)
    assert train(config) == 0


def test_a_model_is_opened_while_its_steps_are_deleted(copy, monkeypatch):
    """A trainer that removes the step just chosen: the reader goes on to the other."""
    from llm.run import checkpoint, open

    root = copy / "run" / "checkpoints"
    verify = checkpoint.verify_files

    def vanishing(folder, *arguments):
        if folder.name == str(STEPS):
            shutil.rmtree(folder)
        return verify(folder, *arguments)

    monkeypatch.setattr(checkpoint, "verify_files", vanishing)
    steps = sorted(int(path.name) for path in root.iterdir())
    assert open.open_model(copy / "run").step == steps[-2]


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("prlimit") is None, reason="needs util-linux's prlimit")
def test_a_file_size_limit_in_a_save_loses_nothing(unbroken_process, tmp_path):
    """A real limit of the system, reached while step 8 is written."""
    from llm.run.checkpoint import verify_files

    config = write_config(tmp_path)
    code, output = run_process(config, fault="checkpoint.before_copy:step=8:kill")
    assert code == -signal.SIGKILL, output
    limited = train_process(config, under=("prlimit", "--fsize=14000"))
    output, _ = limited.communicate(timeout=300)
    assert limited.returncode == 4, output
    assert re.search(r"no room for a checkpoint .*File too large.* needs .*\d+ bytes", output), (
        output
    )
    verify_files(tmp_path / "run" / "checkpoints" / "4")
    code, output = run_process(config)
    assert code == 0, output
    assert params_sha256(tmp_path / "run") == params_sha256(unbroken_process / "run")
