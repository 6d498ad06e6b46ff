"""Causal self-attention, by plain JAX or by kernels that never hold a row of T scores.

    plain     softmax(Q K^T / sqrt(H) + M) V as attention.py writes it; anywhere
    splash    Pallas's kernel for TPUs (jax.experimental.pallas.ops.tpu.splash_attention)
    cudnn     NVIDIA's (jax.nn.dot_product_attention with implementation="cudnn")

All compute the same function, to rounding. The kernels need memory that grows with T instead of
T^2 and leave out the blocks that the causal mask hides: FlashAttention (Dao et al. 2022; Dao 2023).
Only this file knows the kernels, and which devices and sizes each can take.

If the mesh divides the sequence, each device gathers the keys and values of all positions, and its
queries are two chunks in the zig-zag order (context.py). Gathered keys are small beside the rest of
a pass.

Attention over a key/value cache is in gpt.py.

    B batch  T query position  S key position  N heads  K key/value heads  H head size
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llm.errors import UsageError
from llm.model.attention import CAUSAL, Places, attend, attend_in_blocks, in_view, visible
from llm.model.context import gathered, positions_on_devices
from llm.model.products import is_rounded
from llm.model.sharding import chunks_of, constrain, is_divided, partition_of, per_device, shares
from llm.model_config import ModelConfig

Kernel = Literal["plain", "cudnn", "splash"]

# The operation whose results cuDNN's backward pass reads; jax.checkpoint knows no name for them.
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"
# A TPU's vector registers have 128 lanes; splash's blocks of positions are multiples of that.
LANES = 128
# MaxText's default for each of splash's blocks (configs/base.yml, sa_block_q).
LARGEST_BLOCK = 512
# The name, for jax.checkpoint, of what splash keeps for its backward pass beside its inputs.
RESIDUAL = "attention_residual"
# Where queries, keys and values, and segments lie on the mesh.
QUERIES = partition_of(("batch", "sequence", "heads", None))
KEYS = partition_of(("batch", "sequence", "kv_heads", None))
SEGMENTS = partition_of(("batch", "sequence"))


def choose_attention(
    wanted: Literal["auto"] | Kernel, model: ModelConfig, compute_dtype: str, mesh: Any
) -> Kernel:
    """The kernel for training.attention = `wanted` on this mesh; "auto" takes the fastest.

    The mesh's devices decide, not this machine's: a program may be compiled for other devices.

    Args:
      mesh: a Mesh, or an object with a mesh's shape and devices (planning/targets.py:Outline).
    Raises:
      UsageError: the kernel that was asked for cannot be used; says why, and what to use.
    """
    obstacles: dict[Kernel, str] = {
        "splash": _splash_obstacle(model, mesh),
        "cudnn": _cudnn_obstacle(model, compute_dtype, mesh),
    }
    able: list[Kernel] = [kernel for kernel, obstacle in obstacles.items() if not obstacle]
    able.append("plain")
    if wanted == "auto":
        return able[0]
    if wanted in able:
        return wanted
    raise UsageError(
        f"training.attention = '{wanted}' cannot be used here: {obstacles[wanted]}; use 'auto', "
        f"which takes '{able[0]}'"
    )


def _splash_obstacle(model: ModelConfig, mesh: Mesh) -> str:
    """Why splash cannot be used; "" if it can."""
    device, parts = mesh.devices.flat[0], mesh.shape["context"]
    if device.platform != "tpu":
        return f"it is for TPUs, and the mesh is of {device.device_kind}"
    if model.dropout:
        return f"it drops no attention weights, and model.dropout = {model.dropout}"
    if model.context_length % (LANES * chunks_of(parts)):
        return (
            f"model.context_length = {model.context_length} is not a multiple of {LANES} in each "
            f"of the {chunks_of(parts)} chunks that mesh.context = {parts} makes"
        )
    return ""


def _cudnn_obstacle(model: ModelConfig, compute_dtype: str, mesh: Mesh) -> str:
    """Why cuDNN's kernel cannot be used; "" if it can.

    The bounds are those of jax/_src/cudnn/fused_attention_stablehlo.py.
    """
    device = mesh.devices.flat[0]
    # (major, minor) of an NVIDIA GPU; others have none, or one that is no number.
    numbers = str(getattr(device, "compute_capability", "")).split(".")
    capability = tuple(map(int, numbers)) if all(map(str.isdecimal, numbers)) else (0, 0)
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
    if model.attention_soft_cap:
        return f"it caps no scores, and model.attention_soft_cap = {model.attention_soft_cap}"
    if model.window and model.context_length % 2:
        return f"it masks even lengths alone, and model.context_length = {model.context_length}"
    head_size = model.resolved().head_size
    if head_size % 8 or head_size > largest:
        return (
            f"it takes heads of at most {largest} in multiples of 8, and model.head_size, if 0 "
            f"model.d_model / model.n_head, = {head_size}"
        )
    return ""


def self_attention(
    kernel: Kernel,
    query_BTNH: jax.Array,
    key_BTKH: jax.Array,
    value_BTKH: jax.Array,
    places: Places,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Each position mixes the values of the positions that are `visible` to it: [B, T, N, H].

    Args:
      kernel: as `choose_attention` chose it. Only plain drops weights.
      query_BTNH, key_BTKH, value_BTKH: as `attend` takes them.
      places: where each query and its key stand. If the mesh divides the sequence they are in the
        zig-zag order; plain takes any order.
      window: as `in_view` takes it.
      soft_cap: as `attention_scores` takes it; cuDNN has none.
    """
    assert kernel == "plain" or dropout_key is None
    query_BTNH = constrain(query_BTNH, "batch", "sequence", "heads", None)
    segments_BT = places.segments_BT
    if kernel == "cudnn":
        assert not soft_cap
        return cudnn_attention(query_BTNH, key_BTKH, value_BTKH, segments_BT, window=window)
    if kernel == "splash":
        return splash_attention(
            query_BTNH, key_BTKH, value_BTKH, segments_BT, window=window, soft_cap=soft_cap
        )
    if is_divided("sequence"):
        key_BTKH = constrain(key_BTKH, "batch", None, "kv_heads", None)
        value_BTKH = constrain(value_BTKH, "batch", None, "kv_heads", None)
    visible_BTS = visible(places, places, window)
    if is_rounded() and not (soft_cap or dropout_key is not None or is_divided("sequence")):
        return attend_in_blocks(query_BTNH, key_BTKH, value_BTKH, visible_BTS)
    return attend(
        query_BTNH,
        key_BTKH,
        value_BTKH,
        visible_BTS,
        soft_cap=soft_cap,
        dropout=dropout,
        dropout_key=dropout_key,
    )


