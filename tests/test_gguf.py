"""export-gguf: the file as gguf's own reader and, where it is installed, llama.cpp open it."""

import json
import resource
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_export import CHINESE, ENGLISH, LENGTH, ODD, as_run, made

import llm
from llm.commands import export_gguf, export_hf, run_command
from llm.text.bpe import PATTERN
from llm.text.tokenizer import BytePairTokenizer, ByteTokenizer

gguf = pytest.importorskip("gguf")

GPT2 = {"activation": "gelu_tanh", "d_model": 64}
LLAMA = {
    "positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False,
    "tie_embeddings": False, "n_head": 2, "n_kv_head": 1, "d_model": 64, "n_layer": 2,
}  # fmt: skip
MODELS = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "qwen3": {**LLAMA, "qk_norm": True, "head_size": 16},
    "olmo2": {**LLAMA, "qk_norm": True, "qk_norm_joint": True, "norm_place": "after"},
    "starcoder2": {**LLAMA, "bias": True, "norm": "layernorm", "activation": "gelu_tanh"},
}


def run(*arguments, command=export_gguf):
    return run_command(command.main, [*map(str, arguments)])


def keys_of(reader):
    return {name: field.contents() for name, field in reader.fields.items()}


def arrays_of(reader):
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}


@pytest.mark.parametrize("family", MODELS)
def test_the_reader_finds_the_weights_that_transformers_gets(family, tmp_path):
    source = as_run(ByteTokenizer(), tmp_path / "run", **MODELS[family])
    assert run(source, tmp_path / "m.gguf") == 0
    assert run(source, tmp_path / "hf", command=export_hf) == 0
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    keys = keys_of(reader)
    assert keys["general.architecture"] == family
    known = gguf.get_tensor_name_map(
        next(x for x, name in gguf.MODEL_ARCH_NAMES.items() if name == family), 2
    )
    found, theirs = arrays_of(reader), load_file(tmp_path / "hf" / "model.safetensors")
    assert len(found) == len(theirs)
    for name, array in theirs.items():
        is_conv = family == "gpt2" and array.ndim > 1 and ".h." in name
        ours = found[known.get_name(name, (".weight", ".bias"))]
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            array, ours = np.sort(array, 0), np.sort(ours, 0)  # the next test has their order
        np.testing.assert_array_equal(ours, array.T if is_conv else array, err_msg=name)


def test_a_llamas_pairs_that_are_neighbours_give_the_scores_of_halves(tmp_path):
    """q(m) . k(n) turned: halves of a head with transformers' rows, pairs with the file's."""
    source = as_run(ByteTokenizer(), tmp_path / "run", **LLAMA)
    assert run(source, tmp_path / "m.gguf") == 0
    assert run(source, tmp_path / "hf", command=export_hf) == 0
    theirs = load_file(tmp_path / "hf" / "model.safetensors")
    ours = arrays_of(gguf.GGUFReader(tmp_path / "m.gguf"))
    x = np.random.default_rng(0).normal(size=64)
    angles = 10000.0 ** (-np.arange(16) / 16)

    def turned(head, position, halves):
        pairs = head.reshape(2, 16) if halves else head.reshape(16, 2).T
        return (pairs[0] + 1j * pairs[1]) * np.exp(1j * position * angles)

    for halves, query, key in (
        (True, *(theirs[f"model.layers.1.self_attn.{n}_proj.weight"] for n in "qk")),
        (False, *(ours[f"blk.1.attn_{n}.weight"] for n in "qk")),
    ):
        q, k = turned((query @ x)[32:], 5, halves), turned(key @ x, 2, halves)
        score = (q * k.conj()).real.sum()
        expected = score if halves else expected  # noqa: F821
        np.testing.assert_allclose(score, expected, rtol=1e-9)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_matrices_are_narrowed_and_vectors_are_not(dtype, tmp_path):
    import ml_dtypes

    source = as_run(ByteTokenizer(), tmp_path / "run", **GPT2)
    for name in ("float32", dtype):
        assert run(source, tmp_path / name, "--dtype", name) == 0
    exact, narrow = (arrays_of(gguf.GGUFReader(tmp_path / n)) for n in ("float32", dtype))
    kind = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    for name, array in exact.items():
        expected = array.astype(kind).astype(np.float32) if array.ndim > 1 else array
        np.testing.assert_array_equal(narrow[name], expected, err_msg=name)


