"""One GPT: a decoder-only Transformer whose parts are switches of ModelConfig.

    x_0     = E[token] + P[position]                          (P: learned positions only)
    y_l     = x_l + W_o attention(norm(x_l))
    x_{l+1} = y_l + W_down f(W_up norm(y_l))                  (swiglu: silu(W_gate n) * W_up n)
    logits  = norm(x_L) W_head                                (tied: W_head = E^T)

The probability of a text is the product of its next-token probabilities,
log P(x) = sum_t log P(x_t | x_<t), and P(x_t | x_<t) = softmax(logits at t - 1).

What it is not: it does not train, draw or read anything. Parameters live outside, as a flat
dictionary of float32 arrays (`Params`); `bind` puts them into the modules where a model is run.

Sources: Radford et al. 2019 (GPT-2: pre-norm blocks, initialisation); Shazeer 2020 (SwiGLU); So et
al. 2021 (squared ReLU); Dehghani et al. 2023 (QK-norm); Gemma team 2024 (logit soft cap). Those of
attention and norms are in attention.py and norm.py.

    B batch  T position  D model width  N heads  K key/value heads  H head size
    F feed-forward width  V vocabulary (padded inside this file)  L layers  S cache capacity
"""

import collections
import dataclasses
import functools
import itertools
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint

from llm.config import ModelConfig
from llm.model.attention import attend, attention_weights, causal_mask, drop, rotate
from llm.model.context import from_zigzag, to_zigzag, zigzag_positions
from llm.model.experts import Experts
from llm.model.kernels import Kernel, causal_attention
from llm.model.layers import (
    LEAST_ROWS,
    Linear,
    activate,
    drawn,
    few_rows_product,
    matmul,
    residual_std,
    spread,
)
from llm.model.norm import Norm
from llm.model.remat import Remat, keep
from llm.model.router import Routing
from llm.model.sharding import constrain, is_divided, shares
from llm.model.shortcuts import Beside, Gain, Shortcut
from llm.model.stack import is_stacked, layer_names

# Flat, with dotted names such as "blocks.0.attention.query.weight"; float32 master weights. Inside
# training the blocks may be stacked, "blocks.*.attention.query.weight" (stack.py).
Params = dict[str, jax.Array]

# The parts of a block's joined matrices, side by side in this order.
JOINED = {
    "attention.query_key_value": ("attention.query", "attention.key", "attention.value"),
    "mlp.up_gate": ("mlp.up", "mlp.gate"),
}

