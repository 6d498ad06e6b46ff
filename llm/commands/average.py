"""python -m llm average RUN --last N --output RUN2: a run of the mean of checkpoints.

The mean of their parameters is uniform, over --last N checkpoints or those of --steps A B C;
checkpoint.keep says how many a run keeps. RUN2 has one checkpoint, with the number of its newest
member, that sample, score, serve and the others open. Each member and the mean are evaluated on the
validation text of RUN.

Source: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization".
"""

import dataclasses
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import pydantic

from llm.commands.flags import CommandLine, InputFile, argument, parse
from llm.commands.import_hf import new_folder
from llm.commands.shared import corpus_of, counted
from llm.console import say
from llm.errors import UsageError
from llm.runtime import prepare_process
from llm.section import Positive, setting


class Options(CommandLine):
    """The command line."""

    run: InputFile = argument("RUN", "run directory")
    output: str = setting(..., "run directory to make", "RUN2")
    last: Positive | None = setting(None, "average the N newest checkpoints", "N")
    steps: tuple[pydantic.NonNegativeInt, ...] = setting((), "average these checkpoints", "STEP")
    as_json: bool = setting(False, "print what was made as one JSON object", flag="json")


def main(arguments: list[str]) -> int:
    """Exit codes as in docs/design.md; errors are raised as LLMError."""
    options = parse(Options, arguments)
    prepare_process()  # before JAX is imported
    import jax

    from llm.run.directory import RunDirectory
    from llm.run.open import open_model

    run, target = RunDirectory(Path(options.run)), Path(options.output)
    steps = members_of(run, options)
    if run.path.resolve() in target.resolve().parents:
        raise UsageError(f"--output {target} lies in {run.path}; name a folder outside of it")

    @functools.partial(jax.jit, donate_argnums=0)
    def add(mean: Any, member: Any, n: Any) -> Any:
        """A running mean: two models are in memory, and equal members give themselves."""
        return jax.tree.map(lambda a, b: a + (b - a) / n, mean, member)

    with new_folder(target, run.path) as partial:
        loss_of = validation_loss(run)
        mean, members = None, list[dict[str, Any]]()
        for n, step in enumerate(steps, 1):
            opened = open_model(run.path, step)
            member = {"step": step, "params_sha256": opened.params_sha256}
            members.append(member | {"validation_loss": loss_of(opened.spec, opened.params)})
            mean = opened.params if mean is None else add(mean, opened.params, n)
            opened = dataclasses.replace(opened, params={})
        sha256 = write_run(partial, target, run, opened, mean, members)
        loss = loss_of(opened.spec, mean)
    report = {"run": options.output, "step": steps[-1], "params_sha256": sha256}
    report |= {"validation_loss": loss, "members": members}
    if options.as_json:
        print(json.dumps(report))
    for row in (*members, {"step": "mean", "validation_loss": loss}):
        found = row["validation_loss"]
        say(f"{row['step']!s:>8}  validation loss {'-' if found is None else f'{found:.4f}'}")
    say(f"{options.output} holds the mean of {counted(len(steps), 'checkpoint')}")
    return 0


def members_of(run: Any, options: Options) -> list[int]:
    """The steps to average, ascending.

    Raises:
      UsageError: a step that is not there, fewer than two, or not one of --last and --steps.
    """
    from llm.run.checkpoint import saved_steps

    run.read_config()
    there = saved_steps(run.checkpoints)
    if (options.last is None) == (not options.steps):
        raise UsageError("which checkpoints? Give either --last N or --steps A B C")
    steps = sorted(set(options.steps)) or there[-(options.last or 0) :]
    missing, least = sorted(set(steps) - set(there)), max(2, options.last or 0)
    if missing or len(steps) < least:
        found = f"no checkpoint of step {missing[0]}" if missing else f"{len(steps)} to average"
        raise UsageError(
            f"{run.path}: {found}; expected at least {least} of those that are there: "
            f"{', '.join(map(str, there)) or 'none'} (checkpoint.keep says how many stay)"
        )
    return steps


def validation_loss(run: Any) -> Any:
    """A function of a spec and parameters: nats per token of the run's validation text, or None."""
    from llm.text.batches import held_out_batches
    from llm.training.evaluate import evaluate, make_evaluation_step

    config = run.read_config()
    corpus = corpus_of(run, config)
    size = config.training.evaluation_size

    def loss(spec: Any, params: Any) -> float | None:
        if len(corpus.validation) < 2:
            return None
        batches = itertools.chain.from_iterable(
            held_out_batches(config, corpus, source, size, None) for source in corpus.sources
        )
        step = make_evaluation_step(spec, next(iter(params.values())).sharding.mesh)
        return evaluate(step, params, batches, corpus.tokenizer.byte_lengths()).loss_nats

    return loss


def write_run(partial: Path, target: Path, run: Any, opened: Any, mean: Any, members: Any) -> str:
    """Write the run that becomes `target`; the sha256 of its parameters."""
    import jax
    import numpy as np

    from llm.run.checkpoint import Checkpoints, params_sha256, read_receipt
    from llm.run.directory import RunDirectory
    from llm.run.provenance import describe_ancestor, describe_import
    from llm.run.receipt import make_receipt, receipt_logprobs

    made = RunDirectory(partial)
    opened.tokenizer.save(made.tokenizer)
    record = describe_import(RunDirectory(target), opened.spec, opened.tokenizer, run.path)
    record["imported"]["members"] = members
    begun = params_sha256(mean)
    ancestor = describe_ancestor(run.path, opened.step, opened.params_sha256, begun)
    record["ancestor"] = ancestor | {"members": [member["step"] for member in members]}
    made.write_provenance(record | {"data": run.read_provenance()["data"]})
    tokens_BT = np.asarray(read_receipt(run.checkpoints / str(opened.step))["tokens"], np.int32)
    logprobs_BT = receipt_logprobs(opened.spec, mean, tokens_BT)
    checkpoints = Checkpoints(made.checkpoints, keep=1)
    checkpoints.clean()
    groups = {"params": mean, "training": jax.device_put({"step": np.int32(opened.step)})}
    sha256 = opened.tokenizer.sha256
    checkpoints.save(opened.step, groups, lambda: make_receipt(tokens_BT, logprobs_BT, sha256))
    checkpoints.wait()
    config = run.read_config()
    place = config.run.model_copy(update={"dir": str(target)})
    made.write_config(config.model_copy(update={"run": place}))
    return begun
