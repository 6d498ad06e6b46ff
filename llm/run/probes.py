"""probes.jsonl: what the model said of a few fixed texts, and what it wrote, as it learnt.

    {"step", "name", "ids": [id, ...], "said": [null, [logprob, rank, entropy, likeliest, its
     logprob], ...]}

A row is one text at one step, with what the model said of each token; of a first token, which
nothing predicts, it says nothing. `likeliest` is the id of the token that it held likeliest in that
place. The row of a text that the model wrote has `prompt` too, the number of tokens that it was
given.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from llm.inference.records import NO_NUMBERS, Alternative, Spellings, TokenRecord
from llm.inference.transcript import Transcript
from llm.run.metrics import LineFile, Rows

_Id = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class Said(msgspec.Struct, frozen=True, array_like=True):
    """What a model said of one token, in nats; an array in JSON."""

    logprob: float
    rank: int | None = None
    entropy: float | None = None
    likeliest: _Id | None = None
    likeliest_logprob: float | None = None


class ProbeRow(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a model said of each token of a text."""

    step: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    name: str
    ids: list[_Id]
    said: list[Said | None]
    prompt: int | None = None

    def __post_init__(self) -> None:
        if len(self.said) != len(self.ids):
            raise ValueError("ids and said have other lengths")

    @classmethod
    def of(
        cls, step: int, name: str, records: Sequence[TokenRecord], prompt: int | None = None
    ) -> "ProbeRow":
        """Of records that list at least one alternative."""
        said = [
            Said(one.logprob, one.rank, one.entropy, one.top[0].id, one.top[0].logprob)
            if one.logprob is not None
            else None
            for one in records
        ]
        return cls(step, name, [one.id for one in records], said, prompt)

    def records(self, spellings: Spellings, sample: int = 0) -> list[TokenRecord]:
        """The records again, with one alternative each."""
        transcript = Transcript(spellings, sample)
        records = []
        for place, (id_, said) in enumerate(zip(self.ids, self.said, strict=True)):
            numbers: Any = NO_NUMBERS
            if said is not None:
                top: tuple[Alternative, ...] = ()
                if (most := said.likeliest) is not None and said.likeliest_logprob is not None:
                    top = (Alternative(most, *spellings[most], said.likeliest_logprob, None, 1),)
                numbers = said.logprob, said.rank, said.entropy, None, None, None, top
            given = self.prompt is None or place < self.prompt
            records.append(transcript.add(id_, "prompt" if given else "generated", numbers))
        records[-1:] = map(transcript.close, records[-1:])
        return records


_encode = msgspec.json.Encoder().encode


class ProbeKey(msgspec.Struct, frozen=True):
    """What a row is of, without its numbers: of a long file they are read for a few rows alone."""

    step: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    name: str
    ids: msgspec.Raw
    prompt: int | None = None


class ProbesFile(LineFile):
    """Appends rows, as metrics.jsonl is written."""

    def rewind(self, step: int) -> bool:
        """Keep the rows up to the step that training resumes from; whether that step has rows.

        Raises:
          CheckpointError: the file cannot be read.
          UsageError: it cannot be written.
        """
        rows, found, cut = Rows(self._path, ProbeKey), False, None
        for start, row in rows.appended():
            found |= row.step == step and row.prompt is None
            if cut is None and row.step > step:  # and so are all behind it
                cut = start
        self._cut(rows.end if cut is None else cut)
        return found

    def write(self, *rows: ProbeRow) -> None:
        """Append rows of one step, which have finite numbers; a kill leaves all of them or none."""
        self.append(b"".join(_encode(row) + b"\n" for row in rows))
