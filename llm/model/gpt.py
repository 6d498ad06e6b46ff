"""One GPT: a decoder-only Transformer whose parts are switches of ModelConfig.

    x_0     = E[token] + P[position]                          (P: learned positions only)
    y_l     = x_l + W_o attention(norm(x_l))
    x_{l+1} = y_l + W_down f(W_up norm(y_l))                  (swiglu: silu(W_gate n) * W_up n)
    logits  = norm(x_L) W_head                                (tied: W_head = E^T)

The probability of a text is the product of its next-token probabilities,
log P(x) = sum_t log P(x_t | x_<t), and P(x_t | x_<t) = softmax(logits at t - 1).

Parameters live outside the modules, as a flat dictionary of float32 arrays (`Params`); `bind` puts
them into the modules when a model is run. This file neither trains nor samples, and reads no files.

Sources: Radford et al. 2019 (GPT-2: pre-norm blocks, initialisation); Shazeer 2020 (SwiGLU); So et
al. 2021 (squared ReLU); Dehghani et al. 2023 (QK-norm); Gemma team 2024 (logit soft cap).
attention.py and norm.py name their own sources.

    B batch  T position  D model width  N heads  K key/value heads  H head size
    F feed-forward width  V vocabulary (padded inside this file)  L layers  S cache capacity
"""

import collections
import dataclasses
import functools
import itertools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint

from llm.errors import UsageError
from llm.model.attention import (
    Places,
    RopeScaling,
    attend,
    drop,
    rotate,
    rotation,
    segment_positions,
    soft_cap,
    visible,
)
from llm.model.context import from_zigzag, positions_on_devices, to_zigzag
from llm.model.experts import Experts
from llm.model.kernels import Kernel, self_attention
from llm.model.layers import (
    MLP,
    Linear,
    apply_side_by_side,
    normal_weight,
    residual_std,
    rows_product,
)
from llm.model.norm import Norm
from llm.model.remat import Remat, keep
from llm.model.router import Routing
from llm.model.sharding import constrain, is_divided, shares
from llm.model.stack import is_stacked, layer_names
from llm.model_config import ModelConfig

# Flat, with dotted names such as "blocks.0.attention.query.weight"; float32 master weights. Inside
# training the blocks may be stacked, "blocks.*.attention.query.weight" (stack.py).
Params = dict[str, jax.Array]
# name -> where a module's variable lies in its state, and the variable
Variables = dict[str, tuple[tuple[Any, ...], Any]]

# One layer's keys and values in a KVCache, each [B, K, S, H]; None in a pass without a cache.
Cached = tuple[jax.Array, jax.Array] | None
# Queries [B, T, N, H], keys and values [B, T, K, H].
Heads = tuple[jax.Array, jax.Array, jax.Array]
# Seeds the dropout of one pass; None turns dropout off.
Key = jax.Array | None


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Everything that fixes the model's function except its parameters. Hashable: static in jit.

    attention: what computes the attention of whole texts; a kernel only if
      kernels.py:choose_attention found that it can be used.
    rounded: training rounds the operands of products to bfloat16, and computes all else in the
      compute dtype, float32 (products.py); nothing but training asks.
    unassigned: [start, stop) of ids that no token of the tokenizer has. The model gives them
      probabilities, and no text is continued by them.
    """

    config: ModelConfig
    vocab_size: int
    compute_dtype: str = "float32"
    attention: Kernel = "plain"
    rounded: bool = False
    unassigned: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", self.config.resolved())

    @property
    def products_dtype(self) -> str:
        """What training rounds the operands of products to."""
        return "bfloat16" if self.rounded else self.compute_dtype

    @property
    def padded_vocab_size(self) -> int:
        multiple = self.config.vocab_multiple
        return -(-self.vocab_size // multiple) * multiple


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens seen so far, one pair of arrays for each layer.

    keys, values: L arrays [B, K, S, H] in the compute dtype; entries at or beyond `length_B` are
      stale and never seen. Heads come before positions, because products read the entries of one
      head at a time; XLA's CPU backend would otherwise transpose the cache for every token.
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
        return cls(tuple(layers[0::2]), tuple(layers[1::2]), jnp.zeros((batch_size,), jnp.int32))

    @property
    def capacity(self) -> int:
        """Positions S that there is room for in each row."""
        return self.keys[0].shape[2]


class Embed(nnx.Module):
    """Token embedding, with learned positions when the model has them."""

    def __init__(self, spec: ModelSpec):
        config = spec.config
        self.dtype = spec.compute_dtype
        V, T, D = spec.padded_vocab_size, config.context_length, config.d_model
        self.weight = normal_weight(("vocab", "embed"), (V, D), config.init_std)
        position = normal_weight(("position", "embed"), (T, D), config.init_std)
        self.position = position if config.positions == "learned" else None

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array | None = None) -> jax.Array:
        """x_0 [B, T, D]. Without positions, each row is a text from its beginning.

        The positions' embeddings are then the first T rows of the table. They are a slice, and each
        device keeps its share of a slice's gradient; the gradient of looked-up rows would be put
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
            # Without a layout, XLA's GPU backend would put B last for the table's gradient, a sum
            # over B, and then transpose x for the products of every layer. If a mesh divides x, no
            # layout is asked for, because the partitioner would gather x for it.
            if not any(map(is_divided, ("batch_by_columns", "sequence", "width"))):
                x_BTD = with_layout_constraint(x_BTD, Layout((0, 1, 2)))
        return x_BTD.astype(self.dtype)


