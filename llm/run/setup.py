"""What a configuration computes, and where: mesh, dtype, attention kernel, model.

This is the one place that decides them, with every check that needs no text. `train`, `bench` and
`plan` use `make_setup`; opening a trained model uses `setup_to_predict`.
"""

import math
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from llm.config import Config, MeshConfig
from llm.model.gpt import ModelSpec
from llm.model.kernels import Kernel, choose_attention
from llm.model.remat import check_remat
from llm.model.sharding import Mesh, check_divisible, local_devices, make_mesh
from llm.runtime import has_bfloat16_units


@dataclass(frozen=True)
class Setup:
    """A model on a mesh.

    Attributes:
      mesh: the mesh that `make_setup` was given, or one of this machine's devices.
      spec: the model with its vocabulary, compute dtype and attention kernel.
    """

    mesh: Mesh
    spec: ModelSpec


def make_setup(config: Config, vocab_size: int, mesh: Any = None) -> Setup:
    """The setup of a training step, checked.

    Args:
      config: resolved.
      mesh: a Mesh, or an object with a mesh's shape and devices (llm/planning/targets.py:Outline);
        None: all devices, as the `mesh` section arranges them.
    Raises:
      UsageError: the devices cannot do what the settings ask for, or a size cannot be divided over
        them; names the setting and what would work.
    """
    mesh = make_mesh(config.mesh) if mesh is None else mesh
    dtype, attention = choose_kernels(config, mesh)
    # A CPU rounds the operands of products and computes all else in float32 (model/products.py).
    rounded = dtype == "bfloat16" and mesh.devices.flat[0].platform == "cpu"
    dtype = "float32" if rounded else dtype
    spec = ModelSpec(config.model, vocab_size, dtype, attention, rounded)
    training = config.training
    for rows in (training.micro_batch_size or training.batch_size, training.eval_batch_size):
        if rows:
            check_divisible(mesh, config.model, spec.padded_vocab_size, rows)
    return Setup(mesh, spec)


def choose_kernels(config: Config, mesh: Any) -> tuple[str, Kernel]:
    """The compute dtype and the attention kernel: the part of a setup that needs no vocabulary.

    `train` checks it before it prepares the text, which may take hours.

    Raises:
      UsageError: as `make_setup`.
    """
    training = config.training
    check_remat(training.remat, mesh)
    dtype = compute_dtype(training.compute_dtype, mesh.devices.flat[0])
    return dtype, choose_attention(training.attention, config.model, dtype, mesh)


def compute_dtype(choice: str, device: Any) -> str:
    """training.compute_dtype with "auto" decided: bfloat16 where the device has units for it."""
    if choice != "auto":
        return choice
    return "float32" if device.platform == "cpu" and not has_bfloat16_units() else "bfloat16"


def predicting_dtype(choice: str, device: Any) -> str:
    """Exact on a CPU, whatever training rounded: all that a person reads then agrees."""
    return "float32" if device.platform == "cpu" else compute_dtype(choice, device)


def memory_bytes() -> int | None:
    """The most memory that a device of this process has had in use since the start; on a CPU, what
    this process has now. None if the system does not say."""
    device = local_devices()[0]
    if (stats := device.memory_stats()) and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return None


def setup_to_predict(
    config: Config, vocab_size: int, devices: Sequence[jax.Device] | None = None
) -> Setup:
    """The setup of a trained model that predicts.

    Args:
      devices: what to spread it over; None: all accelerators of this process, or one CPU (the
        CPU "devices" of a test share one memory).
    """
    if devices is None:
        own = local_devices()
        devices = own[:1] if own[0].platform == "cpu" else own
    dtype = predicting_dtype(config.training.compute_dtype, devices[0])
    spec = ModelSpec(config.model, vocab_size, dtype)
    return Setup(predicting_mesh(spec, devices), spec)


def predicting_mesh(spec: ModelSpec, devices: Sequence[jax.Device]) -> Mesh:
    """A mesh of as many of the devices as the model's sizes can be divided over.

    The devices divide heads, MLP columns and vocabulary first (the tensor axis), because this
    divides the key/value cache and attention as well; then the width of the weights (fsdp). No
    device gathers a weight: XLA sums the devices' partial products, and only activations travel.
    """
    config, count = spec.config, len(devices)
    columns = math.gcd(config.n_kv_head, config.d_ff, spec.padded_vocab_size, count)
    # Rows of the matrices that write into the stream are divided over both axes.
    width = math.gcd(math.gcd(config.d_model, config.d_ff) // columns, count // columns)
    mesh = MeshConfig(data=1, fsdp=width, tensor=columns)
    return make_mesh(mesh, devices[: columns * width])
