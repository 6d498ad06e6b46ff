"""Causal self-attention by the makers of devices: kernels that never hold a row of T scores.

    plain     softmax(Q K^T / sqrt(H) + M) V as attention.py writes it; anywhere
    splash    Pallas's kernel for TPUs (jax.experimental.pallas.ops.tpu.splash_attention)
    cudnn     NVIDIA's (jax.nn.dot_product_attention with implementation="cudnn")

Each computes the same function, to rounding, in memory that grows with T instead of T^2, and leaves
out the blocks that the causal mask hides: FlashAttention (Dao et al. 2022; Dao 2023). This file is
the only one that knows them, and which devices and sizes each can take.

What it is not: attention over a key/value cache, which stays attention.py's.

    B batch  T query position  S key position  N heads  K key/value heads  H head size
"""

import functools
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llm.config import ModelConfig
from llm.errors import UsageError
from llm.model.attention import attend, causal_mask
from llm.model.context import RESIDUAL, gathered, ring_attention, zigzag_positions
from llm.model.sharding import chunks_of, partition_of, per_device, shares

Kernel = Literal["plain", "cudnn", "splash"]

# The operation whose results cuDNN's backward pass reads. They have no name for jax.checkpoint.
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"
# A TPU's vector registers have 128 lanes; splash's blocks of positions are multiples of that.
LANES = 128
# Where queries, and keys and values, lie on the mesh.
QUERIES = partition_of(("batch", "sequence", "heads", None))
KEYS = partition_of(("batch", "sequence", "kv_heads", None))
# MaxText's default for each of splash's blocks (configs/base.yml, sa_block_q); not measured here.
LARGEST_BLOCK = 512


def choose_attention(
    wanted: Literal["auto"] | Kernel, model: ModelConfig, compute_dtype: str, mesh: Any
) -> Kernel:
    """The kernel for training.attention = `wanted` on this mesh; auto: the fastest that can.

    The mesh's devices decide, not those of this machine: a program may be compiled for others.

    Args:
      mesh: a Mesh, or what has a mesh's shape and such devices (training/targets.py:Outline).
    Raises:
      UsageError: the one asked for cannot be used; says why, and what to use.
    """
    if wanted == "plain":
        return wanted
    obstacles: dict[Kernel, str] = {
        "splash": _splash_obstacle(model, mesh),
        "cudnn": _cudnn_obstacle(model, compute_dtype, mesh),
    }
    able = [kernel for kernel, obstacle in obstacles.items() if not obstacle]
    best = able[0] if able else "plain"
    if wanted == "auto" or wanted in able:
        return best
    raise UsageError(
        f"training.attention = '{wanted}' cannot be used here: {obstacles[wanted]}; use 'auto', "
        f"which takes '{best}'"
    )


def _splash_obstacle(model: ModelConfig, mesh: Mesh) -> str:
    """Why splash cannot be used; "" where it can."""
    device, parts = mesh.devices.flat[0], mesh.shape["context"]
    if device.platform != "tpu":
        return f"it is for TPUs, and the mesh is of {device.device_kind}"
    if model.dropout:
        return f"it drops no attention weights, and model.dropout = {model.dropout}"
    if model.context_length % (LANES * chunks_of(parts)):
        return (
            f"model.context_length (or an eighth of it, with which training.window_warmup_steps "
            f"begins) = {model.context_length} is not a multiple of {LANES} in each "
            f"of the {chunks_of(parts)} chunks that mesh.context = {parts} makes"
        )
    return ""


def _cudnn_obstacle(model: ModelConfig, compute_dtype: str, mesh: Mesh) -> str:
    """Why cuDNN's kernel cannot be used; "" where it can.

    The bounds are those of jax/_src/cudnn/fused_attention_stablehlo.py (JAX 0.10 to 0.12).
    """
    device = mesh.devices.flat[0]
    capability = _cuda_capability(device)
    if capability < (8, 0):
        return (
            f"it is for NVIDIA GPUs of compute capability 8.0 or more, and the mesh is of "
            f"{device.device_kind}"
        )
    largest = 256 if capability >= (9, 0) else 128
    if compute_dtype != "bfloat16":
        return f"it computes in bfloat16, and training.compute_dtype gives {compute_dtype}"
    if model.dropout:
        return f"it is used without dropout, and model.dropout = {model.dropout}"
    if model.head_size % 8 or model.head_size > largest:
        return (
            f"it takes heads of at most {largest} in multiples of 8, and model.d_model / "
            f"model.n_head = {model.head_size}"
        )
    if mesh.shape["context"] > 1:
        return f"it needs whole sequences, and mesh.context = {mesh.shape['context']}"
    return ""


