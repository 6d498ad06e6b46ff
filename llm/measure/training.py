"""Training: a step, what the loop and a save add to it, and the time until the first step.

The loop is measured with a step that does nothing. What remains is reading batches, placing them on
the mesh, dispatching steps, reading metrics back and writing them. On an accelerator most of that
runs beside the step.
"""

import contextlib
import dataclasses
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
import jax.numpy as jnp

from llm.config import Config, to_toml
from llm.errors import StoppedError, UsageError
from llm.measure.machine import time_turns
from llm.model.flops import flops_per_token, mfu
from llm.model.sharding import shard_batch
from llm.run.checkpoint import Checkpoints
from llm.run.directory import RunDirectory
from llm.run.display import Display
from llm.run.metrics import MetricsFile
from llm.run.probes import ProbesFile
from llm.run.receipt import make_receipt, receipt_logprobs
from llm.run.stop import StopRequest
from llm.training.loop import Job, Outputs, train
from llm.training.optimizer import make_optimizer
from llm.training.state import TrainState, create_state, to_groups
from llm.training.step import BATCH_AXES, TrainStep, make_train_step


def make_step(job: Job) -> tuple[TrainStep, TrainState]:
    """The step of a run of this configuration, and its first state."""
    config = job.config
    train_step = make_train_step(job.spec, config.optimizer, config.training, job.mesh)
    optimizer, stacked = make_optimizer(config.optimizer), config.training.scan_layers
    return train_step, create_state(job.spec, optimizer, config.run.seed, job.mesh, stacked=stacked)


