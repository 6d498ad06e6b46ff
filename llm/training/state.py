"""TrainState: everything that one step hands to the next, born on the mesh.

weights ── float32 master weights, flat and named        step ── updates done
opt_state ── optax's, laid out as its weights            key ── root of all randomness

With `training.scan_layers` the blocks' weights are stacked (llm/model/stack.py), in here alone:
`params` and `to_groups` name single layers, so that all that is outside of training sees one model.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from llm.errors import UsageError
from llm.model.gpt import ModelSpec, Params, abstract_params, initialise, logical_axes
from llm.model.sharding import replicated, tree_shardings
from llm.model.stack import stack_layers, unstack_layers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: int32 [].
      weights: Params, blocks stacked or not.
      key: typed PRNG key, never advanced; the randomness of step n is fold_in(key, n).
      loss_history: float32 [HISTORY], losses of the newest updates that were applied; step n is in
        slot n mod HISTORY, NaN if there is none yet.
    """

    step: jax.Array
    weights: Params
    opt_state: optax.OptState
    key: jax.Array
    loss_history: jax.Array

    @property
    def params(self) -> Params:
        """The weights under the names of single layers; copies if they are stacked."""
        return unstack_layers(self.weights)


# Losses that a spike is measured against: enough for a spread, few enough to follow the curve.
HISTORY = 64

# What a checkpoint holds: "params" apart, so that a sampler reads nothing else.
Groups = dict[str, dict[str, Any]]


def check_room(spec: ModelSpec, mesh: Mesh, rows: int) -> None:
    """Refuse a model that the devices cannot hold, before its text is read and compiling begins.

    What counts is the least that a step keeps, spread evenly: weights, gradients or a moment, and
    another moment in float32, and once the residual stream of a micro-batch. A step takes more, and
    `python -m llm plan` says how much.

    Args:
      rows: sequences of a forward pass, over all devices.
    Raises:
      UsageError: with both sizes.
    """
    config = spec.config
    weights = sum(math.prod(weight.shape) for weight in abstract_params(spec).values())
    stream = 2 * rows * config.context_length * config.d_model
    least = (12 * weights + stream) / mesh.size
    device = mesh.local_devices[0]
    room = (device.memory_stats() or {}).get("bytes_limit")
    if room is None and device.platform == "cpu":
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        room = memory / len(mesh.local_devices)
    if room is not None and least > room:
        raise UsageError(
            f"{weights:,} parameters and {rows:,} sequences at once need at least "
            f"{least / 1e9:,.1f} GB on each of {mesh.size} devices, which have {room / 1e9:,.1f} GB"
            ": take a smaller model or training.micro_batch_size, or more devices"
        )


def create_state(
    spec: ModelSpec,
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: Mesh,
    *,
    stacked: bool = False,
    weights: Params | None = None,
) -> TrainState:
    """A fresh state, each array created in its shards: no device ever holds the whole model.

    Args:
      weights: stacked or not as the state's, and taken over; None: random ones.
    """
    create = functools.partial(_create, spec, optimizer, seed, stacked)
    shardings = state_shardings(spec, optimizer, mesh, stacked=stacked)
    return jax.jit(create, out_shardings=shardings, donate_argnums=0)(weights)


def abstract_state(
    spec: ModelSpec, optimizer: optax.GradientTransformation, mesh: Mesh, *, stacked: bool = False
) -> TrainState:
    """Shapes, dtypes and shardings of the state, without allocating it."""
    shapes = jax.eval_shape(functools.partial(_create, spec, optimizer, 0, stacked))
    shardings = state_shardings(spec, optimizer, mesh, stacked=stacked)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def state_shardings(
    spec: ModelSpec, optimizer: optax.GradientTransformation, mesh: Mesh, *, stacked: bool = False
) -> TrainState:
    """The state's tree with a NamedSharding at each leaf.

    A moment lies as its weight does: it sits under the weight's name and has its shape.
    """
    weights = tree_shardings(mesh, logical_axes(spec, stacked=stacked))
    shapes = jax.eval_shape(functools.partial(_create, spec, optimizer, 0, stacked))

    def sharding(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        names = [part.key for part in path if isinstance(part, jax.tree_util.DictKey)]
        named = [name for name in names if name in weights]
        if named and leaf.shape == shapes.weights[named[-1]].shape:
            return weights[named[-1]]
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, shapes)


def to_groups(state: TrainState) -> Groups:
    """The state as named plain arrays, for a checkpoint: the same whether it is stacked or not."""
    training = unstack_layers(_optimizer_arrays(state))
    # Typed keys are not storable; their data is.
    key_data = jax.eval_shape(jax.random.key_data, state.key) if _is_abstract(state.key) else None
    if key_data is None:
        key_data = jax.random.key_data(state.key)
    else:
        key_data = jax.ShapeDtypeStruct(
            key_data.shape, key_data.dtype, sharding=state.step.sharding
        )
    return {
        "params": state.params,
        "training": {
            **training,
            "step": state.step,
            "key": key_data,
            "loss_history": state.loss_history,
        },
    }


def from_groups(abstract: TrainState, groups: Mapping[str, Mapping[str, jax.Array]]) -> TrainState:
    """The inverse of `to_groups`, given the state's shape."""
    training = groups["training"]
    optimizer_arrays = stack_layers(training, _optimizer_arrays(abstract))
    structure = jax.tree.structure(abstract.opt_state)
    key = jax.random.wrap_key_data(training["key"])
    return TrainState(
        step=training["step"],
        weights=stack_layers(groups["params"], abstract.weights),
        opt_state=jax.tree.unflatten(structure, optimizer_arrays.values()),
        key=jax.device_put(key, abstract.key.sharding),
        loss_history=training["loss_history"],
    )


def _optimizer_arrays(state: TrainState) -> dict[str, Any]:
    """The leaves of the optimizer's state, in their order, named by where they are in it."""
    return {
        f"opt_state{jax.tree_util.keystr(path)}": leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
    }


def _is_abstract(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _create(
    spec: ModelSpec,
    optimizer: optax.GradientTransformation,
    seed: int,
    stacked: bool,
    weights: Params | None = None,
) -> TrainState:
    init_key, step_key = jax.random.split(jax.random.key(seed))
    if weights is None:
        weights = initialise(spec, init_key, stacked=stacked)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        weights=weights,
        opt_state=optimizer.init(weights),
        key=step_key,
        loss_history=jnp.full((HISTORY,), jnp.nan),
    )
