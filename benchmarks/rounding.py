"""What products in bfloat16 do to learning: loss curves in both dtypes, three seeds, side by side.

    python benchmarks/rounding.py run      six runs, some minutes on two cores
    python benchmarks/rounding.py table
    python benchmarks/rounding.py loss RUN ...    what training reports, beside the float32 loss

The recipe is configs/quickstart.toml's in the small size of ablation.py, on the source code of the
Python standard library. Validation losses are of all held-out bytes, in float32 in both rows.
Results are added to benchmarks/results/rounding.jsonl. `loss` compares the two losses of each RUN's
last weights on 20 of its training batches. A CPU without units for bfloat16 rounds the
same operands and takes longer.
"""

import dataclasses
import functools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from ablation import CONFIG, CORPORA, SEEDS, SHAPE
from trials import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "rounding.jsonl"
DTYPES = ("float32", "bfloat16")
SETTINGS = {
    **SHAPE, **CORPORA["stdlib"], "training.eval-every": 64, "checkpoint.every": 0,
    "sample.max-new-tokens": 0, "logging.progress": "none",
}  # fmt: skip


def main() -> None:
    if sys.argv[1:] == ["run"]:
        for seed in SEEDS:
            for dtype in DTYPES:
                run(dtype, seed)
    elif sys.argv[1:] == ["table"]:
        print_table()
    elif sys.argv[1:2] == ["loss"] and sys.argv[2:]:
        print_differences(sys.argv[2:])
    else:
        sys.exit(__doc__)


def run(dtype: str, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = SETTINGS | {"training.compute-dtype": dtype, "run.seed": seed}
        flags = [f"--{name}={value}" for name, value in settings.items()]
        command = [
            sys.executable,
            str(ROOT / "train.py"),
            CONFIG,
            *flags,
            f"--run.dir={folder}/run",
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows = map(json.loads, Path(folder, "run", "metrics.jsonl").read_text().splitlines())
        losses = {row["step"]: row["loss"] for row in rows if row["kind"] == "eval"}
    line = json.dumps({"dtype": dtype, "seed": seed, "losses": losses})
    with RESULTS.open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


def print_table() -> None:
    results = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    steps = list(results[0]["losses"])
    print("| step | " + " | ".join(steps) + " |\n|---|" + "---|" * len(steps))
    for dtype in DTYPES:
        curves = [result["losses"] for result in results if result["dtype"] == dtype]
        cells = [", ".join(f"{curve[step]:.3f}" for curve in curves) for step in steps]
        print(f"| {dtype} | " + " | ".join(cells) + " |")


def print_differences(runs: list[str], batches: int = 20) -> None:
    """Training's loss minus the float32 loss of the same weights, in nats."""
    sys.path.insert(0, str(ROOT))
    import jax

    from llm.run.open import open_model
    from llm.text.batches import training_batches
    from llm.text.shards import prepare
    from llm.training.step import accumulate_gradients

    differences: list[float] = []
    for run in runs:
        opened = open_model(Path(run))
        config, rounded = opened.config, dataclasses.replace(opened.spec, rounded=True)
        of_run = training_batches(config, prepare(config.data, config.tokenizer))

        @functools.partial(jax.jit, static_argnums=0)
        def loss(spec, params, batch, training=config.training):
            return accumulate_gradients(spec, training, params, batch, None)[1].nll

        for step in range(batches):
            found = loss(rounded, opened.params, of_run[step])
            differences.append(float(found - loss(opened.spec, opened.params, of_run[step])))
    print(
        f"{len(differences)} batches: at most {max(map(abs, differences)):.5f} nats apart, "
        f"mean difference {statistics.mean(differences):+.5f}"
    )


if __name__ == "__main__":
    main()