def cudnn_attention(
    query_BTNH: jax.Array,
    key_BTKH: jax.Array,
    value_BTKH: jax.Array,
    segments_BT: jax.Array | None = None,
    *,
    window: int = 0,
) -> jax.Array:
    """`self_attention` by cuDNN; each device computes its rows, heads and queries.

    The kernel itself knows neither segments nor queries that begin after the first key, and its
    own window is not used. For each of these it gets a mask, one number for each pair of positions
    and for all heads. The kernel then also computes the blocks that the mask hides.

    Raises:
      UsageError: segments of windows with an odd number of tokens, which the masked kernel refuses.
    """
    T, parts = query_BTNH.shape[1], shares("sequence")
    if segments_BT is not None and T % 2:
        raise UsageError(
            f"training.attention = 'cudnn' takes documents packed in one window only if the "
            f"window's tokens are even, found {T}; make model.context_length even, or use 'plain'"
        )

    def attention(query_at_T, query_BTNH, segments_BT, key_BSKH, value_BSKH, segments_BS):
        mask_B1TS = None
        if parts > 1 or segments_BT is not None or window or not CAUSAL:
            queries = Places(query_at_T[None], segments_BT)
            keys = Places(jnp.arange(key_BSKH.shape[1])[None], segments_BS)
            mask_B1TS = visible(queries, keys, window)[:, None]
        return jax.nn.dot_product_attention(
            query_BTNH,
            key_BSKH,
            value_BSKH,
            mask=mask_B1TS,
            is_causal=parts == 1,
            implementation="cudnn",
        )

    query_at_T = jnp.asarray(positions_on_devices(T, parts))
    over_all_keys = _over_all_keys(attention, partition_of(("sequence",)))
    return over_all_keys(query_at_T, query_BTNH, key_BTKH, value_BTKH, segments_BT)


