"""export-hf: transformers opens the folder without a network, and its ids, log-probabilities and
greedy text are ours."""

import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import ROOT
from safetensors.numpy import load_file
from test_hf import torch_and_transformers

import llm
from llm.commands import export_hf, import_hf, run_command
from llm.errors import UsageError
from llm.interop import tensors
from llm.interop.export_tokenizer import write_tokenizer
from llm.model.gpt import ModelSpec, abstract_params
from llm.model_config import ModelConfig
from llm.run.open import open_model
from llm.text.bpe import train_bpe
from llm.text.imported import ImportedTokenizer
from llm.text.tokenizer import (
    BytePairTokenizer,
    ByteTokenizer,
    CharacterTokenizer,
    tiktoken_tokenizer,
)
from llm.text.tokenizer_folder import open_tokenizer

ENGLISH = (ROOT / "README.md").read_text() + (ROOT / "llm" / "files.py").read_text()
CHINESE = "道可道，非常道。名可名，非常名。無名天地之始；有名萬物之母。故常無，欲以觀其妙。"
ODD = "a\r\n\r\n b\t \n\x00\x1f 1234567½Ⅷ٣ 👩‍🔬👨‍👩‍👧 é ǅʰ ſ I'LL we'ſ   \u3000\u00a0 \u2028x \n"
LENGTH = 32


def with_template(begin, ends):
    """A tokenizer of the library with byte fallback, <s> before a text and two ends."""
    alphabet = [f"<0x{b:02X}>" for b in range(256)]
    pieces = ["<unk>", "<s>", "</s>", "<end>", *alphabet, "▁", *"abcdefgh", "▁a", "ab", "▁ab"]
    special = ("<unk>", "<s>", "</s>", "<end>")
    added = [
        {"id": i, "content": name, "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
        for i, name in enumerate(special)
    ]  # fmt: skip
    post = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    described = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": None, "post_processor": post,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True,
                  "vocab": {piece: i for i, piece in enumerate(pieces)},
                  "merges": [["▁", "a"], ["a", "b"], ["▁", "ab"]]},
    }  # fmt: skip
    return ImportedTokenizer("imported", json.dumps(described), 0, begin, ends)


def made(kind):
    makers = {
        "bytes": ByteTokenizer,
        "characters": lambda: CharacterTokenizer(ENGLISH + CHINESE + ODD),
        "bpe": lambda: train_bpe([ENGLISH, CHINESE * 20, ODD * 5], 800),
        "imported": lambda: with_template(1, (2, 3)),
    }
    return makers[kind]()


@pytest.fixture(params=("bpe", "imported", "bytes", "characters", "gpt2"))
def tokenizer(request, monkeypatch):
    if request.param != "gpt2":
        return made(request.param)
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", str(ROOT.parent / "shared" / "tiktoken-cache"))
    if not Path(cache).is_dir():
        pytest.skip("no cache of tiktoken encodings")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", cache)
    return tiktoken_tokenizer("gpt2")


