"""The pieces that blocks are made of: weights, linear layers, the MLP's non-linearity.

gpt.py and experts.py put them together.

    B batch  T position  D model width  F feed-forward width  L layers
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llm.config import ModelConfig
from llm.model.sharding import is_divided

# Two thresholds for few rows, as decoding has them.
# An NVIDIA GPU's matrix units multiply at least this many rows at once.
LEAST_ROWS = 8
# Below this many rows, joining matrices takes about as long as multiplying by them.
JOINED_ROWS = 64


def drawn(axes: tuple[str, ...], shape: tuple[int, ...], std: float) -> nnx.Param:
    """A float32 weight that `gpt.initialise` draws from N(0, std^2); zero until then."""
    return nnx.Param(jnp.zeros(shape), axes=axes, std=std)


def matmul(x_BTD: jax.Array, weight_DF: jax.Array) -> jax.Array:
    """x W as one product of two matrices, in their dtype: [B, T, F].

    B and T are flattened, because XLA's CPU backend computes the weight's gradient, a contraction
    over both, three times slower than over B T. If the mesh divides T they stay apart: joining them
    would gather x.
    """
    if is_divided("sequence"):
        return jnp.matmul(x_BTD, weight_DF)
    B, T, D = x_BTD.shape
    x_RD = x_BTD.reshape(B * T, D)
    if B * T < LEAST_ROWS:
        return few_rows_product(x_RD, weight_DF, x_BTD.dtype).reshape(B, T, -1)
    return jnp.matmul(x_RD, weight_DF).reshape(B, T, -1)


def few_rows_product(x_RD: jax.Array, weight_DF: jax.Array, dtype: Any) -> jax.Array:
    """x W in `dtype`, for fewer than LEAST_ROWS rows, as decoding has them.

    XLA's GPU backend takes the product of a single row apart: it writes the weight times the row,
    then sums that. For several rows it uses a matrix product, which reads the weight once.
    """
    filled_up = functools.partial(filled_up_product, dtype=dtype)
    product = functools.partial(jnp.matmul, preferred_element_type=dtype)
    return jax.lax.platform_dependent(x_RD, weight_DF, cuda=filled_up, default=product)


def filled_up_product(x_RD: jax.Array, weight_DF: jax.Array, dtype: Any) -> jax.Array:
    """x W, computed with LEAST_ROWS rows."""
    rows = len(x_RD)
    x_RD = jnp.pad(x_RD, ((0, LEAST_ROWS - rows), (0, 0)))
    y_RF = jnp.matmul(x_RD, weight_DF, preferred_element_type=dtype)
    # Behind a barrier: the compiler would also pad what is added to y, in a kernel of its own.
    return jax.lax.optimization_barrier(y_RF)[:rows]


def spread(weight: jax.Array, like: jax.Array) -> jax.Array:
    """A float32 bias, broadcast to an array's shape and cast to the array's dtype.

    The cast comes last, so that the bias's gradient, a sum over all rows, adds up float32 numbers:
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
    ):
        self.dtype = dtype
        self.weight = drawn(axes, shape, std)
        self.bias = nnx.Param(jnp.zeros(shape[1:]), axes=axes[1:]) if bias else None

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        y = matmul(x_BTD, self.weight[...].astype(self.dtype))
        return y if self.bias is None else y + spread(self.bias[...], y)


def apply_side_by_side(linears: list[Linear], x_BTD: jax.Array) -> list[jax.Array]:
    """[linear(x) for each], as one matrix product: one wide one is faster than several narrow ones.

    They stay apart if the mesh divides the columns, since a joint matrix would mix the devices'
    shares, and for fewer rows than JOINED_ROWS.
    """
    if is_divided("heads") or math.prod(x_BTD.shape[:2]) < JOINED_ROWS:
        return [linear(x_BTD) for linear in linears]
    dtype = linears[0].dtype
    joint = jnp.concatenate([linear.weight[...] for linear in linears], axis=1).astype(dtype)
    y_BTF = matmul(x_BTD, joint)
    biases = [linear.bias[...] for linear in linears if linear.bias is not None]
    if biases:
        y_BTF = y_BTF + spread(jnp.concatenate(biases), y_BTF)
    ends = list(itertools.accumulate(linear.weight.shape[1] for linear in linears))
    return jnp.split(y_BTF, ends[:-1], axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def activate(kind: str, up: jax.Array, gate: jax.Array | None) -> jax.Array:
    """f(up) as model.activation says; silu(gate) * up for swiglu, which alone has a gate.

    The gradient computes the inner values again from `up` and `gate`, which are kept anyway. To
    keep the inner values would write and read arrays as wide as the hidden layer once more.
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
    # Behind a barrier: the compiler would notice that it has these values already, and keep them.
    kept = jax.lax.optimization_barrier(kept)
    _, pullback = jax.vjp(functools.partial(_activated, kind), *kept)
    return pullback(d_out)


activate.defvjp(_activate_forward, _activate_backward)


def residual_std(config: ModelConfig) -> float:
    """The std of matrices that write into the residual stream: GPT-2's init_std / sqrt(2 L), or 0.

    The stream sums 2 L branches; the root keeps its variance the same at any depth.
    """
    return 0.0 if config.zero_init_projections else config.init_std * (2 * config.n_layer) ** -0.5
