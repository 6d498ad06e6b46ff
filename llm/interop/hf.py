"""Weights and configurations to and from Hugging Face: config.json and *.safetensors.

llm/interop/families.py has a table for each family of models. Moving a weight is at most a
transpose, a split and the padding of the vocabulary, so a round trip changes no bit.

What it is not: it does not convert tokenizers, and it carries no dropout, which belongs to training
and not to the function. A model that ModelConfig cannot express is refused by the name of the
setting, never approximated.

Source: https://github.com/huggingface/safetensors (file format).
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm.config import ModelConfig, validate
from llm.errors import CheckpointError, UsageError
from llm.files import write_atomic
from llm.interop.families import FAMILIES, KEYS_OF_ANY, Family, Key
from llm.model.gpt import ModelSpec, abstract_params

Arrays = dict[str, np.ndarray]
# The content of config.json.
Description = dict[str, Any]

# Sizes that follow from others when a file has null or 0 for them.
_FOLLOWING = ("n_kv_head", "d_ff", "head_size")


def from_hf(folder: str | Path) -> tuple[ModelConfig, int, Arrays]:
    """(configuration, vocabulary size, float32 parameters) of a Hugging Face model folder.

    Rows that pad the vocabulary (model.vocab_multiple) are zero; they are never predicted.

    Raises:
      UsageError: not such a folder, or a model that ModelConfig cannot express.
      CheckpointError: the weights are not those that config.json describes.
    """
    folder = Path(folder)
    described = _read_description(folder)
    family = FAMILIES.get(described.get("model_type", ""))
    if family is None:
        raise UsageError(
            f"{folder} is a model of type {described.get('model_type')!r}; supported: "
            f"{', '.join(FAMILIES)}"
        )
    config = _read_config(family, described, folder / "config.json")
    vocab_size = described.get("vocab_size")
    if not isinstance(vocab_size, int) or not 0 < vocab_size < 2**31:
        raise UsageError(
            f"{folder / 'config.json'}: vocab_size = {vocab_size!r}: expected the number of "
            "tokens, below 2^31"
        )
    spec = ModelSpec(config, vocab_size)
    tensors = {
        name.removeprefix(family.prefix): array for name, array in _read_tensors(folder).items()
    }
    params: Arrays = {}
    for pair in _pairs(family, spec):
        for name in pair.theirs:
            if name not in tensors:
                raise CheckpointError(f"{folder} holds no weight {name}, which config.json needs")
        params |= _to_ours(pair, [tensors.pop(name) for name in pair.theirs], spec)
    if config.tie_embeddings:
        tensors.pop("lm_head.weight", None)
    extra = sorted(name for name in tensors if not family.ignored.search(name))
    if extra:
        raise UsageError(
            f"{folder} holds weights that this model has no place for: {', '.join(extra[:5])}"
            f"{' ...' if len(extra) > 5 else ''}"
        )
    return config, spec.vocab_size, params


def to_hf(
    config: ModelConfig,
    vocab_size: int,
    params: Mapping[str, Any],
    folder: str | Path,
    end_of_text: int | None = None,
) -> str:
    """Write config.json and model.safetensors, as transformers' from_pretrained reads them.

    Args:
      params: float32 arrays, jax or numpy; rows that pad the vocabulary are left out.
      end_of_text: id at which generation begins and ends, if the tokenizer has one.
    Returns:
      The family that the model is written as: "gpt2", "llama", ...
    Raises:
      UsageError: a switch of the model that no family in llm/interop/families.py has.
    """
    from safetensors.numpy import save_file

    spec = ModelSpec(config, vocab_size)
    model_type, keys = _describe(spec.config)
    family = FAMILIES[model_type]
    described = {
        "model_type": model_type,
        "architectures": [family.class_name],
        "vocab_size": vocab_size,
        "dtype": "float32",
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        **keys,
    }
    tensors = {}
    for pair in _pairs(family, spec):
        arrays = _to_theirs(pair, params, spec)
        for name, array in zip(pair.theirs, arrays, strict=True):
            tensors[name if name.startswith("lm_head") else family.prefix + name] = array
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # transformers refuses a file that does not say which framework's layout it has.
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_atomic(folder / "config.json", (json.dumps(described, indent=2) + "\n").encode())
    return model_type


def _read_description(folder: Path) -> Description:
    """config.json, with what it nests about rotary positions at the top.

    transformers has those in rope_parameters since version 5; before, the base was at the top and
    the rest in rope_scaling.
    """
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"{folder} holds no config.json; expected the folder of a Hugging Face model, with "
            f"config.json and *.safetensors"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{folder / 'config.json'} is not valid JSON: {error}") from None
    if not isinstance(described, dict):
        raise UsageError(
            f"{folder / 'config.json'} is not a JSON object; expected a model's settings"
        )
    for name in ("rope_scaling", "rope_parameters"):
        for key, value in (described.get(name) or {}).items():
            described["rope_type" if key == "type" else key] = value
    return described


def _read_config(family: Family, described: Description, source: Path) -> ModelConfig:
    """The model that the keys describe, or a UsageError that names what cannot be represented."""
    settings = dict(family.fixed)
    found: list[tuple[Key, Any]] = []
    of_family = {key.theirs for key in family.keys}
    for key in [key for key in KEYS_OF_ANY if key.theirs not in of_family] + [*family.keys]:
        value = described.get(key.theirs, key.default)
        supported = [*key.spellings] or [key.default] * (not key.ours)
        if key.is_read and supported and value not in supported:
            raise UsageError(
                f"{source}: {key.theirs} = {value!r} cannot be represented; supported: "
                f"{', '.join(map(repr, supported))}"
            )
        if key.ours and (value or key.ours not in _FOLLOWING):
            found.append((key, key.spellings.get(value, value) if key.spellings else value))
    for key, value in found:
        if key.ours in ModelConfig.model_fields:
            settings.setdefault(key.ours, value)
    config = validate({"model": settings}, where=f"{source}, read as [model]").model.resolved()
    for key, value in found:
        if getattr(config, key.ours) != value:
            raise UsageError(
                f"{source}: {key.theirs} = {value!r} cannot be represented: by the other keys "
                f"model.{key.ours} is {getattr(config, key.ours or '')!r}"
            )
    return config


def _describe(config: ModelConfig) -> tuple[str, Description]:
    """The first family that is exactly this model, with its keys of config.json.

    Raises:
      UsageError: there is none; the message says what keeps the model from each.
    """
    reasons = []
    for model_type, family in FAMILIES.items():
        allowed = {name: [value] for name, value in family.fixed.items()}
        described: Description = {}
        for key in family.keys:
            value = getattr(config, key.ours) if key.ours else key.default
            if key.spellings:
                # The first spelling of a value is the one that is written.
                spelled = {ours: theirs for theirs, ours in reversed([*key.spellings.items()])}
                allowed[key.ours] = [*spelled]
                value = spelled.get(value)
            if described.setdefault(key.theirs, value) != value:
                allowed[key.ours] = [described[key.theirs]]
            if key.theirs == "rope_theta":  # where transformers reads it since version 5
                described["rope_parameters"] = {"rope_type": "default", "rope_theta": value}
        wrong = [
            f"model.{name} = {getattr(config, name)!r} (needs {' or '.join(map(repr, values))})"
            for name, values in allowed.items()
            if getattr(config, name) not in values
        ]
        if not wrong:
            return model_type, described
        reasons.append(f"not {model_type}, because of {', '.join(wrong)}")
    raise UsageError("no Hugging Face architecture is this model: " + "; ".join(reasons))


def _read_tensors(folder: Path) -> Arrays:
    """Every array of the folder's safetensors files, in float32."""
    import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.exists():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    tensors: Arrays = {}
    for file in [folder / name for name in sorted(names)]:
        if not file.exists():
            raise UsageError(
                f"{folder} holds no {file.name}; weights in another format can be saved anew with "
                f"transformers' save_pretrained"
            )
        try:
            with safe_open(file, framework="np") as opened:
                for name in opened.keys():  # noqa: SIM118  (not a mapping)
                    tensors[name] = opened.get_tensor(name).astype(np.float32)
        except SafetensorError as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from None
    return tensors


