"""What a table says of a family of Hugging Face models: its weights and the keys of config.json.

The tables are in families.py, llama.py and gemma.py. hf.py and description.py read them in both
directions.
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
      is_by_head: the arrays of several lie side by side head by head, not one after the other.
      unused_rows: how many rows of theirs come before ours, and are used by nothing.
    """

    theirs: str
    ours: Sequence[str]
    bias: bool | str = False
    is_transposed: bool = True
    is_by_head: bool = False
    unused_rows: int = 0

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
    spellings: Mapping[Any, str] = field(default_factory=dict)
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
      prefix: the beginning of every weight's name but the head's. Old GPT-2 files leave it out.
      head: the head's name.
      switches: settings of ModelConfig that every model of the family has at this value, if that is
        not the one in USUAL.
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
    keys: Sequence[Key]
    ignored: re.Pattern[str]
    switches: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    factors: Mapping[str, Callable[[Description], float]] = field(default_factory=dict)
    patterns: Sequence[Pattern] = ()
    gain_offset: float = 0.0
    head: str = "lm_head"

    @property
    def fixed(self) -> dict[str, Any]:
        """Every setting of ModelConfig that no key and no pattern decides, with its value."""
        decided = {key.ours for key in self.keys} | {pattern.ours for pattern in self.patterns}
        usual = {name: value for name, value in USUAL.items() if name not in decided}
        return {**usual, **self.switches}


# The switches of a Llama: what a family has if its table says nothing else.
USUAL = {
    "norm": "rmsnorm",
    "positions": "rotary",
    "n_expert": 1,
    "qk_norm": False,
    "qk_norm_joint": False,
    "norm_place": "before",
    "logit_soft_cap": 0.0,
    "attention_soft_cap": 0.0,
    "unrotated_every": 0,
    "window_rope_theta": 0.0,
    "rotary_fraction": 1.0,
    "block": "sequential",
    "head_bias": False,
    "window": 0,
    "global_every": 0,
}

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


def with_defaults(keys: Iterable[Key], **defaults: Any) -> tuple[Key, ...]:
    """The keys, some with other defaults: setting -> default."""
    return tuple(replace(key, default=defaults.get(key.ours, key.default)) for key in keys)


def changed(keys: Iterable[Key], *others: Key, without: str = "") -> tuple[Key, ...]:
    """The keys, with others in the place of those of the same settings.

    Args:
      without: a setting whose key goes.
    """
    replaced = {key.ours for key in others if key.ours} | ({without} - {""})
    return (*(key for key in keys if key.ours not in replaced), *others)
