"""Products of matrices in bfloat16 where all else is float32: how CPUs with such units train.

Inside `rounded`, `contract` rounds its operands to bfloat16 and sums in float32, and so do both
products of its gradient. Weights, activations and gradients stay float32, because a CPU has no
elementwise arithmetic in bfloat16 and would convert twice for each operation. Outside `rounded`,
`contract` is jnp.einsum.

XLA's CPU backend uses the units (AVX512_BF16, AMX_BF16) for a product of row-major matrices, M K by
K N, that gives a row-major one in float32. Another order of an operand is half as fast, and another
order of the result is refused when it is computed. So matrices are laid out that way first.
"""

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from llm.runtime import has_bfloat16_units

# JAX's name for such products. XLA's CPU backend itself takes it for float32.
ROUNDED = "BF16_BF16_F32"


def rounded(on: bool) -> contextlib.AbstractContextManager:
    """Round the operands of `contract` in what is traced inside, its gradient included."""
    return jax.default_matmul_precision(ROUNDED) if on else contextlib.nullcontext()


def is_rounded() -> bool:
    """Whether what is traced now is inside `rounded`."""
    return jax.config.jax_default_matmul_precision == ROUNDED  # type: ignore[attr-defined]


def contract(
    letters: str, x: jax.Array, y: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
    """jnp.einsum(letters, x, y) with a result in the given dtype, float32 inside `rounded`."""
    if is_rounded():
        return rounded_einsum(letters, x, y)
    return jnp.einsum(letters, x, y, preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def rounded_einsum(letters: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """jnp.einsum of operands rounded to bfloat16, in float32.

    Each letter stands in two of the three arrays, or in all.
    """
    return product_of(letters, to_operand(x), to_operand(y))


def _forward(letters, x, y):
    kept = to_operand(x), to_operand(y)
    return product_of(letters, *kept), kept


def _backward(letters, kept, d_out):
    x, y = kept
    of_x, of_y, of_out = letters.replace("->", ",").split(",")
    d_out = to_operand(d_out)
    d_x = product_of(f"{of_out},{of_y}->{of_x}", d_out, y)
    return d_x, product_of(f"{of_x},{of_out}->{of_y}", x, d_out)


rounded_einsum.defvjp(_forward, _backward)


def to_operand(x: jax.Array) -> jax.Array:
    """x in bfloat16; rounded as such but in float32 where the units cannot be used.

    A mesh of several devices decides for itself how operands lie, since a layout asked for would
    gather them, and XLA has a product of two bfloat16 matrices in the units' order alone.
    """
    if has_bfloat16_units() and jax.sharding.get_abstract_mesh().size <= 1:
        return x.astype(jnp.bfloat16)
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def product_of(letters: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """jnp.einsum of arrays from `to_operand`, in float32.

    It is one product of row-major matrices for each index that all three arrays share.
    """
    if x.dtype == jnp.float32:
        return jnp.einsum(letters, x, y)
    of_x, of_y, of_out = letters.replace("->", ",").split(",")
    shared = [c for c in of_out if c in of_x and c in of_y]
    rows = [c for c in of_out if c not in of_y]
    columns = [c for c in of_out if c not in of_x]
    summed = [c for c in of_x if c not in of_out]
    x_MK = _matrices(x, of_x, shared, rows, summed)
    y_KN = _matrices(y, of_y, shared, summed, columns)
    out_MN = _row_major(jnp.matmul(x_MK, y_KN, preferred_element_type=jnp.float32))
    size = dict(zip(of_x + of_y, x.shape + y.shape, strict=True))
    order = shared + rows + columns
    out = out_MN.reshape([size[c] for c in order])
    return out.transpose([order.index(c) for c in of_out])


def _matrices(x: jax.Array, of_x: str, *groups: list[str]) -> jax.Array:
    """One dimension for each group of letters; the last two make a matrix."""
    order = [of_x.index(c) for group in groups for c in group]
    x = x.transpose(order)
    sizes = iter(x.shape)
    matrices = x.reshape([math.prod(next(sizes) for _ in group) for group in groups])
    return _row_major(matrices)


def _row_major(x: jax.Array) -> jax.Array:
    """x, laid out so; the compiler would otherwise leave transpositions to the products."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))
