"""training.init_from: a run that begins with another model's parameters and tokenizer.

The oracles are the source itself (`score`, its saved arrays), NumPy, and a run that nothing
disturbed.
"""

import json
import shutil
import signal
import tomllib

import jax
import numpy as np
import pytest
import tomli_w
from folders import from_hf
from runs import (
    ROOT,
    SETTINGS,
    identity_of,
    losses,
    params_sha256,
    run_process,
    saved_arrays,
    train,
    write_config,
)
from safetensors.numpy import load_file, save_file
from test_hosts import together
from test_imported import byte_level

from llm.commands import diff, import_hf, run_command, score, verify
from llm.errors import CheckpointError, UsageError
from llm.interop.hf import to_hf
from llm.model.gpt import ModelSpec, initialise
from llm.model_config import ModelConfig
from llm.run.open import open_model

STORIES = ROOT.parent / "shared" / "models" / "stories260k"
FROM_SOURCE = ("model", "tokenizer")  # sections that a configuration need not have
SHORT = {"training": {"steps": 2, "eval_every": 0}, "sample": {"max_new_tokens": 0}}
MESH = ("--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2")


def config_from(source, folder, text="the red deer to the other door rode " * 60, **changes):
    """The configuration of a run in FOLDER/run that begins with a source, on another text."""
    folder.mkdir(parents=True, exist_ok=True)
    training = {"init_from": str(source), **changes.pop("training", {})}
    model, tokenizer = changes.pop("model", {}), changes.pop("tokenizer", {})
    path = write_config(folder, training=training, **changes)
    settings = tomllib.loads(path.read_text())
    settings |= {"model": model, "tokenizer": tokenizer}
    path.write_text(tomli_w.dumps(settings))
    (folder / "corpus.txt").write_text(text)
    return path


