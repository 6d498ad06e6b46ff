"""Does mixing do what it says? Two texts, five weights: what each is predicted by at the end.

    python benchmarks/mixture.py ENGLISH CHINESE [--steps 300] [--seed 1337]

ENGLISH and CHINESE are text files, read as bytes, the last tenth of each held out; 2 layers of 96,
context 128, batch 16, Muon, with AdamW at 0.006 for the rest. Prints a table of bits per byte, a
column for each pair of weights, and its numbers as JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = (0.1, 0.3, 0.5, 0.7, 0.9)

CONFIG = """
[run]
seed = {seed}
[data]
validation = "tail:0.1"
cache_dir = {cache}
[[data.mixture]]
name = "English"
source = {english}
weight = {weight}
max_epochs = 100
[[data.mixture]]
name = "Chinese"
source = {chinese}
weight = {rest}
max_epochs = 100
[tokenizer]
kind = "bytes"
[model]
n_layer = 2
n_head = 4
d_model = 96
context_length = 128
[optimizer]
kind = "muon"
learning_rate = 0.006
[training]
steps = {steps}
batch_size = 16
eval_every = {steps}
[logging]
progress = "none"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("english", type=Path)
    parser.add_argument("chinese", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1337)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = {weight: trained(options, Path(folder), weight) for weight in WEIGHTS}
    print("| English / Chinese | " + " | ".join(f"{w} / {1 - w:.1f}" for w in WEIGHTS) + " |")
    print("|---" * (len(WEIGHTS) + 1) + "|")
    for name in ("English", "Chinese", "both"):
        print(f"| {name} | " + " | ".join(f"{table[w][name]:.3f}" for w in WEIGHTS) + " |")
    print(json.dumps(table))


def trained(options: argparse.Namespace, folder: Path, weight: float) -> dict[str, float]:
    """Bits per byte of each text, and of both, when the run ends."""
    config, run = folder / f"{weight}.toml", folder / f"run-{weight}"
    config.write_text(
        CONFIG.format(
            seed=options.seed,
            cache=json.dumps(str(folder / "cache")),
            english=json.dumps(str(options.english.absolute())),
            chinese=json.dumps(str(options.chinese.absolute())),
            weight=weight,
            rest=round(1 - weight, 1),
            steps=options.steps,
        )
    )
    command = [sys.executable, "train.py", str(config), "--run.dir", str(run)]
    subprocess.run(command, cwd=ROOT, check=True)
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    last = [row for row in rows if row["step"] == options.steps and "bits_per_byte" in row]
    return {row.get("source", "both"): row["bits_per_byte"] for row in last}


if __name__ == "__main__":
    main()
