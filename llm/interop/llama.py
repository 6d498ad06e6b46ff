"""Llama and the families that name their weights as it does.

Sources: transformers' configuration_*.py and modeling_*.py of each family (names, layouts,
defaults).
"""

import re
from collections.abc import Callable
from dataclasses import replace

from llm.interop.table import Description, Family, Key, Module, Pattern, changed, with_defaults

QUERY, KEY, VALUE, OUT = (
    f"blocks.{{}}.attention.{part}" for part in ("query", "key", "value", "out")
)
GATE, UP, DOWN = (f"blocks.{{}}.mlp.{part}" for part in ("gate", "up", "down"))
GELUS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
DROPOUT = Key("attention_dropout", "", 0.0, is_checked=False)
WINDOW = Key("sliding_window", "window", 4096)
ANY_WINDOW = replace(WINDOW, default=None)
ALL_SLIDE = (Pattern("global_every", "", ("", ""), lambda described, layer: False),)
# Of rotary positions; old files hold them beside the weights.
FREQUENCIES = re.compile(r"\.rotary_emb\.inv_freq$")


ENDS = Module("embed_tokens", ["embed"], is_transposed=False), Module("lm_head", ["head"])


def norms(bias: bool = False) -> tuple[Module, ...]:
    return (
        Module("layers.{}.input_layernorm", ["blocks.{}.attention_norm"], bias),
        Module("layers.{}.post_attention_layernorm", ["blocks.{}.mlp_norm"], bias),
        Module("norm", ["final_norm"], bias),
    )


def attention(bias: bool | str = False, out: bool | str | None = None) -> tuple[Module, ...]:
    """Llama rotates the halves of a head against each other, as attention.rotate does."""
    biases = dict.fromkeys("qkv", bias) | {"o": bias if out is None else out}
    ours = zip(biases.items(), (QUERY, KEY, VALUE, OUT), strict=True)
    return tuple(Module(f"layers.{{}}.self_attn.{x}_proj", [name], b) for (x, b), name in ours)


def gated_mlp(bias: bool | str = False) -> tuple[Module, ...]:
    parts = {"gate": GATE, "up": UP, "down": DOWN}
    return tuple(Module(f"layers.{{}}.mlp.{x}_proj", [ours], bias) for x, ours in parts.items())


def global_layers(usual: Callable[[Description, int], bool]) -> tuple[Pattern, ...]:
    """The layers without a window, by a list of words; `usual` says which they are without it."""
    return (Pattern("global_every", "layer_types", ("full_attention", "sliding_attention"), usual),)


LLAMA_KEYS = (
    Key("tie_word_embeddings", "tie_embeddings", False),
    Key("initializer_range", "init_std", 0.02),
    Key("hidden_act", "activation", "silu", {"silu": "swiglu"}),
    Key("num_hidden_layers", "n_layer", 32),
    Key("num_attention_heads", "n_head", 32),
    Key("num_key_value_heads", "n_kv_head", None),
    Key("hidden_size", "d_model", 4096),
    Key("head_dim", "head_size", None),
    Key("intermediate_size", "d_ff", 11008),
    Key("max_position_embeddings", "context_length", 2048),
    Key("rms_norm_eps", "norm_epsilon", 1e-6),
    Key("rope_theta", "rope_theta", 10000.0),
    # As description.py finds them in rope_scaling and rope_parameters.
    Key(
        "rope_type",
        "rope_scaling",
        "default",
        {"default": "none"} | {kind: kind for kind in ("linear", "llama3", "yarn")},
    ),
    Key("rope_factor", "rope_factor", 1.0),
    Key("rope_original_length", "rope_original_length", 8192),
    DROPOUT,
)
# A family whose frequencies are never scaled.
PLAIN_ROPE = Key("rope_type", "rope_scaling", "default", {"default": "none"})
ATTENTION_BIAS = Key("attention_bias", "", False)
MLP_BIAS = Key("mlp_bias", "", False)

LLAMA = Family(
    class_name="LlamaForCausalLM",
    prefix="model.",
    modules=(*ENDS, *norms(), *attention("attention_bias"), *gated_mlp("mlp_bias")),
    keys=(*LLAMA_KEYS, ATTENTION_BIAS, MLP_BIAS),
    ignored=FREQUENCIES,
)

