"""Files that a crash leaves with their old or their new content, never half; room on disk; time."""

import contextlib
import datetime
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file's content, flushed to disk, or leave the file as it was."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
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
    partial.mkdir(parents=True)
    try:
        yield partial
        flush_tree(partial)
        before_rename()
        partial.rename(final)
        flush_folder(final.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


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
