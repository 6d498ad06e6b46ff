"""The families of Hugging Face models that can be read and written: one table entry for each.

An entry says where each weight goes and what each key of config.json is here. llm/interop/hf.py
reads the tables in both directions, so a new family is a new entry in FAMILIES and no new code.

Sources: transformers' configuration_*.py and modeling_*.py of each family (names, layouts,
defaults).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Module:
    """A module of theirs, and the modules of ours whose parameters it holds.

    Their `weight` is our `weight` or `scale`, and their `bias` is our `bias`.

    Attributes:
      theirs: its name in the state dict, without the family's prefix. `{}` stands for the layer. A
        name with `{expert}` stands for one module of each expert; here the experts share one.
      ours: the modules' names here, or the name of one parameter. The arrays of several lie side by
        side along the last dimension of the one array there.
      is_transposed: a matrix is [out, in] there, as in torch's Linear, and [in, out] here.
    """

    theirs: str
    ours: Sequence[str]
    is_transposed: bool = True


@dataclass(frozen=True)
class Key:
    """One key of config.json.

    Attributes:
      theirs: its name.
      ours: the setting or property of ModelConfig that it is. Empty: we have no such setting, and
        the default is the one value that can be represented.
      default: what transformers takes if the file does not have the key.
      spellings: each value that the file can have -> our value. Empty: the values are the same.
      is_read: false for a key that is written and means nothing to us, such as dropout.
    """

    theirs: str
    ours: str
    default: Any
    spellings: Mapping[str, str] = field(default_factory=dict)
    is_read: bool = True


@dataclass(frozen=True)
class Family:
    """A kind of model in transformers.

    Attributes:
      class_name: its class with a language modelling head.
      prefix: the beginning of every weight's name but lm_head's. Old GPT-2 files leave it out.
      fixed: settings of ModelConfig that every model of the family has at this value.
      keys: of config.json, in the order in which they are written. Two keys of one setting must
        agree, and so must two settings of one key.
      ignored: the names of arrays in old files that are no parameters.
    """

    class_name: str
    prefix: str
    modules: Sequence[Module]
    fixed: Mapping[str, Any]
    keys: Sequence[Key]
    ignored: re.Pattern[str]


# Keys that change what any model computes. They are checked in each file, unless the family has a
# meaning for them, and never written.
KEYS_OF_ANY = (
    Key("quantization_config", "", None),
    Key("sliding_window", "", None),
    Key("is_encoder_decoder", "", False),
    Key("attention_bias", "", False),
    Key("mlp_bias", "", False),
    Key("rope_type", "", "default"),
    Key("partial_rotary_factor", "", 1.0),
)

_QUERY, _KEY, _VALUE, _OUT = (
    f"blocks.{{}}.attention.{part}" for part in ("query", "key", "value", "out")
)
_GATE, _UP, _DOWN = (f"blocks.{{}}.mlp.{part}" for part in ("gate", "up", "down"))
# Switches that no family here has.
_NO_EXTRAS = {"qk_norm": False, "logit_soft_cap": 0.0}

_GPT2 = Family(
    class_name="GPT2LMHeadModel",
    prefix="transformer.",
    # GPT-2's Conv1D stores [in, out], as we do.
    modules=(
        Module("wte", ["embed"], is_transposed=False),
        Module("wpe", ["embed.position"], is_transposed=False),
        Module("h.{}.ln_1", ["blocks.{}.attention_norm"]),
        Module("h.{}.attn.c_attn", [_QUERY, _KEY, _VALUE], is_transposed=False),
        Module("h.{}.attn.c_proj", [_OUT], is_transposed=False),
        Module("h.{}.ln_2", ["blocks.{}.mlp_norm"]),
        Module("h.{}.mlp.c_fc", [_UP], is_transposed=False),
        Module("h.{}.mlp.c_proj", [_DOWN], is_transposed=False),
        Module("ln_f", ["final_norm"]),
        Module("lm_head", ["head"]),
    ),
    fixed={"positions": "learned", "norm": "layernorm", "bias": True, "n_expert": 1, **_NO_EXTRAS},
    keys=(
        Key("tie_word_embeddings", "tie_embeddings", True),
        Key("initializer_range", "init_std", 0.02),
        Key("scale_attn_weights", "", True),
        Key("scale_attn_by_inverse_layer_idx", "", False),
        Key("add_cross_attention", "", False),
        Key("n_layer", "n_layer", 12),
        Key("n_head", "n_head", 12),
        Key("n_head", "n_kv_head", 12),
        Key("n_embd", "d_model", 768),
        Key("n_inner", "d_ff", None),
        Key("n_positions", "context_length", 1024),
        Key("layer_norm_epsilon", "norm_epsilon", 1e-5),
        Key(
            "activation_function",
            "activation",
            "gelu_new",
            {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"},
        ),
        Key("resid_pdrop", "", 0.0, is_read=False),
        Key("embd_pdrop", "", 0.0, is_read=False),
        Key("attn_pdrop", "", 0.0, is_read=False),
    ),
    # The causal mask, which old files store beside the weights.
    ignored=re.compile(r"\.attn\.(masked_)?bias$"),
)

# Llama rotates the halves of a head against each other, as attention.rotate does.
_LLAMA_ALL_BUT_MLP = (
    Module("embed_tokens", ["embed"], is_transposed=False),
    Module("layers.{}.input_layernorm", ["blocks.{}.attention_norm"]),
    Module("layers.{}.self_attn.q_proj", [_QUERY]),
    Module("layers.{}.self_attn.k_proj", [_KEY]),
    Module("layers.{}.self_attn.v_proj", [_VALUE]),
    Module("layers.{}.self_attn.o_proj", [_OUT]),
    Module("layers.{}.post_attention_layernorm", ["blocks.{}.mlp_norm"]),
    Module("norm", ["final_norm"]),
    Module("lm_head", ["head"]),
)
_LLAMA_FIXED = {"positions": "rotary", "norm": "rmsnorm", **_NO_EXTRAS}

_LLAMA = Family(
    class_name="LlamaForCausalLM",
    prefix="model.",
    modules=(
        *_LLAMA_ALL_BUT_MLP,
        Module("layers.{}.mlp.gate_proj", [_GATE]),
        Module("layers.{}.mlp.up_proj", [_UP]),
        Module("layers.{}.mlp.down_proj", [_DOWN]),
    ),
    fixed={**_LLAMA_FIXED, "n_expert": 1},
    keys=(
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
        Key("attention_bias", "bias", False),
        Key("attention_dropout", "", 0.0, is_read=False),
        Key("mlp_bias", "bias", False),
    ),
    ignored=re.compile(r"\.rotary_emb\.inv_freq$"),
)


def _keys_of(
    family: Family, defaults: Mapping[str, Any], without: Sequence[str] = ()
) -> tuple[Key, ...]:
    """Another family's keys, some with other defaults."""
    kept = [key for key in family.keys if key.theirs not in without]
    return tuple(replace(key, default=defaults.get(key.theirs, key.default)) for key in kept)


_MIXTRAL = replace(
    _LLAMA,
    class_name="MixtralForCausalLM",
    modules=(
        *_LLAMA_ALL_BUT_MLP,
        Module("layers.{}.block_sparse_moe.gate", ["blocks.{}.mlp.router"]),
        Module("layers.{}.block_sparse_moe.experts.{expert}.w1", [_GATE]),
        Module("layers.{}.block_sparse_moe.experts.{expert}.w3", [_UP]),
        Module("layers.{}.block_sparse_moe.experts.{expert}.w2", [_DOWN]),
    ),
    fixed={**_LLAMA_FIXED, "bias": False, "normalize_gates": True},
    keys=(
        *_keys_of(
            _LLAMA,
            {
                "num_key_value_heads": 8,
                "intermediate_size": 14336,
                "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-5,
                "rope_theta": 1e6,
            },
            without=("attention_bias", "mlp_bias"),
        ),
        Key("num_local_experts", "n_expert", 8),
        Key("num_experts_per_tok", "n_expert_active", 2),
    ),
)

# model_type -> family. A model that several can express is written as the first of them.
FAMILIES = {"gpt2": _GPT2, "llama": _LLAMA, "mixtral": _MIXTRAL}
