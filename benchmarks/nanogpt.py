"""One training step of ours and of nanoGPT, side by side on this machine.

    python benchmarks/nanogpt.py PATH/TO/nanoGPT [--recipe cpu|large] [--theirs PYTHON]

PATH is a clone of https://github.com/karpathy/nanoGPT, which stays outside this repository; its
model and its optimizer are used as they are. Each side runs in a process of its own with the whole
machine, and the two take turns: some steps of one, then as many of the other. So other work on the
machine falls on both, and the ratio means more than either time. The step is everything from a
batch in memory to updated weights: forward, backward, clipping, AdamW.

What it is not: a comparison of losses, which is configs/shakespeare_char_cpu.toml, or of loading.

    cpu     4 layers x 128, batch 12 x 64: the recipe for a laptop in nanoGPT's README
    large   6 layers x 384, batch 16 x 256: its recipe for a GPU, with a batch that fits a laptop

Both without dropout.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 65  # characters of Tiny Shakespeare
STEPS_PER_TURN = 8
RECIPES = {
    "cpu": {"n_layer": 4, "n_head": 4, "width": 128, "context": 64, "batch": 12},
    "large": {"n_layer": 6, "n_head": 6, "width": 384, "context": 256, "batch": 16},
}


def main() -> None:
    """Parent: start both sides, let them take turns, print the table and one JSON line."""
    options = parse_options()
    recipe = RECIPES[options.recipe]
    ours = Side("ours", [sys.executable, __file__, "--side", "ours", "."], recipe)
    theirs = Side(
        "nanoGPT", [options.theirs, __file__, "--side", "theirs", options.nanogpt], recipe
    )
    sides = [ours, theirs]
    for _ in range(options.rounds):
        for side in sides:
            side.take_turn()
    for side in sides:
        side.close()
        low, middle = min(side.milliseconds), statistics.median(side.milliseconds)
        print(f"{side.name:8} {side.version:16} {low:9.1f} ms fastest {middle:9.1f} ms median")
    turns = [a / b for a, b in zip(ours.turns, theirs.turns, strict=True)]
    print(f"ours / nanoGPT: {min(ours.milliseconds) / min(theirs.milliseconds):.2f} of the fastest")
    print(f"steps, {statistics.median(turns):.2f} median over {len(turns)} turns side by side")
    print(json.dumps({"recipe": options.recipe, **{s.name: min(s.milliseconds) for s in sides}}))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One step of ours and of nanoGPT, side by side.")
    parser.add_argument("nanogpt", help="a clone of nanoGPT")
    parser.add_argument("--recipe", choices=RECIPES, default="cpu")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each side")
    parser.add_argument(
        "--theirs", default=sys.executable, help="a Python with torch; default: this one"
    )
    parser.add_argument("--side", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side != "ours" and not Path(options.nanogpt, "model.py").is_file():
        parser.error(f"{options.nanogpt} has no model.py; expected a clone of nanoGPT")
    return options


class Side:
    """A process that takes turns: a line to it starts one, its line back holds the times.

    Attributes:
      milliseconds: of every step.
      turns: median milliseconds of each turn.
    """

    def __init__(self, name: str, command: list[str], recipe: dict[str, int]):
        self.name = name
        self.milliseconds: list[float] = []
        self.turns: list[float] = []
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.version = self._ask(json.dumps(recipe))

    def take_turn(self) -> None:
        times = json.loads(self._ask("go"))
        self.milliseconds += times
        self.turns.append(statistics.median(times))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _ask(self, line: str) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(line, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline().strip()
        if not answer:
            sys.exit(f"{self.name} stopped; what it printed stands above")
        return answer


def serve(side: str, nanogpt: str) -> None:
    """Child: warm up, then some steps for each line that comes."""
    recipe = json.loads(sys.stdin.readline())
    # What is printed while setting up is not an answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    version, step = our_step(recipe) if side == "ours" else their_step(recipe, nanogpt)
    for _ in range(3):
        step()
    print(version, file=answers, flush=True)
    for _ in sys.stdin:
        times = []
        for _ in range(STEPS_PER_TURN):
            start = time.perf_counter()
            step()
            times.append(1000 * (time.perf_counter() - start))
        print(json.dumps(times), file=answers, flush=True)


def our_step(recipe):
    """(version, a function that takes one step and waits for it)."""
    sys.path.insert(0, str(ROOT))
    from llm.runtime import prepare_process

    prepare_process()
    import jax
    import numpy as np

    from llm.config import load_config
    from llm.model.gpt import ModelSpec
    from llm.model.sharding import make_mesh
    from llm.training.optimizer import make_optimizer
    from llm.training.state import create_state
    from llm.training.step import make_train_step

    flags = {
        "--model.n-layer": recipe["n_layer"],
        "--model.n-head": recipe["n_head"],
        "--model.d-model": recipe["width"],
        "--model.context-length": recipe["context"],
        "--training.batch-size": recipe["batch"],
    }
    words = [str(word) for pair in flags.items() for word in pair]
    config = load_config(ROOT / "configs" / "shakespeare_char_cpu.toml", words)
    spec, mesh = ModelSpec(config.model, VOCABULARY), make_mesh(config.mesh)
    train_step = make_train_step(spec, config.optimizer, config.training, mesh)
    state = create_state(spec, make_optimizer(config.optimizer), config.run.seed, mesh)
    shape = (recipe["batch"], recipe["context"] + 1)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, shape).astype(np.int32)

    def step():
        nonlocal state
        state, metrics = train_step(state, tokens)
        float(metrics["loss"])

    return f"jax-{jax.__version__}", step


def their_step(recipe, nanogpt):
    """As nanoGPT's train.py does it on a CPU: float32, AdamW with its groups, gradients clipped."""
    sys.path.insert(0, nanogpt)
    import torch
    from model import GPT, GPTConfig

    torch.manual_seed(1337)
    model = GPT(
        GPTConfig(
            block_size=recipe["context"],
            vocab_size=VOCABULARY,
            n_layer=recipe["n_layer"],
            n_head=recipe["n_head"],
            n_embd=recipe["width"],
            dropout=0.0,
            bias=False,
        )
    )
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    tokens = torch.randint(0, VOCABULARY, (recipe["batch"], recipe["context"] + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step():
        _, loss = model(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return f"torch-{torch.__version__}", step


if __name__ == "__main__":
    if "--side" in sys.argv:
        serve(sys.argv[sys.argv.index("--side") + 1], sys.argv[-1])
    else:
        main()
