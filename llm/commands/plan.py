"""python -m llm plan CONFIG [--topology v5p:4x4x4 | --devices 8 --device h100] [--search] [--json]
[--section.key VALUE ...]: what a step will need on devices that need not be here.

Compiles the real training step and reads memory, collectives and costs from the program. It reads
no corpus, makes no run and runs nothing: all that it prints is an estimate.
"""

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from llm.config import Config, load_config
from llm.errors import UsageError
from llm.runtime import prepare_process

if TYPE_CHECKING:
    from llm.planning.plan import Plan
    from llm.planning.search import Candidate
    from llm.planning.targets import Target


def main(arguments: list[str]) -> int:
    """0, also when it does not fit: then `fits` is false.

    Raises:
      UsageError: no such device or topology, or settings that cannot be used on it.
    """
    chosen, config = parse(arguments)
    vocab_size = find_vocab_size(config, chosen.vocab_size)
    prepare_process()
    target = _find_target(chosen)
    plans, considered = _plans(chosen, config, vocab_size, target)
    _write(chosen, plans, considered)
    return 0


def parse(arguments: list[str]) -> tuple[argparse.Namespace, Config]:
    """The command's own flags, and the settings with all others over them."""
    parser = argparse.ArgumentParser(
        "python -m llm plan",
        description=__doc__,
        epilog="All other flags are settings, as --mesh.fsdp 8 (python train.py --help).",
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", help="configuration file")
    parser.add_argument(
        "--topology", help="a slice of TPUs: v5p:4x4x4, v5e:16x16 (needs '.[plan]')"
    )
    parser.add_argument("--devices", type=int, help="how many --device there are")
    parser.add_argument("--device", help="h100, a100, ... or cpu; without any: what is here")
    parser.add_argument("--search", action="store_true", help="rank meshes, remat, micro-batches")
    parser.add_argument("--tries", type=int, default=8, help="compilations of a search, at most")
    parser.add_argument("--vocab-size", type=int, help="where the corpus would decide it")
    parser.add_argument(
        "--memory-fraction",
        type=float,
        help="of a GPU's memory; else $XLA_PYTHON_CLIENT_MEM_FRACTION, else JAX's own 0.75",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    chosen, settings = parser.parse_known_args(arguments)
    if chosen.topology and (chosen.devices is not None or chosen.device):
        raise UsageError("--topology says which devices; leave out --devices and --device")
    if chosen.devices is not None and not chosen.device:
        raise UsageError(f"--devices {chosen.devices}: of what? add --device, as --device h100")
    if chosen.devices is not None and chosen.devices < 1:
        raise UsageError(f"--devices {chosen.devices}: expected at least 1")
    if chosen.tries < 1:
        raise UsageError(f"--tries {chosen.tries}: expected at least 1")
    config = load_config(chosen.config, settings, program="python -m llm plan")
    return chosen, config.resolved()


def find_vocab_size(config: Config, given: int | None) -> int:
    """Tokens of the vocabulary, without the corpus.

    Raises:
      UsageError: only the corpus knows.
    """
    from llm.text.tokenizer import known_vocab_size

    known = known_vocab_size(config.tokenizer.kind)
    if given is not None and given < 1:
        raise UsageError(f"--vocab-size {given}: expected at least 1")
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


def _find_target(chosen: argparse.Namespace) -> "Target":
    from llm.planning import targets

    count = (1 if chosen.devices is None else chosen.devices) if chosen.device else None
    targets.prepare_environment(chosen.topology, count)
    if chosen.topology:
        return targets.topology(chosen.topology)
    if count is None:
        return targets.present()
    from llm.model.devices import find_kind

    kind = "cpu" if chosen.device == "cpu" else find_kind(chosen.device)
    return targets.simulated(kind, count)


def _plans(
    chosen: argparse.Namespace, config: Config, vocab_size: int, target: "Target"
) -> tuple[list["Plan"], int]:
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


def _say(chosen: argparse.Namespace, text: str) -> None:
    if not chosen.json or chosen.search:
        print(text, file=sys.stderr, flush=True)


def _write(chosen: argparse.Namespace, plans: list["Plan"], considered: int) -> None:
    from llm.planning.plan import describe

    described = [describe(plan) for plan in plans]
    if chosen.json:
        answer: dict[str, Any] = described[0]
        if chosen.search:
            answer = {"estimate": True, "considered": considered, "ranked": described}
        print(json.dumps(answer, allow_nan=False))
        return
    from llm.planning.plan_tables import make_console, show_plan, show_ranking

    console = make_console()
    if chosen.search:
        show_ranking(described, considered, console)
    show_plan(described[0], console)
