"""What a folder is, and which of its files are read.

    with state.json or dataset_dict.json        what `datasets.save_to_disk` wrote
    with a data set's card, or with files or    a data set of the Hugging Face hub, as it is cloned
    folders that are named for splits           or laid out
    any other                                   the files below it

Only the train split of a data set is read. Everything that is left out is named, and what should be
read and cannot be is an error. Links to folders are not followed, so a loop of links does no harm.
"""

import collections
import contextlib
import itertools
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from llm.errors import DataError
from llm.text import layouts
from llm.text.cache import CACHE_TAG
from llm.text.documents import KINDS, kind_of_file

# In a folder of other files, these are more often documents than tables of them.
_MAYBE_TEXT = (".json", ".csv", ".tsv")


class File(NamedTuple):
    """A file that is read, and its kind."""

    path: Path
    kind: str


class Tree:
    """The files below a folder.

    Args:
      root: the folder that a person named, or that all matches of a pattern are below.
      caches: folders of prepared things, which grow while a run reads.
    Attributes:
      left: why something was left out, and what.
    """

    def __init__(self, root: Path, caches: Iterable[Path]):
        self.root = root
        self.left: dict[str, dict[Path, None]] = collections.defaultdict(dict)
        self._caches = []
        for cache in caches:
            with contextlib.suppress(OSError):  # it is not there, or lies where nobody may look
                self._caches.append(cache.stat())

    def files(self) -> list[File]:
        """The files of the folder, read as what the folder is."""
        return self._checked(self._folder(self.root))

    def matches(self, parts: Sequence[str]) -> list[File]:
        """The files that a pattern below the root matches, in the order of their paths."""
        found = self._readable(sorted(set(self._matches(self.root, parts)), key=str))
        self.left.pop("hidden", None)  # no pattern asks for these
        return self._checked(found)

    def walk(self, folder: Path, without: Collection[str] = ()) -> Iterator[Path]:
        """Every file below a folder, whatever the folder is, in a fixed order."""
        for _, folders, files in self._descend(folder):
            folders[:] = [below for below in folders if below.name not in without]
            yield from files

    def note(self) -> str:
        """A sentence that names what was left out; "" if nothing was."""
        parts = []
        for why, paths in self.left.items():
            shown = ", ".join(str(path.relative_to(self.root)) for path in [*paths][:3])
            more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
            parts.append(f"{shown}{more} ({why})")
        return f"{self.root}: left out {'; '.join(parts)}" if parts else ""

    def _checked(self, files: Iterator[File]) -> list[File]:
        """The same files, unless most of the bytes that may be text cannot be read."""
        found = list(files)
        for kind in KINDS.values():
            paths = [*self.left.get(kind.what, ())] if kind.holds_text else []
            unread = sum(path.stat().st_size for path in paths)
            if paths and unread > sum(file.path.stat().st_size for file in found):
                raise DataError(
                    f"most of {self.root} cannot be read: {len(paths)} files, such as {paths[0]} "
                    f"({kind.what}); {kind.remedy}"
                )
        return found

    def _folder(self, root: Path) -> Iterator[File]:
        for folder, folders, files in self._descend(root):
            names = {file.name for file in files}
            if {"blobs", "snapshots"} <= {below.name for below in folders}:
                raise DataError(
                    f"{folder} is the hub's cache of all versions of a data set; name one of the "
                    f"folders in {folder / 'snapshots'}"
                )
            if "dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= names:
                folders.clear()
                yield from self._saved(folder)
            elif layouts.is_data_set(folder, folders, files):
                folders.clear()
                yield from self._train_split(folder)
            else:
                for path, kind in self._readable(files):
                    is_text = path.suffix.lower() in _MAYBE_TEXT and "+" not in kind
                    yield File(path, "text" if is_text else kind)

    def _descend(self, root: Path) -> Iterator[tuple[Path, list[Path], list[Path]]]:
        """Each folder with its folders and files; a folder that is taken out is not entered.

        `os.walk` would pass over a folder that cannot be listed.
        """
        pending = [root]
        while pending:
            folder = pending.pop()
            folders, files = self._listed(folder)
            yield folder, folders, files
            pending += reversed(folders)

    def _entries(self, folder: Path) -> list[os.DirEntry[str]]:
        """What is in a folder, sorted; nothing if the folder changes while a run reads it."""
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        names = {entry.name for entry in entries}
        status = folder.stat()
        is_run = "run.lock" in names or {"config.toml", "run.json"} <= names
        is_cache = any(os.path.samestat(status, cache) for cache in self._caches)
        if not is_run and not is_cache and CACHE_TAG not in names:
            return entries
        why = "a run directory" if is_run else "a cache"
        if folder == self.root:
            raise DataError(
                f"{folder} is {why}, which changes while a run reads it; point data.source at text"
            )
        self.left[why][folder] = None
        return []

    def _listed(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """The folders and the files in a folder, sorted, without what is never read."""
        folders, files = [], []
        for entry in self._entries(folder):
            path = Path(entry.path)
            if entry.name[0] == "." or entry.name == "lost+found":
                self.left["hidden"][path] = None
            elif entry.is_dir() and entry.is_symlink():
                self.left["a link to a folder; name it as a source of its own"][path] = None
            elif entry.is_dir():
                folders.append(path)
            elif entry.is_file() or entry.is_symlink():
                files.append(path)
            else:
                self.left["neither a file nor a folder"][path] = None
        return folders, files

    def _readable(self, paths: Iterable[Path], every: bool = False) -> Iterator[File]:
        """The files that are of kinds that are read; with `every`, all of them have to be."""
        for path in paths:
            if path.is_symlink() and not path.exists():
                raise DataError(
                    f"{path} is a link to {os.readlink(path)}, which is not there; put that file "
                    "back, or remove the link"
                )
            kind = kind_of_file(path)
            if KINDS[kind].read is not None:
                yield File(path, kind)
            elif every or kind == "lfs":
                raise refused(path, kind)
            else:
                self.left[KINDS[kind].what][path] = None

    def _matches(self, folder: Path, parts: Sequence[str]) -> Iterator[Path]:
        """Files below a folder that match a pattern, given in parts."""
        first, rest = parts[0], parts[1:]
        if first == "**":
            for below, _, _ in self._descend(folder):
                yield from self._matches(below, rest or ["*"])
            return
        there = [entry.name for entry in self._entries(folder)]
        alike = [n for n in there if fnmatchcase(n, first) and (n[0] != "." or first[0] == ".")]
        # A name that is there is no pattern.
        for path in (folder / name for name in ([first] if first in there else alike)):
            if rest and path.is_dir():
                yield from self._matches(path, rest)
            elif not rest and (path.is_file() or (path.is_symlink() and not path.exists())):
                yield path

    # Data sets

    def _saved(self, folder: Path) -> Iterator[File]:
        """The train split of a folder that `datasets.save_to_disk` wrote."""
        if (folder / "dataset_dict.json").exists():
            splits = layouts.listed_in(folder / "dataset_dict.json", "splits", str)
            self._leave_splits(folder, {split: [folder / split] for split in splits})
            folder = folder / "train"
        for part in layouts.listed_in(folder / "state.json", "_data_files", dict):
            path = folder / str(part.get("filename"))
            if path.parent != folder or path.name == "..":
                raise DataError(f"{folder / 'state.json'} names {path}; expected a file beside it")
            yield File(path, "arrow")

    def _train_split(self, folder: Path) -> Iterator[File]:
        """The files of the train split of a data set that is laid out as on the hub."""
        files = [*self.walk(folder)]
        patterns, base = layouts.data_files(folder)
        if patterns:
            splits = {
                split: [path for part in some for path in sorted(self._matches(base, part))]
                for split, some in patterns.items()
            }
        else:
            splits = layouts.splits_by_name(
                base, [path for path in files if path.is_relative_to(base)]
            )
        self._leave_splits(folder, splits)
        examples = set(itertools.chain.from_iterable(splits.values()))
        for path in files:
            if path not in examples:
                self.left["not an example of the data set"][path] = None
        yield from self._readable(dict.fromkeys(splits["train"]), every=True)

    def _leave_splits(self, folder: Path, splits: dict[str, list[Path]]) -> None:
        """Note which splits are left out; there must be one to train on."""
        if not splits.get("train"):
            raise DataError(
                f"{folder} is a data set without a train split: found {', '.join(splits) or 'none'}"
                "; name the files to train on in data.source"
            )
        for split, paths in splits.items():
            if split != "train":
                why = f"the split {split!r} of a data set; only its train split is read"
                self.left[why] |= dict.fromkeys(paths)


def refused(path: Path, kind: str) -> DataError:
    """The error for a file of a kind that is not read."""
    return DataError(f"{path} is {KINDS[kind].what}; {KINDS[kind].remedy}")
