"""config.json of a Hugging Face folder, to and from ModelConfig, by the tables in families.py.

A file that can be read in two ways is read as transformers reads it, or refused.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm.config import validate
from llm.errors import UsageError
from llm.files import read_json, why
from llm.interop.families import FAMILIES
from llm.interop.table import KEYS_OF_ANY, Description, Family
from llm.model.gpt import is_each
from llm.model_config import ModelConfig

# Settings for which a file may have null: sizes that follow from others, and what is off.
_FOLLOWING = ("n_kv_head", "d_ff", "head_size", "logit_soft_cap", "attention_soft_cap", "window")
# No size of a model is larger. JAX counts in 32 bits.
_LARGEST = 2**31 - 1
# rope_type -> what it also reads, and the one value that can be represented.
_ROPE: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {},
    "llama3": {"low_freq_factor": 1, "high_freq_factor": 4},
    "yarn": {
        "beta_fast": 32,
        "beta_slow": 1,
        "truncate": True,
        "mscale": None,
        "mscale_all_dim": None,
    },
}


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
    return described | _read_rope(described, path)


def _read_rope(described: Description, source: Path) -> dict[str, Any]:
    """What a file nests about rotary positions, by names of ours where it has no name at the top.

    rope_attention is what YaRN multiplies queries and keys by.
    """
    parts: Any = described.get("rope_parameters") or {}
    scaling = described.get("rope_scaling") or {}
    if not isinstance(parts, dict) or not isinstance(scaling, dict):
        raise UsageError(
            f"{source}: rope_scaling = {scaling!r}, rope_parameters = {parts!r}: expected objects"
        )
    found: dict[str, Any] = {}
    local = parts.get("sliding_attention")
    if isinstance(local, dict):  # each kind of layer has its own
        if local.get("rope_type", "default") != "default":
            raise UsageError(
                f"{source}: rope_type = {local['rope_type']!r} of layers with a window cannot be "
                "represented; supported: 'default'"
            )
        parts = {**(parts.get("full_attention") or {}), **scaling}
        if "rope_theta" in local:
            found["rope_local_base_freq"] = local["rope_theta"]
    else:
        parts = scaling or parts
    kind = found["rope_type"] = parts.get("rope_type", parts.get("type", "default"))
    found |= {x: parts[x] for x in ("rope_theta", "partial_rotary_factor") if x in parts}
    if not isinstance(kind, str) or kind in ("default", *({kind} - _ROPE.keys())):
        return found
    for name, value in _ROPE[kind].items():
        if (given := parts.get(name)) not in (None, value):
            raise UsageError(
                f"{source}: {name} = {given!r} cannot be represented; supported: {value!r}"
            )
    factor = found["rope_factor"] = parts.get("factor")
    longest = described.get("max_position_embeddings")
    found["rope_original_length"] = described.get(
        "original_max_position_embeddings", parts.get("original_max_position_embeddings", longest)
    )
    if kind == "yarn" and isinstance(factor, int | float) and factor > 1:
        given = parts.get("attention_factor")
        found["rope_attention"] = 0.1 * math.log(factor) + 1 if given is None else given
    return found


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
        if key.ours and key.is_checked and key.ours != "window"
        if (value := values[key.theirs]) or key.ours not in _FOLLOWING
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
    layers = _read_layers(family, values, config, seen, source)
    return config.model_copy(update=layers), {**values, "head_dim": config.head_size}


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
        is_factor = isinstance(key.default, float) and key.default and not key.is_checked
        if (not key.is_checked and not (is_number or value is None)) or (is_factor and not value):
            raise UsageError(f"{source}: {key.theirs} = {value!r}: expected a number")
    lists = {pattern.theirs: given.get(pattern.theirs) for pattern in family.patterns}
    attention = {"rope_attention": given.get("rope_attention", 1.0)}
    return {**values, **lists, **attention}


def _read_layers(
    family: Family, values: Description, config: ModelConfig, seen: int, source: Path
) -> dict[str, int]:
    """The window, and which layers differ from the others.

    A window as long as what is `seen` hides nothing. It is left out, unless layers with a window
    have a rotary base of their own.
    """
    window = values.get("sliding_window") if values.get("use_sliding_window", True) else None
    if window and type(window) is not int:
        raise UsageError(f"{source}: sliding_window = {window!r}: expected a number of tokens")
    if not window or (window >= seen and not config.window_rope_theta):
        window = 0
    found: dict[str, int] = {"window": window}
    layers = range(config.n_layer)
    for pattern in family.patterns:
        if pattern.ours == "global_every" and not window:
            continue
        words = values.get(pattern.theirs)
        try:
            differs = [
                bool(pattern.usual(values, i)) if words is None else words[i] == pattern.words[0]
                for i in layers
            ]
        except (ArithmeticError, TypeError, LookupError):
            differs = []
        every = differs.index(True) + 1 if True in differs else 0
        if differs != [is_each(every, i) for i in layers] or len(words or layers) != len(layers):
            raise UsageError(
                f"{source}: {pattern.theirs or 'layers'} = {words!r} cannot be represented: "
                f"expected {pattern.words[0]!r} in each n-th layer and {pattern.words[1]!r} in the "
                f"others, of {len(layers)}"
            )
        found[pattern.ours] = every
    if found.get("global_every") == 1:
        found |= {"window": 0, "global_every": 0}
    return found


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
            elif key.ours in _FOLLOWING:
                value = value or None
            if described.setdefault(key.theirs, value) != value:
                allowed[key.ours] = [described[key.theirs]]
        if "head_dim" not in described:
            allowed["head_size"] = [config.d_model // config.n_head]
        _describe_layers(family, config, described, allowed)
        _describe_rope(described)
        wrong = [
            f"model.{name} = {getattr(config, name)!r} (needs {' or '.join(map(repr, values))})"
            for name, values in allowed.items()
            if getattr(config, name) not in values
        ]
        if not wrong and not (unfit := misfit(family, described)):
            return model_type, described
        reasons.append(f"not {model_type}, because of {', '.join(wrong) or unfit}")
    raise UsageError("no Hugging Face architecture is this model: " + "; ".join(reasons))


def _describe_layers(
    family: Family,
    config: ModelConfig,
    described: dict[str, Any],
    allowed: dict[str, list[Any]],
) -> None:
    """Write which layers differ, where the family has a list, and else allow none."""
    if "use_sliding_window" in described:
        described["use_sliding_window"] = config.window > 0
    elif any(pattern.theirs == "layer_types" for pattern in family.patterns):
        # Gemma's code wants a number, even if no layer has the window.
        described["sliding_window"] = config.window or config.context_length
    for pattern in family.patterns:
        differ, others = pattern.words
        every = getattr(config, pattern.ours)
        if pattern.ours == "global_every" and not config.window:
            every = 1
        elif not pattern.theirs:
            allowed[pattern.ours] = [0]
        if pattern.theirs:
            described[pattern.theirs] = [
                differ if is_each(every, layer) else others for layer in range(config.n_layer)
            ]


def _describe_rope(described: dict[str, Any]) -> None:
    """Move what is about rotary positions to where transformers reads it since version 5."""
    if "rope_theta" not in described:
        return
    kind, factor, length = (
        described.pop(name) for name in ("rope_type", "rope_factor", "rope_original_length")
    )
    parts = {"rope_type": kind, "rope_theta": described["rope_theta"]}
    parts["partial_rotary_factor"] = described.pop("partial_rotary_factor", None)
    if kind != "default":
        parts |= {"factor": factor, **_ROPE.get(kind, {})}
    if kind in ("llama3", "yarn"):
        parts["original_max_position_embeddings"] = length
    if kind == "yarn":
        parts["attention_factor"] = 1.0  # it is part of the weights
    parts = {name: value for name, value in parts.items() if value is not None}
    local = described.pop("rope_local_base_freq", None)
    if local is not None:
        # 0: a window's layers rotate as the others do.
        nearby = {"rope_type": "default", "rope_theta": local} if local else parts
        parts = {"full_attention": parts, "sliding_attention": nearby}
        del described["rope_theta"]
    described["rope_parameters"] = parts
