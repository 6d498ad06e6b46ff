"""python -m llm plan CONFIG [--topology v5p:4x4x4 | --devices 8 --device h100] [--search]
[--section.key VALUE ...]: what will a step need on devices that need not be here?

Compiles the real training step, and reads memory, collectives and costs from the program. The
plan reads no corpus, makes no run and runs nothing, so every number that it prints is an estimate.
Every setting is a flag too, such as --mesh.fsdp 8; `python train.py --help` lists them.
"""

import contextlib
import json
import os
from typing import Any, Self

import pydantic
from pydantic import PositiveInt

from llm.commands.flags import CommandLine, argument, parse
from llm.config import Config
from llm.console import say
from llm.errors import UsageError
from llm.runtime import prepare_process
from llm.section import setting


class Options(CommandLine):
    """The command line."""

    config: str = argument("CONFIG", "configuration file")
    topology: str = setting("", "a slice of TPUs: v5p:4x4x4, v5e:16x16 (needs '.[plan]')", "NAME")
    devices: PositiveInt | None = setting(None, "number of devices of the kind --device")
    device: str = setting("", "h100, a100, ... or cpu; by default the device that is here", "NAME")
    search: bool = setting(False, "rank meshes, remat and micro-batches")
    tries: PositiveInt = setting(8, "most compilations of a search")
    vocab_size: PositiveInt | None = setting(None, "vocabulary size, if the corpus decides it")
    memory_fraction: float | None = setting(
        None, "share of a GPU's memory to use; else $XLA_PYTHON_CLIENT_MEM_FRACTION, else 0.75"
    )
    as_json: bool = setting(False, "print one JSON object instead of tables", flag="json")
    settings: Config = Config()

    @pydantic.model_validator(mode="after")
    def _check_devices(self) -> Self:
        if self.topology and (self.devices is not None or self.device):
            raise UsageError("--topology says which devices; leave out --devices and --device")
        if self.devices is not None and not self.device:
            raise UsageError(f"--devices {self.devices}: of what? add --device, as --device h100")
        return self


def main(arguments: list[str]) -> int:
    """0, also if the step does not fit: then `fits` is false.

    Raises:
      UsageError: no such device or topology, or settings that cannot be used on it.
    """
    chosen = parse(Options, arguments)
    config = chosen.settings.resolved()
    vocab_size = find_vocab_size(config, chosen.vocab_size)
    fraction = memory_fraction(chosen.memory_fraction)
    prepare_process()
    from llm.planning import targets

    # JAX reads this environment when it is imported, so nothing before this line may import it.
    count = (chosen.devices or 1) if chosen.device else None
    targets.prepare_environment(chosen.topology, count)
    target = targets.find_target(chosen.topology, chosen.device, count)
    from llm.planning.plan import plan_step
    from llm.planning.plan_tables import axes, make_console, show_plan, show_ranking
    from llm.planning.search import search

    def report(number: int, total: int, config: Config) -> None:
        training = config.training
        micro = training.micro_batch_size or training.batch_size
        setting = f"{axes(dict(config.mesh))}, remat {training.remat}, micro-batch {micro}"
        say(f"compiling {number} of {total}: {setting}")

    if chosen.search:
        plans, considered = search(config, vocab_size, target, fraction, chosen.tries, report)
        facts: Any = {"estimate": True, "considered": considered, "ranked": plans}
    else:
        say(f"compiling a step for {target.name}")
        facts = plan_step(config, vocab_size, target, fraction)
        plans = [facts]
    if chosen.as_json:
        print(json.dumps(facts, allow_nan=False))
        return 0
    console = make_console()
    if chosen.search:
        show_ranking(plans, considered, console)
    show_plan(plans[0], console)
    return 0


def find_vocab_size(config: Config, given: int | None) -> int:
    """Number of tokens in the vocabulary, without the corpus.

    Raises:
      UsageError: only the corpus determines it, or `given` contradicts it.
    """
    from llm.text.tokenizer import known_vocab_size

    kind = config.tokenizer.kind
    known = known_vocab_size(kind)
    if known and given not in (None, known):
        raise UsageError(
            f"--vocab-size {given}: tokenizer.kind = {kind!r} has {known} tokens; leave it out"
        )
    size = known or given or (config.tokenizer.vocab_size if kind == "bpe" else None)
    if size is None:
        raise UsageError(
            f"tokenizer.kind = {kind!r}: the corpus determines how many tokens it has, and a plan "
            "does not read it; give the number, as --vocab-size 65"
        )
    return size


def memory_fraction(given: float | None) -> float:
    """The share of a GPU's memory that a program may use, decided as JAX decides it."""
    name, text = "--memory-fraction", str(given)
    if given is None:
        name = "XLA_PYTHON_CLIENT_MEM_FRACTION"
        # https://docs.jax.dev/en/latest/gpu_memory_allocation.html
        text = os.environ.get(name, "0.75")
    with contextlib.suppress(ValueError):
        if 0.0 < float(text) <= 1.0:
            return float(text)
    raise UsageError(f"{name} = {text}: expected a fraction above 0 and at most 1")
