"""config.json of a Hugging Face folder, to and from ModelConfig, by the tables in families.py.

A file that can be read in two ways is read as transformers reads it, or refused.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm.config import ModelConfig, validate
from llm.errors import UsageError
from llm.files import read_json, why
from llm.interop.families import FAMILIES, KEYS_OF_ANY, Description, Family

# Sizes that follow from others when a file has null or 0 for them.
_FOLLOWING = ("n_kv_head", "d_ff", "head_size")
# What the part of a file about rotary positions may hold that means something to us.
_ROTARY_KEYS = ("rope_theta", "rope_type", "partial_rotary_factor")
# No size of a model is larger. JAX counts in 32 bits.
_LARGEST = 2**31 - 1


def read_description(folder: Path) -> dict[str, Any]:
    """config.json, with what it nests about rotary positions at the top.

    transformers has those in rope_parameters since version 5; before, the base was at the top and
    the rest in rope_scaling. If a file has both, transformers reads rope_scaling alone.
    """
    path = folder / "config.json"
    try:
        described = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        fetch = (
            ""
            if folder.exists()
            else (f"; a model of the hub is fetched by `hf download {folder} --local-dir DIR`")
        )
        raise UsageError(
            f"{folder} holds no config.json; expected the folder of a Hugging Face model, with "
            f"config.json and *.safetensors{fetch}"
        ) from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {why(error)}") from None
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(described, dict):
        raise UsageError(f"{path} is not a JSON object; expected a model's settings")
    nested = described.get("rope_scaling") or described.get("rope_parameters") or {}
    if not isinstance(nested, dict):
        raise UsageError(
            f"{path}: rope_scaling and rope_parameters are {nested!r}; expected an object"
        )
    described["rope_type"] = nested.get("type", "default")
    return described | {name: nested[name] for name in _ROTARY_KEYS if name in nested}


def family_of(described: Description, folder: Path) -> Family:
    """The family that model_type names; transformers' AutoModel goes by nothing else either."""
    model_type = described.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UsageError(
            f"{folder} is a model of type {model_type!r}; supported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def vocab_size_of(described: Description, source: Path) -> int:
    vocab_size = described.get("vocab_size")
    if type(vocab_size) is not int or not 0 < vocab_size <= _LARGEST:
        raise UsageError(
            f"{source}: vocab_size = {vocab_size!r}: expected the number of tokens, below 2^31"
        )
    return vocab_size


def read_config(
    family: Family, described: Description, source: Path, context_length: int | None = None
) -> tuple[ModelConfig, Description]:
    """The model that the keys describe, and the value of each key.

    Args:
      context_length: the tokens that will be seen at once, if not as many as the model can.
    Raises:
      UsageError: names what cannot be represented.
    """
    values = _values(family, described, source)
    settings = dict(family.fixed)
    settings["bias"] = any(module.has_bias(values) for module in family.modules)
    found = [
        (key, key.spellings.get(value, value) if key.spellings else value)
        for key in family.keys
        if key.ours and ((value := values[key.theirs]) or key.ours not in _FOLLOWING)
    ]
    for key, value in found:
        if key.ours in ModelConfig.model_fields:
            settings.setdefault(key.ours, value)
    config = validate({"model": settings}, where=f"{source}, read as [model]").model.resolved()
    for key, value in found:
        if getattr(config, key.ours) != value:
            raise UsageError(
                f"{source}: {key.theirs} = {value!r} cannot be represented: by the other keys "
                f"model.{key.ours} is {getattr(config, key.ours)!r}"
            )
    seen = config.context_length if context_length is None else context_length
    if not 0 < seen <= config.context_length:
        raise UsageError(
            f"--model.context-length = {seen}: expected 1 to {config.context_length}, the length "
            f"that {source} gives"
        )
    _check_window(family, values, config.n_layer, seen, source)
    return config, {**values, "head_dim": config.head_size}


def _values(family: Family, described: Description, source: Path) -> dict[str, Any]:
    """The value of each key that means something, checked as far as it needs no other key."""
    given = dict(described)
    for alias, name in family.aliases.items():
        if alias in given and given.setdefault(name, given[alias]) != given[alias]:
            raise UsageError(
                f"{source}: {alias} = {given[alias]!r} and {name} = {given[name]!r} are two names "
                "of one setting; expected equal values, or one of them alone"
            )
    switches = [module.bias for module in family.modules]
    of_family = {key.theirs for key in family.keys}
    values: dict[str, Any] = {}
    for key in [key for key in KEYS_OF_ANY if key.theirs not in of_family] + [*family.keys]:
        value = values[key.theirs] = given.get(key.theirs, key.default)
        is_number = isinstance(value, int | float)
        if is_number and not abs(value) <= _LARGEST:
            raise UsageError(f"{source}: {key.theirs} = {value!r}: expected a number below 2^31")
        supported: list[Any] = [*key.spellings]
        if key.theirs in switches:
            supported = [False, True]
        elif key.is_checked and not key.ours:
            # An empty value is no different from a missing one.
            supported = [key.default] if value or key.default else [value]
        if supported and value not in supported:
            raise UsageError(
                f"{source}: {key.theirs} = {value!r} cannot be represented; supported: "
                f"{', '.join(map(repr, supported))}"
            )
        is_factor = isinstance(key.default, float) and key.default != 0.0 and not key.ours
        if (not key.is_checked and not (is_number or value is None)) or (is_factor and not value):
            raise UsageError(f"{source}: {key.theirs} = {value!r}: expected a number")
    return {**values, "layer_types": given.get("layer_types")}


def _check_window(
    family: Family, values: Description, layers: int, seen: int, source: Path
) -> None:
    """Refuse a window that hides a part of the context.

    Raises:
      UsageError: there is such a window, or config.json says in two ways which layers have it.
    """
    window = values.get("sliding_window") if values.get("use_sliding_window", True) else None
    if not family.slides or not window or window >= seen:
        return
    kinds = values.get("layer_types")
    slides = (
        [family.slides(values, layer) for layer in range(layers)]
        if kinds is None
        else [kind != "full_attention" for kind in kinds]
    )
    if any(slides):
        raise UsageError(
            f"{source}: sliding_window = {window} is smaller than the context of "
            f"{seen}, which cannot be represented; read less at once: "
            f"--model.context-length {window}"
        )


def describe(
    config: ModelConfig, misfit: Callable[[Family, dict[str, Any]], str]
) -> tuple[str, dict[str, Any]]:
    """The first family that is exactly this model, with its keys of config.json.

    Args:
      misfit: why a family whose settings fit cannot hold the parameters, "" if it can; it may
        change what is described.
    Raises:
      UsageError: there is none; the message says what keeps the model from each.
    """
    reasons = []
    for model_type, family in FAMILIES.items():
        allowed = {name: [value] for name, value in family.fixed.items()}
        described: dict[str, Any] = {}
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
            if key.theirs == "sliding_window":
                described["sliding_window"] = None
        wrong = [
            f"model.{name} = {getattr(config, name)!r} (needs {' or '.join(map(repr, values))})"
            for name, values in allowed.items()
            if getattr(config, name) not in values
        ]
        if not wrong and not (unfit := misfit(family, described)):
            return model_type, described
        reasons.append(f"not {model_type}, because of {', '.join(wrong) or unfit}")
    raise UsageError("no Hugging Face architecture is this model: " + "; ".join(reasons))
