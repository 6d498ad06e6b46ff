"""Checkpoints: save in the background, count only steps that are whole on disk, verify, restore.

    checkpoints/STEP/params/ training/    the arrays (llm/run/arrays.py)
    checkpoints/STEP/receipt.json         what the parameters are and predict (llm/run/receipt.py)
    checkpoints/STEP/manifest.json        size and sha256 of every other file, by group, and its own

A step is written in `STEP.partial`, flushed to disk with its folders, and renamed: a folder that is
named by a bare number is complete. An old step is renamed to `STEP.deleting` before it is removed,
and a step that does not verify to `STEP.damaged`. So a kill at any instant loses no earlier step.
Steps are ordered by number, never by time, and nothing here depends on a clock.

Several processes write one step together, into a file system that all of them see. Each process
writes and hashes its own pieces. Process 0 joins their hashes into the manifest. The step counts
for all processes once process 0 has renamed it.

Every file that the manifest lists must be as it was saved. Files that it does not list are ignored.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import shutil
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
from pydantic import BaseModel, Field, NonNegativeInt, ValidationError

from llm.errors import CheckpointError, LLMError, UsageError
from llm.faults import fault_point
from llm.files import (
    check_regular,
    disk_full_reason,
    flush_folder,
    free_bytes,
    partial_folder,
    read_json,
    readable_bytes,
    whole_folder,
    why,
)
from llm.run.arrays import (
    Piece,
    copy_to_host,
    describe_file,
    element_sums,
    identity,
    own_pieces,
    read_arrays,
    stored_arrays,
    write_pieces,
)
from llm.run.directory import folders, saved_steps
from llm.run.hosts import ALONE, Hosts

MANIFEST = "manifest.json"
RECEIPT = "receipt.json"
# Version 1 had one list of files; version 2 had a folder for each process.
SCHEMA = 3
# Groups of arrays. "params" are apart, so that opening a model reads nothing else.
GROUPS = ("params", "training")
# What is read of a receipt; check_receipt looks at the values.
RECEIPT_FIELDS = ("params_sha256", "tokenizer_sha256", "tokens", "logprobs")
# A group of files: the receipt, which is read with every group of arrays.
RECEIPT_GROUP = "receipt"

# What a checkpoint holds: group -> name -> array.
Groups = Mapping[str, Mapping[str, Any]]
# What a reader wants of it: group -> name -> jax.ShapeDtypeStruct with a sharding, on any mesh.
Abstract = Mapping[str, Mapping[str, jax.ShapeDtypeStruct]]
# Makes the rest of the receipt, besides the step and the parameters' sha256.
MakeReceipt = Callable[[], Mapping[str, Any]]


# Nothing outside the step's folder can be named.
_Name = Annotated[
    str, Field(pattern=r"^((params|training)/[^./\x00][^/\x00]*/[^/\x00]+|receipt\.json)$")
]


class _File(BaseModel):
    bytes: NonNegativeInt
    sha256: str


class _Groups(BaseModel):
    """What a manifest lists: the files of each group."""

    params: dict[_Name, _File]
    training: dict[_Name, _File]
    receipt: dict[_Name, _File]


class DamageError(CheckpointError):
    """A step's files are not those that were saved."""


def read_receipt(folder: Path) -> dict[str, Any]:
    """receipt.json of one step."""
    receipt = _read_json(folder / RECEIPT)
    if not isinstance(receipt, dict) or not receipt.keys() >= set(RECEIPT_FIELDS):
        raise DamageError(f"{folder / RECEIPT} is not one: expected {', '.join(RECEIPT_FIELDS)}")
    return receipt


def verify_files(
    folder: Path,
    groups: Iterable[str] = (*GROUPS, RECEIPT_GROUP),
    hosts: Hosts = ALONE,
) -> None:
    """Compare the files of these groups with the manifest. Collective: each process reads a share.

    Raises:
      DamageError: naming the first file that is missing or has changed.
      UsageError: the step was saved by an earlier version.
    """
    manifest = _read_manifest(folder)
    files = sorted(item for group in groups for item in manifest[group].items())
    share = files[hosts.index :: hosts.count]
    problems = (_problem(folder / name, expected) for name, expected in share)
    problem = next(filter(None, problems), "")
    for said in hosts.gather("files", problem):
        if said:
            raise DamageError(said)


