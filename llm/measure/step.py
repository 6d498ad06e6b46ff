"""The train step: how long compiling it takes, and then each step, as the loop takes them."""

from typing import Any

import jax

from llm.measure.timing import time_turns
from llm.measure.workload import Workload
from llm.model.flops import flops_per_token, peak_flops
from llm.model.sharding import shard_batch
from llm.training.optimizer import make_optimizer
from llm.training.state import TrainState, create_state
from llm.training.step import BATCH_AXES, TrainStep, make_train_step


def measure_step(workload: Workload, matmul_flops: float, turns: int) -> dict[str, Any]:
    """Seconds, tokens/s, MFU and bytes of the train step.

    Args:
      matmul_flops: the measured peak of one device, FLOP/s.
    Returns:
      compile_seconds: tracing and compiling, nothing from a cache if the process has a fresh one.
      program_bytes: what the compiler sets aside on one device: arguments, results, temporaries.
      peak_bytes: the most that the first device held until now; null where it does not say (CPU).
      mfu_of_matmul, mfu_of_peak: of the measured peak, and of the data sheet's (null if unknown).
    """
    devices = list(workload.mesh.devices.flat)
    train_step, state = make_step(workload)
    batch = shard_batch(workload.mesh, workload.tokens(), BATCH_AXES)
    compiling = time_turns(lambda: train_step.lower(state, batch).compile(), 1, warm_up=0)
    memory = train_step.lower(state, batch).compile().memory_analysis()
    pending: list[jax.Array] = []

    def turn() -> None:
        """One step more, and the metrics of the one before (training/loop.py)."""
        nonlocal state
        state, metrics = train_step(state, batch)
        pending.append(metrics["loss"])
        if len(pending) > 1:
            float(pending.pop(0))

    timing = time_turns(turn, turns, warm_up=3)
    rate = workload.tokens_per_step / timing.median
    per_device = rate * flops_per_token(workload.spec) / len(devices)
    peak = peak_flops(devices[0].device_kind)
    return {
        "compile_seconds": compiling.median,
        "seconds": timing.median,
        "fastest_seconds": timing.fastest,
        "steps": turns,
        "tokens_per_second": rate,
        "flops_per_token": flops_per_token(workload.spec),
        "mfu_of_matmul": per_device / matmul_flops,
        "mfu_of_peak": per_device / peak if peak else None,
        "program_bytes": _program_bytes(memory),
        "peak_bytes": (devices[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }


def make_step(workload: Workload) -> tuple[TrainStep, TrainState]:
    """The step of a run of this configuration, and its first state."""
    config, spec, mesh = workload.config, workload.spec, workload.mesh
    train_step = make_train_step(spec, config.optimizer, config.training, mesh)
    optimizer = make_optimizer(config.optimizer)
    stacked = config.training.scan_layers
    return train_step, create_state(spec, optimizer, config.run.seed, mesh, stacked=stacked)


def _program_bytes(memory: Any) -> int | None:
    if memory is None:
        return None
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
