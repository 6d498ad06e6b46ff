"""Greedy continuation of a prompt, by us, by transformers and by nanoGPT, taking turns.

    python benchmarks/decode.py [--nanogpt PATH] [--theirs PYTHON] [--model 124m|small]
                                [--rows N] [--prompt TOKENS] [--new TOKENS]

A GPT-2 with random weights, float32, one text or N at once: 16 tokens of prompt, then 64 more, one
after the other. The time is of the whole continuation, its prompt included. transformers decodes
with its key/value cache; nanoGPT, a clone of https://github.com/karpathy/nanoGPT at PATH, has none.
With `--prompt 512 --new 1` it is nearly all the time that a prompt takes.

    124m     12 layers x 768, the GPT-2 vocabulary
    small    2 layers x 128: to see that the script runs
"""

import argparse
import copy
import functools
import sys
from pathlib import Path

from turns import Side, serve, take_turns

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY, CONTEXT = 50257, 1024
MODELS = {
    "124m": {"n_layer": 12, "n_head": 12, "width": 768},
    "small": {"n_layer": 2, "n_head": 2, "width": 128},
}


def main() -> None:
    """Start the sides, let them take turns, print the table and one JSON line."""
    parser = argparse.ArgumentParser(description="Decoding: ours, transformers and nanoGPT.")
    parser.add_argument("--nanogpt", help="a clone of nanoGPT; without it, transformers alone")
    parser.add_argument("--model", choices=MODELS, default="124m")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    parser.add_argument(
        "--theirs", default=sys.executable, help="a Python with torch and transformers"
    )
    parser.add_argument("--rows", type=int, default=1, help="texts that are continued together")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens that follow it")
    options = parser.parse_args()
    sizes = {name: getattr(options, name) for name in ("rows", "prompt", "new")}
    if not (min(sizes.values()) > 0 and options.prompt + options.new <= CONTEXT):
        parser.error(f"{sizes}: expected 1 or more of each, and texts of at most {CONTEXT} tokens")
    model = MODELS[options.model] | sizes
    commands = {
        "ours": [sys.executable, __file__, "--side", "ours"],
        "transformers": [options.theirs, __file__, "--side", "transformers"],
    }
    if options.nanogpt:
        if not Path(options.nanogpt, "model.py").is_file():
            parser.error(f"{options.nanogpt} has no model.py; expected a clone of nanoGPT")
        commands["nanoGPT"] = [options.theirs, __file__, "--side", "nanogpt", options.nanogpt]
    take_turns([Side(name, command, model) for name, command in commands.items()], options.rounds)


def our_step(model):
    sys.path.insert(0, str(ROOT))
    from llm.runtime import prepare_process

    prepare_process()
    import jax
    import numpy as np

    from llm.inference.decode import Decoder, Request
    from llm.inference.records import Sampling
    from llm.model.gpt import ModelSpec, initialise
    from llm.model_config import ModelConfig
    from llm.text.tokenizer import tiktoken_tokenizer

    config = ModelConfig(
        n_layer=model["n_layer"],
        n_head=model["n_head"],
        d_model=model["width"],
        context_length=CONTEXT,
    )
    tokenizer = copy.copy(tiktoken_tokenizer("gpt2"))
    tokenizer.end_of_text = None  # random weights may draw it, and the text would end there
    spec = ModelSpec(config, tokenizer.vocab_size)
    decoder = Decoder.create(spec, initialise(spec, jax.random.key(0)), tokenizer)
    rows, prompt, new = model["rows"], model["prompt"], model["new"]
    request = Request(np.arange(prompt), Sampling(temperature=0.0), max_new_tokens=new)

    def step():
        tokens = sum(len(progress.tokens) for progress in decoder.generate([request] * rows))
        assert tokens == rows * (prompt + new)

    return f"jax-{jax.__version__}", step


def transformers_step(model):
    import torch
    import transformers
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=model["n_layer"],
        n_head=model["n_head"],
        n_embd=model["width"],
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        eos_token_id=None,
    )
    network = GPT2LMHeadModel(config).eval()
    tokens = torch.arange(model["prompt"])[None].repeat(model["rows"], 1)

    def step():
        with torch.inference_mode():
            text = network.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=model["new"],
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )
        assert text.shape == (model["rows"], model["prompt"] + model["new"])

    return f"transformers-{transformers.__version__}", step


def nanogpt_step(path, model):
    sys.path.insert(0, path)
    import torch
    from model import GPT, GPTConfig

    torch.manual_seed(0)
    network = GPT(
        GPTConfig(
            block_size=CONTEXT,
            vocab_size=VOCABULARY,
            n_layer=model["n_layer"],
            n_head=model["n_head"],
            n_embd=model["width"],
            dropout=0.0,
        )
    ).eval()
    tokens = torch.arange(model["prompt"])[None].repeat(model["rows"], 1)

    def step():
        with torch.inference_mode():
            network.generate(tokens, model["new"], top_k=1)

    return f"torch-{torch.__version__}", step


if __name__ == "__main__":
    if "--side" not in sys.argv:
        main()
    elif "nanogpt" in sys.argv:
        serve(functools.partial(nanogpt_step, sys.argv[-1]), 1, 1)
    else:
        serve(our_step if "ours" in sys.argv else transformers_step, 1, 1)