def _problem(path: Path, expected: Mapping[str, Any]) -> str:
    """What is wrong with a file, or ""."""
    try:
        if (size := check_regular(path).st_size) != expected["bytes"]:
            return f"{path}: expected {expected['bytes']} bytes, found {size}"
        found = describe_file(path)
    except FileNotFoundError:
        return f"{path} is missing; expected {expected['bytes']} bytes"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    if found != expected:
        sha256, now = expected["sha256"], found["sha256"]
        return f"{path} has changed: expected sha256 {sha256}, found {now}"
    return ""


@dataclass(frozen=True)
class Restored:
    """The groups of a step that were asked for, and its receipt."""

    step: int
    folder: Path
    groups: dict[str, dict[str, jax.Array]]
    receipt: dict[str, Any]


def restore(
    root: Path,
    wanted: Abstract,
    on_bad: Literal["set aside", "pass over"],
    *,
    step: int | None = None,
    hosts: Hosts = ALONE,
    say: Callable[[str], None] = lambda text: warnings.warn(text, stacklevel=3),
) -> Restored | None:
    """The newest step that verifies, or `step`; None if nothing was saved. Collective.

    Args:
      wanted: the groups to read and verify, and what each array has to be; others are not read.
      on_bad: the process that trains sets a step that does not verify aside, by renaming it; every
        other reader passes over it. A step that is removed while it is read is passed over without
        a word.
    Raises:
      CheckpointError: there are steps but no good one, or the arrays do not fit the run's settings.
    """
    tried: dict[int, str] = {}

    def choose() -> int | None:
        # Read anew each time, since a trainer may add to the steps.
        untried = [s for s in saved_steps(root) if s not in tried and step in (None, s)]
        return untried[-1] if untried else None

    while (chosen := hosts.decide("the step to open", choose)) is not None:
        folder = root / str(chosen)
        try:
            return read_step(folder, wanted, hosts)
        except DamageError as error:
            tried[chosen] = ""
            if on_bad == "set aside":
                aside = hosts.decide("set aside", functools.partial(_set_aside, root, chosen))
                say(
                    f"WARNING: the checkpoint of step {chosen} is damaged, set aside as {aside}: "
                    f"{error}"
                )
            elif folder.exists():
                tried[chosen] = str(error)
                if step is None:
                    say(f"step {chosen} is passed over: {error}")
    damaged = list(filter(None, tried.values()))
    if on_bad == "set aside":
        damaged = hosts.decide("damage", lambda: [p.name for p in root.glob("*.damaged*")])
    if damaged:
        which = "no checkpoint can" if step is None else f"step {step} cannot"
        raise CheckpointError(
            f"in {root} {which} be trusted; restore one from a copy, or begin again with another "
            "run.dir:\n  " + "\n  ".join(damaged)
        )
    return None


def read_step(folder: Path, wanted: Abstract, hosts: Hosts = ALONE) -> Restored:
    """Read groups of one step, and verify what is read. Collective.

    Raises:
      DamageError: a file of these groups is not what was saved.
      CheckpointError: the step holds other arrays than are wanted.
    """
    verify_files(folder, [RECEIPT_GROUP, *(set(wanted) - {"params"})], hosts)
    receipt, manifest = read_receipt(folder), _read_manifest(folder)
    groups: dict[str, dict[str, jax.Array]] = {}
    sums: list[Any] = []
    problem = ""
    try:
        for group, abstract in wanted.items():
            stored = stored_arrays(folder, group, manifest[group])
            _check_shapes(folder, stored, abstract)
            groups[group] = read_arrays(
                folder / group, {name: leaf.sharding for name, leaf in abstract.items()}
            )
        # Parameters are verified by their own sha256, taken of what lies on the devices.
        sums = element_sums(own_pieces(groups.get("params", {})))
    except Exception as error:  # Orbax does not document what it raises for damaged files
        problem = str(error) if isinstance(error, LLMError) else f"{folder} cannot be read: {error}"
    said: list[Any] = hosts.gather("what was read", [sums, problem])
    problem = next((problem for _, problem in said if problem), "")
    found = identity(one for sums, _ in said for one in sums)
    if not problem and "params" in wanted and found != receipt["params_sha256"]:
        problem = (
            f"{folder}: the parameters that were read have sha256 {found}, expected "
            f"{receipt['params_sha256']}"
        )
    if problem:
        verify_files(folder, wanted, hosts)  # names the file
        raise CheckpointError(problem)
    return Restored(int(folder.name), folder, groups, receipt)