def begin(config, *flags):
    """A run that has saved what it begins with, and was ended before it trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_FAULT", "checkpoint.after_commit:raise")
        with pytest.raises(CheckpointError, match="could not be saved"):
            train(config, *flags)


def printed(capsys, command, *arguments):
    capsys.readouterr()
    assert run_command(command.main, [*map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def ancestor(folder):
    return json.loads((folder / "run" / "run.json").read_text())["ancestor"]


@pytest.fixture(scope="module")
def source(unbroken):
    return unbroken / "run"


@pytest.fixture(scope="module")
def child(source, tmp_path_factory):
    """A run that was trained on from `source`, with every step kept."""
    folder = tmp_path_factory.mktemp("child")
    assert train(config_from(source, folder, checkpoint={"keep": 99})) == 0
    return folder


def test_a_run_begins_with_the_parameters_of_its_source(source, child):
    held = saved_arrays(child / "run" / "checkpoints" / "0" / "params")
    for name, array in saved_arrays(source / "checkpoints" / "12" / "params").items():
        np.testing.assert_array_equal(held[name], array, err_msg=name)
    said = ancestor(child)
    assert said["params_sha256"] == said["step_0_sha256"] == params_sha256(source)
    assert (said["from"], said["step"]) == (str(source), 12)
    config = tomllib.loads((child / "run" / "config.toml").read_text())
    parent = tomllib.loads((source / "config.toml").read_text())
    assert [config[part] for part in FROM_SOURCE] == [parent[part] for part in FROM_SOURCE]


def test_optimizer_and_order_of_data_are_fresh(child):
    arrays = saved_arrays(child / "run" / "checkpoints" / "0" / "training")
    assert int(arrays["step"]) == 0 and np.isnan(arrays["loss_history"]).all()
    moments = [array for name, array in arrays.items() if name.startswith("opt_state")]
    assert moments and not any(array.any() for array in moments)


def test_the_first_evaluation_is_what_score_says_of_the_source(source, child, capsys):
    """Of the held-out text, in windows that share no target: strides of the whole context."""
    corpus = (child / "corpus.txt").read_text()
    held_out = corpus[int(len(corpus) * 0.9) :]  # one token a character
    context = SETTINGS["model"]["context_length"]
    whole = (len(held_out) - 1) // context * context + 1
    kind, step, loss = losses(child / "run")[0]
    assert (kind, step) == ("eval", 0)
    # A last window that is not full is scored apart, as the evaluation reads it.
    parts = [held_out[:whole], held_out[whole - 1 :]]
    nats = count = 0
    for text in parts:
        if len(text) > 1:
            said = printed(capsys, score, source, "--text", text, "--stride", context, "--json")
            nats, count = nats + said["total_nats"], count + said["tokens"]
    assert count == len(held_out) - 1
    assert loss == pytest.approx(nats / count, abs=1e-6)


def test_the_source_may_go_once_the_first_checkpoint_is_there(source, tmp_path):
    moved = shutil.copytree(source, tmp_path / "source")
    config = config_from(moved, tmp_path / "b", **SHORT)
    assert train(config) == 0
    shutil.rmtree(moved)
    assert train(config) == 0  # it is finished
    settings = tomllib.loads(config.read_text())
    del settings["training"]["init_from"]
    config.write_text(tomli_w.dumps(settings))  # nor need it be said again
    assert train(config, "--training.steps", "4", "--run.allow-change") == 0
    assert [row[1] for row in losses(tmp_path / "b" / "run") if row[0] == "train"] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model.n-layer", "3"], r"--model.n-layer 3: it has 2"),
        (["--model.n-head", "7"], r"--model.n-head 7: it has 2"),  # not what 7 would divide
        (["--model.context-length", "17"], r"17: it has at most 16"),
        (["--model.bias", "false", "--model.d-model", "64"], r"(?s)d-model 64.*--no-bias|bias"),
        (["--tokenizer.kind", "bytes"], r"tokenizer.kind = 'bytes'.*of 'characters'"),
        (["--tokenizer.kind", "bpe"], r"tokenizer.kind = 'bpe'.*of 'characters'"),
        (["--training.init-from", "{source}@7"], r"run@7: expected a checkpoint.*6, 8, 12"),
        (["--training.init-from", "{source}/nowhere"], r"no such run or folder"),
        (["--training.init-from", "{source}/checkpoints"], r"not a run directory"),
        (["--run.dir", "{source}"], r"is the run directory itself"),
    ],
)
def test_what_contradicts_the_source_is_refused_by_name(source, tmp_path, flags, expected):
    config = config_from(source, tmp_path)
    with pytest.raises(UsageError, match=expected):
        train(config, *[flag.format(source=source) for flag in flags])
    assert not (tmp_path / "run").exists()


def test_a_file_that_contradicts_the_source_is_refused_before_other_advice(source, tmp_path):
    config = config_from(source, tmp_path, model={"d_model": 33, "n_head": 4}, run={"seed": -1})
    with pytest.raises(UsageError, match=r"(?s)model.n_head = 4: it has 2.*d_model = 33: it has"):
        train(config)


def test_dropout_padding_and_fewer_positions_may_be_chosen(source, tmp_path):
    model = {"dropout": 0.0, "vocab_multiple": 24, "context_length": 10}
    begin(config_from(source, tmp_path, model=model))
    held = saved_arrays(tmp_path / "run" / "checkpoints" / "0" / "params")
    theirs = saved_arrays(source / "checkpoints" / "12" / "params")
    assert held["embed.weight"].shape == (24, 32) and theirs["embed.weight"].shape == (64, 32)
    np.testing.assert_array_equal(held["embed.weight"][:7], theirs["embed.weight"][:7])
    np.testing.assert_array_equal(held["embed.position"], theirs["embed.position"][:10])
    said = ancestor(tmp_path)
    assert said["params_sha256"] == params_sha256(source)
    assert said["step_0_sha256"] == identity_of(held) == params_sha256(tmp_path / "run", 0)


def test_errors_on_the_way_change_nothing(source, child, tmp_path, monkeypatch):
    """Before the first checkpoint and after it. A kill, in the thorough tests, is no different."""
    config = config_from(source, tmp_path)
    for place in ("checkpoint.before_commit:raise", "step:step=3:raise"):
        monkeypatch.setenv("LLM_FAULT", place)
        with pytest.raises(
            (CheckpointError, RuntimeError), match=r"could not be saved|planned fault"
        ):
            train(config)
    monkeypatch.delenv("LLM_FAULT")
    assert train(config) == 0
    assert losses(tmp_path / "run") == losses(child / "run")
    assert params_sha256(tmp_path / "run", 12) == params_sha256(child / "run", 12)


@pytest.mark.thorough
def test_kills_change_nothing(source, tmp_path):
    """Before the first checkpoint, in the first evaluation, and in a step."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, killed = (config_from(source, tmp_path / name) for name in ("whole", "killed"))
    code, output = run_process(whole)
    assert code == 0, output
    for place in ("checkpoint.before_commit", "evaluation", "step:step=3"):
        code, output = run_process(killed, fault=f"{place}:kill")
        assert code == -signal.SIGKILL, output
    code, output = run_process(killed)
    assert code == 0, output
    assert losses(tmp_path / "killed" / "run") == losses(tmp_path / "whole" / "run")
    assert params_sha256(tmp_path / "killed" / "run") == params_sha256(tmp_path / "whole" / "run")


