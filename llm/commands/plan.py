"""python -m llm plan CONFIG [--topology v5p:4x4x4 | --devices 8 --device h100] [--search]
[--section.key VALUE ...]: what will a step need on devices that need not be here?

Compiles the real training step, and reads memory, collectives and costs from the program. The
plan reads no corpus, makes no run and runs nothing, so every number that it prints is an estimate.
Every setting is a flag too, such as --mesh.fsdp 8; `python train.py --help` lists them.
"""

import json
import os
import sys
from typing import TYPE_CHECKING, Any, Self

import pydantic
from pydantic import PositiveInt

from llm.commands.flags import CommandLine, argument, parse
from llm.config import Config, setting
from llm.errors import UsageError
from llm.runtime import prepare_process

if TYPE_CHECKING:
    from llm.planning.plan import Facts
    from llm.planning.search import Candidate
    from llm.planning.targets import Target


class Options(CommandLine):
    """The command line."""

    config: str = argument("CONFIG", "configuration file")
    topology: str = setting("", "a slice of TPUs: v5p:4x4x4, v5e:16x16 (needs '.[plan]')", "NAME")
    devices: PositiveInt | None = setting(None, "number of devices of the kind --device")
    device: str = setting(
        "", "h100, a100, ... or cpu; without any: the device that is here", "NAME"
    )
    search: bool = setting(False, "rank meshes, remat and micro-batches")
    tries: PositiveInt = setting(8, "most compilations of a search")
    vocab_size: PositiveInt | None = setting(None, "size of a vocabulary that the corpus decides")
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
    """0, also when it does not fit: then `fits` is false.

    Raises:
      UsageError: no such device or topology, or settings that cannot be used on it.
    """
    chosen = parse(Options, arguments)
    config = chosen.settings.resolved()
    vocab_size = find_vocab_size(config, chosen.vocab_size)
    prepare_process()
    target = _find_target(chosen)
    plans, considered = _plans(chosen, config, vocab_size, target)
    _write(chosen, plans, considered)
    return 0


def find_vocab_size(config: Config, given: int | None) -> int:
    """Tokens of the vocabulary, without the corpus.

    Raises:
      UsageError: only the corpus knows.
    """
    from llm.text.tokenizer import known_vocab_size

    known = known_vocab_size(config.tokenizer.kind)
    if known is not None and given not in (None, known):
        raise UsageError(
            f"--vocab-size {given}: tokenizer.kind = {config.tokenizer.kind!r} has {known} tokens; "
            "leave it out"
        )
    if config.tokenizer.kind == "bpe":
        return given or config.tokenizer.vocab_size
    if not (known or given):
        raise UsageError(
            f"tokenizer.kind = {config.tokenizer.kind!r}: how many tokens it has is known when the "
            "corpus is read, which a plan does not; give the number, as --vocab-size 65"
        )
    return known or given  # type: ignore[return-value]


def memory_fraction(given: float | None) -> float:
    """Of a GPU's memory, what a program can have."""
    from llm.planning.plan import GPU_FRACTION

    text = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_FRACTION))
    name = "XLA_PYTHON_CLIENT_MEM_FRACTION" if given is None else "--memory-fraction"
    try:
        fraction = float(text) if given is None else given
    except ValueError:
        raise UsageError(f"{name} = {text!r}: expected a number") from None
    if not 0.0 < fraction <= 1.0:
        raise UsageError(f"{name} = {fraction}: expected a fraction above 0 and at most 1")
    return fraction


def _find_target(chosen: Options) -> "Target":
    from llm.planning import targets

    count = (1 if chosen.devices is None else chosen.devices) if chosen.device else None
    targets.prepare_environment(chosen.topology, count)
    if chosen.topology:
        return targets.topology(chosen.topology)
    if count is None:
        return targets.present()
    from llm.planning.devices import find_kind

    kind = "cpu" if chosen.device == "cpu" else find_kind(chosen.device)
    return targets.simulated(kind, count)


def _plans(
    chosen: Options, config: Config, vocab_size: int, target: "Target"
) -> tuple[list["Facts"], int]:
    from llm.planning.plan import plan_step
    from llm.planning.search import search

    fraction = memory_fraction(chosen.memory_fraction)
    if not chosen.search:
        _say(chosen, f"compiling a step for {target.name}")
        return [plan_step(config, vocab_size, target, fraction)], 1

    def report(number: int, total: int, candidate: "Candidate") -> None:
        _say(chosen, f"compiling {number} of {total}: {_spelled(candidate.config)}")

    return search(config, vocab_size, target, fraction, chosen.tries, report)


def _spelled(config: Config) -> str:
    """The settings that a search varies, in a line."""
    mesh = " ".join(f"{axis}={size}" for axis, size in config.mesh if size != 1)
    training = config.training
    micro = training.micro_batch_size or training.batch_size
    return f"{mesh or 'one device'}, remat {training.remat}, micro-batch {micro}"


def _say(chosen: Options, text: str) -> None:
    if not chosen.as_json or chosen.search:
        print(text, file=sys.stderr, flush=True)


def _write(chosen: Options, plans: list["Facts"], considered: int) -> None:
    if chosen.as_json:
        answer: dict[str, Any] = plans[0]
        if chosen.search:
            answer = {"estimate": True, "considered": considered, "ranked": plans}
        print(json.dumps(answer, allow_nan=False))
        return
    from llm.planning.plan_tables import make_console, show_plan, show_ranking

    console = make_console()
    if chosen.search:
        show_ranking(plans, considered, console)
    show_plan(plans[0], console)
