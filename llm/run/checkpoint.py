"""Checkpoints: save in the background, count only what is whole on disk, verify, restore.

    checkpoints/STEP/params/ training/    the arrays, as Orbax writes them
    checkpoints/STEP/receipt.json         what the parameters are and predict (llm/run/receipt.py)
    checkpoints/STEP/manifest.json        size and sha256 of every other file, and its own

A step is written in `STEP.partial`, hashed, flushed to disk with its folders, and renamed: a folder
named by a bare number is complete. An old step is renamed to `STEP.deleting` before it is removed,
a step that does not verify to `STEP.damaged`. So a kill at any instant leaves the steps there were.
Order is by step, never by time.

Several processes write one step together, into a file system that all of them see: each its shards,
process 0 the rest, and a step counts for all once process 0 has renamed it.

Orbax: https://orbax.readthedocs.io. It has no checksum of its own for arrays, hence the manifest.
"""

import contextlib
import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm.errors import CheckpointError, LLMError
from llm.faults import fault_point
from llm.files import (
    disk_full_reason,
    flush_folder,
    flush_tree,
    free_bytes,
    is_disk_full,
    readable_bytes,
)
from llm.run.hosts import Hosts

MANIFEST = "manifest.json"
RECEIPT = "receipt.json"
GROUPS = ("params", "training")

# What a checkpoint holds: group -> name -> array. "params" apart, so that a sampler reads no more.
Groups = Mapping[str, Mapping[str, Any]]
Receipt = Mapping[str, Any]
# From the sha256 of the parameters to what else the receipt says.
MakeReceipt = Callable[[], Receipt]


def saved_steps(root: Path) -> list[int]:
    """Complete steps, ascending. Complete is not verified: see `verify_files`."""
    if not root.is_dir():
        return []
    return sorted(int(path.name) for path in root.iterdir() if path.name.isdecimal())


def read_receipt(folder: Path) -> dict[str, Any]:
    """receipt.json of one step."""
    return _read_json(folder / RECEIPT)


def verify_files(folder: Path) -> None:
    """Compare every file of a step with the manifest.

    Raises:
      CheckpointError: naming the first file that is missing, changed or not of the checkpoint.
    """
    saved = _read_json(folder / MANIFEST)
    files = saved.get("files") if isinstance(saved, dict) else None
    if not isinstance(files, dict) or saved.get("sha256") != _sha256_of_json(files):
        raise CheckpointError(
            f"{folder / MANIFEST} is not the manifest that was saved: it is damaged"
        )
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    for name, expected in files.items():
        if name not in found:
            raise CheckpointError(f"{folder / name} is missing; expected {expected['bytes']} bytes")
        size = (folder / name).stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(
                f"{folder / name}: expected {expected['bytes']} bytes, found {size}"
            )
        sha256 = _sha256_of_file(folder / name)
        if sha256 != expected["sha256"]:
            raise CheckpointError(
                f"{folder / name} has changed: expected sha256 {expected['sha256']}, found {sha256}"
            )
    extra = found - set(files) - {MANIFEST}
    if extra:
        raise CheckpointError(f"{folder} has files that were not saved with it: {min(extra)}")


