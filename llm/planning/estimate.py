"""Memory, FLOPs and time of a step by arithmetic: no compiler, no devices, milliseconds.

A search ranks candidates by it. A plan takes from it what no compiler reports: FLOPs with what is
computed again, memory traffic, and for GPUs that are not here the memory beside the state. It knows
the layers of the model and the mesh, not what a compiler joins, repeats or drops, so it is not
exact.

Sources: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models"
(what a block keeps); Rajbhandari et al. 2020, ZeRO, and Shoeybi et al. 2019, Megatron-LM (what is
sent); Dao 2023, "FlashAttention-2" (products of attention kernels).
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType

from llm.config import OptimizerConfig, TrainingConfig
from llm.model.flops import flops_per_token, peak_flops
from llm.model.gpt import ModelSpec, abstract_params
from llm.model.grouped import block_count, block_rows
from llm.model.loss import chunks_for
from llm.model.sharding import LOGICAL_TO_MESH
from llm.planning.devices import Sheet
from llm.planning.roofline import Roofline, bandwidth
from llm.training.optimizer import make_optimizer
from llm.training.state import TrainState, abstract_state

# Attention kernel -> its products forward and backward, each 2 H FLOPs for each query and key.
# Splash's two backward kernels both compute the scores and their gradients again.
PRODUCTS = {"plain": (2, 4), "cudnn": (2, 5), "splash": (2, 7)}


class StateBytes(NamedTuple):
    """Bytes of the training state on one device."""

    weights: int
    optimizer: int
    other: int


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh without devices: enough to know how arrays are divided."""
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes))


def state_bytes(state: TrainState) -> StateBytes:
    """Sizes of one device's shares of an abstract state.

    The random key is left out: its shares have no size in bytes, and it is two words.
    """

    def count(tree: object) -> int:
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
            if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        )

    return StateBytes(
        count(state.weights), count(state.opt_state), count((state.step, state.loss_history))
    )


@functools.lru_cache(maxsize=256)
def _state_bytes_on(
    spec: ModelSpec, optimizer: OptimizerConfig, sizes: tuple[tuple[str, int], ...]
) -> StateBytes:
    mesh = abstract_mesh(dict(sizes))
    return state_bytes(abstract_state(spec, make_optimizer(optimizer), mesh, stacked=True))  # type: ignore[arg-type]


