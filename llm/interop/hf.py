"""Weights and configurations to and from Hugging Face: config.json and *.safetensors.

llm/interop/families.py has a table for each family of models. Moving a weight is at most a
transpose, a split and the padding of the vocabulary, so a round trip changes no bit.

What it is not: it carries no dropout, which belongs to training and not to the function. A model
that ModelConfig cannot express is refused by the name of the setting, never approximated.

Source: https://github.com/huggingface/safetensors (file format).
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm.errors import CheckpointError, UsageError
from llm.files import write_atomic
from llm.interop.description import (
    describe,
    family_of,
    read_config,
    read_description,
    vocab_size_of,
)
from llm.interop.families import FAMILIES
from llm.interop.table import Description, Family
from llm.interop.tensors import Tensors, save
from llm.model.gpt import ModelSpec, abstract_params
from llm.model_config import ModelConfig

Arrays = dict[str, np.ndarray]


def from_hf(
    folder: str | Path, context_length: int | None = None
) -> tuple[ModelConfig, int, Arrays]:
    """(configuration, vocabulary size, float32 parameters) of a Hugging Face model folder.

    Rows that pad the vocabulary (model.vocab_multiple) are zero; they are never predicted. Beside
    the result, one array of the folder is in memory at a time.

    Args:
      context_length: see only this many tokens at once; None: as many as the model can.
    Raises:
      UsageError: not such a folder, or a model that ModelConfig cannot express.
      CheckpointError: the weights are not those that config.json describes.
    """
    folder = Path(folder)
    spec, family, described, tensors = _opened(folder, context_length)
    params = {
        # What no module of the family holds is neutral, and so is the padding of the vocabulary.
        name: np.full(leaf.shape, name.endswith(".scale"), np.float32)
        for name, leaf in abstract_params(spec).items()
    }
    for pair in _pairs(family, described, spec):
        _read_pair(pair, tensors, params)
    extra = sorted(name for name in tensors if not family.ignored.search(name))
    if extra:
        raise UsageError(
            f"{folder} holds weights that this model has no place for: {', '.join(extra[:5])}"
            f"{' ...' if len(extra) > 5 else ''}"
        )
    config = spec.config
    if context_length is not None:
        config = config.model_copy(update={"context_length": context_length})
        if "embed.position" in params:
            params["embed.position"] = params["embed.position"][:context_length]
    return config, spec.vocab_size, params


def describe_folder(folder: Path) -> tuple[ModelConfig, int]:
    """(configuration, vocabulary size) of a Hugging Face model folder; raises as `from_hf`."""
    spec = _opened(folder, None)[0]
    return spec.config, spec.vocab_size


def _opened(
    folder: Path, context_length: int | None
) -> tuple[ModelSpec, Family, Description, Tensors]:
    """The model of a folder, its family, the value of each key, and the arrays."""
    source = folder / "config.json"
    read = read_description(folder)
    family = family_of(read, folder)
    config, described = read_config(family, read, source, context_length)
    vocab_size = vocab_size_of(read, source)
    tensors = Tensors(folder, family.prefix, family.head)
    if config.n_layer * config.n_expert > len(tensors):
        raise CheckpointError(
            f"{source} describes {config.n_layer} layers of {config.n_expert} experts each, and "
            f"the files of {folder} hold no more than {len(tensors)} weights"
        )
    config = _untied_by(tensors, family, config)
    return ModelSpec(config, vocab_size), family, described, tensors


def to_hf(
    config: ModelConfig,
    vocab_size: int,
    params: Mapping[str, Any],
    folder: str | Path,
    end_of_text: int | None = None,
    begin_of_text: int | None = None,
    dtype: str = "float32",
) -> str:
    """Write config.json and *.safetensors, as transformers' from_pretrained reads them.

    Args:
      params: float32 arrays, jax or numpy; rows that pad the vocabulary are left out.
      end_of_text: id at which generation ends, if the tokenizer has one.
      begin_of_text: id at which it begins; None: the end of another text.
      dtype: of the files: float32, bfloat16 or float16.
    Returns:
      The family that the model is written as: "gpt2", "llama", ...
    Raises:
      UsageError: a switch of the model that no family in llm/interop/families.py has, or a weight
        that the dtype cannot hold.
    """
    described, shapes, arrays = as_family(config, vocab_size, params)
    described |= {
        "dtype": dtype,
        "bos_token_id": end_of_text if begin_of_text is None else begin_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": None,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save(shapes, arrays, folder, dtype)
    write_atomic(folder / "config.json", (json.dumps(described, indent=2) + "\n").encode())
    return str(described["model_type"])


def as_family(
    config: ModelConfig, vocab_size: int, params: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]], Iterator[np.ndarray]]:
    """What a model is there: config.json, each weight's shape, and their arrays in this order.

    The arrays are made when they are asked for, one after the other. Arguments and errors are those
    of `to_hf`.
    """
    spec = ModelSpec(config, vocab_size)
    used = [name for name, array in params.items() if not _is_neutral(name, array)]

    def misfit(family: Family, described: dict[str, Any]) -> str:
        """Turn on the biases that the parameters need, and say what the family cannot hold."""
        for module in family.modules:
            if isinstance(module.bias, str):
                biases = {f"{name.format(layer)}.bias" for name in module.ours for layer in layers}
                described[module.bias] |= not biases.isdisjoint(used)
        held = {name for pair in _pairs(family, described, spec) for name in pair.ours}
        return ", ".join(f"{name}, which it does not have" for name in used if name not in held)

    layers = range(spec.config.n_layer)
    model_type, keys = describe(spec.config, misfit)
    family = FAMILIES[model_type]
    described = {
        "model_type": model_type,
        "architectures": [family.class_name],
        "vocab_size": vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        **keys,
    }
    pairs = [*_pairs(family, keys, spec)]
    shapes = {
        name if name.startswith(f"{family.head}.") else family.prefix + name: pair.shape
        for pair in pairs
        for name in pair.theirs
    }
    return described, shapes, (array for pair in pairs for array in _to_theirs(pair, params))


def _is_neutral(name: str, array: Any) -> bool:
    """Whether a bias is zero, or a gain one, so that a model without it is the same."""
    return name.endswith((".bias", ".scale")) and bool((array == name.endswith(".scale")).all())


def _untied_by(tensors: Tensors, family: Family, config: ModelConfig) -> ModelConfig:
    """The model with the head that the files hold, whatever tie_word_embeddings says.

    transformers ties the head to the embedding unless the files hold both and they differ. If they
    hold the head alone, that is the embedding too.
    """
    head = f"{family.head}.weight"
    if not config.tie_embeddings or head not in tensors:
        return config
    embedding = next(m.theirs for m in family.modules if m.ours == ["embed"]) + ".weight"
    if embedding not in tensors:
        tensors.rename(head, embedding)
    elif np.array_equal(tensors.read(head), tensors.read(embedding)):
        tensors.take(head)
    else:
        return config.model_copy(update={"tie_embeddings": False})
    return config


@dataclass(frozen=True)
class _Pair:
    """Parameters of ours, and the arrays there that hold them: one, or one for each expert.

    Attributes:
      ours: name -> shape without the padding of the vocabulary, and the factor that transformers
        applies later.
      offset: what transformers adds before that.
      heads: how many heads the arrays of several lie side by side in; 1: one after the other.
      unused_rows: how many rows of theirs come before ours.
    """

    ours: Mapping[str, tuple[tuple[int, ...], float]]
    theirs: list[str]
    is_transposed: bool
    offset: float
    heads: int = 1
    unused_rows: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of each of theirs."""
        shapes = [shape for shape, _ in self.ours.values()]
        whole = (*shapes[0][len(self.theirs) > 1 : -1], sum(shape[-1] for shape in shapes))
        whole = (whole[0] + self.unused_rows, *whole[1:])
        return whole[::-1] if self.is_transposed else whole