def _cuda_capability(device: jax.Device) -> tuple[int, ...]:
    """(major, minor) of an NVIDIA GPU; (0, 0) of anything else."""
    numbers = str(getattr(device, "compute_capability", "")).split(".")
    is_nvidia = device.platform in ("gpu", "cuda") and all(map(str.isdecimal, numbers))
    return tuple(map(int, numbers)) if is_nvidia else (0, 0)


def causal_attention(
    kernel: Kernel,
    query_BTNH: jax.Array,
    key_BTKH: jax.Array,
    value_BTKH: jax.Array,
    *,
    zigzag: bool = False,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Each position mixes the values of positions at or before it: [B, T, N, H].

    Args:
      kernel: as `choose_attention` chose it. Only plain drops weights.
      query_BTNH, key_BTKH, value_BTKH: as `attend` takes them.
      zigzag: the positions stand in the order of context.py; not with dropout.
    """
    if kernel == "splash":
        return splash_attention(query_BTNH, key_BTKH, value_BTKH, zigzag=zigzag)
    if kernel == "cudnn":
        return cudnn_attention(query_BTNH, key_BTKH, value_BTKH)
    if zigzag:
        return per_device(ring_attention, (QUERIES, KEYS, KEYS), QUERIES)(
            query_BTNH, key_BTKH, value_BTKH
        )
    return attend(
        query_BTNH,
        key_BTKH,
        value_BTKH,
        causal_mask(query_BTNH.shape[1]),
        dropout=dropout,
        dropout_key=dropout_key,
    )


def is_residual(operation: Any, *inputs: Any, **settings: Any) -> bool:
    """A policy of jax.checkpoint: what a kernel's backward pass reads beside its inputs is kept."""
    named = jax.checkpoint_policies.save_only_these_names(RESIDUAL)
    return operation.name == CUDNN_FORWARD or named(operation, *inputs, **settings)


def cudnn_attention(query_BTNH: jax.Array, key_BTKH: jax.Array, value_BTKH: jax.Array) -> jax.Array:
    """causal_attention by cuDNN, each device its rows and heads."""
    attention = functools.partial(
        jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"
    )
    return per_device(attention, (QUERIES, KEYS, KEYS), QUERIES)(query_BTNH, key_BTKH, value_BTKH)


def splash_attention(
    query_BTNH: jax.Array,
    key_BTKH: jax.Array,
    value_BTKH: jax.Array,
    *,
    zigzag: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """causal_attention by splash, each device its rows, heads and queries.

    Where the mesh divides the sequence, each device gathers the keys and values of all positions:
    little beside what a pass holds anyway, since nothing grows with T times S here.

    Args:
      zigzag: as in `causal_attention`.
      interpret: run what the kernel is written in on any device, slowly.
    """
    _, T, N, H = query_BTNH.shape
    parts = shares("sequence")
    positions_T = zigzag_positions(T, parts) if zigzag else np.arange(T, dtype=np.int32)
    kernel = _splash_kernel(positions_T, N // shares("heads"), parts, interpret)

    def attention(kernel, query_BTNH, key_BSKH, value_BSKH):
        if parts > 1:
            key_BSKH, value_BSKH = (gathered(x, zigzag=zigzag) for x in (key_BSKH, value_BSKH))
        # The kernel itself does not divide by sqrt(H).
        scaled_BTNH = query_BTNH * np.asarray(H**-0.5, query_BTNH.dtype)
        heads_first = [x.swapaxes(1, 2) for x in (scaled_BTNH, key_BSKH, value_BSKH)]
        return jax.vmap(kernel)(*heads_first).swapaxes(1, 2)

    mesh = jax.sharding.get_abstract_mesh()
    blocks = None if mesh.empty else NamedSharding(mesh, partition_of((None, "sequence")))
    kernel_spec = blocks and kernel.manual_sharding_spec(blocks)
    divided = per_device(attention, (kernel_spec, QUERIES, KEYS, KEYS), QUERIES)
    return divided(kernel, query_BTNH, key_BTKH, value_BTKH)


def _splash_kernel(positions_T: np.ndarray, heads: int, parts: int, interpret: bool) -> Any:
    """The kernel and its tables of blocks, for queries at these positions on `parts` devices."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length = len(positions_T)
    queries, keys = block_of(length // chunks_of(parts)), block_of(length)
    sizes = splash.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_q_dq=queries,
        block_kv_dq=keys,
    )
    mask = splash.CausalMask((length, length), shard_count=parts)
    mask.q_sequence = positions_T
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=parts,
        residual_checkpoint_name=RESIDUAL,
        interpret=interpret,
    )


def block_of(length: int) -> int:
    """The largest multiple of LANES that divides a length and is at most LARGEST_BLOCK."""
    return next(size for size in range(LARGEST_BLOCK, 0, -LANES) if length % size == 0)
