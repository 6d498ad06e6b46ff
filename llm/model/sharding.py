"""The mesh of devices, and the one table from logical axes to mesh axes.

Weights and activations name their dimensions ("embed", "heads", ...). Only this file knows on which
axis of the mesh each dimension lies, so that data, fully sharded and tensor parallelism are
settings and not code. XLA inserts the collectives (GSPMD, Xu et al. 2021).

    mesh axis   what is divided over it
    data        the batch; weights are copied
    fsdp        the batch, and every matrix along one dimension (ZeRO, Rajbhandari et al. 2020)
    expert      the batch, and the experts of each block (GShard, Lepikhin et al. 2020)
    tensor      attention heads, MLP columns, vocabulary (Megatron, Shoeybi et al. 2019)
    context     the sequence
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from llm.config import MeshConfig
from llm.errors import UsageError
from llm.model.placement import nearest_multiples, place
from llm.model_config import ModelConfig

Function = TypeVar("Function", bound=Callable[..., Any])
MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")

LOGICAL_TO_MESH: dict[str, str | tuple[str, ...] | None] = {
    # weights
    "layer": None,  # a scan takes them one after the other
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    # Rows of the matrices that write into the stream. Their columns stay whole, because the TPU's
    # compiler all-reduces gradients that are divided by columns and reduce-scatters these.
    "heads_in": ("tensor", "fsdp"),
    "mlp_in": ("tensor", "fsdp"),
    "vocab": "tensor",
    "expert": "expert",
    # Whole matrices of a stack (training/optimizer.py): first those whose rows lie over fsdp, then
    # with fsdp last, so that devices trade rows for matrices. In one step the compiler finds no way
    # on meshes with several axes, and copies the whole stack to every device.
    "matrix_of_rows": ("data", "tensor", "context"),
    "matrix": ("data", "tensor", "context", "fsdp"),
    "router": None,
    "position": None,
    "norm": None,
    # activations
    "batch": ("data", "fsdp", "expert"),
    # Rows that are looked up in a table whose columns lie over fsdp: first each device has its
    # columns of all rows, then its own rows, with fsdp last, so that devices trade columns for
    # rows. Without the first the compiler finds no way on meshes with expert; without the second
    # TPUs all-reduce the positions' gradient.
    "batch_of_columns": ("data", "expert"),
    "batch_by_columns": ("data", "expert", "fsdp"),
    "sequence": "context",
    "width": None,
}


def local_devices() -> list[jax.Device]:
    """The devices of this process.

    Raises:
      UsageError: JAX finds none of the kind that $JAX_PLATFORMS names.
    """
    try:
        return jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts for a kind without its plugin
        reason = str(error).split("\n")[0] or "it finds none"
        raise UsageError(
            f"JAX cannot use its devices ({reason}), and JAX_PLATFORMS is "
            f"{os.environ.get('JAX_PLATFORMS', '')!r}: unset it to take what this machine has; "
            "GPUs and TPUs need pip install 'jax[cuda13]' or 'jax[tpu]'"
        ) from None


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices arranged as data x fsdp x expert x tensor x context (placement.py).

    Raises:
      UsageError: the sizes do not multiply to the number of devices, or cannot be divided over
        their slices or machines.
    """
    if devices is None:
        local_devices()
        devices = jax.devices()
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    if len(devices) % fixed or (-1 not in sizes and fixed != len(devices)):
        wanted = " x ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
        remedy = (
            f"make them divide {len(devices)}"
            if -1 in sizes
            else f"make them multiply to {len(devices)}, or set one to -1 to take the rest"
        )
        raise UsageError(
            f"mesh {wanted} does not fit {len(devices)} devices: the sizes given multiply to "
            f"{fixed}; {remedy}"
        )
    shape = [len(devices) // fixed if size == -1 else size for size in sizes]
    placed = place(dict(zip(MESH_AXES, shape, strict=True)), devices)
    # Auto by name: JAX's default, Explicit, would put every sharding into the types.
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def check_divisible(
    mesh: Mesh | AbstractMesh, model: ModelConfig, padded_vocab_size: int, batch_size: int
) -> None:
    """Every divided size must be a multiple of its mesh axis.

    Args:
      model: resolved or not.
      batch_size: sequences of one forward pass, over all devices.

    Raises:
      UsageError: naming the setting, the axis and the nearest sizes that work.
    """
    model = model.resolved()
    divisions = [
        ("training.micro_batch_size (or batch_size)", batch_size, "batch"),
        ("model.n_expert", model.n_expert, "expert"),
        ("model.d_model", model.d_model, "heads_in"),
        ("model.n_head", model.n_head, "heads"),
        ("model.n_kv_head", model.n_kv_head, "kv_heads"),
        ("model.d_ff", model.d_ff, "mlp_in"),
        ("vocabulary padded by model.vocab_multiple", padded_vocab_size, "vocab"),
        ("model.context_length", model.context_length, "sequence"),
    ]
    for name, size, axis in divisions:
        parts, pieces = shares(axis, mesh), "devices"
        if axis == "sequence":
            parts, pieces = chunks_of(parts), "chunks (two a device)"
        if size % parts:
            raise UsageError(
                f"{name} = {size} cannot be divided over the {parts} {pieces} of mesh axis "
                f"{' x '.join(mesh_axes(axis))}; nearest that can: {nearest_multiples(size, parts)}"
            )


def sharding_of(mesh: Mesh, logical_axes: Sequence[str | None]) -> NamedSharding:
    """How an array lies on the mesh if its dimensions have these logical names."""
    return NamedSharding(mesh, partition_of(logical_axes))


def partition_of(logical_axes: Sequence[str | None]) -> PartitionSpec:
    return PartitionSpec(*(LOGICAL_TO_MESH[axis] if axis else None for axis in logical_axes))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def gathered(arrays: Any, params: Mapping[str, jax.Array]) -> Any:
    """What was computed from parameters, so that each process can read all of it."""
    sharding = next(iter(params.values())).sharding
    if sharding.is_fully_addressable:
        return arrays
    assert isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh)
    return jax.device_put(arrays, replicated(sharding.mesh))


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Tell the compiler where an activation lies; without a mesh in context, do nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_of(logical_axes))