# Fewer rows than this are multiplied in about the time that it takes to read the matrix.
FEW_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Everything that fixes the model's function but its parameters. Hashable: static in jit.

    attention: what computes the attention of whole texts; a kernel only where
      kernels.py:choose_attention found that it can be used.
    float8: round what the blocks' dense matrices multiply to 8 bits; experts, routers and head not.
    joined: what multiplies the same input is one matrix, JOINED. For decoding, which reads all
      weights for one token: inference/programs.py:for_decoding makes such weights.
    """

    config: ModelConfig
    vocab_size: int
    compute_dtype: str = "float32"
    attention: Kernel = "plain"
    float8: bool = False
    joined: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", self.config.resolved())

    @property
    def padded_vocab_size(self) -> int:
        multiple = self.config.vocab_multiple
        return -(-self.vocab_size // multiple) * multiple


@functools.partial(
    jax.tree_util.register_dataclass, meta_fields=[], data_fields=["keys", "values", "length_B"]
)
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens seen so far, one pair of arrays a layer.

    keys, values: L arrays [B, K, S, H] in the compute dtype; entries at or beyond `length_B` are
      stale and never seen. Heads before positions: a head's entries lie together, as products over
      one head at a time read them; XLA's CPU backend would transpose the cache for every token.
    length_B: int32, tokens held in each row.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length_B: jax.Array

    @classmethod
    def create(cls, spec: ModelSpec, batch_size: int, capacity: int) -> "KVCache":
        config = spec.config
        shape = (batch_size, config.n_kv_head, capacity, config.head_size)
        layers = [jnp.zeros(shape, spec.compute_dtype) for _ in range(2 * config.n_layer)]
        return cls(
            keys=tuple(layers[0::2]),
            values=tuple(layers[1::2]),
            length_B=jnp.zeros((batch_size,), jnp.int32),
        )

    @property
    def capacity(self) -> int:
        """Positions S that there is room for in each row."""
        return self.keys[0].shape[2]


def apply_side_by_side(linears: list[Linear], x_BTD: jax.Array) -> list[jax.Array]:
    """[linear(x) for each], as one matrix product: one wide one is faster than several narrow ones.

    Not where the mesh divides the columns: a joined matrix would mix the devices' shares. Nor for
    few tokens, as in decoding, where to join the weights takes as long as to multiply by them.
    """
    if is_divided("heads") or math.prod(x_BTD.shape[:2]) < FEW_TOKENS:
        return [linear(x_BTD) for linear in linears]
    dtype = linears[0].dtype
    joined = jnp.concatenate([linear.weight[...] for linear in linears], axis=1).astype(dtype)
    y = matmul(x_BTD, joined, float8=linears[0].float8)
    biases = [linear.bias[...] for linear in linears if linear.bias is not None]
    if biases:
        y = y + spread(jnp.concatenate(biases), y)
    widths = [linear.weight.shape[1] for linear in linears]
    ends = list(itertools.accumulate(widths))
    return jnp.split(y, ends[:-1], axis=-1)


class Embed(nnx.Module):
    """Token embedding, with learned positions when the model has them."""

    def __init__(self, spec: ModelSpec):
        config = spec.config
        self.dtype = spec.compute_dtype
        D, std = config.d_model, config.init_std
        self.weight = drawn(("vocab", "embed"), (spec.padded_vocab_size, D), std)
        has_positions = config.positions == "learned"
        self.position = (
            drawn(("position", "embed"), (config.context_length, D), std) if has_positions else None
        )

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array | None = None) -> jax.Array:
        """Without positions, a text from its beginning: its rows of the table are the first T.

        A slice, whose gradient each device keeps its share of; that of looked-up rows is put
        together whole on every device of the fsdp axis.
        """
        x_BTD = look_up(self.weight[...], tokens_BT)
        if self.position is not None:
            table, T = self.position[...], tokens_BT.shape[1]
            x_BTD = x_BTD + (
                constrain(table[None, :T], None, None, "width")
                if positions_BT is None
                else table[positions_BT]
            )
            # XLA's GPU backend would put B last for the table's gradient, a sum over B, and then
            # transpose between that and what products take, in every layer. Not where a mesh
            # divides x: the partitioner would gather it for this.
            if not any(map(is_divided, ("batch_by_columns", "sequence", "width"))):
                x_BTD = with_layout_constraint(x_BTD, Layout((0, 1, 2)))
        return x_BTD.astype(self.dtype)


class ValueEmbed(nnx.Module):
    """One table of what attention's values are added to, a row for each token (shortcuts.py)."""

    def __init__(self, spec: ModelSpec):
        config = spec.config
        shape = (spec.padded_vocab_size, config.n_kv_head * config.head_size)
        self.dtype = spec.compute_dtype
        self.weight = drawn(("vocab", "embed"), shape, config.init_std)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        x_BTC = look_up(self.weight[...], tokens_BT).astype(self.dtype)
        return constrain(x_BTC, "batch", "sequence", "width")


