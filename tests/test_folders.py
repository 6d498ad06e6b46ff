"""Folders of Hugging Face models that are not what they should be, or can be read in two ways.

transformers is the oracle of how a folder is read; here are the readings that it has.
"""

import json
import os

import numpy as np
import pytest
from folders import from_hf
from runs import make_strange
from safetensors.numpy import load_file, save_file

from llm.commands import import_hf, run_command
from llm.config import MeshConfig
from llm.errors import CheckpointError, LLMError, UsageError
from llm.interop.families import FAMILIES
from llm.interop.hf import open_hf, to_hf
from llm.interop.tensors import Tensor
from llm.model.gpt import ModelSpec, abstract_params
from llm.model.sharding import make_mesh
from llm.model_config import ModelConfig
from llm.run.open import reading_shardings

VOCAB = 29
LLAMA = ModelConfig(
    n_layer=2, n_head=4, n_kv_head=2, d_model=24, d_ff=40, context_length=16, positions="rotary",
    norm="rmsnorm", activation="swiglu", bias=False,
)  # fmt: skip
GPT2 = ModelConfig(n_layer=2, n_head=3, d_model=24, context_length=16)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def random_params(config):
    random = np.random.default_rng(0)
    params = abstract_params(ModelSpec(config, VOCAB))
    return {name: random.normal(size=x.shape).astype("f4") for name, x in params.items()}


