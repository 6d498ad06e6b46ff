"""The loop around the step: data in, metrics out, saves, evaluations, samples, and a clean stop.

`train` dispatches step n and then reads the metrics of step n - 1, so the device never waits for
the host. A due save is handed to the background before an evaluation begins.

What it is not: the mathematics (step.py), or the formats of files (llm/run/).
"""

import collections
import contextlib
import dataclasses
import functools
import math
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm.config import Config
from llm.errors import NonFiniteError, StoppedError, UsageError
from llm.faults import fault_point
from llm.inference.records import TokenRecord
from llm.model.flops import mfu
from llm.model.gpt import ModelSpec
from llm.model.sharding import own_rows, shard_batch
from llm.run.checkpoint import Checkpoints
from llm.run.directory import RunDirectory
from llm.run.display import Display
from llm.run.hosts import Hosts, SharedStop
from llm.run.metrics import MetricsFile
from llm.run.probes import ProbeRow, ProbesFile
from llm.run.receipt import receipt_tokens
from llm.run.setup import memory_bytes
from llm.run.stop import StopRequest
from llm.run.trackers import Tracker
from llm.text.batches import TrainingBatches, held_out_batches, training_batches
from llm.text.corpus import Source, TokenizedCorpus
from llm.text.mixture import Phase
from llm.text.windows import Batch
from llm.training.evaluate import Evaluation, evaluate, make_evaluation_step
from llm.training.probes import Probes
from llm.training.state import TrainState, to_groups
from llm.training.step import BATCH_AXES, ROUTER_METRICS, Metrics, make_train_step

# Draws a text from the current parameters, for a person to read.
Sampler = Callable[[Any], Sequence[TokenRecord]]


@dataclasses.dataclass(frozen=True)
class Job:
    """What is trained, on what, where, and by which processes.

    Attributes:
      phases: batch sizes and weights until now, of a run on a mixture.
    """

    config: Config
    spec: ModelSpec
    mesh: Mesh
    corpus: TokenizedCorpus
    hosts: Hosts
    phases: Sequence[Phase] = ()

    def rows(self, batch_size: int) -> np.ndarray:
        """This process's share of a batch."""
        return own_rows(self.mesh, batch_size, BATCH_AXES)

    def batches(self, whole: bool = False) -> TrainingBatches:
        """This process's rows of each batch, or all of them."""
        rows = None if whole else self.rows(self.config.training.batch_size)
        return training_batches(self.config, self.corpus, rows, self.phases)

    def make_probes(self, file: ProbesFile) -> Probes:
        """The texts that are followed: two held-out windows, and those of the settings."""
        corpus, model = self.corpus, self.config.model
        held_out, tokenizer = len(corpus.validation) > 1, corpus.tokenizer
        split = corpus.validation if held_out else corpus.train
        tokens = receipt_tokens(split, model.context_length)
        spec = ModelSpec(model, self.spec.vocab_size, "float32", unassigned=tokenizer.unassigned)
        return Probes(spec, tokenizer, self.config.probe, tokens, held_out, file)

    @property
    def tokens_per_step(self) -> int:
        return self.config.training.batch_size * self.config.model.context_length


@dataclasses.dataclass
class Outputs:
    """The destinations of a run's results.

    Attributes:
      probes: scores fixed texts as they are learnt, and makes receipts.
      evaluated: called after each evaluation.
      first_step_at: time.monotonic() when the first step of this start was complete.
      seconds: how long evaluations and saves have taken.
    """

    run: RunDirectory
    checkpoints: Checkpoints
    metrics: MetricsFile
    display: Display
    probes: Probes
    trackers: list[Tracker]
    evaluated: Callable[[], object] = lambda: None
    first_step_at: float | None = None
    seconds: dict[str, float] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(float)
    )

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Count the time of a block as that of evaluations, or of saves."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds[what] += time.monotonic() - begun

    def write(self, row: dict[str, Any]) -> None:
        """Write a row of metrics. Every process calls it; only process 0 writes."""
        self.metrics.write(row)
        for tracker in self.trackers:
            tracker.write(row)

    def close(self) -> None:
        """Wait for a save under way, and close every file."""
        self.checkpoints.close()
        self.metrics.close()
        self.probes.close()
        for tracker in self.trackers:
            tracker.close()