def measure_step(job: Job, matmul_flops: float, turns: int) -> dict[str, Any]:
    """Compile time, seconds, tokens/s, MFU and bytes of the train step, taken as the loop takes it.

    Args:
      matmul_flops: the measured peak of one device, FLOP/s.
    Returns:
      compile_seconds: tracing and compiling; with a new compilation cache nothing comes from it.
      program_bytes: what the compiler sets aside on one device: arguments, results, temporaries;
        null if it does not say.
      peak_bytes: the most that the first device has held so far; null if it does not say (CPU).
      mfu_of_matmul, mfu_of_peak: shares of the measured peak, and of the data sheet's (null if it
        is unknown).
    """
    devices = list(job.mesh.devices.flat)
    train_step, state = make_step(job)
    batch = shard_batch(job.mesh, job.batches()[0], BATCH_AXES)
    start = time.perf_counter()
    program: Any = train_step.lower(state, batch).compile()
    compile_seconds = time.perf_counter() - start
    memory = program.memory_analysis()
    program_bytes = memory and (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    before: Any = 0.0

    def turn() -> None:
        """One more step, and the loss of the step before, as in training/loop.py."""
        nonlocal state, before
        state, metrics = train_step(state, batch)
        float(before)
        before = metrics["loss"]

    seconds = time_turns(turn, turns, warm_up=3)
    rate, flops = job.tokens_per_step / statistics.median(seconds), flops_per_token(job.spec)
    return {
        "compile_seconds": compile_seconds,
        "seconds": statistics.median(seconds),
        "fastest_seconds": min(seconds),
        "steps": turns,
        "tokens_per_second": rate,
        "flops_per_token": flops,
        "mfu_of_matmul": rate * flops / len(devices) / matmul_flops,
        "mfu_of_peak": mfu(job.spec, rate, devices),
        "program_bytes": program_bytes,
        "peak_bytes": (devices[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }


def measure_loop(job: Job, folder: Path, steps: int = 200) -> dict[str, Any]:
    """Seconds that the loop adds to a step; the median of `steps`.

    Args:
      folder: an empty folder, for the run's files.
    """
    run = RunDirectory(folder)
    checkpoints, rows = Checkpoints(run.checkpoints, 1, job.hosts), MetricsFile(run.metrics)
    checkpoints.clean()
    rows.rewind(0)
    probes = job.make_probes(ProbesFile(run.probes))
    outputs = Outputs(run, checkpoints, rows, Display(speaks=False), probes, [])
    stop, (_, state) = StopRequest(), make_step(job)
    metrics = dict.fromkeys(("loss", "grad_norm", "learning_rate"), jnp.zeros(()))
    metrics |= {"finite": jnp.array(True), "spike": jnp.array(False)}
    # Dispatched as a step is, with all of the state's arrays, which stay where they are.
    nothing = jax.jit(lambda state, metrics: (state, metrics), donate_argnums=0)
    taken = 0

    def instant_step(state, batch):
        nonlocal taken
        taken += 1
        stop.requested = taken >= steps
        return nothing(state, metrics)

    with contextlib.closing(outputs), contextlib.suppress(StoppedError):
        job = dataclasses.replace(job, config=_only_steps(job.config, steps + 1))
        train(job, outputs, stop, lambda params: (), state, instant_step)
    seconds = [row["step_seconds"] for row in rows.rows if row["kind"] == "train"]
    return {"seconds_per_step": statistics.median(seconds[2:]), "steps": len(seconds)}


def _only_steps(config: Config, steps: int) -> Config:
    """The configuration with no evaluation, probe, sample or save before its last step."""
    logging = config.logging.model_copy(update={"probe_every": 0})
    training = config.training.model_copy(update={"steps": steps, "eval_every": 0})
    checkpoint = config.checkpoint.model_copy(update={"every": 0})
    update = {"training": training, "checkpoint": checkpoint, "logging": logging}
    return config.model_copy(update=update)


def measure_saves(job: Job, folder: Path, pairs: int, block: int = 12) -> dict[str, Any]:
    """How much time a save adds to the steps beside it, and how long it holds the loop.

    Blocks of steps with a save at their beginning and blocks without one take turns in one process,
    so that other work on the machine slows both. The save is that of a real run: in the background,
    a copy of weights and optimizer is written, hashed, flushed, renamed and verified, with its
    receipt.

    Args:
      folder: an empty folder, on the disk that is to be measured.
      pairs: how many blocks of `block` steps have a save; as many have none.
    Returns:
      added_seconds: what a save adds to its block.
      held_seconds: the time until the loop goes on.
      bytes: the size of one checkpoint on disk.
    """
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.clean()
    train_step, state = make_step(job)
    some = job.batches()[0].tokens[:2, :65]
    batch = shard_batch(job.mesh, job.batches()[0], BATCH_AXES)
    held: list[float] = []

    def seconds_of(saves: bool) -> float:
        nonlocal state
        start = time.perf_counter()
        if saves:
            logprobs = receipt_logprobs(job.spec, state.params, some)
            checkpoints.save(
                int(state.step), to_groups(state), lambda: make_receipt(some, logprobs, "")
            )
            held.append(time.perf_counter() - start)
        for _ in range(block):
            state, metrics = train_step(state, batch)
            float(metrics["loss"])
        checkpoints.wait()  # the rest of the save belongs to its block
        return time.perf_counter() - start

    seconds_of(saves=True)  # compiles what a save computes
    times = [(seconds_of(saves=True), seconds_of(saves=False)) for _ in range(pairs)]
    files = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    checkpoints.close()
    return {
        "added_seconds": statistics.median(one - other for one, other in times),
        "held_seconds": statistics.median(held[1:]),
        "step_seconds": statistics.median(other for _, other in times) / block,
        "bytes": sum(files),
    }


def measure_start(config: Config, folder: Path, time_limit: float = 900.0) -> dict[str, Any]:
    """Seconds from the start of a train command, in a new process, to the end of its first step.

    The corpus has been prepared before.

    Args:
      folder: an empty folder, for the runs and the store of compiled programs.
    Returns:
      cold_seconds: without compiled programs.
      warm_seconds: the same command again, with the programs that the first has left.
    """
    path = folder / "config.toml"
    path.write_text(to_toml(_only_steps(config, 10_000)))
    return {
        f"{name}_seconds": _seconds_to_first_step(path, folder / name, folder / "xla", time_limit)
        for name in ("cold", "warm")
    }


def _seconds_to_first_step(config: Path, run: Path, programs: Path, time_limit: float) -> float:
    """Start a run, and stop it when it has taken a few steps."""
    command = [sys.executable, "-m", "llm", "train", str(config), "--run.dir", str(run)]
    command += ["--logging.progress", "none"]
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
