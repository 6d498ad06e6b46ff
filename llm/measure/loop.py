"""The loop around the step: its own time, with a step that does nothing.

Reading batches, placing them on the mesh, dispatching, reading metrics back, writing them: all of
training/loop.py but the computation. On an accelerator most of it runs beside the step.
"""

import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llm.config import Config
from llm.errors import StoppedError
from llm.measure.training import make_step
from llm.measure.workload import Workload
from llm.run.checkpoint import Checkpoints
from llm.run.directory import RunDirectory
from llm.run.hosts import Hosts
from llm.run.metrics import Metrics
from llm.run.progress import NoProgress
from llm.run.stop import StopRequest
from llm.training.loop import Job, Outputs, train


def measure_loop(workload: Workload, folder: Path, steps: int = 200) -> dict[str, Any]:
    """Seconds that the loop adds to a step; the median of `steps`.

    Args:
      folder: an empty one, for its files.
    """
    hosts, run = Hosts(), RunDirectory(folder)
    job = Job(
        _undisturbed(workload.config, steps),
        workload.spec,
        workload.mesh,
        workload.corpus,
        hosts,
    )
    outputs = Outputs(
        run, Checkpoints(run.checkpoints, 1, hosts), Metrics(run.metrics), NoProgress(), []
    )
    outputs.checkpoints.clean()
    outputs.metrics.rewind(0)
    stop, (_, state) = StopRequest(), make_step(workload)
    zero, yes, no = jnp.zeros(()), jnp.array(True), jnp.array(False)
    metrics = {
        "loss": zero,
        "grad_norm": zero,
        "learning_rate": zero,
        "finite": yes,
        "spike": no,
    }
    # Dispatched as a step is, with all of the state's arrays, which stay where they are.
    nothing = jax.jit(lambda state, metrics: (state, metrics), donate_argnums=0)
    taken = 0

    def instant_step(state, tokens_BT):
        nonlocal taken
        taken += 1
        stop.requested = taken >= steps
        return nothing(state, metrics)

    try:
        train(job, outputs, stop, lambda params: "", state, instant_step)
    except StoppedError:
        pass  # as asked for
    finally:
        outputs.close()
    seconds = [row["step_seconds"] for row in outputs.metrics.rows if row["kind"] == "train"]
    return {"seconds_per_step": statistics.median(seconds[2:]), "steps": len(seconds)}


def _undisturbed(config: Config, steps: int) -> Config:
    """More steps than are taken, without an evaluation or a save among them."""
    training = config.training.model_copy(update={"steps": steps + 1, "eval_every": 0})
    checkpoint = config.checkpoint.model_copy(update={"every": 0})
    return config.model_copy(update={"training": training, "checkpoint": checkpoint})