def look_up(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """[B, T, D]: each device looks up its columns for all rows, then trades columns for rows."""
    tokens_BT = constrain(tokens_BT, "batch_of_columns", "sequence")
    x_BTD = table_VD[tokens_BT]
    x_BTD = constrain(x_BTD, "batch_of_columns", "sequence", "embed")
    return constrain(x_BTD, "batch_by_columns", "sequence", "width")


def stream_norm(config: ModelConfig) -> Norm:
    """The norm of what a sub-layer or the head reads from the residual stream, or writes to it."""
    return Norm(config.norm, config.d_model, epsilon=config.norm_epsilon, bias=config.bias)


def is_each(every: int, layer: int) -> bool:
    """Whether a layer is one of "each n-th"; with n = 0 none is."""
    return every > 0 and (layer + 1) % every == 0


class Attention(nnx.Module):
    """Multi-head causal self-attention: heads attend apart and are mixed by one matrix.

    MultiHead(x) = concat(head_1, ..., head_N) W_o,
    head_n = attention(x W_q[n], x W_k[n // G], x W_v[n // G]),   G = N / K

    Layers may differ in their window and in their rotary positions.
    """

    def __init__(self, spec: ModelSpec, layer: int = 0):
        config = self.config = spec.config
        self.window = 0 if is_each(config.global_every, layer) else config.window
        self.is_rotary = config.positions == "rotary" and not is_each(config.unrotated_every, layer)
        self.kernel = spec.attention
        dtype = spec.compute_dtype
        linear = functools.partial(Linear, bias=config.bias, dtype=dtype, std=config.init_std)
        D, N, K, H = config.d_model, config.n_head, config.n_kv_head, config.head_size
        self.query = linear(("embed", "heads"), (D, N * H))
        self.key = linear(("embed", "kv_heads"), (D, K * H))
        self.value = linear(("embed", "kv_heads"), (D, K * H))
        self.out = linear(("heads_in", "width"), (N * H, D), std=residual_std(config))
        if config.qk_norm:
            norm = functools.partial(Norm, "rmsnorm", epsilon=config.norm_epsilon, bias=False)
            self.query_norm = norm(N * H if config.qk_norm_joint else H)
            self.key_norm = norm(K * H if config.qk_norm_joint else H)

    def project(self, x_BTD: jax.Array, positions_BT: jax.Array) -> Heads:
        """The heads of x, normalised and rotated."""
        config = self.config
        # cuDNN reads arrays of their own: it would copy the parts of a joint product, and their
        # gradients would be joined again.
        apart = self.kernel == "cudnn"
        products = apply_side_by_side([self.query, self.key, self.value], x_BTD, apart=apart)
        if config.qk_norm and config.qk_norm_joint:
            products = [self.query_norm(products[0]), self.key_norm(products[1]), products[2]]
        heads = [x.reshape(*x_BTD.shape[:2], -1, config.head_size) for x in products]
        query_BTNH, key_BTKH, value_BTKH = heads
        if config.qk_norm and not config.qk_norm_joint:
            query_BTNH, key_BTKH = self.query_norm(query_BTNH), self.key_norm(key_BTKH)
        if self.is_rotary:
            theta = config.rope_theta
            scaling = RopeScaling(
                config.rope_scaling, config.rope_factor, config.rope_original_length
            )
            if self.window and config.window_rope_theta:
                theta, scaling = config.window_rope_theta, RopeScaling()
            size = int(config.head_size * config.rotary_fraction)
            turn = rotation(positions_BT, size, theta, scaling)
            query_BTNH, key_BTKH = rotate(query_BTNH, *turn), rotate(key_BTKH, *turn)
        return query_BTNH, key_BTKH, value_BTKH

    def __call__(
        self, x_BTD: jax.Array, places: Places, cached: Cached = None, dropout_key: Key = None
    ) -> tuple[jax.Array, Cached]:
        """Each position of x looks at itself and at what is before it in x, or in the cache.

        Returns [B, T, D], and the cached keys and values with those of x in their places.
        """
        heads = self.project(x_BTD, places.positions_BT)
        if cached is None:
            mixed_BTNH = self_attention(
                self.kernel,
                *heads,
                places,
                window=self.window,
                soft_cap=self.config.attention_soft_cap,
                dropout=self.config.dropout,
                dropout_key=dropout_key,
            )
        else:
            query_BTNH, key_BTKH, value_BTKH = heads
            B, _, K, _ = key_BTKH.shape
            # An index for each axis: XLA's CPU backend turns a slice of heads into two transposes.
            rows_B11, heads_11K = jnp.arange(B)[:, None, None], jnp.arange(K)[None, None, :]
            place_BTK = rows_B11, heads_11K, places.positions_BT[:, :, None]
            keys_BKSH = cached[0].at[place_BTK].set(key_BTKH)
            values_BKSH = cached[1].at[place_BTK].set(value_BTKH)
            keys_at = Places(jnp.arange(keys_BKSH.shape[2])[None, :])
            visible_BTS = visible(places, keys_at, self.window)
            keys_BSKH, values_BSKH = keys_BKSH.swapaxes(1, 2), values_BKSH.swapaxes(1, 2)
            cap = self.config.attention_soft_cap
            mixed_BTNH = attend(query_BTNH, keys_BSKH, values_BSKH, visible_BTS, soft_cap=cap)
            cached = keys_BKSH, values_BKSH
        return self.out(mixed_BTNH.reshape(*x_BTD.shape[:2], -1)), cached


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); dropout on each branch.

    In a parallel block (model.block) the MLP reads the x that attention reads. model.norm_place
    puts the norms there, after the sub-layers, or in both places.
    With model.n_expert above 1 the MLP is a mixture of experts (experts.py).
    """

    def __init__(self, spec: ModelSpec, layer: int = 0):
        config = spec.config
        self.dropout = config.dropout
        before, after = config.norm_place != "after", config.norm_place != "before"
        self.attention_norm = stream_norm(config) if before else None
        self.attention = Attention(spec, layer)
        self.attention_out_norm = stream_norm(config) if after else None
        self.kind = config.block
        own = before and self.kind != "parallel_one_norm"
        self.mlp_norm = stream_norm(config) if own else None
        self.mlp_out_norm = stream_norm(config) if after else None
        self.mlp = (Experts if config.has_experts else MLP)(config, spec.compute_dtype)

    def __call__(
        self, x_BTD: jax.Array, places: Places, cached: Cached = None, dropout_key: Key = None
    ) -> tuple[jax.Array, Routing | None, Cached]:
        """The stream after this block, how its experts were used, and the longer cache."""
        keys = [None] * 3 if dropout_key is None else list(jax.random.split(dropout_key, 3))
        read_BTD = normalised(self.attention_norm, x_BTD)
        branch_BTD, cached = self.attention(read_BTD, places, cached, keys[0])
        branch_BTD = normalised(self.attention_out_norm, branch_BTD)
        before_BTD, x_BTD = x_BTD, x_BTD + drop(branch_BTD, self.dropout, keys[1])
        if self.kind != "parallel_one_norm":
            read_BTD = normalised(self.mlp_norm, x_BTD if self.kind == "sequential" else before_BTD)
        branch_BTD, routing = self.mlp(read_BTD)
        branch_BTD = normalised(self.mlp_out_norm, branch_BTD)
        return x_BTD + drop(branch_BTD, self.dropout, keys[2]), routing, cached


def normalised(norm: Norm | None, x_BTD: jax.Array) -> jax.Array:
    """norm(x), or x where a block has no norm."""
    return x_BTD if norm is None else norm(x_BTD)


class GPT(nnx.Module):
    """Token ids in, a score for each possible next token out.

    Args:
      stacked: hold one Block with the weights of all layers, [L, ...]. Such a model is for
        training: it computes `hidden`, but extends no cache.
    """

    def __init__(self, spec: ModelSpec, *, stacked: bool = False):
        config = spec.config
        if stacked and (config.global_every or config.unrotated_every):
            raise UsageError(
                "training.scan_layers takes layers that are all alike, and model.global_every = "
                f"{config.global_every}, model.unrotated_every = {config.unrotated_every}; set "
                "training.scan_layers = false"
            )
        self.spec = spec
        self.stacked = stacked
        self.embed = Embed(spec)
        self.blocks: Any = (
            nnx.Dict({"*": Block(spec)})
            if stacked
            else nnx.List([Block(spec, layer) for layer in range(config.n_layer)])
        )
        self.final_norm = stream_norm(config)
        if not config.tie_embeddings:
            linear = functools.partial(Linear, dtype=spec.compute_dtype, std=config.init_std)
            shape = (config.d_model, spec.padded_vocab_size)
            self.head = linear(("embed", "vocab"), shape, bias=config.head_bias)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """float32 logits [B, T, vocab_size]; those at t score the token at t + 1."""
        return self.logits(self.hidden(tokens_BT))

    def hidden(self, tokens_BT: jax.Array, segments_BT: jax.Array | None = None) -> jax.Array:
        """What the head reads: [B, T, D] after the final norm, or [B, T, D + 1] with a head's bias.

        Args:
          tokens_BT: int32 ids in [0, vocab_size), T <= context_length. Ids outside are the
            caller's error: a gather on an accelerator cannot complain.
          segments_BT: int32, the document of each token if documents are packed in one window,
            each in one piece. A token sees its own document alone, and positions begin anew
            with each. None: each row is one text.
        """
        return self.hidden_and_routing(tokens_BT, segments_BT)[0]

    def hidden_and_routing(
        self,
        tokens_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        *,
        dropout_key: Key = None,
        remat: Remat = "none",
    ) -> tuple[jax.Array, Routing | None]:
        """`hidden` as training needs it, and how the experts of each block were used.

        Args:
          dropout_key: seeds this pass's dropout; None turns dropout off.
          remat: what each block keeps for its gradient.
        Returns:
          [B, T, D], and the Routing of all blocks, [L]; None in a dense model.
        """
        x_BTD, places = self.embedded(tokens_BT, segments_BT)
        if dropout_key is not None:
            x_BTD = drop(x_BTD, self.spec.config.dropout, jax.random.fold_in(dropout_key, 0))
        # Dropout is drawn in the natural order, so that a mesh does not change it.
        zigzag = is_divided("sequence") and dropout_key is None
        if zigzag:
            order_T = positions_on_devices(tokens_BT.shape[1], shares("sequence"))
            x_BTD, places = to_zigzag(x_BTD), jax.tree.map(lambda x: x[:, order_T], places)

        def through(graph, x_BTD, layer, weights):
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, layer + 1)
            block = nnx.merge(graph, weights)
            x_BTD, routing, _ = block(x_BTD, places, dropout_key=key)
            return constrain(x_BTD, "batch", "sequence", "width"), routing

        if self.stacked:  # a loop that is compiled once
            graph, weights_L = nnx.split(self.blocks["*"])
            body = keep(remat, functools.partial(through, graph), in_scan=True)
            layers_L = jnp.arange(self.spec.config.n_layer), weights_L
            x_BTD, routing_L = jax.lax.scan(lambda x, layer: body(x, *layer), x_BTD, layers_L)
        else:
            routings = []
            for layer, block in enumerate(self.blocks):
                graph, weights = nnx.split(block)
                x_BTD, routing = keep(remat, functools.partial(through, graph))(
                    x_BTD, layer, weights
                )
                routings.append(routing)
            routing_L = jax.tree.map(lambda *parts: jnp.stack(parts), *routings)
        return self._for_head(from_zigzag(x_BTD) if zigzag else x_BTD), routing_L

    def embedded(
        self, tokens_BT: jax.Array, segments_BT: jax.Array | None = None
    ) -> tuple[jax.Array, Places]:
        """x_0 of whole rows, and where each token stands."""
        if segments_BT is None:
            places, x_BTD = Places(jnp.arange(tokens_BT.shape[1])[None, :]), self.embed(tokens_BT)
        else:
            places = Places(segment_positions(segments_BT), segments_BT)
            x_BTD = self.embed(tokens_BT, places.positions_BT)
        return constrain(x_BTD, "batch", "sequence", "width"), places

    def extend(self, tokens_BT: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """`hidden` of tokens that follow those in the cache, and the cache with them in it.

        Row b's tokens sit at positions length_B[b] + [0, T). For prompts of different lengths, pad
        them on the right, extend an empty cache, then set length_B to the true lengths; the entries
        of the padding are masked until they are overwritten.

        Positions beyond the capacity are dropped. Real tokens there are the caller's error, as ids
        outside the vocabulary are; padding may reach over the end.
        """
        T = tokens_BT.shape[1]
        positions_BT = cache.length_B[:, None] + jnp.arange(T)[None, :]
        x_BTD = self.embed(tokens_BT, positions_BT)
        layers = []
        for block, *cached in zip(self.blocks, cache.keys, cache.values, strict=True):
            x_BTD, _, longer = block(x_BTD, Places(positions_BT), tuple(cached))
            layers.append(longer)
        keys, values = zip(*layers, strict=True)
        return self._for_head(x_BTD), KVCache(keys, values, cache.length_B + T)

    def _for_head(self, x_BTD: jax.Array) -> jax.Array:
        """The final norm, followed by a one for the head's bias to multiply, if there is one."""
        x_BTD = self.final_norm(x_BTD)
        if not self.spec.config.head_bias:
            return x_BTD
        return jnp.concatenate([x_BTD, jnp.ones_like(x_BTD[..., :1])], axis=-1)

    def head_weight(self) -> jax.Array:
        """W_head [D, padded vocabulary] in the compute dtype; E^T when tied.

        A bias is one more row, which multiplies the one at the end of `hidden`.
        """
        tied = self.spec.config.tie_embeddings
        weight_DV = self.embed.weight[...].T if tied else self.head.weight[...]
        if not tied and self.head.bias is not None:
            weight_DV = jnp.concatenate([weight_DV, self.head.bias[...][None]])
        return weight_DV.astype(self.spec.compute_dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 [..., vocab_size] from [..., D]: the padding of the vocabulary is cut away."""
        product = rows_product if hidden.ndim == 2 else jnp.matmul
        scores = product(hidden, self.head_weight(), preferred_element_type=jnp.float32)
        return soft_cap(scores[..., : self.spec.vocab_size], self.spec.config.logit_soft_cap)


def initialise(spec: ModelSpec, key: jax.Array, *, stacked: bool = False) -> Params:
    """Fresh float32 parameters; each is a pure function of the key, its name and its shape.

    A stacked layer has the same weights as a single one. One loop draws all weights of one shape,
    because each separate draw takes a third of a second to compile.
    """
    params: Params = {}
    by_shape: dict[tuple[int, ...], dict[str, float]] = collections.defaultdict(dict)
    for name, (_, variable) in _by_name(nnx.state(GPT(spec, stacked=stacked))).items():
        value, std = variable.get_value(), variable.get_metadata("std", 0.0)
        layers = (spec.config.n_layer,) if is_stacked(name) else ()
        params[name] = jnp.broadcast_to(value, layers + value.shape)
        if std:
            by_shape[value.shape][name] = std
    for shape, stds in by_shape.items():
        params |= _draw(key, shape, stds, spec.config.n_layer)
    return params


def _draw(key: jax.Array, shape: tuple[int, ...], stds: dict[str, float], layers: int) -> Params:
    """Weights of one shape, single or stacked: name -> N(0, std^2)."""
    parts = [layer_names(name, layers) for name in stds]
    hashes = [zlib.crc32(part.encode()) for part in itertools.chain(*parts)]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.array(hashes, jnp.uint32))
    draws = jax.lax.map(lambda key: jax.random.normal(key, shape), keys)
    ends = list(itertools.accumulate(map(len, parts)))
    return {
        name: stds[name] * (draws_L if is_stacked(name) else draws_L[0])
        for name, draws_L in zip(stds, jnp.split(draws, ends[:-1]), strict=True)
    }


def bind(spec: ModelSpec, params: Params) -> GPT:
    """The model with these parameters in place; use inside jit, where it costs nothing."""
    graph, variables = _abstract(spec, any(map(is_stacked, params)))
    flat = [(path, variable.replace(params[name])) for name, (path, variable) in variables.items()]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def abstract_params(spec: ModelSpec) -> dict[str, jax.ShapeDtypeStruct]:
    """name -> shape and dtype, without allocating anything."""
    return {name: variable.get_value() for name, (_, variable) in _abstract(spec)[1].items()}


def logical_axes(spec: ModelSpec, *, stacked: bool = False) -> dict[str, tuple[str, ...]]:
    """name -> logical axes, as written beside each weight above; a stack's first is "layer"."""
    return {
        name: (("layer",) if is_stacked(name) else ()) + variable.get_metadata("axes")
        for name, (_, variable) in _abstract(spec, stacked)[1].items()
    }


@functools.lru_cache(maxsize=32)
def _abstract(spec: ModelSpec, stacked: bool = False) -> tuple[Any, Variables]:
    graph, state = nnx.split(nnx.eval_shape(lambda: GPT(spec, stacked=stacked)), nnx.Param)
    return graph, _by_name(state)


def _by_name(state: nnx.State) -> Variables:
    return {".".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(state)}