class BlockBytes(NamedTuple):
    """Bytes of one block's activations on one device in a forward pass.

    stream: the block's input. hidden: the MLP's hidden layer. products: the input and all products
    with weights. rest: norms, rotated heads, the hidden layer, and the experts' rows before and
    after they are sorted into groups. scores: attention scores in float32, their softmax in the
    compute dtype. kernel_results: the output of an attention kernel, and a sum for each query.
    """

    stream: float
    hidden: float
    products: float
    rest: float
    scores: float
    kernel_results: float


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """One step of one model on one mesh. All figures are for one device.

    Args:
      sizes: mesh axis -> devices along it.
      device_kind: the device, as JAX names it.
    """

    spec: ModelSpec
    optimizer: OptimizerConfig
    training: TrainingConfig
    sizes: Mapping[str, int]
    device_kind: str = ""

    def shares(self, logical_axis: str) -> int:
        names = LOGICAL_TO_MESH[logical_axis]
        names = (names,) if isinstance(names, str) else names or ()
        return math.prod(self.sizes.get(name, 1) for name in names)

    @property
    def state(self) -> StateBytes:
        return _state_bytes_on(self.spec, self.optimizer, tuple(self.sizes.items()))

    @property
    def rows(self) -> int:
        """Sequences of one forward pass."""
        whole = self.training.micro_batch_size or self.training.batch_size
        return max(1, whole // self.shares("batch"))

    @property
    def positions(self) -> int:
        """Tokens of one sequence."""
        return self.spec.config.context_length // self.shares("sequence")

    @property
    def tokens(self) -> float:
        """Tokens of a step."""
        devices = math.prod(self.sizes.values())
        return self.training.batch_size * self.spec.config.context_length / devices

    @property
    def element(self) -> int:
        """Bytes of a number in the compute dtype."""
        return 2 if self.spec.compute_dtype == "bfloat16" else 4

    @property
    def matrices(self) -> int:
        """Matrices of an MLP."""
        return 3 if self.spec.config.activation == "swiglu" else 2

    @property
    def mlp_rows(self) -> float:
        """Rows of one block's MLP, or of its experts with what fills up their groups."""
        config, tokens = self.spec.config, self.rows * self.positions
        if not config.has_experts:
            return tokens
        choices = tokens * config.n_expert_active
        return block_rows(choices, config.n_expert) * block_count(choices, config.n_expert)

    def block_weights(self) -> tuple[float, float]:
        """Numbers in one block's matrices: without the experts, and those of the experts."""
        config = self.spec.config
        heads = 2 * (config.n_head + config.n_kv_head) * config.head_size * config.d_model
        mlp = self.matrices * config.d_model * config.d_ff
        return (heads, config.n_expert * mlp) if config.has_experts else (heads + mlp, 0.0)

    def scores(self) -> float:
        """Numbers in one block's attention scores that exist at once; a kernel never holds them."""
        if self.spec.attention != "plain":
            return 0.0
        heads = self.spec.config.n_head / self.shares("heads")
        return self.rows * heads * self.positions * self.spec.config.context_length

    # Bytes in memory.

    def memory(self) -> float:
        """State and temporaries."""
        return sum(self.state) + self.temporaries()

    def temporaries(self) -> float:
        """Bytes beside the state at the fullest moment: in a block's backward pass or the loss."""
        gradients = float(self.state.weights)
        if self.training.accumulation > 1:
            gradients *= 2  # the sum, and those of one forward pass
        kept = self.spec.config.n_layer * self.kept_per_layer()
        parts = self.block_bytes()
        block = 2 * (parts.products + parts.rest) + parts.scores + self._gathered()
        return gradients + kept + max(block, self._loss())

    def kept_per_layer(self) -> float:
        """Bytes that a block keeps for its backward pass under training.remat."""
        parts = self.block_bytes()
        match self.training.remat:
            case "none":
                # TPU compilers hold the experts' hidden layer in two layouts.
                twice = parts.hidden if self.spec.config.has_experts else 0.0
                return parts.products + parts.rest + parts.scores + twice
            case "dots":
                return parts.products + parts.kernel_results
            case "block":
                return parts.stream
            case "offload":
                return 0.0

    def block_bytes(self) -> BlockBytes:
        config, is_plain = self.spec.config, self.spec.attention == "plain"
        tokens = self.rows * self.positions
        heads = config.n_head / self.shares("heads")
        values, keys = (
            heads * config.head_size,
            heads * config.head_size * config.n_kv_head / config.n_head,
        )
        stream, routed = tokens * config.d_model, self.mlp_rows * config.d_model
        hidden = self.mlp_rows * config.d_ff / self.shares("mlp")
        products = 2 * stream + tokens * (values + 2 * keys) + routed
        rest = 2 * stream + tokens * (2 * values + keys) + hidden
        return BlockBytes(
            stream=stream * self.element,
            hidden=hidden * self.element,
            products=(products + (self.matrices - 1) * hidden) * self.element,
            rest=(rest + 3 * routed * config.has_experts) * self.element,
            scores=self.scores() * (4 + self.element),
            kernel_results=0.0 if is_plain else tokens * (values * self.element + 4 * heads),
        )

    def _gathered(self) -> float:
        """One block's whole weights on a device, for each pass, and their gradient."""
        dense, experts = self.block_weights()
        is_divided = self.shares("embed") > 1
        is_gathered = is_divided or self.shares("expert") > 1
        size = dense * is_divided + experts * is_gathered
        return 3 * self.element * size / self.shares("heads")

    def _loss(self) -> float:
        """One chunk's logits and their gradient, the whole head and its gradient, which is summed
        in float32 if there are several chunks."""
        padded, length = self.spec.padded_vocab_size, self.spec.config.context_length
        vocabulary = padded / self.shares("vocab")
        chunks = chunks_for(self.rows, length, padded, self.training.loss_chunk, self.device_kind)
        logits = self.rows * self.positions / chunks * vocabulary
        head = self.spec.config.d_model * vocabulary
        gradient = self.element if chunks == 1 else 4
        return (4 + self.element) * logits + (self.element + gradient) * head

    # Time.

    def roofline(self, sheet: Sheet) -> Roofline:
        """The least seconds of a step."""
        return Roofline(
            compute=self.tokens * self.flops_per_token() / (peak_flops(self.device_kind) or 1.0),
            memory=self.traffic() / sheet.memory_bandwidth,
            links=self.link_seconds(sheet),
        )

    def flops_per_token(self) -> float:
        """FLOPs that are executed, with what training.remat computes again and what fills up the
        experts' groups."""
        config = self.spec.config
        head = 6 * config.d_model * self.spec.vocab_size
        attention = 6 * config.n_layer * config.d_model * config.context_length
        blocks = flops_per_token(self.spec) - head - attention
        rows = self.mlp_rows / (self.rows * self.positions)
        if config.has_experts:
            idle = rows - config.n_expert_active
            blocks += 6 * idle * config.n_layer * self.matrices * config.d_model * config.d_ff
        if self.training.remat not in ("none", "dots"):
            # All of a block's forward pass except its last product, which no gradient reads.
            blocks += blocks / 3 - 2 * rows * config.n_layer * config.d_model * config.d_ff
        padded_head = 6 * config.d_model * self.spec.padded_vocab_size
        return padded_head + blocks + self.attention_flops_per_token()

    def attention_flops_per_token(self) -> float:
        """Plain attention multiplies every query with every key, a kernel with half of them.

        A kernel's forward pass is computed again unless its results are kept.
        """
        config, kernel = self.spec.config, self.spec.attention
        forward, backward = PRODUCTS[kernel]
        kept = ("none",) if kernel == "plain" else ("none", "dots")
        passes = forward * (1 if self.training.remat in kept else 2) + backward
        seen = config.context_length / (1 if kernel == "plain" else 2)
        return passes * 2 * config.n_layer * config.d_model * seen

    def kernel_flops(self) -> float:
        """FLOPs of a step's attention kernels; 0 if attention is no kernel."""
        is_plain = self.spec.attention == "plain"
        return 0.0 if is_plain else self.tokens * self.attention_flops_per_token()

    def traffic(self) -> float:
        """Bytes to and from memory: state, weights for each pass, activations, scores.

        An activation is written and read a dozen times, as in the programs that the TPU compiler
        makes: its count was within a third of this one.
        """
        passes, layers = self.training.accumulation, self.spec.config.n_layer
        dense, experts = self.block_weights()
        weights = 3 * self.element * (dense + experts)
        if experts:
            # Each block of rows reads its expert's matrices, and adds its part to their gradients.
            choices = self.rows * self.positions * self.spec.config.n_expert_active
            blocks = block_count(choices, self.spec.config.n_expert)
            weights += blocks * experts / self.spec.config.n_expert * (2 * self.element + 8)
        parts = self.block_bytes()
        activations = layers * (12 * (parts.products + parts.rest) + 24 * self.scores())
        update = 2 * sum(self.state) + 4 * self.state.weights
        return update + passes * (layers * weights / self.shares("heads") + activations)

    def link_seconds(self, sheet: Sheet) -> float:
        """Seconds for all that `sent` counts, one axis after the other. On a torus each axis lies
        along one dimension."""
        seconds, stride = 0.0, 1
        sent = self.sent()
        for axis, size in reversed(list(self.sizes.items())):
            members = range(0, size * stride, stride)
            rate = bandwidth(members, sheet, ()) if sheet.domain else 2 * sheet.link
            seconds += sent.get(axis, 0.0) / rate
            stride *= size
        return seconds

    def sent(self) -> dict[str, float]:
        """mesh axis -> bytes that one device sends over it in a step.

        fsdp: weights for each pass, and gradients. data: gradients, all-reduced. tensor: the
        stream after each half of a block, forward, again, and backward. context: gathered keys and
        values, and gradients. expert: the experts as fsdp, and the gradients of all other weights.
        """
        passes, config = self.training.accumulation, self.spec.config
        sharded, tensor = self.shares("embed"), self.shares("heads")
        context, expert = self.shares("sequence"), self.shares("expert")
        copies = self.shares("batch") // (sharded * expert)
        weights = self.state.weights / 4  # numbers of one device's share
        of_experts = config.n_layer / expert * self.block_weights()[1]
        others = sum(
            math.prod(leaf.shape)
            for name, leaf in abstract_params(self.spec).items()
            if ".mlp." not in name
        )
        of_experts *= weights / (of_experts + others)
        reduced = passes * 8 * weights
        keys = 2 * config.n_kv_head * config.head_size / tensor
        gathered = 3 * self.element * self.rows * config.context_length * keys
        to_experts = 3 * self.element * of_experts * sharded * (expert - 1)
        return {
            "fsdp": passes * 3 * self.element * weights * (sharded - 1),
            "data": reduced * (1 - 1 / copies),
            "expert": passes * (to_experts + 8 * (weights - of_experts) * (1 - 1 / expert)),
            "tensor": passes * config.n_layer * 12 * self.block_bytes().stream * (1 - 1 / tensor),
            "context": (reduced + passes * config.n_layer * gathered) * (1 - 1 / context),
        }
