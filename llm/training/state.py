"""TrainState: everything that one step hands to the next, born on the mesh.

params ── float32 master weights, flat and named         step ── updates done
opt_state ── optax's, laid out as its weights            key ── root of all randomness
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from llm.model.gpt import ModelSpec, Params, initialise, logical_axes
from llm.model.sharding import replicated, tree_shardings


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "opt_state", "key", "loss_history"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """step: int32 []. params: Params. opt_state: optax state. key: typed PRNG key, never advanced;
    randomness of step n is fold_in(key, n). loss_history: float32 [HISTORY], losses of the newest
    updates that were applied, step n in slot n mod HISTORY; NaN where there is none yet."""

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    key: jax.Array
    loss_history: jax.Array


# Losses that a spike is measured against: enough for a spread, few enough to follow the curve.
HISTORY = 64

# What a checkpoint holds: "params" apart, so that a sampler reads nothing else.
Groups = dict[str, dict[str, Any]]


def create_state(
    spec: ModelSpec, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh
) -> TrainState:
    """A fresh state, each array created in its shards: no device ever holds the whole model."""
    create = functools.partial(_create, spec, optimizer, seed)
    return jax.jit(create, out_shardings=state_shardings(spec, optimizer, mesh))()


def abstract_state(
    spec: ModelSpec, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of the state, without allocating it."""
    shapes = jax.eval_shape(functools.partial(_create, spec, optimizer, 0))
    shardings = state_shardings(spec, optimizer, mesh)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def state_shardings(
    spec: ModelSpec, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The state's tree with a NamedSharding at each leaf.

    A moment lies as its weight does: it sits under the weight's name and has its shape.
    """
    weights = tree_shardings(mesh, logical_axes(spec))
    shapes = jax.eval_shape(functools.partial(_create, spec, optimizer, 0))

    def sharding(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        names = [part.key for part in path if isinstance(part, jax.tree_util.DictKey)]
        named = [name for name in names if name in weights]
        if named and leaf.shape == shapes.params[named[-1]].shape:
            return weights[named[-1]]
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, shapes)


def to_groups(state: TrainState) -> Groups:
    """The state as named plain arrays, for a checkpoint."""
    training = {
        f"opt_state{jax.tree_util.keystr(path)}": leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
    }
    # Typed keys are not storable; their data is.
    key_data = jax.eval_shape(jax.random.key_data, state.key) if _is_abstract(state.key) else None
    if key_data is None:
        key_data = jax.random.key_data(state.key)
    else:
        key_data = jax.ShapeDtypeStruct(
            key_data.shape, key_data.dtype, sharding=state.step.sharding
        )
    return {
        "params": dict(state.params),
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
    paths, structure = jax.tree_util.tree_flatten_with_path(abstract.opt_state)
    leaves = [training[f"opt_state{jax.tree_util.keystr(path)}"] for path, _ in paths]
    key = jax.random.wrap_key_data(training["key"])
    return TrainState(
        step=training["step"],
        params=dict(groups["params"]),
        opt_state=jax.tree_util.tree_unflatten(structure, leaves),
        key=jax.device_put(key, abstract.key.sharding),
        loss_history=training["loss_history"],
    )


def _is_abstract(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _create(spec: ModelSpec, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    init_key, step_key = jax.random.split(jax.random.key(seed))
    params = initialise(spec, init_key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        key=step_key,
        loss_history=jnp.full((HISTORY,), jnp.nan),
    )
