"""Where documents come from: files, folders, globs, URLs, the standard library, the hub.

A source is a word in `data.source`. Each source becomes a list of origins: files, or a hub data
set, with the identity of their content, so that a change to the corpus is noticed and named. To add
a source, add a branch to `_origins_of`; to add a kind of file, see llm/text/documents.py.
"""

import collections
import difflib
import glob
import hashlib
import http.client
import itertools
import json
import os
import sysconfig
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from llm.errors import DataError, UsageError
from llm.files import is_disk_full, write_atomic
from llm.text.cache import OnProgress, built_once, no_room, silent
from llm.text.documents import KINDS, Origin, kind_of_file

# These are not the library's source code: its tests, its manual as one string, other packages.
STDLIB_WITHOUT = {"test", "tests", "idle_test", "pydoc_data", "site-packages", "dist-packages"}

# A core hashes smaller files in milliseconds; remembering their hashes would gain nothing.
REMEMBER_HASH_ABOVE_BYTES = 2**24

_EXPECTED = "expected a path, URL, 'stdlib' or hf:NAME"

_BLOCK_BYTES = 2**20
_DOWNLOAD_TIMEOUT_SECONDS = 60


class Found(NamedTuple):
    """What the sources name, and what a person should know about it, a sentence each."""

    origins: tuple[Origin, ...]
    notes: tuple[str, ...]

    @property
    def text_bytes(self) -> int | None:
        """Size of the text; None if an origin is compressed or does not tell its size.

        It is summed over all origins at each access, so ask once, not for each piece of text.
        """
        known = all(KINDS[origin.kind].is_text for origin in self.origins)
        return sum(origin.bytes for origin in self.origins) if known else None


def find_origins(
    sources: str | Sequence[str], cache: Path, on_progress: OnProgress = silent
) -> Found:
    """Every file that the sources name, in a fixed order, hashed.

    Raises:
      DataError: a source that names nothing, or that cannot be read or fetched.
    """
    found: list[Origin] = []
    notes: list[str] = []
    try:
        for source in [sources] if isinstance(sources, str) else sources:
            found += _origins_of(source, cache, on_progress, notes)
        origins = tuple(_identified(found, cache, on_progress))
    except OSError as error:
        if is_disk_full(error):
            raise
        # The name is too long, a file or folder may not be read, or a file went away.
        shown = str(error.filename or sources)[:200]
        raise DataError(
            f"data.source: {shown!r} cannot be read: {error.strerror}; {_EXPECTED}"
        ) from None
    if not origins:
        raise DataError(f"data.source = {sources!r} names no documents")
    return Found(origins, tuple(notes))


def _origins_of(
    source: str, cache: Path, on_progress: OnProgress, notes: list[str]
) -> Iterator[Origin]:
    """The origins of one source, in a fixed order. Files are not hashed yet."""
    path = Path(source).expanduser()
    if not source:
        raise UsageError(f"data.source has an empty name; {_EXPECTED}")
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        files = (path for path in _walk(root, STDLIB_WITHOUT) if path.suffix == ".py")
        yield from (_origin_of(path, path.relative_to(root), "python") for path in files)
    elif source.startswith("hf:"):
        yield _hub_origin(source.removeprefix("hf:"), cache)
    elif source.startswith(("http://", "https://")):
        yield _fetched(source, cache, on_progress)
    elif path.is_dir():
        yield from _folder(path, notes)
    elif path.is_file():
        yield _origin_of(path, path.name, kind_of_file(path))
    elif path.exists():
        raise DataError(f"{path} is neither a file nor a folder")
    else:
        yield from _matches(source, path)


def check_unchanged(recorded: Sequence[dict], origins: Sequence[Origin]) -> None:
    """Compare the corpus with what a run recorded of it (`asdict` of its origins).

    Raises:
      DataError: naming the first file that differs, what was expected and what was found.
    """
    before = {record["name"]: record for record in recorded}
    now = {origin.name: origin for origin in origins}
    changes = [f"{name} is gone" for name in before if name not in now]
    changes += [
        f"{origin.location}: expected {before[name]['bytes']} bytes with sha256 "
        f"{before[name]['sha256']}, found {origin.bytes} bytes with sha256 {origin.sha256}"
        for name, origin in now.items()
        if name in before and origin.sha256 != before[name]["sha256"]
    ]
    changes += [f"{name} is new" for name in now if name not in before]
    if changes:
        raise DataError(
            f"the corpus changed since the run began: {changes[0]}; restore it, or begin a new run "
            "with another run.dir"
        )


