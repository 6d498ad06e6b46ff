"""Weights of nanoGPT and llama2.c: log-probabilities are those of transformers' GPT-2 and Llama.

The files are written here, by the layout of train.py and export.py, from models of transformers.
"""

import pickle
import string
import struct

import numpy as np
import pytest
from folders import from_hf
from test_families import OLD, SIZES, VOCAB, log_probabilities, save_theirs
from test_hf import torch_and_transformers

from llm.commands import import_hf, run_command
from llm.errors import CheckpointError, UsageError
from llm.interop.foreign import as_folder, nanogpt_characters
from llm.run.open import open_model


def state_of(folder):
    _, transformers = torch_and_transformers()
    return transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()


def write_nanogpt(path, folder, with_biases=True):
    torch, _ = torch_and_transformers()
    state = {
        f"_orig_mod.{name}": x.T.contiguous()
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        else x
        for name, x in state_of(folder).items()
        if with_biases or not name.endswith(".bias")
    }
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 16, "block_size": 24, "vocab_size": VOCAB}
    settings = {**sizes, "bias": with_biases, "dropout": 0.2}
    torch.save({"model": state, "model_args": settings, "iter_num": 3, "config": {}}, path)


def write_llama2c(path, folder, version, vocab=VOCAB):
    state = {name: x.numpy() for name, x in state_of(folder).items()}

    def pairs(x):
        """The halves of each head of size 4 side by side."""
        return x.reshape(-1, 2, 2, 16).swapaxes(1, 2).reshape(x.shape)

    def layers(name):
        arrays = [state[f"model.layers.{i}.{name}.weight"] for i in range(2)]
        return list(map(pairs, arrays)) if name[-6:] in ("q_proj", "k_proj") else arrays

    attention = [f"self_attn.{x}_proj" for x in "qkvo"]
    mlp = [f"mlp.{x}_proj" for x in ("gate", "down", "up")]
    embedding, norm = [state["model.embed_tokens.weight"]], [state["model.norm.weight"]]
    head = [state["lm_head.weight"]]
    first, second = layers("input_layernorm"), layers("post_attention_layernorm")
    sizes = (16, 24, 2, 4, 2)
    if version:
        arrays = [*first, *second, *norm, *embedding]
        arrays += [x for name in attention + mlp for x in layers(name)] + head
        header = struct.pack("<Ii7iB", 0x616B3432, version, *sizes, vocab, 24, 0).ljust(256, b"\0")
    else:
        arrays = [*embedding, *first, *(x for name in attention for x in layers(name)), *second]
        arrays += [x for name in mlp for x in layers(name)]
        arrays += [*norm, np.zeros((24, 4)), *head]
        header = struct.pack("<7i", *sizes, -vocab, 24)
    path.write_bytes(header + b"".join(np.asarray(x, "<f4").tobytes() for x in arrays))


def check(path, tokens, expected):
    with as_folder(path) as folder:
        config, vocab_size, params = from_hf(folder)
    for ours in log_probabilities(config, vocab_size, params, tokens):
        np.testing.assert_allclose(ours, expected, atol=1e-4)


