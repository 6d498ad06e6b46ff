"""Optional copies of the metrics: TensorBoard files, Weights & Biases."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llm.config import Config, LoggingConfig
from llm.errors import UsageError
from llm.run.directory import RunDirectory

NOT_PLOTTED = ("kind", "step", "split", "finite")


@dataclass(frozen=True)
class Tracker:
    """Takes rows of metrics.jsonl.

    Attributes:
      log: called with numbers by name, and the step.
    """

    log: Callable[[Mapping[str, float], int], None]
    close: Callable[[], None]

    def write(self, row: Mapping[str, Any]) -> None:
        """Log the numbers of a row, each named after the kind of the row."""
        plotted = {
            f"{row['kind']}/{name}": value
            for name, value in row.items()
            if name not in NOT_PLOTTED and value is not None
        }
        self.log(plotted, row["step"])


def check_trackers(logging: LoggingConfig) -> None:
    """Raise a UsageError, which names the extra, if a package is not installed."""
    needed = [
        ("tensorboard", logging.tensorboard, "tensorboardX"),
        ("wandb_project", logging.wandb_project, "wandb"),
    ]
    for name, wanted, package in needed:
        found = importlib.util.find_spec(package) if wanted else None
        # A spec without an origin is a mere folder of that name, which W&B leaves where it runs.
        if wanted and (found is None or found.origin is None):
            extra = name.removesuffix("_project")
            raise UsageError(
                f"logging.{name} needs the package {package}, which is not installed: install the "
                f"extra {extra!r}, or leave the setting out"
            )


def make_trackers(config: Config, run: RunDirectory) -> list[Tracker]:
    """The trackers that the settings ask for; `check_trackers` has passed."""
    trackers = []
    if config.logging.tensorboard:
        from tensorboardX import SummaryWriter

        files = SummaryWriter(str(run.path / "tensorboard"))

        def add(values: Mapping[str, float], step: int) -> None:
            for name, value in values.items():
                files.add_scalar(name, value, step)

        trackers.append(Tracker(add, files.close))
    if config.logging.wandb_project:
        import wandb

        started = wandb.init(
            project=config.logging.wandb_project,
            name=run.name,
            id=run.name,
            resume="allow",
            dir=str(run.path),
            config=config.model_dump(mode="json"),
        )
        trackers.append(Tracker(started.log, started.finish))
    return trackers
