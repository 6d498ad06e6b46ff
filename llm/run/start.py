"""What a start makes of a run directory: it begins, resumes or is finished, or it is refused.

`claim` takes the lock of the directory and decides, before anything is compiled, whether the run
may go on with these settings. `begin` writes what a run needs to be opened later.
`record_start` and `record_end` keep the history of starts in run.json.
"""

import contextlib
import fcntl
import itertools
import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from jax.sharding import Mesh

from llm.config import Config, differences
from llm.console import lost, say
from llm.errors import CheckpointError, RunLockedError, UsageError
from llm.files import now
from llm.model.gpt import ModelSpec
from llm.run.checkpoint import Checkpoints, verify_files
from llm.run.directory import RunDirectory, explained, holds_steps, saved_steps
from llm.run.display import Display
from llm.run.metrics import MetricsFile, newest_rows
from llm.run.provenance import check_trained, describe_run, describe_start
from llm.text.corpus import TokenizedCorpus
from llm.text.tokenizer import FILE_NAME, load_tokenizer


def claim(run: RunDirectory, config: Config, held: contextlib.ExitStack) -> dict[str, Any]:
    """Take the directory, and return the settings that this start changes.

    A directory in which nothing was trained belongs to whoever starts, with any settings. Files
    that a run does not have are left alone.

    Args:
      held: keeps the lock of the directory until it is closed.
    Raises:
      UsageError: something is in the way of the run's files, or the run has other settings.
      RunLockedError: another process trains in it.
      CheckpointError: checkpoints are gone.
    """
    _changes(run, config)  # what is refused is refused before anything is written
    held.enter_context(locked(run))
    with explained(run.path):
        for path in (run.config, run.provenance, run.report, run.tokenizer / FILE_NAME):
            for left in path.parent.glob(f"{path.name}.[0-9]*.tmp"):  # by a process that was killed
                left.unlink(missing_ok=True)
    changed = _changes(run, config)  # another start may have trained until now
    if changed is None:
        run.config.unlink(missing_ok=True)
    return changed or {}


def _changes(run: RunDirectory, config: Config) -> dict[str, Any] | None:
    """The settings that this start changes; None if nothing was trained here yet."""
    begun = run.exists()
    check_kinds(run)
    newest, holds = next(newest_rows(run.metrics), None), holds_steps(run.checkpoints)
    if newest is None and not holds:
        check_is_ours(run)
        return None
    if not begun:
        raise UsageError(
            f"{run.path} is not a run (no config.toml), but holds what one has trained, in "
            f"{'checkpoints' if holds else 'metrics.jsonl'}: put config.toml back, or set another "
            "run.dir"
        )
    check_trained(run)  # to restore the settings of a model that came from elsewhere is no help
    before = run.read_config()
    changed = changes_on_resume(before, config)
    _check_steps(run, config)
    if newest is not None and not holds:
        _check_checkpoints(run, before, newest)
    return changed


def _check_checkpoints(run: RunDirectory, before: Config, newest: dict[str, Any]) -> None:
    """Raise if the metrics go further than they could if nothing had ever been saved."""
    last, every = newest["step"], before.checkpoint.every
    # A save begins when the one before it is on disk, and the last evaluation after the last save.
    was_evaluated = newest["kind"] == "eval" and last == before.training.steps
    was_saved = 0 < 2 * every < last or was_evaluated
    if was_saved:
        raise CheckpointError(
            f"{run.metrics} goes to step {last}, and {run.checkpoints} holds no checkpoint: was it "
            "moved, or is a disk not mounted? Put it back; to begin again, set run.dir to another "
            "folder"
        )


def _check_steps(run: RunDirectory, config: Config) -> None:
    """Raise a UsageError if more steps are trained than the settings ask for."""
    trained = max(saved_steps(run.checkpoints), default=0)
    if trained > config.training.steps:
        raise UsageError(
            f"training.steps = {config.training.steps}, and {run.path} is trained to step "
            f"{trained}; expected at least {trained}: set --training.steps {trained} or more, or "
            "run.dir to another folder for a shorter run"
        )


