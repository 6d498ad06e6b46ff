"""python train.py CONFIG [--section.key VALUE ...]: pretrain a GPT-style language model.

Give the same command again to resume a run that has stopped. A finished run is left as it is.
"""

import collections
import contextlib
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.commands.flags import CommandLine, argument, parse
from llm.commands.init_from import Source, default_dir, source_of, source_tokenizer
from llm.config import Config
from llm.errors import DataError, LLMError, UsageError
from llm.faults import fault_point
from llm.run.directory import RunDirectory
from llm.run.display import Display, make_display
from llm.run.hosts import Hosts, joined
from llm.run.stop import StopRequest, end_on
from llm.runtime import prepare_process

if TYPE_CHECKING:
    from llm.inference.records import TokenRecord
    from llm.pages.report_writer import Page
    from llm.text.corpus import TokenizedCorpus
    from llm.training.loop import Job, Outputs, Sampler
    from llm.training.state import TrainState


class Options(CommandLine):
    """The command line."""

    lists_settings = True

    config: str = argument("CONFIG", "configuration file")
    settings: Config = Config()


@dataclass(frozen=True)
class Start:
    """A start of a run, in this process.

    Attributes:
      changed: settings that are not those of the start before it, as run.json has them.
      started: time.monotonic() when the command began.
      source: the model that training.init_from names, looked up when it is first needed.
      seconds: how long preparing text, evaluations and saves have taken.
    """

    config: Config
    run: RunDirectory
    changed: dict[str, Any]
    hosts: Hosts
    stop: StopRequest
    display: Display
    started: float
    source: Callable[[], Source] | None
    seconds: dict[str, float] = field(default_factory=lambda: collections.defaultdict(float))


def main(arguments: list[str]) -> int:
    """Exit codes as in docs/design.md; errors are raised as LLMError."""
    started = time.monotonic()
    config = configure(arguments)
    prepare_process(deterministic=config.run.deterministic)
    from llm.run.start import claim, is_finished

    with joined(config.distributed) as hosts, contextlib.ExitStack() as held:
        hosts.check_same(config)
        run = RunDirectory(Path(config.run.dir))
        changed = hosts.decide("the run directory", lambda: claim(run, config, held))
        stop = held.enter_context(StopRequest())
        display = held.enter_context(make_display(config.logging.progress, hosts.is_first))
        if not hosts.decide("finished", lambda: is_finished(run, config, display)):
            source = source_of(config)
            _train(Start(config, run, changed, hosts, stop, display, started, source))
        elif hosts.is_first:
            from llm.pages.report_writer import complete

            complete(run, display)
    return 0


def configure(arguments: list[str]) -> Config:
    """The settings of the command line, resolved, with a run directory.

    Raises:
      UsageError: no configuration file, or settings that cannot be used.
    """
    options = parse(Options, arguments)
    config = options.settings
    run = config.run.model_copy(update={"dir": config.run.dir or default_dir(options.config)})
    return config.model_copy(update={"run": run}).resolved()


def _train(start: Start) -> None:
    from llm.pages.report_writer import Page
    from llm.run.start import begin
    from llm.run.trackers import check_trackers
    from llm.training.loop import train

    config, run, hosts, display = start.config, start.run, start.hosts, start.display
    if hosts.is_first:
        check_trackers(config.logging)
    job = _make_job(start)
    sampler = _make_sampler(job)
    outputs = _make_outputs(start, job)
    if hosts.is_first:
        # Write config.toml before anything is trained: steps without it belong to no run.
        begin(run, config, job.spec, job.corpus)
        outputs.checkpoints.clean()
    page = Page(run, display, hosts.is_first, config.logging.page)
    record_so_far = partial(_record, start, outputs)
    outputs.evaluated = partial(_evaluated, record_so_far, page)
    with contextlib.closing(page), contextlib.closing(outputs):
        job, state = _begin_or_resume(start, job, outputs)
        with hosts.collective(), _recorded(record_so_far):
            start.stop.check("nothing was trained yet")
            train(job, outputs, start.stop, sampler, state)
            display.say(
                f"finished {config.training.steps} steps in {run.path}; "
                f"sample from it: python sample.py {run.path}"
            )


