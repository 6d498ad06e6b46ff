"""Optional copies of the metrics: TensorBoard files, Weights & Biases.

Training goes on without them if they fail: metrics.jsonl has every row.
"""

import hashlib
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llm.config import Config, LoggingConfig
from llm.console import say
from llm.errors import UsageError, needing
from llm.run.directory import RunDirectory, explained

NOT_PLOTTED = ("kind", "step", "split", "source", "finite")


@dataclass
class Tracker:
    """Takes rows of metrics.jsonl, until it fails.

    Attributes:
      log: called with numbers by name, and the step.
    """

    name: str
    log: Callable[[Mapping[str, float], int], object]
    end: Callable[[], object]
    failed: bool = False

    def write(self, row: Mapping[str, Any]) -> None:
        """Log the numbers of a row, each named after the kind of the row, and its source."""
        group = "/".join(row[name] for name in ("kind", "source") if name in row)
        plotted = {
            f"{group}/{name}": value
            for name, value in row.items()
            if name not in NOT_PLOTTED and value is not None
        }
        self._attempt(lambda: self.log(plotted, row["step"]))

    def close(self) -> None:
        self._attempt(self.end)

    def _attempt(self, call: Callable[[], object]) -> None:
        try:
            if not self.failed:
                call()
        except Exception as error:  # a library's, a network's or a disk's
            self.failed = True
            say(
                f"warning: {self.name} takes no more rows ({error}); training goes on, and "
                "metrics.jsonl has them all"
            )


def check_trackers(logging: LoggingConfig) -> None:
    """Raise a UsageError, which says what to install, if a package is not there.

    W&B leaves a folder `wandb` where it runs, and Python would import that: so names are imported.
    """
    if logging.tensorboard:
        with needing("logging.tensorboard", "'glassbox-gpt[tensorboard]'"):
            from tensorboardX import SummaryWriter  # noqa: F401
    if logging.wandb_project:
        with needing("logging.wandb_project", "'glassbox-gpt[wandb]'"):
            from wandb import init  # noqa: F401


def make_trackers(config: Config, run: RunDirectory, step: int) -> list[Tracker]:
    """The trackers that the settings ask for; `check_trackers` has passed.

    Args:
      step: the step that training goes on from.
    Raises:
      UsageError: a file cannot be written, or W&B does not start.
    """
    trackers = []
    if config.logging.tensorboard:
        with explained(run.path / "tensorboard"):
            trackers.append(_tensorboard(run, step))
    if config.logging.wandb_project:
        trackers.append(_wandb(config, run))
    return trackers


def _tensorboard(run: RunDirectory, step: int) -> Tracker:
    """TensorBoard's files. It hides what earlier starts have logged of steps after `step`.

    The writer of tensorboardX that has a thread would wait for ever once that thread has met a full
    disk; this one writes at once.
    """
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary

    folder = run.path / "tensorboard"
    folder.mkdir(exist_ok=True)
    # The file's name has the second of this start. With the step, no other start has the same.
    events = EventsWriter(str(folder / "events"), f".{step}")

    def write(step: int, **content: Any) -> None:
        events.write_event(Event(wall_time=time.time(), step=step, **content))
        events.flush()

    def log(values: Mapping[str, float], step: int) -> None:
        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        write(step, summary=Summary(value=points))

    write(step + 1, session_log=SessionLog(status=SessionLog.START))
    return Tracker("TensorBoard", log, events.close)


def _wandb(config: Config, run: RunDirectory) -> Tracker:
    """A run of W&B, which leaves out steps that it has already: they are in it once."""
    import wandb

    try:
        started = wandb.init(
            project=config.logging.wandb_project,
            name=run.name,
            id=wandb_id(run.name),
            resume="allow",
            dir=str(run.path),
            config=config.model_dump(mode="json"),
        )
    except Exception as error:  # W&B's own, its network's, or a wrong WANDB_ variable
        raise UsageError(
            f"logging.wandb_project: W&B does not start: {str(error).splitlines()[0]} Log in with "
            "`wandb login`, set WANDB_MODE=offline, or leave the setting out"
        ) from None
    return Tracker("W&B", started.log, started.finish)


def wandb_id(name: str) -> str:
    """The id by which W&B finds a run again: its name, if that can be one."""
    if re.fullmatch(r"[^:;,#?/'\\%\x00-\x1f]{1,128}", name):
        return name
    readable = re.sub(r"[^\w.=-]", "-", name)[:100]
    return f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
