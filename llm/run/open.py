"""Open what a run learnt: the newest checkpoint that verifies, ready to predict.

A model is spread over the devices as it is read, so that it may be larger than one of them:
`predicting_mesh`. Whoever predicts with it needs to know nothing of that.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from llm.config import Config, MeshConfig
from llm.errors import CheckpointError, UsageError
from llm.model.gpt import ModelSpec, Params, abstract_params, logical_axes
from llm.model.sharding import Mesh, make_mesh, tree_shardings
from llm.run.checkpoint import restore, saved_steps
from llm.run.directory import RunDirectory
from llm.run.receipt import check_receipt
from llm.text.tokenizer import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A checkpoint in memory.

    Attributes:
      params: float32 weights, placed on this machine's devices.
      receipt_max_abs_diff: how far its receipt's log-probabilities were from the saved ones, nats.
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
        """What a run record says of it."""
        return {"run": self.run, "step": self.step, "params_sha256": self.params_sha256}


def compute_dtype(choice: str) -> str:
    """training.compute_dtype with "auto" decided: bfloat16 on accelerators, float32 on CPU."""
    if choice != "auto":
        return choice
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def open_model(
    run_dir: str | Path, step: int | None = None, devices: Sequence[jax.Device] | None = None
) -> OpenedModel:
    """The model of a run at `step`, or at its newest step that verifies.

    Args:
      devices: what to spread it over; None: all accelerators of this machine, or its CPU.

    Reads complete steps only, so that a process that trains here at the same time cannot be met
    half way; a step that it deletes meanwhile is passed over for a newer one.

    Raises:
      UsageError: not a run, or no such step.
      CheckpointError: no step verifies, or one is not what it says it is.
    """
    run = RunDirectory(Path(run_dir))
    config = run.read_config()
    tokenizer = load_tokenizer(run.tokenizer)
    spec = ModelSpec(
        config.model, tokenizer.vocab_size, compute_dtype(config.training.compute_dtype)
    )
    steps = saved_steps(run.checkpoints)
    if step is not None and step not in steps:
        there_are = ", ".join(map(str, steps)) or "none"
        raise UsageError(f"{run.path} has no checkpoint of step {step}; there are: {there_are}")
    mesh = predicting_mesh(spec, devices if devices is not None else _own_devices())
    shardings = tree_shardings(mesh, logical_axes(spec))
    abstract = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[name])
        for name, leaf in abstract_params(spec).items()
    }
    restored = restore(run.checkpoints, {"params": abstract}, "pass over", step=step)
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


def _own_devices() -> list[jax.Device]:
    """This process's, but one CPU: the CPU "devices" of a test share one memory."""
    devices = jax.local_devices()
    return devices[:1] if devices[0].platform == "cpu" else devices


def predicting_mesh(spec: ModelSpec, devices: Sequence[jax.Device]) -> Mesh:
    """A mesh of as many of the devices as the model's sizes can be divided over.

    First over heads, MLP columns and vocabulary (the tensor axis), because that divides the
    key/value cache and attention as well; what is left, over the width of the weights (fsdp). No
    device then gathers a weight: XLA sums the devices' partial products, and only activations
    travel.
    """
    config, count = spec.config, len(devices)
    columns = math.gcd(config.n_kv_head, config.d_ff, spec.padded_vocab_size, count)
    # Rows of the matrices that write into the stream are divided over both axes.
    width = math.gcd(math.gcd(config.d_model, config.d_ff) // columns, count // columns)
    mesh = MeshConfig(data=1, fsdp=width, tensor=columns)
    return make_mesh(mesh, devices[: columns * width])
