"""The one parser of every command line: a pydantic model goes in, its values come out.

A command declares its flags as the fields of a model (`CommandLine`), with type, default and
meaning. A command that reads a configuration has a field `settings` and takes every setting as
`--section.key`. There is one behaviour for all commands:

    --top-k 5   --top_k=5      dashes or underscores, a space or an equals sign; no abbreviations
    --json   --json=false      a switch; --no-json turns it off too
    --prompt a b --prompt c    several values: a, b, c; a flag of one value takes the last

pydantic checks the values, as it does in a configuration file. A mistake is a UsageError that says
what was found, what was expected and what to do.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args, get_origin

import pydantic
from pydantic.fields import FieldInfo

from llm.commands.outputs import check_outputs
from llm.config import Config, ProbeText, expected, known_files, load_config
from llm.data_config import MixtureSource
from llm.errors import UsageError
from llm.names import nearest
from llm.section import Section, setting

WIDEST_HELP = 100  # columns; longer lines are harder to read


# Types of flags and arguments that name a file to write (or, as "-", standard output), and files or
# runs to read.
_TABLES = {MixtureSource, ProbeText}
_OUTPUT, _INPUT, _STDOUT = "output", "input", "standard output"
OutputFile = Annotated[str | None, _OUTPUT]
OutputStream = Annotated[str | None, _OUTPUT, _STDOUT]
InputFile = Annotated[str, _INPUT]
OptionalInput = Annotated[str | None, _INPUT]
InputFiles = Annotated[tuple[str, ...], _INPUT]


class CommandLine(Section):
    """The arguments of one command. The docstring of the command's module is its help.

    A flag is a field `top: int = setting(10, "alternatives in each record")`. An argument without
    a flag is a field `run: str = argument("RUN", "run directory")`.
    """

    # Flags whose default is in the run's configuration: --help shows no other.
    defaults_of_run: ClassVar[frozenset[str]] = frozenset()
    # Whether --help lists the settings of `settings` too.
    lists_settings: ClassVar[bool] = False

    help: bool = setting(False, "show this text")

    @pydantic.model_validator(mode="after")
    def _check_outputs(self) -> Self:
        outputs, inputs = {}, {}
        for name, info in type(self).model_fields.items():
            value, flag = getattr(self, name), info.title if not info.repr else spelled(name)
            if _INPUT in info.metadata:
                inputs[flag or name] = [value] if isinstance(value, str) else value or ()
            if _OUTPUT not in info.metadata or value is None:
                continue
            if value != "-":
                outputs[spelled(name)] = value
            elif _STDOUT not in info.metadata:
                raise UsageError(f"{flag} -: expected the name of a file, not standard output")
        check_outputs(outputs, inputs)
        return self


def argument(name: str, meaning: str, default: Any = ...) -> Any:
    """A field that is given by its place, without a flag."""
    return pydantic.Field(default, title=name, description=meaning, repr=False)


Options = TypeVar("Options", bound=CommandLine)


def parse(options: type[Options], words: Sequence[str]) -> Options:
    """The values that the words of a shell give. `--help` prints the help and exits with 0.

    Raises:
      UsageError: the words cannot be used.
    """
    flags = flags_of(options)
    usage, _, description = (sys.modules[options.__module__].__doc__ or "").partition(": ")
    usage = f"usage: {' '.join(usage.split())}"
    given = _read(flags, words, usage)
    changes = {}
    if "settings" in options.model_fields:
        changes = {name: given.pop(name) for name in [*given] if "." in name}
    if "config" in given:
        from llm.commands.init_from import inherit  # which spells flags

        given["settings"] = load_config(given["config"], changes, inherit)
    if given.get("help"):
        print(_help(options, usage, description, given.get("settings", Config())), flush=True)
        raise SystemExit(0)
    try:
        return options.model_validate(given)
    except pydantic.ValidationError as error:
        problems = [_explain(problem, flags, usage) for problem in error.errors()]
        raise UsageError("\n  ".join(problems)) from None


@dataclass(frozen=True)
class Flag:
    """One field of a model, as the command line spells it.

    Attributes:
      name: `top_k`, or `model.n_layer` of a setting.
      types: the types that a value can have; a literal value stands for itself.
    """

    name: str
    info: FieldInfo
    types: tuple[Any, ...]

    @property
    def is_argument(self) -> bool:
        return not self.info.repr

    @property
    def choices(self) -> list[str]:
        return [kind for kind in self.types if isinstance(kind, str)]

    @property
    def spelling(self) -> str:
        return self.info.title or "" if self.is_argument else spelled(self.name)

    @property
    def usage(self) -> str:
        """The spelling with a name for its value: --model.n-layer N."""
        if self.is_argument or bool in self.types:
            return self.spelling
        kind = "N" if int in self.types else "X" if float in self.types else "TEXT"
        value = self.info.title or "|".join(self.choices) or kind
        return f"{self.spelling} {value}{' ...' * (tuple in self.types)}"

    def read(self, text: str) -> Any:
        """The text as a value, or as it is: pydantic then says what was expected."""
        if bool in self.types and text.lower() in ("true", "false"):
            return text.lower() == "true"
        for kind in (int, float):
            if kind in self.types:
                with contextlib.suppress(ValueError):
                    return kind(text)
        return text

    def help(self, default: Any, width: int) -> str:
        """The flag on the left, its meaning and default on the right, or below a long flag."""
        if default is True:
            default = f"on; {spelled(_off(self.name))}: off"
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        is_plain = self.info.is_required() or shown is False or shown in (None, "", {})
        about = f"{self.info.description}{'' if is_plain else f' ({shown})'}"
        column, left = 2 * width // 5, f"  {self.usage}"
        start = f"{left:{column}}" if len(left) < column - 1 else f"{left}\n{' ' * column}"
        return start + f"\n{' ' * column}".join(textwrap.wrap(about, width - column))


def spelled(name: str) -> str:
    """--model.n-layer for model.n_layer."""
    return f"--{name.replace('_', '-')}"


def flags_of(model: type[pydantic.BaseModel], section: str = "") -> dict[str, Flag]:
    """Every field by its name; a setting by `section.key`. Tables of a file are no flags."""
    flags: dict[str, Flag] = {}
    for key, info in model.model_fields.items():
        kind = info.annotation
        types = tuple(_types(kind))
        if isinstance(kind, type) and issubclass(kind, Section):
            flags |= flags_of(kind, "" if kind is Config else f"{section}{key}.")
        elif not _TABLES.intersection(types):
            name = section + (info.alias or key)
            flags[name] = Flag(name, info, types)
    return flags


def _types(annotation: Any) -> Iterator[Any]:
    """The types in an annotation: tuple, int and "all" for `tuple[int, ...] | Literal["all"]`."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        yield from inner
    elif origin is None:
        yield annotation
    else:
        if origin in (tuple, dict):  # a dict is given as several words
            yield tuple
        for part in inner[:1] if origin in (tuple, dict, Annotated) else inner:
            yield from _types(part)


