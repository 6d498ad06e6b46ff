"""The families of Hugging Face models that can be read and written: one table entry for each.

An entry says where each weight goes and what each key of config.json is here. hf.py reads the
tables in both directions, so a new family is a new entry in FAMILIES and no new code.

Sources: transformers' configuration_*.py and modeling_*.py of each family (names, layouts,
defaults).
"""

import re
from dataclasses import replace

from llm.interop.gemma import GEMMA, GEMMA2, GEMMA3
from llm.interop.llama import (
    DOWN,
    GELUS,
    GRANITE,
    KEY,
    LLAMA,
    MISTRAL,
    MIXTRAL,
    NO_EXTRAS,
    NO_WINDOW,
    OLMO,
    OLMO2,
    OLMOE,
    OUT,
    PHI3,
    QUERY,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    SMOLLM3,
    STARCODER2,
    UP,
    VALUE,
)
from llm.interop.table import Family, Key, Module, with_defaults

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
    fixed={
        "positions": "learned",
        "norm": "layernorm",
        "n_expert": 1,
        **NO_EXTRAS,
        **NO_WINDOW,
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
        *with_defaults(_GPT2_KEYS, activation_function="gelu_pytorch_tanh"),
        Key("multi_query", "", True),
    ),
)

# model_type -> family. A model that several can express is written as the first of them.
FAMILIES = {
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT_BIGCODE,
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
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
}