MISTRAL = replace(
    LLAMA,
    class_name="MistralForCausalLM",
    modules=(*ENDS, *norms(), *attention(), *gated_mlp()),
    keys=(*with_defaults(LLAMA_KEYS, n_kv_head=8, d_ff=14336, context_length=131072), WINDOW),
    patterns=ALL_SLIDE,
)


def experts(module: str, gate: str, up: str, down: str) -> tuple[Module, ...]:
    """A mixture's router and its experts, which have no biases."""
    parts = {gate: GATE, up: UP, down: DOWN}
    return (
        Module(f"layers.{{}}.{module}.gate", ["blocks.{}.mlp.router"]),
        *(
            Module(f"layers.{{}}.{module}.experts.{{expert}}.{x}", [ours])
            for x, ours in parts.items()
        ),
    )


QK_NORMS = (
    Module("layers.{}.self_attn.q_norm", ["blocks.{}.attention.query_norm"]),
    Module("layers.{}.self_attn.k_norm", ["blocks.{}.attention.key_norm"]),
)

MIXTRAL = replace(
    MISTRAL,
    class_name="MixtralForCausalLM",
    modules=(*ENDS, *norms(), *attention(), *experts("block_sparse_moe", "w1", "w3", "w2")),
    switches={"normalize_gates": True},
    keys=(
        *with_defaults(MISTRAL.keys, norm_epsilon=1e-5, rope_theta=1e6, window=None),
        Key("num_local_experts", "n_expert", 8),
        Key("num_experts_per_tok", "n_expert_active", 2),
    ),
    aliases={"num_experts": "num_local_experts"},
)

USE_WINDOW = Key("use_sliding_window", "", False, is_checked=False)
QWEN2 = replace(
    LLAMA,
    class_name="Qwen2ForCausalLM",
    modules=(*ENDS, *norms(), *attention(True, out=False), *gated_mlp()),
    keys=(
        *with_defaults(LLAMA_KEYS, n_kv_head=32, d_ff=22016, context_length=32768),
        WINDOW,
        USE_WINDOW,
        Key("max_window_layers", "", 28, is_checked=False),
    ),
    patterns=global_layers(lambda described, layer: layer < described["max_window_layers"]),
)

QWEN3 = replace(
    QWEN2,
    class_name="Qwen3ForCausalLM",
    modules=(*ENDS, *norms(), *attention("attention_bias"), *gated_mlp(), *QK_NORMS),
    switches={"qk_norm": True},
    keys=(*with_defaults(QWEN2.keys, head_size=128), ATTENTION_BIAS),
)

_MOE_KEYS = (
    Key("num_experts_per_tok", "n_expert_active", 8),
    Key("norm_topk_prob", "normalize_gates", False),
)
# Models in which every layer is a mixture.
QWEN3_MOE = replace(
    QWEN3,
    class_name="Qwen3MoeForCausalLM",
    modules=(
        *ENDS,
        *norms(),
        *attention("attention_bias"),
        *QK_NORMS,
        *experts("mlp", "gate_proj", "up_proj", "down_proj"),
    ),
    keys=(
        *changed(
            with_defaults(LLAMA_KEYS, n_layer=24, n_kv_head=4, d_model=2048, context_length=32768),
            Key("moe_intermediate_size", "d_ff", 768),
        ),
        WINDOW,
        USE_WINDOW,
        ATTENTION_BIAS,
        Key("decoder_sparse_step", "", 1),
        Key("mlp_only_layers", "", None),
        Key("num_experts", "n_expert", 128),
        *_MOE_KEYS,
    ),
    aliases={"num_local_experts": "num_experts"},
    patterns=ALL_SLIDE,
)

PHI3 = replace(
    MISTRAL,
    class_name="Phi3ForCausalLM",
    modules=(
        *ENDS,
        *norms(),
        Module("layers.{}.self_attn.qkv_proj", [QUERY, KEY, VALUE]),
        Module("layers.{}.self_attn.o_proj", [OUT]),
        Module("layers.{}.mlp.gate_up_proj", [GATE, UP]),
        Module("layers.{}.mlp.down_proj", [DOWN]),
    ),
    keys=changed(
        with_defaults(LLAMA_KEYS, d_model=3072, d_ff=8192, context_length=4096, norm_epsilon=1e-5),
        PLAIN_ROPE,
        ANY_WINDOW,
    ),
)

# OLMo 1's norms have neither gains nor biases, and its epsilon is no setting.
OLMO = replace(
    LLAMA,
    class_name="OlmoForCausalLM",
    modules=(*ENDS, *attention("attention_bias"), *gated_mlp()),
    switches={"norm": "layernorm", "norm_epsilon": 1e-5},
    keys=changed(LLAMA_KEYS, ATTENTION_BIAS, Key("clip_qkv", "", None), without="norm_epsilon"),
)

