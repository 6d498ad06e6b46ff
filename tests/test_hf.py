"""Weights to and from Hugging Face: logits equal transformers', round trips change no bit."""

import contextlib
import io
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folders import from_hf
from safetensors.numpy import load_file, save_file

from llm.errors import CheckpointError, UsageError
from llm.interop.hf import to_hf
from llm.model.gpt import ModelSpec, abstract_params, bind
from llm.model_config import ModelConfig

GOLDENS = sorted((Path(__file__).parent / "goldens").glob("*.npz"))
VOCAB = 29

GPT2 = ModelConfig(n_layer=2, n_head=3, d_model=24, context_length=16, vocab_multiple=64)
EXACT_GELU = GPT2.model_copy(update={"activation": "gelu", "tie_embeddings": False})
LLAMA = ModelConfig(
    n_layer=2, n_head=4, n_kv_head=2, d_model=24, d_ff=40, context_length=16, positions="rotary",
    norm="rmsnorm", activation="swiglu", bias=False, rope_theta=500.0, tie_embeddings=False,
)  # fmt: skip

MIXTRAL = LLAMA.model_copy(update={"n_expert": 4, "n_expert_active": 2})
EXPORTED = {"gpt2": GPT2, "exact gelu": EXACT_GELU, "llama": LLAMA, "mixtral": MIXTRAL}
# Gemma 3 with one rotation for all layers, which comes back as two that are equal.
GEMMA3 = LLAMA.model_copy(
    update={"activation": "geglu", "tie_embeddings": True, "qk_norm": True, "norm_place": "both",
            "window": 4, "global_every": 2, "window_rope_theta": 0.0}
)  # fmt: skip
OPENED = {**EXPORTED, "one rotation": GEMMA3}
# What tests/test_families.py compares with transformers.
SWITCHES = {
    "mistral": {"window": 4},
    "qwen3": {"qk_norm": True, "head_size": 8, "n_layer": 4, "window": 4, "global_every": 2},
    "llama3": {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_length": 64},
    "yarn": {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_length": 64},
    "olmoe": {"n_expert": 4, "n_expert_active": 2, "normalize_gates": False, "qk_norm": True,
              "qk_norm_joint": True},
    "qwen3_moe": {"n_expert": 4, "n_expert_active": 2, "qk_norm": True, "head_size": 8},
    "olmo2": {"qk_norm": True, "qk_norm_joint": True, "norm_place": "after"},
    "gpt_neox": {"norm": "layernorm", "bias": True, "activation": "gelu", "n_kv_head": 4,
                 "block": "parallel", "rotary_fraction": 0.4},
    "smollm3": {"n_layer": 4, "unrotated_every": 2},
}  # fmt: skip
SWITCHED = {
    name: ModelConfig(**{**LLAMA.model_dump(), **changes}) for name, changes in SWITCHES.items()
}


def write_golden(path, folder):
    """The golden model as a Hugging Face folder; (tokens, logits that transformers gave)."""
    golden = np.load(path)
    weights = {
        name.removeprefix("weights/"): golden[name].astype(np.float32)
        for name in golden.files
        if name.startswith("weights/")
    }
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(str(golden["config"]))
    return golden["tokens"], golden["logits"]


def logits_of(config, vocab_size, params, tokens):
    spec = ModelSpec(config, vocab_size)
    return np.asarray(jax.jit(lambda params: bind(spec, params)(tokens))(params))


def random_params(config):
    """Weights large enough for each part of the model to show in its logits."""
    random = np.random.default_rng(0)
    return {
        name: jnp.asarray(
            0.3 * random.normal(size=leaf.shape) + name.endswith("scale"), jnp.float32
        )
        for name, leaf in abstract_params(ModelSpec(config, VOCAB)).items()
    }


def change_description(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.fixture
def llama_folder(tmp_path):
    write_golden(GOLDENS[1], tmp_path)
    return tmp_path


@pytest.fixture
def gpt2_folder(tmp_path):
    write_golden(GOLDENS[0], tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_logits_equal_those_that_transformers_gave(tmp_path, path):
    tokens, expected = write_golden(path, tmp_path)
    assert np.std(expected) > 0.5
    np.testing.assert_allclose(logits_of(*from_hf(tmp_path), tokens), expected, atol=1e-4)


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_importing_and_exporting_again_changes_no_bit(tmp_path, path):
    write_golden(path, tmp_path / "theirs")
    config, vocab_size, params = from_hf(tmp_path / "theirs")
    to_hf(config, vocab_size, params, tmp_path / "ours")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
    again = from_hf(tmp_path / "ours")
    assert again[:2] == (config, vocab_size)
    described = json.loads((tmp_path / "ours" / "config.json").read_text())
    original = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert described["architectures"] == original["architectures"]


@pytest.mark.parametrize("config", {**EXPORTED, **SWITCHED}.values(), ids={**EXPORTED, **SWITCHED})
def test_exporting_and_importing_again_changes_no_bit_but_the_padding(tmp_path, config):
    params = random_params(config)
    to_hf(config, VOCAB, params, tmp_path)
    again, vocab_size, imported = from_hf(tmp_path)
    assert (again, vocab_size) == (config.resolved(), VOCAB)
    assert imported.keys() == params.keys()
    for name, array in params.items():
        real = np.array(array)
        if name == "embed.weight":
            real[VOCAB:] = 0.0
        if name == "head.weight":
            real[:, VOCAB:] = 0.0
        np.testing.assert_array_equal(imported[name], real, err_msg=name)


def test_the_number_of_parameters_is_gpt2s():
    """124,439,808: transformers' GPT2LMHeadModel(GPT2Config()).num_parameters()."""
    config = ModelConfig(n_layer=12, n_head=12, d_model=768, context_length=1024, vocab_multiple=1)
    shapes = abstract_params(ModelSpec(config, 50257))
    assert sum(int(np.prod(leaf.shape)) for leaf in shapes.values()) == 124_439_808


@pytest.mark.parametrize("config", OPENED.values(), ids=OPENED)
def test_transformers_opens_an_exported_model_and_gives_the_same_logits(tmp_path, config):
    torch, transformers = torch_and_transformers()
    params = random_params(config)
    to_hf(config, VOCAB, params, tmp_path, end_of_text=28)
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(loading.values()), loading
    assert model.config.eos_token_id == 28
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 16), dtype=np.int32)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens).long()).logits.numpy()
    assert np.std(expected) > 0.5
    np.testing.assert_allclose(logits_of(config, VOCAB, params, tokens), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("GPT2", {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_inner": 24, "n_positions": 8}),
        ("GPT2", {"n_layer": 1, "n_head": 4, "n_embd": 16, "n_positions": 8,
                  "activation_function": "gelu", "tie_word_embeddings": False}),
        ("Llama", {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                   "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 8}),
        ("Llama", {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 1,
                   "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 8,
                   "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
                   "rms_norm_eps": 1e-2, "tie_word_embeddings": True}),
        ("Mixtral", {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
                     "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 8,
                     "num_local_experts": 5, "num_experts_per_tok": 3}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_transformers_saved_gives_its_logits(tmp_path, model_type, settings, dtype):
    """Whatever the file's dtype: it is widened exactly, and both compute in float32."""
    torch, transformers = torch_and_transformers()
    small = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None}
    config = getattr(transformers, f"{model_type}Config")(**settings, **small)
    kind = "GPT2LMHeadModel" if model_type == "GPT2" else f"{model_type}ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config)
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.2 * torch.randn_like(parameter)
    model = model.to(getattr(torch, dtype))
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(tmp_path, max_shard_size="3KB")  # several files and an index
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 8), dtype=np.int32)
    with torch.no_grad():
        # Opened anew: casting a model also rounds its rotary frequencies, which no file holds.
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        expected = model(torch.from_numpy(tokens).long()).logits.numpy()
    np.testing.assert_allclose(logits_of(*from_hf(tmp_path), tokens), expected, atol=1e-4)


def torch_and_transformers():
    return pytest.importorskip("torch"), pytest.importorskip("transformers")


def test_names_without_the_backbones_prefix_and_with_causal_masks_are_read(gpt2_folder):
    """As the original GPT-2 files on the hub are."""
    expected = from_hf(gpt2_folder)[2]
    path = gpt2_folder / "model.safetensors"
    tensors = {name.removeprefix("transformer."): array for name, array in load_file(path).items()}
    tensors["h.0.attn.bias"] = np.tril(np.ones((1, 1, 16, 16), np.float32))
    save_file(tensors, path)
    imported = from_hf(gpt2_folder)[2]
    for name, array in expected.items():
        np.testing.assert_array_equal(imported[name], array)


def test_rope_theta_is_read_where_transformers_wrote_it_before_version_5(llama_folder):
    change_description(llama_folder, rope_parameters=None, rope_theta=750000)
    assert from_hf(llama_folder)[0].rope_theta == 750000.0


def test_padding_of_the_vocabulary_is_zero(llama_folder):
    _, vocab_size, params = from_hf(llama_folder)
    assert params["embed.weight"].shape == (64, 24) and params["head.weight"].shape == (24, 64)
    assert not params["embed.weight"][vocab_size:].any()
    assert not params["head.weight"][:, vocab_size:].any()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 5e5}}, "longrope"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2}}, "dynamic"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 2, "low_freq_factor": 2}},
            "low_freq_factor",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "truncate": False}}, "truncate"),
        ({"rope_scaling": {"type": "yarn", "factor": "2"}}, "rope_factor"),
        ({"rope_scaling": {"type": ["yarn"]}}, "rope_type"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"head_dim": 7}, "head_size"),
        ({"model_type": "smollm3", "no_rope_layers": [0, 0, 1]}, "no_rope_layers"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layers"),
        ({"attention_bias": 1.5}, "attention_bias"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"rope_theta": None, "rope_parameters": None}, "rope_theta"),
        ({"rope_parameters": 3}, "rope_parameters"),
        ({"num_hidden_layers": 10**400}, "num_hidden_layers"),
        ({"hidden_size": 2**31}, "hidden_size"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_attention_heads": 5, "head_dim": None}, "n_head"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_represented_is_refused_by_name(llama_folder, settings, named):
    change_description(llama_folder, **settings)
    with pytest.raises(UsageError, match=named):
        from_hf(llama_folder)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"activation_function": "relu"}, "activation_function = 'relu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_gpt2_variant_is_refused_by_name(gpt2_folder, settings, named):
    change_description(gpt2_folder, **settings)
    with pytest.raises(UsageError, match=named):
        from_hf(gpt2_folder)