def test_a_source_that_changed_before_anything_was_trained_is_told_by_its_hash(
    source, tmp_path, monkeypatch, capfd
):
    config = config_from(source, tmp_path)
    monkeypatch.setenv("LLM_FAULT", "checkpoint.before_commit:raise")
    with pytest.raises(CheckpointError, match="could not be saved"):
        train(config)
    monkeypatch.delenv("LLM_FAULT")
    begin(config, "--training.init-from", f"{source}@8")
    said = capfd.readouterr().err
    assert "other parameters than its last start" in said and params_sha256(source, 12) in said
    assert ancestor(tmp_path)["step"] == 8


def test_a_run_does_not_go_on_from_another_source(source, child, tmp_path):
    shutil.copytree(child / "run", tmp_path / "run")
    flags = ["--training.init-from", f"{source}@8", "--run.dir", str(tmp_path / "run")]
    with pytest.raises(UsageError, match=r"(?s)training.init_from: the run has .*, this command"):
        train(child / "config.toml", *flags, "--run.allow-change", "--training.steps", "99")


def test_damage_of_the_source_is_an_error_that_names_it(source, tmp_path):
    broken = shutil.copytree(source, tmp_path / "source")
    largest = max((broken / "checkpoints/12/params").rglob("*"), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"?")
    config = config_from(f"{broken}@12", tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"step 12 cannot be trusted(?s:.*)has changed"):
        train(config)


def test_verify_and_diff_know_the_ancestors(source, child, tmp_path, capsys):
    begin(config_from(f"{child / 'run'}@8", tmp_path))
    mother, grandchild = child / "run", tmp_path / "run"
    said = printed(capsys, verify, mother, "--step", 0, "--json")
    assert said["params_sha256"] == said["ancestor"]["params_sha256"] == params_sha256(source)
    assert run_command(verify.main, [str(grandchild)]) == 0
    assert f"trained on from {mother}, step 8" in capsys.readouterr().err
    for one, other, expected in [
        (source, mother, "B comes from A at step 12"),
        (mother, source, "A comes from B at step 12"),
        (source, grandchild, "B comes from A at step 12"),
        (mother, grandchild, "B comes from A at step 8"),
    ]:
        assert run_command(diff.main, [str(one), str(other)]) == 0
        assert expected in capsys.readouterr().out
    begin(config_from(f"{source}@8", tmp_path / "sister"))
    assert run_command(diff.main, [str(grandchild), str(tmp_path / "sister" / "run")]) == 0
    assert "both come from run, at step 12 and at step 8" in capsys.readouterr().out


def test_verify_finds_a_step_0_that_is_not_what_the_run_began_with(child, tmp_path, capsys):
    shutil.copytree(child / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "0")
    steps = tmp_path / "run" / "checkpoints"
    shutil.copytree(steps / "4", steps / "0")
    with pytest.raises(CheckpointError, match="does not hold what the run began with"):
        verify.main([str(tmp_path / "run"), "--step", "0", "--json"])


@pytest.mark.thorough
@pytest.mark.parametrize("scan", [False, True])
def test_a_source_is_trained_on_any_mesh_and_as_stacked_layers(source, child, tmp_path, scan):
    training = {"scan_layers": scan}
    config = config_from(source, tmp_path, training=training, checkpoint={"keep": 99})
    assert train(config, *MESH) == 0
    assert params_sha256(tmp_path / "run", 0) == params_sha256(source)
    ours, expected = ({(k, s): v for k, s, v in losses(f / "run")} for f in (tmp_path, child))
    assert ours == {key: pytest.approx(loss, abs=1e-4) for key, loss in expected.items()}


# Hugging Face folders, and vocabularies that grow.

ENGLISH = "the quick brown fox jumps over the lazy dog, and then  the dog sleeps\n" * 60