def _identified(
    origins: Sequence[Origin], cache: Path, on_progress: OnProgress
) -> Iterator[Origin]:
    """The same origins, each file hashed, with distinct names: "NAME", "NAME (2)" and so on."""
    times: collections.Counter[str] = collections.Counter()
    total, done = sum(origin.bytes for origin in origins), 0
    for origin in origins:
        on_progress("hashing", done, total)
        done += origin.bytes
        times[origin.name] += 1
        number = f" ({times[origin.name]})" if times[origin.name] > 1 else ""
        sha256 = origin.sha256 or _sha256_of(Path(origin.location), cache)
        yield replace(origin, name=origin.name + number, sha256=sha256)


def _origin_of(path: Path, name: str | Path, kind: str, sha256: str = "") -> Origin:
    # A name may hold any bytes, but the name that is shown and stored is always valid UTF-8.
    shown = os.fsencode(name).decode("utf-8", "backslashreplace")
    return Origin(shown, kind, str(path), path.stat().st_size, sha256)


def _matches(source: str, path: Path) -> Iterator[Origin]:
    """The files that a glob matches."""
    if not glob.has_magic(source):
        raise DataError(f"there is no file or folder {source}{_near_names(path)}")
    files = sorted(filter(os.path.isfile, glob.glob(str(path), recursive=True)))
    if not files:
        raise DataError(f"data.source = {source!r} matches no file{_near_names(path)}")
    root = _before_magic(path)
    yield from (
        _origin_of(file, file.relative_to(root), kind_of_file(file)) for file in map(Path, files)
    )


def _folder(root: Path, notes: list[str]) -> Iterator[Origin]:
    """The files of a folder; binary files are left out and counted."""
    skipped = 0
    for path in _walk(root, set()):
        kind = kind_of_file(path)
        if KINDS[kind].is_text:
            with open(path, "rb") as file:
                # Git's rule for a binary file: a NUL among its first 8000 bytes.
                if b"\0" in file.read(8000):
                    skipped += 1
                    continue
        # A .json file in a folder is more often a document than a table of documents.
        kind = "text" if path.suffix.lower() == ".json" else kind
        yield _origin_of(path, path.relative_to(root), kind)
    if skipped:
        notes.append(f"{root}: {skipped} binary files were left out")


