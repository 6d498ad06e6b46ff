"""The families of Hugging Face models that can be read and written: one table entry for each.

An entry says where each weight goes and what each key of config.json is here. hf.py reads the
tables in both directions, so a new family is a new entry in FAMILIES and no new code.

Sources: transformers' configuration_*.py and modeling_*.py of each family (names, layouts,
defaults).
"""

import re
from dataclasses import replace

from llm.interop.gemma import GEMMAS
from llm.interop.llama import (
    DOWN,
    DROPOUT,
    FREQUENCIES,
    GELUS,
    KEY,
    LLAMA_KEYS,
    LLAMAS,
    OUT,
    PLAIN_ROPE,
    QUERY,
    UP,
    VALUE,
)
from llm.interop.table import Family, Key, Module, changed, with_defaults

# Old files hold it beside the weights.
_CAUSAL_MASK = re.compile(r"\.attn\.(masked_)?bias$")
# GPT-2's names, which older families know beside those that came later.
_OLDER_NAMES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def _gpt2(is_transposed: bool) -> tuple[Module, ...]:
    """GPT-2's modules. Its Conv1D stores [in, out], as we do; torch's Linear does not."""
    return (
        Module("wte", ["embed"], is_transposed=False),
        Module("wpe", ["embed.position"], is_transposed=False),
        Module("h.{}.ln_1", ["blocks.{}.attention_norm"], True),
        Module("h.{}.attn.c_attn", [QUERY, KEY, VALUE], True, is_transposed),
        Module("h.{}.attn.c_proj", [OUT], True, is_transposed),
        Module("h.{}.ln_2", ["blocks.{}.mlp_norm"], True),
        Module("h.{}.mlp.c_fc", [UP], True, is_transposed),
        Module("h.{}.mlp.c_proj", [DOWN], True, is_transposed),
        Module("ln_f", ["final_norm"], True),
        Module("lm_head", ["head"]),
    )


_GPT2_KEYS = (
    Key("tie_word_embeddings", "tie_embeddings", True),
    Key("initializer_range", "init_std", 0.02),
    Key("scale_attn_weights", "", True),
    Key("add_cross_attention", "", False),
    Key("n_layer", "n_layer", 12),
    Key("n_head", "n_head", 12),
    Key("n_embd", "d_model", 768),
    Key("n_inner", "d_ff", None),
    Key("n_positions", "context_length", 1024),
    Key("layer_norm_epsilon", "norm_epsilon", 1e-5),
    Key("activation_function", "activation", "gelu_new", GELUS),
    Key("resid_pdrop", "", 0.0, is_checked=False),
    Key("embd_pdrop", "", 0.0, is_checked=False),
    Key("attn_pdrop", "", 0.0, is_checked=False),
)

_GPT2 = Family(
    class_name="GPT2LMHeadModel",
    prefix="transformer.",
    modules=_gpt2(is_transposed=False),
    switches={"positions": "learned", "norm": "layernorm"},
    keys=(
        *_GPT2_KEYS,
        Key("n_head", "n_kv_head", 12),
        Key("scale_attn_by_inverse_layer_idx", "", False),
    ),
    ignored=_CAUSAL_MASK,
    aliases=_OLDER_NAMES,
)

# Keys of Pythia and Phi, whose heads are turned in part.
_PARTLY_ROTARY = changed(
    LLAMA_KEYS,
    PLAIN_ROPE,
    Key("hidden_act", "activation", "gelu", {**GELUS, "relu": "relu"}),
    Key("layer_norm_eps", "norm_epsilon", 1e-5),
    Key("partial_rotary_factor", "rotary_fraction", 0.25),
    without="head_size",
)

# StarCoder 1: a GPT-2 of one key/value head.
_GPT_BIGCODE = replace(
    _GPT2,
    class_name="GPTBigCodeForCausalLM",
    modules=_gpt2(is_transposed=True),
    switches={**_GPT2.switches, "n_kv_head": 1},
    keys=(
        *with_defaults(_GPT2_KEYS, activation="gelu_pytorch_tanh"),
        Key("multi_query", "", True),
    ),
)

