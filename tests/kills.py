"""Train to the end under seeded SIGKILLs, at random places and at random times."""

import collections
import random
import signal
import subprocess
from pathlib import Path

from runs import train_process

from llm.run.checkpoint import saved_steps

PLACES = [
    "step",
    "evaluation",
    "metrics.torn",
    "checkpoint.before_copy",
    "checkpoint.after_write",
    "checkpoint.before_manifest",
    "checkpoint.before_flush",
    "checkpoint.before_commit",
    "checkpoint.after_commit",
    "checkpoint.deleting",
]


def train_under_kills(config: Path, run: Path, kills: int, seed: int) -> collections.Counter:
    """Start the same command until it ends; the first `kills` starts are killed.

    A kill comes within a few steps of where the run stands, so that a run of some hundred steps
    takes them all.

    Returns:
      place -> how many kills hit there; "time" are kills from outside.
    """
    draw = random.Random(seed)
    hit: collections.Counter = collections.Counter()
    while hit.total() < kills:
        place = draw.choice([*PLACES, "time"])
        step = max(saved_steps(run / "checkpoints"), default=0) + draw.randrange(1, 8)
        code, output = _killed_start(config, place, step, draw.uniform(0.2, 6.0))
        assert code == -signal.SIGKILL, f"not killed at {place} (step {step}): {output}"
        hit[place] += 1
    process = train_process(config)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return hit


def _killed_start(config: Path, place: str, step: int, seconds: float) -> tuple[int, str]:
    faults = {
        "step": f"step:step={step}:kill",
        "metrics.torn": f"metrics.write:step={step}:torn,metrics.torn:kill",
    }
    fault = "" if place == "time" else faults.get(place, f"{place}:kill")
    process = train_process(config, fault=fault)
    try:
        output, _ = process.communicate(timeout=seconds if place == "time" else 600)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
    return process.returncode, output