# OLMo 2 normalises what sub-layers give, and queries and keys over all heads.
OLMO2 = replace(
    LLAMA,
    class_name="Olmo2ForCausalLM",
    modules=(
        *ENDS,
        Module("layers.{}.post_attention_layernorm", ["blocks.{}.attention_out_norm"]),
        Module("layers.{}.post_feedforward_layernorm", ["blocks.{}.mlp_out_norm"]),
        Module("norm", ["final_norm"]),
        *attention("attention_bias"),
        *gated_mlp(),
        *QK_NORMS,
    ),
    switches={"qk_norm": True, "qk_norm_joint": True, "norm_place": "after"},
    keys=(*with_defaults(LLAMA_KEYS, norm_epsilon=1e-5), ATTENTION_BIAS),
)

OLMOE = replace(
    QWEN3_MOE,
    class_name="OlmoeForCausalLM",
    switches={"qk_norm": True, "qk_norm_joint": True},
    keys=(
        *with_defaults(
            OLMO2.keys, n_layer=16, n_head=16, d_model=2048, d_ff=2048, context_length=4096
        ),
        Key("clip_qkv", "", None),
        Key("num_experts", "n_expert", 64),
        *_MOE_KEYS,
    ),
    patterns=(),
)

STARCODER2 = replace(
    MISTRAL,
    class_name="Starcoder2ForCausalLM",
    modules=(
        *ENDS,
        *norms(bias=True),
        *attention("use_bias"),
        Module("layers.{}.mlp.c_fc", [UP], "use_bias"),
        Module("layers.{}.mlp.c_proj", [DOWN], "use_bias"),
    ),
    switches={"norm": "layernorm"},
    keys=changed(
        with_defaults(
            LLAMA_KEYS,
            tie_embeddings=True,
            init_std=0.018042,
            n_layer=30,
            n_head=24,
            n_kv_head=2,
            d_model=3072,
            d_ff=12288,
            context_length=4096,
        ),
        Key("hidden_act", "activation", "gelu_pytorch_tanh", GELUS),
        Key("norm_epsilon", "norm_epsilon", 1e-5),
        Key("use_bias", "", True),
        ANY_WINDOW,
    ),
)

GRANITE = replace(
    LLAMA,
    class_name="GraniteForCausalLM",
    keys=(
        *LLAMA.keys,
        Key("embedding_multiplier", "", 1.0, is_checked=False),
        Key("attention_multiplier", "", 1.0, is_checked=False),
        Key("residual_multiplier", "", 1.0, is_checked=False),
        Key("logits_scaling", "", 1.0, is_checked=False),
    ),
    factors={
        "embed": lambda described: described["embedding_multiplier"],
        "attention.query": lambda described: (
            described["attention_multiplier"] * described["head_dim"] ** 0.5
        ),
        "attention.out": lambda described: described["residual_multiplier"],
        "mlp.down": lambda described: described["residual_multiplier"],
        "final_norm": lambda described: 1 / described["logits_scaling"],
    },
)

# Llama whose every fourth layer has no positions.
SMOLLM3 = replace(
    LLAMA,
    class_name="SmolLM3ForCausalLM",
    keys=(
        *with_defaults(
            LLAMA.keys,
            tie_embeddings=True,
            n_layer=36,
            n_head=16,
            n_kv_head=4,
            d_model=2048,
            context_length=32768,
            rope_theta=2e6,
        ),
        ANY_WINDOW,
        USE_WINDOW,
        Key("no_rope_layer_interval", "", 4, is_checked=False),
    ),
    patterns=(
        Pattern(
            "unrotated_every",
            "no_rope_layers",
            (0, 1),
            lambda described, layer: (layer + 1) % described["no_rope_layer_interval"] == 0,
        ),
        # Without a list, the layers without positions would have the window.
        *global_layers(lambda described, layer: True),
    ),
)
LLAMAS = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "qwen3": QWEN3,
    "qwen2": QWEN2,
    "phi3": PHI3,
    "olmo": OLMO,
    "olmo2": OLMO2,
    "olmoe": OLMOE,
    "qwen3_moe": QWEN3_MOE,
    "starcoder2": STARCODER2,
    "granite": GRANITE,
    "smollm3": SMOLLM3,
}
