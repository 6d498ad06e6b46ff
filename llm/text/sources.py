"""Where documents come from: files, folders, globs, URLs, the standard library, the hub.

A source is a word in `data.source`. Each source becomes a list of origins: files, or a hub data
set, with the identity of their content, so that a change to the corpus is noticed and named. To add
a source, add a branch to `_origins_of`; to add a kind of folder or of file, see
llm/text/trees.py and llm/text/documents.py.
"""

import contextlib
import difflib
import errno
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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from llm.errors import DataError, UsageError
from llm.files import is_disk_full, sha256_of_file, write_atomic
from llm.runtime import cache_dir
from llm.text.cache import OnProgress, built_once, no_room, silent
from llm.text.documents import KINDS, Origin, kind_of_file
from llm.text.trees import Tree, refused

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
        origins = tuple(_identified(_once(found, notes), cache, on_progress))
    except OSError as error:
        if is_disk_full(error):
            raise
        # The name is too long, a file or folder may not be read, or a file went away.
        too_long = error.errno == errno.ENAMETOOLONG
        raise DataError(
            f"data.source: {str(error.filename or sources)[:200]!r} cannot be read: "
            f"{error.strerror}; "
            + (_EXPECTED if too_long else "let this user read it, or leave it out of data.source")
        ) from None
    if not origins:
        left = f": {'; '.join(notes)}" if notes else ""
        raise DataError(f"data.source = {sources!r} names no documents{left}")
    return Found(origins, tuple(notes))


def _origins_of(
    source: str, cache: Path, on_progress: OnProgress, notes: list[str]
) -> Iterator[Origin]:
    """The origins of one source, in a fixed order. Files are not hashed yet."""
    if not source:
        raise UsageError(f"data.source has an empty name; {_EXPECTED}")
    path = _expanded(source)
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        files = (p for p in Tree(root, []).walk(root, STDLIB_WITHOUT) if p.suffix == ".py")
        yield from (_origin_of(path, path.relative_to(root), "python") for path in files)
    elif source.startswith("hf:"):
        yield _hub_origin(source.removeprefix("hf:"), cache)
    elif source.lower().startswith(("http://", "https://")):
        yield _fetched(source, cache, on_progress)
    elif path.is_file():
        yield _named(path, path.name)
    elif path.exists() and not path.is_dir():
        raise DataError(f"{path} is neither a file nor a folder")
    else:
        root, parts = (path, ()) if path.exists() else _pattern(source, path)
        caches = [cache]
        with contextlib.suppress(RuntimeError):  # no home
            caches += [cache_dir()]
        tree = Tree(root, caches)
        found = tree.matches(parts) if parts else tree.files()
        if parts and not found and not tree.left:
            raise DataError(f"data.source = {source!r} matches no file{_near_names(path)}")
        yield from (_origin_of(file, file.relative_to(root), kind) for file, kind in found)
        notes += filter(None, [tree.note()])


def _expanded(source: str) -> Path:
    path = Path(source)
    try:
        return path if path.exists() else path.expanduser()
    except RuntimeError:
        raise UsageError(
            f"data.source = {source!r}: the system knows no such user's home; {_EXPECTED}"
        ) from None


def _named(path: Path, name: str, sha256: str = "") -> Origin:
    """A file that a person named; it must be of a kind that is read."""
    kind = kind_of_file(path)
    if KINDS[kind].read is None:
        raise refused(path, kind)
    return _origin_of(path, name, kind, sha256)


def _once(origins: Iterable[Origin], notes: list[str]) -> list[Origin]:
    """Each file once, however often and by whatever names it was reached."""
    kept: dict[str, Origin] = {}
    again: dict[str, None] = {}
    for origin in origins:
        place = origin.location if origin.kind == "hub" else os.path.realpath(origin.location)
        if place in kept:
            again[origin.location] = None
        kept.setdefault(place, origin)
    if again:
        more = f" and {len(again) - 3} more" if len(again) > 3 else ""
        notes.append(f"named more than once, and read once: {', '.join([*again][:3])}{more}")
    return [*kept.values()]


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
    taken: set[str] = set()
    total, done = sum(origin.bytes for origin in origins), 0
    for origin in origins:
        on_progress("hashing", done, total)
        done += origin.bytes
        numbered = (f"{origin.name} ({number})" for number in itertools.count(2))
        name = next(n for n in itertools.chain([origin.name], numbered) if n not in taken)
        taken.add(name)
        yield replace(
            origin, name=name, sha256=origin.sha256 or _sha256_of(Path(origin.location), cache)
        )