def with_tokens(*added):
    """A byte-level tokenizer.json, with more special tokens behind its own."""
    file = byte_level(None)
    first = len(file["model"]["vocab"])
    marks = ("single_word", "lstrip", "rstrip", "normalized")
    file["added_tokens"] += [
        {"id": first + n, "content": word, "special": True, **dict.fromkeys(marks, False)}
        for n, word in enumerate(added)
    ]
    return file, first


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Hugging Face folder with a Llama and its tokenizer, and the tokenizer with three more."""
    folder, larger = tmp_path_factory.mktemp("llama"), tmp_path_factory.mktemp("larger")
    file, size = with_tokens()
    model = ModelConfig(
        n_layer=2, n_head=2, n_kv_head=1, d_model=32, context_length=64, positions="rotary",
        norm="rmsnorm", bias=False, activation="swiglu", tie_embeddings=False,
    ).resolved()  # fmt: skip
    params = jax.device_get(initialise(ModelSpec(model, size), jax.random.key(5)))
    to_hf(model, size, params, folder)
    (folder / "tokenizer.json").write_text(json.dumps(file))
    added = with_tokens("<|user|>", "<|model|>", "<|pad|>")[0]
    (larger / "tokenizer.json").write_text(json.dumps(added))
    return folder, larger / "tokenizer.json", size


def test_a_folder_gives_what_an_import_of_it_gives(llama, tmp_path, capsys):
    folder, _, size = llama
    assert run_command(import_hf.main, [str(folder), str(tmp_path / "imported")]) == 0
    shas = []
    for name, source, mesh in (
        ("a", folder, ("--mesh.fsdp", "4")),
        ("b", tmp_path / "imported", ()),
    ):
        begin(config_from(source, tmp_path / name, ENGLISH), "--model.context-length", "32", *mesh)
        shas.append([ancestor(tmp_path / name)["params_sha256"]])
        shas[-1].append(params_sha256(tmp_path / name / "run", 0))
    assert shas[0] == shas[1] and shas[0][0] == shas[0][1]
    opened = open_model(tmp_path / "a" / "run")
    assert opened.spec.vocab_size == size and opened.spec.config.context_length == 32


def test_new_tokens_begin_as_the_mean_of_the_others(llama, tmp_path, capfd):
    folder, larger, size = llama
    config = config_from(folder, tmp_path, ENGLISH, tokenizer={"kind": str(larger)}, **SHORT)
    with pytest.raises(UsageError, match=rf"has {size} tokens.*resize_vocabulary = true"):
        train(config)
    begin(config, "--training.resize-vocabulary")
    said = capfd.readouterr().err
    assert f"grows from {size} to {size + 3} tokens" in said
    held = saved_arrays(tmp_path / "run" / "checkpoints" / "0" / "params")
    theirs = from_hf(folder)[2]
    for name, axis in (("embed.weight", 0), ("head.weight", 1)):
        ours, old = (np.moveaxis(of[name], axis, 0)[: size + 3] for of in (held, theirs))
        np.testing.assert_array_equal(ours[:size], old[:size])
        mean = np.broadcast_to(old[:size].astype(np.float64).mean(0), ours[size:].shape)
        np.testing.assert_allclose(ours[size:], mean, atol=1e-7)
    assert ancestor(tmp_path)["step_0_sha256"] == identity_of(held)
    opened = open_model(tmp_path / "run")
    assert opened.tokenizer.encode("<|pad|>", special=True).tolist() == [size + 2]
    assert train(config, "--training.resize-vocabulary") == 0


def test_a_tokenizer_that_gives_ids_another_meaning_is_no_growth(llama, tmp_path):
    config = config_from(llama[0], tmp_path, ENGLISH, tokenizer={"kind": "gpt2"}, **SHORT)
    file = with_tokens("<|pad|>")[0]
    words = file["model"]["vocab"]
    words["<|begin|>"], words["<|endoftext|>"] = words["<|endoftext|>"], words["<|begin|>"]
    for token in file["added_tokens"][:2]:
        token["id"] = words[token["content"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    flags = ["--tokenizer.kind", str(tmp_path / "tokenizer.json"), "--training.resize-vocabulary"]
    with pytest.raises(UsageError, match=r"name one that adds tokens to it"):
        train(config, *flags)


def test_a_folder_without_a_tokenizer_takes_the_one_that_is_named(llama, tmp_path):
    bare = shutil.copytree(llama[0], tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    config = config_from(bare, tmp_path, ENGLISH, **SHORT)
    with pytest.raises(UsageError, match=r"has \d+ tokens; name the tokenizer that it was trained"):
        train(config)
    begin(config, "--tokenizer.kind", str(llama[0] / "tokenizer.json"))


def test_weights_that_are_not_finite_are_refused(llama, tmp_path):
    broken = shutil.copytree(llama[0], tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].copy()
    weights["model.embed_tokens.weight"][3, 3] = np.nan
    save_file(weights, broken / "model.safetensors")
    with pytest.raises(CheckpointError, match="broken has weights that are NaN or infinite"):
        train(config_from(broken, tmp_path, ENGLISH, **SHORT))
    assert not (tmp_path / "run" / "checkpoints" / "0").exists()


@pytest.mark.thorough
@pytest.mark.skipif(not STORIES.exists(), reason="the model is not here")
def test_stories260k_learns_another_text(tmp_path):
    """60 steps on Python's own words lower the loss on those that were held out."""
    assert run_command(import_hf.main, [str(STORIES), str(tmp_path / "stories")]) == 0
    text = (ROOT / "docs" / "design.md").read_text()
    changes = {
        "training": {"steps": 60, "batch_size": 8, "eval_every": 30},
        "optimizer": {"learning_rate": 1e-3, "min_learning_rate": 1e-4},
        "model": {"context_length": 64},
        "checkpoint": {"every": 20},
        "sample": {"max_new_tokens": 0},
    }
    code, output = run_process(config_from(tmp_path / "stories", tmp_path, text, **changes))
    assert code == 0, output
    evaluations = [loss for kind, _, loss in losses(tmp_path / "run") if kind == "eval"]
    assert evaluations[-1] < evaluations[0] - 0.5


