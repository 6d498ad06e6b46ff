"""From the command to the first step: the train command itself, in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from llm.config import Config, to_toml
from llm.errors import UsageError

_QUIET = (
    *("--logging.progress", "none", "--training.eval-every", "0", "--checkpoint.every", "0"),
    *("--sample.max-new-tokens", "0"),
)


def measure_start(config: Config, folder: Path, time_limit: float = 900.0) -> dict[str, Any]:
    """Seconds from the command to the end of the first step, with its corpus prepared before.

    Args:
      folder: an empty one, for the runs and the store of compiled programs.
    Returns:
      cold_seconds: nothing compiled before. warm_seconds: the same command with the programs that
      the first has left behind.
    """
    path = folder / "config.toml"
    path.write_text(to_toml(config))
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder / "xla")}
    cold, warm = (
        _seconds_to_first_step(path, folder / name, environment, time_limit)
        for name in ("cold", "warm")
    )
    return {"cold_seconds": cold, "warm_seconds": warm}


def _seconds_to_first_step(
    config: Path, run: Path, environment: dict[str, str], time_limit: float
) -> float:
    """Of one run, which is stopped as soon as it has taken a few steps."""
    command = [sys.executable, "-m", "llm", "train", str(config), "--run.dir", str(run), *_QUIET]
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