def _origin_of(path: Path, name: str | Path, kind: str, sha256: str = "") -> Origin:
    # A name may hold any bytes, but the name that is shown and stored is always valid UTF-8.
    shown = os.fsencode(name).decode("utf-8", "backslashreplace")
    return Origin(shown, kind, str(path), path.stat().st_size, sha256)


def _pattern(source: str, path: Path) -> tuple[Path, tuple[str, ...]]:
    """The folder that all matches of a pattern are below, and the rest of the pattern in parts."""
    root = _before_magic(path)
    if "://" in source:
        raise UsageError(
            f"data.source = {source!r}: files are fetched by http:// and https:// only"
        )
    if root == path:
        raise DataError(f"there is no file or folder {source}{_near_names(path)}")
    return root, path.relative_to(root).parts


def _before_magic(path: Path) -> Path:
    """The start of a path up to the first pattern in it; a name that exists is no pattern."""
    fixed = Path()
    for part in path.parts:
        if glob.has_magic(part) and not (fixed / part).exists():
            break
        fixed /= part
    return fixed


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
        return sha256_of_file(path)
    # ctime cannot be set back, so a file that was changed and dated back is noticed.
    place = os.fsencode(path.resolve())
    identity = [place.hex(), status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    memory = cache / "hashes" / hashlib.sha256(place).hexdigest()
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        if (known := json.loads(memory.read_bytes()))["identity"] == identity:
            return known["sha256"]
    sha256 = sha256_of_file(path)
    # A file written within the clock's grain of now could change again without a new time.
    if time.time() - status.st_ctime > 2:
        _remember(memory, json.dumps({"identity": identity, "sha256": sha256}))
    return sha256


def _remember(memory: Path, content: str) -> None:
    """Write what saves time later; a cache that cannot be written serves without it."""
    with contextlib.suppress(OSError):
        memory.parent.mkdir(exist_ok=True)
        write_atomic(memory, content.encode())


def _fetched(url: str, cache: Path, on_progress: OnProgress) -> Origin:
    """The file at a URL, from the cache or fetched once; its sha256 is kept beside it."""
    folder = cache / "downloads" / hashlib.sha256(os.fsencode(url)).hexdigest()[:32]
    try:
        address = _ascii_url(url)
        # The end of a name tells what kind of file it is; file systems allow 255 bytes.
        name = Path(urllib.parse.urlsplit(address).path).name[-64:] or "index"
    except ValueError as error:
        raise UsageError(f"data.source = {url!r} is not a URL: {error}") from None
    with built_once(folder, on_progress) as partial:
        if partial is not None:
            sha256 = _download(address, partial / name, on_progress)
            (partial / f"{name}.sha256").write_text(sha256)
    path = folder / name
    expected = (folder / f"{name}.sha256").read_text()
    found = _sha256_of(path, cache)
    if found != expected:
        raise DataError(
            f"{path}, fetched from {url}, has changed: expected sha256 {expected}, found {found}; "
            f"delete {folder} to fetch it again"
        )
    return _named(path, url, found)


def _ascii_url(url: str) -> str:
    """A URL as HTTP sends it: letters that are not ASCII are escaped, those of its host by IDNA."""
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    path, query = (
        urllib.parse.quote(os.fsencode(part), "%/:=&?+!$,;'@()*[]~") for part in parts[2:4]
    )
    return urllib.parse.urlunsplit((parts.scheme, host, path, query, ""))


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
    except (OSError, http.client.HTTPException, UnicodeError) as error:
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
    if not name or spec.count(":") > 2:
        raise UsageError(
            f"data.source = 'hf:{spec}': expected hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT"
        )
    if os.path.exists(name):
        raise UsageError(
            f"data.source = 'hf:{spec}': {name} is here too, and `datasets` would read it in place "
            f"of the hub's; set data.source = '{name}' to read it, or run in another folder"
        )
    memory = cache / "hub" / hashlib.sha256(name.encode()).hexdigest()
    try:
        revision = hub_revision(name)
    except OSError as error:
        if not memory.exists():
            raise DataError(_unreachable(f"the data set {name!r}", str(error))) from None
        revision = memory.read_text()
    else:
        _remember(memory, revision)
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
