"""The pieces that blocks are made of: weights, linear layers, the MLP.

gpt.py and experts.py put the pieces together.

    B batch  T position  D model width  F feed-forward width  L layers
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llm.model.products import contract, is_rounded
from llm.model.sharding import constrain, is_divided
from llm.model_config import ModelConfig

Axes = tuple[str, ...]  # the logical axis of each dimension (sharding.py)
Shape = tuple[int, ...]

# Two thresholds for few rows, as decoding has them.
# An NVIDIA GPU's matrix units multiply at least this many rows at once.
LEAST_ROWS = 8
# Below this many rows, joining matrices takes about as long as multiplying by them.
JOINED_ROWS = 64


def normal_weight(axes: Axes, shape: Shape, std: float) -> nnx.Param:
    """A float32 weight that `gpt.initialise` draws from N(0, std^2); zero until then."""
    return nnx.Param(jnp.zeros(shape), axes=axes, std=std)


def matmul(x_BTD: jax.Array, weight_DF: jax.Array) -> jax.Array:
    """x W as one product of two matrices, in their dtype: [B, T, F].

    B and T are flattened, because XLA's CPU backend computes the weight's gradient, a contraction
    over both, three times slower than over B T. If the mesh divides T they stay apart: joining them
    would gather x.
    """
    if is_rounded() or is_divided("sequence"):
        return contract("BTD,DF->BTF", x_BTD, weight_DF, x_BTD.dtype)
    B, T, D = x_BTD.shape
    x_RD = x_BTD.reshape(B * T, D)
    return rows_product(x_RD, weight_DF, x_BTD.dtype).reshape(B, T, -1)


def rows_product(
    x_RD: jax.Array, weight_DF: jax.Array, preferred_element_type: jax.typing.DTypeLike
) -> jax.Array:
    """x W in the given dtype.

    XLA's GPU backend takes the product of a single row apart: it writes the weight times the row,
    then sums that. For several rows it uses a matrix product, which reads the weight once. So fewer
    rows than LEAST_ROWS, as decoding has them, are filled up.
    """
    product = functools.partial(jnp.matmul, preferred_element_type=preferred_element_type)
    if len(x_RD) >= LEAST_ROWS:
        return product(x_RD, weight_DF)
    filled_up = functools.partial(filled_up_product, product)
    return jax.lax.platform_dependent(x_RD, weight_DF, cuda=filled_up, default=product)


def filled_up_product(product: Any, x_RD: jax.Array, weight_DF: jax.Array) -> jax.Array:
    """x W, computed by `product` with LEAST_ROWS rows."""
    y_RF = product(jnp.pad(x_RD, ((0, LEAST_ROWS - len(x_RD)), (0, 0))), weight_DF)
    # Behind a barrier: the compiler would also pad what is added to y, in a kernel of its own.
    return jax.lax.optimization_barrier(y_RF)[: len(x_RD)]


def spread(weight: jax.Array, like: jax.Array) -> jax.Array:
    """A float32 bias, broadcast to an array's shape and cast to the array's dtype.

    The cast comes last, so that the bias's gradient, a sum over all rows, adds up float32 numbers:
    in bfloat16 256 + 1 is 256.
    """
    return jnp.broadcast_to(weight, like.shape).astype(like.dtype)


class Linear(nnx.Module):
    """y = x W + b, with W stored [in, out].

    W [E, in, out] and b [E, out] of experts are for grouped.py to multiply by.
    """

    def __init__(
        self, axes: Axes, shape: Shape, *, std: float, bias: bool, dtype: str, experts: int = 0
    ):
        self.dtype = dtype
        if experts:
            axes, shape = ("expert", *axes), (experts, *shape)
        self.weight = normal_weight(axes, shape, std)
        zeros = jnp.zeros(shape[:-2] + shape[-1:])
        self.bias = nnx.Param(zeros, axes=axes[:-2] + axes[-1:]) if bias else None

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        y = matmul(x_BTD, self.weight[...].astype(self.dtype))
        return y if self.bias is None else y + spread(self.bias[...], y)


def apply_side_by_side(
    linears: list[Linear], x_BTD: jax.Array, *, apart: bool = False
) -> list[jax.Array]:
    """[linear(x) for each], as one matrix product: one wide one is faster than several narrow ones.

    They stay apart if asked to, for fewer rows than JOINED_ROWS, and if the mesh divides the
    columns, since a joint matrix would mix the devices' shares.
    """
    if apart or is_divided("heads") or math.prod(x_BTD.shape[:2]) < JOINED_ROWS:
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
    """f(up) as model.activation says; f(gate) * up for swiglu and geglu, which alone have a gate.

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
        case "relu":
            return jax.nn.relu(up)
        case "relu_squared":
            return jnp.square(jax.nn.relu(up))
    assert gate is not None, kind
    if kind == "geglu":
        return jax.nn.gelu(gate, approximate=True) * up
    return jax.nn.silu(gate) * up


def _activate_forward(kind, up, gate):
    return _activated(kind, up, gate), (up, gate)


def _activate_backward(kind, kept, d_out):
    # Behind a barrier: the compiler would notice that it has these values already, and keep them.
    kept = jax.lax.optimization_barrier(kept)
    _, pullback = jax.vjp(functools.partial(_activated, kind), *kept)
    return pullback(d_out)


activate.defvjp(_activate_forward, _activate_backward)


class MLP(nnx.Module):
    """Position by position: W_down f(W_up x), or W_down (f(W_gate x) * W_up x) if gated."""

    def __init__(self, config: ModelConfig, dtype: str, experts: int = 0):
        self.activation = config.activation
        linear = functools.partial(
            Linear, bias=config.bias, dtype=dtype, std=config.init_std, experts=experts
        )
        D, F = config.d_model, config.d_ff
        self.up = linear(("embed", "mlp"), (D, F))
        self.gate = linear(("embed", "mlp"), (D, F)) if config.is_gated else None
        self.down = linear(("mlp_in", "width"), (F, D), std=residual_std(config))

    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, Any]:
        """[B, T, D], and None: Experts returns in its place how the experts were used."""
        up_BTF = constrain(self.up(x_BTD), "batch", "sequence", "mlp")
        gate_BTF = None if self.gate is None else self.gate(x_BTD)
        return self.down(activate(self.activation, up_BTF, gate_BTF)), None


def residual_std(config: ModelConfig) -> float:
    """The std of matrices that write into the residual stream: GPT-2's init_std / sqrt(2 L), or 0.

    The stream sums 2 L branches; the root keeps its variance the same at any depth.
    """
    return 0.0 if config.zero_init_projections else config.init_std * (2 * config.n_layer) ** -0.5
