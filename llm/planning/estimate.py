"""Memory, FLOPs and time of a step by arithmetic: no compiler, no devices, milliseconds.

A search ranks candidates by it. A plan takes from it what no compiler reports: FLOPs with what is
computed again, memory traffic, and for GPUs that are not here the memory beside the state. It knows
the layers of the model and the mesh, not what a compiler joins, repeats or drops, so it is not
exact.

Sources: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models"
(what a block keeps); Rajbhandari et al. 2020, ZeRO, and Shoeybi et al. 2019, Megatron-LM (what is
sent); Dao 2023, "FlashAttention-2" (products of attention kernels).
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType

from llm.config import OptimizerConfig, TrainingConfig
from llm.model.flops import flops_per_token, peak_flops
from llm.model.gpt import ModelSpec
from llm.model.grouped import block_count, block_rows
from llm.model.loss import chunks_for
from llm.model.sharding import LOGICAL_TO_MESH
from llm.planning.devices import Sheet
from llm.planning.roofline import bandwidth
from llm.training.optimizer import make_optimizer
from llm.training.state import abstract_state

# Attention kernel -> its products forward and backward, each 2 H FLOPs for each query and key.
# Splash's two backward kernels both compute the scores and their gradients again.
PRODUCTS = {"plain": (2, 4), "cudnn": (2, 5), "splash": (2, 7)}


class StateBytes(NamedTuple):
    """Bytes of the training state on one device."""

    weights: int
    optimizer: int
    other: int


@functools.lru_cache(maxsize=256)
def _state_bytes(
    spec: ModelSpec, optimizer: OptimizerConfig, sizes: tuple[tuple[str, int], ...]
) -> StateBytes:
    """Sizes of one device's shares, without the random key, which is two words."""

    def count(tree: object) -> int:
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
            if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        )

    axes, counts = zip(*sizes, strict=True)
    mesh = AbstractMesh(counts, axes, (AxisType.Auto,) * len(axes))
    state = abstract_state(spec, make_optimizer(optimizer), mesh, stacked=True)  # type: ignore[arg-type]
    return StateBytes(
        count(state.weights), count(state.opt_state), count((state.step, state.loss_history))
    )


