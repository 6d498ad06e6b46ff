"""export-gguf: the file as gguf's own reader and, where it is installed, llama.cpp open it."""

import contextlib
import json
import math
import re
import resource
import sys

import numpy as np
import pytest
from runs import ROOT
from safetensors.numpy import load_file
from test_export import CHINESE, ENGLISH, LENGTH, ODD, as_run, drawn, made, with_template

import llm
from llm.commands import export_gguf, run_command
from llm.config import load_config
from llm.errors import UsageError
from llm.interop.description import describe
from llm.interop.gguf import architecture_of, to_gguf
from llm.interop.gguf_tokenizer import vocabulary
from llm.interop.hf import to_hf
from llm.model.gpt import ModelSpec
from llm.model_config import ModelConfig
from llm.text.bpe import PATTERN
from llm.text.imported import ImportedTokenizer
from llm.text.tokenizer import (
    BytePairTokenizer,
    ByteTokenizer,
    CharacterTokenizer,
    byte_of_symbol,
)
from llm.text.tokenizer_folder import open_tokenizer

gguf = pytest.importorskip("gguf")

GPT2 = {"activation": "gelu_tanh", "d_model": 64}
LLAMA = {
    "positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False,
    "tie_embeddings": False, "n_head": 2, "n_kv_head": 1, "d_model": 64, "n_layer": 2,
}  # fmt: skip
QWEN3 = {**LLAMA, "qk_norm": True, "head_size": 16}
MIXTURE = {"n_expert": 4, "n_expert_active": 2}
JOINT = {"qk_norm": True, "qk_norm_joint": True}
NEOX = {
    **LLAMA, "norm": "layernorm", "bias": True, "activation": "gelu_tanh", "n_kv_head": 2,
    "block": "parallel", "rotary_fraction": 0.25,
}  # fmt: skip
GEMMA = {**LLAMA, "activation": "geglu", "tie_embeddings": True, "head_size": 16}
WINDOW = {**GEMMA, "norm_place": "both", "window": 8, "global_every": 2}
CAPS = {"logit_soft_cap": 30.0, "attention_soft_cap": 50.0}
# A name -> llama.cpp's name of the family, and the model.
MODELS = {
    "gpt2": ("gpt2", GPT2),
    "gpt_bigcode": ("starcoder", {**GPT2, "n_kv_head": 1}),
    "llama": ("llama", LLAMA),
    "llama3": (
        "llama",
        {**LLAMA, "rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_length": 64},
    ),
    "mixtral": ("llama", {**LLAMA, **MIXTURE}),
    "qwen2": ("llama", {**LLAMA, "bias": True}),  # it is a Llama with biases
    "qwen3": ("qwen3", QWEN3),
    "yarn": (
        "qwen3",
        {**QWEN3, "rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_length": 16},
    ),
    "qwen3_moe": ("qwen3moe", {**QWEN3, **MIXTURE}),
    "olmoe": (
        "olmoe",
        {**LLAMA, **MIXTURE, **JOINT, "normalize_gates": False, "n_kv_head": 2},
    ),
    "olmo": ("olmo", {**LLAMA, "norm": "layernorm"}),
    "olmo2": ("olmo2", {**LLAMA, **JOINT, "norm_place": "after"}),
    "smollm3": ("smollm3", {**LLAMA, "n_layer": 5, "unrotated_every": 4}),
    "starcoder2": (
        "starcoder2",
        {**LLAMA, "bias": True, "norm": "layernorm", "activation": "gelu_tanh"},
    ),
    "gpt_neox": ("gptneox", NEOX),
    "phi": (
        "phi2",
        {**NEOX, "n_kv_head": 1, "block": "parallel_one_norm", "head_bias": True},
    ),
    "gemma": ("gemma", GEMMA),
    "gemma2": ("gemma2", {**WINDOW, **CAPS}),
    "gemma3_text": (
        "gemma3",
        {**WINDOW, "qk_norm": True, "rope_theta": 1e5, "window_rope_theta": 500.0},
    ),
}  # fmt: skip


# The parameters that a family has not.
NEUTRAL = {"olmo": r"\.scale$", "qwen2": r"(out|up|gate|down|norm)\.bias$"}


def weights_of(name):
    """Of a model; what its family has not is neutral: gains of one, biases of zero."""
    return {
        key: np.full_like(array, key.endswith("scale"))
        if re.search(NEUTRAL.get(name, "^$"), key)
        else array
        for key, array in drawn(spec_of(name)).items()
    }


def spec_of(name):
    shape = {"n_layer": 1, "n_head": 2, "context_length": LENGTH, "vocab_multiple": 1}
    return ModelSpec(ModelConfig(**{**shape, **MODELS[name][1]}).resolved(), 257)


