"""Weights and configurations to and from Hugging Face: config.json and *.safetensors.

llm/interop/families.py has a table for each family of models. Moving a weight is at most a
transpose, a split and the padding of the vocabulary, so a round trip changes no bit.

What it is not: it carries no dropout, which belongs to training and not to the function. A model
that ModelConfig cannot express is refused by the name of the setting, never approximated.

Source: https://github.com/huggingface/safetensors (file format).
"""

import functools
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
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
from llm.interop.tensors import Tensor, open_tensors, save
from llm.model.gpt import ModelSpec, Params, abstract_params
from llm.model_config import ModelConfig

# Rows of a table of tokens that are compared at a time.
_ROWS = 4096


@dataclass(frozen=True)
class HFModel:
    """A model in a Hugging Face folder. Its parameters are not read yet.

    Attributes:
      shapes: of each parameter of ours.
    """

    spec: ModelSpec
    shapes: Mapping[str, tuple[int, ...]]
    _holders: Mapping[str, tuple["_Pair", list[Tensor]]]

    def read(self, shardings: Mapping[str, jax.sharding.Sharding]) -> Params:
        """The float32 parameters on devices. A process reads what its own devices hold, and beside
        the result one array at a time is in memory."""
        return {
            name: jax.make_array_from_callback(
                shape, shardings[name], functools.partial(self.part, name)
            )
            for name, shape in self.shapes.items()
        }

    def part(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A part of a parameter, float32, given where it lies; (): all of it. No other is read.

        Rows that pad the vocabulary (model.vocab_multiple) are zero; they are never predicted.
        """
        shape = self.shapes[name]
        whole = [slice(None)] * (len(shape) - len(index))
        box = [range(*at.indices(n)) for at, n in zip([*index, *whole], shape, strict=True)]
        # What no module of the family holds is neutral, and so is the padding of the vocabulary.
        values = np.full([len(at) for at in box], name.endswith(".scale"), np.float32)
        if name not in self._holders:
            return values
        pair, tensors = self._holders[name]
        box = [at[: max(0, n - at.start)] for at, n in zip(box, pair.ours[name][0], strict=True)]
        held = values[tuple(slice(len(at)) for at in box)]
        if not held.size:
            return values
        if len(tensors) == 1:
            held[...] = pair.read(name, tensors[0], box)
        else:
            for n, expert in enumerate(box[0]):
                held[n] = pair.read(name, tensors[expert], box[1:])
        return values


def open_hf(folder: str | Path, context_length: int | None = None) -> HFModel:
    """A Hugging Face model folder, checked as far as its weights need not be read.

    Args:
      context_length: see only this many tokens at once; None: as many as the model can.
    Raises:
      UsageError: not such a folder, or a model that ModelConfig cannot express.
      CheckpointError: the weights are not those that config.json describes.
    """
    folder = Path(folder)
    source = folder / "config.json"
    read = read_description(folder)
    family = family_of(read, folder)
    config, described = read_config(family, read, source, context_length)
    vocab_size = vocab_size_of(read, source)
    tensors = open_tensors(folder, family.prefix, family.head)
    if config.n_layer * config.n_expert > len(tensors):
        raise CheckpointError(
            f"{source} describes {config.n_layer} layers of {config.n_expert} experts each, and "
            f"the files of {folder} hold no more than {len(tensors)} weights"
        )
    config = _untied_by(tensors, family, config)
    holders: dict[str, tuple[_Pair, list[Tensor]]] = {}
    for pair in _pairs(family, described, ModelSpec(config, vocab_size)):
        held = [_checked(tensors.pop(name, None), name, pair, folder) for name in pair.theirs]
        holders |= dict.fromkeys(pair.ours, (pair, held))
    extra = sorted(name for name in tensors if not family.ignored.search(name))
    if extra:
        raise UsageError(
            f"{folder} holds weights that this model has no place for: {', '.join(extra[:5])}"
            f"{' ...' if len(extra) > 5 else ''}"
        )
    if context_length is not None:
        config = config.model_copy(update={"context_length": context_length})
    spec = ModelSpec(config, vocab_size)
    return HFModel(spec, {name: x.shape for name, x in abstract_params(spec).items()}, holders)


def _checked(tensor: Tensor | None, name: str, pair: "_Pair", folder: Path) -> Tensor:
    """The array that holds a weight; raises if it cannot be it."""
    if tensor is None:
        raise CheckpointError(f"{folder} holds no weight {name}, which config.json needs")
    tensor.check()
    if tensor.shape != pair.shape:
        raise CheckpointError(
            f"weight {name} has shape {[*tensor.shape]}, but config.json needs {[*pair.shape]}"
        )
    return tensor


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


def _untied_by(tensors: dict[str, Tensor], family: Family, config: ModelConfig) -> ModelConfig:
    """The model with the head that the files hold, whatever tie_word_embeddings says.

    transformers ties the head to the embedding unless the files hold both and they differ. If they
    hold the head alone, that is the embedding too.
    """
    head = f"{family.head}.weight"
    if not config.tie_embeddings or head not in tensors:
        return config
    embedding = next(m.theirs for m in family.modules if m.ours == ["embed"]) + ".weight"
    one, other = tensors[head], tensors.get(embedding)
    if other is not None and not _are_equal(one, other):
        return config.model_copy(update={"tie_embeddings": False})
    tensors[embedding] = tensors.pop(head)
    return config


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two arrays hold the same numbers; compared in parts, as they may be large."""
    rows = range(0, max(one.shape[:1], default=0), _ROWS)
    parts = ((slice(first, first + _ROWS),) for first in rows)
    return one.shape == other.shape and all(
        np.array_equal(one.read(part), other.read(part)) for part in parts
    )


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

    def read(self, name: str, tensor: Tensor, box: Sequence[range]) -> np.ndarray:
        """The part of a parameter, or of its one expert, that lies in a box; not an empty one."""
        widths = [shape[-1] for shape, _ in self.ours.values()]
        columns = _regrouped(np.arange(sum(widths)), self.heads, len(widths))
        of_name = np.split(columns, np.cumsum(widths)[:-1])[[*self.ours].index(name)]
        wanted = of_name[box[-1].start : box[-1].stop]
        first, count = wanted[0], wanted[-1] + 1 - wanted[0]
        index = [slice(at.start + self.unused_rows, at.stop + self.unused_rows) for at in box[:-1]]
        index.append(slice(first, first + count))
        array = tensor.read(tuple(index[::-1] if self.is_transposed else index))
        array = array.T if self.is_transposed else array
        if len(wanted) < count:
            array = array[..., wanted - first]
        factor = self.ours[name][1]
        as_is = factor == 1.0 and not self.offset  # changes no bit, not even of -0.0
        return array if as_is else (array + self.offset) * factor


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
