"""The loop around the step: data in, metrics out, saves, evaluations, samples, and a clean stop.

It dispatches step n and then reads the metrics of step n - 1, so that the device never waits for
the host. A due save is handed to the background before an evaluation begins.

What it is not: it knows no mathematics (step.py) and no file formats (llm/run/).
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm.config import Config
from llm.errors import NonFiniteError, StoppedError, UsageError
from llm.faults import fault_point
from llm.model.flops import mfu
from llm.model.gpt import ModelSpec
from llm.model.sharding import own_rows, shard_batch
from llm.run.checkpoint import Checkpoints, restore
from llm.run.directory import RunDirectory
from llm.run.hosts import Hosts, SharedStop
from llm.run.metrics import Metrics
from llm.run.progress import Progress
from llm.run.receipt import check_receipt, make_receipt, receipt_logprobs, receipt_tokens
from llm.run.stop import StopRequest
from llm.run.trackers import Tracker
from llm.text.batches import TrainingBatches, evaluation_batches, training_batches
from llm.text.shards import TokenizedCorpus
from llm.training.evaluate import Evaluation, evaluate, make_evaluation_step
from llm.training.optimizer import make_optimizer
from llm.training.state import (
    TrainState,
    abstract_state,
    create_state,
    from_groups,
    to_groups,
)
from llm.training.step import BATCH_AXES, ROUTER_METRICS, make_train_step
from llm.training.step import Metrics as StepMetrics

# Draws text from the current parameters, for a person to read.
Sampler = Callable[[Any], str]


@dataclasses.dataclass(frozen=True)
class Job:
    """What is trained, on what, where, and by which processes."""

    config: Config
    spec: ModelSpec
    mesh: Mesh
    corpus: TokenizedCorpus
    hosts: Hosts

    def rows(self, batch_size: int) -> np.ndarray:
        """This process's share of a batch."""
        return own_rows(self.mesh, batch_size, BATCH_AXES)

    def batches(self, whole: bool = False) -> TrainingBatches:
        """This process's rows of each batch, or all of them."""
        rows = None if whole else self.rows(self.config.training.batch_size)
        return training_batches(self.config, self.corpus, rows)

    @property
    def tokens_per_step(self) -> int:
        return self.config.training.batch_size * self.config.model.context_length

    def receipt_tokens(self) -> np.ndarray:
        held_out = self.corpus.validation if len(self.corpus.validation) > 1 else self.corpus.train
        return receipt_tokens(held_out, self.spec.config.context_length)


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Where a run's results go."""

    run: RunDirectory
    checkpoints: Checkpoints
    metrics: Metrics
    progress: Progress
    trackers: list[Tracker]

    def write(self, row: dict[str, Any]) -> None:
        """Called alike in every process; one of them writes (Metrics), and has trackers."""
        self.metrics.write(row)
        for tracker in self.trackers:
            tracker.write(row)

    def close(self) -> None:
        """Waits for a save under way."""
        self.checkpoints.close()
        self.metrics.close()
        for tracker in self.trackers:
            tracker.close()


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A step that was dispatched and whose metrics were not read yet."""

    step: int
    tokens: int
    metrics: dict[str, jax.Array]


class _EvaluationStoppedError(Exception):
    """The run was told to stop, and batches of the evaluation are left."""


def restore_or_create(job: Job, checkpoints: Checkpoints, say: Callable[[str], None]) -> TrainState:
    """The newest state that verifies, or a fresh one when nothing was ever saved. Collective.

    Raises:
      CheckpointError: there are steps and none is good, or one is not the model that was saved.
    """
    optimizer = make_optimizer(job.config.optimizer)
    stacked = job.config.training.scan_layers
    abstract = abstract_state(job.spec, optimizer, job.mesh, stacked=stacked)
    restored = restore(checkpoints.root, to_groups(abstract), "set aside", hosts=job.hosts, say=say)
    if restored is None:
        return create_state(job.spec, optimizer, job.config.run.seed, job.mesh, stacked=stacked)
    check_receipt(
        job.spec,
        restored.groups["params"],
        restored.receipt,
        job.corpus.tokenizer.sha256,
        str(restored.folder),
    )
    return from_groups(abstract, restored.groups)


def _same_bits(a: jax.Array, b: jax.Array) -> bool:
    return all(
        np.asarray(one.data).tobytes() == np.asarray(other.data).tobytes()
        for one, other in zip(a.addressable_shards, b.addressable_shards, strict=True)
    )


class Loop:
    """Trains from a state to the last step. One object for one start of the program.

    Args:
      train_step: another step than the job's; for those who measure the loop alone.
    """

    def __init__(
        self,
        job: Job,
        outputs: Outputs,
        stop: StopRequest,
        sampler: Sampler,
        state: TrainState,
        train_step: Callable[[TrainState, jax.Array], tuple[TrainState, StepMetrics]] | None = None,
    ):
        self._job, self._outputs, self._sampler = job, outputs, sampler
        self._stop = SharedStop(stop, job.hosts, job.mesh)
        self._settings = job.config.training
        self._state = state
        self._step = int(state.step)
        self._train_step = train_step or make_train_step(
            job.spec, job.config.optimizer, self._settings, job.mesh
        )
        self._evaluation_step = make_evaluation_step(job.spec, job.mesh)
        self._pending: _Pending | None = None
        self._clock = time.perf_counter()
        self._batches = job.batches()
        self._tokens = self._tokens_before()
        self._skipped = outputs.metrics.skipped()
        self._receipt_tokens = job.receipt_tokens()
        self.first_step_at: float | None = None
        self._first, self._settled = self._step + 1, self._step

    def run(self) -> None:
        """To the last step.

        Raises:
          StoppedError: on request, with everything saved.
          NonFiniteError, CheckpointError, DataError: as their messages say.
        """
        if self._step and self._is_due(self._settings.eval_every):
            self._evaluate()  # a stop may have come between a save and its evaluation
        if self._job.config.run.deterministic and self._step < self._settings.steps:
            self._check_repeats()
        with contextlib.closing(self._batches.iterate(self._step)) as batches:
            for tokens_BT in batches:
                if self._step >= self._settings.steps or self._stop.requested:
                    break
                self._train(tokens_BT)
                self._settle_if_due()
        self._settle()
        if self._stop.requested and self._step < self._settings.steps:
            self._leave()
        self._finish()

    def _check_repeats(self) -> None:
        """Take the next step twice from the same state and compare every bit.

        Raises:
          UsageError: they differ: this backend does not repeat itself.
        """
        tokens_BT = self._batches[self._step]
        copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state))  # the step takes its buffers
        results = [
            self._train_step(copy(self._state), shard_batch(self._job.mesh, tokens_BT, BATCH_AXES))
            for _ in range(2)
        ]
        groups = [jax.tree.leaves((to_groups(state), metrics)) for state, metrics in results]
        if not all(_same_bits(a, b) for a, b in zip(*groups, strict=True)):
            raise UsageError(
                f"run.deterministic: step {self._step + 1} taken twice from one state gave two "
                "results; this backend does not repeat itself bit for bit. Set run.deterministic = "
                "false to train all the same"
            )

    def _train(self, tokens_BT: np.ndarray) -> None:
        """Dispatch one step, then read the metrics of the one before."""
        self._mark(f"step {self._step}")
        on_mesh = shard_batch(self._job.mesh, tokens_BT, BATCH_AXES)
        state, metrics = self._train_step(self._state, on_mesh)
        self._state = state
        self._step += 1
        fault_point("step", self._step)
        self._stop.ask()
        self._settle()
        self._pending = _Pending(self._step, self._job.tokens_per_step, metrics)
        self._outputs.checkpoints.check_for_errors()

    def _settle_if_due(self) -> None:
        """Save, then evaluate, where this step is due for it."""
        last = self._step >= self._settings.steps
        save = last or self._is_due(self._job.config.checkpoint.every)
        evaluation = last or self._is_due(self._settings.eval_every)
        if save or evaluation:
            self._settle()
        if save:
            self._save()
        if evaluation and not last:
            self._evaluate()

    def _settle(self) -> None:
        """Wait for the pending step and write what it measured."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        values = {name: value.item() for name, value in jax.device_get(pending.metrics).items()}
        self._settled = pending.step
        # With a step dispatched after it, that one's answer stays; `_train` reads step by step.
        self._stop.read(leave=self._step - pending.step)
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        if self.first_step_at is None:
            self.first_step_at = time.monotonic()
        tokens = pending.tokens
        self._tokens += tokens
        applied = values["finite"] and not values["spike"]
        if pending.step % self._job.config.logging.every == 0 or not applied:
            self._outputs.write(self._row(pending.step, values, seconds, tokens))
        self._outputs.progress.step(
            pending.step, self._settings.steps, values["loss"], tokens / seconds
        )
        self._skipped = 0 if applied else self._skipped + 1
        if not applied:
            self._refuse_or_skip(pending, values)

    def _row(
        self, step: int, values: dict[str, Any], seconds: float, tokens: int
    ) -> dict[str, Any]:
        row = {
            "kind": "train",
            "step": step,
            "tokens": self._tokens,
            "loss": values["loss"],
            "grad_norm": values["grad_norm"],
            "learning_rate": values["learning_rate"],
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "mfu": mfu(
                self._job.spec,
                tokens / seconds,
                list(self._job.mesh.devices.flat),
            ),
        }
        row |= {name: values[name] for name in ROUTER_METRICS if name in values}
        if not values["finite"]:
            row["finite"] = False
        if values["spike"]:
            row["spike"] = True
        return row

    def _refuse_or_skip(self, pending: _Pending, values: dict[str, Any]) -> None:
        """The step itself has left the weights as they were; here the run goes on or ends."""
        what = f"step {pending.step}: loss {values['loss']}, gradient norm {values['grad_norm']}"
        if not values["finite"] and math.isfinite(values["loss"] + values["grad_norm"]):
            what += ", but the new weights would not be finite"
        may_skip = values["finite"] or self._settings.on_nonfinite == "skip"
        if may_skip and self._skipped < self._settings.max_skipped:
            self._outputs.progress.say(f"WARNING: {what}; this update was skipped")
            return
        batch = self._outputs.run.path / f"nonfinite-step-{pending.step}.npz"
        if self._job.hosts.is_first:
            batches, number = self._job.batches(whole=True), pending.step - 1
            starts = batches.window_starts(number)
            np.savez(batch, tokens=batches[number], window_starts=starts)
        in_a_row = f"the last {self._skipped} updates were skipped"
        raise NonFiniteError(
            f"{what}; {in_a_row if may_skip else 'the update was not applied'}. The batch is in "
            f"{batch}; checkpoints, if any, are good. Lower optimizer.learning_rate (with "
            "--run.allow-change), or set training.on_nonfinite = 'skip' to pass over such batches"
        )

    def _save(self) -> None:
        checkpoints = self._outputs.checkpoints
        self._mark(f"step {self._step}, before its checkpoint")
        logprobs = receipt_logprobs(self._job.spec, self._state.params, self._receipt_tokens)
        tokenizer_sha256 = self._job.corpus.tokenizer.sha256

        def receipt() -> dict[str, Any]:
            return make_receipt(self._receipt_tokens, logprobs, tokenizer_sha256)

        checkpoints.save(self._step, to_groups(self._state), receipt)
        self._clock = time.perf_counter()

    def _evaluate(self) -> None:
        """The validation loss at this step, once; then a sample."""
        split = self._job.corpus.validation
        if len(split) < 2 or self._outputs.metrics.has_evaluation(self._step):
            return
        try:
            result = evaluate(
                self._evaluation_step,
                self._state.weights,
                self._until_stopped(split),
                self._job.corpus.tokenizer.byte_lengths(),
                None if self._job.hosts.alone else split,
            )
        except _EvaluationStoppedError:
            return  # the next start evaluates this step anew
        self._report(result)
        self._keep_if_best()
        text = "" if self._stop.requested else self._sampler(self._state.params)
        if text:
            self._outputs.progress.say(text)
        self._clock = time.perf_counter()

    def _until_stopped(self, split: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        settings = self._settings
        size = settings.eval_batch_size or settings.micro_batch_size or settings.batch_size
        for batch in evaluation_batches(
            split,
            context_length=self._job.spec.config.context_length,
            batch_size=size,
            rows=self._job.rows(size),
        ):
            if self._stop.requested:
                self._stop.read()
                raise _EvaluationStoppedError
            self._mark(f"step {self._step}, in its evaluation")
            yield batch
            fault_point("evaluation", self._step)
            self._stop.ask()
            self._stop.read(leave=1)
        self._stop.read()

    def _report(self, result: Evaluation) -> None:
        self._outputs.write(
            {
                "kind": "eval",
                "step": self._step,
                "split": "validation",
                "loss": result.loss_nats,
                "bits_per_byte": result.bits_per_byte,
                "tokens": result.tokens,
            }
        )
        bits = result.bits_per_byte
        in_bits = f", {bits:.4f} bits per byte" if bits is not None else ""
        self._outputs.progress.say(
            f"step {self._step}: validation loss {result.loss_nats:.4f} nats per token{in_bits} "
            f"({result.tokens:,} tokens)"
        )

    def _keep_if_best(self) -> None:
        best = self._outputs.metrics.best_evaluation()
        if not self._job.config.checkpoint.keep_best or best is None:
            return
        self._outputs.checkpoints.best = best[0]
        if best[0] == self._step:
            self._save()

    def _leave(self) -> None:
        self._save()
        self._outputs.checkpoints.wait()
        raise StoppedError(
            f"stopped on request at step {self._step} of {self._settings.steps}, saved in "
            f"{self._outputs.run.path}; the same command goes on from there"
        )

    def _finish(self) -> None:
        self._save()
        self._outputs.checkpoints.wait()
        self._evaluate()
        self._outputs.checkpoints.wait()
        if self._stop.requested and not self._outputs.metrics.has_evaluation(self._step):
            self._leave()

    def _mark(self, place: str) -> None:
        """Where this process is, for the others. Not while a step is compiled, which takes each
        process as long as it takes: only once that step was taken, and so by all."""
        if self._settled >= self._first:
            self._job.hosts.mark(place)

    def _is_due(self, every: int) -> bool:
        return every > 0 and self._step % every == 0

    def _tokens_before(self) -> int:
        """Tokens trained on until now: as the last row has it, and the steps after that row by
        today's batch size."""
        seen = [row for row in self._outputs.metrics.rows if row["kind"] == "train"]
        step, tokens = (seen[-1]["step"], seen[-1]["tokens"]) if seen else (0, 0)
        return tokens + (self._step - step) * self._job.tokens_per_step
