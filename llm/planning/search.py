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
from llm.model.gpt import ModelSpec
from llm.model.sharding import MESH_AXES, check_sizes
from llm.planning.devices import sheet_of
from llm.planning.estimate import Arithmetic, abstract_mesh
from llm.planning.plan import Facts, available_memory, plan_step
from llm.planning.targets import Target

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
        spec = target.model_spec(config, vocab_size, sizes)
        for training in _micro_batches(config, spec, sizes):
            settings = training.model_copy(update={"remat": remat, "scan_layers": True})
            arithmetic = Arithmetic(spec, config.optimizer, settings, sizes, target.kind)
            memory = arithmetic.memory()
            if memory <= SLACK * limit:
                changed = {"mesh": MeshConfig(**sizes), "training": settings}
                seconds = arithmetic.roofline(sheet).seconds
                yield Candidate(config.model_copy(update=changed), seconds, memory)


def meshes(count: int) -> Iterator[dict[str, int]]:
    """Every way to write `count` as a product over the axes of the mesh."""
    divisors = [size for size in range(1, count + 1) if count % size == 0]
    for sizes in itertools.product(divisors, repeat=len(MESH_AXES)):
        if math.prod(sizes) == count:
            yield dict(zip(MESH_AXES, sizes, strict=True))


def _micro_batches(config: Config, spec: ModelSpec, sizes: dict[str, int]) -> Iterator:
    """The training section with each micro-batch of 1, 2, 4, ... sequences per share that divides
    the batch and that the mesh divides."""
    training, mesh = config.training, abstract_mesh(sizes)
    micro = Arithmetic(spec, config.optimizer, training, sizes).shares("batch")
    while micro <= training.batch_size:
        if training.batch_size % micro == 0:
            candidate = training.model_copy(update={"micro_batch_size": micro})
            try:
                whole = config.model_copy(update={"training": candidate})
                check_sizes(mesh, whole, spec.padded_vocab_size)
            except UsageError:
                return
            yield candidate
        micro *= 2
