"""python train.py CONFIG [--section.key VALUE ...]: pretrain a GPT-style language model.

The same command again resumes the run; if the run is finished, it says so.
"""

import contextlib
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.commands.flags import CommandLine, argument, parse
from llm.config import Config, differences
from llm.errors import CheckpointError, DataError, UsageError
from llm.faults import fault_point
from llm.run.directory import (
    RunDirectory,
    RunLock,
    changes_on_resume,
    check_is_ours,
    explained,
)
from llm.run.hosts import Hosts, joined
from llm.run.progress import Progress, make_progress
from llm.run.stop import StopRequest
from llm.runtime import prepare_process

if TYPE_CHECKING:
    from llm.text.shards import TokenizedCorpus
    from llm.training.loop import Job, Outputs, Sampler


class Options(CommandLine):
    """The command line."""

    lists_settings = True

    config: str = argument("CONFIG", "configuration file")
    settings: Config = Config()


def main(arguments: list[str]) -> int:
    """Exit codes as in docs/design.md; errors are raised as LLMError."""
    started = time.monotonic()
    config = configure(arguments)
    prepare_process(deterministic=config.run.deterministic)
    with joined(config.distributed) as hosts:
        hosts.check_same(config)
        run = RunDirectory(Path(config.run.dir))
        lock = RunLock(run)
        try:
            changed = hosts.decide("the run directory", lambda: _claim(run, config, lock))
            with (
                StopRequest() as stop,
                make_progress(config.logging.progress, speaks=hosts.is_first) as progress,
            ):
                if not hosts.decide("finished", lambda: _is_finished(run, config, progress)):
                    _train(config, run, changed, hosts, stop, progress, started)
        finally:
            lock.release()
    return 0


def _claim(run: RunDirectory, config: Config, lock: RunLock) -> dict[str, Any]:
    """Settings that this start changes, once the directory is ours."""
    check_is_ours(run)
    if not run.exists():
        lock.acquire()
        return {}
    from llm.run.metrics import read_metrics
    from llm.run.provenance import check_trained

    before, rows = run.read_config(), read_metrics(run.metrics)
    if not rows and not _holds_steps(run) and differences(before, config):
        # Nothing was trained by those settings: whoever mends one of them begins.
        lock.acquire()
        run.config.unlink()
        return {}
    changed = changes_on_resume(before, config)
    check_trained(run)
    _check_steps(run, config)
    _check_checkpoints(run, before, rows)
    lock.acquire()
    return changed


def _holds_steps(run: RunDirectory) -> bool:
    """Whether anything was saved here, be it set aside as damaged since."""
    return any(path.name[0].isdigit() for path in run.checkpoints.glob("*"))


def _check_checkpoints(run: RunDirectory, before: Config, rows: list[dict[str, Any]]) -> None:
    """Raise where the metrics go further than they could if nothing had ever been saved."""
    if _holds_steps(run):
        return
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
    """Raise a UsageError where more steps are trained than are asked for."""
    from llm.run.checkpoint import saved_steps

    trained = max(saved_steps(run.checkpoints), default=0)
    if trained > config.training.steps:
        raise UsageError(
            f"training.steps = {config.training.steps}, and {run.path} is trained to step "
            f"{trained}; expected at least {trained}: set --training.steps {trained} or more, or "
            "run.dir to another folder for a shorter run"
        )


def configure(arguments: list[str]) -> Config:
    """The settings of the command line, resolved, with a run directory.

    Raises:
      UsageError: no configuration file, or settings that cannot be used.
    """
    options = parse(Options, arguments)
    config = options.settings
    if not config.run.dir:
        name = f"runs/{Path(options.config).stem}"
        config = config.model_copy(update={"run": config.run.model_copy(update={"dir": name})})
    return config.resolved()


def _is_finished(run: RunDirectory, config: Config, progress: Progress) -> bool:
    """Whether the last step is saved, whole and evaluated; says so."""
    from llm.errors import CheckpointError
    from llm.run.checkpoint import saved_steps, verify_files
    from llm.run.metrics import read_metrics

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
    progress.say(
        f"{run.path} is finished: step {steps[-1]} of {config.training.steps}{loss}. "
        f"Sample from it: python sample.py {run.path}. Train on: --training.steps N"
    )
    return True