@dataclass(frozen=True)
class _Pair:
    """Parameters of ours, and the arrays there that hold them: one, or one for each expert."""

    ours: tuple[str, ...]
    theirs: list[str]
    is_transposed: bool


def _pairs(family: Family, spec: ModelSpec) -> Iterator[_Pair]:
    """Every parameter that this model has, layer by layer."""
    params = abstract_params(spec)
    endings = {"": "weight", ".weight": "weight", ".scale": "weight", ".bias": "bias"}
    for module in family.modules:
        layers = range(spec.config.n_layer if "{}" in module.theirs else 1)
        experts = range(spec.config.n_expert if "{expert}" in module.theirs else 1)
        for layer, (ending, kind) in itertools.product(layers, endings.items()):
            ours = tuple(name.format(layer) + ending for name in module.ours)
            if ours[0] in params:
                name = f"{module.theirs.replace('{}', str(layer))}.{kind}"
                theirs = [name.replace("{expert}", str(expert)) for expert in experts]
                yield _Pair(ours, theirs, module.is_transposed)


def _without_padding(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """name -> shape that each parameter would have if nothing padded the vocabulary."""
    config = spec.config.model_copy(update={"vocab_multiple": 1})
    params = abstract_params(ModelSpec(config, spec.vocab_size))
    return {name: leaf.shape for name, leaf in params.items()}


def _to_ours(pair: _Pair, arrays: list[np.ndarray], spec: ModelSpec) -> Arrays:
    """The parameters that arrays of theirs hold."""
    shapes = [_without_padding(spec)[name] for name in pair.ours]
    widths = [shape[-1] for shape in shapes]
    expected = (*shapes[0][len(arrays) > 1 : -1], sum(widths))
    arrays = [array.T if pair.is_transposed else array for array in arrays]
    for name, array in zip(pair.theirs, arrays, strict=True):
        if array.shape != expected:
            raise CheckpointError(
                f"weight {name} has shape {list(array.shape)}, but config.json needs "
                f"{list(expected)}{' (transposed)' * (pair.is_transposed and array.ndim > 1)}"
            )
    joined = np.stack(arrays) if len(arrays) > 1 else arrays[0]
    params: Arrays = {}
    parts = np.split(joined, np.cumsum(widths)[:-1], axis=-1)
    for name, part in zip(pair.ours, parts, strict=True):
        params[name] = np.zeros(abstract_params(spec)[name].shape, np.float32)
        params[name][tuple(map(slice, part.shape))] = part
    return params


def _to_theirs(pair: _Pair, params: Mapping[str, Any], spec: ModelSpec) -> list[np.ndarray]:
    """The arrays of theirs that hold parameters."""
    shapes = _without_padding(spec)
    parts = [
        np.asarray(params[name], np.float32)[tuple(map(slice, shapes[name]))] for name in pair.ours
    ]
    joined = np.concatenate(parts, axis=-1)
    arrays = list(joined) if len(pair.theirs) > 1 else [joined]
    return [np.ascontiguousarray(array.T if pair.is_transposed else array) for array in arrays]
