"""What a checkpoint of a model's full size costs: seconds of a save, bytes that opening it reads.

    PYTHONPATH=. python benchmarks/saves.py FOLDER [--config configs/gpt2_350m.toml]

Weights and the optimizer's moments are random, and the tokenizer is one of characters with as
many tokens as GPT-2's. FOLDER has to be on the disk that is to be measured, with room for two
checkpoints; the run in it is removed afterwards. Bytes are those of read calls (/proc/self/io, so
Linux), of the whole process while `open_model` runs; nothing is dropped from the page cache.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from llm.config import Config, load_config
from llm.model.gpt import ModelSpec
from llm.model.sharding import make_mesh
from llm.run.checkpoint import Checkpoints
from llm.run.directory import RunDirectory
from llm.run.receipt import make_receipt, receipt_logprobs
from llm.text.tokenizer import CharacterTokenizer
from llm.training.optimizer import make_optimizer
from llm.training.state import create_state, to_groups

OPEN = """
import json, sys, time
import jax
from llm.run.open import open_model
def read(name):
    return int(dict(line.split(": ") for line in open("/proc/self/io")) [name])
jax.devices()
before, start = read("rchar"), time.perf_counter()
open_model(sys.argv[1])
print(json.dumps({"bytes": read("rchar") - before, "seconds": time.perf_counter() - start}))
"""


def build(run: RunDirectory, config: Config) -> dict[str, float]:
    """A run of one checkpoint, and what saving it took."""
    tokenizer = CharacterTokenizer("".join(map(chr, range(0x100, 0x100 + 50256))))
    tokenizer.save(run.tokenizer)
    run.write_config(config.resolved())
    spec = ModelSpec(config.resolved().model, tokenizer.vocab_size, "float32")
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    state = create_state(spec, make_optimizer(config.resolved().optimizer), 0, mesh)
    tokens = np.random.default_rng(0).integers(0, spec.vocab_size, (2, 65), np.int32)
    logprobs = jax.block_until_ready(receipt_logprobs(spec, state.params, tokens))
    groups = to_groups(state)
    random = np.random.default_rng(1)
    groups["training"] = {
        # Moments of zeros would take no room in a format that compresses.
        name: jax.numpy.asarray(random.standard_normal(array.shape, np.float32))
        if array.ndim > 1
        else array
        for name, array in groups["training"].items()
    }
    checkpoints = Checkpoints(run.checkpoints, keep=1)
    checkpoints.clean()
    found = {}
    for step in (1, 2):
        start, cpu = time.perf_counter(), time.process_time()
        checkpoints.save(step, groups, lambda: make_receipt(tokens, logprobs, tokenizer.sha256))
        held = time.perf_counter() - start
        checkpoints.wait()
        found = {
            "held_seconds": held,
            "save_seconds": time.perf_counter() - start,
            "save_cpu_seconds": time.process_time() - cpu,
        }
    checkpoints.close()
    return found


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", default="configs/gpt2_350m.toml")
    chosen = parser.parse_args()
    run = RunDirectory(chosen.folder / "run")
    try:
        report = build(run, load_config(chosen.config)).items()
        step = run.checkpoints / "2"
        sizes = {
            group: sum(p.stat().st_size for p in (step / group).rglob("*") if p.is_file())
            for group in ("params", "training")
        }
        opened = subprocess.run(
            [sys.executable, "-c", OPEN, str(run.path)], check=True, capture_output=True, text=True
        )
        opening = json.loads(opened.stdout.splitlines()[-1])
        print(json.dumps({**dict(report), "bytes_on_disk": sizes, "open": opening}, indent=2))
    finally:
        shutil.rmtree(run.path, ignore_errors=True)


if __name__ == "__main__":
    main()
