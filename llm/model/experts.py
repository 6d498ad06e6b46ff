"""Mixture of experts: E MLPs in the place of one, and a router that chooses k for each token.

    y = sum_{e in chosen(x)} g_e(x) MLP_e(x)

Nothing is dropped: rows are sorted by expert and multiplied group by group (grouped.py). A device
keeps its tokens and gathers the experts, as fsdp gathers weights, so a token's result depends on
that token alone.

Sources: Shazeer et al. 2017, "Outrageously Large Neural Networks"; Gale et al. 2022, "MegaBlocks"
(dropless). The router's own sources are in router.py.

    B batch  T position  D model width  F feed-forward width  E experts  k experts of a token
    A = B T k choices, by sequence, position and rank  n blocks of m rows  s = n m slots in blocks
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from llm.model.grouped import grouped_matmul, lay_out
from llm.model.layers import MLP, activate, spread
from llm.model.remat import PRODUCT
from llm.model.router import Router, Routing
from llm.model.sharding import constrain, is_divided, partition_of, per_device, shares
from llm.model_config import ModelConfig

# "up.weight" [E, D, F], ... in the compute dtype; "up.bias" [E, F], ... in float32
Weights = Mapping[str, jax.Array]


class Experts(MLP):
    """An MLP with E sets of weights, and the router that chooses k of them for each token."""

    def __init__(self, config: ModelConfig, dtype: str):
        super().__init__(config, dtype, config.n_expert)
        self.config, self.dtype = config, dtype
        self.router = Router(config)

    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, Routing]:
        """[B, T, D], and how the experts were used; each device computes its own tokens."""
        chosen_BTk, gates_BTk, routing = self.router(x_BTD)
        flat = {".".join(map(str, path)): p for path, p in nnx.to_flat_state(nnx.state(self))}
        del flat["router.weight"]
        specs = {name: partition_of(p.get_metadata("axes")) for name, p in flat.items()}
        weights = {
            name: p[...].astype(self.dtype) if name.endswith("weight") else p[...]
            for name, p in flat.items()
        }
        arguments = (weights, x_BTD, chosen_BTk, gates_BTk)
        columns, parts = partition_of(["mlp"])[0], shares("mlp")

        def on_one_device(weights: Weights, *arguments: jax.Array) -> jax.Array:
            weights = {name: _gather(part, specs[name], columns) for name, part in weights.items()}
            if "down.bias" in weights:  # each device of the tensor axis adds its part of the sum
                weights["down.bias"] = weights["down.bias"] / parts
            return jax.lax.psum(mix_experts(self.config, weights, *arguments), columns)

        if any(map(is_divided, ("batch", "sequence", "expert", "embed", "mlp"))):
            tokens = partition_of(["batch", "sequence", None])
            in_specs = (specs, tokens, tokens, tokens)
            y_BTD = per_device(on_one_device, in_specs, tokens)(*arguments)
        else:
            y_BTD = mix_experts(self.config, *arguments)
        return constrain(y_BTD, "batch", "sequence", "width"), routing


def _gather(weight: jax.Array, spec: PartitionSpec, columns: str) -> jax.Array:
    """All experts and rows of a weight that is divided over devices; the columns stay divided.

    The gradient of the gathering is a reduce-scatter.
    """
    for dimension, axes in enumerate(spec):
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            if axis != columns:
                weight = jax.lax.all_gather(weight, axis, axis=dimension, tiled=True)
    return weight


def mix_experts(
    config: ModelConfig,
    weights: Weights,
    x_BTD: jax.Array,
    chosen_BTk: jax.Array,
    gates_BTk: jax.Array,
) -> jax.Array:
    """sum_k g_k W_down f(W_up x): [B, T, D], summed in float32, in the dtype of x.

    The rows of each expert are laid side by side, multiplied, and put back in their places.
    """
    B, T, D = x_BTD.shape
    k = chosen_BTk.shape[-1]
    slot_A, choice_s, expert_n = lay_out(chosen_BTk.reshape(-1), config.n_expert)

    def product(x_nmD: jax.Array, name: str) -> jax.Array:
        y_nmF = grouped_matmul(x_nmD, weights[f"{name}.weight"], expert_n)
        if f"{name}.bias" in weights:
            y_nmF = y_nmF + spread(weights[f"{name}.bias"][expert_n][:, None, :], y_nmF)
        return checkpoint_name(y_nmF, PRODUCT)

    rows_AD = jnp.repeat(x_BTD.reshape(B * T, D), k, axis=0)
    x_nmD = exchange(rows_AD, choice_s, slot_A).reshape(len(expert_n), -1, D)
    up_nmF = product(x_nmD, "up")
    gate_nmF = product(x_nmD, "gate") if config.is_gated else None
    y_nmD = product(activate(config.activation, up_nmF, gate_nmF), "down")
    y_AD = exchange(y_nmD.reshape(-1, D), slot_A, choice_s)
    mixed_BTD = jnp.sum(y_AD.reshape(B, T, k, D) * gates_BTk[..., None], axis=2)
    return mixed_BTD.astype(x_BTD.dtype)


@jax.custom_vjp
def exchange(x_RD: jax.Array, source_i: jax.Array, back_R: jax.Array) -> jax.Array:
    """y[i] = x[source[i]] for R rows; zero if source[i] is R, which is beyond the last row.

    Args:
      back_R: the inverse of source, out of range for a row that no i reads. It makes the gradient
        an exchange too; the gradient of a plain gather would add up rows one by one.
    """
    return x_RD.at[source_i].get(mode="fill", fill_value=0)


def _exchange_forward(x_RD, source_i, back_R):
    return exchange(x_RD, source_i, back_R), (source_i, back_R)


def _exchange_backward(residuals, gradient_iD):
    source_i, back_R = residuals
    return exchange(gradient_iD, back_R, source_i), None, None


exchange.defvjp(_exchange_forward, _exchange_backward)
