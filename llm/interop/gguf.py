"""A run as a GGUF file, which llama.cpp and Ollama open.

A model is written as the Hugging Face family that it is (llm/interop/hf.py), with the names that
the package `gguf` has for that family's weights. llama.cpp turns neighbouring numbers of a Llama's
head where transformers turns halves, so that the rows of its queries and keys are in another order.

llama.cpp cuts words by patterns of its own, and a file names one of them.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (format and keys).
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llm.console import say
from llm.errors import UsageError, needing
from llm.interop.export_tokenizer import begin_and_ends, merges_of, symbols_of
from llm.interop.hf import as_family
from llm.interop.tensors import WRITTEN, narrowed
from llm.model_config import ModelConfig
from llm.text.tokenizer import BytePairTokenizer, ByteTokenizer, Tokenizer

# What transformers calls a family -> what the settings must be for llama.cpp's code of it, beside
# those that the family has.
_SCALED = {"rope_scaling": ("none", "linear"), "window": (0,)}
_FAMILIES: dict[str, dict[str, tuple[Any, ...]]] = {
    "gpt2": {"activation": ("gelu_tanh",)},
    "llama": _SCALED,
    "qwen2": _SCALED,
    "qwen3": _SCALED,
    "starcoder2": {**_SCALED, "activation": ("gelu_tanh",)},
    "olmo2": _SCALED,
}
# The words of a tokenizer, by its name or its pattern -> llama.cpp's name of a pattern that cuts
# the same.
_WORDS = {
    "bytes": "gpt-2",
    "gpt2": "gpt-2",
    "r50k_base": "gpt-2",
    "p50k_base": "gpt-2",
    "cl100k_base": "llama-bpe",
    "o200k_base": "gpt-4o",
    "bpe": "bailingmoe",
}
# Kinds of tokens in a file.
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5


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
    family = described["model_type"]
    _check(config, family)
    words = _vocabulary(tokenizer)
    architecture = next(x for x, known in gguf.MODEL_ARCH_NAMES.items() if known == family)
    known = gguf.get_tensor_name_map(architecture, config.n_layer)
    writer = gguf.GGUFWriter(path, family)
    writer.add_name(name)
    writer.add_file_type({"float32": 0, "float16": 1, "bfloat16": 32}[dtype])
    _add_settings(writer, config, tokenizer.vocab_size)
    for key, value in words.items():
        getattr(writer, f"add_{key}")(value)
    dtypes = [dtype if len(shape) > 1 else "float32" for shape in shapes.values()]
    turned = [family == "gpt2" and _is_conv(theirs) for theirs in shapes]
    for (theirs, shape), kind, is_turned in zip(shapes.items(), dtypes, turned, strict=True):
        found = known.get_name(theirs, (".weight", ".bias"))
        assert found, theirs
        raw = gguf.GGMLQuantizationType[WRITTEN[kind]]
        size = math.prod(shape) * np.dtype(kind).itemsize
        width = np.dtype(np.float32 if kind == "float32" else np.float16)
        writer.add_tensor_info(found, shape[::-1] if is_turned else shape, width, size, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    order = _pairwise(config if family == "llama" else None)
    for theirs, array, kind, is_turned in zip(shapes, arrays, dtypes, turned, strict=True):
        array = order(theirs, array.T if is_turned else array)
        writer.write_tensor_data(narrowed(theirs, array, kind))
    writer.close()
    return family


def _check(config: ModelConfig, family: str) -> None:
    if family not in _FAMILIES:
        raise UsageError(
            f"this model is a {family}, which export-gguf does not write; expected one of "
            f"{', '.join(_FAMILIES)}"
        )
    for setting, values in _FAMILIES[family].items():
        if getattr(config, setting) not in values:
            raise UsageError(
                f"llama.cpp's {family} has no model.{setting} = {getattr(config, setting)!r}; "
                f"expected {' or '.join(map(repr, values))}"
            )


def _is_conv(name: str) -> bool:
    """Whether a weight of GPT-2 is stored [in, out] there."""
    return re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name) is not None


def _pairwise(config: ModelConfig | None) -> Callable[[str, np.ndarray], np.ndarray]:
    """Rows of queries and keys, halves of a head -> neighbours in turn."""
    heads = {"q_proj": config.n_head, "k_proj": config.n_kv_head} if config else {}

    def order(name: str, array: np.ndarray) -> np.ndarray:
        count = heads.get(name.split(".")[-2])
        if count is None:
            return array
        halves = array.reshape(count, 2, -1, *array.shape[1:])
        return halves.swapaxes(1, 2).reshape(array.shape)

    return order


def _add_settings(writer: Any, config: ModelConfig, vocab_size: int) -> None:
    writer.add_vocab_size(vocab_size)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head)
    if config.norm == "layernorm":
        writer.add_layer_norm_eps(config.norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.norm_epsilon)
    if config.positions == "rotary":
        writer.add_key_length(config.head_size)
        writer.add_value_length(config.head_size)
        writer.add_rope_dimension_count(config.head_size)
        writer.add_rope_freq_base(config.rope_theta)
        if config.rope_scaling == "linear":
            from gguf import RopeScalingType

            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(config.rope_factor)


def _vocabulary(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a file says of a tokenizer, by the names of GGUFWriter's methods."""
    is_pairs = isinstance(tokenizer, BytePairTokenizer | ByteTokenizer)
    if not is_pairs or tokenizer.name not in _WORDS:
        raise UsageError(
            f"llama.cpp has no tokenizer like {tokenizer.name!r}; export-gguf writes those of "
            f"{', '.join(_WORDS)}"
        )
    if r"\p{N}{1,2}" in getattr(tokenizer, "pattern", ""):
        say(
            "WARNING: this vocabulary has tokens of two digits, and llama.cpp cuts numbers into "
            "single digits: texts with numbers have other ids there, and less likely ones; every "
            "other text has the same"
        )
    names = {id_: spelling for spelling, id_ in tokenizer.special_tokens.items()}
    tokens, kinds = [], []
    for id_, data in enumerate(tokenizer.token_table):
        tokens.append(symbols_of(data) if data else names.get(id_, f"[UNUSED{id_}]"))
        kinds.append(_NORMAL if data else _CONTROL if id_ in names else _UNUSED)
    # A file without merges does not open. This one makes no token, so that bytes stay bytes.
    merges = [*merges_of(tokenizer)] or ["~ ~"]
    begin, ends = begin_and_ends(tokenizer)
    ids = {"bos_token_id": begin, "eos_token_id": (*ends, None)[0]}
    return {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": _WORDS[tokenizer.name],
        "token_list": tokens,
        "token_types": kinds,
        "token_merges": merges,
        **{key: id_ for key, id_ in ids.items() if id_ is not None},
        "add_bos_token": tokenizer.begin_of_text is not None,
    }
