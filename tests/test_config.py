"""A file and flags become one Config; what is wrong with either is answered once, by name."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.commands.flags import parse
from llm.commands.train import Options
from llm.config import Config, TrainingConfig, differences, flatten, load_config, to_toml, validate
from llm.errors import UsageError
from llm.model_config import ModelConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def write(tmp_path):
    """Write TOML text to a file and return its path."""

    def write_text(text: str) -> Path:
        path = tmp_path / "config.toml"
        path.write_text(text)
        return path

    return write_text


def load(path: Path | None, flags: Sequence[str]) -> Config:
    """The settings of a file, or of none, and flags."""
    return parse(Options, [str(path or os.devnull), *flags]).settings


def message(path: Path | None, *flags: str) -> str:
    with pytest.raises(UsageError) as caught:
        load(path, flags)
    assert caught.value.exit_code == 2
    return str(caught.value)


# One Config from three places.


def test_defaults_then_file_then_flags(write):
    path = write("[model]\nn_layer = 3\nd_model = 96\n[training]\nsteps = 7\n")
    config = load(path, ["--model.n-layer", "5", "--run.dir", "here"])
    assert (config.model.n_layer, config.model.d_model) == (5, 96)
    assert (config.training.steps, config.run.dir) == (7, "here")
    untouched = {"model.n_layer", "model.d_model", "training.steps", "run.dir"}
    assert set(differences(Config(), config)) == untouched


def test_a_flag_that_says_the_default_wins_over_the_file(write):
    default = Config().model.n_layer
    path = write(f"[model]\nn_layer = {default + 1}\nbias = false\n")
    config = load(path, ["--model.n-layer", str(default), "--model.bias"])
    assert config.model.n_layer == default
    assert config.model.bias is True


@pytest.mark.parametrize(
    "flags",
    [
        ["--training.batch-size", "24", "--training.micro-batch-size", "8"],
        ["--training.batch_size", "24", "--training.micro_batch_size", "8"],
        ["--training.batch_size=24", "--training.micro-batch-size=8"],
        ["--training.batch-size", "1", "--training.batch-size=24", "--training.micro-batch-size=8"],
    ],
)
def test_flags_are_spelled_with_dashes_or_underscores_and_the_last_one_counts(flags):
    training = load(None, flags).training
    assert (training.batch_size, training.micro_batch_size) == (24, 8)
    assert training.accumulation == 3


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model.qk-norm"], True),
        (["--model.qk_norm", "true"], True),
        (["--model.qk-norm=True"], True),
        (["--model.no-qk-norm"], False),
        (["--model.no_qk_norm"], False),
        (["--model.qk-norm", "false"], False),
        (["--model.qk_norm=false"], False),
    ],
)
@pytest.mark.parametrize("in_file", ["true", "false"])
def test_every_spelling_of_a_switch(write, flags, expected, in_file):
    path = write(f"[model]\nqk_norm = {in_file}\n")
    assert load(path, flags).model.qk_norm is expected


def test_lists_numbers_and_words_that_begin_with_a_dash_are_values():
    flags = ["--data.source", "a b.txt", "c", "--sample.seed", "-5", "--sample.prompt", "-x y"]
    config = load(None, flags)
    assert config.data.source == ("a b.txt", "c")
    assert config.sample.seed == -5
    assert config.sample.prompt == "-x y"
    assert load(None, ["--sample.prompt=--x"]).sample.prompt == "--x"
    assert load(None, ["--data.source", "one"]).data.source == "one"


def test_a_run_directory_may_lie_in_the_home(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    path = write("[run]\ndir = '~/runs/one'\n")
    assert load_config(path).run.dir == "/home/someone/runs/one"
    assert load(path, ["--run.dir=~/two"]).run.dir == "/home/someone/two"


def test_an_integer_is_a_number_too(write):
    path = write("[optimizer]\nlearning_rate = 1\nmin_learning_rate = 0\n")
    rate = load_config(path).optimizer.learning_rate
    assert rate == 1.0 and isinstance(rate, float)
    rate = load(None, ["--optimizer.learning-rate", "1"]).optimizer.learning_rate
    assert rate == 1.0 and isinstance(rate, float)


# What is written is read back equal.


@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    run_seed=st.integers(0, 2**32 - 1),
    rate=st.floats(1e-12, 1e3),
    prompt=st.text(st.characters(exclude_categories=["Cs"])),
    sources=st.one_of(st.text("ab/*:é\"'\\\n"), st.lists(st.text("ab\U0001f600"), max_size=3)),
    bias=st.booleans(),
)
def test_what_is_written_is_read_back_equal(seed, run_seed, rate, prompt, sources, bias):
    config = validate(
        {
            "run": {"seed": run_seed},
            "optimizer": {"learning_rate": rate, "min_learning_rate": 0.0},
            "sample": {"prompt": prompt, "seed": seed},
            "data": {"source": sources},
            "model": {"bias": bias},
        },
        where="test",
    )
    assert validate(tomllib.loads(to_toml(config)), where="test") == config
    assert not differences(config, validate(tomllib.loads(to_toml(config)), where="test"))


def test_every_setting_is_written_and_has_a_meaning():
    written = tomllib.loads(to_toml(Config()))
    for section, settings in Config():
        if section == "probe":
            continue  # tables
        assert type(settings).__doc__, section
        for key, info in type(settings).model_fields.items():
            assert key in written[section]
            assert info.description, f"{section}.{key}"


def test_a_config_cannot_be_changed_in_place():
    with pytest.raises(pydantic.ValidationError):
        Config().model.n_layer = 2


def test_differences_name_the_setting_with_both_values():
    old = Config()
    new = validate({"model": {"n_layer": 9}}, where="test")
    assert differences(old, new) == {"model.n_layer": (old.model.n_layer, 9)}
    assert flatten(new)["model.n_layer"] == 9


def test_resolved_writes_out_the_sizes_that_follow():
    gelu = ModelConfig(d_model=384, n_head=6).resolved()
    assert (gelu.d_ff, gelu.n_kv_head) == (1536, 6)
    swiglu = ModelConfig(d_model=384, n_head=6, n_kv_head=2, activation="swiglu").resolved()
    assert (swiglu.d_ff, swiglu.n_kv_head) == (1024, 2)
    assert ModelConfig(d_ff=100).resolved().d_ff == 100
    assert gelu.resolved() == gelu


# Wrong input.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "[model]\nn_layers = 3",
            ["unknown setting model.n_layers", "did you mean model.n_layer?"],
        ),
        ("[modle]\nn_layer = 3", ["unknown setting modle", "did you mean model?"]),
        ("n_layer = 3", ["unknown setting n_layer", "did you mean model.n_layer?"]),
        ("[zzz]\nx = 3", ["unknown setting zzz", "sections are run, data, tokenizer"]),
        ("[training]\nlearning_rate = 1.0", ["training.learning_rate", "optimizer.learning_rate?"]),
        ("[model]\nn_layer = '3'", ["model.n_layer = '3'", "expected a valid integer"]),
        ("[model]\nn_layer = 3.5", ["model.n_layer = 3.5", "expected a valid integer"]),
        ("[model]\nn_layer = true", ["model.n_layer = True", "expected a valid integer"]),
        ("[model]\nbias = 1", ["model.bias = 1", "expected a valid boolean"]),
        ("[run]\nseed = 1.0", ["run.seed = 1.0", "expected a valid integer"]),
        ("[run]\nseed = -1", ["run.seed = -1", "greater than or equal to 0"]),
        ("[run]\nseed = 4294967296", ["run.seed = 4294967296", "less than 4294967296"]),
        ("[data]\nsource = 3", ["data.source = 3", "expected a valid string"]),
        ("[data]\nsource = ['a', 3]", ["data.source", "expected a valid string"]),
        ("model = 3", ["model = 3", "expected a table"]),
        ("[model]\nn_layer = 0", ["model.n_layer = 0", "greater than 0"]),
        ("[model]\ndropout = 1.0", ["model.dropout = 1.0", "less than 1"]),
        ("[optimizer]\nlearning_rate = nan", ["optimizer.learning_rate = nan", "finite"]),
        ("[optimizer]\nkind = 'sgd'", ["optimizer.kind = 'sgd'", "'adamw' or 'muon'"]),
        ("[sample]\ntop_p = 1.5", ["sample.top_p = 1.5", "less than or equal to 1"]),
        ("a = " + "[" * 10_000 + "]" * 10_000, ["is not valid TOML", "recursion"]),
        ("[model]\nn_layer = " + "9" * 5000, ["is not valid TOML", "5000 digits"]),
        ("[model]\nbackend = 'jax'", ["unknown setting model.backend; the sections are"]),
        ("[training]\nema = 0.9", ["unknown setting training.ema; the sections are"]),
        ("[model]\nn_embd = 3", ["did you mean model.d_model?"]),
        ("[training]\nlog_interval = 3", ["did you mean logging.every?"]),
        ("[data]\nvalidation = '0.1'", ["data.validation = '0.1'", "documents:F"]),
        ("[data]\nvalidation = 'tail:1.5'", ["data.validation = 'tail:1.5'", "0 < F < 1"]),
    ],
)
def test_a_wrong_setting_in_a_file_is_answered_by_name(write, text, words):
    path = write(text)
    found = message(path)
    assert str(path) in found
    for word in words:
        assert word in found


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model.n-layers", "3"], ["unknown flag --model.n-layers", "--model.n-layer?"]),
        (["--modle.n-layer", "3"], ["unknown flag --modle.n-layer", "--model.n-layer?"]),
        (["--n-layer", "3"], ["unknown flag --n-layer", "did you mean --model.n-layer?"]),
        (["--model", "3"], ["unknown flag --model", "is a section", "--model.n-layer"]),
        (["--model.no-n-layer"], ["unknown flag --model.no-n-layer"]),
        (["--model.n-layer", "three"], ["--model.n-layer three: ", "expected a valid integer"]),
        (["--model.n-layer=3.0"], ["--model.n-layer 3.0: ", "expected a valid integer"]),
        (["--model.n-layer"], ["--model.n-layer has no value", "--model.n-layer N"]),
        (["--model.n-layer", "--model.d-model", "8"], ["--model.n-layer has no value"]),
        (["--model.n-layer", "3", "4"], ["--model.n-layer takes one value", "'4'"]),
        (
            ["--optimizer.learning-rate", "1,5"],
            ["--optimizer.learning-rate 1,5: ", "a valid number"],
        ),
        (["--optimizer.learning-rate", "inf"], ["--optimizer.learning-rate inf: ", "finite"]),
        (["--optimizer.kind", "sgd"], ["--optimizer.kind sgd: ", "'adamw' or 'muon'"]),
        (["--run.allow-change", "maybe"], ["'maybe'", "--run.allow-change", "true or false"]),
        (["--data.source"], ["--data.source has no value"]),
        (["--data.source", "bad\udcff.txt"], ["--data.source", "expected UTF-8: rename"]),
        (["--training.steps", "2147483648"], ["--training.steps 2147483648", "than 2147483648"]),
        (["--model.n-layer", "1000000"], ["--model.n-layer 1000000", "or equal to 1024"]),
        (["--model.d-model", "1000000000"], ["--model.d-model 1000000000", "or equal to 1048576"]),
        (["--sample.num-samples", "1000000000"], ["less than or equal to 100000"]),
        (["--run.seed", "9" * 5000], ["--run.seed 999", "expected a valid integer"]),
        (["stray"], ["unexpected word 'stray'"]),
        (["--sample.top-p", "1.5"], ["--sample.top-p 1.5: ", "less than or equal to 1"]),
    ],
)
def test_a_wrong_flag_is_answered_by_name_and_nothing_else(capfd, flags, words):
    found = message(None, *flags)
    for word in words:
        assert word in found
    # Only the message, which the command prints: no frames around several sentences.
    assert "\n" not in found
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--model.d-model", "100", "--model.n-head", "3"],
            ["model.d_model = 100", "model.n_head = 3", "nearest that is: 99"],
        ),
        (["--model.n-kv-head", "4"], ["model.n_kv_head = 4", "[1, 2, 3, 6]"]),
        (
            ["--model.positions", "rotary", "--model.d-model", "18"],
            ["rotary", "even head size", "found d_model / n_head = 3"],
        ),
        (
            ["--training.micro-batch-size", "7"],
            ["training.batch_size = 64", "training.micro_batch_size = 7"],
        ),
        (["--mesh.fsdp", "-1"], ["-1", "at most one axis", "data=-1 fsdp=-1"]),
        (
            ["--optimizer.learning-rate", "1e-6"],
            ["optimizer.min_learning_rate = 6e-05", "above", "optimizer.learning_rate = 1e-06"],
        ),
    ],
)
def test_an_impossible_combination_is_answered_with_both_settings(flags, words):
    found = message(None, *flags)
    for word in words:
        assert word in found


def test_every_wrong_setting_of_a_file_is_named_at_once(write):
    found = message(write("[model]\nn_layer = 0\nwidth = 4\n[training]\nsteps = 'many'\n"))
    assert all(name in found for name in ("model.n_layer", "model.width", "training.steps"))


def test_the_flags_are_not_blamed_for_the_file(write):
    path = write("[model]\nd_model = 100\nn_head = 3\n")
    assert message(path, "--training.steps", "5").startswith(f"in {path}: ")
    good = write("[model]\nd_model = 99\nn_head = 3\n")
    assert message(good, "--model.n-head", "2").startswith("in the flags: ")


def test_a_byte_order_mark_is_passed_over(tmp_path):
    """Some editors write one."""
    path = tmp_path / "config.toml"
    path.write_bytes(b"\xef\xbb\xbf[model]\nn_layer = 3\n")
    assert load(path, []).model.n_layer == 3


def test_a_file_that_cannot_be_read_is_named(write, tmp_path):
    assert "no configuration file" in message(tmp_path / "missing.toml")
    assert "File name too long" in message(tmp_path / ("x" * 300))
    assert "Not a directory" in message(write("") / "x")
    assert "is a folder" in message(tmp_path)
    assert "not valid TOML" in message(write("[model\n"))
    path = tmp_path / "latin1.toml"
    path.write_bytes(b"# caf\xe9\n")
    assert "not valid TOML" in message(path)


DEEP = ".".join(["a"] * 5000)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a = " + "[" * 10_000, "is not valid TOML: maximum recursion depth"),
        (
            f"[model]\nn_layer = {{{DEEP} = 1}}",
            r"model.n_layer = \{'a': .*expected a valid integer",
        ),
        (f"{DEEP} = 1", "unknown setting a"),
        ("#" * (1 << 24) + "\n", "is larger than 16 MiB"),
        (
            "run.dir = '~nobodyknown/x'",
            r"run.dir = .*a user whose home is known.*\./~nobodyknown/x",
        ),
        ('run.dir = "a\\u0000b"', "no zero byte"),
    ],
)
def test_a_file_that_no_person_wrote_is_refused_in_one_sentence(write, text, words):
    with pytest.raises(UsageError, match=words) as refused:
        load(write(text), [])
    assert len(str(refused.value)) < 400


def test_a_path_that_is_not_utf8_is_refused_by_the_name_of_its_setting(write):
    with pytest.raises(UsageError, match=r"run.dir.*expected a path of UTF-8 characters"):
        load(write(""), ["--run.dir", os.fsdecode(b"runs/\xff")])


def test_accumulation_is_a_whole_number_of_forward_passes():
    assert TrainingConfig(batch_size=480, micro_batch_size=96).accumulation == 5
    assert TrainingConfig(batch_size=480).accumulation == 1


# The command line itself.


def run_train(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "train.py", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_help_names_every_setting_and_fits_the_terminal():
    finished = run_train("--help", COLUMNS="80")
    assert finished.returncode == 0
    for name in flatten(Config()):
        if name == "data.mixture":
            assert "[[data.mixture]]" in finished.stdout
            continue
        assert f"--{name.replace('_', '-')}" in finished.stdout.split(), name
    assert max(map(len, finished.stdout.splitlines())) <= 80


def test_a_wrong_flag_ends_the_command_with_one_line_and_code_2():
    finished = run_train("configs/quickstart.toml", "--model.n-layr", "3")
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr == (
        "error: unknown flag --model.n-layr; did you mean --model.n-layer?\n"
    )


def test_reading_settings_imports_neither_jax_nor_the_network():
    program = (
        "import sys, json; from llm.commands.flags import parse; "
        "from llm.commands.train import Options; "
        "parse(Options, ['configs/quickstart.toml', '--training.steps', '3']); "
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    heavy = {
        "jax",
        "flax",
        "optax",
        "orbax",
        "tensorstore",
        "datasets",
        "tiktoken",
        "numpy",
        "torch",
    }
    assert not heavy & set(json.loads(finished.stdout))
