"""Token records in the small form in which a page carries them; page.js unpacks it.

Each token's spelling is written once, then rows of numbers: ten alternatives a token take about 250
bytes instead of 1,200.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from llm.inference.records import Record
from llm.pages.spelling import TokenRecord
from llm.pages.token_html import Sample

_UTF8 = ("ok", "open", "continue", "close", "bad")
_PLAIN_COLUMNS = (
    "position",
    "text_offset",
    "byte_offset",
    "logprob",
    "rank",
    "entropy",
    "sampling_logprob",
    "kept_mass",
    "kept_tokens",
)


def packed(samples: Sequence[Sample], kind: str) -> Record:
    """The samples as JSON; `kind` is "tokens" or "diff"."""
    spellings: dict[tuple[int, str, bytes], int] = {}

    def number_of(entry: Mapping[str, Any]) -> int:
        key = (entry["id"], entry["token"], bytes(entry["bytes"]))
        return spellings.setdefault(key, len(spellings))

    def top_of(top: Sequence[Mapping[str, Any]]) -> list[float]:
        return [value for entry in top for value in (number_of(entry), entry["logprob"])]

    def row(token: TokenRecord) -> list[Any]:
        text = 0 if token["text"] == token["token"] else token["text"]
        packed = [number_of(token), int(token["phase"] == "generated"), text]
        packed += [_UTF8.index(token["utf8"]), [token.get(key) for key in _PLAIN_COLUMNS]]
        packed += [top_of(token["top"]), _kept(token["top"])]
        if kind == "diff":
            before = token["before"]
            numbers = [before["logprob"], before["rank"], before["entropy"]]
            packed.append([*numbers, top_of(before["top"])])
        return packed

    packed_samples = [
        {
            "sample": sample.name,
            "rows": [row(token) for token in sample.tokens],
            "end": sample.end and {k: v for k, v in sample.end.items() if k != "text"},
        }
        for sample in samples
    ]
    return {
        "columns": _PLAIN_COLUMNS,
        "spellings": [_spelling(*key) for key in spellings],
        "samples": packed_samples,
    }


def _kept(top: Sequence[Mapping[str, Any]]) -> int | str:
    """1 where every alternative was kept, 0 where nothing was drawn, else a digit for each."""
    kept = [entry.get("kept") for entry in top]
    if None in kept:
        return 0
    return 1 if all(kept) else "".join("1" if flag else "0" for flag in kept)


def _spelling(token_id: int, token: str, token_bytes: bytes) -> list[Any]:
    """The bytes are left out where the spelling is their UTF-8."""
    if token.encode("utf-8", "surrogatepass") == token_bytes:
        return [token_id, token]
    return [token_id, token, token_bytes.hex()]
