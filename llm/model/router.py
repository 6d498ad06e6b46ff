"""Which experts a token goes through, with what weights, and how evenly that uses them.

    z = W_router x                                       (float32)
    chosen = the k experts with the largest z
    g = softmax(z[chosen])                               (model.normalize_gates)
    g = softmax(z)[chosen]                               (else)

Normalised, as in Mixtral, k equal experts compute what one MLP does. Not normalised, as in Switch
and OLMoE, the router also learns with k = 1; a normalised weight would always be 1 there.

Sources: Shazeer et al. 2017, "Outrageously Large Neural Networks"; Fedus et al. 2021, "Switch
Transformers" (load balancing, equations 4 to 6); Zoph et al. 2022, "ST-MoE" (router z-loss,
equation 5); Jiang et al. 2024, "Mixtral of Experts" (gates).

    B batch  T position  D model width  E experts  k experts of a token
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from llm.model.layers import normal_weight
from llm.model_config import ModelConfig


class Router(nnx.Module):
    """Computes in float32 whatever the model's dtype: a rounded score may choose another expert."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.weight = normal_weight(
            ("embed", "router"), (config.d_model, config.n_expert), config.init_std
        )

    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, "Routing"]:
        """The chosen experts [B, T, k] (int32, the likeliest first), their gates, and the usage."""
        logits_BTE = jnp.einsum(
            "BTD,DE->BTE",
            x_BTD.astype(jnp.float32),
            self.weight[...],
            precision=jax.lax.Precision.HIGHEST,
        )
        # Sorted, because XLA gathers the operand of `top_k` on every device.
        order_BTE = jnp.argsort(logits_BTE, axis=-1, stable=True, descending=True)
        chosen_BTk = order_BTE[..., : self.config.n_expert_active]
        scores_BTk = jnp.take_along_axis(logits_BTE, chosen_BTk, axis=-1)
        among = scores_BTk if self.config.normalize_gates else logits_BTE
        log_z_BT1 = jax.nn.logsumexp(among, axis=-1, keepdims=True)
        gates_BTk = jnp.exp(scores_BTk - log_z_BT1)
        return chosen_BTk, gates_BTk, Routing.of(logits_BTE, chosen_BTk)


class Routing(NamedTuple):
    """How a pass used the experts of a block: float32 scalars, or [L] for all blocks.

    load_balancing: E sum_e f_e P_e. f_e is the share of all choices that fell on expert e, P_e its
      mean probability. It is 1 if all experts are used alike and up to E / k if the same ones are
      always chosen. The gradient flows through P; f counts.
    z_loss: mean of (log sum_e exp z_e)^2.
    load_max: the largest f_e, as a multiple of the even share 1 / E.

    Means are over all tokens of the pass, wherever they lie, so that every mesh has the same.
    """

    load_balancing: jax.Array
    z_loss: jax.Array
    load_max: jax.Array

    @classmethod
    def of(cls, logits_BTE: jax.Array, chosen_BTk: jax.Array) -> "Routing":
        """The numbers of one block, from the router's scores and choices."""
        E = logits_BTE.shape[-1]
        share_E = jax.nn.one_hot(chosen_BTk, E).mean(axis=(0, 1, 2))
        probability_E = jax.nn.softmax(logits_BTE, axis=-1).mean(axis=(0, 1))
        log_z_BT = jax.nn.logsumexp(logits_BTE, axis=-1)
        return cls(
            load_balancing=E * jnp.sum(share_E * probability_E),
            z_loss=jnp.mean(jnp.square(log_z_BT)),
            load_max=E * share_E.max(),
        )

    def over_blocks(self) -> "Routing":
        """The means over [L], and the largest load of any expert in any block."""
        return Routing(self.load_balancing.mean(), self.z_loss.mean(), self.load_max.max())
