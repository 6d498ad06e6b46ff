"""Mixture of experts: in the MLP's place E of them, and a router that chooses K for each token.

    y = sum_{e in chosen(x)} g_e(x) MLP_e(x)

There are two ways to compute it, one function as long as nothing is dropped:

    dropless   Rows are sorted by expert and multiplied group by group (grouped.py). A device keeps
               its tokens and gathers the experts, as fsdp gathers weights.
    capacity   Each expert has C slots for each sequence. A choice that finds none is dropped: the
               token has then what the residual stream carries past the block. Products have one
               size, and tokens travel to the devices of their experts and back (all-to-all).

Slots belong to a sequence and go to earlier positions first, so that with a capacity too no mesh
and no micro-batch changes which choices are dropped, and no position depends on later ones.

Sources: Lepikhin et al. 2020, "GShard" (capacity, expert parallelism); Fedus et al. 2021, "Switch
Transformers" (capacity factor); Gale et al. 2022, "MegaBlocks" (dropless). The router's own
sources are in router.py.

    B batch  T position  D model width  F feed-forward width  E experts  K experts of a token
    A = T K choices of a sequence, by position and then by rank  C slots of an expert  S = E C
"""

import functools
import math
from collections.abc import Callable, Mapping
from fractions import Fraction

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llm.config import ModelConfig
from llm.model.grouped import grouped_matmul, lay_out
from llm.model.layers import activate, drawn, residual_std, spread
from llm.model.remat import PRODUCT
from llm.model.router import Router, Routes, Routing
from llm.model.sharding import constrain, partition_of, shares

# "up.weight" [E, D, F], ... in the compute dtype; "up.bias" [E, F], ... in float32
Weights = Mapping[str, jax.Array]

_AXES = {
    "up.weight": ("expert", "embed", "mlp"),
    "up.bias": ("expert", "mlp"),
    "gate.weight": ("expert", "embed", "mlp"),
    "gate.bias": ("expert", "mlp"),
    "down.weight": ("expert", "mlp_in", "width"),
    "down.bias": ("expert", "width"),
}


class ExpertLinear(nnx.Module):
    """W [E, in, out] and b [E, out]: as many linear layers as there are experts."""

    def __init__(self, name: str, shape: tuple[int, int, int], *, std: float, bias: bool):
        self.weight = drawn(_AXES[f"{name}.weight"], shape, std)
        self.bias = (
            nnx.Param(jnp.zeros((shape[0], shape[2])), axes=_AXES[f"{name}.bias"]) if bias else None
        )


class Experts(nnx.Module):
    """Stands where an MLP does; its weights have the MLP's names, with one dimension more."""

    def __init__(self, config: ModelConfig, dtype: str):
        self.config, self.dtype = config, dtype
        E, D, F = config.n_expert, config.d_model, config.d_ff
        self.router = Router(config)
        self.up = ExpertLinear("up", (E, D, F), std=config.init_std, bias=config.bias)
        if config.activation == "swiglu":
            self.gate = ExpertLinear("gate", (E, D, F), std=config.init_std, bias=config.bias)
        self.down = ExpertLinear("down", (E, F, D), std=residual_std(config), bias=config.bias)

    def __call__(self, x_BTD: jax.Array, capacity_factor: float = 0.0) -> tuple[jax.Array, Routing]:
        """What each token gets, and how the experts were used.

        Args:
          capacity_factor: slots of an expert, as a multiple of its even share of a sequence's
            choices; 0: dropless, where what a token gets depends on that token alone.
        """
        routes = self.router(x_BTD)
        if capacity_factor:
            y_BTD, dropped = with_capacity(
                self.config, self._weights(), x_BTD, routes, capacity_factor
            )
        else:
            y_BTD = dropless(self.config, self._weights(), x_BTD, routes)
            dropped = jnp.zeros(())
        return constrain(y_BTD, "batch", "sequence", "width"), Routing.of(routes, dropped)

    def _weights(self) -> Weights:
        state = nnx.to_flat_state(nnx.state(self))
        named = {".".join(map(str, path)): weight[...] for path, weight in state}
        return {
            name: named[name].astype(self.dtype) if name.endswith("weight") else named[name]
            for name in _AXES
            if name in named
        }


