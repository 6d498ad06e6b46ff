"""Memory and time of a step by arithmetic alone: no compiler, no devices, milliseconds.

A search uses it to choose what is worth compiling, and a plan for devices whose compiler is not
here uses it for the memory that the step needs beside its state. What it is not: exact. It knows
the layers of the model and the mesh, not what a compiler joins, repeats or forgets.

Sources: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models"
(what a block keeps); Rajbhandari et al. 2020, ZeRO, and Shoeybi et al. 2019, Megatron-LM (what is
sent).
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
from jax.sharding import AbstractMesh, AxisType

from llm.config import OptimizerConfig, TrainingConfig
from llm.model.devices import Sheet
from llm.model.experts import slots
from llm.model.flops import flops_per_token
from llm.model.gpt import ModelSpec, abstract_params
from llm.model.grouped import block_count, block_rows
from llm.model.loss import chunks_for
from llm.model.sharding import LOGICAL_TO_MESH
from llm.planning.kernel_cost import PRODUCTS
from llm.planning.roofline import bandwidth
from llm.training.optimizer import make_optimizer
from llm.training.state import TrainState, abstract_state


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Bytes of the training state on one device."""

    weights: int
    optimizer: int
    other: int

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.other


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh of no devices: enough to know what lies where."""
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes))


def state_bytes(state: TrainState) -> StateBytes:
    """Of an abstract state, by the shape of each array's share."""

    def count(tree: object) -> int:
        leaves = jax.tree.leaves(tree)
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in leaves
            if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        )

    # The random key's two words are left out: its shares have no size in bytes.
    return StateBytes(
        count(state.weights), count(state.opt_state), count((state.step, state.loss_history))
    )


