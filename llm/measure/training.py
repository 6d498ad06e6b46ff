"""Training: the step, what a save adds to it, and the time from the command to the first step."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax

from llm.config import Config, to_toml
from llm.errors import UsageError
from llm.measure.machine import time_turns
from llm.measure.workload import Workload
from llm.model.flops import flops_per_token, peak_flops
from llm.model.sharding import shard_batch
from llm.run.checkpoint import Checkpoints
from llm.run.receipt import make_receipt, receipt_logprobs
from llm.training.optimizer import make_optimizer
from llm.training.state import TrainState, create_state, to_groups
from llm.training.step import BATCH_AXES, TrainStep, make_train_step

_QUIET = (
    *("--logging.progress", "none", "--training.eval-every", "0", "--checkpoint.every", "0"),
    *("--sample.max-new-tokens", "0"),
)


def make_step(workload: Workload) -> tuple[TrainStep, TrainState]:
    """The step of a run of this configuration, and its first state."""
    config, spec, mesh = workload.config, workload.spec, workload.mesh
    train_step = make_train_step(spec, config.optimizer, config.training, mesh)
    optimizer = make_optimizer(config.optimizer)
    stacked = config.training.scan_layers
    return train_step, create_state(spec, optimizer, config.run.seed, mesh, stacked=stacked)


def measure_step(workload: Workload, matmul_flops: float, turns: int) -> dict[str, Any]:
    """Compile time, seconds, tokens/s, MFU and bytes of the train step, taken as the loop takes it.

    Args:
      matmul_flops: the measured peak of one device, FLOP/s.
    Returns:
      compile_seconds: tracing and compiling; nothing comes from a cache if the process has a fresh
        one.
      program_bytes: what the compiler sets aside on one device: arguments, results, temporaries;
        null if it does not say.
      peak_bytes: the most that the first device has held so far; null if it does not say (CPU).
      mfu_of_matmul, mfu_of_peak: of the measured peak, and of the data sheet's (null if unknown).
    """
    devices = list(workload.mesh.devices.flat)
    train_step, state = make_step(workload)
    batch = shard_batch(workload.mesh, workload.tokens(), BATCH_AXES)
    [compile_seconds] = time_turns(
        lambda: train_step.lower(state, batch).compile(), turns=1, warm_up=0
    )
    memory: Any = train_step.lower(state, batch).compile().memory_analysis()
    program_bytes = memory and (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    pending: list[jax.Array] = []

    def turn() -> None:
        """One more step, and the metrics of the one before (training/loop.py)."""
        nonlocal state
        state, metrics = train_step(state, batch)
        pending.append(metrics["loss"])
        if len(pending) > 1:
            float(pending.pop(0))

    seconds = time_turns(turn, turns, warm_up=3)
    rate = workload.tokens_per_step / statistics.median(seconds)
    per_device = rate * flops_per_token(workload.spec) / len(devices)
    peak = peak_flops(devices[0].device_kind)
    return {
        "compile_seconds": compile_seconds,
        "seconds": statistics.median(seconds),
        "fastest_seconds": min(seconds),
        "steps": turns,
        "tokens_per_second": rate,
        "flops_per_token": flops_per_token(workload.spec),
        "mfu_of_matmul": per_device / matmul_flops,
        "mfu_of_peak": per_device / peak if peak else None,
        "program_bytes": program_bytes,
        "peak_bytes": (devices[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }


def measure_saves(workload: Workload, folder: Path, pairs: int, block: int = 12) -> dict[str, Any]:
    """What a save adds to the steps that it runs beside, and how long it holds the loop.

    Blocks of steps with a save at their beginning and blocks without take turns in one process, so
    that other work on the machine falls on both. The save is that of a real run: a copy of weights
    and optimizer, written, hashed, flushed, renamed, verified, with its receipt, in the background.

    Args:
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

    def seconds_of(saves: bool) -> float:
        nonlocal state
        start = time.perf_counter()
        if saves:
            logprobs = receipt_logprobs(workload.spec, state.params, some)
            checkpoints.save(
                int(state.step), to_groups(state), lambda: make_receipt(some, logprobs, "")
            )
            held.append(time.perf_counter() - start)
        for _ in range(block):
            state, metrics = train_step(state, batch)
            float(metrics["loss"])
        checkpoints.wait()  # the rest of the save belongs to its block
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


def measure_start(config: Config, folder: Path, time_limit: float = 900.0) -> dict[str, Any]:
    """Seconds from the train command, a process of its own, to the end of the first step.

    The corpus has been prepared before.

    Args:
      folder: an empty one, for the runs and the store of compiled programs.
    Returns:
      cold_seconds: nothing compiled before. warm_seconds: the same command with the programs that
      the first has left behind.
    """
    path = folder / "config.toml"
    path.write_text(to_toml(config))
    cold, warm = (
        _seconds_to_first_step(path, folder / name, folder / "xla", time_limit)
        for name in ("cold", "warm")
    )
    return {"cold_seconds": cold, "warm_seconds": warm}


def _seconds_to_first_step(config: Path, run: Path, programs: Path, time_limit: float) -> float:
    """Of one run, which is stopped when it has taken a few steps."""
    command = [sys.executable, "-m", "llm", "train", str(config), "--run.dir", str(run), *_QUIET]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(programs)}
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    deadline = time.monotonic() + time_limit
    metrics = run / "metrics.jsonl"
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text().count("\n") >= 2:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    starts = json.loads((run / "run.json").read_text())["starts"] if run.exists() else [{}]
    if "seconds_to_first_step" not in starts[-1]:
        raise UsageError(f"the train command took no step in {time_limit:.0f} s; it said:\n{said}")
    return starts[-1]["seconds_to_first_step"]