def mlp(
    config: ModelConfig, product: Callable[[jax.Array, str], jax.Array], x: jax.Array
) -> jax.Array:
    """W_down f(W_up x) of each row with its own expert's weights.

    Args:
      product: (rows, "up", "gate" or "down") -> rows times that weight, and its bias.
    """
    up = product(x, "up")
    gate = product(x, "gate") if config.activation == "swiglu" else None
    return product(activate(config.activation, up, gate), "down")


def dropless(config: ModelConfig, weights: Weights, x_BTD: jax.Array, routes: Routes) -> jax.Array:
    """[B, T, D]: every choice is computed.

    By each device for its own tokens, since a token's result depends on no other.
    """
    compute = functools.partial(_grouped, config)
    arguments = (x_BTD, routes.chosen_BTK, routes.gates_BTK)
    if math.prod(shares(axis) for axis in ("batch", "sequence", "expert", "embed", "mlp")) == 1:
        return compute(weights, *arguments)
    columns = partition_of(["mlp"])[0]
    parts = shares("mlp")

    def on_one_device(weights, *arguments):
        weights = {name: _gather(weight, name, columns) for name, weight in weights.items()}
        if "down.bias" in weights:  # each device of the tensor axis adds its part of the sum
            weights["down.bias"] = weights["down.bias"] / parts
        return jax.lax.psum(compute(weights, *arguments), columns)

    tokens = partition_of(["batch", "sequence", None])
    return jax.shard_map(
        on_one_device,
        in_specs=({name: partition_of(_AXES[name]) for name in weights}, tokens, tokens, tokens),
        out_specs=tokens,
        check_vma=False,
    )(weights, *arguments)


def _gather(weight: jax.Array, name: str, columns: str) -> jax.Array:
    """All experts and rows of a weight, of which each device has a share; the columns stay shared.

    Its gradient is a reduce-scatter.
    """
    for dimension, axes in enumerate(partition_of(_AXES[name])):
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            if axis != columns:
                weight = jax.lax.all_gather(weight, axis, axis=dimension, tiled=True)
    return weight


def _grouped(
    config: ModelConfig,
    weights: Weights,
    x_BTD: jax.Array,
    chosen_BTK: jax.Array,
    gates_BTK: jax.Array,
) -> jax.Array:
    """`dropless` of one device: all rows of one expert side by side, then each back to its place.

    A here counts the choices of all B sequences. N blocks of M rows, S = N M (grouped.py)
    """
    B, T, D = x_BTD.shape
    K = chosen_BTK.shape[-1]
    slot_A, choice_S, expert_N = lay_out(chosen_BTK.reshape(-1), config.n_expert)

    def product(x_NMD, name):
        y = grouped_matmul(x_NMD, weights[f"{name}.weight"], expert_N)
        if f"{name}.bias" in weights:
            y = y + spread(weights[f"{name}.bias"][expert_N][:, None, :], y)
        return checkpoint_name(y, PRODUCT)

    rows_1AD = jnp.repeat(x_BTD.reshape(1, B * T, D), K, axis=1)
    rows_1SD = exchange(rows_1AD, choice_S[None], slot_A[None])
    y_NMD = mlp(config, product, rows_1SD.reshape(len(expert_N), -1, D))
    y_1AD = exchange(y_NMD.reshape(1, -1, D), slot_A[None], choice_S[None])
    return mix(y_1AD.reshape(B, T, K, D), gates_BTK)


