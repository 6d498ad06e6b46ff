"""import-hf and export-hf: what transformers wrote is opened here, and the other way, with equal
logits. The goldens are models that transformers made, with the logits that it gave."""

import json
import os
import re
import resource
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from runs import ROOT, train, write_config
from safetensors.numpy import load_file
from test_hf import GOLDENS, VOCAB, logits_of, torch_and_transformers, write_golden

from llm.commands import diff, export_hf, import_hf, replay, run_command, score, verify
from llm.errors import LLMError, UsageError
from llm.model.gpt import ModelSpec, abstract_params
from llm.model_config import ModelConfig
from llm.run.open import open_model
from llm.text.tokenizer import CharacterTokenizer, tiktoken_tokenizer

SHARED = ROOT.parent / "shared"
CHARACTERS = CharacterTokenizer("".join(map(chr, range(ord("a"), ord("a") + VOCAB))))


def run(command, *arguments):
    return run_command(command.main, [*map(str, arguments)])


def printed(capsys, command, *arguments):
    status = run(command, *arguments)
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return json.loads(captured.out)


def logits(opened, tokens):
    return logits_of(opened.spec.config, opened.spec.vocab_size, opened.params, tokens)


@pytest.fixture(params=GOLDENS, ids=lambda path: path.stem)
def golden(request, tmp_path):
    """(folder as transformers wrote it, tokens, the logits that it gave)"""
    folder = tmp_path / "theirs"
    tokens, expected = write_golden(request.param, folder)
    CHARACTERS.save(folder / "tokenizer")
    return folder, tokens, expected


@pytest.mark.thorough
def test_an_imported_model_gives_the_logits_of_transformers(golden, tmp_path, capsys):
    folder, tokens, expected = golden
    report = printed(capsys, import_hf, folder, tmp_path / "runs" / "mine", "--json")
    opened = open_model(tmp_path / "runs" / "mine")
    np.testing.assert_allclose(logits(opened, tokens), expected, atol=1e-4)
    assert report["params_sha256"] == opened.params_sha256
    assert (opened.run, opened.step) == ("mine", 0)
    assert opened.tokenizer.sha256 == CHARACTERS.sha256
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mine"]
    verified = printed(capsys, verify, tmp_path / "runs" / "mine", "--json")
    assert verified["manifest_ok"] and verified["receipt_max_abs_diff"] < 1e-5
    summary = printed(capsys, score, tmp_path / "runs" / "mine", "--text", "abcabcda", "--json")
    assert summary["tokens"] == 7 and summary["step"] == 0


def test_exporting_what_was_imported_changes_no_bit(golden, tmp_path, capsys):
    folder, _, _ = golden
    assert run(import_hf, folder, tmp_path / "mine") == 0
    capsys.readouterr()
    report = printed(capsys, export_hf, tmp_path / "mine", tmp_path / "ours", "--json")
    theirs, ours = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "ours"))
    assert theirs.keys() == ours.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
    described = json.loads((folder / "config.json").read_text())
    assert report["model_type"] == described["model_type"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    data, steps = {"validation": "none"}, {"steps": 2}
    train(write_config(folder, data=data, training=steps, checkpoint={"every": 1}))
    return folder / "run"


@pytest.mark.thorough
def test_a_trained_run_goes_out_and_comes_back(trained, tmp_path, capsys):
    report = printed(capsys, export_hf, trained, tmp_path / "out", "--json")
    opened = open_model(trained)
    assert (report["step"], report["params_sha256"]) == (2, opened.params_sha256)
    assert run(import_hf, tmp_path / "out", tmp_path / "back") == 0
    back = open_model(tmp_path / "back")
    assert back.tokenizer.sha256 == opened.tokenizer.sha256
    tokens = np.arange(16, dtype=np.int32)[None] % opened.spec.vocab_size
    np.testing.assert_array_equal(logits(back, tokens), logits(opened, tokens))


def test_transformers_opens_an_exported_run_with_equal_logits(trained, tmp_path):
    torch, transformers = torch_and_transformers()
    assert run(export_hf, trained, tmp_path / "out", "--step", 1) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    opened = open_model(trained, 1)
    random = np.random.default_rng(0)
    tokens = random.integers(0, opened.spec.vocab_size, (2, 16), dtype=np.int32)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens).long()).logits.numpy()
    np.testing.assert_allclose(logits(opened, tokens), expected, atol=1e-4)