# Pythia. Queries, keys and values lie side by side head by head.
_GPT_NEOX = Family(
    class_name="GPTNeoXForCausalLM",
    prefix="gpt_neox.",
    head="embed_out",
    modules=(
        Module("embed_in", ["embed"], is_transposed=False),
        Module("layers.{}.input_layernorm", ["blocks.{}.attention_norm"], True),
        Module(
            "layers.{}.attention.query_key_value",
            [QUERY, KEY, VALUE],
            "attention_bias",
            is_by_head=True,
        ),
        Module("layers.{}.attention.dense", [OUT], "attention_bias"),
        Module("layers.{}.post_attention_layernorm", ["blocks.{}.mlp_norm"], True),
        Module("layers.{}.mlp.dense_h_to_4h", [UP], True),
        Module("layers.{}.mlp.dense_4h_to_h", [DOWN], True),
        Module("final_layer_norm", ["final_norm"], True),
        Module("embed_out", ["head"]),
    ),
    switches={"norm": "layernorm"},
    keys=changed(
        with_defaults(_PARTLY_ROTARY, n_layer=44, n_head=64, d_model=6144, d_ff=24576),
        Key("num_attention_heads", "n_kv_head", 64),
        Key("use_parallel_residual", "block", True, {True: "parallel", False: "sequential"}),
        Key("attention_bias", "", True),
    ),
    ignored=re.compile(r"\.(rotary_emb\.inv_freq|attention\.(masked_)?bias)$"),
    aliases={"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"},
)

# Phi 1 and 2: one norm is read by attention and by the MLP, and the head has a bias.
_PHI = Family(
    class_name="PhiForCausalLM",
    prefix="model.",
    modules=(
        Module("embed_tokens", ["embed"], is_transposed=False),
        Module("layers.{}.input_layernorm", ["blocks.{}.attention_norm"], True),
        Module("layers.{}.self_attn.q_proj", [QUERY], True),
        Module("layers.{}.self_attn.k_proj", [KEY], True),
        Module("layers.{}.self_attn.v_proj", [VALUE], True),
        Module("layers.{}.self_attn.dense", [OUT], True),
        Module("layers.{}.mlp.fc1", [UP], True),
        Module("layers.{}.mlp.fc2", [DOWN], True),
        Module("final_layernorm", ["final_norm"], True),
        Module("lm_head", ["head"], True),
    ),
    switches={"norm": "layernorm", "block": "parallel_one_norm", "head_bias": True},
    keys=(
        *with_defaults(
            _PARTLY_ROTARY,
            n_layer=24,
            d_model=2048,
            d_ff=8192,
            activation="gelu_new",
            rotary_fraction=0.5,
        ),
        Key("qk_layernorm", "", False),
    ),
    ignored=FREQUENCIES,
)

# OPT counts positions from 2.
_OPT = Family(
    class_name="OPTForCausalLM",
    prefix="model.decoder.",
    modules=(
        Module("embed_tokens", ["embed"], is_transposed=False),
        Module("embed_positions", ["embed.position"], is_transposed=False, unused_rows=2),
        Module("layers.{}.self_attn_layer_norm", ["blocks.{}.attention_norm"], True),
        Module("layers.{}.self_attn.q_proj", [QUERY], "enable_bias"),
        Module("layers.{}.self_attn.k_proj", [KEY], "enable_bias"),
        Module("layers.{}.self_attn.v_proj", [VALUE], "enable_bias"),
        Module("layers.{}.self_attn.out_proj", [OUT], "enable_bias"),
        Module("layers.{}.final_layer_norm", ["blocks.{}.mlp_norm"], True),
        Module("layers.{}.fc1", [UP], "enable_bias"),
        Module("layers.{}.fc2", [DOWN], "enable_bias"),
        Module("final_layer_norm", ["final_norm"], True),
        Module("lm_head", ["head"]),
    ),
    switches={**_GPT2.switches, "norm_epsilon": 1e-5},
    keys=(
        Key("tie_word_embeddings", "tie_embeddings", True),
        Key("init_std", "init_std", 0.02),
        Key("num_hidden_layers", "n_layer", 12),
        Key("num_attention_heads", "n_head", 12),
        Key("num_attention_heads", "n_kv_head", 12),
        Key("hidden_size", "d_model", 768),
        Key("word_embed_proj_dim", "d_model", 768),
        Key("ffn_dim", "d_ff", 3072),
        Key("max_position_embeddings", "context_length", 2048),
        Key("activation_function", "activation", "relu", {"relu": "relu", **GELUS}),
        Key("enable_bias", "", True),
        Key("do_layer_norm_before", "", True),
        Key("_remove_final_layer_norm", "", False),
        Key("layer_norm_elementwise_affine", "", True),
        Key("dropout", "", 0.1, is_checked=False),
        DROPOUT,
    ),
    ignored=_CAUSAL_MASK,
)

# model_type -> family. A model that several can express is written as the first of them.
FAMILIES = {
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT_BIGCODE,
    **LLAMAS,
    "gpt_neox": _GPT_NEOX,
    "phi": _PHI,
    "opt": _OPT,
    **GEMMAS,
}