@pytest.mark.parametrize("size", [None, 0, -1, "257", 2**31, 1e12, [257]])
def test_a_vocabulary_that_is_no_number_of_tokens_is_refused_by_name(llama_folder, size):
    change_description(llama_folder, vocab_size=size)
    with pytest.raises(UsageError, match=r"vocab_size = .*expected the number of tokens"):
        from_hf(llama_folder)


@pytest.mark.parametrize("content", ["[]", "3", "null", "[" * 100_000])
def test_a_config_json_that_describes_no_model_is_refused(llama_folder, content):
    (llama_folder / "config.json").write_text(content)
    with pytest.raises(UsageError, match=r"config\.json"):
        from_hf(llama_folder)


@pytest.mark.parametrize("name", ["attention_bias", "mlp_bias"])
def test_a_key_that_a_family_does_not_have_is_refused_by_name(tmp_path, name):
    """Mixtral has no biases, so a file that asks for them is of another model."""
    to_hf(MIXTRAL, VOCAB, random_params(MIXTRAL), tmp_path)
    change_description(tmp_path, attention_bias=False, mlp_bias=False)
    assert not from_hf(tmp_path)[0].bias
    change_description(tmp_path, **{name: True})
    with pytest.raises(UsageError, match=f"{name} = True cannot be represented"):
        from_hf(tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"activation": "relu_squared"}, "model.activation = 'relu_squared'"),
        ({"qk_norm": True}, "model.qk_norm"),
        ({"logit_soft_cap": 15.0}, "model.logit_soft_cap"),
        ({"n_head": 4, "n_kv_head": 2}, "model.n_kv_head"),
        ({"positions": "none"}, "model.positions"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_model_of_no_architecture_there_is_not_exported(tmp_path, changes, named):
    config = ModelConfig(**{**GPT2.model_dump(), **changes})
    with pytest.raises(UsageError, match=named):
        to_hf(config, VOCAB, {}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_fit_the_description_are_named(gpt2_folder):
    path = gpt2_folder / "model.safetensors"
    tensors = load_file(path)
    name = "transformer.h.1.mlp.c_fc.weight"
    save_file({**tensors, name: tensors[name][:, :-1]}, path)
    with pytest.raises(CheckpointError, match=r"h\.1\.mlp\.c_fc\.weight has shape \[24, 95\]"):
        from_hf(gpt2_folder)
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    with pytest.raises(CheckpointError, match=r"no weight h\.1\.mlp\.c_fc\.weight"):
        from_hf(gpt2_folder)
    save_file({**tensors, "transformer.h.2.ln_1.weight": np.ones(24)}, path)
    with pytest.raises(UsageError, match=r"h\.2\.ln_1\.weight"):
        from_hf(gpt2_folder)


def test_a_folder_that_is_no_model_says_what_is_missing(tmp_path):
    with pytest.raises(UsageError, match=r"config\.json"):
        from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match="JSON"):
        from_hf(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 29}')
    with pytest.raises(UsageError, match=r"model\.safetensors"):
        from_hf(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(CheckpointError, match="cannot be read"):
        from_hf(tmp_path)