def locked(run: RunDirectory) -> IO[str]:
    """Keep every other process out of a run directory until the file that is returned is closed.

    The kernel releases the lock when its holder dies, so the lock of a dead process is simply taken
    over. The file's content only tells a person who holds it.

    Raises:
      RunLockedError: another process trains here; the message names it.
      UsageError, CheckpointError: see `explained`.
    """
    with explained(run.path):
        run.path.mkdir(parents=True, exist_ok=True)
        # Were it a link, another file would be emptied.
        descriptor = os.open(run.lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        file = open(descriptor, "r+", errors="replace")  # noqa: SIM115 (held until it is closed)
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read(200).strip() or "another process"
        file.close()
        raise RunLockedError(
            f"{run.path} is in use by {holder}; wait for it, stop it, or set another run.dir"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now()}\n")
    file.flush()
    return file


def check_kinds(run: RunDirectory) -> None:
    """Raise a UsageError that names what is not a file, or a folder, where a run has one."""
    files = [run.config, run.provenance, run.metrics, run.probes, run.lock]
    files.append(run.tokenizer / FILE_NAME)
    kinds = dict.fromkeys((run.path, run.checkpoints, run.tokenizer), "folder")
    for path, kind in (kinds | dict.fromkeys(files, "file")).items():
        if os.path.lexists(path) and not (path.is_dir() if kind == "folder" else path.is_file()):
            raise _in_the_way(path, f"it is not a {kind}, or leads nowhere")


def check_is_ours(run: RunDirectory) -> None:
    """Raise a UsageError that names a file which a run would replace and no start has written."""
    try:
        path = run.tokenizer / FILE_NAME
        if path.exists():
            load_tokenizer(run.tokenizer)
        path = run.provenance if run.provenance.exists() else run.config
        if run.exists() or run.provenance.exists():
            run.read_provenance()  # which a start writes before config.toml
    except CheckpointError:
        raise _in_the_way(path, "no run has written it, and a run would replace it") from None


def _in_the_way(path: Path, why_: str) -> UsageError:
    return UsageError(f"{path} is in the way: {why_}; move it away, or set another run.dir")


# Settings that may differ when a run is resumed. Everything else decides which model results.
FREE_SECTIONS = ("logging", "checkpoint", "sample", "probe", "mesh", "distributed")
FREE_SETTINGS = (
    "run.dir",
    "run.allow_change",
    "run.deterministic",
    "data.source",  # the content must be the same: its fingerprint is compared
    "data.mixture.source",
    "data.mixture.max_epochs",
    "data.cache_dir",
    "data.workers",
    "training.steps",
    "training.eval_every",
    "training.eval_batch_size",
    "training.attention",
    "training.scan_layers",
    "training.remat",
    "training.on_nonfinite",
    "training.spike_zscore",
    "training.max_skipped",
    "training.resize_vocabulary",  # the run has its tokenizer
)
# Settings that change the result, perhaps on purpose: taken with run.allow_change, and recorded.
ALLOWED_SECTIONS = ("optimizer", "training")
NEVER = ("optimizer.kind", "training.compute_dtype", "training.init_from")


def _of_any_source(name: str) -> str:
    """The name of a setting without that of a source: data.mixture.weight."""
    return re.sub(r"^data\.mixture\..*\.", "data.mixture.", name)


def changes_on_resume(before: Config, now_: Config) -> dict[str, tuple[Any, Any]]:
    """Settings that differ from the run's and are taken: name -> (before, now).

    Raises:
      UsageError: a setting differs that may not; the message lists each of them.
    """
    changed = differences(before, now_)
    refused = {
        name
        for name in changed
        if name.split(".")[0] not in FREE_SECTIONS and _of_any_source(name) not in FREE_SETTINGS
    }
    if "auto" in changed.get("training.compute_dtype", ()):
        # What "auto" stands for is compared once the devices are known: provenance.py.
        refused.discard("training.compute_dtype")
    if (before.optimizer.decay_steps or before.training.steps) == now_.optimizer.decay_steps:
        refused.discard("optimizer.decay_steps")  # written out, it is the schedule that the run has
    may_be_allowed = {
        name for name in refused if name.split(".")[0] in ALLOWED_SECTIONS and name not in NEVER
    }
    if "data.mixture" not in changed:  # the same sources in the same order
        may_be_allowed |= {
            name for name in refused if _of_any_source(name) == "data.mixture.weight"
        }
    if now_.run.allow_change:
        refused -= may_be_allowed
    if refused:
        remedy = "set run.dir to another folder for another experiment, or restore these settings"
        if refused <= may_be_allowed:
            remedy += ", or add --run.allow-change to take them from here on (it is recorded)"
        lines = [
            f"  {name}: the run has {changed[name][0]!r}, this command has {changed[name][1]!r}"
            for name in sorted(refused)
        ]
        holder = f"{before.run.dir or 'the run directory'} holds a run with other settings:"
        raise UsageError("\n".join([holder, *lines, f"  {remedy}"]))
    return {
        name: values
        for name, values in changed.items()
        if name not in ("run.dir", "run.allow_change")
    }


def is_finished(run: RunDirectory, config: Config, display: Display) -> bool:
    """Whether the last step is saved, whole and evaluated; if so, the person is told."""
    steps = saved_steps(run.checkpoints) if run.exists() else []
    if not steps or steps[-1] < config.training.steps:
        return False
    rows = itertools.takewhile(lambda row: row["step"] >= steps[-1], newest_rows(run.metrics))
    # A kill may have left the rows of the sources of a mixture without that of the whole.
    row = next((row for row in rows if row["kind"] == "eval" and "source" not in row), None)
    if config.data.validation != "none" and row is None:
        return False
    try:
        verify_files(run.checkpoints / str(steps[-1]))
    except CheckpointError:
        return False  # opening it says what is wrong, and finds the one before
    loss = f", validation loss {row['loss']:.4f}" if row and row["loss"] is not None else ""
    # With more steps alone the rate would rise again from the end of its decay.
    optimizer = config.optimizer
    decays = optimizer.schedule != "constant" and not optimizer.decay_steps
    can_hold = decays and optimizer.min_learning_rate > 0
    hold = f" --optimizer.decay-steps {config.training.steps}" * can_hold
    display.say(
        f"{run.path} is finished: step {steps[-1]} of {config.training.steps}{loss}. "
        f"Sample from it: python sample.py {run.path}. Train on: --training.steps N{hold}"
    )
    return True


def begin(run: RunDirectory, config: Config, spec: ModelSpec, corpus: TokenizedCorpus) -> None:
    """Write everything that the run needs to be opened later; config.toml last.

    The tokenizer is written at every start, since its file may be gone; its corpus was compared.
    """
    with explained(run.tokenizer):
        corpus.tokenizer.save(run.tokenizer)
    if run.exists():
        return
    record = describe_run(run, spec, corpus)
    if config.training.init_from and run.provenance.exists():
        record |= {"ancestor": run.read_provenance().get("ancestor")}  # of a start before this one
    run.write_provenance(record)
    run.write_config(config)


def record_start(
    run: RunDirectory,
    config: Config,
    step: int,
    changed: dict[str, Any],
    mesh: Mesh,
    attention: str,
    ancestor: dict[str, Any] | None,
    metrics: MetricsFile,
    checkpoints: Checkpoints,
) -> list[dict[str, Any]]:
    """Append this start to run.json, with the steps that a crash made the run repeat.

    Args:
      ancestor: what the run begins with, if this start has read it.

    Returns the rows of metrics that decide how training goes on.
    """
    redone = [row for row in metrics.rewind(step) if row["kind"] == "train"]
    best = metrics.best_evaluation() if config.checkpoint.keep_best else None
    checkpoints.best = best[0] if best else None
    start = describe_start(mesh) | {
        "from_step": step,
        "changed": {name: list(values) for name, values in changed.items()},
        "attention": attention,
        "redone_steps": len(redone),
        "redone_seconds": round(sum(row["step_seconds"] for row in redone), 3),
    }
    record = run.read_provenance()
    record["starts"].append(start)
    if ancestor is not None:
        before = record.get("ancestor") or ancestor
        if before["params_sha256"] != ancestor["params_sha256"]:
            say(
                "WARNING: the run begins with other parameters than its last start, which trained "
                f"nothing: it had those of {before['from']}, step {before['step']} (sha256 "
                f"{before['params_sha256']})"
            )
        record["ancestor"] = ancestor
    run.write_provenance(record)
    if changed:
        run.write_config(config)
    return metrics.memory()


def record_end(
    run: RunDirectory,
    first_step_at: float | None,
    started: float,
    spent: Mapping[str, float],
    ended: str = "",
) -> None:
    """Record where the time of this start went until now, how it ended, if it did, and why its
    progress was not shown to the end, if it was not.

    Args:
      started, first_step_at: time.monotonic() of the command, and when its first step was complete.
      spent: seconds of preparing the text, of evaluations and of saves.
    """
    said: dict[str, Any] = {"progress_lost": reason} if (reason := lost()) else {}
    if first_step_at is not None:
        to_first = said["seconds_to_first_step"] = round(first_step_at - started, 3)
        seconds = {**spent, "compiling": to_first - spent.get("text", 0.0)}
        seconds["total"] = time.monotonic() - started
        said["seconds"] = {name: round(value, 3) for name, value in seconds.items()}
    if ended:
        said["ended"] = ended
    # A failure to record a statistic must not replace the error that may be under way.
    with contextlib.suppress(CheckpointError, UsageError):
        record = run.read_provenance()
        record["starts"][-1] |= said
        run.write_provenance(record)