def train(
    job: Job,
    outputs: Outputs,
    stop: StopRequest,
    sampler: Sampler,
    state: TrainState,
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]] | None = None,
) -> None:
    """Train from a state to the last step.

    Args:
      train_step: replaces the job's own step, for those who measure the loop alone.
    Raises:
      StoppedError: a stop was requested; everything is saved.
      NonFiniteError, CheckpointError, DataError: as their messages say.
    """
    config, step, steps = job.config, int(state.step), job.config.training.steps
    step_fn = train_step or make_train_step(job.spec, config.optimizer, config.training, job.mesh)
    shared_stop = SharedStop(stop, job.hosts, job.mesh)
    report = StepReport(job, outputs, shared_stop, step)
    validation = Validation(job, outputs, shared_stop, sampler, report)
    # Before the last step; behind it each has its place below.
    between_steps: tuple[tuple[int, Callable[[TrainState, int], None]], ...] = (
        (config.checkpoint.every, functools.partial(save, job, outputs, report)),
        (config.logging.probe_every, validation.probe),
        (config.training.eval_every, validation.run),
    )
    catch_up(job, outputs, report, validation, state)
    if config.run.deterministic and step < steps:
        check_repeats(job, step_fn, state, step)

    with contextlib.closing(job.batches().iterate(step)) as batches:
        for batch in batches:
            if step >= steps or shared_stop.requested:
                break
            report.mark(f"step {step}")
            on_mesh = shard_batch(job.mesh, batch, BATCH_AXES)
            state, metrics = step_fn(state, on_mesh)
            step += 1
            fault_point("step", step)
            shared_stop.ask()
            report.settle(dispatched=step)  # the step before: the device never waits for the host
            report.pending = step, metrics
            outputs.checkpoints.check_for_errors()
            for every, do in between_steps:
                if step < steps and is_due(step, every):
                    report.settle(dispatched=step)
                    do(state, step)
    report.settle(dispatched=step)

    save(job, outputs, report, state, step)
    finish_saves(outputs)
    if step >= steps:
        validation.run(state, step)
        finish_saves(outputs)
    if shared_stop.requested and not (step >= steps and outputs.metrics.has_evaluation(step)):
        raise StoppedError(
            f"stopped on request at step {step} of {steps}, saved in {outputs.run.path}; the same "
            "command goes on from there"
        )


def catch_up(
    job: Job, outputs: Outputs, report: "StepReport", validation: "Validation", state: TrainState
) -> None:
    """Save, evaluate and score what the step that training goes on from is still owed.

    A stop may have come between a save and its evaluation or its probes.
    """
    config, step = job.config, int(state.step)
    is_another_model = config.training.init_from and not step
    if is_another_model:
        # On disk before there is a row of metrics: a run without it begins again from its source.
        save(job, outputs, report, state, step)
        finish_saves(outputs)
    if is_another_model or (step and is_due(step, config.training.eval_every)):
        validation.run(state, step)
    elif step and is_due(step, config.logging.probe_every):
        validation.probe(state, step)


class _EvaluationStoppedError(Exception):
    """The run was told to stop before the evaluation was complete."""