@pytest.mark.parametrize("version", [0, 1])
def test_a_file_of_llama2c_gives_the_log_probabilities_of_transformers(tmp_path, version):
    settings = {**SIZES, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    tokens, expected = save_theirs(tmp_path / "hf", "llama", settings)
    write_llama2c(tmp_path / "model.bin", tmp_path / "hf", version)
    check(tmp_path / "model.bin", tokens, expected)


def test_a_checkpoint_of_nanogpt_gives_the_log_probabilities_of_transformers(tmp_path):
    settings = {**OLD, "n_inner": None, "activation_function": "gelu"}
    tokens, expected = save_theirs(tmp_path / "hf", "gpt2", settings)
    write_nanogpt(tmp_path / "ckpt.pt", tmp_path / "hf")
    check(tmp_path / "ckpt.pt", tokens, expected)


def test_a_checkpoint_of_nanogpt_without_biases_has_zeros(tmp_path):
    settings = {**OLD, "n_inner": None, "activation_function": "gelu"}
    save_theirs(tmp_path / "hf", "gpt2", settings)
    write_nanogpt(tmp_path / "ckpt.pt", tmp_path / "hf", with_biases=False)
    with as_folder(tmp_path / "ckpt.pt") as folder:
        params = from_hf(folder)[2]
    assert all((x == 0).all() for name, x in params.items() if name.endswith(".bias"))


class Executed:
    def __reduce__(self):
        return print, ("EXECUTED",)


def test_a_pickle_is_not_executed(tmp_path, capsys):
    torch, _ = torch_and_transformers()
    torch.save({"model": Executed(), "model_args": {}}, tmp_path / "ckpt.pt")
    run = [str(tmp_path / "ckpt.pt"), str(tmp_path / "run"), "--tokenizer", "bytes"]
    assert run_command(import_hf.main, run) == CheckpointError.exit_code
    said = capsys.readouterr()
    assert "without executing it" in said.err and "EXECUTED" not in said.out


def test_a_checkpoint_of_nanochat_is_refused_by_name(tmp_path, capsys):
    """Its model_000650.pt holds the weights alone, compiled or not."""
    torch, _ = torch_and_transformers()
    for prefix in ("", "_orig_mod."):
        weights = {f"{prefix}transformer.h.0.attn.c_q.weight": torch.zeros(4, 4)}
        torch.save(weights, tmp_path / "model_000650.pt")
        run = [str(tmp_path / "model_000650.pt"), str(tmp_path / "run"), "--tokenizer", "bytes"]
        assert run_command(import_hf.main, run) == UsageError.exit_code
        assert "a checkpoint of nanochat, which import-hf does not read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is no model that import-hf reads"),
        (b"hello, I am no model " * 99, "is no model that import-hf reads"),
        (struct.pack("<7i", 16, 24, 2**31 - 1, 4, 2, 61, 24) + bytes(999), "is no model"),
        (struct.pack("<7i", 16, 24, 2, 4, 2, 61, 24) + bytes(9999), "has 10027 bytes, and its"),
        (struct.pack("<Ii", 0x616B3432, 2) + bytes(999), "of version 2, which is quantised"),
    ],
)
def test_a_file_that_is_no_such_model_is_refused(tmp_path, content, said):
    (tmp_path / "model.bin").write_bytes(content)
    error = pytest.raises((UsageError, CheckpointError), match=said)
    with error, as_folder(tmp_path / "model.bin"):
        pass


CHARACTERS = sorted(string.printable)


def meta_of(characters):
    """What data/shakespeare_char/prepare.py pickles."""
    itos = dict(enumerate(characters))
    return {"vocab_size": len(itos), "itos": itos, "stoi": {c: n for n, c in itos.items()}}


def test_the_characters_of_a_checkpoint_of_nanogpt_are_its_tokens(tmp_path, capsys):
    settings = {**OLD, "n_inner": None, "activation_function": "gelu"}
    save_theirs(tmp_path / "hf", "gpt2", settings)
    path = tmp_path / "ckpt.pt"
    write_nanogpt(path, tmp_path / "hf")
    assert run_command(import_hf.main, [str(path), str(tmp_path / "a")]) == UsageError.exit_code
    assert "--tokenizer data/DATASET/meta.pkl" in capsys.readouterr().err
    (tmp_path / "data").mkdir()
    named = tmp_path / "data" / "meta.pkl"
    named.write_bytes(pickle.dumps(meta_of(CHARACTERS[:VOCAB])))
    run = [str(path), str(tmp_path / "a"), "--tokenizer", str(named)]
    assert run_command(import_hf.main, run) == 0
    named.rename(tmp_path / "meta.pkl")  # beside the checkpoint it need not be named
    assert run_command(import_hf.main, [str(path), str(tmp_path / "b")]) == 0
    for made in "ab":
        tokenizer = open_model(tmp_path / made).tokenizer
        assert tokenizer.decode(range(VOCAB)) == "".join(CHARACTERS[:VOCAB])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_vocabulary_of_many_characters_is_read(tmp_path, protocol):
    characters = [chr(0x4E00 + n) for n in range(3000)]
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta_of(characters), protocol))
    assert nanogpt_characters(tmp_path / "meta.pkl").characters == "".join(characters)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (pickle.dumps(Executed()), "STACK_GLOBAL, which is not run"),
        (pickle.dumps({"itos": Executed()}, 2), "GLOBAL, which is not run"),
        (b"\x80\x02}r\xff\xff\xff\x7f.", "LONG_BINPUT, which is not run"),
        (pickle.dumps(meta_of("ba")), "not in the order of code points"),
        (pickle.dumps(meta_of(["ab", "c"])), "not in the order of code points"),
        (pickle.dumps({"vocab_size": 3}), "KeyError: 'itos'"),
        (pickle.dumps(3), "found TypeError"),
        (pickle.dumps(meta_of("abc"))[:-9], "is no vocabulary of nanoGPT"),
        (b"", "is no vocabulary of nanoGPT"),
    ],
)
def test_what_is_no_vocabulary_of_nanogpt_is_refused_and_not_executed(
    tmp_path, content, said, capsys
):
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(UsageError, match=said):
        nanogpt_characters(tmp_path / "meta.pkl")
    assert "EXECUTED" not in capsys.readouterr().out
