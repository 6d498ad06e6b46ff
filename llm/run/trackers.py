"""Optional copies of the metrics: TensorBoard files, Weights & Biases."""

from collections.abc import Mapping
from typing import Any, Protocol

from llm.config import Config
from llm.errors import UsageError
from llm.run.directory import RunDirectory

NOT_PLOTTED = ("kind", "step", "split", "finite")


class Tracker(Protocol):
    """Takes rows of metrics.jsonl."""

    def write(self, row: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


def make_trackers(config: Config, run: RunDirectory) -> list[Tracker]:
    """Those that the settings ask for.

    Raises:
      UsageError: its package is not installed; the message names the extra.
    """
    trackers: list[Tracker] = []
    if config.logging.tensorboard:
        trackers.append(TensorBoard(run))
    if config.logging.wandb_project:
        trackers.append(WeightsAndBiases(config, run))
    return trackers


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run: RunDirectory):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UsageError(
                "logging.tensorboard needs tensorboardX: install the extra 'tensorboard'"
            ) from None
        self._writer = SummaryWriter(str(run.path / "tensorboard"))

    def write(self, row: Mapping[str, Any]) -> None:
        for name, value in _plotted(row).items():
            self._writer.add_scalar(f"{row['kind']}/{name}", value, row["step"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A W&B run named as the run directory."""

    def __init__(self, config: Config, run: RunDirectory):
        try:
            import wandb
        except ImportError:
            raise UsageError(
                "logging.wandb_project needs the package wandb: install the extra 'wandb'"
            ) from None
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
