"""A run as a GGUF file, which llama.cpp and Ollama open.

A model is written as the Hugging Face family that it is (llm/interop/hf.py), with the names that
the package `gguf` has for that family's weights. Where llama.cpp stores numbers otherwise:

    llama, olmo, smollm3    a head's neighbouring numbers turn together, not its halves, so that
                            the rows of queries and keys are in another order
    gptneox                 all queries stand before all keys and values, not head by head
    gemma                   a norm's gain is stored whole, not less 1
    mixtures                a matrix of all experts is one array

The tokenizer is in llm/interop/gguf_tokenizer.py.

Sources: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (format and keys); what each
model of llama.cpp reads is in its src/models.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llm.console import say
from llm.errors import UsageError, needing
from llm.interop.families import FAMILIES
from llm.interop.gguf_tokenizer import vocabulary
from llm.interop.hf import as_family
from llm.interop.tensors import WRITTEN, narrowed
from llm.model_config import ModelConfig
from llm.text.tokenizer import Tokenizer

_EXPERT = re.compile(r"\.experts\.\d+\.")
# A head's neighbours turn together in these.
_NEIGHBOURS = ("llama", "olmo", "smollm3")
# Layers at which llama.cpp takes a model for the one of 27B, whose scores it divides by sqrt(D / N)
# and not by sqrt(H) -> where that factor is undone.
_OF_27B = {("gemma2", 46): "self_attn.q_proj", ("gemma3", 62): "self_attn.q_norm"}


def _families(config: ModelConfig) -> dict[str, tuple[str, dict[str, tuple[Any, ...]]]]:
    """What transformers calls a family -> what llama.cpp does, and the values that settings must
    have there, beside those that the family has.
    """
    scaled = {"rope_scaling": ("none", "linear", "yarn"), "window": (0,)}
    usual_heads = {**scaled, "head_size": (config.d_model // config.n_head,)}
    tied, untied = {"tie_embeddings": (True,)}, {"tie_embeddings": (False,)}
    gelu = {"activation": ("gelu_tanh",)}
    gemma = {"rope_scaling": ("none", "linear"), **tied}
    # llama.cpp scales no frequency of a layer with a window.
    is_local = config.window and not config.window_rope_theta
    return {
        "gpt2": ("gpt2", gelu),
        "gpt_bigcode": ("starcoder", gelu),
        "llama": ("llama", {"window": (0,)}),
        "mistral": ("llama", {"window": (0,)}),
        "mixtral": ("llama", {"window": (0,)}),
        "qwen2": ("qwen2", {"window": (0,)}),
        "qwen3": ("qwen3", scaled),
        "qwen3_moe": ("qwen3moe", {**scaled, "normalize_gates": (True,)}),
        "olmo": ("olmo", usual_heads),
        "olmo2": ("olmo2", {**usual_heads, **untied}),
        "olmoe": (
            "olmoe",
            {**usual_heads, **untied, "normalize_gates": (False,), "n_kv_head": (config.n_head,)},
        ),
        "starcoder2": ("starcoder2", {**usual_heads, **gelu}),
        "smollm3": ("smollm3", {**scaled, "unrotated_every": (4,)}),
        "gpt_neox": ("gptneox", {"activation": ("gelu_tanh", "gelu"), **untied}),
        "phi": ("phi2", gelu),
        "gemma": ("gemma", gemma),
        "gemma2": (
            "gemma2",
            {
                **gemma,
                "logit_soft_cap": (config.logit_soft_cap or "a number above 0",),
                "attention_soft_cap": (config.attention_soft_cap or "a number above 0",),
            },
        ),
        "gemma3_text": (
            "gemma3",
            {
                "rope_scaling": ("none",) if is_local else ("none", "linear"),
                "attention_soft_cap": (0.0,),
            },
        ),
    }


def to_gguf(
    config: ModelConfig,
    params: Mapping[str, Any],
    tokenizer: Tokenizer,
    path: Path,
    name: str,
    dtype: str = "float32",
) -> str:
    """Write a new file. One array is in memory at a time. Returns llama.cpp's name of the family.

    Args:
      params: float32 arrays, jax or numpy.
      name: of the model, for people.
      dtype: of matrices: float32, bfloat16 or float16; other arrays are float32.
    Raises:
      UsageError: llama.cpp has no such model or no such tokenizer, a weight that the dtype cannot
        hold, or the package gguf is not installed.
    """
    with needing("export-gguf", "'glassbox-gpt[gguf]'"):
        import gguf

    described, shapes, arrays = as_family(config, tokenizer.vocab_size, params)
    architecture = architecture_of(config, described)
    words = vocabulary(tokenizer)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(name)
    writer.add_file_type({"float32": 0, "float16": 1, "bfloat16": 32}[dtype])
    settings = _settings(config, architecture, tokenizer.vocab_size)
    kinds: dict[type, str] = {int: "uint32", float: "float32", bool: "bool", str: "string"}
    for prefix, values in ((architecture, settings), ("tokenizer", words)):
        for key, value in values.items():
            getattr(writer, f"add_{kinds.get(type(value), 'array')}")(f"{prefix}.{key}", value)
    tensors = [*_tensors(architecture, config.n_layer, shapes)]
    factors = _rope_factors(config)
    for found, shape, _ in tensors + [(key, array.shape, []) for key, array in factors.items()]:
        kind = dtype if len(shape) > 1 else "float32"
        raw, size = gguf.GGMLQuantizationType[WRITTEN[kind]], np.dtype(kind).itemsize
        writer.add_tensor_info(found, shape, np.dtype(np.float32), math.prod(shape) * size, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    changed = _changes(config, architecture, described["model_type"])
    for _, shape, members in tensors:
        kind = dtype if len(shape) > 1 else "float32"
        pairs = zip(members, arrays, strict=False)  # as many arrays as there are members
        parts = [narrowed(theirs, changed(theirs, array), kind) for theirs, array in pairs]
        writer.write_tensor_data(parts[0] if len(parts) == 1 else np.stack(parts))
    for array in factors.values():
        writer.write_tensor_data(array)
    writer.close()
    return architecture


def architecture_of(config: ModelConfig, described: Mapping[str, Any]) -> str:
    """llama.cpp's name of a family.

    Raises:
      UsageError: it has no such family, or not with these settings.
    """
    families, family = _families(config), described["model_type"]
    if family not in families:
        raise UsageError(
            f"this model is a {family}, which export-gguf does not write; expected one of "
            f"{', '.join(families)}"
        )
    architecture, needs = families[family]
    is_biased = described.get("attention_bias") or described.get("mlp_bias")
    if is_biased and architecture not in ("llama", "gptneox"):
        needs = {**needs, "bias": (False,)}
    for setting, values in needs.items():
        if getattr(config, setting) not in values:
            raise UsageError(
                f"llama.cpp's {architecture} has no model.{setting} = "
                f"{getattr(config, setting)!r}; expected {' or '.join(map(repr, values))}"
            )
    if config.activation == "gelu":
        say(
            "WARNING: llama.cpp computes the tanh approximation of GELU, so that its "
            "log-probabilities differ a little"
        )
    return architecture


def _settings(config: ModelConfig, architecture: str, vocab_size: int) -> dict[str, Any]:
    """What a file says of a model, by the names of keys without the architecture's."""
    norm = "layer_norm" if config.norm == "layernorm" else "layer_norm_rms"
    found: dict[str, Any] = {
        "vocab_size": vocab_size,
        "context_length": config.context_length,
        "embedding_length": config.d_model,
        "block_count": config.n_layer,
        "feed_forward_length": config.d_ff,
        "attention.head_count": config.n_head,
        "attention.head_count_kv": config.n_kv_head,
        f"attention.{norm}_epsilon": config.norm_epsilon,
    }
    if config.positions == "rotary":
        found |= {
            "attention.key_length": config.head_size,
            "attention.value_length": config.head_size,
            "rope.dimension_count": int(config.head_size * config.rotary_fraction),
            "rope.freq_base": config.rope_theta,
        }
    if config.rope_scaling in ("linear", "yarn"):
        found["rope.scaling.type"] = config.rope_scaling
        found["rope.scaling.factor"] = config.rope_factor
    if config.rope_scaling == "yarn":
        found["rope.scaling.original_context_length"] = config.rope_original_length
        # llama.cpp would multiply queries and keys by the inverse; here that is in the weights.
        found["rope.scaling.attn_factor"] = 1 / (1 + 0.1 * max(math.log(config.rope_factor), 0))
    if config.has_experts:
        found |= {
            "expert_count": config.n_expert,
            "expert_used_count": config.n_expert_active,
            "expert_feed_forward_length": config.d_ff,
        }
    if architecture == "gptneox":
        found["use_parallel_residual"] = config.block == "parallel"
    if config.window or architecture == "gemma2":  # it always has a window
        found["attention.sliding_window"] = config.window or config.context_length
        found["attention.sliding_window_pattern"] = config.global_every
        found["rope.freq_base_swa"] = config.window_rope_theta or config.rope_theta
    for key, cap in (("attn", config.attention_soft_cap), ("final", config.logit_soft_cap)):
        if cap:
            found[f"{key}_logit_softcapping"] = cap
    return found


