"""Where data sets of the Hugging Face hub keep their splits, by their cards and names of files.

Source: "Data files configuration", https://huggingface.co/docs/hub/datasets-data-files-configuration
and, for the patterns, `datasets`, data_files.py; tests compare with `datasets` itself.
"""

import collections
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llm.errors import DataError
from llm.files import read_json, why
from llm.text.documents import KINDS

# Files with these suffixes hold the examples of a data set; others are about it.
_DATA = {suffix for kind in KINDS.values() for suffix in kind.suffixes}
_DATA |= {".tokens", ".raw"}
_INFO = {"dataset_info.json", "dataset_infos.json"}
_NO_DATA = {"config.json", "dataset_dict.json"} | _INFO

# Fields of a README's front matter that only data sets have.
_CARD = {"configs", "dataset_info", "task_categories", "task_ids", "size_categories"}
_CARD |= {"source_datasets", "annotations_creators", "language_creators"}

_WORDS = {
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
_IN_FOLDER = {s: rf"(?:.*[-._ 0-9])?(?:{words})(?:[-._ 0-9].*)?" for s, words in _WORDS.items()}
_IN_FILE = {s: rf"(?:.*[-._ 0-9])?(?:{words})[-._ 0-9].*" for s, words in _WORDS.items()}
_SHARD = r"(.+)-\d{5}-of-\d{5}.*\..*"

_LONGEST_CARD = 2**24

_T = TypeVar("_T")


def is_data_set(folder: Path, folders: Sequence[Path], files: Sequence[Path]) -> bool:
    """Whether a folder, of which folders and files are given, is laid out as a data set."""
    # Clones have .gitattributes, and then a field that models' cards have too is enough.
    fields = _CARD | ({"license", "language"} if (folder / ".gitattributes").exists() else set())
    if _INFO & {file.name for file in files} or fields & _card(folder).keys():
        return True
    inner = [p for below in folders if below.name == "data" for p in below.glob("*-of-*")]
    shards = [*files, *inner]
    if any((name := re.fullmatch(_SHARD, path.name)) and name[1] in _WORDS for path in shards):
        return True
    # train.txt beside notes.txt says nothing; train.txt beside test.txt does.
    splits: dict[str, set[str]] = collections.defaultdict(set)
    for path in filter(_is_data, files):
        named = _named(path.name, _IN_FILE)
        splits[path.suffix] |= named if len(named) == 1 else set()
    for path in folders:
        named = _named(path.name, _IN_FOLDER)
        # Programs too have folders train and test.
        if "train" not in named or _mostly_data(path):
            splits["/"] |= named
    return any("train" in named and len(named) > 1 for named in splits.values())


def data_files(folder: Path) -> tuple[dict[str, list[tuple[str, ...]]], Path]:
    """What the card of a data set says of its files: patterns of each split, each pattern in parts.

    Returns:
      the patterns, none if the names of the files tell; the folder that the files are in.
    Raises:
      DataError: the card cannot be followed.
    """
    configs = [one for one in _card(folder).get("configs") or [] if isinstance(one, dict)]
    if not configs:
        return {}, folder
    chosen = [one for one in configs if one.get("default") or one.get("config_name") == "default"]
    chosen = chosen or configs
    if len(chosen) > 1:
        names = ", ".join(str(one.get("config_name")) for one in configs)
        raise DataError(
            f"{folder} is a data set in several configurations: {names}; name the files of one in "
            "data.source"
        )
    patterns = collections.defaultdict(list)
    try:
        base = folder.joinpath(*_inside(folder, chosen[0].get("data_dir") or "."))
        files = chosen[0].get("data_files") or []
        for part in [files] if isinstance(files, str) else files:
            part = {"split": "train", "path": part} if isinstance(part, str) else part
            paths = part["path"]
            for path in [paths] if isinstance(paths, str) else paths:
                patterns[str(part["split"])].append(_inside(folder, path) or ("*",))
    except (TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"the card of {folder} has data_files that cannot be followed ({error!r}); name the "
            "files to train on in data.source"
        ) from None
    return dict(patterns), base


def _inside(folder: Path, pattern: str) -> tuple[str, ...]:
    path = Path(pattern)
    if path.is_absolute() or ".." in path.parts or "://" in pattern or "::" in pattern:
        raise DataError(
            f"the card of {folder} names {pattern!r}; expected files in its own folder: name the "
            "files to train on in data.source"
        )
    return path.parts


def splits_by_name(root: Path, files: Iterable[Path]) -> dict[str, list[Path]]:
    """The splits of the files of a data set below its root, by the first rule that finds one.

    data/SPLIT-00000-of-00001.parquet; a folder that is named for a split; a file that is; else all
    files train.
    """
    data = {path: path.relative_to(root) for path in filter(_is_data, files)}
    rules = [
        lambda path: {m[1] for m in [re.fullmatch(f"data/{_SHARD}", path.as_posix())] if m},
        lambda path: {split for part in path.parts[:-1] for split in _named(part, _IN_FOLDER)},
        lambda path: _named(path.name, _IN_FILE),
        lambda path: {"train"},
    ]
    splits: dict[str, list[Path]] = collections.defaultdict(list)
    for rule in rules:
        for path, relative in data.items():
            for split in rule(relative):
                splits[split].append(path)
        if splits:
            break
    # One kind of files holds the examples; LICENSE.txt beside parquet files holds none.
    suffixes = collections.Counter(path.suffix for path in splits.get("train", ()))
    most = next((suffix for suffix, _ in suffixes.most_common(1)), "")
    return {split: [p for p in paths if p.suffix == most] for split, paths in splits.items()}


def _named(name: str, patterns: dict[str, str]) -> set[str]:
    return {split for split, pattern in patterns.items() if re.fullmatch(pattern, name)}


def _is_data(path: Path) -> bool:
    return path.suffix.lower() in _DATA and path.name not in _NO_DATA


def _mostly_data(folder: Path) -> bool:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return 2 * sum(map(_is_data, files)) > len(files)


def _card(folder: Path) -> dict[str, Any]:
    """The front matter of a folder's README.md; empty if there is none."""
    path = folder / "README.md"
    if not path.is_file():
        return {}
    with open(path, encoding="utf-8", errors="replace") as file:
        found = re.match(r"---[ \t]*\n(.*?)\n---", file.read(_LONGEST_CARD), re.DOTALL)
    if not found:
        return {}
    import yaml

    try:
        fields = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def listed_in(path: Path, key: str, sort: type[_T]) -> list[_T]:
    """A list that `datasets.save_to_disk` wrote into a JSON file.

    Raises:
      DataError: the file is damaged.
    """
    try:
        found = read_json(path)[key]
        if isinstance(found, list) and all(isinstance(one, sort) for one in found):
            return found
        problem = f"has no list of {key!r}"
    except (OSError, ValueError, TypeError, LookupError) as error:
        problem = f"cannot be used ({why(error)})"
    raise DataError(f"{path} {problem}; write the data set again, or name its .arrow files")
