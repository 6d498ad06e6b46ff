"""Open the model of a run: the newest checkpoint that verifies, ready to predict.

A model is spread over the devices as it is read, so that it may be larger than one device
(`predicting_mesh`). The code that predicts does not need to know.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from llm.config import Config
from llm.errors import CheckpointError, UsageError
from llm.model.gpt import ModelSpec, Params, abstract_params, logical_axes
from llm.model.sharding import Mesh, shares, tree_shardings
from llm.run.checkpoint import restore
from llm.run.directory import RunDirectory, saved_steps
from llm.run.hosts import ALONE, Hosts
from llm.run.receipt import check_receipt
from llm.run.setup import setup_to_predict
from llm.text.tokenizer import Tokenizer, load_tokenizer, lossy_note


@dataclasses.dataclass(frozen=True, eq=False)
class OpenedModel:
    """A checkpoint in memory.

    Attributes:
      params: float32 weights, placed on this machine's devices.
      receipt_max_abs_diff: the largest difference between the receipt's log-probabilities as they
        were saved and as they were recomputed, nats.
    """

    spec: ModelSpec
    params: Params
    tokenizer: Tokenizer
    config: Config
    step: int
    params_sha256: str
    receipt_max_abs_diff: float
    run: str
    path: Path

    @property
    def checkpoint(self) -> dict[str, Any]:
        """What the record of a run says of the checkpoint."""
        said = {"run": self.run, "step": self.step, "params_sha256": self.params_sha256}
        return said | ({"lossy_tokenizer": True} if self.tokenizer.lossy else {})


def open_model(
    run_dir: str | Path,
    step: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    *,
    mesh: Mesh | None = None,
    hosts: Hosts = ALONE,
) -> OpenedModel:
    """The model of a run at `step`, or at its newest step that verifies. Collective.

    Args:
      devices: the devices to spread it over; None: all accelerators of this machine, or its CPU.
      mesh: replaces the mesh of these devices; it may be one of several processes.

    Only complete steps are read, so that another process may train here at the same time. If it
    deletes the step that is being read, a newer one is opened.

    Raises:
      UsageError: not a run, or no such step.
      CheckpointError: no step verifies, or the model does not agree with its receipt.
    """
    run = RunDirectory(Path(run_dir))
    config = run.read_config()
    tokenizer = load_tokenizer(run.tokenizer)
    if tokenizer.lossy:
        warnings.warn(lossy_note(tokenizer), stacklevel=2)
    steps = saved_steps(run.checkpoints)
    if step is not None and step not in steps:
        there_are = ", ".join(map(str, steps)) or "none"
        raise UsageError(f"{run.path} has no checkpoint of step {step}; there are: {there_are}")
    setup = setup_to_predict(config, tokenizer.vocab_size, devices)
    spec = dataclasses.replace(setup.spec, unassigned=tokenizer.unassigned)
    shardings = reading_shardings(mesh or setup.mesh, spec)
    abstract = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[name])
        for name, leaf in abstract_params(spec).items()
    }
    restored = restore(run.checkpoints, {"params": abstract}, "pass over", step=step, hosts=hosts)
    if restored is None:
        raise CheckpointError(
            f"{run.path} has no checkpoint yet; train until the first is saved (checkpoint.every, "
            "or stop with Ctrl-C, which saves)"
        )
    params, receipt = restored.groups["params"], restored.receipt
    difference = check_receipt(spec, params, receipt, tokenizer.sha256, str(restored.folder))
    return OpenedModel(
        spec=spec,
        params=params,
        tokenizer=tokenizer,
        config=config,
        step=restored.step,
        params_sha256=receipt["params_sha256"],
        receipt_max_abs_diff=difference,
        run=run.name,
        path=run.path,
    )


def reading_shardings(mesh: Mesh, spec: ModelSpec) -> dict[str, jax.sharding.NamedSharding]:
    """How a model's parameters lie on a mesh that was made for another vocabulary."""
    whole = "vocab" if spec.padded_vocab_size % shares("vocab", mesh) else None
    axes = {
        name: tuple(None if axis == whole else axis for axis in of_name)
        for name, of_name in logical_axes(spec).items()
    }
    return tree_shardings(mesh, axes)