@pytest.mark.thorough
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_experts_of_a_folder_are_read_onto_their_devices_and_trained(model_type, tmp_path):
    file, size = with_tokens()
    model = ModelConfig(
        n_layer=1, n_head=2, n_kv_head=1, d_model=32, d_ff=48, context_length=16, norm="rmsnorm",
        positions="rotary", bias=False, activation="swiglu", tie_embeddings=False, n_expert=4,
        n_expert_active=2, qk_norm=model_type == "qwen3_moe",
    ).resolved()  # fmt: skip
    params = jax.device_get(initialise(ModelSpec(model, size), jax.random.key(5)))
    assert to_hf(model, size, params, tmp_path / "folder") == model_type
    (tmp_path / "folder" / "tokenizer.json").write_text(json.dumps(file))
    config = config_from(tmp_path / "folder", tmp_path, ENGLISH, **SHORT)
    mesh = ("--mesh.expert", "2", "--mesh.fsdp", "2", "--mesh.data", "2")
    assert train(config, *mesh, "--checkpoint.keep", "9") == 0
    assert params_sha256(tmp_path / "run", 0) == identity_of(from_hf(tmp_path / "folder")[2])
    evaluations = [loss for kind, _, loss in losses(tmp_path / "run") if kind == "eval"]
    assert evaluations[-1] < evaluations[0]


@pytest.mark.thorough
def test_two_processes_read_their_own_parts_of_a_folder(llama, tmp_path):
    config = config_from(llama[0], tmp_path, ENGLISH, **SHORT)
    results = together(config, 2, "--mesh.fsdp", "2", "--checkpoint.keep", "9")
    assert [code for code, _ in results] == [0, 0], results
    assert params_sha256(tmp_path / "run", 0) == identity_of(from_hf(llama[0])[2])
    pieces = tmp_path / "run" / "checkpoints" / "0" / "params" / "embed.weight"
    assert len([path for path in pieces.iterdir() if path.name != ".zarray"]) == 2


@pytest.mark.parametrize(("table", "said"), [({"kind": 5}, "kind = 5"), ({"knd": "x"}, "knd")])
def test_a_tokenizer_that_is_no_setting_is_a_message(source, tmp_path, table, said):
    with pytest.raises(UsageError, match=f"tokenizer.{said}"):
        train(config_from(source, tmp_path, tokenizer=table))


def test_training_finds_what_was_prepared_in_the_vocabulary_of_the_source(source, tmp_path):
    from llm.commands import prepare

    config = config_from(source, tmp_path, text="the red deer " * 99)
    assert run_command(prepare.main, [str(config)]) == 0
    prepared = set((tmp_path / "cache" / "shards").iterdir())
    begin(config)
    assert set((tmp_path / "cache" / "shards").iterdir()) == prepared
