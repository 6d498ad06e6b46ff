"""What a checkpoint costs the training of the quickstart's model, all that a save does included.

    python benchmarks/saves.py [--config configs/quickstart.toml] [--pairs 8] [--every 100]

Blocks of steps with a save at their beginning and blocks without take turns in one process, so
that other work on the machine falls on both. The save is the one of a real run: a copy of the
weights and the optimizer, written, hashed, flushed, renamed, verified, with its receipt, in the
background. Printed: the seconds that a save adds to its block, as a share of so many steps
(checkpoint.every); and how long the loop is held at it, in steps.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.toml")
    parser.add_argument("--pairs", type=int, default=8, help="blocks of each kind")
    parser.add_argument("--block", type=int, default=12, help="steps of a block")
    parser.add_argument("--every", type=int, default=100, help="steps between two saves")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report(measure(options, Path(folder)), options)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Seconds of each block with and without a save, of each save's hold, and of each step."""
    step, save, checkpoints = prepare(options.config, folder)
    for _ in range(3):
        step()
    save()
    checkpoints.wait()
    seconds: dict[str, list[float]] = {"with": [], "without": [], "held": [], "step": []}
    for pair in range(2 * options.pairs):
        kind = ("with", "without")[pair % 2]
        start = time.perf_counter()
        if kind == "with":
            save()
            seconds["held"].append(time.perf_counter() - start)
        for _ in range(options.block):
            before = time.perf_counter()
            step()
            if kind == "without":
                seconds["step"].append(time.perf_counter() - before)
        checkpoints.wait()  # what it still does belongs to its block
        seconds[kind].append(time.perf_counter() - start)
    checkpoints.close()
    return seconds


def prepare(path: Path, folder: Path):
    """(take a step and wait for it, begin a save, the checkpoints)"""
    from llm.runtime import prepare_process

    prepare_process()
    import numpy as np

    from llm.config import load_config
    from llm.model.gpt import ModelSpec
    from llm.model.sharding import make_mesh
    from llm.run.checkpoint import Checkpoints
    from llm.run.receipt import make_receipt, receipt_logprobs
    from llm.training.optimizer import make_optimizer
    from llm.training.state import create_state, to_groups
    from llm.training.step import make_train_step

    config = load_config(path, [])
    spec, mesh = ModelSpec(config.model, 257), make_mesh(config.mesh)
    train_step = make_train_step(spec, config.optimizer, config.training, mesh)
    state = create_state(spec, make_optimizer(config.optimizer), config.run.seed, mesh)
    shape = (config.training.batch_size, config.model.context_length + 1)
    tokens = np.random.default_rng(0).integers(0, 257, shape).astype(np.int32)
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.clean()

    def step():
        nonlocal state
        state, metrics = train_step(state, tokens)
        float(metrics["loss"])

    def save():
        some = tokens[:2, :65]
        logprobs = receipt_logprobs(spec, state.params, some)
        checkpoints.save(
            int(state.step), to_groups(state), lambda _: make_receipt(some, logprobs, "")
        )

    return step, save, checkpoints


def report(seconds: dict[str, list[float]], options: argparse.Namespace) -> None:
    step = statistics.median(seconds["step"])
    pairs = zip(seconds["with"], seconds["without"], strict=True)
    added = statistics.median(one - other for one, other in pairs)
    held = statistics.median(seconds["held"])
    share = added / (options.every * step)
    print(f"a step takes {1000 * step:.0f} ms (median of {len(seconds['step'])})")
    print(f"a save adds {added:.2f} s to its block (median of {options.pairs} pairs):")
    print(f"  {100 * share:.2f} % of the {options.every} steps between two saves")
    print(f"the loop is held for {1000 * held:.0f} ms at a save: {held / step:.2f} steps")
    print(json.dumps({"step": step, "added": added, "share": share, "held_steps": held / step}))


if __name__ == "__main__":
    main()