def look_up(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Each device looks up its columns for all that share the table, then gets its rows."""
    tokens_BT = constrain(tokens_BT, "batch_of_columns", "sequence")
    x_BTD = table_VD[tokens_BT]
    x_BTD = constrain(x_BTD, "batch_of_columns", "sequence", "embed")
    return constrain(x_BTD, "batch_by_columns", "sequence", "width")


class Attention(nnx.Module):
    """Multi-head causal self-attention: heads attend apart and are mixed by one matrix.

    MultiHead(x) = concat(head_1, ..., head_N) W_o,
    head_n = attention(x W_q[n], x W_k[n // G], x W_v[n // G]),   G = N / K
    """

    def __init__(self, spec: ModelSpec):
        config = self.config = spec.config
        self.kernel = spec.attention
        linear = functools.partial(
            Linear,
            bias=config.bias,
            dtype=spec.compute_dtype,
            std=config.init_std,
            float8=spec.float8,
        )
        D, N, K, H = config.d_model, config.n_head, config.n_kv_head, config.head_size
        self.joined = spec.joined
        if self.joined:
            self.query_key_value = linear(("embed", "heads"), (D, (N + 2 * K) * H))
        else:
            self.query = linear(("embed", "heads"), (D, N * H))
            self.key = linear(("embed", "kv_heads"), (D, K * H))
            self.value = linear(("embed", "kv_heads"), (D, K * H))
        self.out = linear(("heads_in", "width"), (N * H, D), std=residual_std(config))
        if config.qk_norm:
            self.query_norm = Norm("rmsnorm", H, epsilon=config.norm_epsilon, bias=False)
            self.key_norm = Norm("rmsnorm", H, epsilon=config.norm_epsilon, bias=False)
        if config.value_embeddings:
            self.value_gain = Gain(1.0)

    def project(
        self, x_BTD: jax.Array, positions_BT: jax.Array, more_values_BTC: jax.Array | None
    ) -> tuple[jax.Array, ...]:
        """Queries [B, T, N, H], keys and values [B, T, K, H], normalised and rotated."""
        B, T, _ = x_BTD.shape
        config = self.config
        query, key, value = self._products(x_BTD)
        if more_values_BTC is not None:
            value = value + self.value_gain(more_values_BTC)
        query = query.reshape(B, T, config.n_head, config.head_size)
        key = key.reshape(B, T, config.n_kv_head, config.head_size)
        value = value.reshape(B, T, config.n_kv_head, config.head_size)
        if config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if config.positions == "rotary":
            query = rotate(query, positions_BT, config.rope_theta)
            key = rotate(key, positions_BT, config.rope_theta)
        return query, key, value

    def _products(self, x_BTD: jax.Array) -> list[jax.Array]:
        """x W_q, x W_k and x W_v."""
        if self.joined:
            queries = self.config.n_head * self.config.head_size
            keys = self.config.n_kv_head * self.config.head_size
            return jnp.split(self.query_key_value(x_BTD), [queries, queries + keys], axis=-1)
        linears = [self.query, self.key, self.value]
        if self.kernel == "cudnn" and not self.query.float8:
            # It reads arrays of their own: parts of a joined one would be copied, and their
            # gradients joined again, a tenth of a GPU's traffic in a step of GPT-2 124M.
            return [linear(x_BTD) for linear in linears]
        return apply_side_by_side(linears, x_BTD)

    def __call__(
        self, x_BTD, positions_BT, more_values_BTC=None, *, zigzag=False, dropout_key=None
    ) -> jax.Array:
        """Every position of x looks at itself and what is before it in x."""
        query, key, value = self.project(x_BTD, positions_BT, more_values_BTC)
        query = constrain(query, "batch", "sequence", "heads", None)
        mixed_BTNH = causal_attention(
            self.kernel,
            query,
            key,
            value,
            zigzag=zigzag,
            dropout=self.config.dropout,
            dropout_key=dropout_key,
        )
        return self.out(mixed_BTNH.reshape(*x_BTD.shape[:2], -1))

    def weights(self, x_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """The softmax that __call__ mixes values with, without dropout: float32 [B, N, T, T]."""
        query, key, _ = self.project(x_BTD, positions_BT, None)
        weights_BKGTS = attention_weights(query, key, causal_mask(x_BTD.shape[1]))
        return jax.lax.collapse(weights_BKGTS, 1, 3)

    def extend(
        self, x_BTD, positions_BT, more_values_BTC, keys_BKSH, values_BKSH
    ) -> tuple[jax.Array, ...]:
        """As __call__, also looking at cached positions; the output, and the longer cache."""
        query, key, value = self.project(x_BTD, positions_BT, more_values_BTC)
        B, _, K, _ = key.shape
        # An index for each axis: of a slice of heads XLA's CPU backend makes two transposes.
        rows_B11, heads_11K = jnp.arange(B)[:, None, None], jnp.arange(K)[None, None, :]
        place_BTK = rows_B11, heads_11K, positions_BT[:, :, None]
        keys_BKSH = keys_BKSH.at[place_BTK].set(key)
        values_BKSH = values_BKSH.at[place_BTK].set(value)
        slots_S = jnp.arange(keys_BKSH.shape[2])
        visible_BTS = slots_S[None, None, :] <= positions_BT[:, :, None]
        keys_BSKH, values_BSKH = keys_BKSH.swapaxes(1, 2), values_BKSH.swapaxes(1, 2)
        mixed_BTNH = attend(query, keys_BSKH, values_BSKH, visible_BTS)
        return self.out(mixed_BTNH.reshape(*x_BTD.shape[:2], -1)), keys_BKSH, values_BKSH


class MLP(nnx.Module):
    """Position by position: W_down f(W_up x), or W_down (silu(W_gate x) * W_up x) for swiglu."""

    def __init__(self, spec: ModelSpec):
        config = spec.config
        self.activation = config.activation
        linear = functools.partial(
            Linear,
            bias=config.bias,
            dtype=spec.compute_dtype,
            std=config.init_std,
            float8=spec.float8,
        )
        D, F = config.d_model, config.d_ff
        is_gated = self.activation == "swiglu"
        self.joined = spec.joined and is_gated
        if self.joined:
            self.up_gate = linear(("embed", "mlp"), (D, 2 * F))
        else:
            self.up = linear(("embed", "mlp"), (D, F))
            self.gate = linear(("embed", "mlp"), (D, F)) if is_gated else None
        self.down = linear(("mlp_in", "width"), (F, D), std=residual_std(config))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        if self.joined:
            parts: list[Any] = jnp.split(self.up_gate(x_BTD), 2, axis=-1)
        else:
            up_BTF = constrain(self.up(x_BTD), "batch", "sequence", "mlp")
            parts = [up_BTF, None if self.gate is None else self.gate(x_BTD)]
        return self.down(activate(self.activation, *parts))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); dropout on each branch.

    With model.n_expert above 1 the MLP is a mixture of experts (experts.py). Before both, what
    shortcuts.py adds.
    """

    def __init__(self, spec: ModelSpec):
        config = spec.config
        self.dropout = config.dropout
        norm = functools.partial(
            Norm, config.norm, config.d_model, epsilon=config.norm_epsilon, bias=config.bias
        )
        self.shortcut = Shortcut(config)
        self.attention_norm, self.attention = norm(), Attention(spec)
        self.has_experts = config.has_experts
        self.mlp_norm = norm()
        self.mlp: Any = Experts(config, spec.compute_dtype) if self.has_experts else MLP(spec)

    def __call__(
        self,
        x_BTD,
        positions_BT,
        beside: Beside,
        layer,
        *,
        zigzag=False,
        dropout_key=None,
        capacity_factor=0.0,
    ) -> tuple[jax.Array, Routing | None]:
        """The stream after this block, the `layer`-th from 0, and how its experts were used."""
        keys = [None] * 3 if dropout_key is None else list(jax.random.split(dropout_key, 3))
        x_BTD = self.shortcut(x_BTD, beside.first_BTD)
        branch = self.attention(
            self.attention_norm(x_BTD),
            positions_BT,
            beside.values_of(layer),
            zigzag=zigzag,
            dropout_key=keys[0],
        )
        x_BTD = x_BTD + drop(branch, self.dropout, keys[1])
        branch, routing = self._feed(self.mlp_norm(x_BTD), capacity_factor)
        x_BTD = x_BTD + drop(branch, self.dropout, keys[2])
        return constrain(x_BTD, "batch", "sequence", "width"), routing

    def _feed(self, x_BTD, capacity_factor=0.0) -> tuple[jax.Array, Routing | None]:
        return self.mlp(x_BTD, capacity_factor) if self.has_experts else (self.mlp(x_BTD), None)

    def extend(
        self, x_BTD, positions_BT, beside: Beside, layer, keys_BKSH, values_BKSH
    ) -> tuple[jax.Array, ...]:
        x_BTD = self.shortcut(x_BTD, beside.first_BTD)
        branch, keys_BKSH, values_BKSH = self.attention.extend(
            self.attention_norm(x_BTD),
            positions_BT,
            beside.values_of(layer),
            keys_BKSH,
            values_BKSH,
        )
        x_BTD = x_BTD + branch
        return x_BTD + self._feed(self.mlp_norm(x_BTD))[0], keys_BKSH, values_BKSH


class GPT(nnx.Module):
    """Token ids in, a score for each possible next token out.

    Args:
      stacked: hold one Block, whose weights are those of all layers [L, ...]. Such a model is for
        training: it computes `hidden`, and neither extends a cache nor shows attention weights.
    """

    def __init__(self, spec: ModelSpec, *, stacked: bool = False):
        config = spec.config
        self.spec = spec
        self.stacked = stacked
        self.embed = Embed(spec)
        self.value_embed = nnx.List([ValueEmbed(spec) for _ in range(config.value_embeddings)])
        self.blocks: Any = (
            nnx.Dict({"*": Block(spec)})
            if stacked
            else nnx.List([Block(spec) for _ in range(config.n_layer)])
        )
        self.final_norm = Norm(
            config.norm, config.d_model, epsilon=config.norm_epsilon, bias=config.bias
        )
        if not config.tie_embeddings:
            self.head = Linear(
                ("embed", "vocab"),
                (config.d_model, spec.padded_vocab_size),
                std=config.init_std,
                bias=False,
                dtype=spec.compute_dtype,
            )

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """float32 logits [B, T, vocab_size]; those at t score the token at t + 1."""
        return self.logits(self.hidden(tokens_BT))

    def hidden(
        self,
        tokens_BT: jax.Array,
        *,
        dropout_key: jax.Array | None = None,
        remat: Remat = "none",
    ) -> jax.Array:
        """What the head reads: [B, T, D] after the final norm.

        Args:
          tokens_BT: int32 ids in [0, vocab_size), T <= context_length. Ids outside are the
            caller's error: a gather on an accelerator cannot complain.
          dropout_key: draws this pass's dropout; None turns dropout off.
          remat: what each block keeps for its gradient.
        """
        return self.hidden_and_routing(tokens_BT, dropout_key=dropout_key, remat=remat)[0]

    def hidden_and_routing(
        self,
        tokens_BT: jax.Array,
        *,
        dropout_key: jax.Array | None = None,
        remat: Remat = "none",
        capacity_factor: float = 0.0,
    ) -> tuple[jax.Array, Routing | None]:
        """`hidden`, and how the experts of each block were used, [L]; None in a dense model.

        Args:
          capacity_factor: for training alone, where it is a setting: with a capacity, what a token
            gets depends on those before it in the text, and a cache knows nothing of their slots.
        """
        x_BTD, positions_BT = self._embedded(tokens_BT)
        if dropout_key is not None:
            x_BTD = drop(x_BTD, self.spec.config.dropout, jax.random.fold_in(dropout_key, 0))
        # Dropout is drawn, and an expert's places are given, in the natural order, so that a mesh
        # changes neither.
        zigzag = is_divided("sequence") and dropout_key is None and not capacity_factor
        if zigzag:
            order_T = zigzag_positions(tokens_BT.shape[1], shares("sequence"))
            x_BTD, positions_BT = to_zigzag(x_BTD), jnp.asarray(order_T)[None]
        beside = self._beside(x_BTD, tokens_BT, zigzag)
        x_BTD, routing = self._through_blocks(
            x_BTD, positions_BT, beside, zigzag, dropout_key, remat, capacity_factor
        )
        return self.final_norm(from_zigzag(x_BTD) if zigzag else x_BTD), routing

    def _through_blocks(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        beside: Beside,
        zigzag: bool,
        dropout_key: jax.Array | None,
        remat: Remat,
        capacity_factor: float,
    ) -> tuple[jax.Array, Routing | None]:
        """Block after block; where they are stacked, by a loop whose body is compiled once."""

        def through(graph, x_BTD, layer, weights):
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, layer + 1)
            block = nnx.merge(graph, weights)
            return block(
                x_BTD,
                positions_BT,
                beside,
                layer,
                zigzag=zigzag,
                dropout_key=key,
                capacity_factor=capacity_factor,
            )

        if not self.stacked:
            routings = []
            for layer, block in enumerate(self.blocks):
                graph, weights = nnx.split(block)
                body = keep(remat, functools.partial(through, graph))
                x_BTD, routing = body(x_BTD, layer, weights)
                routings.append(routing)
            return x_BTD, jax.tree.map(lambda *parts: jnp.stack(parts), *routings)
        graph, weights_L = nnx.split(self.blocks["*"])
        body = keep(remat, functools.partial(through, graph), in_scan=True)
        layers_L = jnp.arange(self.spec.config.n_layer)
        return jax.lax.scan(lambda x, part: body(x, *part), x_BTD, (layers_L, weights_L))

    def _embedded(self, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x_0 of a text from its beginning, and its positions."""
        positions_BT = jnp.arange(tokens_BT.shape[1])[None, :]
        x_BTD = self.embed(tokens_BT)
        return constrain(x_BTD, "batch", "sequence", "width"), positions_BT

    def _beside(self, x_BTD: jax.Array, tokens_BT: jax.Array, zigzag: bool = False) -> Beside:
        """What the blocks read beside the stream, which begins as x."""
        tables = [table(tokens_BT) for table in self.value_embed]
        if zigzag:
            tables = [to_zigzag(values_BTC) for values_BTC in tables]
        return Beside(
            x_BTD if self.spec.config.embedding_shortcut else None,
            jnp.stack(tables) if tables else None,
        )

    def attention_weights(self, tokens_BT: jax.Array) -> jax.Array:
        """Where each head looks: float32 [L, B, N, T, T].

        weights[l, b, n, t, s] is how much head n of layer l takes from position s when it computes
        its output at t; each row sums to one and is zero for s > t. All L layers are held at once.
        """
        x_BTD, positions_BT = self._embedded(tokens_BT)
        beside = self._beside(x_BTD, tokens_BT)
        layers = []
        for layer, block in enumerate(self.blocks):
            read_BTD = block.attention_norm(block.shortcut(x_BTD, beside.first_BTD))
            layers.append(block.attention.weights(read_BTD, positions_BT))
            x_BTD, _ = block(x_BTD, positions_BT, beside, layer)
        return jnp.stack(layers)

    def extend(self, tokens_BT: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """`hidden` of tokens that follow those in the cache, and the cache with them in it.

        Row b's tokens sit at positions length_B[b] + [0, T). Prompts of different lengths: pad
        them on the right, extend an empty cache, then set length_B to the true lengths; what
        padding left behind is masked until it is overwritten.

        Positions beyond the capacity are dropped: real tokens there are the caller's error, as ids
        outside the vocabulary are; padding may reach over the end.
        """
        T = tokens_BT.shape[1]
        positions_BT = cache.length_B[:, None] + jnp.arange(T)[None, :]
        x_BTD = self.embed(tokens_BT, positions_BT)
        beside = self._beside(x_BTD, tokens_BT)
        keys, values = [], []
        for layer, block in enumerate(self.blocks):
            x_BTD, keys_BKSH, values_BKSH = block.extend(
                x_BTD, positions_BT, beside, layer, cache.keys[layer], cache.values[layer]
            )
            keys.append(keys_BKSH)
            values.append(values_BKSH)
        longer = KVCache(tuple(keys), tuple(values), cache.length_B + T)
        return self.final_norm(x_BTD), longer

    def head_weight(self) -> jax.Array:
        """W_head [D, padded vocabulary] in the compute dtype; E^T when tied."""
        if self.spec.config.tie_embeddings:
            return self.embed.weight[...].T.astype(self.spec.compute_dtype)
        return self.head.weight[...].astype(self.spec.compute_dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 [..., vocab_size] from [..., D]: the padding of the vocabulary is cut away."""
        weight_DV = self.head_weight()
        product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
        if hidden.ndim == 2 and len(hidden) < LEAST_ROWS:
            product = functools.partial(few_rows_product, dtype=jnp.float32)
        scores = product(hidden, weight_DV)
        return soft_cap(scores[..., : self.spec.vocab_size], self.spec.config.logit_soft_cap)


def soft_cap(logits: jax.Array, cap: float) -> jax.Array:
    """c tanh(logits / c), which keeps them within (-c, c); unchanged for c = 0."""
    return cap * jnp.tanh(logits / cap) if cap else logits


def initialise(spec: ModelSpec, key: jax.Array, *, stacked: bool = False) -> Params:
    """Fresh float32 parameters; each is a pure function of the key, its name and its shape.

    Stacked, each layer has what it has alone. Weights of one shape are drawn by one loop: a draw
    takes 0.3 s to compile, and 12 layers have 50 (jax 0.12, 2-core EPYC, busy: 10.8 s drawn apart,
    3.7 s so).
    """
    state = nnx.state(GPT(spec, stacked=stacked))
    flat = {_name(path): variable for path, variable in nnx.to_flat_state(state)}
    params: Params = {}
    by_shape: dict[tuple[int, ...], dict[str, float]] = collections.defaultdict(dict)
    for name, variable in flat.items():
        value, std = variable.get_value(), variable.get_metadata("std", 0.0)
        layers = (spec.config.n_layer,) if is_stacked(name) else ()
        params[name] = jnp.broadcast_to(value, layers + value.shape)
        if std:
            by_shape[value.shape][name] = std
    for shape, stds in by_shape.items():
        params |= _draw(key, shape, stds, spec.config.n_layer)
    return params


def _draw(key: jax.Array, shape: tuple[int, ...], stds: dict[str, float], layers: int) -> Params:
    """Weights of one shape, stacks of them among them: name -> N(0, std^2)."""
    parts = {name: layer_names(name, layers) for name in stds}
    hashes = [zlib.crc32(part.encode()) for names in parts.values() for part in names]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.array(hashes, jnp.uint32))
    draws = jax.lax.map(lambda key: jax.random.normal(key, shape), keys)
    ends = list(itertools.accumulate(len(names) for names in parts.values()))
    return {
        name: stds[name] * (draws_L if is_stacked(name) else draws_L[0])
        for name, draws_L in zip(stds, jnp.split(draws, ends[:-1]), strict=True)
    }


def bind(spec: ModelSpec, params: Params) -> GPT:
    """The model with these parameters in place; use inside jit, where it costs nothing."""
    graph, abstract = _abstract(spec, any(map(is_stacked, params)))
    variables = [
        (path, variable.replace(params[_name(path)]))
        for path, variable in nnx.to_flat_state(abstract)
    ]
    return nnx.merge(graph, nnx.from_flat_state(variables))


def abstract_params(spec: ModelSpec) -> dict[str, jax.ShapeDtypeStruct]:
    """name -> shape and dtype, without allocating anything."""
    flat = nnx.to_flat_state(_abstract(spec)[1])
    return {_name(path): variable.get_value() for path, variable in flat}


def logical_axes(spec: ModelSpec, *, stacked: bool = False) -> dict[str, tuple[str, ...]]:
    """name -> logical axes, as written beside each weight above; a stack's first is "layer"."""
    flat = nnx.to_flat_state(_abstract(spec, stacked)[1])
    axes = {_name(path): variable.get_metadata("axes") for path, variable in flat}
    return {name: ("layer", *names) if is_stacked(name) else names for name, names in axes.items()}


@functools.lru_cache(maxsize=32)
def _abstract(spec: ModelSpec, stacked: bool = False) -> tuple[Any, nnx.State]:
    model = nnx.eval_shape(lambda: GPT(spec, stacked=stacked))
    return nnx.split(model, nnx.Param)


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path)