def _make_outputs(start: Start, job: "Job") -> "Outputs":
    from llm.run.checkpoint import Checkpoints
    from llm.run.metrics import MetricsFile
    from llm.run.probes import ProbesFile
    from llm.training.loop import Outputs

    run, hosts = start.run, start.hosts
    probes = job.make_probes(ProbesFile(run.probes, hosts.is_first))
    checkpoints = Checkpoints(run.checkpoints, start.config.checkpoint.keep, hosts)
    metrics = MetricsFile(run.metrics, hosts.is_first)
    return Outputs(run, checkpoints, metrics, start.display, probes, [], seconds=start.seconds)


def _begin_or_resume(start: Start, job: "Job", outputs: "Outputs") -> "tuple[Job, TrainState]":
    """The state to train from, once run.json has this start and every file is at its step."""
    from llm.run.start import record_start
    from llm.run.trackers import make_trackers
    from llm.training.initial import restore_or_create
    from llm.training.optimizer import jump_of_rate

    config, run, changed, hosts = start.config, start.run, start.changed, start.hosts
    checkpoints, metrics, source = outputs.checkpoints, outputs.metrics, start.source
    with hosts.collective():
        opened = (lambda *where: source().open(*where)) if source else None
        state, ancestor = restore_or_create(job, checkpoints, start.display.say, opened)
    step = int(state.step)
    job = _in_phases(job, run, changed, step)
    record = partial(record_start, run, config, step, changed, job.mesh, job.spec.attention)
    rows = hosts.decide("the start", lambda: record(ancestor, metrics, checkpoints))
    if not hosts.is_first:
        metrics.remember(rows, step)
    outputs.probes.resume(step, hosts)
    outputs.trackers = make_trackers(config, run, step) if hosts.is_first else []
    _say_what_starts(job, run, step, ancestor, start.display)
    if step and (jump := jump_of_rate(config, changed, step)):
        start.display.say(jump)
    return job, state


def _record(start: Start, outputs: "Outputs", ended: str = "") -> None:
    """Record in run.json where the time went until now, and how the run ended, if it did."""
    from llm.run.start import record_end

    if start.hosts.is_first:
        record_end(start.run, outputs.first_step_at, start.started, start.seconds, ended)


def _evaluated(record: Callable[[], None], page: "Page") -> None:
    """What follows an evaluation; the page is written in the background."""
    record()
    page.ask()


@contextlib.contextmanager
def _recorded(record: Callable[[str], None]) -> Iterator[None]:
    """Record in run.json how training ends."""
    ended = "a bug ended it"
    try:
        yield
        ended = "finished"
    except LLMError as error:
        ended = str(error)
        raise
    finally:
        record(ended)


def _make_job(start: Start) -> "Job":
    """The text, the model and the mesh. All are checked before anything is compiled."""
    from llm.model.sharding import make_mesh
    from llm.run.provenance import dtype_to_train
    from llm.run.setup import choose_kernels, make_setup
    from llm.text.batches import check_epochs, training_batches
    from llm.training.loop import Job
    from llm.training.state import check_room

    config, run, hosts = start.config, start.run, start.hosts
    mesh = make_mesh(config.mesh)
    # "auto" is decided by the devices, so this check cannot be made with those of other settings.
    choice, device = config.training.compute_dtype, mesh.devices.flat[0]
    dtype = hosts.decide("the compute dtype", lambda: dtype_to_train(run, choice, device))
    training = config.training.model_copy(update={"compute_dtype": dtype})
    decided = config.model_copy(update={"training": training})
    choose_kernels(decided, mesh)
    begun = time.monotonic()
    corpus = _prepare_once(start)
    start.seconds["text"] += time.monotonic() - begun
    # The system's answer when a shard in memory is cut short, or its disk fails.
    end_on(signal.SIGBUS, corpus.why_unreadable, DataError.exit_code)
    for note in corpus.notes:
        start.display.say(note)
    corpus.check_windows(config.model.context_length, config.data.validation)
    if not run.exists():
        check_epochs(config, training_batches(config, corpus, rows=slice(0, 0)))
    spec = make_setup(decided, corpus.tokenizer.vocab_size, mesh).spec
    check_room(spec, mesh, config.training.micro_batch_size or config.training.batch_size)
    return Job(config, spec, mesh, corpus, hosts)