def params_sha256(params: Mapping[str, jax.Array], hosts: Hosts = ALONE) -> str:
    """The sha256 that a receipt of these parameters has. Collective."""
    said = hosts.gather("the parameters", element_sums(own_pieces(params)))
    return identity(one for sums in said for one in sums)


def _check_shapes(folder: Path, held: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name in sorted({*held, *wanted}):
        found, expected = (
            f"{arrays[name].shape} of {arrays[name].dtype.name}" if name in arrays else None
            for arrays in (held, wanted)
        )
        if found != expected:
            raise CheckpointError(
                f"{folder} does not hold the model of the run's settings: {name} has shape "
                f"{found or 'none: it is not there'}, expected "
                f"{expected or 'none: the model has no such array'}; config.toml and the "
                "checkpoint are not of one run"
            )


def _set_aside(root: Path, step: int) -> str:
    """Rename a step that cannot be trusted, so that it is not used but can be studied."""
    names = itertools.chain([".damaged"], (f".damaged.{n}" for n in itertools.count(1)))
    aside = next(path for name in names if not (path := root / f"{step}{name}").exists())
    (root / str(step)).rename(aside)
    flush_folder(root)
    return str(aside)


class Checkpoints:
    """The saved steps of a run, for the processes that train it.

    Args:
      root: RUN/checkpoints.
      keep: how many of the newest steps stay.
      hosts: the processes; each of them calls `save` with the same steps.
    """

    def __init__(self, root: Path, keep: int, hosts: Hosts = ALONE):
        self.root, self.keep = root, keep
        self._hosts = hosts
        self._best: list[int] = []
        self._step = -1
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._needed = 0

    @property
    def best(self) -> int | None:
        """A step that stays, however old it is. It may be named before it is saved: until it is on
        disk, the best step before it stays too."""
        return self._best[-1] if self._best else None

    @best.setter
    def best(self, step: int | None) -> None:
        if step != self.best:
            self._best = [] if step is None else [*self._best[-1:], step]

    def clean(self) -> None:
        """Remove what a dead process left half-written or half-deleted. In process 0."""
        self.root.mkdir(parents=True, exist_ok=True)
        for name in folders(self.root, r"[0-9]+\.(partial|deleting)"):
            shutil.rmtree(self.root / name, ignore_errors=True)

    def save(self, step: int, groups: Groups, make_receipt: MakeReceipt) -> None:
        """Copy the arrays now, and write the copy in the background. Collective.

        Waits for an earlier save first. The next step may donate the arrays. Each process copies,
        writes and hashes the pieces that it holds, and no others.

        Args:
          make_receipt: called in the background, in process 0.
        Raises:
          CheckpointError: an earlier save failed, or there is no room for this one.
        """
        self.wait()
        self._needed = sum(array.nbytes for group in groups.values() for array in group.values())
        if not self._hosts.decide(f"save {step}", lambda: self._is_needed(step)):
            return
        fault_point("checkpoint.before_copy", step)
        pieces = {group: copy_to_host(own_pieces(groups[group])) for group in GROUPS}

        def work() -> None:
            try:
                if self._hosts.is_first:
                    self._write_and_commit(step, pieces, make_receipt)
                else:
                    self._write_for_first(step, pieces)
            except BaseException as error:
                self._failure = error

        self._step = step
        self._writer = threading.Thread(target=work, name=f"checkpoint-{step}", daemon=True)
        self._writer.start()

    def check_for_errors(self) -> None:
        """Raise the error of a background save that failed; call this after each step."""
        if self._failure is not None:
            failure, self._failure, self._writer = self._failure, None, None
            raise self._explain(failure) from failure

    def wait(self) -> None:
        """Wait until the save under way is on disk."""
        while self._writer is not None and self._writer.is_alive():
            self._writer.join(1.0)
            self._hosts.moved()  # however long a disk takes
        self.check_for_errors()
        self._writer = None

    def close(self) -> None:
        """Wait for a save under way; its failure is not raised."""
        if self._writer is not None:
            self._writer.join()

    def _is_needed(self, step: int) -> bool:
        """Whether the step is still to be saved; raises if there is no room. In process 0."""
        if step in saved_steps(self.root):
            return False
        if free_bytes(self.root) < self._needed:
            raise self._no_room()
        return True

    def _write_and_commit(
        self, step: int, pieces: Mapping[str, list[Piece]], make_receipt: MakeReceipt
    ) -> None:
        """Write the step until it counts, and only then remove old steps. In process 0."""
        with whole_folder(
            self.root / str(step), lambda: fault_point("checkpoint.before_commit", step)
        ) as partial:
            self._hosts.tell(f"saving/{step}", True)
            parts = [_write_own(partial, pieces)]
            for index in range(1, self._hosts.count):
                parts.append(self._hosts.hear(f"written/{step}/{index}", forget=True))
            fault_point("checkpoint.after_write", step)
            sha256 = identity(one for part in parts for one in part["sums"])
            receipt = {"schema": SCHEMA, "step": step, "params_sha256": sha256, **make_receipt()}
            (partial / RECEIPT).write_text(json.dumps(receipt, allow_nan=False))
            fault_point("checkpoint.before_manifest", step)
            files: dict[str, dict[str, Any]] = {
                group: {name: said for part in parts for name, said in part["files"][group].items()}
                for group in GROUPS
            }
            files[RECEIPT_GROUP] = {RECEIPT: describe_file(partial / RECEIPT)}
            manifest = {"schema": SCHEMA, "groups": files, "sha256": _sha256_of_json(files)}
            (partial / MANIFEST).write_text(json.dumps(manifest, separators=(",", ":")))
            fault_point("checkpoint.before_flush", step)
        fault_point("checkpoint.after_commit", step)
        self._hosts.tell(f"saved/{step}", True)
        self._remove_old()

    def _write_for_first(self, step: int, pieces: Mapping[str, list[Piece]]) -> None:
        """Write a part of the step, tell process 0, and wait until it counts. In the others."""
        self._hosts.hear(f"saving/{step}")
        part = _write_own(partial_folder(self.root / str(step)), pieces)
        self._hosts.tell(f"written/{step}/{self._hosts.index}", part)
        self._hosts.hear(f"saved/{step}")

    def _remove_old(self) -> None:
        steps = saved_steps(self.root)
        best = self._best[-1:] if self.best in steps else self._best
        stay = {*steps[-self.keep :], *best}
        for step in steps:
            if step not in stay:
                doomed = self.root / f"{step}.deleting"
                shutil.rmtree(doomed, ignore_errors=True)
                # If NFS has left a file of another removal there, the step stays until a later one.
                with contextlib.suppress(OSError):
                    (self.root / str(step)).rename(doomed)
                fault_point("checkpoint.deleting", step)
                shutil.rmtree(doomed, ignore_errors=True)

    def _explain(self, failure: BaseException) -> LLMError:
        if full := disk_full_reason(failure):
            return self._no_room(f" ({full})")
        if isinstance(failure, LLMError):
            return failure
        reason = f"{type(failure).__name__}: {failure}".split("\n")[0][:500]
        whole = ", ".join(map(str, saved_steps(self.root))) or "none yet"
        return CheckpointError(
            f"the checkpoint of step {self._step} could not be saved ({reason}); the steps before "
            f"it are whole ({whole}): mend the cause and run the same command again"
        )

    def _no_room(self, why: str = "") -> CheckpointError:
        free = free_bytes(self.root)
        return CheckpointError(
            f"no room for a checkpoint in {self.root}{why}: it needs "
            f"{readable_bytes(self._needed)} ({self._needed} bytes), "
            f"{readable_bytes(free)} ({free} bytes) are free; the steps before it are whole: free "
            "some space (or lower checkpoint.keep) and run the same command again"
        )


def _write_own(folder: Path, pieces: Mapping[str, list[Piece]]) -> dict[str, Any]:
    """Write the pieces of this process; returns its part of the manifest and of the identity."""
    files = {group: write_pieces(folder, group, pieces[group]) for group in GROUPS}
    return {"files": files, "sums": element_sums(pieces["params"])}


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """The files of each group: name -> {"bytes", "sha256"}."""
    manifest = _read_json(folder / MANIFEST)
    manifest = manifest if isinstance(manifest, dict) else {}
    if manifest.get("schema") in range(1, SCHEMA):
        raise UsageError(
            f"{folder} was saved by an earlier version in another form; go on with that version "
            "(RUN/run.json names its code), or train again in another run.dir"
        )
    groups = manifest.get("groups", {})
    try:
        _Groups.model_validate(groups)
        said = (manifest.get("schema"), manifest.get("sha256"))
        whole = said == (SCHEMA, _sha256_of_json(groups))
    except (ValidationError, RecursionError):
        whole = False
    if not whole:
        raise DamageError(f"{folder / MANIFEST} is not the manifest that was saved: it is damaged")
    return groups


def _sha256_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read_json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise DamageError(f"{path} is damaged or cannot be read: {why(error)}") from None
