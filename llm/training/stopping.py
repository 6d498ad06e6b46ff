"""A request to stop, agreed on: whichever process was asked, all of them stop at one step.

With one process it is its own `StopRequest`. With several, each step carries a flag for every
device, and their maximum is read together with what that step measured: one step late, as all
metrics are, so that no device waits for a host.
"""

from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm.model.sharding import replicated
from llm.run.hosts import Hosts
from llm.run.stop import StopRequest


class SharedStop:
    """Every process calls `ask` and `read` in the same order as it dispatches computations."""

    def __init__(self, request: StopRequest, hosts: Hosts, mesh: Mesh):
        self._request, self._alone = request, hosts.alone
        self._agreed = False
        self._asked: deque[jax.Array] = deque()
        if not self._alone:
            self._flags = [_flag(mesh, raised) for raised in (False, True)]
            self._any = jax.jit(jnp.max, out_shardings=replicated(mesh))

    @property
    def requested(self) -> bool:
        """The same answer in every process."""
        return self._request.requested if self._alone else self._agreed

    def ask(self) -> None:
        """Dispatch the question whether a stop was requested by now, anywhere."""
        if not self._alone:
            self._asked.append(self._any(self._flags[self._request.requested]))

    def read(self, leave: int = 0) -> None:
        """Wait for the answers, but for the newest `leave`."""
        while len(self._asked) > leave:
            self._agreed |= bool(self._asked.popleft())


def _flag(mesh: Mesh, raised: bool) -> jax.Array:
    """int32 [devices]: this process's word, one copy on each device."""
    axes = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return jax.make_array_from_callback(
        (mesh.devices.size,), axes, lambda index: np.full(1, raised, np.int32)
    )
