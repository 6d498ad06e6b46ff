"""The families of Hugging Face models that can be read and written: one table entry for each.

An entry says where each weight goes and what each key of config.json is here. llm/interop/hf.py
reads the tables in both directions, so a new family is a new entry in FAMILIES and no new code.

Sources: transformers' configuration_*.py and modeling_*.py of each family (names, layouts,
defaults).
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

# The content of config.json, with a value for each key that the family has.
Description = Mapping[str, Any]


@dataclass(frozen=True)
class Module:
    """A module of theirs, and the modules of ours whose parameters it holds.

    Their `weight` is our `weight` or `scale`, and their `bias` is our `bias`.

    Attributes:
      theirs: its name in the state dict, without the family's prefix. `{}` stands for the layer. A
        name with `{expert}` stands for one module of each expert; here the experts share one.
      ours: the modules' names here, or the name of one parameter. The arrays of several lie side by
        side along the last dimension of the one array there.
      bias: whether the module has a bias there, or the key of config.json that says so.
      is_transposed: a matrix is [out, in] there, as in torch's Linear, and [in, out] here.
    """

    theirs: str
    ours: Sequence[str]
    bias: bool | str = False
    is_transposed: bool = True

    def has_bias(self, described: Description) -> bool:
        return bool(described[self.bias] if isinstance(self.bias, str) else self.bias)


@dataclass(frozen=True)
class Key:
    """One key of config.json.

    Attributes:
      theirs: its name.
      ours: the setting or property of ModelConfig that it is. Empty: we have no such setting, and
        the default is the one value that can be represented.
      default: what transformers takes if the file does not have the key.
      spellings: each value that the file can have -> our value. Empty: the values are the same.
      is_checked: false for a key without a setting here that may have any value: it means nothing
        to us, such as dropout, or the family's own functions read it.
    """

    theirs: str
    ours: str
    default: Any
    spellings: Mapping[str, str] = field(default_factory=dict)
    is_checked: bool = True


@dataclass(frozen=True)
class Pattern:
    """Layers that differ from the others: here each n-th, there a list with a word for each layer.

    Attributes:
      ours: the setting that is n, or 0 if no layer differs.
      theirs: the list's name. Empty: transformers reads no list in this family.
      words: what the list has for a layer that differs, and for any other.
      usual: whether a layer differs, if the file has no list.
    """

    ours: str
    theirs: str
    words: tuple[Any, Any]
    usual: Callable[[Description, int], bool]


@dataclass(frozen=True)
class Family:
    """A kind of model in transformers.

    A parameter of ours that no module holds is neutral in each model of the family: a bias of
    zeros, or a gain of ones.

    Attributes:
      class_name: its class with a language modelling head.
      prefix: the beginning of every weight's name but lm_head's. Old GPT-2 files leave it out.
      fixed: settings of ModelConfig that every model of the family has at this value.
      keys: of config.json, in the order in which they are written. Two keys of one setting must
        agree, and so must two settings of one key.
      ignored: the names of arrays in old files that are no parameters.
      aliases: other names that transformers knows for a key.
      factors: a module of ours, without its block -> what transformers multiplies its output by.
        Here the factor is part of the module's weights.
      patterns: of layers.
      gain_offset: what transformers adds to each norm's gain.
    """

    class_name: str
    prefix: str
    modules: Sequence[Module]
    fixed: Mapping[str, Any]
    keys: Sequence[Key]
    ignored: re.Pattern[str]
    aliases: Mapping[str, str] = field(default_factory=dict)
    factors: Mapping[str, Callable[[Description], float]] = field(default_factory=dict)
    patterns: Sequence[Pattern] = ()
    gain_offset: float = 0.0


# Keys that change what any model computes. They are checked in each file, unless the family has a
# meaning for them, and never written.
KEYS_OF_ANY = (
    Key("quantization_config", "", None),
    Key("pruned_heads", "", None),
    Key("sliding_window", "", None),
    Key("is_encoder_decoder", "", False),
    Key("attention_bias", "", False),
    Key("mlp_bias", "", False),
    Key("rope_type", "", "default"),
    Key("partial_rotary_factor", "", 1.0),
    Key("use_bidirectional_attention", "", None),
)

_QUERY, _KEY, _VALUE, _OUT = (
    f"blocks.{{}}.attention.{part}" for part in ("query", "key", "value", "out")
)
_GATE, _UP, _DOWN = (f"blocks.{{}}.mlp.{part}" for part in ("gate", "up", "down"))
# Switches that most families do not have.
_NO_EXTRAS = {
    "qk_norm": False,
    "norm_place": "before",
    "logit_soft_cap": 0.0,
    "attention_soft_cap": 0.0,
    "unrotated_every": 0,
    "window_rope_theta": 0.0,
}
_NO_WINDOW = {"window": 0, "global_every": 0}
_ROTARY = {"positions": "rotary", "n_expert": 1, **_NO_EXTRAS}
_GELUS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_DROPOUT = Key("attention_dropout", "", 0.0, is_checked=False)
_WINDOW = Key("sliding_window", "window", 4096)
_ALL_SLIDE = (Pattern("global_every", "", ("", ""), lambda described, layer: False),)
_KINDS = ("full_attention", "sliding_attention")
_CAUSAL_MASK = re.compile(r"\.attn\.(masked_)?bias$")  # old files hold it beside the weights
_FREQUENCIES = re.compile(r"\.rotary_emb\.inv_freq$")  # and those of rotary positions
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
        Module("h.{}.attn.c_attn", [_QUERY, _KEY, _VALUE], True, is_transposed),
        Module("h.{}.attn.c_proj", [_OUT], True, is_transposed),
        Module("h.{}.ln_2", ["blocks.{}.mlp_norm"], True),
        Module("h.{}.mlp.c_fc", [_UP], True, is_transposed),
        Module("h.{}.mlp.c_proj", [_DOWN], True, is_transposed),
        Module("ln_f", ["final_norm"], True),
        Module("lm_head", ["head"]),
    )


def _ends() -> tuple[Module, ...]:
    return Module("embed_tokens", ["embed"], is_transposed=False), Module("lm_head", ["head"])


def _norms(bias: bool | str = False) -> tuple[Module, ...]:
    return (
        Module("layers.{}.input_layernorm", ["blocks.{}.attention_norm"], bias),
        Module("layers.{}.post_attention_layernorm", ["blocks.{}.mlp_norm"], bias),
        Module("norm", ["final_norm"], bias),
    )


def _attention(bias: bool | str, out_bias: bool | str) -> tuple[Module, ...]:
    """Llama rotates the halves of a head against each other, as attention.rotate does."""
    parts = {"q": _QUERY, "k": _KEY, "v": _VALUE, "o": _OUT}
    return tuple(
        Module(f"layers.{{}}.self_attn.{x}_proj", [ours], out_bias if x == "o" else bias)
        for x, ours in parts.items()
    )


def _gated_mlp(bias: bool | str) -> tuple[Module, ...]:
    parts = {"gate": _GATE, "up": _UP, "down": _DOWN}
    return tuple(Module(f"layers.{{}}.mlp.{x}_proj", [ours], bias) for x, ours in parts.items())


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
    Key("activation_function", "activation", "gelu_new", _GELUS),
    Key("resid_pdrop", "", 0.0, is_checked=False),
    Key("embd_pdrop", "", 0.0, is_checked=False),
    Key("attn_pdrop", "", 0.0, is_checked=False),
)
_LLAMA_KEYS = (
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
    _DROPOUT,
)
_ATTENTION_BIAS = Key("attention_bias", "", False)
_MLP_BIAS = Key("mlp_bias", "", False)


def _with(keys: Iterable[Key], **defaults: Any) -> tuple[Key, ...]:
    """The keys, some with other defaults."""
    return tuple(replace(key, default=defaults.get(key.theirs, key.default)) for key in keys)


_GPT2 = Family(
    class_name="GPT2LMHeadModel",
    prefix="transformer.",
    modules=_gpt2(is_transposed=False),
    fixed={
        "positions": "learned",
        "norm": "layernorm",
        "n_expert": 1,
        **_NO_EXTRAS,
        **_NO_WINDOW,
    },
    keys=(
        *_GPT2_KEYS,
        Key("n_head", "n_kv_head", 12),
        Key("scale_attn_by_inverse_layer_idx", "", False),
    ),
    ignored=_CAUSAL_MASK,
    aliases=_OLDER_NAMES,
)

# StarCoder 1: a GPT-2 of one key/value head.
_GPT_BIGCODE = replace(
    _GPT2,
    class_name="GPTBigCodeForCausalLM",
    modules=_gpt2(is_transposed=True),
    fixed={**_GPT2.fixed, "n_kv_head": 1},
    keys=(
        *_with(_GPT2_KEYS, activation_function="gelu_pytorch_tanh"),
        Key("multi_query", "", True),
    ),
)

_LLAMA = Family(
    class_name="LlamaForCausalLM",
    prefix="model.",
    modules=(
        *_ends(),
        *_norms(),
        *_attention("attention_bias", "attention_bias"),
        *_gated_mlp("mlp_bias"),
    ),
    fixed={"norm": "rmsnorm", **_ROTARY, **_NO_WINDOW},
    keys=(*_LLAMA_KEYS, _ATTENTION_BIAS, _MLP_BIAS),
    ignored=_FREQUENCIES,
)

_MISTRAL = replace(
    _LLAMA,
    class_name="MistralForCausalLM",
    modules=(*_ends(), *_norms(), *_attention(False, False), *_gated_mlp(False)),
    fixed={"norm": "rmsnorm", **_ROTARY},
    keys=(
        *_with(
            _LLAMA_KEYS,
            num_key_value_heads=8,
            intermediate_size=14336,
            max_position_embeddings=131072,
        ),
        _WINDOW,
    ),
    patterns=_ALL_SLIDE,
)

_MIXTRAL = replace(
    _MISTRAL,
    class_name="MixtralForCausalLM",
    modules=(
        *_ends(),
        *_norms(),
        *_attention(False, False),
        Module("layers.{}.block_sparse_moe.gate", ["blocks.{}.mlp.router"]),
        Module("layers.{}.block_sparse_moe.experts.{expert}.w1", [_GATE]),
        Module("layers.{}.block_sparse_moe.experts.{expert}.w3", [_UP]),
        Module("layers.{}.block_sparse_moe.experts.{expert}.w2", [_DOWN]),
    ),
    fixed={"norm": "rmsnorm", "positions": "rotary", "normalize_gates": True, **_NO_EXTRAS},
    keys=(
        *_with(_MISTRAL.keys, rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=None),
        Key("num_local_experts", "n_expert", 8),
        Key("num_experts_per_tok", "n_expert_active", 2),
    ),
    aliases={"num_experts": "num_local_experts"},
)

_QWEN_KEYS = (
    *_with(
        _LLAMA_KEYS,
        num_key_value_heads=32,
        intermediate_size=22016,
        max_position_embeddings=32768,
    ),
    _WINDOW,
    Key("use_sliding_window", "", False, is_checked=False),
    Key("max_window_layers", "", 28, is_checked=False),
)
_QWEN2 = replace(
    _LLAMA,
    class_name="Qwen2ForCausalLM",
    modules=(*_ends(), *_norms(), *_attention(True, False), *_gated_mlp(False)),
    fixed=_MISTRAL.fixed,
    keys=_QWEN_KEYS,
    patterns=(
        Pattern(
            "global_every",
            "layer_types",
            _KINDS,
            lambda described, layer: layer < described["max_window_layers"],
        ),
    ),
)

_QWEN3 = replace(
    _QWEN2,
    class_name="Qwen3ForCausalLM",
    modules=(
        *_ends(),
        *_norms(),
        *_attention("attention_bias", "attention_bias"),
        *_gated_mlp(False),
        Module("layers.{}.self_attn.q_norm", ["blocks.{}.attention.query_norm"]),
        Module("layers.{}.self_attn.k_norm", ["blocks.{}.attention.key_norm"]),
    ),
    fixed={**_MISTRAL.fixed, "qk_norm": True},
    keys=(*_with(_QWEN_KEYS, head_dim=128), _ATTENTION_BIAS),
)

_PHI3 = replace(
    _MISTRAL,
    class_name="Phi3ForCausalLM",
    modules=(
        *_ends(),
        *_norms(),
        Module("layers.{}.self_attn.qkv_proj", [_QUERY, _KEY, _VALUE]),
        Module("layers.{}.self_attn.o_proj", [_OUT]),
        Module("layers.{}.mlp.gate_up_proj", [_GATE, _UP]),
        Module("layers.{}.mlp.down_proj", [_DOWN]),
    ),
    keys=_with(
        (
            replace(key, spellings={"default": "none"}) if key.theirs == "rope_type" else key
            for key in _MISTRAL.keys
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
_OLMO = replace(
    _LLAMA,
    class_name="OlmoForCausalLM",
    modules=(*_ends(), *_attention("attention_bias", "attention_bias"), *_gated_mlp(False)),
    fixed={"norm": "layernorm", "norm_epsilon": 1e-5, **_ROTARY, **_NO_WINDOW},
    keys=(
        *(key for key in _LLAMA_KEYS if key.theirs != "rms_norm_eps"),
        _ATTENTION_BIAS,
        Key("clip_qkv", "", None),
    ),
)

_STARCODER2 = replace(
    _MISTRAL,
    class_name="Starcoder2ForCausalLM",
    modules=(
        *_ends(),
        *_norms(bias=True),
        *_attention("use_bias", "use_bias"),
        Module("layers.{}.mlp.c_fc", [_UP], "use_bias"),
        Module("layers.{}.mlp.c_proj", [_DOWN], "use_bias"),
    ),
    fixed={"norm": "layernorm", **_ROTARY},
    keys=(
        *_with(
            (key for key in _LLAMA_KEYS if key.theirs not in ("rms_norm_eps", "hidden_act")),
            tie_word_embeddings=True,
            initializer_range=0.018042,
            num_hidden_layers=30,
            num_attention_heads=24,
            num_key_value_heads=2,
            hidden_size=3072,
            intermediate_size=12288,
            max_position_embeddings=4096,
        ),
        Key("hidden_act", "activation", "gelu_pytorch_tanh", _GELUS),
        Key("norm_epsilon", "norm_epsilon", 1e-5),
        Key("use_bias", "", True),
        replace(_WINDOW, default=None),
    ),
)

_GRANITE = replace(
    _LLAMA,
    class_name="GraniteForCausalLM",
    keys=(
        *_LLAMA.keys,
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
_SMOLLM3 = replace(
    _LLAMA,
    class_name="SmolLM3ForCausalLM",
    fixed={name: value for name, value in _MISTRAL.fixed.items() if name != "unrotated_every"},
    keys=(
        *_with(
            _LLAMA_KEYS,
            tie_word_embeddings=True,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=4,
            hidden_size=2048,
            max_position_embeddings=32768,
            rope_theta=2e6,
        ),
        _ATTENTION_BIAS,
        _MLP_BIAS,
        replace(_WINDOW, default=None),
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
        Pattern("global_every", "layer_types", _KINDS, lambda described, layer: True),
    ),
)

# Gemma's gains are 1 + weight; its embedding is multiplied by sqrt(D) and, as the head, is not.
_GEMMA = replace(
    _LLAMA,
    class_name="GemmaForCausalLM",
    modules=(
        *_ends(),
        *_norms(),
        *_attention("attention_bias", "attention_bias"),
        *_gated_mlp(False),
    ),
    keys=(
        *_with(
            (key for key in _LLAMA_KEYS if key.theirs != "hidden_act"),
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
        _ATTENTION_BIAS,
    ),
    factors={"embed": lambda described: described["hidden_size"] ** 0.5},
    gain_offset=1.0,
)

_GEMMA2_MODULES = (
    *_ends(),
    Module("layers.{}.input_layernorm", ["blocks.{}.attention_norm"]),
    Module("layers.{}.post_attention_layernorm", ["blocks.{}.attention_out_norm"]),
    Module("layers.{}.pre_feedforward_layernorm", ["blocks.{}.mlp_norm"]),
    Module("layers.{}.post_feedforward_layernorm", ["blocks.{}.mlp_out_norm"]),
    Module("norm", ["final_norm"]),
    *_attention("attention_bias", "attention_bias"),
    *_gated_mlp(False),
)
_GEMMA2_FIXED = {
    "norm": "rmsnorm",
    "positions": "rotary",
    "n_expert": 1,
    "norm_place": "both",
    "qk_norm": False,
    "unrotated_every": 0,
}
_GEMMA2 = replace(
    _GEMMA,
    class_name="Gemma2ForCausalLM",
    modules=_GEMMA2_MODULES,
    fixed={**_GEMMA2_FIXED, "window_rope_theta": 0.0},
    keys=(
        *_with(
            (key for key in _GEMMA.keys if key.theirs != "hidden_act"),
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
        _WINDOW,
    ),
    factors={
        **_GEMMA.factors,
        "attention.query": lambda described: (
            (described["head_dim"] / described["query_pre_attn_scalar"]) ** 0.5
        ),
    },
    patterns=(
        Pattern("global_every", "layer_types", _KINDS, lambda described, layer: layer % 2 == 1),
    ),
)

_GEMMA3 = replace(
    _GEMMA2,
    class_name="Gemma3ForCausalLM",
    modules=(
        *_GEMMA2_MODULES,
        Module("layers.{}.self_attn.q_norm", ["blocks.{}.attention.query_norm"]),
        Module("layers.{}.self_attn.k_norm", ["blocks.{}.attention.key_norm"]),
    ),
    fixed={**_GEMMA2_FIXED, "qk_norm": True},
    keys=(
        *_with(
            _GEMMA2.keys,
            max_position_embeddings=131072,
            rope_theta=1e6,
            final_logit_softcapping=None,
            attn_logit_softcapping=None,
        ),
        Key("rope_local_base_freq", "window_rope_theta", 10000.0),
        Key("sliding_window_pattern", "", 6, is_checked=False),
    ),
    factors={
        **_GEMMA.factors,
        "attention.query_norm": _GEMMA2.factors["attention.query"],
    },
    patterns=(
        Pattern(
            "global_every",
            "layer_types",
            _KINDS,
            lambda described, layer: (layer + 1) % described["sliding_window_pattern"] == 0,
        ),
    ),
)

# model_type -> family. A model that several can express is written as the first of them.
FAMILIES = {
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT_BIGCODE,
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "mixtral": _MIXTRAL,
    "qwen3": _QWEN3,
    "qwen2": _QWEN2,
    "phi3": _PHI3,
    "olmo": _OLMO,
    "starcoder2": _STARCODER2,
    "granite": _GRANITE,
    "smollm3": _SMOLLM3,
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
}