@pytest.mark.thorough
def test_the_example_of_the_documentation_gives_equal_numbers(tmp_path, monkeypatch):
    """docs/models.md: a recipe trained, exported and opened, here for two steps on other text.

    The example's own words run: its commands, and its program with the folders that they made.
    """
    torch_and_transformers()
    section = (ROOT / "docs" / "models.md").read_text()
    lines = [line.split() for line in section.splitlines()]
    config = next(line for line in lines if line[:2] == ["python", "train.py"])[2]
    _, _, _, name, *folders = next(line for line in lines if line[1:3] == ["-m", "llm"])
    program = section.split("```python\n")[1].split("```")[0]
    (tmp_path / "text.txt").write_text("ROMEO: But, soft! what light is it?\n" * 200)
    monkeypatch.chdir(tmp_path)
    here = ["--data.source=text.txt", "--data.cache_dir=cache"]
    here += [
        "--data.validation=none",
        "--training.steps=2",
        "--training.batch_size=16",
    ]  # on the eight devices of the tests
    assert train(ROOT / config, *here) == 0
    assert (name, run(export_hf, *folders)) == ("export-hf", 0)
    found = {}
    exec(program, found)
    assert found["ours"].shape == found["theirs"].shape
    np.testing.assert_allclose(found["theirs"], found["ours"], atol=1e-4)


@pytest.fixture(scope="module")
def gpt2():
    """GPT-2's encoding, read once, from the cache that may be there; the network is not asked."""
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken-cache"))
    if not Path(cache).is_dir():
        pytest.skip("no cache of tiktoken encodings")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", cache)
        return tiktoken_tokenizer("gpt2")