def restore_group(folder: Path, group: str, abstract: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The arrays of one group, each born with the sharding that `abstract` gives it.

    Args:
      abstract: name -> jax.ShapeDtypeStruct with a sharding; any mesh, whatever it was saved from.
    Raises:
      CheckpointError: the checkpoint holds other arrays than those.
    """
    ocp = _orbax()
    path = (folder / group).resolve()
    arguments = ocp.args.PyTreeRestore(
        dict(abstract),
        restore_args=ocp.checkpoint_utils.construct_restore_args(dict(abstract)),
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        held = _array_shapes(checkpointer.metadata(path))
        _check_shapes(folder, held, {name: tuple(leaf.shape) for name, leaf in abstract.items()})
        return dict(checkpointer.restore(path, arguments))


def _read_params(folder: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """The parameters in this process's memory, read by it alone while the others do other things.

    Orbax waits for all processes unless it is told that there is one.
    """
    ocp = _orbax()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=0, active_processes={0}, barrier_sync_key_prefix="receipt"
    )
    arguments = ocp.args.PyTreeRestore(
        restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        return dict(checkpointer.restore((folder / "params").resolve(), arguments))


def _array_shapes(metadata: Any) -> dict[str, tuple[int, ...]]:
    tree = getattr(metadata, "item_metadata", metadata)
    tree = getattr(tree, "tree", tree)
    return {name: tuple(leaf.shape) for name, leaf in tree.items()}


def _check_shapes(folder: Path, held: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name in sorted({*held, *wanted}):
        if held.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{folder} does not hold the model of the run's settings: {name} has shape "
                f"{held.get(name, 'none: it is not there')}, expected "
                f"{wanted.get(name, 'none: the model has no such array')}; config.toml and the "
                "checkpoint are not of one run"
            )


def params_sha256(params: Mapping[str, Any]) -> str:
    """Of names, dtypes, shapes and row-major bytes, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(params):
        array = np.ascontiguousarray(params[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.data if array.size else b"")
    return digest.hexdigest()


def set_aside(root: Path, step: int) -> Path:
    """Rename a step that cannot be trusted, so that it is never offered but can be studied."""
    for number in range(1000):
        aside = root / (f"{step}.damaged" + (f".{number}" if number else ""))
        if not aside.exists():
            (root / str(step)).rename(aside)
            flush_folder(root)
            return aside
    raise CheckpointError(f"{root} holds a thousand damaged copies of step {step}; clear them away")


@dataclass(frozen=True)
class _Job:
    """A save in the background."""

    step: int
    thread: threading.Thread


class Checkpoints:
    """The saved steps of a run, for the processes that train it.

    Args:
      root: RUN/checkpoints.
      keep: how many of the newest steps stay.
      hosts: the processes; each of them calls `save` with the same steps.
    """

    def __init__(self, root: Path, keep: int, hosts: Hosts | None = None):
        self.root, self.keep = root, keep
        self._hosts = hosts or Hosts()
        self._best: list[int] = []
        self._job: _Job | None = None
        self._failure: BaseException | None = None
        self._checkpointer: Any = None
        self._needed = 0

    @property
    def best(self) -> int | None:
        """A step that stays, however old. One that is still to be saved may be named: until it is
        on disk, the one before it stays too."""
        return self._best[-1] if self._best else None

    @best.setter
    def best(self, step: int | None) -> None:
        if step != self.best:
            self._best = [] if step is None else [*self._best[-1:], step]

    def clean(self) -> None:
        """Remove what a dead process left half-written or half-deleted. In process 0."""
        self.root.mkdir(parents=True, exist_ok=True)
        for path in self.root.iterdir():
            if (
                path.name.endswith((".partial", ".deleting"))
                or ".orbax-checkpoint-tmp" in path.name
            ):
                shutil.rmtree(path, ignore_errors=True)

    def steps(self) -> list[int]:
        """Complete steps, ascending."""
        return saved_steps(self.root)

    def save(self, step: int, groups: Groups, make_receipt: MakeReceipt) -> None:
        """Take a copy of the arrays now, write it in the background. Collective.

        Waits for an earlier save first. Safe against the next step's donation of the arrays.

        Args:
          make_receipt: called in the background.
        Raises:
          CheckpointError: an earlier save failed, or there is no room for this one.
        """
        self.wait()
        self._needed = _total_bytes(groups)
        partial = self.root / f"{step}.partial"
        if not self._hosts.decide(f"save {step}", lambda: self._prepare(step, partial)):
            return
        fault_point("checkpoint.before_copy", step)
        write_and_commit = self._write_alone if self._hosts.alone else self._write_together
        finish = write_and_commit(step, partial, groups, make_receipt)

        def work() -> None:
            try:
                finish()
            except BaseException as error:
                self._failure = error

        thread = threading.Thread(target=work, name=f"checkpoint-{step}", daemon=True)
        self._job = _Job(step, thread)
        thread.start()

    def check_for_errors(self) -> None:
        """Raise what a background save failed with; call it each step."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            step = self._job.step if self._job else None
            self._job = None
            if step is not None and self._hosts.is_first:
                shutil.rmtree(self.root / f"{step}.partial", ignore_errors=True)
            raise self._explain(failure, step) from failure

    def wait(self) -> None:
        """Until the save under way is on disk."""
        if self._job is not None:
            while self._job.thread.is_alive():
                self._job.thread.join(1.0)
                self._hosts.moved()  # however long a disk takes
        self.check_for_errors()
        self._job = None

    def close(self) -> None:
        """Let go of Orbax; a save under way is waited for, its failure is not raised."""
        if self._job is not None:
            self._job.thread.join()
        if self._checkpointer is not None:
            with contextlib.suppress(Exception):
                self._checkpointer.close()

    def _writer(self) -> Any:
        if self._checkpointer is None:
            ocp = _orbax()
            self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        return self._checkpointer

    def _prepare(self, step: int, partial: Path) -> bool:
        """Whether there is anything to save; makes room for it. In process 0."""
        if step in self.steps():
            return False
        self._check_room()
        shutil.rmtree(partial, ignore_errors=True)
        return True

    def _write_alone(
        self, step: int, partial: Path, groups: Groups, make_receipt: MakeReceipt
    ) -> Callable[[], None]:
        """Copy now; the rest is for the background.

        Writes once more where Orbax ran out of time: it measures its limits by the wall clock
        (0.12.8), so that a clock that is set forward in the middle of a save looks like a disk that
        hangs.
        """
        arrays = _host_copy(groups)

        def finish() -> None:
            try:
                self._write(partial, arrays)
                self._writer().wait_until_finished()
            except TimeoutError:
                self._checkpointer = None
                shutil.rmtree(partial, ignore_errors=True)
                self._write(partial, arrays)
                self._writer().wait_until_finished()
            self._commit(step, partial, arrays["params"], make_receipt)

        return finish

    def _write_together(
        self, step: int, partial: Path, groups: Groups, make_receipt: MakeReceipt
    ) -> Callable[[], None]:
        """Every process writes its shards; process 0 then commits, and tells the others."""
        # Orbax returns once it holds every shard on the host; on CPU it holds a view, which keeps
        # the next step from taking that memory (probed on jax 0.10 and 0.12).
        self._write(partial, groups)

        def finish() -> None:
            self._writer().wait_until_finished()
            if self._hosts.is_first:
                params = _read_params(partial, groups["params"])
                self._commit(step, partial, params, make_receipt)
                self._hosts.tell(f"saved/{step}", True)
            else:
                self._hosts.hear(f"saved/{step}")

        return finish

    def _write(self, partial: Path, arrays: Groups) -> None:
        ocp = _orbax()
        items = {group: ocp.args.PyTreeSave(dict(arrays[group])) for group in GROUPS}
        self._writer().save(partial.resolve(), ocp.args.Composite(**items))

    def _commit(
        self, step: int, partial: Path, params: Mapping[str, Any], make_receipt: MakeReceipt
    ) -> None:
        """From Orbax's files to a step that counts; then, and only then, remove old ones."""
        fault_point("checkpoint.after_write", step)
        sha256 = params_sha256(params)
        receipt = {"schema": 1, "step": step, "params_sha256": sha256, **make_receipt()}
        (partial / RECEIPT).write_text(json.dumps(receipt, allow_nan=False))
        fault_point("checkpoint.before_manifest", step)
        (partial / MANIFEST).write_text(json.dumps(_manifest(partial), separators=(",", ":")))
        fault_point("checkpoint.before_flush", step)
        flush_tree(partial)
        fault_point("checkpoint.before_commit", step)
        partial.rename(self.root / str(step))
        flush_folder(self.root)
        fault_point("checkpoint.after_commit", step)
        verify_files(self.root / str(step))
        self._remove_old()

    def _remove_old(self) -> None:
        steps = self.steps()
        best = self._best[-1:] if self.best in steps else self._best
        stay = {*steps[-self.keep :], *best}
        for step in steps:
            if step not in stay:
                doomed = self.root / f"{step}.deleting"
                shutil.rmtree(doomed, ignore_errors=True)
                (self.root / str(step)).rename(doomed)
                fault_point("checkpoint.deleting", step)
                shutil.rmtree(doomed, ignore_errors=True)

    def _check_room(self) -> None:
        free = free_bytes(self.root)
        if free < self._needed:
            raise CheckpointError(_no_room(self.root, self._needed, free))

    def _explain(self, failure: BaseException, step: int | None) -> LLMError:
        if is_disk_full(failure):
            why = disk_full_reason(failure)
            return CheckpointError(_no_room(self.root, self._needed, free_bytes(self.root), why))
        if isinstance(failure, LLMError):
            return failure
        reason = f"{type(failure).__name__}: {failure}".split("\n")[0][:500]
        return CheckpointError(
            f"the checkpoint of step {step} could not be saved ({reason}); the steps before it are "
            f"whole ({self._whole()}): mend the cause and run the same command again"
        )

    def _whole(self) -> str:
        return ", ".join(map(str, self.steps())) or "none yet"


def _orbax() -> Any:
    """Imported when it is needed, which takes most of a second."""
    import logging

    import orbax.checkpoint as ocp

    # It warns of what is done here on purpose, and logs the errors that it then raises.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    return ocp


def _host_copy(groups: Groups) -> Groups:
    # A true copy: on CPU np.asarray would share memory that the next step's donation overwrites.
    fetched = jax.device_get({group: dict(arrays) for group, arrays in groups.items()})
    return jax.tree.map(lambda array: np.array(array, copy=True), fetched)


def _total_bytes(groups: Groups) -> int:
    return sum(
        array.size * array.dtype.itemsize for group in groups.values() for array in group.values()
    )


def _no_room(root: Path, needed: int, free: int, why: str = "") -> str:
    return (
        f"no room for a checkpoint in {root}{f' ({why})' if why else ''}: it needs "
        f"{readable_bytes(needed)} ({needed} bytes), "
        f"{readable_bytes(free)} ({free} bytes) are free; the steps before it are whole: free "
        "some space (or lower checkpoint.keep) and run the same command again"
    )


def _manifest(folder: Path) -> dict[str, Any]:
    files = {
        str(path.relative_to(folder)): {
            "bytes": path.stat().st_size,
            "sha256": _sha256_of_file(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    return {"schema": 1, "files": files, "sha256": _sha256_of_json(files)}


def _sha256_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise CheckpointError(f"{path} is not JSON: it is damaged") from None