@pytest.fixture
def llama(tmp_path):
    to_hf(LLAMA, VOCAB, random_params(LLAMA), tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def gpt2(tmp_path):
    to_hf(GPT2, VOCAB, random_params(GPT2), tmp_path / "gpt2")
    return tmp_path / "gpt2"


def describe(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def change_weights(folder, **changes):
    """Replace or, with None, leave out arrays; returns those that were there."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    changed = {**tensors, **{name.replace("__", "."): array for name, array in changes.items()}}
    save_file({name: array for name, array in changed.items() if array is not None}, path)
    return tensors


def test_a_head_that_differs_from_the_embedding_is_not_lost(llama):
    """transformers does not tie them then, whatever tie_word_embeddings says."""
    head = np.random.default_rng(1).normal(size=(VOCAB, 24)).astype("f4")
    tensors = change_weights(llama, lm_head__weight=head)
    config, _, params = from_hf(llama)
    assert not config.tie_embeddings
    np.testing.assert_array_equal(params["head.weight"][:, :VOCAB], head.T)
    np.testing.assert_array_equal(params["embed.weight"][:VOCAB], tensors[EMBEDDING])


def test_a_head_that_equals_the_embedding_is_tied_to_it(llama):
    tensors = load_file(llama / "model.safetensors")
    change_weights(llama, lm_head__weight=tensors[EMBEDDING])
    config, _, params = from_hf(llama)
    assert config.tie_embeddings and "head.weight" not in params


def test_a_tied_head_without_an_embedding_is_both(llama):
    expected = from_hf(llama)[2]
    tensors = load_file(llama / "model.safetensors")
    tensors[HEAD] = tensors.pop(EMBEDDING)
    save_file(tensors, llama / "model.safetensors")
    config, _, params = from_hf(llama)
    assert config.tie_embeddings
    np.testing.assert_array_equal(params["embed.weight"], expected["embed.weight"])


def test_an_untied_head_that_is_missing_is_no_guess(llama):
    describe(llama, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"no weight lm_head\.weight"):
        from_hf(llama)


def test_one_file_goes_before_an_index_and_before_a_pickle(llama):
    """As transformers chooses. The files of the index would be other weights."""
    expected = from_hf(llama)[2]
    index = {"weight_map": dict.fromkeys(load_file(llama / "model.safetensors"), "other")}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    (llama / "pytorch_model.bin").write_bytes(b"not read")
    for name, array in from_hf(llama)[2].items():
        np.testing.assert_array_equal(array, expected[name])


def test_a_weight_in_two_files_or_under_two_names_is_refused(gpt2):
    tensors = load_file(gpt2 / "model.safetensors")
    table = tensors["transformer.wpe.weight"]
    save_file({**tensors, "wpe.weight": table + 1}, gpt2 / "model.safetensors")
    with pytest.raises(UsageError, match=r"two arrays for the weight wpe\.weight: .*expected one"):
        from_hf(gpt2)
    (gpt2 / "model.safetensors").unlink()
    save_file(tensors, gpt2 / "a.safetensors")
    save_file({"transformer.wpe.weight": table + 1}, gpt2 / "b.safetensors")
    index = {"weight_map": {"transformer.wpe.weight": "b.safetensors", "others": "a.safetensors"}}
    (gpt2 / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match=r"two arrays for the weight wpe\.weight"):
        from_hf(gpt2)


def test_a_head_under_the_name_of_the_backbone_is_no_head(llama):
    change_weights(llama, model__lm_head__weight=np.ones((VOCAB, 24), "f4"))
    with pytest.raises(UsageError, match=r"no place for: model\.lm_head\.weight"):
        from_hf(llama)


@pytest.mark.parametrize(
    ("settings", "setting", "value"),
    [
        # The newer place of a base goes before the older one.
        ({"rope_theta": 3.0, "rope_parameters": {"rope_theta": 7.0}}, "rope_theta", 7.0),
        ({"rope_theta": 3.0, "rope_parameters": {"rope_type": "default"}}, "rope_theta", 3.0),
        ({"rope_theta": 3.0, "rope_parameters": None}, "rope_theta", 3.0),
        ({"rope_parameters": None}, "rope_theta", 10000.0),
        # rope_scaling goes before rope_parameters as a whole, and rope_type before type.
        ({"rope_theta": 3.0, "rope_scaling": {"rope_type": "default", "type": "linear"},
          "rope_parameters": {"rope_theta": 7.0}}, "rope_theta", 3.0),
        # What is nested is about positions alone.
        ({"rope_parameters": {"rope_theta": 7.0, "rms_norm_eps": 0.5}}, "norm_epsilon", 1e-5),
        ({"num_key_value_heads": None, "head_dim": None, "dtype": "float8"}, "context_length", 16),
        ({"architectures": ["MistralForCausalLM"], "torch_dtype": "int8"}, "n_kv_head", 2),
    ],
)  # fmt: skip
def test_a_description_is_read_as_transformers_reads_it(llama, settings, setting, value):
    if settings.get("num_key_value_heads", 0) is None:
        tensors = load_file(llama / "model.safetensors")
        pairs = {
            name: np.repeat(x, 2, 0)
            for name, x in tensors.items()
            if "k_p" in name or "v_p" in name
        }
        save_file({**tensors, **pairs}, llama / "model.safetensors")
    describe(llama, **settings)
    assert getattr(from_hf(llama)[0], setting) == value


def test_another_name_of_a_key_counts_unless_the_two_differ(gpt2):
    """transformers takes num_attention_heads for n_head: as 12 heads it would be another model."""
    path = gpt2 / "config.json"
    described = json.loads(path.read_text())
    described["num_attention_heads"] = described.pop("n_head")
    path.write_text(json.dumps(described))
    assert from_hf(gpt2)[0].n_head == 3
    describe(gpt2, n_head=2)
    with pytest.raises(UsageError, match="num_attention_heads = 3 and n_head = 2 are two names"):
        from_hf(gpt2)


def test_a_window_that_hides_nothing_is_left_out(llama):
    describe(llama, model_type="mistral", sliding_window=16)
    assert from_hf(llama)[0].window == 0
    describe(llama, sliding_window=12)
    assert from_hf(llama)[0].window == 12
    assert from_hf(llama, context_length=12)[0].window == 0
    describe(llama, sliding_window=12.5)
    with pytest.raises(UsageError, match=r"sliding_window = 12\.5: expected a number of tokens"):
        from_hf(llama)


def test_a_context_is_lowered_and_never_raised(gpt2, tmp_path, capsys):
    config, _, params = from_hf(gpt2, context_length=5)
    assert (config.context_length, params["embed.position"].shape) == (5, (5, 24))
    run = [str(gpt2), str(tmp_path / "run"), "--tokenizer", "bytes"]
    assert run_command(import_hf.main, [*run, "--model.context-length", "17"]) == 2
    assert "--model.context-length = 17: expected 1 to 16" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder", "loop", "huge", "deep"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "index"])
def test_what_is_no_file_of_a_model_is_refused_at_once(llama, name, kind, capsys):
    if name == "index":
        (llama / "model.safetensors").unlink()
        name = "model.safetensors.index.json"
    make_strange(kind, llama / name)
    with pytest.raises(LLMError, match=name):
        from_hf(llama)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 7 + b"\x7f" + b"{}",  # a header of 9e18 bytes
        (2**40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{",
        (5).to_bytes(8, "little") + b"[[[[[",
    ],
)
def test_a_header_that_lies_is_named(llama, content):
    (llama / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        from_hf(llama)


def test_more_layers_than_weights_are_not_looked_for(llama):
    describe(llama, num_hidden_layers=1000)
    with pytest.raises(CheckpointError, match=r"1000 layers .* no more than 20 weights"):
        from_hf(llama)


@pytest.mark.parametrize(
    ("name", "value"),
    [("logits_scaling", 0), ("embedding_multiplier", None), ("attention_multiplier", "2")],
)
def test_a_factor_that_is_no_number_is_refused_by_name(llama, name, value):
    describe(llama, model_type="granite", **{name: value})
    with pytest.raises(UsageError, match=f"{name} = {value!r}: expected a number"):
        from_hf(llama)


@pytest.mark.parametrize("damage", ["ends early", "terabyte of header", "terabyte of numbers"])
def test_a_file_that_is_not_what_its_header_says_is_named(llama, damage):
    path = llama / "model.safetensors"
    if damage == "ends early":
        os.truncate(path, path.stat().st_size - 1)
    elif damage == "terabyte of header":
        path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])
    else:
        of = {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}
        header = json.dumps({EMBEDDING: of}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(99))
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        from_hf(llama)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "U8", "I64", "BOOL"])
def test_weights_of_another_kind_of_number_are_refused_by_name(llama, dtype):
    size = {"I64": 8}.get(dtype, 1) * VOCAB * 24
    header = {EMBEDDING: {"dtype": dtype, "shape": [VOCAB, 24], "data_offsets": [0, size]}}
    header = json.dumps(header).encode()
    path, tensors = llama / "model.safetensors", load_file(llama / "model.safetensors")
    del tensors[EMBEDDING]
    path.unlink()
    (llama / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    save_file(tensors, llama / "b.safetensors")
    index = {"weight_map": {EMBEDDING: "a.safetensors", "others": "b.safetensors"}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match=rf"embed_tokens\.weight has the dtype {dtype}, expected"):
        from_hf(llama)


@pytest.mark.parametrize(
    "index",
    [[], {}, {"weight_map": None}, {"weight_map": {}}, {"weight_map": ["a"]},
     {"weight_map": {"a": 3}}, {"weight_map": {"a": ["b"]}}, {"weight_map": {"a": "../b"}},
     {"weight_map": {"a": "/etc/passwd"}}],
    ids=str,
)  # fmt: skip
def test_an_index_without_a_map_to_files_of_the_folder_is_refused(llama, index):
    (llama / "model.safetensors").unlink()
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match=r"index\.json: expected a weight_map"):
        from_hf(llama)


def test_weights_in_another_format_are_named(llama):
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"no model\.safetensors \(it holds pytorch_model\.bin\)"):
        from_hf(llama)


def test_a_name_of_the_hub_gets_the_command_that_fetches_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"hf download Qwen/Qwen3-0\.6B --local-dir DIR"):
        from_hf("Qwen/Qwen3-0.6B")


# One of each way in which a family holds weights.
HELD = {
    "gpt2": GPT2,  # three matrices side by side
    "opt": GPT2.model_copy(update={"activation": "relu"}),  # rows that are not used
    "phi3": LLAMA,  # side by side and transposed
    "gemma": LLAMA.model_copy(  # factors and offsets
        update={"activation": "geglu", "head_size": 6, "norm_epsilon": 1e-6}
    ),
    "mixtral": LLAMA.model_copy(update={"n_expert": 4, "n_expert_active": 2}),
    "gpt_neox": GPT2.model_copy(  # head by head
        update={
            "n_head": 4, "positions": "rotary", "rotary_fraction": 2 / 3, "block": "parallel",
            "activation": "gelu", "tie_embeddings": False,
        }
    ),
}  # fmt: skip


@pytest.mark.parametrize("model_type", HELD)
def test_a_folder_is_read_part_by_part_onto_a_mesh(model_type, tmp_path, monkeypatch):
    """Each device's part is what the whole has there, and no more of a file is read for it."""
    config = HELD[model_type].resolved()
    monkeypatch.setattr("llm.interop.description.FAMILIES", {model_type: FAMILIES[model_type]})
    to_hf(config, VOCAB, random_params(config), tmp_path)
    whole = from_hf(tmp_path)[2]
    model = open_hf(tmp_path)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, expert=2))
    shardings = reading_shardings(mesh, model.spec)
    numbers_read, read = [], Tensor.read

    def recorded(tensor, index=()):
        part = read(tensor, index)
        numbers_read.append(part.size)
        return part

    monkeypatch.setattr(Tensor, "read", recorded)
    for name, sharding in shardings.items():
        of_heads = 3 if model_type == "gpt_neox" and "attention" in name else 1
        for index in sharding.devices_indices_map(whole[name].shape).values():
            numbers_read.clear()
            part = model.part(name, index)
            np.testing.assert_array_equal(part, whole[name][index], err_msg=name)
            assert sum(numbers_read) <= part.size * of_heads, name
    for name, array in model.read(shardings).items():
        assert array.sharding == shardings[name]
        np.testing.assert_array_equal(array, whole[name], err_msg=name)
    assert max(len(array.sharding.device_set) for array in model.read(shardings).values()) == 8
