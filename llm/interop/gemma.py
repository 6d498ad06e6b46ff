"""Gemma 1, 2 and 3: their gains are 1 + weight, and their embedding grows by the root of its width.

Sources: transformers' configuration_*.py and modeling_*.py of each family (names, layouts,
defaults).
"""

from dataclasses import replace

from llm.interop.llama import (
    ATTENTION_BIAS,
    KINDS,
    LLAMA,
    LLAMA_KEYS,
    QK_NORMS,
    WINDOW,
    attention,
    ends,
    gated_mlp,
    norms,
)
from llm.interop.table import Key, Module, Pattern, with_defaults

# The embedding is multiplied by sqrt(D) where it is looked up, and not where it is the head.
GEMMA = replace(
    LLAMA,
    class_name="GemmaForCausalLM",
    modules=(
        *ends(),
        *norms(),
        *attention("attention_bias", "attention_bias"),
        *gated_mlp(False),
    ),
    keys=(
        *with_defaults(
            (key for key in LLAMA_KEYS if key.theirs != "hidden_act"),
            tie_word_embeddings=True,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=16,
            hidden_size=3072,
            head_dim=256,
            intermediate_size=24576,
            max_position_embeddings=8192,
        ),
        # "gelu" was written by mistake for the approximation.
        Key(
            "hidden_act",
            "activation",
            "gelu_pytorch_tanh",
            {"gelu_pytorch_tanh": "geglu", "gelu": "geglu"},
        ),
        ATTENTION_BIAS,
    ),
    factors={"embed": lambda described: described["hidden_size"] ** 0.5},
    gain_offset=1.0,
)

GEMMA2_MODULES = (
    *ends(),
    Module("layers.{}.input_layernorm", ["blocks.{}.attention_norm"]),
    Module("layers.{}.post_attention_layernorm", ["blocks.{}.attention_out_norm"]),
    Module("layers.{}.pre_feedforward_layernorm", ["blocks.{}.mlp_norm"]),
    Module("layers.{}.post_feedforward_layernorm", ["blocks.{}.mlp_out_norm"]),
    Module("norm", ["final_norm"]),
    *attention("attention_bias", "attention_bias"),
    *gated_mlp(False),
)
GEMMA2_FIXED = {
    "norm": "rmsnorm",
    "positions": "rotary",
    "n_expert": 1,
    "norm_place": "both",
    "qk_norm": False,
    "qk_norm_joint": False,
    "unrotated_every": 0,
    "rotary_fraction": 1.0,
    "block": "sequential",
    "head_bias": False,
}
GEMMA2 = replace(
    GEMMA,
    class_name="Gemma2ForCausalLM",
    modules=GEMMA2_MODULES,
    fixed={**GEMMA2_FIXED, "window_rope_theta": 0.0},
    keys=(
        *with_defaults(
            (key for key in GEMMA.keys if key.theirs != "hidden_act"),
            num_hidden_layers=26,
            num_attention_heads=8,
            num_key_value_heads=4,
            hidden_size=2304,
            intermediate_size=9216,
        ),
        Key(
            "hidden_activation",
            "activation",
            "gelu_pytorch_tanh",
            {"gelu_pytorch_tanh": "geglu"},
        ),
        Key("query_pre_attn_scalar", "head_size", 256.0, is_checked=False),
        Key("final_logit_softcapping", "logit_soft_cap", 30.0),
        Key("attn_logit_softcapping", "attention_soft_cap", 50.0),
        WINDOW,
    ),
    factors={
        **GEMMA.factors,
        "attention.query": lambda described: (
            (described["head_dim"] / described["query_pre_attn_scalar"]) ** 0.5
        ),
    },
    patterns=(
        Pattern("global_every", "layer_types", KINDS, lambda described, layer: layer % 2 == 1),
    ),
)

GEMMA3 = replace(
    GEMMA2,
    class_name="Gemma3ForCausalLM",
    modules=(
        *GEMMA2_MODULES,
        *QK_NORMS,
    ),
    fixed={**GEMMA2_FIXED, "qk_norm": True},
    keys=(
        *with_defaults(
            GEMMA2.keys,
            max_position_embeddings=131072,
            rope_theta=1e6,
            final_logit_softcapping=None,
            attn_logit_softcapping=None,
        ),
        Key("rope_local_base_freq", "window_rope_theta", 10000.0),
        Key("sliding_window_pattern", "", 6, is_checked=False),
    ),
    factors={
        **GEMMA.factors,
        "attention.query_norm": GEMMA2.factors["attention.query"],
    },
    patterns=(
        Pattern(
            "global_every",
            "layer_types",
            KINDS,
            lambda described, layer: (layer + 1) % described["sliding_window_pattern"] == 0,
        ),
    ),
)
