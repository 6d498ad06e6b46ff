"""What each switch of the recipe is worth: the recipe with one changed, on two corpora.

    python benchmarks/ablation.py run [--shakespeare FILE]    all of it: over an hour on two cores
    python benchmarks/ablation.py run --only "tied head"
    python benchmarks/ablation.py table

The recipe is configs/quickstart.toml's in a small size, 2 layers of 96. Each row is trained with
three seeds on Tiny Shakespeare (characters, its last tenth held out) and on the source code of the
Python standard library (bytes). Results are added to benchmarks/results/ablation.jsonl.

What it is not: advice for large models. A switch that pays in 320 steps of a small one need not pay
there, and the reverse.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
from fractions import Fraction

from trials import ROOT, train

CONFIG = str(ROOT / "configs" / "quickstart.toml")
RESULTS = ROOT / "benchmarks" / "results" / "ablation.jsonl"
SEEDS = (1, 2, 3)
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"

SHAPE = {
    "model.n-layer": 2, "model.d-model": 96, "model.n-head": 3, "training.steps": 320,
    "training.eval-batch-size": 64,
}  # fmt: skip
CORPORA = {
    "shakespeare": {
        "data.validation": "tail:0.1", "tokenizer.kind": "characters", "model.vocab-multiple": 1,
        "model.context-length": 64, "training.batch-size": 16,
    },
    "stdlib": {"model.context-length": 128, "training.batch-size": 16},
}  # fmt: skip

# What differs from the recipe in each row; a Fraction is of the context.
ROWS = {
    "the recipe": {},
    "AdamW for all": {"optimizer.kind": "adamw"},
    "Muon, 4 iterations": {"optimizer.muon-iterations": 4},
    "Muon, 3 iterations": {"optimizer.muon-iterations": 3},
    "Muon's momentum warmed up over 100 steps": {"optimizer.muon-momentum-warmup-steps": 100},
    "cosine to zero": {"optimizer.schedule": "cosine"},
    "linear to zero": {"optimizer.schedule": "linear"},
    "learned positions": {"model.positions": "learned"},
    "LayerNorm": {"model.norm": "layernorm"},
    "biases": {"model.bias": "true"},
    "no QK-norm": {"model.qk-norm": "false"},
    "GELU": {"model.activation": "gelu_tanh"},
    "SwiGLU": {"model.activation": "swiglu"},
    "projections not zero at first": {"model.zero-init-projections": "false"},
    "tied head": {"model.tie-embeddings": "true"},
    "no soft cap": {"model.logit-soft-cap": 0},
    "residual gains": {"model.residual-gains": "true"},
    "embedding shortcut": {"model.embedding-shortcut": "true"},
    "value embeddings, 1 table": {"model.value-embeddings": 1},
    "value embeddings, 2 tables": {"model.value-embeddings": 2},
    "today's recipe": {},
    "a window of half the context": {"model.window": Fraction(1, 2)},
    "a window of a quarter": {"model.window": Fraction(1, 4)},
    "heads twice as wide": {"model.head-size": 64},
    "heads half as wide": {"model.head-size": 16},
}
# The row that a row is compared with; the others are compared with the recipe of their time.
AGAINST = dict.fromkeys([*ROWS][[*ROWS].index("today's recipe") :], "today's recipe")


def main() -> None:
    options = parse_options()
    if options.part == "table":
        print_table()
        return
    # Row by row in turn, so that the machine's mood is in all of them alike.
    for corpus, seed in itertools.product(options.corpora, options.seeds):
        for row in options.only or ROWS:
            if row == "windows at documents" and corpus == "shakespeare":
                continue  # a single document, without an end of text
            run(row, corpus, seed, options.shakespeare)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What each switch of the recipe is worth.")
    parser.add_argument("part", choices=["run", "table"])
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", help="these rows")
    parser.add_argument("--corpora", nargs="+", choices=CORPORA, default=[*CORPORA])
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--shakespeare", default=URL, help="Tiny Shakespeare: a file, or its URL")
    return parser.parse_args()


def run(row: str, corpus: str, seed: int, shakespeare: str) -> None:
    settings = {**SHAPE, **CORPORA[corpus], **ROWS[row]}
    for name, value in settings.items():
        if isinstance(value, Fraction):
            settings[name] = int(value * settings["model.context-length"])
    if corpus == "shakespeare":
        settings["data.source"] = shakespeare
    trial = train(CONFIG, [f"--{name}={value}" for name, value in settings.items()], seed)
    result = {"row": row, "corpus": corpus, "seed": seed, **dataclasses.asdict(trial)}
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(result) + "\n")
    print(json.dumps(result), flush=True)


def print_table() -> None:
    if not RESULTS.is_file():
        sys.exit(f"no results at {RESULTS}; run `python benchmarks/ablation.py run` first")
    results = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    cells = {
        (row, corpus): [r for r in results if (r["row"], r["corpus"]) == (row, corpus)]
        for row in ROWS
        for corpus in CORPORA
    }
    heads = [f"{corpus} | against the recipe | s" for corpus in CORPORA]
    print("| row | " + " | ".join(heads) + " |")
    print("|---|" + "---|---|---|" * len(CORPORA))
    for row in ROWS:
        parts = [
            summary(cells[row, corpus], cells[AGAINST.get(row, "the recipe"), corpus])
            for corpus in CORPORA
        ]
        print(f"| {row} | " + " | ".join(parts) + " |")


def summary(trials: list[dict], recipe: list[dict]) -> str:
    """Mean loss and spread over seeds, the difference from the recipe's mean, seconds of steps."""
    if not trials:
        return "| |"
    losses = [trial["loss"] for trial in trials]
    difference = statistics.mean(losses) - statistics.mean(trial["loss"] for trial in recipe)
    seconds = statistics.median(trial["steps"] * trial["step_seconds"] for trial in trials)
    spread = max(losses) - min(losses)
    return f"{statistics.mean(losses):.3f} ± {spread / 2:.3f} | {difference:+.3f} | {seconds:.1f}"


if __name__ == "__main__":
    main()