class StepReport:
    """What is said of each step: metrics.jsonl, progress, skipped updates.

    Attributes:
      pending: (step, metrics) of a step that was dispatched and whose metrics were not read yet.
    """

    def __init__(self, job: Job, outputs: Outputs, stop: SharedStop, step: int):
        self._job, self._outputs, self._stop = job, outputs, stop
        self._first, self._settled = step + 1, step
        self._skipped = outputs.metrics.skipped
        # Tokens trained on until now: those of the last row, and of the steps since that row at
        # today's batch size.
        seen = [row for row in outputs.metrics.rows if row["kind"] == "train"]
        last, tokens = (seen[-1]["step"], seen[-1]["tokens"]) if seen else (0, 0)
        self._tokens = tokens + (step - last) * job.tokens_per_step
        self.pending: tuple[int, Metrics] | None = None
        self.restart_clock()

    def restart_clock(self) -> None:
        """Do not count what came since the last step into the next step's time."""
        self._clock = time.perf_counter()

    def mark(self, place: str) -> None:
        """Publish this process's position, for the detection of processes that hang.

        Suspended until the first step is complete, since compile times differ between processes.
        """
        if self._settled >= self._first:
            self._job.hosts.mark(place)

    def settle(self, dispatched: int) -> None:
        """Wait for the pending step and write what it measured.

        Args:
          dispatched: the newest step that was dispatched.
        Raises:
          NonFiniteError: the update was not applied, and the run may not go on.
        """
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        self._settled = step
        # The answer of a step that was dispatched later is read with that step.
        self._stop.read(leave=dispatched - step)
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        if self._outputs.first_step_at is None:
            self._outputs.first_step_at = time.monotonic()
        self._tokens += self._job.tokens_per_step
        rate = self._job.tokens_per_step / seconds
        applied = values["finite"] and not values["spike"]
        if step % self._job.config.logging.every == 0 or not applied:
            self._outputs.write(self._row(step, values, seconds, rate))
        steps = self._job.config.training.steps
        self._outputs.display.step(step, steps, values["loss"], rate)
        self._skipped = 0 if applied else self._skipped + 1
        if not applied:
            self._refuse_or_skip(step, values)

    def _row(
        self, step: int, values: dict[str, Any], seconds: float, rate: float
    ) -> dict[str, Any]:
        row = {
            "kind": "train",
            "step": step,
            "tokens": self._tokens,
            "loss": values["loss"],
            "grad_norm": values["grad_norm"],
            "learning_rate": values["learning_rate"],
            "tokens_per_second": rate,
            "step_seconds": seconds,
            "memory_bytes": memory_bytes(),
            "mfu": mfu(self._job.spec, rate, list(self._job.mesh.devices.flat)),
        }
        row |= {name: values[name] for name in ROUTER_METRICS if name in values}
        if not values["finite"]:
            row["finite"] = False
        if values["spike"]:
            row["spike"] = True
        return row

    def _refuse_or_skip(self, step: int, values: dict[str, Any]) -> None:
        """The step itself left the weights as they were; here the run goes on or ends."""
        settings = self._job.config.training
        what = f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}"
        if not values["finite"] and math.isfinite(values["loss"] + values["grad_norm"]):
            what += ", but the new weights would not be finite"
        may_skip = values["finite"] or settings.on_nonfinite == "skip"
        if may_skip and self._skipped < settings.max_skipped:
            self._outputs.display.say(f"WARNING: {what}; this update was skipped")
            return
        path = self._outputs.run.path / f"nonfinite-step-{step}.npz"
        if self._job.hosts.is_first:
            batches = self._job.batches(whole=True)
            starts = batches.window_starts(step - 1)
            np.savez(path, tokens=batches[step - 1].tokens, window_starts=starts)
        in_a_row = f"the last {self._skipped} updates were skipped"
        raise NonFiniteError(
            f"{what}; {in_a_row if may_skip else 'the update was not applied'}. The batch is in "
            f"{path}; checkpoints, if any, are good. Lower optimizer.learning_rate (with "
            "--run.allow-change), or set training.on_nonfinite = 'skip' to pass over such batches"
        )