def _read(flags: Mapping[str, Flag], words: Sequence[str], usage: str) -> dict[str, Any]:
    """The value of each flag and argument among the words."""
    found: dict[str, list[Any]] = {}
    places = [flag for flag in flags.values() if flag.is_argument]
    left, hint = list(words), usage
    while left:
        word = left.pop(0)
        if _is_flag(word):
            flag, values = _read_flag(flags, word, left)
            found.setdefault(flag.name, []).extend(map(flag.read, values))
            hint = f"{flag.spelling} takes {'true or false' if bool in flag.types else 'one value'}"
        elif places and word in (places[0].choices or [word]):
            place = places[0] if tuple in places[0].types else places.pop(0)
            found.setdefault(place.name, []).append(word)
        else:
            raise UsageError(f"unexpected word {word!r}; {hint}")
    return {
        name: tuple(values) if tuple in flags[name].types else values[-1]
        for name, values in found.items()
    }


def _is_flag(word: str) -> bool:
    return word.startswith("-") and word != "-" and not word[1].isdigit()


def _read_flag(flags: Mapping[str, Flag], word: str, left: list[str]) -> tuple[Flag, list[str]]:
    """The flag that a word names, and its values. The values are removed from `left`."""
    spelling, equals, value = ("--help" if word == "-h" else word).partition("=")
    name, values = spelling.lstrip("-").replace("-", "_"), [value] if equals else []
    switches = {_off(flag.name): flag for flag in flags.values() if bool in flag.types}
    flag = flags.get(name) or switches.get(name)
    if flag is None or flag.is_argument or not spelling.startswith("--"):
        raise UsageError(f"unknown flag {spelling}{_hint(flags, name)}")
    if bool in flag.types:
        if not values and left and left[0].lower() in ("true", "false"):
            values = [left.pop(0)]
        negated = {"true": "false", "false": "true"} if name != flag.name else {}
        value = (values or ["true"])[0].lower()
        return flag, [negated.get(value, value)]
    if not values and left and not left[0].startswith("--"):
        values = [left.pop(0)]
    if not values:
        raise UsageError(f"{spelling} has no value; expected {flag.usage}")
    while tuple in flag.types and left and not _is_flag(left[0]):
        values.append(left.pop(0))
    return flag, values


