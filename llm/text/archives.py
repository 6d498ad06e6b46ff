"""Tar archives as WebDataset lays them out: members whose names differ behind the first dot are one
sample.

    shard-000.tar: 0001.txt 0001.json 0001.jpg 0002.txt ...

Nothing is unpacked. Source: https://github.com/webdataset/webdataset, README.
"""

import json
import tarfile
from collections.abc import Callable, Iterator
from typing import Any

from llm.errors import DataError
from llm.text.content import Stream

# The member that a sample is named by, as in WebDataset and `datasets`.
KEY = "__key__"

_UNPACK = "unpack it where that does no harm, and name the folder that comes out"


class _Member(tarfile.TarInfo):
    """A member of an archive. `tarfile` would take damage behind the first one for the end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Member":
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"it has no end, but {error}") from None


def samples(
    content: Stream, name: str, decode: Callable[[bytes, str], str], longest: int
) -> Iterator[dict[str, Any]]:
    """Each sample as a row: what its .txt and .json hold, and the names of its other fields.

    The field "text" is the .txt; if there is none, it is that of the .json, whose fields are fields
    of the row.

    Args:
      name: of the archive.
      decode: gives the text of bytes, which are of what is named.
      longest: member in bytes.
    Raises:
      DataError: the archive is damaged, reaches out of itself, or has no text.
    """
    row: dict[str, Any] = {}
    waiting: list[dict[str, Any]] = []
    with_text = False
    for member, data in _texts(content, name, longest):
        what = f"{name}, {member},"
        folder, slash, base = member.rpartition("/")
        key, _, field = base.partition(".")
        field = field.lower()
        key = f"{folder}{slash}{key}"
        if row and row[KEY] != key:
            waiting.append(row)
            row = {}
        row[KEY] = key
        row[field] = None if data is None else decode(data, what)
        if data is not None and field.endswith("json"):
            text = row[field].removeprefix("\ufeff")
            row[field] = parsed(text, what, "mend or remove it")
        with_text |= data is not None
        # Whether there is any text is known before a row without text is an error.
        if with_text:
            yield from map(_joined, waiting)
            waiting.clear()
    if not with_text:
        fields = ", ".join(sorted({field for one in [*waiting, row] for field in one} - {KEY})[:9])
        found = f"members {fields}" if fields else "nothing"
        raise DataError(f"{name} has no member .txt or .json: found {found}; name text")
    yield _joined(row)


def _joined(row: dict[str, Any]) -> dict[str, Any]:
    fields = row.get("json")
    text = {"text": row["txt"]} if "txt" in row else {}
    return {**(fields if isinstance(fields, dict) else {}), **row, **text}


def _texts(content: Stream, name: str, longest: int) -> Iterator[tuple[str, bytes | None]]:
    """The name of each file of an archive, and what it holds; None if that is no text."""
    count = 0
    try:
        with tarfile.open(  # type: ignore[call-overload]
            fileobj=content, mode="r|", tarinfo=_Member
        ) as archive:
            while member := archive.next():
                archive.members.clear()  # of those that were read, it would keep all
                count += 1
                _check(member, name, longest)
                if member.isdir() or member.name.rpartition("/")[2].startswith("."):
                    continue
                holds_text = member.name.lower().endswith((".txt", ".json"))
                file = archive.extractfile(member) if holds_text else None
                yield member.name, file.read() if file else None
    except tarfile.TarError as error:
        raise DataError(
            f"{name} is damaged or cut off behind {count} members: {error}; put it back whole, or "
            "leave it out"
        ) from None


def _check(member: tarfile.TarInfo, name: str, longest: int) -> None:
    """Raise a DataError for a member that is no file or folder in the archive."""
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise DataError(f"{name} has a member outside of itself, {member.name!r}; {_UNPACK}")
    if not member.isfile() and not member.isdir():
        link = f" to {member.linkname!r}" if member.linkname else ""
        raise DataError(
            f"{name} has a member that is a link or a device, {member.name!r}{link}; expected "
            f"files: {_UNPACK}"
        )
    if member.size > longest and member.name.lower().endswith((".txt", ".json")):
        raise DataError(
            f"{name} has a member of {member.size} bytes, {member.name!r}; expected at most "
            f"{longest}, which fit into memory: {_UNPACK}"
        )


# Control characters inside of texts are let through.
_JSON = json.JSONDecoder(strict=False)


def parsed(text: str, what: str, expected: str) -> Any:
    """The value of JSON, which is of what is named.

    Raises:
      DataError: it is none.
    """
    try:
        return _JSON.decode(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} is not JSON: {error}; {expected}") from None