def written(name, folder):
    """(reader of the file, the weights that transformers gets)"""
    spec, params = spec_of(name), weights_of(name)
    architecture = to_gguf(spec.config, params, ByteTokenizer(), folder / "m.gguf", name)
    assert architecture == MODELS[name][0]
    to_hf(spec.config, spec.vocab_size, params, folder / "hf")
    return gguf.GGUFReader(folder / "m.gguf"), load_file(folder / "hf" / "model.safetensors")


def run(*arguments):
    return run_command(export_gguf.main, [*map(str, arguments)])


def keys_of(reader):
    return {name: field.contents() for name, field in reader.fields.items()}


def arrays_of(reader):
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}


@pytest.mark.parametrize("name", MODELS)
def test_the_reader_finds_the_weights_that_transformers_gets(name, tmp_path):
    family, (reader, theirs) = MODELS[name][0], written(name, tmp_path)
    known = gguf.get_tensor_name_map(
        next(x for x, named in gguf.MODEL_ARCH_NAMES.items() if named == family), 5
    )
    found = arrays_of(reader)
    found.pop("rope_freqs.weight", None)  # of its own test
    seen = set()
    for full, array in theirs.items():
        head, is_expert, module = re.match(r"(.*?)(\.experts)\.(\d+\..*)|.*", full).groups()
        n, _, part = (module or "").partition(".")
        whole = f"{head}.experts.{part}" if is_expert else full
        mixtral = whole.replace("model.", "").replace("block_sparse_moe", "feed_forward")
        kinds = (".weight", ".bias")
        place = known.get_name(whole, kinds) or known.get_name(mixtral, kinds)
        ours = found[place][int(n)] if is_expert else found[place]
        seen.add(place)
        if family == "gpt2" and array.ndim > 1 and ".h." in full:
            array = array.T
        if family in ("llama", "olmo", "smollm3") and ("q_proj" in full or "k_proj" in full):
            array, ours = np.sort(array, 0), np.sort(ours, 0)  # the next test has their order
        if family.startswith("gemma") and "norm" in full:
            array = array + 1
        if "query_key_value" in full:  # head by head there; two heads of 32
            rows = [slice(64 * part + 32 * head, 64 * part + 32 * head + 32)
                    for head in range(2) for part in range(3)]  # fmt: skip
            ours = np.concatenate([ours[span] for span in rows])
        np.testing.assert_array_equal(ours, array, err_msg=full)
    assert seen == {*found}


def test_the_keys_say_what_the_model_has(tmp_path):
    def keys(name):
        folder = tmp_path / name
        folder.mkdir()
        held = keys_of(written(name, folder)[0])
        return {key.partition(".")[2]: value for key, value in held.items()}

    assert keys("gemma3_text").items() >= {
        "attention.sliding_window": 8, "attention.sliding_window_pattern": 2,
        "rope.freq_base": 1e5, "rope.freq_base_swa": 500.0, "attention.key_length": 16,
    }.items()  # fmt: skip
    assert keys("gemma2").items() >= {
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "rope.freq_base_swa": 10000.0,
    }.items()  # fmt: skip
    assert keys("qwen3_moe").items() >= {"expert_count": 4, "expert_used_count": 2}.items()
    assert keys("phi")["rope.dimension_count"] == 8 and keys("gpt_neox")["use_parallel_residual"]
    yarn = keys("yarn")
    assert (yarn["rope.scaling.type"], yarn["rope.scaling.factor"]) == ("yarn", 4.0)
    # llama.cpp multiplies queries and keys by 0.1 ln 4 + 1 unless it is told the inverse.
    assert math.isclose(yarn["rope.scaling.attn_factor"] * (0.1 * math.log(4) + 1), 1, abs_tol=1e-6)


