"""A section: a group of settings or flags, each with its type, default and meaning.

The settings of a run (llm/config.py), the flags of a command and the fields of a request are
sections. What bounds a number stands here too.
"""

import os
from typing import Annotated, Any

import pydantic
from pydantic import Field

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
DropoutRate = Annotated[float, Field(ge=0.0, lt=1.0)]
# Devices count in 32 bits. What is made one by one (layers, samples) has a bound of its own, since
# more would never end; and so have widths, since the compiler dies of weights of 2^63 bytes.
Count = Annotated[int, Field(ge=0, lt=2**31)]
Positive = Annotated[int, Field(gt=0, lt=2**31)]
AxisSize = Annotated[int, Field(ge=-1, lt=2**31)]
# Others write -1 for all tokens.
TopK = Annotated[Count, pydantic.BeforeValidator(lambda value: 0 if value == -1 else value)]
# JAX takes the lowest 32 bits of a seed: two that are equal in them would initialise alike.
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def as_tuple(value: Any) -> Any:
    """A list as a tuple, which cannot change."""
    return tuple(value) if isinstance(value, list) else value


def _sources(value: Any) -> Any:
    """A list as a tuple; a list of one source as that source."""
    value = as_tuple(value)
    return value[0] if isinstance(value, tuple) and len(value) == 1 else value


def _folder(value: str) -> str:
    """A path with ~ in place: the shell expands none in a file, or after the = of a flag."""
    path = os.path.expanduser(value)
    if path.startswith("~"):
        raise ValueError(f"expected a user whose home is known after ~, or ./{path} for that name")
    if "\0" in path or path != path.encode(errors="ignore").decode():
        raise ValueError("expected a path of UTF-8 characters and no zero byte: rename the folder")
    return path


Folder = Annotated[str, pydantic.AfterValidator(_folder)]
Sources = Annotated[str | tuple[str, ...], pydantic.BeforeValidator(_sources)]


def setting(default: Any, meaning: str, value: str | None = None, flag: str | None = None) -> Any:
    """One setting or flag: its default and its meaning, which is also its line in --help.

    Args:
      value: what --help calls the value; by default a word for its type.
      flag: the name of the flag, if it is not the name of the field.
    """
    return Field(default=default, description=meaning, title=value, alias=flag)


class Section(pydantic.BaseModel):
    """A frozen group of settings; unknown names and values of another type are refused."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False
    )


class Settings(Section):
    """A section of config.toml."""

    @pydantic.field_validator("*")
    @classmethod
    def _check_is_utf8(cls, value: Any) -> Any:
        """The name of a file may hold any bytes, and config.toml cannot."""
        text = str(value)
        if not text.isascii() and any("\ud800" <= sign <= "\udfff" for sign in text):
            raise ValueError("expected UTF-8: rename the file, or write * for what is not")
        return value