def splash_attention(
    query_BTNH: jax.Array,
    key_BTKH: jax.Array,
    value_BTKH: jax.Array,
    segments_BT: jax.Array | None = None,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
    interpret: bool = False,
) -> jax.Array:
    """`self_attention` by splash; each device computes its rows, heads and queries.

    Args:
      window, soft_cap: as `self_attention` takes them.
      interpret: run the kernel's own program on any device, slowly.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    _, T, N, H = query_BTNH.shape
    parts = shares("sequence")
    kernel = _splash_kernel(T, N // shares("heads"), parts, interpret, window, soft_cap)

    def attention(kernel, query_BTNH, segments_BT, key_BSKH, value_BSKH, segments_BS):
        # The kernel itself does not divide by sqrt(H).
        scaled_BTNH = query_BTNH * np.asarray(H**-0.5, query_BTNH.dtype)
        heads_first = [x.swapaxes(1, 2) for x in (scaled_BTNH, key_BSKH, value_BSKH)]
        segments = None if segments_BT is None else SegmentIds(segments_BT, segments_BS)
        return jax.vmap(kernel)(*heads_first, segments).swapaxes(1, 2)

    mesh = jax.sharding.get_abstract_mesh()
    blocks = None if mesh.empty else NamedSharding(mesh, partition_of((None, "sequence")))
    over_all_keys = _over_all_keys(attention, blocks and kernel.manual_sharding_spec(blocks))
    return over_all_keys(kernel, query_BTNH, key_BTKH, value_BTKH, segments_BT)


def _over_all_keys(attention: Callable[..., jax.Array], tables_spec: Any) -> Callable[..., Any]:
    """`attention` on each device, for the device's own queries and the keys of all positions.

    Returns a function of (tables, queries, keys, values, segments).

    Args:
      attention: (tables, queries, segments of the queries, then of all positions the keys, values
        and segments), inside shard_map; both segments may be None.
      tables_spec: how the mesh divides the tables.
    """

    def on_one_device(tables, query_BTNH, key_BTKH, value_BTKH, segments_BT):
        by_key = key_BTKH, value_BTKH, segments_BT
        if is_divided("sequence"):
            by_key = jax.tree.map(gathered, by_key)
        return attention(tables, query_BTNH, segments_BT, *by_key)

    return per_device(on_one_device, (tables_spec, QUERIES, KEYS, KEYS, SEGMENTS), QUERIES)


def _splash_kernel(
    length: int, heads: int, parts: int, interpret: bool, window: int = 0, soft_cap: float = 0.0
) -> Any:
    """The kernel and its tables of blocks for a sequence on `parts` devices."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    queries, keys = block_of(length // chunks_of(parts)), block_of(length)
    sizes = splash.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_q_dq=queries,
        block_kv_dq=keys,
    )
    # Splash keeps the tables of masks that are equal, and equality knows the kind of a mask and the
    # numbers that it was made with, but not its function.
    shape = length, length
    mask = (
        splash.LocalMask(shape, (window - 1, 0), 0, shard_count=parts)
        if window
        else splash.CausalMask(shape, shard_count=parts)
    )
    mask.q_sequence = positions_on_devices(length, parts)
    mask.mask_function = functools.partial(in_view, window=window)
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=parts,
        attn_logits_soft_cap=soft_cap or None,
        residual_checkpoint_name=RESIDUAL,
        interpret=interpret,
    )


def block_of(length: int) -> int:
    """The largest multiple of LANES that divides a length and is at most LARGEST_BLOCK."""
    return next(size for size in range(LARGEST_BLOCK, 0, -LANES) if length % size == 0)
