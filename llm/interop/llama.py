"""Llama and the families that name their weights as it does.

Sources: transformers' configuration_*.py and modeling_*.py of each family (names, layouts,
defaults).
"""

import re
from dataclasses import replace

from llm.interop.table import Family, Key, Module, Pattern, with_defaults

QUERY, KEY, VALUE, OUT = (
    f"blocks.{{}}.attention.{part}" for part in ("query", "key", "value", "out")
)
GATE, UP, DOWN = (f"blocks.{{}}.mlp.{part}" for part in ("gate", "up", "down"))
# Switches that most families do not have.
NO_EXTRAS = {
    "qk_norm": False,
    "qk_norm_joint": False,
    "norm_place": "before",
    "logit_soft_cap": 0.0,
    "attention_soft_cap": 0.0,
    "unrotated_every": 0,
    "window_rope_theta": 0.0,
    "rotary_fraction": 1.0,
    "block": "sequential",
    "head_bias": False,
}
NO_WINDOW = {"window": 0, "global_every": 0}
ROTARY = {"positions": "rotary", "n_expert": 1, **NO_EXTRAS}
GELUS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
DROPOUT = Key("attention_dropout", "", 0.0, is_checked=False)
WINDOW = Key("sliding_window", "window", 4096)
ALL_SLIDE = (Pattern("global_every", "", ("", ""), lambda described, layer: False),)
KINDS = ("full_attention", "sliding_attention")
# Of rotary positions; old files hold them beside the weights.
FREQUENCIES = re.compile(r"\.rotary_emb\.inv_freq$")


def ends() -> tuple[Module, ...]:
    return Module("embed_tokens", ["embed"], is_transposed=False), Module("lm_head", ["head"])


def norms(bias: bool | str = False) -> tuple[Module, ...]:
    return (
        Module("layers.{}.input_layernorm", ["blocks.{}.attention_norm"], bias),
        Module("layers.{}.post_attention_layernorm", ["blocks.{}.mlp_norm"], bias),
        Module("norm", ["final_norm"], bias),
    )


def attention(bias: bool | str, out_bias: bool | str) -> tuple[Module, ...]:
    """Llama rotates the halves of a head against each other, as attention.rotate does."""
    parts = {"q": QUERY, "k": KEY, "v": VALUE, "o": OUT}
    return tuple(
        Module(f"layers.{{}}.self_attn.{x}_proj", [ours], out_bias if x == "o" else bias)
        for x, ours in parts.items()
    )


def gated_mlp(bias: bool | str) -> tuple[Module, ...]:
    parts = {"gate": GATE, "up": UP, "down": DOWN}
    return tuple(Module(f"layers.{{}}.mlp.{x}_proj", [ours], bias) for x, ours in parts.items())


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
ATTENTION_BIAS = Key("attention_bias", "", False)
MLP_BIAS = Key("mlp_bias", "", False)

LLAMA = Family(
    class_name="LlamaForCausalLM",
    prefix="model.",
    modules=(
        *ends(),
        *norms(),
        *attention("attention_bias", "attention_bias"),
        *gated_mlp("mlp_bias"),
    ),
    fixed={"norm": "rmsnorm", **ROTARY, **NO_WINDOW},
    keys=(*LLAMA_KEYS, ATTENTION_BIAS, MLP_BIAS),
    ignored=FREQUENCIES,
)

MISTRAL = replace(
    LLAMA,
    class_name="MistralForCausalLM",
    modules=(*ends(), *norms(), *attention(False, False), *gated_mlp(False)),
    fixed={"norm": "rmsnorm", **ROTARY},
    keys=(
        *with_defaults(
            LLAMA_KEYS,
            num_key_value_heads=8,
            intermediate_size=14336,
            max_position_embeddings=131072,
        ),
        WINDOW,
    ),
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
    modules=(
        *ends(),
        *norms(),
        *attention(False, False),
        *experts("block_sparse_moe", "w1", "w3", "w2"),
    ),
    fixed={"norm": "rmsnorm", "positions": "rotary", "normalize_gates": True, **NO_EXTRAS},
    keys=(
        *with_defaults(MISTRAL.keys, rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=None),
        Key("num_local_experts", "n_expert", 8),
        Key("num_experts_per_tok", "n_expert_active", 2),
    ),
    aliases={"num_experts": "num_local_experts"},
)

QWEN_KEYS = (
    *with_defaults(
        LLAMA_KEYS,
        num_key_value_heads=32,
        intermediate_size=22016,
        max_position_embeddings=32768,
    ),
    WINDOW,
    Key("use_sliding_window", "", False, is_checked=False),
    Key("max_window_layers", "", 28, is_checked=False),
)
QWEN2 = replace(
    LLAMA,
    class_name="Qwen2ForCausalLM",
    modules=(*ends(), *norms(), *attention(True, False), *gated_mlp(False)),
    fixed=MISTRAL.fixed,
    keys=QWEN_KEYS,
    patterns=(
        Pattern(
            "global_every",
            "layer_types",
            KINDS,
            lambda described, layer: layer < described["max_window_layers"],
        ),
    ),
)

QWEN3 = replace(
    QWEN2,
    class_name="Qwen3ForCausalLM",
    modules=(
        *ends(),
        *norms(),
        *attention("attention_bias", "attention_bias"),
        *gated_mlp(False),
        *QK_NORMS,
    ),
    fixed={**MISTRAL.fixed, "qk_norm": True},
    keys=(*with_defaults(QWEN_KEYS, head_dim=128), ATTENTION_BIAS),
)

