"""Short training runs, each by the command that a person would type, and what came of them."""

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Trial:
    """One finished run.

    loss: nats per token over the whole validation split, after the last step.
    step_seconds: median of its steps.
    """

    parameters: int
    tokens: int
    steps: int
    loss: float
    step_seconds: float


def train(config: str, flags: Sequence[str], seed: int) -> Trial:
    """Run train.py in a folder that is deleted afterwards, without saves and samples on the way.

    Raises:
      SystemExit: the run failed; says what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        quiet = [
            "--training.eval-every=0", "--checkpoint.every=0", "--sample.max-new-tokens=0",
            "--logging.progress=none",
        ]  # fmt: skip
        command = [
            sys.executable, str(ROOT / "train.py"), config, *flags, *quiet,
            "--run.seed", str(seed), "--run.dir", str(run),
        ]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout}")
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [row for row in rows if row["kind"] == "train"]
        losses = [row["loss"] for row in rows if row["kind"] == "eval"]
        return Trial(
            parameters=json.loads((run / "run.json").read_text())["model"]["parameters"],
            tokens=steps[-1]["tokens"],
            steps=steps[-1]["step"],
            loss=losses[-1],
            step_seconds=statistics.median(row["step_seconds"] for row in steps),
        )
