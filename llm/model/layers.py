"""What the parts of a block are made of: weights, linear layers, the MLP's non-linearity.

What it is not: a part of its own; gpt.py and experts.py put these together.

    B batch  T position  D model width  F feed-forward width  L layers
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llm.config import ModelConfig
from llm.model.float8 import float8_product
from llm.model.sharding import is_divided

# The fewest rows that an NVIDIA GPU's matrix units multiply at once.
LEAST_ROWS = 8


def drawn(axes: tuple[str, ...], shape: tuple[int, ...], std: float) -> nnx.Param:
    """A float32 weight that `gpt.initialise` draws from N(0, std^2); zero until then."""
    return nnx.Param(jnp.zeros(shape), axes=axes, std=std)


def matmul(x_BTD: jax.Array, weight_DF: jax.Array, *, float8: bool = False) -> jax.Array:
    """x W as one product of two matrices, in their dtype or rounded to 8 bits (float8.py).

    Flattened, because XLA's CPU backend runs the weight's gradient, a contraction over both B and
    T, three times slower than over B T (jax 0.12, 2-core EPYC). Not where the mesh divides T: B and
    T could then not be joined without gathering x.
    """
    product = float8_product if float8 else jnp.matmul
    if is_divided("sequence"):
        return product(x_BTD, weight_DF)
    B, T, D = x_BTD.shape
    if B * T < LEAST_ROWS and not float8:
        product = functools.partial(few_rows_product, dtype=x_BTD.dtype)
    return product(x_BTD.reshape(B * T, D), weight_DF).reshape(B, T, -1)


def few_rows_product(x_RD: jax.Array, weight_DF: jax.Array, dtype: Any) -> jax.Array:
    """x W for fewer than LEAST_ROWS rows, as decoding has them, in `dtype`.

    XLA's GPU backend takes a product of a single row apart: it writes the weight times the row,
    then sums that. Of several rows it makes a matrix product, which reads the weight once.
    """
    filled_up = functools.partial(filled_up_product, dtype=dtype)
    product = functools.partial(jnp.matmul, preferred_element_type=dtype)
    return jax.lax.platform_dependent(x_RD, weight_DF, cuda=filled_up, default=product)


def filled_up_product(x_RD: jax.Array, weight_DF: jax.Array, dtype: Any) -> jax.Array:
    """x W, computed with LEAST_ROWS rows."""
    rows = len(x_RD)
    x_RD = jnp.pad(x_RD, ((0, LEAST_ROWS - rows), (0, 0)))
    y_RF = jnp.matmul(x_RD, weight_DF, preferred_element_type=dtype)
    # Behind a barrier: what is added to it would be filled up too, by a kernel of its own.
    return jax.lax.optimization_barrier(y_RF)[:rows]


def spread(weight: jax.Array, like: jax.Array) -> jax.Array:
    """A float32 bias or gain beside every row of an array: of its shape and in its dtype.

    Rounded after it is spread, so that its gradient, a sum over all rows, adds up float32 numbers:
    in bfloat16 256 + 1 is 256.
    """
    return jnp.broadcast_to(weight, like.shape).astype(like.dtype)


class Linear(nnx.Module):
    """y = x W + b, with W stored [in, out]."""

    def __init__(
        self,
        axes: tuple[str, str],
        shape: tuple[int, int],
        *,
        std: float,
        bias: bool,
        dtype: str,
        float8: bool = False,
    ):
        self.dtype, self.float8 = dtype, float8
        self.weight = drawn(axes, shape, std)
        self.bias = nnx.Param(jnp.zeros(shape[1:]), axes=axes[1:]) if bias else None

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        y = matmul(x_BTD, self.weight[...].astype(self.dtype), float8=self.float8)
        return y if self.bias is None else y + spread(self.bias[...], y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def activate(kind: str, up: jax.Array, gate: jax.Array | None) -> jax.Array:
    """f(up) as model.activation says; silu(gate) * up for swiglu, the one that has a gate.

    Its gradient computes it again from what products gave, which is kept anyway: the inner values
    would be written and read once more, each as wide as the hidden layer.
    """
    return _activated(kind, up, gate)


def _activated(kind: str, up: jax.Array, gate: jax.Array | None) -> jax.Array:
    match kind:
        case "gelu":
            return jax.nn.gelu(up, approximate=False)
        case "gelu_tanh":
            return jax.nn.gelu(up, approximate=True)
        case "relu_squared":
            return jnp.square(jax.nn.relu(up))
    assert kind == "swiglu" and gate is not None, kind
    return jax.nn.silu(gate) * up


def _activate_forward(kind, up, gate):
    return _activated(kind, up, gate), (up, gate)


def _activate_backward(kind, kept, d_out):
    # Behind a barrier: the compiler would find that it has the same values, and keep them.
    kept = jax.lax.optimization_barrier(kept)
    _, pullback = jax.vjp(functools.partial(_activated, kind), *kept)
    return pullback(d_out)


activate.defvjp(_activate_forward, _activate_backward)


def residual_std(config: ModelConfig) -> float:
    """Of the matrices that write into the residual stream: GPT-2's init_std / sqrt(2 L), or zero.

    The stream sums 2 L branches; the root keeps its variance the same at any depth.
    """
    return 0.0 if config.zero_init_projections else config.init_std * (2 * config.n_layer) ** -0.5
