"""Gemma 1, 2 and 3: their gains are 1 + weight, and their embedding grows by the root of its width.

Sources: transformers' configuration_*.py and modeling_*.py of each family (names, layouts,
defaults).
"""

from dataclasses import replace

from llm.interop.llama import (
    ATTENTION_BIAS,
    ENDS,
    LLAMA,
    LLAMA_KEYS,
    QK_NORMS,
    WINDOW,
    attention,
    gated_mlp,
    global_layers,
    norms,
)
from llm.interop.table import Key, Module, changed, with_defaults

GATED = {"gelu_pytorch_tanh": "geglu"}
# The embedding is multiplied by sqrt(D) where it is looked up, and not where it is the head.
GEMMA = replace(
    LLAMA,
    class_name="GemmaForCausalLM",
    modules=(*ENDS, *norms(), *attention("attention_bias"), *gated_mlp()),
    keys=changed(
        with_defaults(
            LLAMA_KEYS,
            tie_embeddings=True,
            n_layer=28,
            n_head=16,
            n_kv_head=16,
            d_model=3072,
            head_size=256,
            d_ff=24576,
            context_length=8192,
        ),
        # "gelu" was written by mistake for the approximation.
        Key("hidden_act", "activation", "gelu_pytorch_tanh", {**GATED, "gelu": "geglu"}),
        ATTENTION_BIAS,
    ),
    factors={"embed": lambda described: described["hidden_size"] ** 0.5},
    gain_offset=1.0,
)

GEMMA2 = replace(
    GEMMA,
    class_name="Gemma2ForCausalLM",
    modules=(
        *ENDS,
        Module("layers.{}.input_layernorm", ["blocks.{}.attention_norm"]),
        Module("layers.{}.post_attention_layernorm", ["blocks.{}.attention_out_norm"]),
        Module("layers.{}.pre_feedforward_layernorm", ["blocks.{}.mlp_norm"]),
        Module("layers.{}.post_feedforward_layernorm", ["blocks.{}.mlp_out_norm"]),
        Module("norm", ["final_norm"]),
        *attention("attention_bias"),
        *gated_mlp(),
    ),
    switches={"norm_place": "both"},
    keys=(
        *changed(
            with_defaults(GEMMA.keys, n_layer=26, n_head=8, n_kv_head=4, d_model=2304, d_ff=9216),
            Key("hidden_activation", "activation", "gelu_pytorch_tanh", GATED),
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
    patterns=global_layers(lambda described, layer: layer % 2 == 1),
)

_NO_CAPS = {"logit_soft_cap": None, "attention_soft_cap": None}
GEMMA3 = replace(
    GEMMA2,
    class_name="Gemma3ForCausalLM",
    modules=(*GEMMA2.modules, *QK_NORMS),
    switches={"norm_place": "both", "qk_norm": True},
    keys=(
        *with_defaults(GEMMA2.keys, context_length=131072, rope_theta=1e6, **_NO_CAPS),
        Key("rope_local_base_freq", "window_rope_theta", 10000.0),
        Key("sliding_window_pattern", "", 6, is_checked=False),
    ),
    factors={**GEMMA.factors, "attention.query_norm": GEMMA2.factors["attention.query"]},
    patterns=global_layers(
        lambda described, layer: (layer + 1) % described["sliding_window_pattern"] == 0
    ),
)

GEMMAS = {"gemma": GEMMA, "gemma2": GEMMA2, "gemma3_text": GEMMA3}
