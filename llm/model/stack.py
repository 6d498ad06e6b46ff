"""Weights of all blocks stacked: one array [L, ...] for a weight, instead of L arrays.

    blocks.0.mlp.up.weight [D, F], blocks.1.mlp.up.weight [D, F], ...
    blocks.*.mlp.up.weight [L, D, F]

A scan over layers reads weights in this form, which keeps a program's size the same at any depth.
Only training uses it (`training.scan_layers`). Checkpoints and everything else outside training
use the names of single layers.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

_ALL_LAYERS = re.compile(r"\bblocks\.\*\.")


def is_stacked(name: str) -> bool:
    """Whether the array of this name holds all layers; the name may stand inside a longer one."""
    return _ALL_LAYERS.search(name) is not None


def layer_names(name: str, layers: int) -> list[str]:
    """The names of a stack's layers, in order; an array that is not stacked keeps its one name."""
    if not is_stacked(name):
        return [name]
    return [_ALL_LAYERS.sub(f"blocks.{layer}.", name) for layer in range(layers)]


def unstack_layers(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Each stack as the arrays of its layers, sharded as the stack is; all else is unchanged.

    Args:
      arrays: name -> jax.Array, or jax.ShapeDtypeStruct with a sharding.
    """
    result: dict[str, Any] = {}
    for name, leaf in arrays.items():
        parts = _layers_of(leaf) if is_stacked(name) else [leaf]
        result |= dict(zip(layer_names(name, len(parts)), parts, strict=True))
    return result


def stack_layers(arrays: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `unstack_layers`.

    Args:
      arrays: name -> jax.Array, without stacks.
      like: the names, shapes, dtypes and shardings of the result.
    """
    result = dict[str, Any]()
    for name, leaf in like.items():
        if is_stacked(name):
            layers = [arrays[part] for part in layer_names(name, leaf.shape[0])]
            result[name] = jax.jit(jnp.stack, out_shardings=leaf.sharding)(layers)
        else:
            result[name] = arrays[name]
    return result


def _layers_of(leaf: Any) -> list[Any]:
    layers, *shape = leaf.shape
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return [jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)] * layers
    # Compiled with its shardings, so that no device ever holds more of a weight than its share.
    return list(jax.jit(jnp.unstack, out_shardings=(sharding,) * layers)(leaf))