def _off(name: str) -> str:
    """model.no_bias for model.bias."""
    section, dot, key = name.rpartition(".")
    return f"{section}{dot}no_{key}"


def _hint(flags: Mapping[str, Flag], name: str) -> str:
    """The end of a message about an unknown flag: what would work."""
    names = [flag.name for flag in flags.values() if not flag.is_argument]
    inside = [spelled(key) for key in names if key.startswith(f"{name}.")]
    if inside:
        return f"; it is a section, with the settings {', '.join(inside)}"
    near = nearest(name, names)
    return f"; did you mean {spelled(near)}?" if near else "; --help lists the flags"


def _explain(problem: Any, flags: Mapping[str, Flag], usage: str) -> str:
    """What is wrong with one value."""
    if not problem["loc"]:
        return expected(problem)
    flag = flags[str(problem["loc"][0])]
    if problem["type"] == "missing":
        return f"{flag.usage} is missing; {usage}{known_files() * (flag.name == 'config')}"
    return f"{flag.spelling} {problem['input']}: {expected(problem)}"


def _help(options: type[CommandLine], usage: str, description: str, settings: Config) -> str:
    """The docstring, the command's own flags, and the settings in their sections."""
    width = min(shutil.get_terminal_size().columns, WIDEST_HELP)

    def listed(flags: Iterable[Flag], defaults: Mapping[str, Any]) -> str:
        lines = (flag.help(defaults.get(flag.name.split(".")[-1]), width) for flag in flags)
        return "\n".join(lines)

    paragraphs = [usage, *(description[:1].upper() + description[1:]).strip().split("\n\n")]
    parts = [text if text.startswith(" ") else textwrap.fill(text, width) for text in paragraphs]
    own = [flag for name, flag in flags_of(options).items() if "." not in name]
    own.sort(key=lambda flag: (flag.name == "help", not flag.is_argument))
    defaults = {flag.name: flag.info.get_default() for flag in own}
    parts.append(listed(own, defaults | dict.fromkeys(options.defaults_of_run)))
    for section, values in settings if options.lists_settings else ():
        if section == "probe":
            continue  # tables of a file
        parts.append(textwrap.fill(f"[{section}] {type(values).__doc__}", width))
        parts.append(listed(flags_of(type(values), f"{section}.").values(), dict(values)))
    return "\n\n".join(parts)
