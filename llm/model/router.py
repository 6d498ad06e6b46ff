"""Which experts a token goes through, with what weights, and how evenly that uses them.

    z = W_router x                                       (float32)
    chosen = the k experts with the largest z
    g = softmax(z[chosen])                               (model.normalize_gates)
    g = softmax(z)[chosen]                               (else)

Normalised, as in Mixtral, k experts that are alike are one MLP. Not normalised, as in Switch and
OLMoE, a router learns with k = 1 too, where a normalised weight is always 1.

Sources: Shazeer et al. 2017, "Outrageously Large Neural Networks"; Fedus et al. 2021, "Switch
Transformers" (load balancing, equations 4 to 6); Zoph et al. 2022, "ST-MoE" (router z-loss,
equation 5); Jiang et al. 2024, "Mixtral of Experts" (gates).

    B batch  T position  D model width  E experts  K experts of a token
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from llm.config import ModelConfig
from llm.model.layers import drawn


class Routes(NamedTuple):
    """What a router decided: logits_BTE; chosen_BTK, int32, the likeliest first; their gates_BTK,
    float32."""

    logits_BTE: jax.Array
    chosen_BTK: jax.Array
    gates_BTK: jax.Array


class Router(nnx.Module):
    """In float32 whatever the model computes in: a rounded score would choose another expert."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.weight = drawn(("embed", "router"), (config.d_model, config.n_expert), config.init_std)

    def __call__(self, x_BTD: jax.Array) -> Routes:
        logits_BTE = jnp.einsum(
            "BTD,DE->BTE",
            x_BTD.astype(jnp.float32),
            self.weight[...],
            precision=jax.lax.Precision.HIGHEST,
        )
        # Sorted: XLA gathers what `top_k` is applied to on every device, seen with jax 0.12 on CPU.
        order_BTE = jnp.argsort(logits_BTE, axis=-1, stable=True, descending=True)
        chosen_BTK = order_BTE[..., : self.config.n_expert_active]
        scores_BTK = jnp.take_along_axis(logits_BTE, chosen_BTK, axis=-1)
        among = scores_BTK if self.config.normalize_gates else logits_BTE
        log_z_BT1 = jax.nn.logsumexp(among, axis=-1, keepdims=True)
        return Routes(logits_BTE, chosen_BTK, jnp.exp(scores_BTK - log_z_BT1))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["load_balancing", "z_loss", "load_max", "dropped"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Routing:
    """How a pass used the experts of a block: float32 scalars, or [L] of all blocks.

    load_balancing: E sum_e f_e P_e, with f_e the share of all choices that fell on expert e and
      P_e its mean probability: 1 where all are used alike, up to E / k where the same are always.
      The gradient flows through P; f counts.
    z_loss: mean of (log sum_e exp z_e)^2.
    load_max: the largest f_e, as a multiple of the even share 1 / E.
    dropped: share of the choices that found no slot in their expert; 0 when dropless.

    Means are over all tokens of the pass, wherever they lie, so that every mesh has the same.
    """

    load_balancing: jax.Array
    z_loss: jax.Array
    load_max: jax.Array
    dropped: jax.Array

    @classmethod
    def of(cls, routes: Routes, dropped: jax.Array) -> "Routing":
        E = routes.logits_BTE.shape[-1]
        share_E = jax.nn.one_hot(routes.chosen_BTK, E).mean(axis=(0, 1, 2))
        probability_E = jax.nn.softmax(routes.logits_BTE, axis=-1).mean(axis=(0, 1))
        log_z_BT = jax.nn.logsumexp(routes.logits_BTE, axis=-1)
        return cls(
            load_balancing=E * jnp.sum(share_E * probability_E),
            z_loss=jnp.mean(jnp.square(log_z_BT)),
            load_max=E * share_E.max(),
            dropped=dropped,
        )

    def over_blocks(self) -> "Routing":
        """Of [L] the means, and the largest load of any expert of any block."""
        return Routing(
            self.load_balancing.mean(), self.z_loss.mean(), self.load_max.max(), self.dropped.mean()
        )
