"""A checkpoint: what a save adds to the steps that it runs beside, and how long it holds the loop.

Steps with a save at their beginning and steps without take turns in one process, so that other work
on the machine falls on both. The save is that of a real run: a copy of weights and optimizer,
written, hashed, flushed, renamed, verified, with its receipt, in the background.
"""

import statistics
import time
from pathlib import Path
from typing import Any

from llm.measure.step import make_step
from llm.measure.workload import Workload
from llm.model.sharding import shard_batch
from llm.run.checkpoint import Checkpoints
from llm.run.receipt import make_receipt, receipt_logprobs
from llm.training.state import to_groups
from llm.training.step import BATCH_AXES


def measure_saves(workload: Workload, folder: Path, pairs: int, block: int = 12) -> dict[str, Any]:
    """Args:
      folder: an empty one, on the disk that is to be measured.
      pairs: blocks of `block` steps, with a save and without.
    Returns:
      added_seconds: what a save adds to its block. held_seconds: until the loop goes on. bytes: of
      one checkpoint on disk.
    """
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.clean()
    train_step, state = make_step(workload)
    some = workload.tokens()[:2, :65]
    batch = shard_batch(workload.mesh, workload.tokens(), BATCH_AXES)
    held: list[float] = []

    def save() -> None:
        start = time.perf_counter()
        logprobs = receipt_logprobs(workload.spec, state.params, some)
        checkpoints.save(
            int(state.step), to_groups(state), lambda: make_receipt(some, logprobs, "")
        )
        held.append(time.perf_counter() - start)

    def seconds_of(saves: bool) -> float:
        nonlocal state
        start = time.perf_counter()
        if saves:
            save()
        for _ in range(block):
            state, metrics = train_step(state, batch)
            float(metrics["loss"])
        checkpoints.wait()  # what it still does belongs to its block
        return time.perf_counter() - start

    seconds_of(saves=True)
    held.clear()
    times = [(seconds_of(saves=True), seconds_of(saves=False)) for _ in range(pairs)]
    files = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    checkpoints.close()
    return {
        "added_seconds": statistics.median(one - other for one, other in times),
        "held_seconds": statistics.median(held),
        "step_seconds": statistics.median(other for _, other in times) / block,
        "bytes": sum(files),
    }
