"""python train.py CONFIG [--section.key VALUE ...]: pretrain; see llm/commands/train.py."""

import sys

from llm.commands import run_command
from llm.commands.train import main

if __name__ == "__main__":
    sys.exit(run_command(main))
