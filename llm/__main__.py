"""`python -m llm COMMAND ...`"""

import difflib
import importlib
import sys

from llm.commands import run_command

# command -> (module, what it does)
COMMANDS = {
    "train": ("train", "pretrain from a configuration file, or resume"),
    "sample": ("sample", "write text and the probability of every token"),
    "score": ("score", "the probability of every token of given text"),
    "eval": ("eval", "run tasks of lm-evaluation-harness"),
    "serve": ("serve", "an HTTP server: OpenAI's completions, and a live page"),
    "bench": ("bench", "how fast each part is on this machine"),
    "replay": ("replay", "the exact batch that a step was trained on"),
    "diff": ("diff", "where two runs part, or what changed between two dumps of a text"),
    "verify": ("verify", "check a run's checkpoints: manifest, parameters, receipt"),
    "plan": ("plan", "what a step needs on devices that are not here"),
    "import-hf": ("import_hf", "make a run of a Hugging Face model"),
    "export-hf": ("export_hf", "make a Hugging Face model of a run"),
}


def main() -> int:
    """Dispatch to llm/commands/COMMAND.py."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"error: there is no command {name!r}{hint}\n\n{_help()}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"llm.commands.{COMMANDS[name][0]}")
    return run_command(module.main, sys.argv[2:])


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {meaning}" for name, (_, meaning) in COMMANDS.items()]
    return "usage: python -m llm COMMAND [--help] ...\n\ncommands:\n" + "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
