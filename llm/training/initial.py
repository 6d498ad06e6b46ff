"""The state that a start trains from: the newest checkpoint, else a fresh one.

The weights of a fresh state are random, or another model's (`training.init_from`).
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llm.errors import CheckpointError
from llm.model.gpt import ModelSpec, Params, abstract_params, logical_axes
from llm.model.sharding import Mesh, tree_shardings
from llm.model.stack import stack_layers
from llm.run.checkpoint import Checkpoints, params_sha256, restore
from llm.run.hosts import Hosts
from llm.run.provenance import describe_ancestor
from llm.run.receipt import check_receipt
from llm.training.loop import Job
from llm.training.optimizer import make_optimizer
from llm.training.state import TrainState, abstract_state, create_state, from_groups, to_groups
from llm.training.step import all_finite


class Opened(NamedTuple):
    """Another model's parameters on the mesh, each device's part; `step` of the run at `path`."""

    path: Path
    step: int
    spec: ModelSpec
    params: Params


OpenSource = Callable[[Mesh, Hosts], Opened]


def restore_or_create(
    job: Job, checkpoints: Checkpoints, say: Callable[[str], None], source: OpenSource | None = None
) -> tuple[TrainState, dict[str, Any] | None]:
    """The newest state that verifies, or a fresh one when nothing was ever saved. Collective.

    Args:
      source: where the weights of a fresh state come from; None: they are random.
    Returns:
      The state, and what run.json says of the source, if it was read.
    Raises:
      CheckpointError: there are steps and none is good, or one is not the model that was saved; or
        the source is damaged.
    """
    optimizer, seed = make_optimizer(job.config.optimizer), job.config.run.seed
    stacked = job.config.training.scan_layers
    abstract = abstract_state(job.spec, optimizer, job.mesh, stacked=stacked)
    restored = restore(checkpoints.root, to_groups(abstract), "set aside", hosts=job.hosts, say=say)
    if restored is not None:
        sha256, folder = job.corpus.tokenizer.sha256, str(restored.folder)
        check_receipt(job.spec, restored.groups["params"], restored.receipt, sha256, folder)
        return from_groups(abstract, restored.groups), None
    weights = ancestor = None
    if source is not None:
        opened = source(job.mesh, job.hosts)
        if not jax.jit(all_finite)(opened.params):
            raise CheckpointError(
                f"{opened.path} has weights that are NaN or infinite, at step {opened.step}; begin "
                "with another model in training.init_from"
            )
        params = _fitted(opened, job.spec, job.mesh)
        sha256 = begun = params_sha256(opened.params, job.hosts)
        if any(params[name] is not array for name, array in opened.params.items()):
            begun = params_sha256(params, job.hosts)
        ancestor = describe_ancestor(opened.path, opened.step, sha256, begun)
        weights = stack_layers(params, abstract.weights)
        if (size := job.spec.vocab_size) != opened.spec.vocab_size:
            say(
                f"the vocabulary grows from {opened.spec.vocab_size} to {size} tokens: those that "
                "are new begin as the mean of the others"
            )
    state = create_state(job.spec, optimizer, seed, job.mesh, stacked=stacked, weights=weights)
    return state, ancestor


def _fitted(opened: Opened, spec: ModelSpec, mesh: Mesh) -> Params:
    """The parameters in the sizes of a model with more tokens, other padding of the vocabulary or
    fewer positions. An array that has its size already is not touched.
    """
    shapes, axes = abstract_params(spec), logical_axes(spec)
    shardings, params = tree_shardings(mesh, axes), dict(opened.params)
    for name, array in params.items():
        grows = "vocab" in axes[name] and spec.vocab_size != opened.spec.vocab_size
        if grows or array.shape != shapes[name].shape:
            fit = functools.partial(_fit, axes[name], opened.spec.vocab_size, spec)
            params[name] = jax.jit(fit, out_shardings=shardings[name])(array)
    return params


def _fit(axes: tuple[str, ...], old_size: int, spec: ModelSpec, array: jax.Array) -> jax.Array:
    """A table of positions, cut; or of tokens, with a row for each new one and the padding."""
    if "position" in axes:
        return array[: spec.config.context_length]
    axis = axes.index("vocab")
    known = jax.lax.slice_in_dim(array, 0, old_size, axis=axis)
    added = jnp.repeat(known.mean(axis, keepdims=True), spec.vocab_size - old_size, axis)
    padding = [(0, 0)] * array.ndim
    padding[axis] = 0, spec.padded_vocab_size - spec.vocab_size
    return jnp.pad(jnp.concatenate([known, added], axis), padding)