def _prepare_once(start: Start) -> "TokenizedCorpus":
    """The prepared text. Process 0 prepares it first; the other processes then find its files, or
    prepare the same text themselves if they do not share a disk.

    Raises:
      DataError: the text is not what the run began with, or not the same everywhere.
    """
    from llm.run.provenance import check_corpus, kept_tokenizer
    from llm.text.shards import prepare

    config, run, hosts = start.config, start.run, start.hosts

    def on_progress(what: str, done: int, total: int | None) -> None:
        hosts.moved()
        fault_point("prepare")
        start.stop.check("the text is not prepared yet")
        start.display.prepare(what, done, total)

    def prepared() -> "TokenizedCorpus":
        own = kept_tokenizer(run, config) or source_tokenizer(config, start.source)
        return prepare(config.data, config.tokenizer, own=own, on_progress=on_progress)

    corpus = prepared() if hosts.is_first else None
    if corpus is not None and run.exists():
        check_corpus(run, corpus)
    fingerprint = hosts.decide("the corpus", lambda: corpus.fingerprint if corpus else "")
    corpus = corpus or prepared()
    if corpus.fingerprint != fingerprint:
        raise DataError(
            f"{socket.gethostname()} has another text than process 0: expected fingerprint "
            f"{fingerprint}, found {corpus.fingerprint}; give all hosts the same files, under the "
            "same names"
        )
    return corpus


def _in_phases(job: "Job", run: RunDirectory, changed: dict[str, Any], step: int) -> "Job":
    """The job with the weights that its mixture had and has, at a step that it goes on from.

    Raises:
      UsageError: a source would be read too often.
    """
    from llm.run.provenance import phases_of
    from llm.text.batches import check_epochs
    from llm.text.mixture import Phase

    if not job.config.data.mixture:
        return job
    now = [{"from_step": step, "changed": changed}]
    begun = run.read_provenance()["starts"]
    phases = job.hosts.decide("the mixture", lambda: phases_of([*begun, *now], job.config))
    # What another process decided came as JSON, with lists in the place of tuples.
    job = replace(job, phases=[Phase(at, size, tuple(whole)) for at, size, whole in phases])
    check_epochs(job.config, job.batches(whole=True))
    return job


def _say_what_starts(
    job: "Job", run: RunDirectory, step: int, ancestor: dict[str, Any] | None, display: Display
) -> None:
    from llm.model.flops import parameter_count
    from llm.text.batches import shares

    devices = list(job.mesh.devices.flat)
    corpus = job.corpus
    active = f" ({parameter_count(job.spec, active=True):,} active)" * job.spec.config.has_experts
    display.say(
        f"{parameter_count(job.spec):,} parameters{active}, {len(corpus.train):,} training tokens "
        f"({corpus.tokenizer.name}), {len(corpus.validation):,} held out; "
        f"{len(devices)} x {devices[0].device_kind}, {job.spec.products_dtype}"
        + " products" * job.spec.rounded
        + (f", {job.spec.attention} attention" if job.spec.attention != "plain" else "")
    )
    for line in shares(job.config, corpus, job.batches(whole=True)):
        display.say(line)
    begins = "starting"
    if ancestor:
        begins += " with the parameters of {from}, step {step} (sha256 {params_sha256})".format(
            **ancestor
        )
    display.say(f"{run.path}: " + (f"resuming from step {step}" if step else begins))


def _make_sampler(job: "Job") -> "Sampler":
    """A text from the current parameters, drawn as the `sample` section says.

    There is none if no tokens are asked for, if the tokenizer cannot begin an empty text, or if
    there are several processes: none of them holds all parameters.

    Raises:
      UsageError: sample.prompt cannot be the beginning of a text of this model.
    """
    from llm.inference.decode import Decoder
    from llm.inference.samples import make_requests

    settings, tokenizer = job.config.sample, job.corpus.tokenizer
    try:
        [request, *_] = make_requests(settings, [settings.prompt], tokenizer, top=1)
    except UsageError:
        if settings.prompt:
            raise
        return lambda params: ()
    if not settings.max_new_tokens or not job.hosts.alone:
        return lambda params: ()
    spec = replace(job.spec, unassigned=tokenizer.unassigned)
    Decoder(spec, {}, tokenizer).check(request)

    def sample(params: Any) -> "list[TokenRecord]":
        decoder = Decoder.create(spec, params, tokenizer)
        return [token for part in decoder.generate([request]) for token in part.tokens]

    return sample