def _pairs(family: Family, described: Description, spec: ModelSpec) -> Iterator[_Pair]:
    """Every parameter that the family's files hold for this model, layer by layer.

    A bias that they hold may have no place in our model.
    """
    widest = spec.config.model_copy(update={"vocab_multiple": 1, "bias": True})
    params = abstract_params(ModelSpec(widest, spec.vocab_size))
    factors = {name: factor(described) for name, factor in family.factors.items()}
    queries = f"attention.query{'_norm' * spec.config.qk_norm}"
    factors[queries] = factors.get(queries, 1.0) * described.get("rope_attention", 1.0) ** 2
    if spec.config.tie_embeddings and "embed" in factors:
        factors["final_norm"] = factors.get("final_norm", 1.0) / factors["embed"]
    endings = {"": "weight", ".weight": "weight", ".scale": "weight", ".bias": "bias"}
    for module in family.modules:
        layers = range(spec.config.n_layer if "{}" in module.theirs else 1)
        experts = range(spec.config.n_expert if "{expert}" in module.theirs else 1)
        factor = [factors.get(name.removeprefix("blocks.{}."), 1.0) for name in module.ours]
        for layer, (ending, kind) in itertools.product(layers, endings.items()):
            ours = [name.format(layer) + ending for name in module.ours]
            if ours[0] in params and (kind == "weight" or module.has_bias(described)):
                name = f"{module.theirs.replace('{}', str(layer))}.{kind}"
                theirs = [name.replace("{expert}", str(expert)) for expert in experts]
                shapes = [params[name].shape for name in ours]
                held = dict(zip(ours, zip(shapes, factor, strict=True), strict=True))
                offset = family.gain_offset if ending == ".scale" else 0.0
                heads = spec.config.n_head if module.is_by_head else 1
                skipped = module.unused_rows
                yield _Pair(held, theirs, module.is_transposed, offset, heads, skipped)


