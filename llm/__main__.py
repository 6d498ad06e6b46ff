"""`python -m llm COMMAND ...`: runs llm/commands/COMMAND.py."""

from __future__ import annotations

import difflib
import importlib
import sys

from llm.commands import run_command

# The name of a command, its module, and what it does.
COMMANDS = {
    "train": ("train", "pretrain from a configuration file, or resume"),
    "sample": ("sample", "write text, and the probability of every token"),
    "score": ("score", "the probability of every token of a given text"),
    "eval": ("eval", "run tasks of lm-evaluation-harness"),
    "serve": ("serve", "an HTTP server: OpenAI's completions, and a live page"),
    "plan": ("plan", "what a step needs on devices that are not here"),
    "bench": ("bench", "how fast each part is on this machine"),
    "replay": ("replay", "the exact batch that a step was trained on"),
    "diff": ("diff", "where two runs part, or how two dumps of a text differ"),
    "verify": ("verify", "check a run's checkpoints: manifest, parameters, receipt"),
    "import-hf": ("import_hf", "make a run of a Hugging Face model"),
    "export-hf": ("export_hf", "make a Hugging Face model of a run"),
}


def main() -> int:
    """Run the command that the first word names, with the words after it."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name.replace("_", "-") not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(COMMANDS)}"
        print(f"error: there is no command {name!r}; {hint}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"llm.commands.{COMMANDS[name.replace('_', '-')][0]}")
    return run_command(module.main, sys.argv[2:])


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {meaning}" for name, (_, meaning) in COMMANDS.items()]
    lines = ["usage: python -m llm COMMAND ...", "", "Commands:", "", *lines, ""]
    return "\n".join([*lines, "python -m llm COMMAND --help lists the flags of a command."])


if __name__ == "__main__":
    sys.exit(main())
