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
from llm.model.flops import flops_per_token
from llm.model.gpt import ModelSpec
from llm.model.loss import chunks_for
from llm.model.roofline import bandwidth
from llm.model.sharding import LOGICAL_TO_MESH
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

        R rows of a forward pass  T positions, both of one device  t shares of heads and columns
    """

    spec: ModelSpec
    optimizer: OptimizerConfig
    training: TrainingConfig
    sizes: Mapping[str, int]

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
    def element(self) -> int:
        """Bytes of a number in the compute dtype."""
        return 2 if self.spec.compute_dtype == "bfloat16" else 4

    @property
    def state(self) -> StateBytes:
        return _state_bytes_on(self.spec, self.optimizer, tuple(self.sizes.items()))

    def kept_per_layer(self) -> float:
        """Bytes that a block keeps for its backward pass, by training.remat."""
        match self.training.remat:
            case "none":
                return self._products() + self._rest() + self._scores_bytes()
            case "dots":
                return self._products()
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
        matrices = 2 if config.activation == "swiglu" else 1
        columns = matrices * config.d_ff / self.shares("mlp")
        numbers = 3 * config.d_model + heads + columns
        return self.rows * self.positions * numbers * self.element

    def _rest(self) -> float:
        """What is no product with a weight: norms, rotated heads, the hidden layer."""
        config = self.spec.config
        heads = (2 * config.n_head + config.n_kv_head) * config.head_size / self.shares("heads")
        numbers = 2 * config.d_model + heads + config.d_ff / self.shares("mlp")
        return self.rows * self.positions * numbers * self.element

    def _scores_bytes(self) -> float:
        """Scores in float32, weights in the compute dtype."""
        return self.scores() * (4 + self.element)

    def scores(self) -> float:
        """Numbers of one block's attention scores that exist at once; a kernel never holds them."""
        if getattr(self.spec, "attention", "plain") != "plain":
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
        gathered = 0.0
        if self.shares("embed") > 1:
            gathered = 3 * self.element * self._block_weights() / self.shares("heads")
        block = 2 * (self._products() + self._rest()) + self._scores_bytes() + gathered
        return gradients + kept + max(block, self._loss())

    def _block_weights(self) -> float:
        """Numbers in one block's matrices."""
        config = self.spec.config
        heads = 2 * (config.n_head + config.n_kv_head) * config.head_size * config.d_model
        matrices = 3 if config.activation == "swiglu" else 2
        return heads + matrices * config.d_model * config.d_ff

    def _loss(self) -> float:
        """One chunk's logits and their gradient, the head whole and its gradient."""
        vocabulary = self.spec.padded_vocab_size / self.shares("vocab")
        whole = self.spec.config.context_length
        chunks = chunks_for(self.rows, whole, self.spec.padded_vocab_size, self.training.loss_chunk)
        logits = self.rows * self.positions / chunks * vocabulary
        return 8 * logits + (4 + self.element) * self.spec.config.d_model * vocabulary

    def memory(self) -> float:
        """Bytes on one device."""
        return self.state.total + self.temporaries()

    def seconds(self, sheet: Sheet) -> float:
        """A step, when arithmetic, memory and links all overlap."""
        devices = math.prod(self.sizes.values())
        tokens = self.training.batch_size * self.spec.config.context_length / devices
        return max(
            tokens * self.flops_per_token() / sheet.bfloat16_flops,
            self.traffic() / sheet.memory_bandwidth,
            self.link_seconds(sheet),
        )

    def flops_per_token(self) -> float:
        """With what is computed again, and every key where no kernel leaves out those ahead."""
        config = self.spec.config
        head = 6 * config.d_model * self.spec.vocab_size
        attention = 6 * config.n_layer * config.d_model * config.context_length
        blocks = flops_per_token(self.spec) - head - attention
        again = {"none": (0.0, 0.0), "dots": (0.0, 1 / 3)}.get(self.training.remat, (1 / 3, 1 / 3))
        seen = 2 if self.scores() else 1
        return head + blocks * (1 + again[0]) + seen * attention * (1 + again[1])

    def traffic(self) -> float:
        """Bytes to and from memory: state, weights for each pass, activations, scores."""
        passes = self.training.accumulation
        layers = self.spec.config.n_layer
        weights = layers * self._block_weights() / self.shares("heads")
        activations = layers * (self._products() + self._rest() + 6 * self.scores())
        update = 2 * self.state.total + 4 * self.state.weights
        return update + passes * (3 * self.element * weights + 4 * activations)

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
        gathered, and gradients.
        """
        passes, layers = self.training.accumulation, self.spec.config.n_layer
        sharded, tensor = self.shares("embed"), self.shares("heads")
        context = self.shares("sequence")
        copies = self.shares("batch") // sharded
        weights = self.state.weights / 4  # numbers of one device's share
        reduced = passes * 8 * weights
        keys = 2 * self.spec.config.n_kv_head * self.spec.config.head_size / tensor
        gathered = 3 * self.element * self.rows * self.spec.config.context_length * keys
        return {
            "fsdp": passes * 3 * self.element * weights * (sharded - 1),
            "data": reduced * (1 - 1 / copies),
            "tensor": passes * layers * 12 * self._stream() * (1 - 1 / tensor),
            "context": (reduced + passes * layers * gathered) * (1 - 1 / context),
        }
