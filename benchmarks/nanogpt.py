"""One training step of ours and of nanoGPT, side by side on this machine.

    python benchmarks/nanogpt.py PATH/TO/nanoGPT [--recipe RECIPE] [--dtype DTYPE ...]
        [--compile] [--theirs PYTHON]

PATH is a clone of https://github.com/karpathy/nanoGPT, which stays outside this repository; its
model and its optimizer are used as they are. Each side runs in a process of its own with the whole
machine, and the two take turns: some steps of one, then as many of the other. So other work on the
machine falls on both, and the ratio means more than either time. The step is everything from a
batch in memory to updated weights: forward, backward, clipping, AdamW.

What it is not: a comparison of losses, which is configs/shakespeare_char_cpu.toml, or of loading.

    cpu     4 layers x 128, batch 12 x 64: the recipe for a laptop in nanoGPT's README
    large   6 layers x 384, batch 16 x 256: its recipe for a GPU, with a batch that fits a laptop
    gpt2    12 layers x 768, batch 16 x 1024, GPT-2's vocabulary: for a GPU
    small   2 layers x 64, batch 4 x 32: to see that the script runs

All without dropout and biases. --dtype names what nanoGPT computes in, each in a turn of its own:
bfloat16 is torch's autocast; by default float32 on a CPU and bfloat16 on a GPU. Ours computes in
the last that is named. With --compile also nanoGPT through
torch.compile, as its train.py does by default.
"""

import argparse
import contextlib
import functools
import sys
from pathlib import Path

from turns import Side, serve, take_turns

ROOT = Path(__file__).resolve().parent.parent
STEPS_PER_TURN = 8
CHARACTERS = {"vocabulary": 65, "config": "shakespeare_char_cpu.toml"}  # of Tiny Shakespeare
RECIPES = {
    "cpu": {"n_layer": 4, "n_head": 4, "width": 128, "context": 64, "batch": 12, **CHARACTERS},
    "large": {"n_layer": 6, "n_head": 6, "width": 384, "context": 256, "batch": 16, **CHARACTERS},
    "gpt2": {
        "n_layer": 12, "n_head": 12, "width": 768, "context": 1024, "batch": 16,
        "vocabulary": 50304, "config": "gpt2_124m.toml",
    },
    "small": {"n_layer": 2, "n_head": 2, "width": 64, "context": 32, "batch": 4, **CHARACTERS},
}  # fmt: skip


def main() -> None:
    """Start both sides, let them take turns, print the table and one JSON line."""
    options = parse_options()
    recipe = RECIPES[options.recipe]
    command = [options.theirs, __file__, "--side", "theirs", options.nanogpt]
    sides = [
        Side(
            "ours",
            [sys.executable, __file__, "--side", "ours", "."],
            {**recipe, "dtype": options.dtype[-1]},
        )
    ]
    for dtype in options.dtype:
        for compiled in (False, True)[: 1 + options.compile]:
            name = f"nanoGPT {dtype}".removesuffix(" auto") + ", torch.compile" * compiled
            sides.append(Side(name, command, {**recipe, "dtype": dtype, "compiled": compiled}))
    take_turns(sides, options.rounds)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One step of ours and of nanoGPT, side by side.")
    parser.add_argument("nanogpt", help="a clone of nanoGPT")
    parser.add_argument("--recipe", choices=RECIPES, default="cpu")
    parser.add_argument(
        "--dtype", nargs="+", choices=["auto", "float32", "bfloat16"], default=["auto"]
    )
    parser.add_argument("--compile", action="store_true", help="also through torch.compile")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each side")
    parser.add_argument(
        "--theirs", default=sys.executable, help="a Python with torch; default: this one"
    )
    parser.add_argument("--side", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side != "ours" and not Path(options.nanogpt, "model.py").is_file():
        parser.error(f"{options.nanogpt} has no model.py; expected a clone of nanoGPT")
    return options


def our_step(recipe):
    """(version, a function that takes one step and waits for it)."""
    sys.path.insert(0, str(ROOT))
    from llm.runtime import prepare_process

    prepare_process()
    import jax
    import numpy as np

    from llm.config import load_config
    from llm.run.setup import make_setup
    from llm.text.batches import Batch
    from llm.training.optimizer import make_optimizer
    from llm.training.state import create_state
    from llm.training.step import make_train_step

    flags = {
        "model.n_layer": recipe["n_layer"],
        "model.n_head": recipe["n_head"],
        "model.d_model": recipe["width"],
        "model.context_length": recipe["context"],
        "model.dropout": 0.0,
        "model.bias": False,
        "training.batch_size": recipe["batch"],
        "training.micro_batch_size": 0,
        "training.compute_dtype": recipe["dtype"],
    }
    config = load_config(ROOT / "configs" / recipe["config"], flags).resolved()
    setup = make_setup(config, recipe["vocabulary"])
    spec, mesh = setup.spec, setup.mesh
    train_step = make_train_step(spec, config.optimizer, config.training, mesh)
    state = create_state(spec, make_optimizer(config.optimizer), config.run.seed, mesh)
    shape = (recipe["batch"], recipe["context"] + 1)
    tokens = np.random.default_rng(0).integers(0, recipe["vocabulary"], shape).astype(np.int32)

    def step():
        nonlocal state
        state, metrics = train_step(state, Batch(tokens))
        float(metrics["loss"])

    return f"jax-{jax.__version__}", step


def their_step(nanogpt, recipe):
    """As nanoGPT's train.py does it: AdamW with its groups, clipped gradients, autocast."""
    sys.path.insert(0, nanogpt)
    import torch
    from model import GPT, GPTConfig

    torch.manual_seed(1337)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    auto = "bfloat16" if device == "cuda" else "float32"
    in_bfloat16 = (auto if recipe["dtype"] == "auto" else recipe["dtype"]) == "bfloat16"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    narrow = torch.autocast(device, torch.bfloat16) if in_bfloat16 else contextlib.nullcontext()
    model = GPT(
        GPTConfig(
            block_size=recipe["context"],
            vocab_size=recipe["vocabulary"],
            n_layer=recipe["n_layer"],
            n_head=recipe["n_head"],
            n_embd=recipe["width"],
            dropout=0.0,
            bias=False,
        )
    ).to(device)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device)
    shape = (recipe["batch"], recipe["context"] + 1)
    tokens = torch.randint(0, recipe["vocabulary"], shape, device=device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    if recipe.get("compiled"):
        model = torch.compile(model)

    def step():
        with narrow:
            _, loss = model(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return f"torch-{torch.__version__}", step


if __name__ == "__main__":
    if "--side" not in sys.argv:
        main()
    elif "ours" in sys.argv:
        serve(our_step, warm_up=3, steps_per_turn=STEPS_PER_TURN)
    else:
        serve(functools.partial(their_step, sys.argv[-1]), 3, STEPS_PER_TURN)
