"""python -m llm export-gguf RUN FILE: a GGUF file of a checkpoint, for llama.cpp and Ollama.

The model must be of a family that llama.cpp has, with a tokenizer of bytes or byte pairs; a message
names what is in the way (docs/models.md). Needs the extra `gguf`.
"""

import contextlib
import json
import os
from pathlib import Path

from llm.commands.flags import argument, parse
from llm.commands.shared import ExportOptions
from llm.console import say
from llm.errors import UsageError
from llm.files import disk_full_reason, free_bytes, readable_bytes, why


class Options(ExportOptions):
    """The command line."""

    file: str = argument("FILE", "file to make, such as model.gguf")


def main(arguments: list[str]) -> int:
    """Exit codes as in docs/design.md; errors are raised as LLMError."""
    options = parse(Options, arguments)
    path = Path(options.file)
    if os.path.lexists(path):
        raise UsageError(f"{path} exists already; give the name of a new file")
    opened = options.open()

    from llm.interop.gguf import to_gguf

    partial = path.with_name(f"{path.name}.partial")
    config, tokenizer = opened.spec.config, opened.tokenizer
    try:
        family = to_gguf(config, opened.params, tokenizer, partial, opened.run, options.dtype)
        partial.rename(path)
    except OSError as error:
        if reason := disk_full_reason(error):
            free = readable_bytes(free_bytes(path.parent))
            reason = f"no room ({reason}; {free} are free), and nothing was left there"
        raise UsageError(f"{path} cannot be written: {reason or why(error)}") from None
    finally:
        with contextlib.suppress(OSError):  # it is not there, or cannot be
            partial.unlink()
    if options.as_json:
        print(json.dumps({**opened.checkpoint, "file": options.file, "architecture": family}))
    say(
        f"{options.file} holds step {opened.step} of {opened.run} as a {family} model; open it: "
        f"llama-cli -m {options.file}"
    )
    return 0