# As tiktoken has them, so that each works with any vocabulary.
PATTERNS = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
    "cl100k_base": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+|"""
    r""" ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s""",
    "o200k_base": r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*"""
    r"""[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"""
    r"""[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}|"""
    r""" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
}


def drawn(spec):
    """Weights large enough for each part of the model to show in its logits."""
    random = np.random.default_rng(0)
    return {
        name: (0.3 * random.normal(size=leaf.shape) + name.endswith("scale")).astype(np.float32)
        for name, leaf in abstract_params(spec).items()
    }


def as_run(tokenizer, folder, params=None, **changes):
    """A run with random weights."""
    shape = {
        "n_layer": 1,
        "n_head": 2,
        "d_model": 16,
        "context_length": LENGTH,
        "vocab_multiple": 1,
    }
    spec = ModelSpec(ModelConfig(**{**shape, **changes}).resolved(), tokenizer.vocab_size)
    folder.mkdir()
    params = {**drawn(spec), **(params or {})}
    import_hf.write_run(folder, folder, folder, spec, params, tokenizer)
    return folder


def run(*arguments):
    return run_command(export_hf.main, [*map(str, arguments)])


@pytest.mark.thorough(keep=2)
def test_transformers_gives_our_ids_probabilities_and_text(tokenizer, tmp_path):
    torch, transformers = torch_and_transformers()
    assert run(as_run(tokenizer, tmp_path / "run"), tmp_path / "out") == 0
    out = str(tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    for text in (ENGLISH[:4000], CHINESE, ODD, "", " ", "Hello world"):
        ids = tokenizer.begun(tokenizer.encode(text)).tolist()
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids, skip_special_tokens=True) == text
    ours = llm.load(tmp_path / "run")
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    prompt = "a bad cab"
    ids = tokenizer.begun(tokenizer.encode(prompt)).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits.log_softmax(-1)[0, :-1].numpy()
    np.testing.assert_allclose(ours.distribution(prompt), expected, atol=1e-4)
    write = transformers.pipeline("text-generation", out, device="cpu")
    greedy = {"max_new_tokens": 12, "do_sample": False}
    found = ours.generate(prompt, max_new_tokens=12, temperature=0)
    assert write(prompt, return_tensors=True, **greedy)[0]["generated_token_ids"] == [*found.ids]
    assert write(prompt, **greedy)[0]["generated_text"].startswith(prompt)
    ends = [*tokenizer.ends_of_text]
    stops = transformers.GenerationConfig.from_pretrained(out)
    assert stops.eos_token_id == (ends if len(ends) > 1 else (*ends, None)[0])
    assert theirs.model_max_length == LENGTH


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """kind -> (our tokenizer, the library's of what was written)"""
    found = {}
    ours = {kind: made(kind) for kind in ("bytes", "characters", "bpe")}
    ranks = {data: id_ for id_, data in enumerate(ours["bpe"].token_table) if data}
    for name, pattern in PATTERNS.items():
        ours[name] = BytePairTokenizer(name, pattern, ranks, {})
    for kind, tokenizer in ours.items():
        folder = tmp_path_factory.mktemp(kind)
        write_tokenizer(tokenizer, folder, LENGTH)
        theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        theirs.encode_special_tokens = True
        found[kind] = tokenizer, theirs
    return found


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60), copies=st.integers(1, 3)
)
def test_any_text_has_our_ids(libraries, text, copies):
    for kind in ("bytes", "bpe", *PATTERNS):
        ours, theirs = libraries[kind]
        assert theirs.encode(text * copies).ids == ours.encode(text * copies).tolist()


def test_a_character_without_a_token_is_an_error_there_too(libraries):
    ours, theirs = libraries["characters"]
    with pytest.raises(UsageError, match="is not one of"):
        ours.encode("a\u1234")
    with pytest.raises(Exception, match="UNK"):
        theirs.encode("a\u1234")


def test_the_export_of_an_import_is_its_file_and_comes_back(tokenizer, tmp_path):
    assert run(as_run(tokenizer, tmp_path / "run"), tmp_path / "out") == 0
    if tokenizer.name == "imported":
        file = (tmp_path / "out" / "tokenizer.json").read_text()
        assert file == tokenizer.definition()["file"]
    assert run_command(import_hf.main, [f"{tmp_path}/out", f"{tmp_path}/back"]) == 0
    before, after = (open_model(tmp_path / name) for name in ("run", "back"))
    for name, array in before.params.items():  # the import pads the vocabulary
        real = np.asarray(after.params[name])[tuple(map(slice, array.shape))]
        np.testing.assert_array_equal(real, array)
    assert after.tokenizer.sha256 == before.tokenizer.sha256


def test_a_chat_template_and_special_tokens_go_through_a_run(tmp_path):
    _, transformers = torch_and_transformers()
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text(with_template(1, (2,)).definition()["file"])
    settings = {
        "eos_token": "</s>", "bos_token": "<s>", "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "not this one",
    }  # fmt: skip
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    roles = {"pad_token": "</s>", "additional_special_tokens": ["<end>"],
             "unk_token": {"content": "<unk>", "lstrip": False, "rstrip": False,
                           "normalized": False, "single_word": False}}  # fmt: skip
    (source / "special_tokens_map.json").write_text(json.dumps(roles))
    template = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    (source / "chat_template.jinja").write_text(template)
    ours = open_tokenizer(source)
    run_folder = as_run(ours, tmp_path / "run")
    assert open_model(run_folder).tokenizer.sha256 == ours.sha256
    assert ours.sha256 == ImportedTokenizer("", *[*ours.definition().values()][1:]).sha256
    assert run(run_folder, tmp_path / "out") == 0
    before, after = (transformers.AutoTokenizer.from_pretrained(tmp_path / name)
                     for name in ("source", "out"))  # fmt: skip
    messages = [{"role": "user", "content": "a bad cab"}]
    for tokenize in (False, True):
        chat = before.apply_chat_template(messages, tokenize=tokenize)
        assert after.apply_chat_template(messages, tokenize=tokenize) == chat
    assert after.chat_template == template and after.padding_side == "left"
    assert after.special_tokens_map == before.special_tokens_map
    assert after.added_tokens_decoder == before.added_tokens_decoder


