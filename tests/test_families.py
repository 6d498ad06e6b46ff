"""Each family of Hugging Face models: log-probabilities are transformers', token by token.

The oracle is transformers with random weights, large enough for each part of a model to show. Every
text is longer than any window of attention, and is read at once and with a key/value cache.
"""

import contextlib
import io

import jax
import numpy as np
import pytest
from folders import from_hf
from test_hf import torch_and_transformers

from llm.interop.families import FAMILIES
from llm.interop.hf import to_hf
from llm.model.gpt import KVCache, ModelSpec, bind

VOCAB, LENGTH, PIECES = 61, 24, 6
OLD = {"n_layer": 2, "n_head": 4, "n_embd": 16, "n_inner": 24, "n_positions": LENGTH}
SIZES = {
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16,
    "intermediate_size": 24, "max_position_embeddings": LENGTH,
}  # fmt: skip
_SOME_SIZES = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}

# (family, settings of its own): what people use, and each switch both ways.
CASES = {
    "gpt2": ("gpt2", {**OLD}),
    "gpt_bigcode": ("gpt_bigcode", {**OLD}),
    "gpt_bigcode-gelu": ("gpt_bigcode", {**OLD, "activation_function": "gelu"}),
    "llama": ("llama", {**SIZES}),
    "llama-attention-bias": ("llama", {**SIZES, "attention_bias": True}),
    "llama-mlp-bias": ("llama", {**SIZES, "mlp_bias": True}),
    "mixtral": ("mixtral", {**SIZES, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "mistral": ("mistral", {**SIZES, "sliding_window": LENGTH}),
    "qwen2": ("qwen2", {**SIZES, "rms_norm_eps": 1e-2}),
    "qwen2-tied": ("qwen2", {**SIZES, "tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen3": ("qwen3", {**SIZES, "head_dim": 4}),
    "qwen3-bias": ("qwen3", {**SIZES, "head_dim": 4, "attention_bias": True}),
    "phi3": ("phi3", {**SIZES, "sliding_window": LENGTH + 1}),
    "olmo": ("olmo", {**SIZES}),
    "olmo2": ("olmo2", {**SIZES}),
    "olmo2-bias": ("olmo2", {**SIZES, "attention_bias": True, "head_dim": 6}),
    "olmoe": ("olmoe", {**SIZES, "num_experts": 4, "num_experts_per_tok": 2}),
    "olmoe-normalised": ("olmoe", {**SIZES, "num_experts": 3, "num_experts_per_tok": 2,
                                   "norm_topk_prob": True}),
    "qwen3_moe": ("qwen3_moe", {**SIZES, "num_experts": 4, "num_experts_per_tok": 2,
                                "moe_intermediate_size": 12, "norm_topk_prob": True}),
    "qwen3_moe-window": ("qwen3_moe", {**SIZES, "num_experts": 4, "num_experts_per_tok": 1,
                                       "use_sliding_window": True, "sliding_window": 5}),
    "olmo-bias": ("olmo", {**SIZES, "attention_bias": True}),
    "starcoder2": ("starcoder2", {**SIZES}),
    "starcoder2-no-bias": ("starcoder2", {**SIZES, "use_bias": False}),
    "granite": ("granite", {**SIZES, "embedding_multiplier": 3.0, "logits_scaling": 2.0,
                            "residual_multiplier": 0.7, "attention_multiplier": 0.3}),
    "llama-own-head-size": ("llama", {**SIZES, "head_dim": 6}),
    "llama-linear": ("llama", {**SIZES, "rope_scaling": {"type": "linear", "factor": 3.0}}),
    "llama3.1": ("llama", {**SIZES, "head_dim": 16, "rope_theta": 500.0, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}}),
    "qwen3-yarn": ("qwen3", {**SIZES, "head_dim": 16, "rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 200}}),
    "qwen2-yarn": ("qwen2", {**SIZES, "hidden_size": 64, "rope_theta": 100.0, "rope_scaling": {
        "type": "yarn", "factor": 2.0, "original_max_position_embeddings": 12,
        "attention_factor": 1.3}}),
    "mistral-window": ("mistral", {**SIZES, "sliding_window": 7}),
    "phi3-window": ("phi3", {**SIZES, "sliding_window": 1}),
    "starcoder2-window": ("starcoder2", {**SIZES, "sliding_window": 5}),
    "mixtral-window": ("mixtral", {**SIZES, "sliding_window": 6, "num_local_experts": 3}),
    "qwen2-window": ("qwen2", {**SIZES, "use_sliding_window": True, "sliding_window": 5,
                               "max_window_layers": 0}),
    "qwen3-window": ("qwen3", {**SIZES, "use_sliding_window": True, "sliding_window": 5,
                               "layer_types": ["sliding_attention", "full_attention"]}),
    "smollm3": ("smollm3", {**SIZES, "num_hidden_layers": 5}),
    "smollm3-each-second": ("smollm3", {**SIZES, "no_rope_layer_interval": 2}),
    "gpt_neox": ("gpt_neox", {**_SOME_SIZES, "num_attention_heads": 2, "hidden_size": 32}),
    "gpt_neox-sequential": ("gpt_neox", {**_SOME_SIZES, "use_parallel_residual": False,
        "attention_bias": False, "rope_parameters": {
            "rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0}}),
    "phi": ("phi", {**SIZES}),
    "phi-partly": ("phi", {**SIZES, "hidden_size": 32, "rope_parameters": {
        "rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.75}}),
    "opt": ("opt", {**_SOME_SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16}),
    "opt-no-bias": ("opt", {**_SOME_SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16,
        "enable_bias": False, "activation_function": "gelu", "tie_word_embeddings": False}),
    "gemma": ("gemma", {**SIZES, "head_dim": 6}),
    "gemma2": ("gemma2", {**SIZES, "num_hidden_layers": 4, "head_dim": 6, "sliding_window": 5,
                          "query_pre_attn_scalar": 10, "attn_logit_softcapping": 2.0,
                          "final_logit_softcapping": 3.0}),
    "gemma2-uncapped": ("gemma2", {**SIZES, "head_dim": 4, "attn_logit_softcapping": None,
                                   "final_logit_softcapping": None, "sliding_window": 100}),
    "gemma3_text": ("gemma3_text", {**SIZES, "num_hidden_layers": 7, "head_dim": 6,
                                    "sliding_window": 5, "query_pre_attn_scalar": 10}),
    "gemma3-scaled": ("gemma3_text", {**SIZES, "head_dim": 6, "sliding_window": 5,
        "layer_types": ["full_attention", "full_attention"],
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "gemma3-pattern": ("gemma3_text", {**SIZES, "num_hidden_layers": 4, "sliding_window": 100,
        "layer_types": 2 * ["sliding_attention", "full_attention"]}),
    "granite-tied": ("granite", {**SIZES, "embedding_multiplier": 3.0, "logits_scaling": 0.5,
                                 "tie_word_embeddings": True, "attention_bias": True}),
}  # fmt: skip


def save_theirs(folder, model_type, settings):
    """A model of transformers with random weights as a folder: (tokens, its log-probabilities)."""
    torch, transformers = torch_and_transformers()
    config = transformers.AutoConfig.for_model(
        model_type, vocab_size=VOCAB, **{**NO_IDS, **settings}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.3 * torch.randn_like(parameter)
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, LENGTH), dtype=np.int32)
    return tokens, log_probabilities_of_theirs(folder, tokens)


def log_probabilities_of_theirs(folder, tokens):
    torch, transformers = torch_and_transformers()
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(loading.values()), loading
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(tokens).long()).logits
    return logits.log_softmax(-1).numpy()


def log_probabilities(config, vocab_size, params, tokens):
    """Ours: (of the text read at once, of the text read with a cache in pieces)."""
    spec = ModelSpec(config, vocab_size)

    @jax.jit
    def at_once(params, tokens):
        return jax.nn.log_softmax(bind(spec, params)(tokens))

    @jax.jit
    def extended(params, tokens, cache):
        model = bind(spec, params)
        hidden, cache = model.extend(tokens, cache)
        return jax.nn.log_softmax(model.logits(hidden)), cache

    cache, parts = KVCache.create(spec, len(tokens), LENGTH), []
    for piece in np.split(tokens, PIECES, axis=1):
        part, cache = extended(params, piece, cache)
        parts.append(part)
    return np.asarray(at_once(params, tokens)), np.concatenate(parts, axis=1)


def test_every_family_is_compared():
    assert {model_type for model_type, _ in CASES.values()} == {*FAMILIES}


@pytest.mark.parametrize("case", CASES)
def test_a_model_comes_and_goes_with_the_log_probabilities_of_transformers(tmp_path, case):
    """It goes as the first family that can express it, which need not be its own."""
    tokens, expected = save_theirs(tmp_path / "theirs", *CASES[case])
    assert np.std(expected) > 0.5
    config, vocab_size, params = from_hf(tmp_path / "theirs")
    at_once, cached = log_probabilities(config, vocab_size, params, tokens)
    np.testing.assert_allclose(at_once, expected, atol=1e-4)
    np.testing.assert_allclose(cached, expected, atol=1e-4)
    to_hf(config, vocab_size, params, tmp_path / "ours")
    again = log_probabilities_of_theirs(tmp_path / "ours", tokens)
    np.testing.assert_allclose(again, expected, atol=1e-4)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_key_that_a_file_does_not_have_is_what_transformers_takes(model_type):
    _, transformers = torch_and_transformers()
    default = transformers.AutoConfig.for_model(model_type)
    found = default.to_dict() | (getattr(default, "rope_parameters", None) or {})
    if "full_attention" in found:  # Gemma 3
        found |= found["full_attention"]
        found |= {"rope_local_base_freq": found["sliding_attention"]["rope_theta"]}
        found |= {"sliding_window_pattern": 1 + found["layer_types"].index("full_attention")}
    aliases = FAMILIES[model_type].aliases
    found |= {name: found[alias] for alias, name in aliases.items() if alias in found}
    # transformers writes out what follows from other keys.
    following = {"sliding_window"} if not found.get("use_sliding_window", True) else set()
    following |= {"rope_factor", "rope_original_length"}  # names of ours
    for key in FAMILIES[model_type].keys:
        if key.default is not None and not key.theirs.endswith(("pdrop", "dropout")):
            assert key.theirs in following or found[key.theirs] == key.default, key.theirs
