"""Matrix products of 8-bit floats, which Hopper and later multiply at twice the rate of bfloat16.

    y = (x / s_x)(W / s_W) s_x s_W        x and W rounded to e4m3, the sum in float32
    dx = (g / s_g)(W / s_W)^T s_g s_W     g rounded to e5m2, whose range is wider
    dW = (x / s_x)^T (g / s_g) s_x s_g

Each s brings the largest number of its array to the largest of the format, as it is now: nothing
is remembered from earlier steps, so that a step stays a function of its state and its batch.

What it is not: a format of weights. They stay float32 outside and are rounded at each use.

Source: Micikevicius et al. 2022, "FP8 Formats for Deep Learning".
"""

from typing import Any

import jax
import jax.numpy as jnp

FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2


@jax.custom_vjp
def float8_product(x: jax.Array, weight_DF: jax.Array) -> jax.Array:
    """x W for x [..., D]: [..., F] in x's dtype, which is the weight's too."""
    return _forward(x, weight_DF)[0]


def _forward(x, weight_DF) -> tuple[jax.Array, Any]:
    x8, weight8 = _rounded(x, FORWARD), _rounded(weight_DF, FORWARD)
    y = _product(x8, weight8, (x.ndim - 1,), (0,))
    return y.astype(x.dtype), (x8, weight8)


def _backward(kept, d_y) -> tuple[jax.Array, jax.Array]:
    x8, weight8 = kept
    d_y8 = _rounded(d_y, BACKWARD)
    rows = tuple(range(d_y.ndim - 1))
    d_x = _product(d_y8, weight8, (d_y.ndim - 1,), (1,))
    d_weight_DF = _product(x8, d_y8, rows, rows)
    return d_x.astype(d_y.dtype), d_weight_DF.astype(d_y.dtype)


def _rounded(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """x / s in 8 bits, and s, a float32 scalar; s = 1 where all is (nearly) zero."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x))
    scale = largest / float(jnp.finfo(dtype).max)
    scale = jnp.where(scale > 0.0, scale, 1.0)
    return (x / scale).astype(dtype), scale


def _product(a, b, a_axes: tuple[int, ...], b_axes: tuple[int, ...]) -> jax.Array:
    """The scaled arrays contracted over these axes, in float32."""
    (a8, a_scale), (b8, b_scale) = a, b
    dimensions = ((a_axes, b_axes), ((), ()))
    product = jax.lax.dot_general(a8, b8, dimensions, preferred_element_type=jnp.float32)
    return product * (a_scale * b_scale)


float8_product.defvjp(_forward, _backward)
