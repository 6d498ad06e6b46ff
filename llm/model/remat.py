"""Rematerialisation: what a block keeps of its forward pass until its backward pass.

    none      everything that the backward pass reads, except what norms and activations can compute
              again from it (norm.py, layers.py:activate)
    dots      its input, its products with weights, and what an attention kernel (kernels.py) needs
              beside its inputs; the rest is computed again
    block     its input alone; the whole block is computed again (Chen et al. 2016, "Training Deep
              Nets with Sublinear Memory Cost")
    offload   like block, but the inputs are kept in the host's memory

It changes what is stored, never what is computed: losses and gradients are the same to rounding.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
from jax import checkpoint_policies as policies
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from llm.errors import UsageError
from llm.model.kernels import CUDNN_FORWARD, RESIDUAL

Remat = Literal["none", "dots", "block", "offload"]
HOST = "pinned_host"
_INPUT = "block_input"
# The name (`checkpoint_name`) of the experts' products with weights, which are no plain dots.
PRODUCT = "product"
Function = TypeVar("Function", bound=Callable[..., Any])


def _is_product_or_residual(operation: Any, *inputs: Any, **settings: Any) -> bool:
    """A policy for jax.checkpoint: products with weights, and what attention's kernels read."""
    product = policies.dots_with_no_batch_dims_saveable(operation, *inputs, **settings)
    named = policies.save_only_these_names(PRODUCT, RESIDUAL)(operation, *inputs, **settings)
    return product or named or operation.name == CUDNN_FORWARD


_POLICIES = {
    "dots": _is_product_or_residual,
    "block": policies.nothing_saveable,
    "offload": policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_INPUT],
        offload_src="device",
        offload_dst=HOST,
    ),
}


def keep(remat: Remat, block: Function, *, in_scan: bool = False) -> Function:
    """The same function x, ... -> y; for its gradient it keeps what `remat` says.

    Args:
      in_scan: the call is a loop's body, where the compiler cannot undo the recomputation by
        noticing that it has the same results already.
    """
    if remat == "none":
        return block

    def named(x, *rest):
        return block(checkpoint_name(x, _INPUT), *rest)

    return jax.checkpoint(named, policy=_POLICIES[remat], prevent_cse=not in_scan)  # type: ignore


def check_remat(remat: Remat, mesh: Mesh) -> None:
    """Refuse `offload` with a UsageError if the mesh's devices cannot use the host's memory."""
    device = mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if remat == "offload" and HOST not in kinds:
        raise UsageError(
            f"training.remat = 'offload' needs devices that reach the host's memory ({HOST}); "
            f"{device.device_kind} has {', '.join(kinds)}; use 'block', which keeps the same "
            "arrays on the device"
        )