def vocabulary_of(tokenizer):
    """token -> id, its bytes in GPT-2's printable spelling, as its encoder.py makes it."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = [byte for byte in range(256) if byte not in plain]
    symbol = [chr(b) if b in plain else chr(256 + spare.index(b)) for b in range(256)]
    named = enumerate(tokenizer.token_table)
    return {"".join(symbol[b] for b in data): id_ for id_, data in named if data}


def test_gpt2s_vocabulary_is_known_and_no_other_is_taken_for_it(gpt2, tmp_path, monkeypatch):
    sizes = []

    def known(name, vocab_size=0):
        sizes.append(vocab_size)
        return {"gpt2": gpt2}[name]

    monkeypatch.setattr("llm.text.tokenizer.tiktoken_tokenizer", known)

    def write(vocabulary):
        (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))

    vocabulary = vocabulary_of(gpt2)
    write(vocabulary | {"<|endoftext|>": 50256})
    assert import_hf.tokenizer_of(tmp_path, None, 50257) is gpt2
    write({**vocabulary, "Ġthe": vocabulary["Ġof"], "Ġof": vocabulary["Ġthe"]})
    with pytest.raises(UsageError, match="is not GPT-2's"):
        import_hf.tokenizer_of(tmp_path, None, 50257)
    write({"a": 0})
    with pytest.raises(UsageError, match="of 1 token, is not GPT-2's"):
        import_hf.tokenizer_of(tmp_path, None, 50257)
    assert import_hf.tokenizer_of(tmp_path, "gpt2", 50257) is gpt2
    with pytest.raises(UsageError, match=r"predicts 50000 tokens .* has 50257"):
        import_hf.tokenizer_of(tmp_path, "gpt2", 50000)
    assert sizes[-1] == 50000
    (tmp_path / "vocab.json").write_text("[]")
    with pytest.raises(UsageError, match="is not"):
        import_hf.tokenizer_of(tmp_path, None, 50257)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ((), "holds no tokenizer .* --tokenizer KIND"),
        (("--tokenizer", "bytes"), "predicts 29 tokens and the tokenizer 'bytes' has 257"),
        (("--tokenizer", "characters"), "those of a corpus"),
        (("--tokenizer", "gtp2"), "did you mean 'gpt2'"),
    ],
)
def test_a_tokenizer_that_cannot_be_is_refused_and_nothing_is_left(tmp_path, flags, named, capsys):
    write_golden(GOLDENS[0], tmp_path / "theirs")
    assert run(import_hf, tmp_path / "theirs", tmp_path / "mine", *flags) == 2
    assert re.search(named, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_an_imported_run_has_no_steps_to_compare_or_to_replay(tmp_path, capsys):
    write_golden(GOLDENS[0], tmp_path / "theirs")
    CHARACTERS.save(tmp_path / "theirs" / "tokenizer")
    mine = tmp_path / "mine"
    assert run(import_hf, tmp_path / "theirs", mine) == 0
    for command, arguments in ((diff, [mine, mine]), (replay, [mine, "--step", 1])):
        assert run(command, *arguments) == 2
        assert "was not trained here" in capsys.readouterr().err


def test_training_into_an_imported_run_is_told_how_to_train_on_from_it(tmp_path):
    """Though its settings are others: to restore them would not help."""
    write_golden(GOLDENS[0], tmp_path / "theirs")
    CHARACTERS.save(tmp_path / "theirs" / "tokenizer")
    mine = tmp_path / "mine"
    assert run(import_hf, tmp_path / "theirs", mine) == 0
    config = write_config(tmp_path, run={"dir": str(mine)})
    with pytest.raises(UsageError, match=f"--training.init-from {re.escape(str(mine))}"):
        train(config)


def test_nothing_is_overwritten(golden, trained, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    for command, source in ((import_hf, golden[0]), (export_hf, trained)):
        assert run(command, source, tmp_path / "taken") == 2
        assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "taken" / "notes.txt").read_text() == "mine"


def test_a_full_disk_is_said_once_and_nothing_is_left(trained, tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        assert run(export_hf, trained, tmp_path / "out") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert said.startswith(f"error: no room for {tmp_path / 'out'} (File too large); ")
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_model_of_no_architecture_there_leaves_no_folder(tmp_path, capsys):
    config = ModelConfig(n_layer=1, n_head=1, d_model=8, activation="relu_squared").resolved()
    spec = ModelSpec(config, VOCAB)
    params = {name: np.zeros(x.shape, np.float32) for name, x in abstract_params(spec).items()}
    (tmp_path / "run").mkdir()
    import_hf.write_run(tmp_path / "run", tmp_path / "run", tmp_path, spec, params, CHARACTERS)
    assert run(export_hf, tmp_path / "run", tmp_path / "out") == 2
    assert "model.activation = 'relu_squared'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_imported_run_is_not_trained_on_by_mistake(golden, tmp_path):
    assert run(import_hf, golden[0], tmp_path / "run") == 0
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    with pytest.raises(LLMError):
        train(write_config(tmp_path))
    after = {path.name for path in (tmp_path / "run").iterdir()} - {"run.lock"}
    assert sorted(after) == before


def test_a_model_that_is_not_finite_makes_no_run(tmp_path, capsys):
    write_golden(GOLDENS[0], tmp_path / "theirs")
    path = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(path)
    tensors["transformer.ln_f.weight"][0] = np.nan
    safetensors.numpy.save_file(tensors, path)
    CHARACTERS.save(tmp_path / "theirs" / "tokenizer")
    assert run(import_hf, tmp_path / "theirs", tmp_path / "mine") == 4
    assert "log-probabilities are not finite" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
