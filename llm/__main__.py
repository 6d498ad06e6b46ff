"""`python -m llm COMMAND ...`: runs llm/commands/COMMAND.py."""

from __future__ import annotations

import difflib
import importlib
import sys

from llm.commands import run_command
from llm.errors import UsageError

# The name of a command and what it does; import-hf is llm/commands/import_hf.py.
COMMANDS = {
    "train": "pretrain from a configuration file, or resume",
    "prepare": "tokenise a corpus, and say what is in it",
    "data-report": "what is in a corpus: duplicates, rules of quality, personal data",
    "sample": "write text, and the probability of every token",
    "score": "the probability of every token of a given text",
    "eval": "run tasks of lm-evaluation-harness",
    "serve": "an HTTP server: OpenAI's completions, and a live page",
    "plan": "what a step needs on devices that are not here",
    "bench": "how fast each part is on this machine",
    "replay": "the exact batch that a step was trained on",
    "diff": "where two runs part, or how two dumps of a text differ",
    "verify": "check a run's checkpoints: manifest, parameters, receipt",
    "report": "a run as a page: curves, time, a text being learnt; or several compared",
    "history": "how a text became probable: at each checkpoint",
    "average": "a run whose parameters are a mean of checkpoints",
    "memorized": "does the model repeat its training text?",
    "import-hf": "make a run of a Hugging Face model",
    "export-hf": "make a Hugging Face model of a run",
    "export-gguf": "make a GGUF file of a run, for llama.cpp and Ollama",
}


def main(arguments: list[str]) -> int:
    """Run the command that the first word names, with the words after it."""
    name, *words = arguments or ["--help"]
    if name in ("-h", "--help"):
        print("usage: python -m llm COMMAND ...\n\nCommands:\n")
        width = max(map(len, COMMANDS))
        for command, meaning in COMMANDS.items():
            print(f"  {command:{width}}  {meaning}")
        print("\npython -m llm COMMAND --help lists the flags of a command.")
        return 0
    if name.replace("_", "-") not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(COMMANDS)}"
        raise UsageError(f"there is no command {name!r}; {hint}")
    module = importlib.import_module(f"llm.commands.{name.replace('-', '_')}")
    code: int = module.main(words)
    return code


if __name__ == "__main__":
    sys.exit(run_command(main))