def _read_pair(pair: _Pair, tensors: Tensors, params: Arrays) -> None:
    """Put the arrays of theirs into our parameters."""
    (first, _), *_ = pair.ours.values()
    widths = [shape[-1] for shape, _ in pair.ours.values()]
    expected = (*first[len(pair.theirs) > 1 : -1], sum(widths))
    for expert, name in enumerate(pair.theirs):
        array = tensors.take(name)
        array = (array.T if pair.is_transposed else array)[pair.unused_rows :]
        if array.shape != expected:
            raise CheckpointError(
                f"weight {name} has shape {list(array.shape)}, but config.json needs "
                f"{list(expected)}{' (transposed)' * (pair.is_transposed and array.ndim > 1)}"
            )
        array = _regrouped(array, pair.heads, len(widths))
        parts = np.split(array, np.cumsum(widths)[:-1], axis=-1)
        for (ours, (_, factor)), part in zip(pair.ours.items(), parts, strict=True):
            place = params[ours][expert] if len(pair.theirs) > 1 else params[ours]
            as_is = factor == 1.0 and not pair.offset  # changes no bit, not even of -0.0
            place[tuple(map(slice, part.shape))] = part if as_is else (part + pair.offset) * factor


def _to_theirs(pair: _Pair, params: Mapping[str, Any]) -> list[np.ndarray]:
    """The arrays of theirs that hold parameters. A bias that our model does not have is zero."""
    parts = [
        np.asarray(params[name], np.float32)[tuple(map(slice, shape))] / factor - pair.offset
        if name in params
        else np.zeros(shape, np.float32)
        for name, (shape, factor) in pair.ours.items()
    ]
    joined = _regrouped(np.concatenate(parts, axis=-1), len(parts), pair.heads)
    if pair.unused_rows:
        joined = np.pad(joined, ((pair.unused_rows, 0), (0, 0)))
    arrays = list(joined) if len(pair.theirs) > 1 else [joined]
    return [np.ascontiguousarray(array.T if pair.is_transposed else array) for array in arrays]


def _regrouped(array: np.ndarray, outer: int, inner: int) -> np.ndarray:
    """The last dimension, `outer` groups of `inner` parts, as `inner` groups of `outer` parts."""
    if outer == 1 or inner == 1:
        return array
    grouped = array.reshape(*array.shape[:-1], outer, inner, -1)
    return grouped.swapaxes(-2, -3).reshape(array.shape)