def _train(
    config: Config,
    run: RunDirectory,
    changed: dict[str, Any],
    hosts: Hosts,
    stop: StopRequest,
    progress: Progress,
    started: float,
) -> None:
    from llm.run.trackers import check_trackers
    from llm.training.loop import Loop, restore_or_create

    if hosts.is_first:
        check_trackers(config.logging)
    job = _make_job(config, run, hosts, stop, progress)
    if hosts.is_first:
        # First of all that is written: until config.toml stands, nothing lies there that the same
        # command would take for another's.
        _begin(run, job)
    outputs = _make_outputs(config, run, hosts, progress)
    try:
        with hosts.collective():
            state = restore_or_create(job, outputs.checkpoints, progress.say)
        step = int(state.step)
        sampler = _make_sampler(job)
        rows = hosts.decide("the start", lambda: _record_start(run, job, outputs, step, changed))
        if not hosts.is_first:
            outputs.metrics.remember(rows, step)
        _say_what_starts(job, run, step, progress)
        stop.check("nothing was trained yet")
        with hosts.collective():
            loop = Loop(job, outputs, stop, sampler, state)
            try:
                loop.run()
            finally:
                if hosts.is_first:
                    _record_end(run, loop, started)
        progress.say(
            f"finished {config.training.steps} steps in {run.path}; "
            f"sample from it: python sample.py {run.path}"
        )
    finally:
        outputs.close()


def _make_job(
    config: Config, run: RunDirectory, hosts: Hosts, stop: StopRequest, progress: Progress
) -> "Job":
    """Text, model and mesh, each checked before anything is compiled."""
    from llm.model.sharding import make_mesh
    from llm.run.provenance import check_compute_dtype
    from llm.run.setup import choose_kernels, make_setup
    from llm.text.splits import check_held_out, check_window
    from llm.training.loop import Job

    mesh = make_mesh(config.mesh)
    dtype, _ = choose_kernels(config, mesh)
    # Here and not with the other settings: "auto" needs the devices, and all processes find them.
    hosts.decide("the compute dtype", lambda: check_compute_dtype(run, dtype))
    corpus = _prepare_once(config, run, hosts, stop, progress)
    for note in corpus.notes:
        progress.say(note)
    check_window(corpus.train, config.model.context_length)
    check_held_out(corpus.validation, config.data.validation)
    spec = make_setup(config, corpus.tokenizer.vocab_size, mesh).spec
    return Job(config, spec, mesh, corpus, hosts)


def _prepare_once(
    config: Config, run: RunDirectory, hosts: Hosts, stop: StopRequest, progress: Progress
) -> "TokenizedCorpus":
    """Process 0 prepares the text; the others then find it, or prepare their own, equal one.

    Raises:
      DataError: the text is not what the run began with, or not the same everywhere.
    """
    from llm.run.provenance import check_corpus
    from llm.text.shards import prepare

    def on_progress(what: str, done: int, total: int | None) -> None:
        hosts.moved()
        fault_point("prepare")
        stop.check("the text is not prepared yet")
        progress.prepare(what, done, total)

    def prepared() -> "TokenizedCorpus":
        return prepare(config.data, config.tokenizer, on_progress=on_progress)

    def prepared_and_checked() -> "TokenizedCorpus":
        corpus = prepared()
        if run.exists():
            check_corpus(run, corpus)
        return corpus

    corpus = prepared_and_checked() if hosts.is_first else None
    fingerprint = hosts.decide("the corpus", lambda: corpus.fingerprint if corpus else "")
    corpus = corpus or prepared()
    if corpus.fingerprint != fingerprint:
        raise DataError(
            f"{socket.gethostname()} has another text than process 0: expected fingerprint "
            f"{fingerprint}, found {corpus.fingerprint}; give all hosts the same files, under the "
            "same names"
        )
    return corpus


def _make_outputs(config: Config, run: RunDirectory, hosts: Hosts, progress: Progress) -> "Outputs":
    from llm.run.checkpoint import Checkpoints
    from llm.run.metrics import Metrics
    from llm.run.trackers import make_trackers
    from llm.training.loop import Outputs

    checkpoints = Checkpoints(run.checkpoints, config.checkpoint.keep, hosts)
    if hosts.is_first:
        checkpoints.clean()
    trackers = make_trackers(config, run) if hosts.is_first else []
    return Outputs(run, checkpoints, Metrics(run.metrics, hosts.is_first), progress, trackers)


