"""Pretrain a GPT-style language model: python train.py CONFIG.toml [--section.key VALUE ...]"""

import sys

from llm.commands import run_command
from llm.commands.train import main

if __name__ == "__main__":
    sys.exit(run_command(main))
