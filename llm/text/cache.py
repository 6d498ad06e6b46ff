"""The folder of prepared things: downloads, trained tokenizers, token shards.

Each thing is a folder that is built once: written beside its place, flushed to disk and renamed. A
process that dies half-way leaves a `.partial` folder, which nobody reads and the next process
removes. A lock keeps two processes from building the same thing at once: the second waits, then
uses what the first built. The kernel releases the lock when its holder dies.
"""

import contextlib
import fcntl
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from llm.errors import DataError, UsageError
from llm.files import whole_folder
from llm.runtime import cache_dir

CACHE_TAG = "CACHEDIR.TAG"

# Called with (what is being done, bytes done, bytes in all or None). An exception from it stops
# the work, and nothing half-made stays.
OnProgress = Callable[[str, int, int | None], None]


def silent(_what: str, _done: int, _total: int | None) -> None:
    """The OnProgress that shows nothing."""


def cache_root(setting: str) -> Path:
    """`data.cache_dir`, else $LLM_CACHE_DIR, else ~/.cache/llm; created when it is missing."""
    try:
        root = cache_dir(setting)
        root.mkdir(parents=True, exist_ok=True)
    except RuntimeError:
        raise UsageError(
            "the home directory of this user is not known, so there is no ~/.cache/llm; set "
            "data.cache_dir, or LLM_CACHE_DIR in the environment"
        ) from None
    except OSError as error:
        raise UsageError(
            f"the cache folder {root} cannot be created ({error.strerror}); set data.cache_dir to "
            "a folder that can be written"
        ) from None
    # Backups, and we ourselves, know by it that a folder is a cache: https://bford.info/cachedir/
    with contextlib.suppress(OSError), open(root / CACHE_TAG, "x") as tag:
        tag.write("Signature: 8a477f597d28d172789f06886806bc55\n")
    return root


def no_room(what: str, folder: Path, needed: str, error: OSError) -> DataError:
    """The error for a disk that became full while `what` was written into a folder.

    Args:
      needed: how much room it needs, in words.
    """
    return DataError(
        f"no room for {what} in {folder} ({error.strerror}): {needed}, and "
        f"{shutil.disk_usage(folder).free} bytes are free there; make room, or set data.cache_dir "
        "to a folder on another disk"
    )


@contextlib.contextmanager
def built_once(final: Path, on_progress: OnProgress = silent) -> Iterator[Path | None]:
    """An empty folder that becomes `final` when the body succeeds; None if `final` exists already.

    The body writes files into the folder. If the body raises, the folder is removed.
    """
    if final.exists():
        yield None
        return
    final.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(final.parent)
    with locked(final, on_progress):
        if final.exists():
            yield None
            return
        with whole_folder(final) as partial:
            yield partial


def _remove_leftovers(folder: Path) -> None:
    """Remove what dead processes left half-built; a process that still builds holds its lock."""
    for partial in folder.glob("*.partial"):
        with open(_lock_file(partial.with_suffix("")), "w") as lock:
            if _try_lock(lock.fileno()):
                shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def locked(final: Path, on_progress: OnProgress = silent) -> Iterator[None]:
    """Let one process at a time build a folder; FOLDER.lock is its lock."""
    # The lock file stays: if it were removed, two processes could lock two files of one name.
    with open(_lock_file(final), "w") as lock:
        while not _try_lock(lock.fileno()):
            on_progress("waiting for another process", 0, None)
            time.sleep(0.1)
        yield


def _lock_file(final: Path) -> Path:
    return final.with_name(final.name + ".lock")


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