def _rope_factors(config: ModelConfig) -> dict[str, np.ndarray]:
    """llama3's scaling as llama.cpp reads it: an array of what each frequency is divided by."""
    if config.rope_scaling != "llama3":
        return {}
    import jax.numpy as jnp

    from llm.model.attention import RopeScaling

    half = config.head_size // 2
    usual = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    scaling = RopeScaling("llama3", config.rope_factor, config.rope_original_length)
    factors = usual / scaling.apply(usual, config.rope_theta)
    return {"rope_freqs.weight": np.asarray(factors, np.float32)}


def _tensors(
    architecture: str, n_layer: int, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, tuple[int, ...], list[str]]]:
    """The file's arrays: (name, shape, the arrays of transformers that it holds), in their order.

    Each holds one, but those of a mixture hold that of each expert.
    """
    import gguf

    number = next(x for x, named in gguf.MODEL_ARCH_NAMES.items() if named == architecture)
    known = gguf.get_tensor_name_map(number, n_layer)
    for whole, group in itertools.groupby(shapes, lambda name: _EXPERT.sub(".experts.", name)):
        members = [*group]
        # The experts of Mixtral have a name of their own there.
        mixtral = whole.replace("model.", "").replace("block_sparse_moe", "feed_forward")
        names = (known.get_name(name, (".weight", ".bias")) for name in (whole, mixtral))
        found = next(filter(None, names), None)
        assert found, whole
        shape = shapes[members[0]][:: -1 if _is_conv(architecture, whole) else 1]
        yield found, (len(members), *shape) if whole != members[0] else shape, members