def _walk(root: Path, without: set[str]) -> Iterator[Path]:
    """Files below a folder in a fixed order, without hidden files and links to folders."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(s for s in subfolders if s not in without and s[0] != ".")
        for file in sorted(files):
            path = Path(folder, file)
            if file[0] != "." and path.is_file():
                yield path


def _before_magic(path: Path) -> Path:
    """The folder that all matches of a glob are below."""
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))


def _near_names(path: Path) -> str:
    """Names of files that exist, in the deepest folder of the path that exists."""
    fixed = _before_magic(path)
    wanted, folder = path.name, fixed if fixed != path else fixed.parent
    while not folder.is_dir():
        wanted, folder = folder.name, folder.parent
    names = sorted(os.listdir(folder)) if os.access(folder, os.R_OK) else []
    near = difflib.get_close_matches(wanted, names, 3, cutoff=0.5) or names[:5]
    listed = ", ".join(str(folder / name) for name in near)
    return f"; there is {listed}" if listed else f"; {folder} is empty"


def _sha256_of(path: Path, cache: Path) -> str:
    """sha256 of a file; the hash of a large file is remembered while the file is untouched."""
    status = path.stat()
    if status.st_size <= REMEMBER_HASH_ABOVE_BYTES:
        return _sha256_of_bytes(path)
    # ctime cannot be set back, so a file that was changed and dated back is noticed.
    place = os.fsencode(path.resolve())
    identity = [place.hex(), status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    memory = cache / "hashes" / hashlib.sha256(place).hexdigest()
    if memory.exists() and (known := json.loads(memory.read_text()))["identity"] == identity:
        return known["sha256"]
    sha256 = _sha256_of_bytes(path)
    # A file written within the clock's grain of now could change again without a new time.
    if time.time() - status.st_ctime > 2:
        memory.parent.mkdir(exist_ok=True)
        write_atomic(memory, json.dumps({"identity": identity, "sha256": sha256}).encode())
    return sha256


def _sha256_of_bytes(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetched(url: str, cache: Path, on_progress: OnProgress) -> Origin:
    """The file at a URL, from the cache or fetched once; its sha256 is kept beside it."""
    folder = cache / "downloads" / hashlib.sha256(url.encode()).hexdigest()[:32]
    try:
        # The end of a name tells what kind of file it is; file systems allow 255 bytes.
        name = Path(urllib.parse.urlparse(url).path).name[-64:] or "index"
    except ValueError as error:
        raise UsageError(f"data.source = {url!r} is not a URL: {error}") from None
    with built_once(folder, on_progress) as partial:
        if partial is not None:
            sha256 = _download(url, partial / name, on_progress)
            (partial / f"{name}.sha256").write_text(sha256)
    path = folder / name
    expected = (folder / f"{name}.sha256").read_text()
    found = _sha256_of(path, cache)
    if found != expected:
        raise DataError(
            f"{path}, fetched from {url}, has changed: expected sha256 {expected}, found {found}; "
            f"delete {folder} to fetch it again"
        )
    return _origin_of(path, url, kind_of_file(path), found)


def _download(url: str, path: Path, on_progress: OnProgress) -> str:
    """Fetch a file and return its sha256."""
    digest, done, total = hashlib.sha256(), 0, None
    try:
        with (
            urllib.request.urlopen(url, timeout=_DOWNLOAD_TIMEOUT_SECONDS) as response,
            open(path, "wb") as file,
        ):
            # `length` is what is still to be read: now all of it, at the end nothing.
            total = response.length
            while block := response.read(_BLOCK_BYTES):
                file.write(block)
                digest.update(block)
                done += len(block)
                on_progress("fetching", done, total)
            if response.length:
                raise http.client.HTTPException(f"it ended after {done} of {total} bytes")
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, OSError) and is_disk_full(error):
            path.unlink(missing_ok=True)
            needed = f"it has {total or 'an unknown number of'} bytes"
            raise no_room(url, path.parent.parent, needed, error) from None
        raise DataError(_unreachable(url, str(error))) from None
    return digest.hexdigest()


def _unreachable(what: str, why: str) -> str:
    return (
        f"{what} could not be fetched: {why.rstrip('.')}. Offline: fetch it on another machine, "
        "copy it here and set data.source to the file or folder"
    )


def _hub_origin(spec: str, cache: Path) -> Origin:
    """A hub data set at its newest revision, or the last one seen if the hub is out of reach."""
    name = spec.split(":")[0]
    if not name:
        raise UsageError(
            "data.source = 'hf:': expected hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT"
        )
    memory = cache / "hub" / hashlib.sha256(name.encode()).hexdigest()
    try:
        revision = hub_revision(name)
    except OSError as error:
        if not memory.exists():
            raise DataError(_unreachable(f"the data set {name!r}", str(error))) from None
        revision = memory.read_text()
    else:
        memory.parent.mkdir(exist_ok=True)
        write_atomic(memory, revision.encode())
    return Origin(f"hf:{spec}", "hub", spec, 0, revision)


def hub_revision(name: str) -> str:
    """The newest commit of a hub data set; OSError if the hub is out of reach."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return HfApi().dataset_info(name).sha or "main"
    except RepositoryNotFoundError:
        raise DataError(f"the hub has no data set {name!r}, or it is private") from None
    except Exception as error:
        # The HTTP library behind the hub's client has its own errors for "no network".
        raise OSError(str(error).split("\n")[0][:200]) from error