def test_llama3_divides_each_frequency_by_what_its_paper_says(tmp_path):
    factors = arrays_of(written("llama3", tmp_path)[0])["rope_freqs.weight"]
    usual = 10000.0 ** (-np.arange(16) / 16)
    turns = 64 * usual / (2 * np.pi)  # in the text that the model was first trained with
    kept = np.clip((turns - 1) / 3, 0, 1)
    np.testing.assert_allclose(factors, 1 / (kept + (1 - kept) / 8), rtol=1e-5)
    assert factors.max() == 8 and factors.min() == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({**QWEN3, "window": 4}, "qwen3 has no model.window = 4; expected 0"),
        ({**QWEN3, "rope_scaling": "llama3"}, "qwen3 has no model.rope_scaling = 'llama3'"),
        ({**LLAMA, "window": 4}, "llama has no model.window = 4"),
        ({**MODELS["olmo2"][1], "tie_embeddings": True}, "olmo2 has no model.tie_embeddings"),
        ({**MODELS["olmo2"][1], "head_size": 16}, "olmo2 has no model.head_size = 16; expected 32"),
        ({**MODELS["olmoe"][1], "n_kv_head": 1}, "olmoe has no model.n_kv_head = 1; expected 2"),
        ({**MODELS["smollm3"][1], "unrotated_every": 3}, "model.unrotated_every = 3; expected 4"),
        ({**GEMMA, "tie_embeddings": False}, "gemma has no model.tie_embeddings = False"),
        ({**GEMMA, "bias": True}, "gemma has no model.bias = True"),
        (WINDOW, "gemma2 has no model.logit_soft_cap = 0.0; expected 'a number above 0'"),
        (
            {**WINDOW, **CAPS, "qk_norm": True, "window_rope_theta": 500.0},
            "gemma3 has no model.attention_soft_cap = 50.0",
        ),
        ({**GPT2, "activation": "relu"}, "is a opt, which export-gguf does not write"),
    ],
)  # fmt: skip
def test_a_setting_that_llama_cpp_has_not_is_refused_by_its_name(changes, reason, monkeypatch):
    monkeypatch.setitem(MODELS, "this", ("", changes))
    spec = spec_of("this")
    params = {key: value for key, value in drawn(spec).items() if "norm.bias" not in key}
    if changes.get("bias") and changes["norm"] == "rmsnorm":  # biases of its own
        params = {
            key: value for key, value in params.items() if ".mlp." not in key or "weight" in key
        }
    with pytest.raises(UsageError, match=re.escape(reason)):
        to_gguf(spec.config, params, ByteTokenizer(), "nowhere", "this")


def test_a_llamas_pairs_that_are_neighbours_give_the_scores_of_halves(tmp_path):
    """q(m) . k(n) turned: halves of a head with transformers' rows, pairs with the file's."""
    reader, theirs = written("llama", tmp_path)
    ours = arrays_of(reader)
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


def test_matrices_are_narrowed_and_vectors_are_not(tmp_path):
    import ml_dtypes

    spec, params = spec_of("gpt2"), weights_of("gpt2")
    kinds = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
    found = {}
    for dtype in kinds:
        to_gguf(spec.config, params, ByteTokenizer(), tmp_path / dtype, "gpt2", dtype)
        found[dtype] = arrays_of(gguf.GGUFReader(tmp_path / dtype))
    for dtype, kind in kinds.items():
        for name, array in found["float32"].items():
            expected = array.astype(kind).astype(np.float32) if array.ndim > 1 else array
            np.testing.assert_array_equal(found[dtype][name], expected, err_msg=name)


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


GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS = {"type": "Digits", "individual_digits": True}
GPT2_WORDS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def byte_level(*parts, **changes):
    """An imported tokenizer whose vocabulary is bytes and one pair, with tokens of a chat."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    described = {
        "version": "1.0", "normalizer": None, "post_processor": None, "decoder": None,
        "added_tokens": [
            {"id": 257, "content": "<end>", "special": True, **flags},
            {"id": 258, "content": "<think>", "special": False, **flags},
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": part}, "behavior": "Isolated", "invert": False}
            if isinstance(part, str) else part for part in parts]},
        "model": {"type": "BPE", "vocab": {**byte_of_symbol(), "ab": 256}, "merges": [["a", "b"]],
                  **changes.pop("model", {})},
        **changes,
    }  # fmt: skip
    return ImportedTokenizer("theirs", json.dumps(described), 260, None, (257,))


RAW = {**GPT2_WORDS, "use_regex": False}


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        (byte_level(GPT2_WORDS), "gpt-2"),
        (byte_level(DIGITS, GPT2_WORDS), "starcoder"),
        (byte_level(GPT4, RAW), "dbrx"),
        (byte_level(GPT4, RAW, model={"ignore_merges": True}), "llama-bpe"),
        (byte_level(GPT4.replace("{1,3}", ""), RAW, normalizer={"type": "NFC"}), "qwen2"),
        (byte_level(PATTERN, RAW), "bailingmoe"),
        (byte_level(GPT4.replace("{1,3}", "{1,2}"), RAW), "none of its pre-tokenizers cuts words"),
        (byte_level(GPT2_WORDS, model={"ignore_merges": True}), "with ignore_merges = true"),
        (byte_level({"type": "Punctuation", "behavior": "Isolated"}, RAW), "pre_tokenizer = "),
        (with_template(1, (2, 3)), "its merges are not those of a sentencepiece model"),
        (CharacterTokenizer("ab"), "imported ones"),
    ],
)
def test_an_imported_tokenizers_words_have_their_name_there(tokenizer, words, capsys):
    if " " in words:
        with pytest.raises(UsageError, match=words):
            vocabulary(tokenizer)
        return
    keys = vocabulary(tokenizer)
    assert (keys["ggml.model"], keys["ggml.pre"], keys["ggml.merges"]) == ("gpt2", words, ["a b"])
    assert keys["ggml.tokens"][256:] == ["ab", "<end>", "<think>", "[UNUSED259]"]
    # Normal, control, user-defined and unused, as llama.h numbers them.
    assert keys["ggml.token_type"][256:] == [1, 3, 4, 5]
    assert ("does not normalise" in capsys.readouterr().err) == (words == "qwen2")


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_model_has_its_scores_and_its_kinds_of_tokens(prefix, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text(ENGLISH[:20000])
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"), vocab_size=500,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=prefix, minloglevel=2,
    )  # fmt: skip
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    keys = vocabulary(open_tokenizer(tmp_path / "m.model"))
    assert keys["ggml.model"] == "llama" and keys["ggml.add_space_prefix"] is prefix
    assert keys["ggml.tokens"] == [theirs.id_to_piece(i) for i in range(500)]
    kinds = [2 if theirs.is_unknown(i) else 3 if theirs.is_control(i) else
             6 if theirs.is_byte(i) else 1 for i in range(500)]  # fmt: skip
    assert keys["ggml.token_type"] == kinds and keys["ggml.unknown_token_id"] == 0
    # llama.cpp joins by score alone, so that its order is all that counts.
    made = [i for i in range(500) if kinds[i] == 1 and len(theirs.id_to_piece(i)) > 1]
    order = sorted(made, key=lambda i: -keys["ggml.scores"][i])
    assert order == sorted(made, key=lambda i: -theirs.get_score(i))


def test_a_chat_template_and_every_end_of_text_are_in_the_file(tmp_path):
    tokenizer = ImportedTokenizer(
        "x", byte_level(GPT2_WORDS).definition()["file"], 260, 1, (257, 5)
    )
    tokenizer.settings = {"chat_template": {"default": "{{ messages }}", "tools": "{{ tools }}"}}
    keys = vocabulary(tokenizer)
    assert keys["chat_template"] == "{{ messages }}"
    assert (keys["ggml.eos_token_id"], keys["ggml.eot_token_id"]) == (257, 5)
    assert keys["ggml.bos_token_id"] == 1 and keys["ggml.add_bos_token"] is True


def test_a_vocabulary_with_tokens_of_two_digits_says_what_differs(tmp_path, capsys):
    old = BytePairTokenizer(
        "bpe", PATTERN.replace(r"\p{N}", r"\p{N}{1,2}"), {bytes([b]): b for b in range(256)}, {}
    )
    assert run(as_run(old, tmp_path / "run", **GPT2), tmp_path / "m.gguf") == 0
    assert "cuts numbers into single digits" in capsys.readouterr().err


def test_the_configurations_that_docs_name_are_written():
    """Whether a family is there, by the settings alone."""
    found = set()
    for path in (ROOT / "configs").glob("*.toml"):
        config = load_config(path)
        model = config.model.resolved()
        with contextlib.suppress(UsageError):
            model_type, described = describe(model, lambda family, described: "")
            architecture_of(model, {"model_type": model_type, **described})
            found |= {path.stem} if config.tokenizer.kind != "characters" else set()
    assert found == {
        "gpt2_124m", "gpt2_350m", "gpt2_774m", "gpt2_1558m", "llama3_8b", "moe_8x124m", "quickstart"
    }  # fmt: skip


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
    large = {"embed.weight": np.full((257, 64), 1e5, np.float32)}
    over = as_run(ByteTokenizer(), tmp_path / "over", large, **GPT2)
    assert "which float16 cannot hold" in refused(over, "--dtype", "float16")
    assert "--dtype int8: expected 'float32'" in refused(source, "--dtype", "int8")
    assert "cannot be written" in refused(source, file="no/such/m.gguf")
    assert "File name too long" in refused(source, file="x" * 300)
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


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_gives_our_ids_and_probabilities(name, tmp_path, capsys):
    llama_cpp = pytest.importorskip("llama_cpp")
    tokenizer, (family, changes) = made("bpe"), MODELS[name]
    neutral = {key: value for key, value in weights_of(name).items() if value.ndim == 1}
    source = as_run(tokenizer, tmp_path / "run", neutral, **changes)
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
    bound = 1e-2 if changes["activation"] in ("gelu_tanh", "geglu") else 1e-4
    ours = llm.load(tmp_path / "run").distribution(tokenizer.decode(ids))
    np.testing.assert_allclose(logits, ours, atol=bound)
