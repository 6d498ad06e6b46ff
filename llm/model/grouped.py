"""Rows times the matrix of their group, for groups of any sizes: y_r = x_r W_{group(r)}.

Rows are laid out in blocks of M that hold one group each, filled up with zeros, and a loop takes
the blocks one after the other. The work grows with the rows, whatever they are spread over:
`jax.lax.ragged_dot`, made for this, multiplies every row with every group on the CPU (jax 0.12) and
on TPUs (libtpu 0.0.52), and of few rows reads all matrices.

Source: Gale et al. 2022, "MegaBlocks" (blocks of one expert each).

    R rows  E groups  N blocks  M rows of a block  S = N M  D width in  F width out
"""

import jax
import jax.numpy as jnp

# Enough that a block's product takes longer than reading its matrix, on the accelerators of today
# (TPU v5e: 197 TFLOP/s over 0.8 TB/s is 240 rows in bfloat16, from its data sheet).
LARGEST_BLOCK = 512


def block_rows(rows: int, groups: int) -> int:
    """M: a power of two, at most half an average group, so that little is filled up."""
    return min(LARGEST_BLOCK, 1 << max(0, (rows // (2 * groups)).bit_length() - 1))


def block_count(rows: int, groups: int) -> int:
    """N: blocks for any spread of the rows over the groups."""
    M = block_rows(rows, groups)
    return (rows + min(groups, rows) * (M - 1)) // M


def lay_out(group_R: jax.Array, groups: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where rows lie in blocks: (slot_R, row_S, group_N).

    slot_R and row_S are each other's inverse, where row R stands for an empty slot. N is the most
    that any spread needs; blocks that this one leaves over are empty.
    """
    (R,) = group_R.shape
    M, N = block_rows(R, groups), block_count(R, groups)
    sizes_E = jnp.bincount(group_R, length=groups)
    blocks_E = -(-sizes_E // M)
    end_E = jnp.cumsum(blocks_E)
    first_slot_E = M * (end_E - blocks_E)
    order_R = jnp.argsort(group_R, stable=True)
    place_R = jnp.zeros_like(order_R).at[order_R].set(jnp.arange(R))
    in_group_R = place_R - (jnp.cumsum(sizes_E) - sizes_E)[group_R]
    slot_R = first_slot_E[group_R] + in_group_R
    row_S = jnp.full(N * M, R).at[slot_R].set(jnp.arange(R))
    group_N = jnp.searchsorted(end_E, jnp.arange(N), side="right")
    return slot_R, row_S, jnp.minimum(group_N, groups - 1)


@jax.custom_vjp
def grouped_matmul(x_NMD: jax.Array, weight_EDF: jax.Array, group_N: jax.Array) -> jax.Array:
    """y[n] = x[n] weight[group[n]]: [N, M, F], summed in float32, in the dtype of x.

    The gradient of the weights is summed in float32 over the blocks: a loop differentiated as it is
    would add a whole [E, D, F] for each.
    """
    return _by_block("MD,DF->MF", x_NMD, weight_EDF, group_N)


def _by_block(contraction: str, x_NMD, weight_EDF, group_N):
    def product(x_MD, group):
        weight_DF = jax.lax.dynamic_index_in_dim(weight_EDF, group, keepdims=False)
        y = jnp.einsum(contraction, x_MD, weight_DF, preferred_element_type=jnp.float32)
        return y.astype(x_MD.dtype)

    return jax.lax.map(lambda block: product(*block), (x_NMD, group_N))


def _forward(x_NMD, weight_EDF, group_N):
    return grouped_matmul(x_NMD, weight_EDF, group_N), (x_NMD, weight_EDF, group_N)


def _backward(residuals, gradient_NMF):
    x_NMD, weight_EDF, group_N = residuals

    def add(total_EDF, block):
        x_MD, gradient_MF, group = block
        part_DF = jnp.einsum("MD,MF->DF", x_MD, gradient_MF, preferred_element_type=jnp.float32)
        return total_EDF.at[group].add(part_DF), None

    zero_EDF = jnp.zeros(weight_EDF.shape, jnp.float32)
    total_EDF, _ = jax.lax.scan(add, zero_EDF, (x_NMD, gradient_NMF, group_N))
    by_x = _by_block("MF,DF->MD", gradient_NMF, weight_EDF, group_N)
    return by_x, total_EDF.astype(weight_EDF.dtype), None


grouped_matmul.defvjp(_forward, _backward)