def per_device(function: Function, in_specs: Any, out_specs: Any) -> Function:
    """The function on each device's own parts, by shard_map over the mesh in context.

    The devices then send each other only what the function sends. Without a mesh it is the function
    itself.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function
    # Kernels do not say over which axes their results vary, so JAX cannot check it.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def shares(logical_axis: str, mesh: Mesh | AbstractMesh | None = None) -> int:
    """Into how many parts a mesh, or the mesh in context, divides this axis; 1 without a mesh."""
    sizes = (mesh or jax.sharding.get_abstract_mesh()).shape
    return math.prod(sizes.get(name, 1) for name in mesh_axes(logical_axis))


def mesh_axes(logical_axis: str) -> tuple[str, ...]:
    """The axes of the mesh that divide this axis."""
    names = LOGICAL_TO_MESH[logical_axis]
    return (names,) if isinstance(names, str) else names or ()


def chunks_of(parts: int) -> int:
    """How many chunks a sequence on `parts` devices is cut into: two on each device, or one."""
    return 2 * parts if parts > 1 else 1


def kind_in_context() -> str:
    """JAX's name for the devices of the mesh in context, as "NVIDIA H200"; "" without a mesh."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return "" if device is None else device.device_kind


def is_divided(logical_axis: str) -> bool:
    """Whether the mesh in context spreads this axis over more than one device."""
    return shares(logical_axis) > 1


def own_rows(mesh: Mesh, batch_size: int, logical_axes: Sequence[str | None]) -> np.ndarray:
    """int64: which rows of a global batch lie on this process's devices, ascending.

    With tensor or context parallelism over processes, several of them have the same rows.
    """
    indices = sharding_of(mesh, logical_axes[:1]).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for rows in indices.values()]))


def shard_batch(mesh: Mesh, batch: Any, logical_axes: Sequence[str | None]) -> Any:
    """This process's rows of the arrays of a global batch (`own_rows`), placed on the mesh."""
    sharding = sharding_of(mesh, logical_axes)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)


def tree_shardings(
    mesh: Mesh, axes: Mapping[str, tuple[str | None, ...]]
) -> dict[str, NamedSharding]:
    """name -> sharding for every weight."""
    return {name: sharding_of(mesh, names) for name, names in axes.items()}
