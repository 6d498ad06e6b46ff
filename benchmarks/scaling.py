"""How the loss falls with size and tokens, and which learning rate suits a width.

    python benchmarks/scaling.py sizes    five sizes, 10 tokens for each parameter of the blocks
    python benchmarks/scaling.py rates    Muon's learning rate at three widths
    python benchmarks/scaling.py figure   draws what the two found (needs matplotlib)

The recipe is configs/quickstart.toml's (Muon, constant then linear to zero, rotary positions,
QK-norm, squared ReLU), on the source code of the Python standard library as bytes. Results are
added to benchmarks/results/scaling.jsonl.

The law is  L(N) = E + A N^-a  with N the parameters of the blocks, fitted by least squares over E.
What it is not: a law of large models. Two cores reach less than a million parameters.
"""

import argparse
import dataclasses
import json
import sys

import numpy as np
from trials import ROOT, train

CONFIG = str(ROOT / "configs" / "quickstart.toml")
RESULTS = ROOT / "benchmarks" / "results" / "scaling.jsonl"
FIGURE = ROOT / "docs" / "images" / "scaling.svg"

CONTEXT, BATCH = 128, 16
TOKENS_PER_PARAMETER = 10
# (layers, width): heads are 32 wide.
SIZES = [(1, 64), (2, 64), (2, 96), (3, 128), (4, 128)]
WIDTHS = [64, 128, 256]
RATES = [0.0025, 0.005, 0.01, 0.02, 0.04, 0.08]
RATE_STEPS = 200


def main() -> None:
    options = parse_options()
    if options.part == "figure":
        draw(read())
    elif options.part == "sizes":
        for layers, width in SIZES:
            steps = TOKENS_PER_PARAMETER * in_blocks(layers, width) // (CONTEXT * BATCH)
            add("sizes", layers, width, options.seed, ["--training.steps", str(steps)])
        print_law(read())
    else:
        for width in WIDTHS:
            for rate in RATES:
                flags = ["--training.steps", str(RATE_STEPS)]
                flags += ["--optimizer.muon-learning-rate", str(rate)]
                add("rates", 2, width, options.seed, flags, rate=rate)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Loss against size, and learning rates.")
    parser.add_argument("part", choices=["sizes", "rates", "figure"])
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def in_blocks(layers: int, width: int) -> int:
    """Parameters of the blocks' matrices: 4 D^2 of attention and 8 D^2 of the MLP, each layer."""
    return 12 * layers * width**2


def add(part: str, layers: int, width: int, seed: int, flags: list[str], **more: float) -> None:
    """Train one model and keep what came of it, as a line of the results and of the terminal."""
    shape = {
        "--model.n-layer": layers,
        "--model.d-model": width,
        "--model.n-head": width // 32,
        "--model.context-length": CONTEXT,
        "--training.batch-size": BATCH,
        "--training.eval-batch-size": 64,
    }
    words = [str(word) for pair in shape.items() for word in pair]
    trial = train(CONFIG, [*words, *flags], seed)
    row = {"part": part, "layers": layers, "width": width, "in_blocks": in_blocks(layers, width)}
    row |= {"seed": seed, **more, **dataclasses.asdict(trial)}
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def read() -> list[dict]:
    if not RESULTS.is_file():
        sys.exit(f"no results at {RESULTS}; run `sizes` and `rates` first")
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def fit(sizes: np.ndarray, losses: np.ndarray) -> tuple[float, float, float]:
    """E, A, a of L = E + A N^-a: for each E on a grid a line through logarithms, the best kept."""
    best = (np.inf, 0.0, 0.0, 0.0)
    for floor in np.linspace(0.0, losses.min() * 0.999, 2000):
        slope, offset = np.polyfit(np.log(sizes), np.log(losses - floor), 1)
        error = np.sum((floor + np.exp(offset) * sizes**slope - losses) ** 2)
        best = min(best, (error, floor, np.exp(offset), -slope))
    return best[1:]


def points(rows: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Sizes and mean losses over seeds."""
    chosen = [row for row in rows if row["part"] == "sizes"]
    sizes = sorted({row["in_blocks"] for row in chosen})
    means = [np.mean([r["loss"] for r in chosen if r["in_blocks"] == size]) for size in sizes]
    return np.array(sizes, float), np.array(means)


def print_law(rows: list[dict]) -> None:
    sizes, losses = points(rows)
    floor, factor, power = fit(sizes, losses)
    fitted = floor + factor * sizes**-power
    print(f"L(N) = {floor:.3f} + {factor:.3g} N^-{power:.3f}")
    print(f"largest residual {np.abs(fitted - losses).max():.4f} nats")


def draw(rows: list[dict]) -> None:
    """Both results side by side, as docs/images/scaling.svg."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "scaling", "svg.fonttype": "none"})
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    sizes, losses = points(rows)
    floor, factor, power = fit(sizes, losses)
    line = np.geomspace(sizes[0], sizes[-1], 100)
    left.plot(line, floor + factor * line**-power, color="0.6")
    left.plot(sizes, losses, "o", color="black")
    left.set(xscale="log", xlabel="parameters of the blocks", ylabel="validation loss, nats a byte")
    left.set_xticks(sizes, [f"{size / 1000:.0f}k" for size in sizes], minor=False)
    left.set_xticks([], minor=True)
    left.set_title(f"L(N) = {floor:.2f} + {factor:.3g} N$^{{-{power:.2f}}}$")
    for width, shade in zip(WIDTHS, ("0.7", "0.4", "0.0"), strict=True):
        chosen = [row for row in rows if row["part"] == "rates" and row["width"] == width]
        rates = sorted({row["rate"] for row in chosen})
        means = [np.mean([r["loss"] for r in chosen if r["rate"] == rate]) for rate in rates]
        right.plot(rates, means, "o-", color=shade, label=f"width {width}")
    right.set(xscale="log", xlabel="Muon's learning rate", title=f"{RATE_STEPS} steps")
    right.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
    right.set_xticks([], minor=True)
    right.legend()
    figure.savefig(FIGURE, metadata={"Date": None})
    print_law(rows)
    print(f"drawn: {FIGURE}")


if __name__ == "__main__":
    main()