def test_a_beginning_that_only_the_settings_have_is_in_the_file(tmp_path):
    """As of a sentencepiece model, whose add_bos_token is in tokenizer_config.json."""
    described = json.loads(with_template(1, (2,)).definition()["file"]) | {"post_processor": None}
    ours = ImportedTokenizer("imported", json.dumps(described), 0, 1, (2,))
    write_tokenizer(ours, tmp_path, LENGTH)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode("a b").ids == ours.begun(ours.encode("a b")).tolist()


def test_weights_are_cut_into_files_with_an_index(tmp_path, monkeypatch):
    torch, transformers = torch_and_transformers()
    source = as_run(ByteTokenizer(), tmp_path / "run", n_layer=3)
    assert run(source, tmp_path / "one", "--dtype", "bfloat16") == 0
    monkeypatch.setattr(tensors, "LARGEST_FILE", 9000)
    assert run(source, tmp_path / "many", "--dtype", "bfloat16") == 0
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and f"-of-{len(files):05}" in files[0]
    whole = load_file(tmp_path / "one" / "model.safetensors")
    parts = [load_file(tmp_path / "many" / name) for name in files]
    assert index["weight_map"].keys() == whole.keys() == {name for part in parts for name in part}
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in whole.values())
    for name, array in {name: array for part in parts for name, array in part.items()}.items():
        np.testing.assert_array_equal(array, whole[name])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "many")
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrower_weights_are_rounded_as_torch_rounds(dtype, tmp_path):
    torch, _ = torch_and_transformers()
    from safetensors.torch import load_file as load_torch

    source = as_run(ByteTokenizer(), tmp_path / "run")
    for name in ("float32", dtype):
        assert run(source, tmp_path / name, "--dtype", name) == 0
    exact, narrow = (load_torch(tmp_path / n / "model.safetensors") for n in ("float32", dtype))
    for name, array in exact.items():
        assert torch.equal(narrow[name], array.to(getattr(torch, dtype)))


def test_a_number_that_float16_cannot_hold_is_refused_by_its_weight(tmp_path, capsys):
    large = {"final_norm.scale": np.full(16, 70000, np.float32)}
    source = as_run(ByteTokenizer(), tmp_path / "run", large)
    assert run(source, tmp_path / "out", "--dtype", "float16") == 2
    said = capsys.readouterr().err
    assert "ln_f.weight has the number 70000, which float16 cannot hold" in said
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert run(source, tmp_path / "out", "--dtype", "bfloat16") == 0
    assert run(source, tmp_path / "more", "--dtype", "int8") == 2
    capsys.readouterr()
    assert run(source, tmp_path / ("x" * 300)) == 2
    assert "cannot be written: File name too long" in capsys.readouterr().err
    (tmp_path / "link").symlink_to("nowhere")
    assert run(source, tmp_path / "link") == 2
    assert "exists already" in capsys.readouterr().err


def test_one_array_at_a_time_is_in_memory(tmp_path):
    shapes = {f"w{n}": (250_000,) for n in range(20)}
    tracemalloc.start()
    tensors.save(shapes, (np.full(shape, 1.5, np.float32) for shape in shapes.values()), tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6  # of 20e6
    assert load_file(tmp_path / "model.safetensors")["w7"].sum() == 375_000


def test_a_pattern_that_means_something_else_there_is_refused(tmp_path):
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"12": 256, b"1234": 257, b"34": 258}
    with pytest.raises(UsageError, match="cannot be written as a tokenizer"):
        write_tokenizer(BytePairTokenizer("bpe", r"\d{2}+|[\s\S]", {**ranks}, {}), tmp_path, LENGTH)
