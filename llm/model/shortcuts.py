"""Learned ways around the blocks: what a block reads beside the stream, and how much of it.

    x_l <- a_l x_l + b_l x_0                 before block l
    v   <- v + c_l E_{l mod n}[token]        the values of its attention

a with model.residual_gains, b with model.embedding_shortcut, E and c with model.value_embeddings =
n. At first a and c are 1 and b is 0.

Sources: https://github.com/KellerJordan/modded-nanogpt, where each shortened the way to a loss;
Zhou et al. 2024, "Value Residual Learning", for values that deeper layers share.

    B batch  T position  D model width  C = K H key/value heads times head size  n tables
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from llm.config import ModelConfig
from llm.model.layers import spread


class Beside(NamedTuple):
    """What the blocks read beside the stream. Each is None in a model without it.

    first_BTD: x_0. values_nBTC: every token's row of each table of values.
    """

    first_BTD: jax.Array | None = None
    values_nBTC: jax.Array | None = None

    def values_of(self, layer: int | jax.Array) -> jax.Array | None:
        """[B, T, C] for one layer, counted from 0."""
        if self.values_nBTC is None:
            return None
        return self.values_nBTC[layer % self.values_nBTC.shape[0]]


class Gain(nnx.Module):
    """One learned factor."""

    def __init__(self, start: float):
        self.scale = nnx.Param(jnp.full((), start), axes=())

    def __call__(self, x: jax.Array) -> jax.Array:
        return spread(self.scale[...], x) * x


class Shortcut(nnx.Module):
    """What a block begins from: a x + b x_0."""

    def __init__(self, config: ModelConfig):
        self.residual = Gain(1.0) if config.residual_gains else None
        self.embedding = Gain(0.0) if config.embedding_shortcut else None

    def __call__(self, x_BTD: jax.Array, first_BTD: jax.Array | None) -> jax.Array:
        if self.residual is not None:
            x_BTD = self.residual(x_BTD)
        if self.embedding is not None:
            assert first_BTD is not None
            x_BTD = x_BTD + self.embedding(first_BTD)
        return x_BTD