class Validation:
    """The validation loss at a step, the best step so far, and a sample."""

    def __init__(
        self, job: Job, outputs: Outputs, stop: SharedStop, sampler: Sampler, report: StepReport
    ):
        self._job, self._outputs, self._stop = job, outputs, stop
        self._sampler, self._report = sampler, report
        self._step_fn = make_evaluation_step(job.spec, job.mesh)

    def run(self, state: TrainState, step: int) -> None:
        """Evaluate once a step. A stop ends it after the batch under way; the next start evaluates
        this step anew."""
        metrics, sources = self._outputs.metrics, self._job.corpus.sources
        self.probe(state, step)
        if len(self._job.corpus.validation) < 2 or metrics.has_evaluation(step):
            return
        try:
            with self._outputs.timed("evaluation"):
                results = {
                    source.name: evaluate(
                        self._step_fn,
                        state.weights,
                        self._until_stopped(step, source),
                        self._job.corpus.tokenizer.byte_lengths(),
                        None if self._job.hosts.alone else self._batches(source, None),
                    )
                    for source in sources
                }
        except _EvaluationStoppedError:
            return
        for name, result in results.items():
            if name:
                self._write(step, result, name)
        self._write(step, functools.reduce(operator.add, results.values()))
        best = metrics.best_evaluation()
        if self._job.config.checkpoint.keep_best and best is not None:
            self._outputs.checkpoints.best = best[0]
            if best[0] == step:
                save(self._job, self._outputs, self._report, state, step)
        if not self._stop.requested:
            with self._outputs.timed("evaluation"):
                self._sample(state.params, step)
        self._outputs.evaluated()
        self._report.restart_clock()

    def probe(self, state: TrainState, step: int) -> None:
        """Score the probes at a step, once; nothing if there are none."""
        with self._outputs.timed("evaluation"):
            self._outputs.probes.score(state.weights, step)
        self._report.restart_clock()

    def _sample(self, params: Any, step: int) -> None:
        """Show a sample, and keep its probabilities."""
        tokens = self._sampler(params)
        if not tokens:
            return
        text = "".join(token.text for token in tokens)
        lines = ("  | " + line for line in text.splitlines() or [""])
        self._outputs.display.say("\n".join(lines))
        given = sum(token.phase == "prompt" for token in tokens)
        self._outputs.probes.file.write(ProbeRow.of(step, "Sample", tokens, given))

    def _batches(self, source: Source, rows: np.ndarray | None) -> Iterator[Batch]:
        size = self._job.config.training.evaluation_size
        return held_out_batches(self._job.config, self._job.corpus, source, size, rows)

    def _until_stopped(self, step: int, source: Source) -> Iterator[Batch]:
        size = self._job.config.training.evaluation_size
        for batch in self._batches(source, self._job.rows(size)):
            if self._stop.requested:
                self._stop.read()
                raise _EvaluationStoppedError
            self._report.mark(f"step {step}, in its evaluation")
            yield batch
            fault_point("evaluation", step)
            self._stop.ask()
            self._stop.read(leave=1)
        self._stop.read()

    def _write(self, step: int, result: Evaluation, source: str = "") -> None:
        row = {
            "kind": "eval",
            "step": step,
            "split": "validation",
            "loss": result.loss_nats,
            "bits_per_byte": result.bits_per_byte,
            "tokens": result.tokens,
        }
        self._outputs.write(row | ({"source": source} if source else {}))
        bits = result.bits_per_byte
        of = f"on {source} " if source else ""
        in_bits = f", {bits:.4f} bits per byte" if bits is not None else ""
        self._outputs.display.say(
            f"step {step}: validation loss {of}{result.loss_nats:.4f} nats per token"
            f"{in_bits} ({result.tokens:,} tokens)"
        )


def save(job: Job, outputs: Outputs, report: StepReport, state: TrainState, step: int) -> None:
    """Hand the state to the background writer, with what its parameters predict."""
    report.mark(f"step {step}, before its checkpoint")

    def checked_receipt() -> dict[str, Any]:
        job.corpus.check_sizes()  # what was trained on zeros in the place of tokens is not saved
        return receipt()

    with outputs.timed("saves"):
        receipt = outputs.probes.receipt(state.params)
        outputs.checkpoints.save(step, to_groups(state), checked_receipt)
    report.restart_clock()


def finish_saves(outputs: Outputs) -> None:
    """Wait for what the background still writes."""
    with outputs.timed("saves"):
        outputs.checkpoints.wait()


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def check_repeats(job: Job, train_step: Any, state: TrainState, step: int) -> None:
    """Take the next step twice from the same state and compare every bit.

    Raises:
      UsageError: they differ: this backend does not repeat itself.
    """
    batch = job.batches()[step]
    copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state))  # the step takes its buffers
    results = [train_step(copy(state), shard_batch(job.mesh, batch, BATCH_AXES)) for _ in range(2)]
    groups = [jax.tree.leaves((to_groups(state), metrics)) for state, metrics in results]
    if not all(_same_bits(a, b) for a, b in zip(*groups, strict=True)):
        raise UsageError(
            f"run.deterministic: step {step + 1} taken twice from one state gave two "
            "results; this backend does not repeat itself bit for bit. Set run.deterministic = "
            "false to train all the same"
        )


def _same_bits(a: jax.Array, b: jax.Array) -> bool:
    return all(
        np.asarray(one.data).tobytes() == np.asarray(other.data).tobytes()
        for one, other in zip(a.addressable_shards, b.addressable_shards, strict=True)
    )
