"""Which mesh, remat policy and micro-batch would train a model fastest on given devices.

All of them are tried by arithmetic (estimate.py), the most promising compiled (plan.py), and those
ranked: what fits first, by the time of a step. What it is not: a proof that nothing is faster.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

from llm.config import Config, MeshConfig
from llm.errors import UsageError
from llm.model.devices import sheet_of
from llm.model.gpt import ModelSpec
from llm.model.sharding import MESH_AXES, check_sizes
from llm.planning.estimate import Arithmetic, abstract_mesh
from llm.planning.plan import Plan, available_memory, model_spec, plan_step
from llm.planning.targets import Target

REMATS = ("none", "dots", "block")
# How far arithmetic may be above the memory there is before it is believed. It was at most 1.4
# times the TPU compiler's count, of llama3_8b on 8 to 1024 chips and of small models, dense and
# mixtures of experts, with each of the policies (libtpu 0.0.52).
SLACK = 1.4


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Settings to try. seconds, memory: by arithmetic, for a step and on one device."""

    config: Config
    seconds: float
    memory: float


def search(
    config: Config,
    vocab_size: int,
    target: Target,
    memory_fraction: float,
    tries: int,
    report: Callable[[int, int, Candidate], None],
) -> tuple[list[Plan], int]:
    """Plans of the most promising settings, the best first; and how many settings there were.

    Args:
      tries: how many are compiled, at most.
      report: is told number, total and candidate before each compilation.
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
        report(number, min(tries, len(candidates)), candidate)
        plans.append(plan_step(candidate.config, vocab_size, target, memory_fraction))
    return sorted(plans, key=_rank), len(candidates)


def _rank(plan: Plan) -> tuple[bool, float, float]:
    seconds = math.inf if plan.step_seconds is None else plan.step_seconds
    return (not plan.memory.fits, seconds, plan.memory.needed)


def find_candidates(
    config: Config, vocab_size: int, target: Target, memory_fraction: float
) -> Iterator[Candidate]:
    """Every setting that can be divided so, and whose memory is not out of reach by arithmetic."""
    sheet = sheet_of(target.kind)
    limit = available_memory(target, memory_fraction)
    if sheet is None or limit is None:
        raise UsageError(f"--search needs a device that has a data sheet; {target.kind} has none")
    for sizes, remat in itertools.product(meshes(len(target.devices)), REMATS):
        spec = model_spec(config, vocab_size, target, sizes)
        for training in _micro_batches(config, spec, sizes):
            settings = training.model_copy(update={"remat": remat, "scan_layers": True})
            arithmetic = Arithmetic(spec, config.optimizer, settings, sizes, target.kind)
            memory = arithmetic.memory()
            if memory <= SLACK * limit:
                changed = {"mesh": MeshConfig(**sizes), "training": settings}
                yield Candidate(
                    config.model_copy(update=changed), arithmetic.seconds(sheet), memory
                )


def meshes(count: int) -> Iterator[dict[str, int]]:
    """Every way to write `count` as a product over the axes of the mesh."""

    def divide(left: int, axes: tuple[str, ...]) -> Iterator[dict[str, int]]:
        if len(axes) == 1:
            yield {axes[0]: left}
            return
        for size in (n for n in range(1, left + 1) if left % n == 0):
            for rest in divide(left // size, axes[1:]):
                yield {axes[0]: size, **rest}

    return divide(count, MESH_AXES)


def _micro_batches(config: Config, spec: ModelSpec, sizes: dict[str, int]) -> Iterator:
    """The training section with each micro-batch that divides the batch and is divided by the mesh:
    1, 2, 4, ... sequences on each share."""
    training, mesh = config.training, abstract_mesh(sizes)
    shares = Arithmetic(spec, config.optimizer, training, sizes).shares("batch")
    rows = 1
    while rows * shares <= training.batch_size:
        micro = rows * shares
        rows *= 2
        if training.batch_size % micro:
            continue
        candidate = training.model_copy(update={"micro_batch_size": micro})
        try:
            whole = config.model_copy(update={"training": candidate})
            check_sizes(mesh, whole, spec.padded_vocab_size)
        except UsageError:
            return
        yield candidate
