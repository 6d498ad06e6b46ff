"""python sample.py RUN [--prompt TEXT ...]: write text; see llm/commands/sample.py."""

import sys

from llm.commands import run_command
from llm.commands.sample import main

if __name__ == "__main__":
    sys.exit(run_command(main))
