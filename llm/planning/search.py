"""Which mesh, remat policy and micro-batch would train a model fastest on given devices.

Arithmetic (estimate.py) tries every combination, the compiler (plan.py) the most promising ones.
The result ranks the compiled ones: plans that fit first, by the time of a step. It is no proof that
nothing is faster.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from llm.config import Config, MeshConfig
from llm.errors import UsageError
from llm.model.sharding import MESH_AXES, shares
from llm.planning.devices import sheet_of
from llm.planning.estimate import Arithmetic
from llm.planning.plan import Facts, available_memory, plan_step
from llm.planning.targets import Target
from llm.run.setup import make_setup

REMATS = ("none", "dots", "block")
# A candidate is dropped if arithmetic needs more than this times the memory there is. Arithmetic
# was at most 1.4 times the TPU compiler's count, with each of the policies.
SLACK = 1.4


class Candidate(NamedTuple):
    """Settings to try, with a step's time and a device's memory by arithmetic."""

    config: Config
    seconds: float
    memory: float


def search(
    config: Config,
    vocab_size: int,
    target: Target,
    memory_fraction: float,
    tries: int,
    report: Callable[[int, int, Config], None],
) -> tuple[list[Facts], int]:
    """Plans of the most promising settings, best first, and how many settings arithmetic left.

    Args:
      tries: how many are compiled, at most.
      report: called with number, total and settings before each compilation.
    Raises:
      UsageError: the device has no data sheet, or nothing can be divided over the devices.
    """
    candidates = sorted(
        find_candidates(config, vocab_size, target, memory_fraction),
        key=lambda one: (one.seconds, one.memory),
    )
    if not candidates:
        raise UsageError(
            f"no mesh of {len(target.devices)} devices divides this model and a batch of "
            f"{config.training.batch_size} and would fit into their memory by arithmetic; more "
            "devices, or another training.batch_size"
        )
    plans = []
    for number, candidate in enumerate(candidates[:tries], start=1):
        report(number, min(tries, len(candidates)), candidate.config)
        plans.append(plan_step(candidate.config, vocab_size, target, memory_fraction))
    return sorted(plans, key=_rank), len(candidates)


def _rank(plan: Facts) -> tuple[bool, float, float]:
    seconds, memory = plan["time"]["step_seconds"], plan["memory"]
    return (not memory["fits"], seconds or math.inf, memory["needed_bytes"])


def find_candidates(
    config: Config, vocab_size: int, target: Target, memory_fraction: float
) -> Iterator[Candidate]:
    """Every setting that divides over the devices and that arithmetic finds within reach."""
    sheet = sheet_of(target.kind)
    limit = available_memory(target, memory_fraction)
    if sheet is None or limit is None:
        raise UsageError(f"--search needs a device that has a data sheet; {target.kind} has none")
    for sizes, remat in itertools.product(meshes(len(target.devices)), REMATS):
        for micro in _micro_batches(
            config.training.batch_size, shares("batch", target.outline(sizes))
        ):
            changed = {"remat": remat, "scan_layers": True, "micro_batch_size": micro}
            training, mesh = config.training.model_copy(update=changed), MeshConfig(**sizes)
            candidate = config.model_copy(update={"mesh": mesh, "training": training})
            try:
                spec = make_setup(candidate, vocab_size, target.outline(sizes)).spec
            except UsageError:
                break
            arithmetic = Arithmetic(spec, config.optimizer, training, sizes, target.kind)
            memory = sum(arithmetic.state) + arithmetic.temporaries()
            if memory <= SLACK * limit:
                yield Candidate(candidate, max(arithmetic.roofline(sheet).values()), memory)


def _micro_batches(batch_size: int, shares: int) -> Iterator[int]:
    """1, 2, 4, ... sequences on each share of the mesh, as far as they divide the batch."""
    micro = shares
    while micro <= batch_size:
        if batch_size % micro == 0:
            yield micro
        micro *= 2


def meshes(count: int) -> Iterator[dict[str, int]]:
    """Every way to write `count` as a product over the axes of the mesh."""
    divisors = [size for size in range(1, count + 1) if count % size == 0]
    for sizes in itertools.product(divisors, repeat=len(MESH_AXES)):
        if math.prod(sizes) == count:
            yield dict(zip(MESH_AXES, sizes, strict=True))
