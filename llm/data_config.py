"""The section [data]: which documents are read, in which proportions, and how they are split."""

import contextlib
import math
import re
from collections.abc import Iterable
from fractions import Fraction
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import BeforeValidator, PositiveFloat

from llm.section import Count, Settings, Sources, as_tuple, setting


class MixtureSource(Settings):
    """One of several sources whose windows are mixed: a table [[data.mixture]]."""

    name: str = setting(..., "a name, which reports call it by")
    source: Sources = setting(..., "a source, as in data.source")
    weight: PositiveFloat = setting(..., "a weight: its share of the windows beside the others'")
    max_epochs: PositiveFloat = setting(4.0, "refuse a run that would read it more often")
    text_field: str = setting("", "as data.text_field, which it replaces")

    @pydantic.field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if not re.fullmatch(r"\w[\w.+-]*", value):
            raise ValueError("expected a name of letters, digits and . _ + -")
        return value


def whole_weights(weights: Iterable[float]) -> tuple[int, ...]:
    """Weights as whole numbers in lowest terms. They are read as they are written: 0.1 is 1/10."""
    exact = [Fraction(repr(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    return tuple(number // math.gcd(*whole) for number in whole)


# A schedule of so many windows is computed at the start, in some seconds.
_LONGEST_PERIOD = 2**20


class FilterConfig(Settings):
    """Which documents are left out, and what is replaced in the others. Nothing, by default."""

    deduplicate: Literal["none", "exact", "near"] = setting(
        "none",
        "leave out documents whose text an earlier one has: the same bytes (exact), or most of its "
        "runs of five words (near)",
    )
    min_characters: Count = setting(0, "leave out documents with fewer characters")
    quality: Literal["none", "gopher", "c4", "fineweb"] = setting(
        "none", "leave out documents that break one of these rules (llm/quality/rules.py)"
    )
    redact: Annotated[
        tuple[Literal["email", "ip", "phone", "card", "key"], ...], BeforeValidator(as_tuple)
    ] = setting((), "personal data that a placeholder replaces, <EMAIL> for example")

    @property
    def active(self) -> bool:
        """Whether anything is filtered."""
        return self != FilterConfig()


class DataConfig(Settings):
    """Which documents are read and how they are split."""

    source: Sources = setting(
        "stdlib",
        "a path, folder, glob, URL (fetched once and cached), 'stdlib' (the source code of the "
        "Python standard library), 'hf:NAME' (a Hugging Face dataset, streamed); or a list. "
        "Several with weights: tables [[data.mixture]] of the file",
    )
    validation: str = setting(
        "documents:0.05",
        "held-out text: 'documents:F' holds out a fraction F of the documents, chosen by the hash "
        "of their text; 'tail:F' the last fraction F of all tokens; 'none' holds out nothing",
    )
    windows: Literal["stream", "packed"] = setting(
        "stream",
        "what a window holds: the next tokens of one row of all documents, or whole documents, "
        "each by itself (longer ones are cut at the context)",
    )
    errors: Literal["strict", "replace"] = setting(
        "strict", "bytes that are not UTF-8: stop and say where, or replace and count them"
    )
    text_field: str = setting(
        "text",
        "name of the text field in json, jsonl, parquet, Arrow and hub data; 'meta.text' is the "
        "field text of the field meta",
    )
    bad_rows: Literal["error", "skip"] = setting(
        "error", "rows without text: stop and name the row, or leave them out and count them"
    )
    cache_dir: str = setting(
        "", "token shards, downloads; empty: $LLM_CACHE_DIR, else ~/.cache/llm"
    )
    workers: Count = setting(0, "threads that tokenise; 0: one for each core")
    filters: FilterConfig = setting(FilterConfig(), "what is left out, and what is replaced")
    mixture: Annotated[tuple[MixtureSource, ...], BeforeValidator(as_tuple)] = setting(
        (), "sources with weights, in place of data.source: tables [[data.mixture]] of a file"
    )

    @property
    def by_source(self) -> dict[str, Self]:
        """The settings of each source of a mixture by its name; of the only source by ""."""
        if not self.mixture:
            return {"": self}
        return {
            one.name: self.model_copy(
                update={
                    "mixture": (),
                    "source": one.source,
                    "text_field": one.text_field or self.text_field,
                }
            )
            for one in self.mixture
        }

    @property
    def proportions(self) -> tuple[int, ...]:
        """The weights of the mixture, in whole numbers; () if there is none."""
        return whole_weights(one.weight for one in self.mixture)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _has_one_kind_of_source(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not values.get("mixture"):
            return values
        if values.get("source"):
            raise ValueError(
                f"data.source = {values['source']!r} beside [[data.mixture]]: expected one of "
                "them; make the source a table of the mixture"
            )
        return values | {"source": ""}

    @pydantic.model_validator(mode="after")
    def _check_mixture(self) -> Self:
        names = [one.name for one in self.mixture]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"data.mixture: {name!r} is the name of {names.count(name)} sources; expected "
                    "another name for each"
                )
        if sum(self.proportions) > _LONGEST_PERIOD:
            weights = ", ".join(f"{one.name} {one.weight!r}" for one in self.mixture)
            raise ValueError(
                f"data.mixture: the weights ({weights}) are exact only over more than "
                f"{_LONGEST_PERIOD:,} windows: round them, to four digits for example"
            )
        return self

    @pydantic.field_validator("validation")
    @classmethod
    def _check_validation(cls, value: str) -> str:
        kind, _, fraction = value.partition(":")
        with contextlib.suppress(ValueError):  # not a number
            if value == "none" or (kind in ("documents", "tail") and 0.0 < float(fraction) < 1.0):
                return value
        raise ValueError("expected 'documents:F' or 'tail:F' with 0 < F < 1, or 'none'")
