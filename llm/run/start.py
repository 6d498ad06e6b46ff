"""What a start makes of a run directory: it begins, resumes or is finished, or it is refused.

`claim` takes the lock of the directory and decides, before anything is compiled, whether the run
may go on with these settings. `begin` writes what a run needs to be opened later.
`record_start` and `record_end` keep the history of starts in run.json.
"""

import contextlib
import fcntl
import os
import socket
from typing import IO, Any

from jax.sharding import Mesh

from llm.config import Config, differences
from llm.errors import CheckpointError, RunLockedError, UsageError
from llm.files import now
from llm.model.gpt import ModelSpec
from llm.run.checkpoint import Checkpoints, saved_steps, verify_files
from llm.run.directory import RunDirectory, explained
from llm.run.display import Display
from llm.run.metrics import MetricsFile, read_metrics
from llm.run.provenance import check_trained, describe_run, describe_start
from llm.text.shards import TokenizedCorpus


def claim(run: RunDirectory, config: Config, held: contextlib.ExitStack) -> dict[str, Any]:
    """Take the directory, and return the settings that this start changes.

    Args:
      held: keeps the lock of the directory until it is closed.
    Raises:
      UsageError: the directory is not a run, or the run has other settings.
      RunLockedError: another process trains in it.
      CheckpointError: checkpoints are gone.
    """
    check_is_ours(run)
    changed: dict[str, Any] = {}
    begins_again = False
    if run.exists():
        before, rows = run.read_config(), read_metrics(run.metrics)
        # If nothing was trained with the former settings, this start may begin with others.
        holds_steps = any(path.name[0].isdigit() for path in run.checkpoints.glob("*"))
        begins_again = not rows and not holds_steps and bool(differences(before, config))
        if not begins_again:
            changed = changes_on_resume(before, config)
            check_trained(run)
            _check_steps(run, config)
            if not holds_steps:
                _check_checkpoints(run, before, rows)
    held.enter_context(locked(run))
    if begins_again:
        run.config.unlink()
    return changed


def _check_checkpoints(run: RunDirectory, before: Config, rows: list[dict[str, Any]]) -> None:
    """Raise if the metrics go further than they could if nothing had ever been saved."""
    last, every = max((row["step"] for row in rows), default=0), before.checkpoint.every
    # A save begins when the one before it is on disk, and the last evaluation after the last save.
    was_saved = 0 < 2 * every < last or any(
        row["kind"] == "eval" and row["step"] == before.training.steps for row in rows
    )
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
        file = open(run.lock, "a+")  # noqa: SIM115 (held until the caller closes it)
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise RunLockedError(
            f"{run.path} is in use by {holder}; wait for it, stop it, or set another run.dir"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now()}\n")
    file.flush()
    return file


def check_is_ours(run: RunDirectory) -> None:
    """Refuse a folder that holds other things than a run, before anything is written into it.

    Raises:
      UsageError: naming what was found.
    """
    for path in (run.path, run.checkpoints):
        if path.exists() and not path.is_dir():
            raise UsageError(
                f"{path} is a file; expected a folder: move it away, or set another run.dir"
            )
    if run.exists() or not run.path.is_dir():
        return
    ours = {"run.lock", "run.json", "tokenizer", "metrics.jsonl"}
    foreign = [
        name for name in sorted(os.listdir(run.path)) if name not in ours and ".tmp" not in name
    ]
    if foreign:
        raise UsageError(
            f"{run.path} is not empty and is not a run (no config.toml): found "
            f"{', '.join(foreign[:5])}; set run.dir to a new folder"
        )


# Settings that may differ when a run is resumed. Everything else decides which model results.
FREE_SECTIONS = ("logging", "checkpoint", "sample", "mesh", "distributed")
FREE_SETTINGS = (
    "run.dir",
    "run.allow_change",
    "run.deterministic",
    "data.source",  # the content must be the same: its fingerprint is compared
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
)
# Settings that change the result, perhaps on purpose: taken with run.allow_change, and recorded.
ALLOWED_SECTIONS = ("optimizer", "training")
NEVER = ("optimizer.kind", "training.compute_dtype")


def changes_on_resume(before: Config, now_: Config) -> dict[str, tuple[Any, Any]]:
    """Settings that differ from the run's and are taken: name -> (before, now).

    Raises:
      UsageError: a setting differs that may not; the message lists each of them.
    """
    changed = differences(before, now_)
    refused = {
        name
        for name in changed
        if name.split(".")[0] not in FREE_SECTIONS and name not in FREE_SETTINGS
    }
    if "auto" in changed.get("training.compute_dtype", ()):
        # What "auto" stands for is compared once the devices are known: provenance.py.
        refused.discard("training.compute_dtype")
    if (before.optimizer.decay_steps or before.training.steps) == now_.optimizer.decay_steps:
        refused.discard("optimizer.decay_steps")  # written out, it is the schedule that the run has
    may_be_allowed = {
        name for name in refused if name.split(".")[0] in ALLOWED_SECTIONS and name not in NEVER
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
    rows = [row for row in read_metrics(run.metrics) if row["kind"] == "eval"]
    evaluated = {row["step"]: row for row in rows}
    if config.data.validation != "none" and config.training.steps not in evaluated:
        return False
    try:
        verify_files(run.checkpoints / str(steps[-1]))
    except CheckpointError:
        return False  # opening it says what is wrong, and finds the one before
    row = evaluated.get(config.training.steps)
    loss = f", validation loss {row['loss']:.4f}" if row else ""
    # With more steps alone the rate would rise again from the end of its decay.
    decays = config.optimizer.schedule != "constant" and not config.optimizer.decay_steps
    hold = f" --optimizer.decay-steps {config.training.steps}" * decays
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
    run.write_provenance(describe_run(run, spec, corpus))
    run.write_config(config)


def record_start(
    run: RunDirectory,
    config: Config,
    step: int,
    changed: dict[str, Any],
    mesh: Mesh,
    attention: str,
    metrics: MetricsFile,
    checkpoints: Checkpoints,
) -> list[dict[str, Any]]:
    """Append this start to run.json, with the steps that a crash made the run repeat.

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
    run.write_provenance(record)
    if changed:
        run.write_config(config)
    return metrics.memory()


def record_end(run: RunDirectory, first_step_at: float | None, started: float) -> None:
    """Record how long this start took until its first step, which is a part of a restart's cost."""
    if first_step_at is None:
        return
    # A failure to record a statistic must not replace the error that may be under way.
    with contextlib.suppress(CheckpointError, UsageError):
        record = run.read_provenance()
        record["starts"][-1]["seconds_to_first_step"] = round(first_step_at - started, 3)
        run.write_provenance(record)
