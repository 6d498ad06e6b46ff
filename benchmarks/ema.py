"""Whether an exponential average of the parameters predicts better than the last ones.

    python benchmarks/ema.py shakespeare 1 [--optimizer.schedule=constant] [--data.source=FILE]

Trains the small recipe of benchmarks/ablation.py on one of its corpora with a seed, keeps averages
beside it, and evaluates all of them after the last step. The average of step n with a decay d is
debiased as Adam's moments are: it moves by (1 - d) / (1 - d^n) of the way to the new parameters.
The result is one line of JSON, as in benchmarks/results/ema.jsonl. The framework has no such
option, because it does not pay (benchmarks/README.md).
"""

import json
import sys
import tempfile
from typing import Any

import ablation
import jax
import jax.numpy as jnp

from llm.commands import train
from llm.training import loop
from llm.training.evaluate import evaluate

DECAYS = (0.9, 0.98, 0.99, 0.999)


def main() -> None:
    corpus, seed, *flags = sys.argv[1:]
    averages: dict[float, Any] = {}
    found: dict[str, float] = {}
    make_train_step, run = loop.make_train_step, loop.Validation.run

    @jax.jit
    def moved(average: Any, weights: Any, share: Any) -> Any:
        return jax.tree.map(lambda a, b: a + share * (b - a), average, weights)

    def make_with_averages(*arguments: Any) -> Any:
        step_fn = make_train_step(*arguments)

        def step(state: Any, batch: Any) -> Any:
            state, metrics = step_fn(state, batch)
            for decay in DECAYS:
                share = (1 - decay) / (1 - decay ** int(state.step))
                held = averages.get(decay) or jax.tree.map(jnp.copy, state.weights)
                averages[decay] = moved(held, state.weights, share)
            return state, metrics

        return step

    def run_on_averages(self: Any, state: Any, step: int) -> None:
        run(self, state, step)
        [source] = self._job.corpus.sources
        for name, weights in {"last": state.weights, **averages}.items():
            batches = self._until_stopped(step, source)
            lengths = self._job.corpus.tokenizer.byte_lengths()
            found[str(name)] = evaluate(self._step_fn, weights, batches, lengths).loss_nats

    loop.make_train_step, loop.Validation.run = make_with_averages, run_on_averages
    settings = {**ablation.SHAPE, **ablation.CORPORA[corpus]}
    if corpus == "shakespeare" and not any(flag.startswith("--data.source") for flag in flags):
        settings["data.source"] = ablation.URL
    with tempfile.TemporaryDirectory() as folder:
        train.main([
            ablation.CONFIG, *[f"--{name}={value}" for name, value in settings.items()],
            "--training.eval-every=0", "--checkpoint.every=0", "--sample.max-new-tokens=0",
            "--logging.progress=none", "--run.seed", seed, "--run.dir", f"{folder}/run", *flags,
        ])  # fmt: skip
    print(json.dumps({"corpus": corpus, "seed": int(seed), "flags": flags, **found}))


if __name__ == "__main__":
    main()