class Arithmetic:
    """One step of one model on one mesh. All figures are for one device.

    Attributes:
      rows: sequences of one forward pass. positions: tokens of one sequence.
      mlp_rows: rows of one block's MLP, or of its experts with what fills up their groups.
      tokens: of a step. matrices: of an MLP. element: bytes of a number in the compute dtype.
      expert_blocks: blocks of rows of one expert each (grouped.py), in one block of the model.
      mlp, experts, dense: numbers in the matrices of one MLP, of a block's experts, and of all else
        in a block.
      heads: query heads.
      stream, routed, hidden, queries, keys: bytes of a block's input, of the rows that go into its
        MLP, of the MLP's hidden layer, of all queries, and of all keys.
      products: bytes of the input and of all products with weights. rest: bytes of all else that a
        forward pass makes: norms, rotated heads, the hidden layer, and the experts' rows before
        and after they are sorted into groups.
    """

    def __init__(
        self,
        spec: ModelSpec,
        optimizer: OptimizerConfig,
        training: TrainingConfig,
        sizes: Mapping[str, int],
        device_kind: str = "",
    ):
        """Args:
        sizes: mesh axis -> devices along it.
        device_kind: the device, as JAX names it.
        """
        config = spec.config
        self.spec, self.config, self.optimizer, self.training = spec, config, optimizer, training
        self.sizes, self.device_kind = sizes, device_kind
        micro_batch = training.micro_batch_size or training.batch_size
        self.rows = max(1, micro_batch // self.shares("batch"))
        self.positions = config.context_length // self.shares("sequence")
        self.tokens = training.batch_size * config.context_length / math.prod(sizes.values())
        self.element = 2 if spec.compute_dtype == "bfloat16" else 4
        self.heads = config.n_head / self.shares("heads")
        self.matrices = 3 if config.is_gated else 2
        self.mlp = self.matrices * config.d_model * config.d_ff
        self.dense = 2 * (config.n_head + config.n_kv_head) * config.head_size * config.d_model
        self.mlp_rows, self.expert_blocks, self.experts = self.rows * self.positions, 0, 0
        if config.has_experts:
            choices, E = self.mlp_rows * config.n_expert_active, config.n_expert
            self.expert_blocks, self.experts = block_count(choices, E), E * self.mlp
            self.mlp_rows = block_rows(choices, E) * self.expert_blocks
        else:
            self.dense += self.mlp
        self.stream = self.rows * self.positions * config.d_model * self.element
        self.routed = self.mlp_rows * config.d_model * self.element
        self.hidden = self.mlp_rows * config.d_ff / self.shares("mlp") * self.element
        self.queries = self.rows * self.positions * self.heads * config.head_size * self.element
        self.keys = self.queries * config.n_kv_head / config.n_head
        self.products = 2 * self.stream + self.queries + 2 * self.keys + self.routed
        self.products += (self.matrices - 1) * self.hidden
        self.rest = 2 * self.stream + 2 * self.queries + self.keys + self.hidden
        self.rest += 3 * self.routed * config.has_experts

    def shares(self, logical_axis: str) -> int:
        names = LOGICAL_TO_MESH[logical_axis]
        names = (names,) if isinstance(names, str) else names or ()
        return math.prod(self.sizes.get(name, 1) for name in names)

    @property
    def state(self) -> StateBytes:
        return _state_bytes(self.spec, self.optimizer, tuple(self.sizes.items()))

    def scores(self) -> float:
        """Numbers in one block's attention scores that exist at once; a kernel never holds them.

        They lie in memory in float32, and after the softmax in the compute dtype.
        """
        if self.spec.attention != "plain":
            return 0.0
        return self.rows * self.heads * self.positions * self.config.context_length

    # Bytes in memory.

    def temporaries(self) -> float:
        """Bytes beside the state at the fullest moment: in a block's backward pass or the loss."""
        gradients = float(self.state.weights)
        if self.training.accumulation > 1:
            gradients *= 2  # the sum, and those of one forward pass
        kept = self.config.n_layer * self.kept_per_layer()
        block = (
            2 * (self.products + self.rest) + self.scores() * (4 + self.element) + self._gathered()
        )
        return gradients + kept + max(block, self._loss())

    def kept_per_layer(self) -> float:
        """Bytes that a block keeps for its backward pass under training.remat."""
        match self.training.remat:
            case "none":
                everything = self.products + self.rest + self.scores() * (4 + self.element)
                # TPU compilers hold the experts' hidden layer in two layouts.
                return everything + self.config.has_experts * self.hidden
            case "dots" if self.spec.attention == "plain":
                return self.products
            case "dots":
                # A kernel's backward pass reads its output and a sum for each query.
                return self.products + self.queries + 4 * self.rows * self.positions * self.heads
            case "block":
                return self.stream
            case "offload":
                return 0.0

    def _gathered(self) -> float:
        """One block's whole weights on a device, for each pass, and their gradient."""
        is_divided = self.shares("embed") > 1
        is_gathered = is_divided or self.shares("expert") > 1
        size = self.dense * is_divided + self.experts * is_gathered
        return 3 * self.element * size / self.shares("heads")

    def _loss(self) -> float:
        """One chunk's logits and their gradient, the whole head and its gradient, which is summed
        in float32 if there are several chunks."""
        padded, length = self.spec.padded_vocab_size, self.config.context_length
        vocabulary = padded / self.shares("vocab")
        chunks = chunks_for(self.rows, length, padded, self.training.loss_chunk, self.device_kind)
        logits = self.rows * self.positions / chunks * vocabulary
        head = self.config.d_model * vocabulary
        gradient = self.element if chunks == 1 else 4
        return (4 + self.element) * logits + (self.element + gradient) * head

    # Time.

    def roofline(self, sheet: Sheet) -> dict[str, float]:
        """The seconds that arithmetic, memory and links need for a step at least (roofline.py)."""
        peak = peak_flops(self.device_kind) or math.nan
        return {
            "compute": self.tokens * self.flops_per_token() / peak,
            "memory": self.traffic() / sheet.memory_bandwidth,
            "links": self.link_seconds(sheet),
        }

    def flops_per_token(self) -> float:
        """FLOPs that are executed, with what training.remat computes again and what fills up the
        experts' groups."""
        config = self.config
        head = 6 * config.d_model * self.spec.vocab_size
        attention = 6 * config.n_layer * config.d_model * config.context_length
        blocks = flops_per_token(self.spec) - head - attention
        rows = self.mlp_rows / (self.rows * self.positions)
        if config.has_experts:
            idle = rows - config.n_expert_active
            blocks += 6 * idle * config.n_layer * self.mlp
        if self.training.remat not in ("none", "dots"):
            # All of a block's forward pass except its last product, which no gradient reads.
            blocks += blocks / 3 - 2 * rows * config.n_layer * config.d_model * config.d_ff
        padded_head = 6 * config.d_model * self.spec.padded_vocab_size
        return padded_head + blocks + self.attention_flops_per_token()

    def attention_flops_per_token(self) -> float:
        """Plain attention multiplies every query with every key, a kernel with half of them.

        A kernel's forward pass is computed again unless its results are kept.
        """
        config, kernel = self.config, self.spec.attention
        forward, backward = PRODUCTS[kernel]
        kept = ("none",) if kernel == "plain" else ("none", "dots")
        passes = forward * (1 if self.training.remat in kept else 2) + backward
        seen = config.context_length / (1 if kernel == "plain" else 2)
        return passes * 2 * config.n_layer * config.d_model * seen

    def traffic(self) -> float:
        """Bytes to and from memory: state, weights for each pass, activations, scores.

        An activation is written and read a dozen times, as in the programs that the TPU compiler
        makes: its count was within a third of this one.
        """
        passes, layers = self.training.accumulation, self.config.n_layer
        weights = 3 * self.element * (self.dense + self.experts)
        # Each block of rows reads its expert's matrices, and adds its part to their gradients.
        weights += self.expert_blocks * self.mlp * (2 * self.element + 8)
        activations = layers * (12 * (self.products + self.rest) + 24 * self.scores())
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
        passes, config = self.training.accumulation, self.config
        sharded, tensor = self.shares("embed"), self.shares("heads")
        context, expert = self.shares("sequence"), self.shares("expert")
        copies = self.shares("batch") // (sharded * expert)
        weights = self.state.weights / 4  # numbers of one device's share
        of_experts = config.n_layer * self.experts / (expert * sharded * tensor)
        reduced = passes * 8 * weights
        gathered = 6 * self.keys * context  # keys and values: forward, again, and gradients
        to_experts = 3 * self.element * of_experts * sharded * (expert - 1)
        return {
            "fsdp": passes * 3 * self.element * weights * (sharded - 1),
            "data": reduced * (1 - 1 / copies),
            "expert": passes * (to_experts + 8 * (weights - of_experts) * (1 - 1 / expert)),
            "tensor": passes * config.n_layer * 12 * self.stream * (1 - 1 / tensor),
            "context": (reduced + passes * config.n_layer * gathered) * (1 - 1 / context),
        }