_MOE_FIXED = {name: value for name, value in QWEN3.fixed.items() if name != "n_expert"}
_MOE_KEYS = (
    Key("num_experts_per_tok", "n_expert_active", 8),
    Key("norm_topk_prob", "normalize_gates", False),
)
# Models in which every layer is a mixture.
QWEN3_MOE = replace(
    QWEN3,
    class_name="Qwen3MoeForCausalLM",
    modules=(
        *ends(),
        *norms(),
        *attention("attention_bias", "attention_bias"),
        *QK_NORMS,
        *experts("mlp", "gate_proj", "up_proj", "down_proj"),
    ),
    fixed=_MOE_FIXED,
    keys=(
        *with_defaults(
            (key for key in LLAMA_KEYS if key.theirs != "intermediate_size"),
            num_hidden_layers=24,
            num_key_value_heads=4,
            hidden_size=2048,
            max_position_embeddings=32768,
        ),
        WINDOW,
        Key("use_sliding_window", "", False, is_checked=False),
        ATTENTION_BIAS,
        Key("moe_intermediate_size", "d_ff", 768),
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
        *ends(),
        *norms(),
        Module("layers.{}.self_attn.qkv_proj", [QUERY, KEY, VALUE]),
        Module("layers.{}.self_attn.o_proj", [OUT]),
        Module("layers.{}.mlp.gate_up_proj", [GATE, UP]),
        Module("layers.{}.mlp.down_proj", [DOWN]),
    ),
    keys=with_defaults(
        (
            replace(key, spellings={"default": "none"}) if key.theirs == "rope_type" else key
            for key in MISTRAL.keys
        ),
        num_key_value_heads=None,
        hidden_size=3072,
        intermediate_size=8192,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        sliding_window=None,
    ),
)

# OLMo 1's norms have neither gains nor biases, and its epsilon is no setting.
OLMO = replace(
    LLAMA,
    class_name="OlmoForCausalLM",
    modules=(*ends(), *attention("attention_bias", "attention_bias"), *gated_mlp(False)),
    fixed={"norm": "layernorm", "norm_epsilon": 1e-5, **ROTARY, **NO_WINDOW},
    keys=(
        *(key for key in LLAMA_KEYS if key.theirs != "rms_norm_eps"),
        ATTENTION_BIAS,
        Key("clip_qkv", "", None),
    ),
)

# OLMo 2 normalises what sub-layers give, and queries and keys over all heads.
OLMO2 = replace(
    LLAMA,
    class_name="Olmo2ForCausalLM",
    modules=(
        *ends(),
        Module("layers.{}.post_attention_layernorm", ["blocks.{}.attention_out_norm"]),
        Module("layers.{}.post_feedforward_layernorm", ["blocks.{}.mlp_out_norm"]),
        Module("norm", ["final_norm"]),
        *attention("attention_bias", "attention_bias"),
        *gated_mlp(False),
        *QK_NORMS,
    ),
    fixed={**LLAMA.fixed, "qk_norm": True, "qk_norm_joint": True, "norm_place": "after"},
    keys=(*with_defaults(LLAMA_KEYS, rms_norm_eps=1e-5), ATTENTION_BIAS),
)

OLMOE = replace(
    QWEN3_MOE,
    class_name="OlmoeForCausalLM",
    fixed={**_MOE_FIXED, **NO_WINDOW, "qk_norm_joint": True},
    keys=(
        *with_defaults(
            LLAMA_KEYS,
            num_hidden_layers=16,
            num_attention_heads=16,
            hidden_size=2048,
            intermediate_size=2048,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
        ),
        ATTENTION_BIAS,
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
        *ends(),
        *norms(bias=True),
        *attention("use_bias", "use_bias"),
        Module("layers.{}.mlp.c_fc", [UP], "use_bias"),
        Module("layers.{}.mlp.c_proj", [DOWN], "use_bias"),
    ),
    fixed={"norm": "layernorm", **ROTARY},
    keys=(
        *with_defaults(
            (key for key in LLAMA_KEYS if key.theirs not in ("rms_norm_eps", "hidden_act")),
            tie_word_embeddings=True,
            initializer_range=0.018042,
            num_hidden_layers=30,
            num_attention_heads=24,
            num_key_value_heads=2,
            hidden_size=3072,
            intermediate_size=12288,
            max_position_embeddings=4096,
        ),
        Key("hidden_act", "activation", "gelu_pytorch_tanh", GELUS),
        Key("norm_epsilon", "norm_epsilon", 1e-5),
        Key("use_bias", "", True),
        replace(WINDOW, default=None),
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
    fixed={name: value for name, value in MISTRAL.fixed.items() if name != "unrotated_every"},
    keys=(
        *with_defaults(
            LLAMA_KEYS,
            tie_word_embeddings=True,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=4,
            hidden_size=2048,
            max_position_embeddings=32768,
            rope_theta=2e6,
        ),
        ATTENTION_BIAS,
        MLP_BIAS,
        replace(WINDOW, default=None),
        Key("use_sliding_window", "", False, is_checked=False),
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
        Pattern("global_every", "layer_types", KINDS, lambda described, layer: True),
    ),
)