def with_capacity(
    config: ModelConfig, weights: Weights, x_BTD: jax.Array, routes: Routes, factor: float
) -> tuple[jax.Array, jax.Array]:
    """[B, T, D] of the choices that found a slot, and the share of those that found none.

    A gate stays what it is when another choice of its token is dropped.
    """
    B, T, D = x_BTD.shape
    E, K = config.n_expert, config.n_expert_active
    C = slots(T, E, K, factor)
    slot_BA, choice_BS = assign(routes.chosen_BTK, E, C)

    def product(x_BECD, name):
        y = jnp.einsum("BECD,EDF->BECF", x_BECD, weights[f"{name}.weight"])
        if f"{name}.bias" in weights:
            y = y + spread(weights[f"{name}.bias"][None, :, None, :], y)
        width = "width" if name == "down" else "mlp"
        y = constrain(y, "batch_of_experts", "expert", None, width)
        return checkpoint_name(y, PRODUCT)

    rows_BSD = exchange(jnp.repeat(x_BTD, K, axis=1), choice_BS, slot_BA)
    rows_BECD = constrain(rows_BSD.reshape(B, E, C, D), "batch", None, None, "width")
    rows_BECD = constrain(rows_BECD, "batch_of_experts", "expert", None, "width")
    y_BECD = constrain(mlp(config, product, rows_BECD), "batch", None, None, "width")
    y_BAD = exchange(y_BECD.reshape(B, E * C, D), slot_BA, choice_BS)
    dropped = jnp.mean((slot_BA == E * C).astype(jnp.float32))
    return mix(y_BAD.reshape(B, T, K, D), routes.gates_BTK), dropped


def slots(length: int, experts: int, active: int, factor: float) -> int:
    """C: factor times the even share T K / E, rounded up; T is as many as can be used.

    The factor as it is written: 1.1 * 100 is a little over 110 in binary floats.
    """
    share = Fraction(length * active, experts)
    return min(length, math.ceil(Fraction(str(factor)) * share))


def assign(chosen_BTK: jax.Array, experts: int, capacity: int) -> tuple[jax.Array, jax.Array]:
    """(slot_BA, choice_BS): which slot of S = E C each choice has, and which choice each slot.

    Each is the other's inverse. S stands for a dropped choice, A for an empty slot.
    """
    B = chosen_BTK.shape[0]
    expert_BA = chosen_BTK.reshape(B, -1)
    A, S = expert_BA.shape[1], experts * capacity
    is_of_BAE = jax.nn.one_hot(expert_BA, experts, dtype=jnp.int32)
    before_BA = jnp.sum((jnp.cumsum(is_of_BAE, axis=1) - is_of_BAE) * is_of_BAE, axis=-1)
    slot_BA = jnp.where(before_BA < capacity, expert_BA * capacity + before_BA, S)
    choices_A, empty_S = jnp.arange(A), jnp.full(S, A)
    choice_BS = jax.vmap(lambda slot_A: empty_S.at[slot_A].set(choices_A, mode="drop"))(slot_BA)
    return slot_BA, choice_BS


@jax.custom_vjp
def exchange(x_BRD: jax.Array, source_BI: jax.Array, back_BR: jax.Array) -> jax.Array:
    """y[b, i] = x[b, source[b, i]]; zero where source is R, which is none of the rows.

    Args:
      back_BR: the inverse of source, I where no i has row r. With it the gradient is an exchange
        too, where that of a plain gather would add up rows one by one.
    """
    return jax.vmap(lambda x, source: x.at[source].get(mode="fill", fill_value=0))(x_BRD, source_BI)


def _exchange_forward(x_BRD, source_BI, back_BR):
    return exchange(x_BRD, source_BI, back_BR), (source_BI, back_BR)


def _exchange_backward(residuals, gradient_BID):
    source_BI, back_BR = residuals
    return exchange(gradient_BID, back_BR, source_BI), None, None


exchange.defvjp(_exchange_forward, _exchange_backward)


def mix(y_BTKD: jax.Array, gates_BTK: jax.Array) -> jax.Array:
    """sum_k g_k y_k, in float32; [B, T, D] in the dtype of y."""
    return jnp.sum(y_BTKD * gates_BTK[..., None], axis=2).astype(y_BTKD.dtype)
