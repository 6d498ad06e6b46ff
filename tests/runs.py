"""Small whole runs for the tests: a corpus, a configuration, and the train command on them."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from forked import Forked, can_be_forked

from llm.files import MOST_BYTES

ROOT = Path(__file__).resolve().parent.parent
STEPS = 12

# Tests compile more than they compute, and most of the compiler's time goes into making programs
# fast: into optimization and fusion. Splitting a module for several cores costs more than it wins.
QUICK_COMPILING = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1 "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)

SETTINGS = {
    "data": {"validation": "tail:0.1"},
    "tokenizer": {"kind": "characters"},
    "model": {"n_layer": 2, "n_head": 2, "d_model": 32, "context_length": 16, "dropout": 0.1},
    "optimizer": {"learning_rate": 1e-2, "min_learning_rate": 1e-3, "warmup_steps": 2},
    "training": {
        "steps": STEPS,
        "batch_size": 8,
        "eval_every": 6,
        "eval_batch_size": 64,
        # The same numbers on every CPU; test_products.py has runs in bfloat16.
        "compute_dtype": "float32",
    },
    "checkpoint": {"every": 4, "keep": 2},
    # Only runs that ask for it, by SAMPLE, write text: tracing the decoder costs a fifth of a run.
    "sample": {"prompt": "the", "max_new_tokens": 0},
    "logging": {"progress": "none"},
}
SAMPLE = {"max_new_tokens": 8}


def write_corpus(folder: Path) -> Path:
    """A few thousand characters that a model can learn from."""
    words = ("the cat sat on the mat", "and the dog ran", "to the red hat")
    words = " ".join(words).split()
    text = " ".join(words[(i * i + 3 * i) % len(words)] for i in range(1500))
    path = folder / "corpus.txt"
    path.write_text(text)
    return path


def write_config(folder: Path, **changes) -> Path:
    """SETTINGS with `section={...}` changes, as a file; its run directory is FOLDER/run."""
    import tomli_w

    settings = {name: {**values, **changes.pop(name, {})} for name, values in SETTINGS.items()}
    settings["data"] = {
        "source": str(write_corpus(folder)),
        "cache_dir": str(folder / "cache"),
        **settings["data"],
    }
    settings["run"] = {"dir": str(folder / "run"), **changes.pop("run", {})}
    path = folder / "config.toml"
    path.write_text(tomli_w.dumps({**settings, **changes}))
    return path


def copied(folder: Path, target: Path) -> Path:
    """The run of a folder copied, to be broken or resumed; the configuration that names the copy.

    The corpus stays the original's.
    """
    shutil.copytree(folder / "run", target / "run")
    config = target / "config.toml"
    text = (folder / "config.toml").read_text()
    config.write_text(text.replace(str(folder / "run"), str(target / "run")))
    return config


def train(config: Path, *flags: str) -> int:
    """The train command in this process; errors come through."""
    from llm.commands.train import main

    return main([str(config), *flags])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train_process(
    config: Path,
    *flags: str,
    fault: str = "",
    under: tuple[str, ...] = (),
    stderr: int = subprocess.STDOUT,
) -> subprocess.Popen | Forked:
    """`python train.py` as a person runs it, on one CPU device; `under` a command such as nice."""
    environment = {**os.environ, "XLA_FLAGS": QUICK_COMPILING}
    environment.pop("LLM_FAULT", None)
    if fault:
        environment["LLM_FAULT"] = fault
    words = [str(ROOT / "train.py"), str(config), *flags]
    if stderr == subprocess.STDOUT and not under and can_be_forked(environment):
        return Forked(words, environment)
    return subprocess.Popen(
        [*under, sys.executable, *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def run_process(config: Path, *flags: str, fault: str = "") -> tuple[int, str]:
    """(exit code, everything it printed)"""
    process = train_process(config, *flags, fault=fault)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def until(holds: Callable[[], Any]) -> None:
    """Wait for what another thread or process brings about."""
    for _ in range(3000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to be so within 30 seconds")


def losses(run: Path) -> list[tuple]:
    """(kind, step, loss) of every line of metrics.jsonl, in order."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["kind"], row["step"], row["loss"]) for row in rows]


def params_sha256(run: Path, step: int = STEPS) -> str:
    return json.loads((run / "checkpoints" / str(step) / "receipt.json").read_text())[
        "params_sha256"
    ]


def starts(run: Path) -> list[dict]:
    """What run.json says of each start."""
    return json.loads((run / "run.json").read_text())["starts"]


def saved_arrays(folder: Path) -> dict[str, np.ndarray]:
    """The whole arrays of one group of a step, whichever processes wrote them."""
    import jax

    from llm.run.arrays import read_arrays

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    read = read_arrays(folder, {path.name: here for path in folder.iterdir()})
    return {name: np.asarray(array) for name, array in read.items()}


def identity_of(arrays: dict[str, np.ndarray]) -> str:
    """The params_sha256 of whole arrays."""
    from llm.run.arrays import Piece, element_sums, identity

    held = {name: np.asarray(array) for name, array in arrays.items()}
    pieces = [Piece(name, array.shape, (0,) * array.ndim, array) for name, array in held.items()]
    return identity(element_sums(pieces))


def make_strange(kind, path):
    """A file that is not what its name says, in place of what is there."""
    path.unlink(missing_ok=True)
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "socket":
            listening = socket.socket(socket.AF_UNIX)
            folder = os.open(path.parent, os.O_PATH)  # its own path may be too long for a socket
            listening.bind(f"/proc/self/fd/{folder}/{path.name}")
            os.close(folder)
            listening.close()
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "loop":
            path.symlink_to(path.name)
        case "huge":
            with open(path, "wb") as file:
                file.truncate(MOST_BYTES << 10)
        case "deep":
            path.write_text("[" * 100_000)
