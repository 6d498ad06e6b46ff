"""Rows times the matrix of their group, for groups of any sizes: y_r = x_r W_{group(r)}.

Rows are laid out in blocks of m, each of one group and filled up with zeros, and a loop takes one
block after the other. The work grows with the number of rows, however they are spread over the
groups. `jax.lax.ragged_dot`, which was made for this, multiplies every row by every group on CPUs
and TPUs, and reads all matrices even for a few rows.

Source: Gale et al. 2022, "MegaBlocks" (blocks of one expert each).

    R rows  E groups  n blocks  m rows of a block  s = n m  D width in  F width out
"""

import jax
import jax.numpy as jnp

from llm.model.products import contract

# With this many rows a block's product takes longer than reading its matrix: peak FLOP/s over
# bytes per second is a few hundred rows in bfloat16 on data sheets (240 for a TPU v5e).
LARGEST_BLOCK = 512


def block_rows(rows: int, groups: int) -> int:
    """m: a power of two, at most half an average group, so that few rows are zeros."""
    return min(LARGEST_BLOCK, 1 << max(0, (rows // (2 * groups)).bit_length() - 1))


def block_count(rows: int, groups: int) -> int:
    """n: enough blocks for any spread of the rows over the groups."""
    m = block_rows(rows, groups)
    return (rows + min(groups, rows) * (m - 1)) // m


def lay_out(group_R: jax.Array, groups: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where rows lie in blocks: (slot_R, row_s, group_n).

    slot_R and row_s are each other's inverse; row R stands for an empty slot. n is the most that
    any spread needs, so the last blocks may be empty.
    """
    (R,) = group_R.shape
    m, n = block_rows(R, groups), block_count(R, groups)
    sizes_E = jnp.bincount(group_R, length=groups)
    blocks_E = -(-sizes_E // m)
    end_E = jnp.cumsum(blocks_E)
    first_slot_E = m * (end_E - blocks_E)
    order_R = jnp.argsort(group_R, stable=True)
    place_R = jnp.zeros_like(order_R).at[order_R].set(jnp.arange(R))
    in_group_R = place_R - (jnp.cumsum(sizes_E) - sizes_E)[group_R]
    slot_R = first_slot_E[group_R] + in_group_R
    row_s = jnp.full(n * m, R).at[slot_R].set(jnp.arange(R))
    group_n = jnp.searchsorted(end_E, jnp.arange(n), side="right")
    return slot_R, row_s, jnp.minimum(group_n, groups - 1)


@jax.custom_vjp
def grouped_matmul(x_nmD: jax.Array, weight_EDF: jax.Array, group_n: jax.Array) -> jax.Array:
    """y[n] = x[n] weight[group[n]]: [n, m, F], summed in float32, in the dtype of x.

    The weights' gradient has its own rule, summed in float32 over the blocks: JAX's gradient of the
    loop would add a whole [E, D, F] for each block.
    """
    return _by_block("mD,DF->mF", x_nmD, weight_EDF, group_n)


def _by_block(
    contraction: str, x_nmD: jax.Array, weight_EDF: jax.Array, group_n: jax.Array
) -> jax.Array:
    def product(x_mD: jax.Array, group: jax.Array) -> jax.Array:
        weight_DF = jax.lax.dynamic_index_in_dim(weight_EDF, group, keepdims=False)
        return contract(contraction, x_mD, weight_DF).astype(x_mD.dtype)

    return jax.lax.map(lambda block: product(*block), (x_nmD, group_n))


def _forward(x_nmD, weight_EDF, group_n):
    return grouped_matmul(x_nmD, weight_EDF, group_n), (x_nmD, weight_EDF, group_n)


def _backward(residuals, gradient_nmF):
    x_nmD, weight_EDF, group_n = residuals

    def add(total_EDF, block):
        x_mD, gradient_mF, group = block
        part_DF = contract("mD,mF->DF", x_mD, gradient_mF)
        return total_EDF.at[group].add(part_DF), None

    zero_EDF = jnp.zeros(weight_EDF.shape, jnp.float32)
    total_EDF, _ = jax.lax.scan(add, zero_EDF, (x_nmD, gradient_nmF, group_n))
    by_x = _by_block("mF,DF->mD", gradient_nmF, weight_EDF, group_n)
    return by_x, total_EDF.astype(weight_EDF.dtype), None


grouped_matmul.defvjp(_forward, _backward)
