"""Optional copies of the metrics: TensorBoard files, Weights & Biases."""

import importlib.util
from collections.abc import Mapping
from typing import Any, Protocol

from llm.config import Config, LoggingConfig
from llm.errors import UsageError
from llm.run.directory import RunDirectory

NOT_PLOTTED = ("kind", "step", "split", "finite")


class Tracker(Protocol):
    """Takes rows of metrics.jsonl."""

    def write(self, row: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


def check_trackers(logging: LoggingConfig) -> None:
    """Raise a UsageError, which names the extra, where a package is not installed."""
    needed = [
        ("tensorboard", logging.tensorboard, "tensorboardX"),
        ("wandb_project", logging.wandb_project, "wandb"),
    ]
    for name, wanted, package in needed:
        if wanted and not _is_installed(package):
            extra = name.removesuffix("_project")
            raise UsageError(
                f"logging.{name} needs the package {package}, which is not installed: install the "
                f"extra {extra!r}, or leave the setting out"
            )


def _is_installed(package: str) -> bool:
    found = importlib.util.find_spec(package)
    # Without an origin it is a folder of that name, which W&B leaves where it runs.
    return found is not None and found.origin is not None


def make_trackers(config: Config, run: RunDirectory) -> list[Tracker]:
    """Those that the settings ask for; `check_trackers` has passed."""
    trackers: list[Tracker] = []
    if config.logging.tensorboard:
        trackers.append(TensorBoard(run))
    if config.logging.wandb_project:
        trackers.append(WeightsAndBiases(config, run))
    return trackers


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run: RunDirectory):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run.path / "tensorboard"))

    def write(self, row: Mapping[str, Any]) -> None:
        for name, value in _plotted(row).items():
            self._writer.add_scalar(f"{row['kind']}/{name}", value, row["step"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A W&B run named as the run directory."""

    def __init__(self, config: Config, run: RunDirectory):
        import wandb

        self._run = wandb.init(
            project=config.logging.wandb_project,
            name=run.name,
            id=run.name,
            resume="allow",
            dir=str(run.path),
            config=config.model_dump(mode="json"),
        )

    def write(self, row: Mapping[str, Any]) -> None:
        values = {f"{row['kind']}/{name}": value for name, value in _plotted(row).items()}
        self._run.log(values, step=row["step"])

    def close(self) -> None:
        self._run.finish()


def _plotted(row: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value for name, value in row.items() if name not in NOT_PLOTTED and value is not None
    }