def test_the_tokenizer_says_its_words_its_ends_and_its_unused_ids(tmp_path):
    bpe = made("bpe")
    ranks = {data: id_ for id_, data in enumerate(bpe.token_table) if data}
    larger = BytePairTokenizer("bpe", PATTERN, ranks, bpe.special_tokens, bpe.vocab_size + 3)
    source = as_run(larger, tmp_path / "run", **GPT2)
    assert run(source, tmp_path / "m.gguf") == 0
    keys = keys_of(gguf.GGUFReader(tmp_path / "m.gguf"))
    tokens = keys["tokenizer.ggml.tokens"]
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", "bailingmoe")
    assert len(tokens) == len({*tokens}) == larger.vocab_size
    assert tokens[bpe.end_of_text] == "<|endoftext|>"
    kinds = keys["tokenizer.ggml.token_type"]
    assert kinds[bpe.end_of_text :] == [3, 5, 5, 5] and {*kinds[: bpe.end_of_text]} == {1}
    assert keys["tokenizer.ggml.eos_token_id"] == keys["tokenizer.ggml.bos_token_id"] == 799
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert all(
        left + right in tokens for left, right in map(str.split, keys["tokenizer.ggml.merges"])
    )


def test_a_vocabulary_with_tokens_of_two_digits_says_what_differs(tmp_path, capsys):
    old = BytePairTokenizer(
        "bpe", PATTERN.replace(r"\p{N}", r"\p{N}{1,2}"), {bytes([b]): b for b in range(256)}, {}
    )
    assert run(as_run(old, tmp_path / "run", **GPT2), tmp_path / "m.gguf") == 0
    assert "cuts numbers into single digits" in capsys.readouterr().err


def test_what_cannot_be_written_is_one_message_and_no_file(tmp_path, capsys, monkeypatch):
    def refused(source, *flags, file="m.gguf"):
        before = sorted(tmp_path.iterdir())
        assert run(source, tmp_path / file, *flags) == 2
        assert sorted(tmp_path.iterdir()) == before
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "Traceback" not in said
        return said

    source = as_run(ByteTokenizer(), tmp_path / "gpt2", **GPT2)
    characters = as_run(made("characters"), tmp_path / "characters", **GPT2)
    assert "no tokenizer like 'characters'" in refused(characters)
    exact = as_run(ByteTokenizer(), tmp_path / "gelu", activation="gelu")
    assert "no model.activation = 'gelu'; expected 'gelu_tanh'" in refused(exact)
    capped = as_run(ByteTokenizer(), tmp_path / "capped", **{**LLAMA, "logit_soft_cap": 30.0})
    assert "model.logit_soft_cap = 30.0" in refused(capped)
    windowed = as_run(ByteTokenizer(), tmp_path / "windowed", **{**LLAMA, "window": 4})
    assert "is a mistral, which export-gguf does not write" in refused(windowed)
    large = {"embed.weight": np.full((257, 64), 1e5, np.float32)}
    over = as_run(ByteTokenizer(), tmp_path / "over", large, **GPT2)
    assert "which float16 cannot hold" in refused(over, "--dtype", "float16")
    assert "--dtype int8: expected 'float32'" in refused(source, "--dtype", "int8")
    assert "cannot be written" in refused(source, file="no/such/m.gguf")
    (tmp_path / "taken.gguf").write_text("mine")
    assert "exists already" in refused(source, file="taken.gguf")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        assert "no room (File too large" in refused(source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'glassbox-gpt[gguf]'" in refused(source)


@pytest.mark.parametrize("family", MODELS)
def test_llama_cpp_gives_our_ids_and_probabilities(family, tmp_path, capsys):
    llama_cpp = pytest.importorskip("llama_cpp")
    tokenizer = made("bpe")
    source = as_run(tokenizer, tmp_path / "run", **MODELS[family])
    capsys.readouterr()
    assert run(source, tmp_path / "m.gguf", "--json") == 0
    assert json.loads(capsys.readouterr().out)["architecture"] == family
    exact = {"type_k": 0, "type_v": 0, "flash_attn": False}  # a cache in float32, not in half
    path = str(tmp_path / "m.gguf")
    theirs = llama_cpp.Llama(path, n_ctx=LENGTH, logits_all=True, verbose=False, **exact)
    for text in (ENGLISH[:3000], CHINESE, ODD.replace("\0", "")):
        ids = theirs.tokenize(text.encode(), add_bos=False, special=False)
        assert ids == tokenizer.encode(text).tolist()
    ids = tokenizer.encode("the model reads a text")[:30].tolist()
    theirs.eval(ids)
    logits = np.array(theirs.scores[: len(ids) - 1], np.float64)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    # llama.cpp looks its GELU up in a table of half precision.
    bound = 1e-2 if family in ("gpt2", "starcoder2") else 1e-4
    ours = llm.load(tmp_path / "run").distribution(tokenizer.decode(ids))
    np.testing.assert_allclose(logits, ours, atol=bound)