def _is_conv(architecture: str, name: str) -> bool:
    """Whether a weight of GPT-2 is stored [in, out] by transformers."""
    return architecture == "gpt2" and bool(re.search(r"\.c_(attn|proj|fc)\.weight$", name))


def _changes(
    config: ModelConfig, architecture: str, family: str
) -> Callable[[str, np.ndarray], np.ndarray]:
    """A function of an array's name and the array of transformers: the array of the file."""
    # Rows in two levels of groups, which change places.
    levels: dict[str, tuple[int, int, int]] = {"query_key_value": (1, config.n_head, 3)}
    if architecture in _NEIGHBOURS:
        half = config.head_size // 2
        levels |= {"q_proj": (config.n_head, 2, half), "k_proj": (config.n_kv_head, 2, half)}
    of_27b = _OF_27B.get((architecture, config.n_layer))
    heads = config.d_model // config.n_head

    def change(name: str, array: np.ndarray) -> np.ndarray:
        module = name.split(".")[-2]
        if module in levels:
            groups = array.reshape(*levels[module], -1).swapaxes(1, 2)
            array = groups.reshape(array.shape)
        if module.endswith("norm"):
            array = array + np.float32(FAMILIES[family].gain_offset)
        if of_27b and of_27b in name:
            array = array * np.float32(math.sqrt(heads / config.head_size))
        return array.T if _is_conv(architecture, name) else array

    return change