def _begin(run: RunDirectory, job: "Job") -> None:
    """Everything that the run needs to be opened later; config.toml last.

    The tokenizer at every start, whatever became of the file: its corpus was compared.
    """
    from llm.run.provenance import describe_run

    with explained(run.tokenizer):
        job.corpus.tokenizer.save(run.tokenizer)
    if run.exists():
        return
    run.write_provenance(describe_run(run, job.spec, job.corpus))
    run.write_config(job.config)


def _record_start(
    run: RunDirectory, job: "Job", outputs: "Outputs", step: int, changed: dict[str, Any]
) -> list[dict[str, Any]]:
    """Append this start to run.json, with the steps that a crash made us do again.

    Returns the rows of metrics that decide how training goes on.
    """
    from llm.run.provenance import describe_start

    redone = [row for row in outputs.metrics.rewind(step) if row["kind"] == "train"]
    best = outputs.metrics.best_evaluation() if job.config.checkpoint.keep_best else None
    outputs.checkpoints.best = best[0] if best else None
    start = describe_start(
        step=step, mesh=dict(job.mesh.shape), devices=list(job.mesh.devices.flat), changed=changed
    )
    start["processes"] = job.hosts.count
    start["attention"] = job.spec.attention
    start["redone_steps"] = len(redone)
    start["redone_seconds"] = round(sum(row["step_seconds"] for row in redone), 3)
    record = run.read_provenance()
    record["starts"].append(start)
    run.write_provenance(record)
    if changed:
        run.write_config(job.config)
    return outputs.metrics.memory()


def _record_end(run: RunDirectory, loop: Any, started: float) -> None:
    """How long this start took to its first step: what a restart costs beside the redone steps."""
    if loop.first_step_at is None:
        return
    # For the sake of a statistic no error on its way out may be lost.
    with contextlib.suppress(CheckpointError, UsageError):
        record = run.read_provenance()
        record["starts"][-1]["seconds_to_first_step"] = round(loop.first_step_at - started, 3)
        run.write_provenance(record)


def _say_what_starts(job: "Job", run: RunDirectory, step: int, progress: Progress) -> None:
    from llm.model.flops import active_parameter_count, parameter_count

    devices = list(job.mesh.devices.flat)
    corpus = job.corpus
    active = f" ({active_parameter_count(job.spec):,} active)" * job.spec.config.has_experts
    progress.say(
        f"{parameter_count(job.spec):,} parameters{active}, {len(corpus.train):,} training tokens "
        f"({corpus.tokenizer.name}), {len(corpus.validation):,} held out; "
        f"{len(devices)} x {devices[0].device_kind}, {job.spec.compute_dtype}"
        + (f", {job.spec.attention} attention" if job.spec.attention != "plain" else "")
    )
    progress.say(f"{run.path}: " + (f"resuming from step {step}" if step else "starting"))


def _make_sampler(job: "Job") -> "Sampler":
    """Text from the current parameters, drawn as the `sample` section says; "" where it cannot be.

    Raises:
      UsageError: sample.prompt cannot be the beginning of a text of this model.
    """
    from llm.inference.decode import Decoder, Request, encode_prompt
    from llm.inference.filters import Sampling

    settings, tokenizer = job.config.sample, job.corpus.tokenizer
    # Of several processes none holds all parameters.
    can_sample = settings.max_new_tokens > 0 and job.hosts.alone
    try:
        prompt = encode_prompt(tokenizer, settings.prompt)
    except UsageError:
        if settings.prompt:
            raise
        can_sample = False
    if not can_sample:
        return lambda params: ""
    request = Request(
        prompt=prompt,
        sampling=Sampling.of(settings),
        max_new_tokens=settings.max_new_tokens,
    )
    Decoder(job.spec, {}, tokenizer).check(request)

    def sample(params: Any) -> str:
        decoder = Decoder.create(job.spec, params, tokenizer)
        parts = [token.text for part in decoder.generate([request]) for token in part.tokens]
        text = "".join(parts)
        return "\n".join("  | " + line for line in text.splitlines() or [""])

    return sample
