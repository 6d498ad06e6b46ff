"""Files that a crash leaves with their old or their new content, never half; files that somebody
else gave; room on disk; time."""

import contextlib
import datetime
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from llm.faults import fault_point

# The most that is read of one description, such as a manifest or a tokenizer. The longest that a
# run writes is the manifest of some million files, at 150 bytes each.
MOST_BYTES = 1 << 30


def check_regular(path: Path) -> os.stat_result:
    """The status of a file, once it is known that opening and reading it ends.

    Raises:
      OSError: there is no such file, or it is a folder, a pipe, a socket or a device.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        what = "it is a folder, a pipe, a socket or a device, expected a file"
        raise OSError(errno.EINVAL, what, str(path))
    return status


def open_regular(path: Path) -> BufferedReader:
    """Open a file of a folder that somebody else may have given: a run, a model, a cache.

    Raises:
      OSError: as `check_regular`, or the file cannot be opened.
    """
    check_regular(path)
    # Another file may have taken its place since: opening a pipe would wait for its writer.
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))


def read_regular(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """The content of such a file.

    Raises:
      OSError: as `open_regular`, or the file is larger than `most_bytes`.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > most_bytes:
            what = f"it is larger than {readable_bytes(most_bytes)}, expected less"
            raise OSError(errno.EINVAL, what, str(path))
        return file.read()


def read_json(path: Path, most_bytes: int = MOST_BYTES) -> Any:
    """The value that such a file holds.

    Raises:
      OSError: as `read_regular`.
      ValueError: it is not JSON, or its values are nested too deeply to be read.
    """
    try:
        return json.loads(read_regular(path, most_bytes))
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def why(error: Exception) -> str:
    """The reason that an error gives, without the number and the path of an OSError."""
    return str(getattr(error, "strerror", None) or error)


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file's content, flushed to disk, or leave the file as it was."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        fault_point(f"replace.{path.name}")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    flush_folder(path.parent)


def write_output(path: str | Path, content: bytes, error: type[Exception]) -> None:
    """`write_atomic` for a file that a person named.

    A link stays a link. A pipe or a device such as /dev/null is written to, not replaced.

    Args:
      error: the class of the error, with a message for that person, if the file cannot be written.
    """
    target = Path(os.path.realpath(path))
    try:
        if target.exists() and not target.is_file():
            target.write_bytes(content)
        else:
            write_atomic(target, content)
    except OSError as failed:
        raise error(
            f"cannot write {path}: {failed.strerror}; name a file in a folder that exists, has "
            "room and can be written"
        ) from None


def partial_folder(final: Path) -> Path:
    """Where a folder is built until it is whole; one that a dead process left is not used."""
    return final.with_name(f"{final.name}.partial")


@contextlib.contextmanager
def whole_folder(final: Path, before_rename: Callable[[], object] = lambda: None) -> Iterator[Path]:
    """Build a folder beside its place, flush it to disk, then rename it to `final`.

    The body writes into the empty folder that it is given. When the body raises, the folder is
    removed. A crash at any instant leaves `final` whole or absent.

    Args:
      before_rename: called when everything is on disk and only the rename is left.
    """
    partial = partial_folder(final)
    shutil.rmtree(partial, ignore_errors=True)
    # NFS leaves a file that somebody has open; it becomes a stray file of the folder.
    partial.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        flush_tree(partial)
        before_rename()
        partial.rename(final)
        flush_folder(final.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def sha256_of_file(path: Path) -> str:
    """The sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_tree(root: Path) -> None:
    """Flush every file and folder below `root`, and `root` itself, to disk."""
    for folder, _, files in os.walk(root):
        for name in files:
            with open(Path(folder, name), "rb") as file:
                os.fsync(file.fileno())
        flush_folder(Path(folder))


def flush_folder(folder: Path) -> None:
    """Flush a folder's list of names to disk; otherwise a power cut may undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error of any library means no space, no quota, or a file above the limit."""
    return bool(disk_full_reason(error))


def disk_full_reason(error: BaseException) -> str:
    """Which of these an error means, in the system's words; "" if it means something else."""
    code = error.errno if isinstance(error, OSError) else None
    reasons = {full: os.strerror(full) for full in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)}
    if code in reasons:
        return reasons[code]
    return next((reason for reason in reasons.values() if reason in str(error)), "")


def free_bytes(folder: Path) -> int:
    """The free space of a folder's file system."""
    return shutil.disk_usage(folder).free


def readable_bytes(count: float) -> str:
    """ "1.5 GiB" """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def now() -> str:
    """The time in UTC, for people; nothing is ordered by it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
