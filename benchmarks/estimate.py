"""What nanoGPT's estimate of the validation loss says of a run of ours, and how much it scatters.

    python train.py configs/shakespeare_char_cpu.toml --run.dir runs/shakespeare_char_cpu
    python benchmarks/estimate.py runs/shakespeare_char_cpu [--draws 200]

nanoGPT's train.py takes the mean over eval_iters = 20 random batches of batch_size = 12 windows.
Here that estimate is drawn many times, beside the loss over every window of the split.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--draws", type=int, default=200, help="estimates to draw")
    parser.add_argument("--batches", type=int, default=20, help="of each; nanoGPT's eval_iters")
    parser.add_argument("--batch-size", type=int, default=12)
    options = parser.parse_args()
    losses = window_losses(options.run)
    random = np.random.default_rng(0)
    windows = (options.draws, options.batches * options.batch_size)
    estimates = losses[random.integers(0, len(losses), windows)].mean(axis=1)
    result = {
        "windows": len(losses),
        "mean": float(losses.mean()),
        "estimate_std": float(estimates.std()),
        "estimate_min": float(estimates.min()),
        "share_at_most_1.89": float((estimates <= 1.89).mean()),
    }
    print(f"mean over all {len(losses):,} windows, wherever they begin: {result['mean']:.4f} nats")
    print(f"nanoGPT's estimate: standard deviation {result['estimate_std']:.4f}")
    print(f"  {100 * result['share_at_most_1.89']:.0f} % of {options.draws} estimates are <= 1.89")
    print(json.dumps(result))


def window_losses(run_dir: Path) -> np.ndarray:
    """Mean nats per token of each window of the validation split, from every 8th token on."""
    from llm.runtime import prepare_process

    prepare_process()
    import jax
    import jax.numpy as jnp

    from llm.model.gpt import bind
    from llm.model.loss import token_log_likelihood
    from llm.run.directory import RunDirectory
    from llm.run.open import open_model
    from llm.text.shards import prepare

    opened = open_model(run_dir)
    config = RunDirectory(run_dir).read_config()
    split = prepare(config.data, config.tokenizer).validation
    context = config.model.context_length

    @jax.jit
    def losses_of(params, tokens_BT):
        logits_BTV = bind(opened.spec, params)(tokens_BT[:, :-1])
        return -jnp.mean(token_log_likelihood(logits_BTV, tokens_BT[:, 1:]), axis=1)

    starts = np.arange(0, len(split) - context, 8)
    starts = starts[: len(starts) // 128 * 128]
    batches = starts.reshape(-1, 128)
    parts = [losses_of(opened.params, split.windows(rows, context + 1)) for rows in batches]
    return np.concatenate([np.asarray(part) for part in parts])


if __name__ == "__main__":
    main()