@functools.lru_cache(maxsize=256)
def _state_bytes_on(
    spec: ModelSpec, optimizer: OptimizerConfig, sizes: tuple[tuple[str, int], ...]
) -> StateBytes:
    mesh = abstract_mesh(dict(sizes))
    return state_bytes(abstract_state(spec, make_optimizer(optimizer), mesh, stacked=True))  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """One step of one model on one mesh, per device.

    Args:
      sizes: mesh axis -> devices along it.
      device_kind: what they are, as JAX names it.

        R rows of a forward pass  T positions, both of one device  t shares of heads and columns
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
    def rows(self) -> int:
        whole = self.training.micro_batch_size or self.training.batch_size
        return max(1, whole // self.shares("batch"))

    @property
    def positions(self) -> int:
        return self.spec.config.context_length // self.shares("sequence")

    @property
    def tokens(self) -> float:
        """Of a step, on each device."""
        devices = math.prod(self.sizes.values())
        return self.training.batch_size * self.spec.config.context_length / devices

    @property
    def element(self) -> int:
        """Bytes of a number in the compute dtype."""
        return 2 if self.spec.compute_dtype == "bfloat16" else 4

    @property
    def state(self) -> StateBytes:
        return _state_bytes_on(self.spec, self.optimizer, tuple(self.sizes.items()))

    @property
    def is_dropless(self) -> bool:
        return self.spec.config.has_experts and not self.training.capacity_factor

    @property
    def mlp_rows(self) -> float:
        """Rows that go through one block's MLP; of experts with what their groups are filled up."""
        config, tokens = self.spec.config, self.rows * self.positions
        if not config.has_experts:
            return tokens
        E, K = config.n_expert, config.n_expert_active
        if self.is_dropless:
            return block_rows(self._choices, E) * block_count(self._choices, E)
        return self.rows * E * slots(config.context_length, E, K, self.training.capacity_factor)

    @property
    def _choices(self) -> int:
        """Of experts, by the tokens of one device and one pass."""
        return self.rows * self.positions * self.spec.config.n_expert_active

    def kept_per_layer(self) -> float:
        """Bytes that a block keeps for its backward pass, by training.remat."""
        match self.training.remat:
            case "none":
                return self._products() + self._rest() + self._twice() + self._scores_bytes()
            case "dots":
                return self._products() + self._kernel_results()
            case "block":
                return self._stream()
            case "offload":
                return 0.0

    def _stream(self) -> float:
        return self.rows * self.positions * self.spec.config.d_model * self.element

    def _products(self) -> float:
        """The block's input and its products with weights."""
        config = self.spec.config
        heads = (config.n_head + 2 * config.n_kv_head) * config.head_size / self.shares("heads")
        columns = (self._matrices - 1) * config.d_ff / self.shares("mlp")
        numbers = self.rows * self.positions * (2 * config.d_model + heads)
        return (numbers + self.mlp_rows * (config.d_model + columns)) * self.element

    def _rest(self) -> float:
        """What is no product with a weight: norms, rotated heads, the hidden layer; of experts the
        rows before and after they are brought to their groups."""
        config = self.spec.config
        heads = (2 * config.n_head + config.n_kv_head) * config.head_size / self.shares("heads")
        numbers = self.rows * self.positions * (2 * config.d_model + heads)
        hidden = self.mlp_rows * config.d_ff / self.shares("mlp")
        moved = 3 * self.mlp_rows * config.d_model if config.has_experts else 0.0
        return (numbers + hidden + moved) * self.element

    def _twice(self) -> float:
        """The experts' hidden layer once more, which libtpu 0.0.52 keeps in two orders or paddings
        where nothing is computed again: by what it counts, not by why."""
        if not self.spec.config.has_experts:
            return 0.0
        return self.mlp_rows * self.spec.config.d_ff / self.shares("mlp") * self.element

    def _kernel_results(self) -> float:
        """What a kernel's backward pass reads beside its inputs: the mixture, and a sum a query."""
        if self.spec.attention == "plain":
            return 0.0
        config = self.spec.config
        heads = self.rows * self.positions * config.n_head / self.shares("heads")
        return heads * (config.head_size * self.element + 4)

    def _scores_bytes(self) -> float:
        """Scores in float32, weights in the compute dtype."""
        return self.scores() * (4 + self.element)

    def scores(self) -> float:
        """Numbers of one block's attention scores that exist at once; a kernel never holds them."""
        if self.spec.attention != "plain":
            return 0.0
        config = self.spec.config
        heads = config.n_head / self.shares("heads")
        return self.rows * heads * self.positions * config.context_length

    def temporaries(self) -> float:
        """Bytes beside the state at the fullest moment, in a block's backward pass or the loss."""
        config = self.spec.config
        gradients = float(self.state.weights)
        if self.training.accumulation > 1:
            gradients *= 2  # the sum, and those of one forward pass
        kept = config.n_layer * self.kept_per_layer()
        block = 2 * (self._products() + self._rest()) + self._scores_bytes() + self._gathered()
        return gradients + kept + max(block, self._loss())

    def _gathered(self) -> float:
        """One block's weights as a device holds them whole: for each pass, and their gradient."""
        dense, experts = self._block_weights()
        if not self.is_dropless:
            experts /= self.shares("expert")
        is_divided = self.shares("embed") > 1
        is_brought = is_divided or (self.is_dropless and self.shares("expert") > 1)
        size = dense * is_divided + experts * is_brought
        return 3 * self.element * size / self.shares("heads")

    @property
    def _matrices(self) -> int:
        return 3 if self.spec.config.activation == "swiglu" else 2

    def _block_weights(self) -> tuple[float, float]:
        """Numbers in one block's matrices: those of the experts apart."""
        config = self.spec.config
        heads = 2 * (config.n_head + config.n_kv_head) * config.head_size * config.d_model
        mlp = self._matrices * config.d_model * config.d_ff
        if config.has_experts:
            return heads, config.n_expert * mlp
        return heads + mlp, 0.0

    def _loss(self) -> float:
        """One chunk's logits and their gradient, the head whole and its gradient; of several chunks
        that gradient's sum in float32."""
        vocabulary = self.spec.padded_vocab_size / self.shares("vocab")
        whole = self.spec.config.context_length
        chunks = chunks_for(
            self.rows,
            whole,
            self.spec.padded_vocab_size,
            self.training.loss_chunk,
            self.device_kind,
        )
        logits = self.rows * self.positions / chunks * vocabulary
        head = self.spec.config.d_model * vocabulary
        gradient = self.element if chunks == 1 else 4
        return (4 + self.element) * logits + (self.element + gradient) * head

    def memory(self) -> float:
        """Bytes on one device."""
        return self.state.total + self.temporaries()

    def seconds(self, sheet: Sheet) -> float:
        """A step, when arithmetic, memory and links all overlap."""
        return max(
            self.tokens * self.flops_per_token() / sheet.bfloat16_flops,
            self.traffic() / sheet.memory_bandwidth,
            self.link_seconds(sheet),
        )

    def flops_per_token(self) -> float:
        """With what is computed again, and what experts' groups are filled up with."""
        config = self.spec.config
        head = 6 * config.d_model * self.spec.vocab_size
        attention = 6 * config.n_layer * config.d_model * config.context_length
        blocks = flops_per_token(self.spec) - head - attention
        if config.has_experts:
            idle = self.mlp_rows / (self.rows * self.positions) - config.n_expert_active
            blocks += 6 * idle * config.n_layer * self._matrices * config.d_model * config.d_ff
        if self.training.remat not in ("none", "dots"):
            # All of a block's forward pass but its last product, which no gradient reads.
            rows = self.mlp_rows / (self.rows * self.positions)
            blocks += blocks / 3 - 2 * rows * config.n_layer * config.d_model * config.d_ff
        return head + blocks + self.attention_flops_per_token()

    def attention_flops_per_token(self) -> float:
        """Every key where no kernel leaves out those ahead; a kernel's forward pass is computed
        again unless its results are kept."""
        config, kernel = self.spec.config, self.spec.attention
        forward, backward = PRODUCTS[kernel]
        kept = ("none",) if kernel == "plain" else ("none", "dots")
        passes = forward * (1 if self.training.remat in kept else 2) + backward
        seen = config.context_length / (1 if kernel == "plain" else 2)
        return passes * 2 * config.n_layer * config.d_model * seen

    def traffic(self) -> float:
        """Bytes to and from memory: state, weights for each pass, activations, scores.

        An activation is written and read a dozen times: so in programs of llama3_8b and of mixtures
        of experts for TPUs (libtpu 0.0.52), where the count was within a third of this.
        """
        passes = self.training.accumulation
        layers = self.spec.config.n_layer
        dense, experts = self._block_weights()
        experts /= 1 if self.is_dropless else self.shares("expert")
        weights = 3 * self.element * (dense + experts)
        if self.is_dropless:
            # Each block of rows reads its expert's matrices, and adds its part to their gradients.
            blocks = self.mlp_rows / block_rows(self._choices, self.spec.config.n_expert)
            weights += blocks * experts / self.spec.config.n_expert * (2 * self.element + 8)
        activations = layers * (12 * (self._products() + self._rest()) + 24 * self.scores())
        update = 2 * self.state.total + 4 * self.state.weights
        return update + passes * (layers * weights / self.shares("heads") + activations)

    def link_seconds(self, sheet: Sheet) -> float:
        """What `sent` takes, one axis after the other; on a torus each along one dimension."""
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

        fsdp: weights for each pass, gradients back. data: gradients, all-reduced. tensor: the
        stream after each half of a block, forward, again, and backward. context: keys and values,
        gathered, and gradients. expert: dropless, the experts as fsdp; with a capacity, rows to
        their experts and back; and gradients of all other weights.
        """
        passes, layers = self.training.accumulation, self.spec.config.n_layer
        sharded, tensor = self.shares("embed"), self.shares("heads")
        context, expert = self.shares("sequence"), self.shares("expert")
        copies = self.shares("batch") // (sharded * expert)
        weights = self.state.weights / 4  # numbers of one device's share
        of_experts = weights * self._share_of_experts()
        reduced = passes * 8 * weights
        keys = 2 * self.spec.config.n_kv_head * self.spec.config.head_size / tensor
        gathered = 3 * self.element * self.rows * self.spec.config.context_length * keys
        rows = self.mlp_rows * self.spec.config.d_model * self.element
        to_experts = layers * 4 * rows * (1 - 1 / expert)
        if self.is_dropless:
            to_experts = 3 * self.element * of_experts * sharded * (expert - 1)
        return {
            "fsdp": passes * 3 * self.element * weights * (sharded - 1),
            "data": reduced * (1 - 1 / copies),
            "expert": passes * (to_experts + 8 * (weights - of_experts) * (1 - 1 / expert)),
            "tensor": passes * layers * 12 * self._stream() * (1 - 1 / tensor),
            "context": (reduced + passes * layers * gathered) * (1 - 1 / context),
        }

    def _share_of_experts(self) -> float:
        """Of the numbers of one device's share of the weights."""
        experts = self._block_weights()[1]
        experts *= self.spec.config.n_layer / self.shares("expert")
        others = sum(
            math.prod(leaf.shape)
            for name, leaf in abstract_params(self.spec).items()
            if ".mlp." not in name
        )
        return experts / (experts + others)
